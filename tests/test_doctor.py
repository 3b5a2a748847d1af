"""`doctor` tells the truth about this machine, and a dying toolchain does not end it."""
from __future__ import annotations

from pathlib import Path

import pytest

from edgekd import doctor, plugins
from edgekd.protocols import Availability


class Fake:
    """An exporter with the answer it is given."""

    format, suffix, schemes = "fake", ".f", ("fp32",)

    def __init__(self, answer: Availability | Exception, extra: str | None = "fake") -> None:
        self.answer, self.extra = answer, extra

    def availability(self) -> Availability:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def rows(monkeypatch: pytest.MonkeyPatch, fake: Fake) -> dict[str, object]:
    monkeypatch.setattr(plugins, "exporters", lambda: {"fake": fake})
    return doctor.formats()[0]


def test_formats__what_works_needs_no_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    found = rows(monkeypatch, Fake(Availability(True, version="1.2")))
    assert found["ok"] and found["version"] == "1.2" and found["fix"] is None


def test_formats__what_is_missing_has_the_exact_command(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rows(monkeypatch, Fake(Availability(False, reason="not installed")))["fix"] == 'pip install "edgekd[fake]"'
    assert rows(monkeypatch, Fake(Availability(False, reason="no", fix="apt-get install x")))["fix"] == "apt-get install x"


def test_formats__a_toolchain_that_dies_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    found = rows(monkeypatch, Fake(OSError("bad ELF header"), extra=None))
    assert not found["ok"] and "bad ELF header" in str(found["reason"]) and found["fix"]


@pytest.mark.parametrize(("flags", "said"), [(["amx_bf16", "avx512_vnni"], ["bf16"]), (["avx2"], ["int8"]), (["avx512_vnni"], []), (["asimddp"], [])])
def test_hints__of_the_instruction_sets(flags: list[str], said: list[str]) -> None:
    hints = doctor.hints(flags)
    assert len(hints) == len(said) and all(word in hint for word, hint in zip(said, hints, strict=True))


def test_examine__covers_the_machine(tmp_path: Path) -> None:
    found = doctor.examine(tmp_path)
    assert found["python"]["ok"] and found["memory"]["total_bytes"] > 0 and found["disk"]["free_bytes"] > 0
    assert found["disk"]["folder"] == str(tmp_path.resolve())
    assert {"onnx", "openvino"} <= {f["name"] for f in found["formats"]}


def ways() -> dict[str, dict[str, object]]:
    return {str(t["name"]): t for t in doctor.transports()}


def test_transports__every_way_works_or_says_what_mends_it() -> None:
    found = ways()
    assert list(found) == list(doctor.TRANSPORTS) and found["local"]["ok"]
    assert all(t["ok"] is (t["fix"] is None) and t["note"] for t in found.values())


def test_transports__what_is_missing_has_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from edgekd.profiling.transport import _ort_web

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("EDGEKD_CHROME", raising=False)
    monkeypatch.setattr(doctor, "installed", lambda packages: {})
    found = ways()
    assert found["ssh"]["fix"] == found["adb"]["fix"] == 'pip install "edgekd[devices]"' and "apt-get install chromium" in str(found["browser"]["fix"])
    program = tmp_path / "chromium"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setattr(_ort_web, "find", lambda: None)
    assert (ways()["browser"]["tool"], ways()["browser"]["fix"]) == (str(program), "edgekd doctor --install browser")


def test_install__brings_what_the_measuring_page_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from edgekd.profiling.transport import _ort_web

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(_ort_web, "install", lambda progress: tmp_path)
    assert doctor.install("browser") == tmp_path
