"""What is installed: only `edgekd`, with its data; generic names are refused; the door of a checkout works."""
from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).resolve().parents[1]
SIDE = ("export", "profiles", "recipes")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def run(*command: object, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=cwd, env={**os.environ, **env}, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names of the files in a wheel built offline from a copy, so that the checkout gets no build folder."""
    out = tmp_path_factory.mktemp("wheel")
    copy = out / "source"
    copy.mkdir()
    for name in ("edgekd", *SIDE, "pyproject.toml", "README.md", "LICENSE"):
        run("cp", "-r", ROOT / name, copy)
    done = run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", out, copy)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next(out.glob("*.whl"))).namelist()


def test_wheel__holds_edgekd_and_nothing_else(wheel: list[str]) -> None:
    tops = {name.split("/")[0] for name in wheel}
    assert tops == {"edgekd", f"edgekd-{PROJECT['project']['version']}.dist-info"}


def test_wheel__holds_every_module(wheel: list[str]) -> None:
    ours = {str(p.relative_to(ROOT)) for p in (ROOT / "edgekd").rglob("*.py")} | {f"edgekd/{p.relative_to(ROOT)}" for s in SIDE for p in (ROOT / s).rglob("*.py")}
    assert not sorted(ours - set(wheel)), "a package is missing from [tool.setuptools] packages in pyproject.toml"


def test_wheel__holds_every_data_file(wheel: list[str]) -> None:
    ours = {f"edgekd/{p.relative_to(ROOT)}" for s in ("profiles", "recipes") for p in (ROOT / s).glob("*.yaml")}
    data = [p for part in ("teachers/weights", "students/weights", "data/assets", "report/templates") for p in (ROOT / "edgekd" / part).rglob("*")]
    ours |= {str(p.relative_to(ROOT)) for p in data if p.is_file()}
    ours |= {"edgekd/py.typed"}
    assert not sorted(ours - set(wheel))


def test_wheel__holds_no_caches(wheel: list[str]) -> None:
    assert not [n for n in wheel if "__pycache__" in n or n.endswith(".pyc")]


def test_version__is_the_same_everywhere() -> None:
    import edgekd

    assert edgekd.__version__ == PROJECT["project"]["version"]
    assert f"[{edgekd.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("name", SIDE)
def test_side_folders__refuse_their_generic_name(name: str) -> None:
    done = run(sys.executable, "-c", f"import {name}")
    assert done.returncode == 1 and f"import edgekd.{name}" in done.stderr
    done = run(sys.executable, "-c", f"import edgekd.{name}")
    assert done.returncode == 0, done.stderr


def test_door__works_from_anywhere_and_uninstalled(tmp_path: Path) -> None:
    # -S hides site-packages, and with it the installed edgekd; the dependencies come back by path alone
    packages = next(p for p in sys.path if p.endswith("site-packages"))
    code = f"import sys, runpy; sys.path.append({packages!r}); sys.argv = ['cli.py', 'list', 'recipes']; runpy.run_path({str(ROOT / 'cli.py')!r}, run_name='__main__')"
    done = run(sys.executable, "-S", "-c", code, cwd=tmp_path)
    assert done.returncode == 0 and "smoke" in done.stdout, done.stderr
    done = run(sys.executable, ROOT / "cli.py", "--help", cwd=Path("/"))
    assert done.returncode == 0 and "compress" in done.stdout, done.stderr


def test_dependencies__nothing_forbidden_and_torch_capped() -> None:
    """timm brings torchvision, which brings CUDA: only who asks for the extra of that name gets it."""
    extras = {name: found for name, found in PROJECT["project"]["optional-dependencies"].items() if name != "timm"}
    every = PROJECT["project"]["dependencies"] + [d for e in extras.values() for d in e]
    names = {re.split(r"[<>=\[; ]", d)[0].lower() for d in every}
    assert not names & {"torchvision", "timm", "ultralytics", "lightly-train"}
    assert "torch>=2.13,<2.15" in every


def test_constraints__pin_every_dependency() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = PROJECT["project"]["dependencies"] + extras["openvino"] + extras["baselines"] + extras["dev"]
    names = {re.split(r"[<>=\[; ]", d)[0].lower().replace("_", "-") for d in wanted} - {"edgekd", "wheel", "setuptools"}
    assert not names - pinned


def test_makefile__has_the_newcomers_commands() -> None:
    text = (ROOT / "Makefile").read_text()
    for goal in ("setup", "demo", "test", "lint", "types"):
        assert re.search(rf"^{goal}:", text, re.M)
    assert "compress --teacher sam_nano --target host --data examples/photos" in text


def test_ci__runs_what_a_newcomer_runs() -> None:
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    text = script.read_text()
    assert text.index("make test") < text.index("make lint") < text.index("make types")
    assert run("bash", "-n", script).returncode == 0
