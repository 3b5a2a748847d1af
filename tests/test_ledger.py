"""The ledger: finished work is found again, damage is ignored, nothing is lost."""
from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgekd.ledger import Ledger


def test_once__works_once(tmp_path: Path) -> None:
    ledger, calls = Ledger(tmp_path / "l.jsonl"), []
    for _ in range(3):
        assert ledger.once("export", "a", "k", lambda: calls.append(1) or {"n": 1}) == {"n": 1}
    assert len(calls) == 1 and ledger.reused == 2


def test_once__is_remembered_by_the_next_process(tmp_path: Path) -> None:
    Ledger(tmp_path / "l.jsonl").record("export", "a", "k", {"n": 1})
    again = Ledger(tmp_path / "l.jsonl")
    assert again.known("export", "k") == {"n": 1}
    assert again.known("export", "other") is None and again.known("profile", "k") is None


def test_once__a_failure_is_not_recorded(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.jsonl")

    def fails() -> dict:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        ledger.once("export", "a", "k", fails)
    assert ledger.known("export", "k") is None


def test_record__the_last_of_a_key_counts(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.jsonl")
    ledger.record("export", "a", "k", {"n": 1})
    ledger.record("export", "a", "k", {"n": 2})
    assert Ledger(ledger.path).known("export", "k") == {"n": 2}
    assert len(ledger.path.read_text().splitlines()) == 2, "append-only"


@pytest.mark.parametrize("cut", [1, 10, 30])
def test_load__a_line_cut_short_is_ignored_and_the_next_one_whole(tmp_path: Path, cut: int) -> None:
    ledger = Ledger(tmp_path / "l.jsonl")
    ledger.record("export", "a", "k1", {"n": 1})
    ledger.record("export", "b", "k2", {"n": 2})
    data = ledger.path.read_bytes()
    ledger.path.write_bytes(data[:-cut])
    after = Ledger(ledger.path)
    assert after.known("export", "k1") == {"n": 1}
    after.record("export", "c", "k3", {"n": 3})
    final = Ledger(ledger.path)
    assert final.known("export", "k3") == {"n": 3} and final.known("export", "k1") == {"n": 1}


def test_load__rubbish_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    path.write_bytes(b'\xff\xfe\n[]\n{"what": 1}\nnull\n' + json.dumps({"what": "w", "key": "k", "result": {}}).encode() + b"\n")
    assert Ledger(path).known("w", "k") == {}
