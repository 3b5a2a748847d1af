"""What a person and a program see: plain progress, JSON without NaN, tables."""
from __future__ import annotations

import json

import pytest

from edgekd import console


def lines_of(steps: list[tuple[float, dict[str, object]]], total: int | None = 10) -> list[str]:
    """Advance a plain progress at the given times and return what it wrote."""
    now, written = [0.0], list[str]()
    progress = console.PlainProgress(total, "distill", clock=lambda: now[0], write=written.append)
    for at, fields in steps:
        now[0] = at
        progress.advance(**fields)
    progress.close()
    return written


def test_plain_progress__lines_are_at_least_five_seconds_apart() -> None:
    written = lines_of([(t, {}) for t in (1.0, 2.0, 4.9, 5.0, 6.0, 9.9, 10.0)])
    assert written == ["distill 4/10 (40%), 8 s to go", "distill 7/10 (70%), 4 s to go"]


def test_plain_progress__a_short_loop_says_nothing() -> None:
    assert lines_of([(0.1, {}), (0.2, {})]) == []


def test_plain_progress__shows_fields_and_the_last_state() -> None:
    written = lines_of([(6.0, {"loss": 0.123456}), (7.0, {"loss": 0.1})])
    assert written[0] == "distill 1/10 (10%) loss 0.1235, 54 s to go"
    assert written[-1].startswith("distill 2/10 (20%) loss 0.1")


def test_plain_progress__without_a_total_there_is_no_time_to_go() -> None:
    assert lines_of([(6.0, {})], total=None) == ["distill 1"]


def test_progress__goes_to_stderr_even_when_the_loop_fails(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), console.progress(3, "x") as p:
        p.advance()
        raise RuntimeError
    assert capsys.readouterr().out == ""


def test_interactive__never_with_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    console.plain()
    try:
        assert not console.interactive()
    finally:
        console.plain(False)


@pytest.mark.parametrize(("seconds", "said"), [(0.4, "0 s"), (59.4, "59 s"), (60, "1 min 00 s"), (190, "3 min 10 s"), (7500, "2 h 05 min"), (-1, "0 s")])
def test_duration(seconds: float, said: str) -> None:
    assert console.duration(seconds) == said


def test_emit__is_one_json_document_without_nan(capsys: pytest.CaptureFixture[str]) -> None:
    console.emit({"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": -float("inf")}, "e": "µ"})
    out = capsys.readouterr().out
    assert json.loads(out) == {"a": None, "b": [None, 1.5], "c": {"d": None}, "e": "µ"}
    assert "µ" in out


def test_table__one_line_a_row_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    console.table(["name", "ms"], [["a" * 90, 1.25], ["b", None]])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert "1.25" in lines[1] and "—" in lines[2]


def test_log_and_warn__go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    console.log("one")
    console.warn("two")
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == "one\nwarning: two\n"
