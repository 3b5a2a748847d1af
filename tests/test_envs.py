"""Environments of their own: whole or not at all, asked for disk before, told in pip's words, and the command line around it."""
from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
from edgekd.export import _child, _envs
from edgekd.export._envs import Environment

from edgekd import api, doctor
from edgekd.cli import main
from edgekd.errors import EdgekdError, UsageError

TINY = Environment("nothing", (), "import json, sys; assert sys.prefix != sys.base_prefix", pythons=((3, 8), (3, 99)))
SCRIPT = "def where() -> dict:\n    import sys\n    return {'prefix': sys.prefix}\n"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own, with an environment that takes a second."""
    monkeypatch.setenv("EDGEKD_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(_envs, "ENVIRONMENTS", {"tiny": TINY})
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return tmp_path / "home" / "envs"


def changed(monkeypatch: pytest.MonkeyPatch, **fields: object) -> None:
    monkeypatch.setattr(_envs, "ENVIRONMENTS", {"tiny": replace(TINY, **fields)})  # type: ignore[arg-type]


def left(home: Path) -> list[str]:
    """What lies in the folder of environments, but for locks."""
    return sorted(p.name for p in home.iterdir() if not p.name.endswith(".lock")) if home.exists() else []


def test_an_environment_is_made_once_and_works(home: Path, tmp_path: Path) -> None:
    assert _envs.python_of("tiny") is None and _envs.states()[0]["fix"] == "edgekd doctor --install tiny"
    said: list[str] = []
    python = _envs.install("tiny", said.append)
    assert python == home / "tiny" / "bin" / "python" == _envs.python_of("tiny") and left(home) == ["tiny"] and said
    (tmp_path / "script.py").write_text(SCRIPT)
    assert _child.call(f"{tmp_path / 'script.py'}:where", {}, minutes=1, what="it", python=python) == {"prefix": str(home / "tiny")}
    state, said = _envs.states()[0], []
    assert state["ok"] and state["fix"] is None and state["reason"] is None
    assert _envs.install("tiny", said.append) == python and not said


def test_the_default_home_is_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGEKD_HOME")
    assert _envs.home() == Path.home() / ".cache" / "edgekd" / "envs"


def test_what_is_shipped_is_pinned_and_says_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert "rknn" in _envs.ENVIRONMENTS
    for spec in _envs.ENVIRONMENTS.values():
        assert spec.packages and all("==" in p for p in spec.packages) and spec.disk > 1e9 and spec.what and spec.probe


def test_a_failing_probe_leaves_nothing_and_gives_the_reason(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed(monkeypatch, probe="import no_such_module_anywhere")
    with pytest.raises(EdgekdError, match="no_such_module_anywhere") as e:
        _envs.install("tiny")
    assert e.value.hint and left(home) == [] and _envs.python_of("tiny") is None


def test_pips_last_words_are_in_the_error(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed(monkeypatch, packages=("./no-such-folder-here",))
    with pytest.raises(EdgekdError, match="no-such-folder-here") as e:
        _envs.install("tiny")
    assert "edgekd doctor --install tiny" in (e.value.hint or "") and left(home) == []


def test_a_package_of_ones_own_is_installed_and_probed(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel made by hand, so that neither a network nor a build is needed."""
    import zipfile

    wheel = tmp_path / "edgekd_probe-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("edgekd_probe.py", "answer = 42\n")
        archive.writestr("edgekd_probe-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: edgekd-probe\nVersion: 1.0\n")
        archive.writestr("edgekd_probe-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("edgekd_probe-1.0.dist-info/RECORD", "")
    changed(monkeypatch, packages=(str(wheel),), probe="import edgekd_probe; assert edgekd_probe.answer == 42")
    said: list[str] = []
    python = _envs.install("tiny", said.append)
    assert any("edgekd-probe" in line or "edgekd_probe" in line for line in said)
    assert subprocess.run([python, "-c", "import edgekd_probe"], check=False).returncode == 0 and not (home / "tiny" / "tmp").exists()


def test_too_little_disk_is_told_before_anything_is_made(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed(monkeypatch, disk=5.7e9)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(int(1e12), 0, int(2e9)))
    with pytest.raises(EdgekdError, match=r"takes 5\.7 GB.*2\.0 GB are free") as e:
        _envs.install("tiny")
    assert "EDGEKD_HOME" in (e.value.hint or "") and left(home) == []


def test_a_python_that_the_packages_do_not_exist_for_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    changed(monkeypatch, pythons=((2, 5), (2, 6)))
    with pytest.raises(EdgekdError, match=r"needs Python 2\.5 to 2\.6"):
        _envs.install("tiny")


def test_another_python_that_fits_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "python3.5"
    other.symlink_to(sys.executable)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _envs._interpreter("tiny", replace(TINY, pythons=((3, 4), (3, 6)))) == str(other)


def test_a_machine_that_it_does_not_exist_for_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    changed(monkeypatch, machines=("vax",))
    with pytest.raises(EdgekdError, match="for Linux on vax only"):
        _envs.install("tiny")


def test_a_home_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGEKD_HOME", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="cannot be written") as e:
        _envs.install("tiny")
    assert "EDGEKD_HOME" in (e.value.hint or "")


def test_one_that_was_made_for_other_versions_is_replaced(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _envs.install("tiny")
    about = home / "tiny" / _envs.MADE
    about.write_text(json.dumps({"packages": ["old==1"]}))
    (home / "tiny" / "leftover").write_text("")
    assert _envs.python_of("tiny") is None and _envs.states()[0]["reason"] == "made for other versions"
    _envs.install("tiny")
    assert _envs.python_of("tiny") and not (home / "tiny" / "leftover").exists()


def test_a_step_that_takes_too_long_is_stopped(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed(monkeypatch, probe="import time; time.sleep(60)")
    monkeypatch.setattr(_envs, "MINUTES_TO_PROBE", 0.01)
    begun = time.monotonic()
    with pytest.raises(EdgekdError, match="stopped after"):
        _envs.install("tiny")
    assert time.monotonic() - begun < 30 and left(home) == []


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_installation_leaves_nothing_that_counts(sign: signal.Signals, home: Path, tmp_path: Path) -> None:
    """SIGINT clears up at once; after SIGKILL nobody can, and the next installation does."""
    code = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it starts in the background
from edgekd.export import _envs
_envs.ENVIRONMENTS = {"tiny": _envs.Environment("nothing", (), "import time; print('probing', flush=True); time.sleep(60)", ((3, 8), (3, 99)))}
_envs.install("tiny", lambda line: print(line, flush=True))
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=dict(os.environ))
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("probing"):
            break
    child.send_signal(sign)
    child.wait(20)
    assert _envs.python_of("tiny") is None and "tiny" not in left(home)
    assert left(home) == [] or sign == signal.SIGKILL
    _envs.install("tiny")
    assert left(home) == ["tiny"]


def test_two_installations_of_a_name_do_not_meet(home: Path) -> None:
    home.mkdir(parents=True)
    with open(home / ".tiny.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(EdgekdError, match="being installed by another process"):
            _envs.install("tiny")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as e:
        main(arguments)
    out, err = capsys.readouterr()
    return int(str(e.value.code)), out, err


def test_doctor_installs_lists_and_tells(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "formats", list)
    code, out, _ = run(capsys, "doctor", "--json")
    assert code == 0 and [(e["name"], e["ok"]) for e in json.loads(out)["environments"]] == [("tiny", False)]
    code, out, err = run(capsys, "doctor", "--install", "tiny")
    assert code == 0 and "environment tiny" in out and "trying it" in err
    assert api.doctor()["environments"][0]["ok"]
    code, out, err = run(capsys, "doctor", "--install", "tinny")
    assert code == 2 and "did you mean 'tiny'?" in err and not out
    changed(monkeypatch, pythons=((2, 5), (2, 6)), packages=("new==2",))
    code, out, err = run(capsys, "doctor", "--install", "tiny")
    assert code == 1 and "needs Python 2.5 to 2.6" in err and "hint:" in err


def test_nothing_is_installed_offline(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, _, err = run(capsys, "doctor", "--install", "tiny")
    assert code == 2 and "offline" in err and _envs.python_of("tiny") is None
