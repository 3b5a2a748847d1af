"""The README's demo table is made from a result file, never typed."""
from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import report_sample as sample

from edgekd.report import schema

README = "# edgekd\n\nbefore\n<!-- demo:begin -->\nold\n<!-- demo:end -->\nafter\n"


@pytest.fixture(scope="module")
def script(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme_table", root / "benchmarks/readme_table.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    (tmp_path / "README.md").write_text(README)
    return ["--readme", str(tmp_path / "README.md"), "--results", str(tmp_path)]


def test_table__is_written_between_the_markers_and_then_current(script: ModuleType, files: list[str], tmp_path: Path) -> None:
    schema.save(tmp_path / "demo-2026-11-21.json", sample.report())
    assert script.main([*files, "--check"]) == 1
    assert script.main(files) == 0
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("# edgekd\n\nbefore\n<!-- demo:begin -->\n| candidate") and text.endswith("<!-- demo:end -->\nafter\n") and "old" not in text
    assert "| `repvit_m1-256-openvino-bf16` | 3.18 + 0.81 | 3.99 | 12.2× | 22.9 | 0.883 | **chosen** |" in text
    assert "Measured on" in text and "2 threads, 2026-11-21" in text
    assert script.main([*files, "--check"]) == 0 and script.main(files) == 0 and (tmp_path / "README.md").read_text() == text


def test_table__is_one_row_a_candidate(script: ModuleType) -> None:
    report = sample.report()
    lines = [line for line in script.table(report, "x").splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(report.candidates) and len({line.count("|") for line in lines}) == 1


def test_newest__is_the_last_by_name(script: ModuleType, tmp_path: Path) -> None:
    for name in ("demo-2026-11-21.json", "demo-2026-12-02.json", "encoders-2027-01-01.json"):
        (tmp_path / name).write_text("{}")
    assert script.newest(tmp_path).name == "demo-2026-12-02.json"


def test_table__without_results_changes_nothing(script: ModuleType, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(files) == 1 and "no demo-*.json" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == README


@pytest.mark.parametrize("readme", ["nothing", "<!-- demo:begin -->", "<!-- demo:end --> <!-- demo:begin -->", README + README])
def test_fill__needs_both_markers_once(script: ModuleType, readme: str) -> None:
    with pytest.raises(ValueError, match="needs"):
        script.fill(readme, "x")


def test_readme__shows_the_newest_result(script: ModuleType, root: Path) -> None:
    assert script.newest(root / "benchmarks/results") is not None
    assert script.main(["--check"]) == 0
