"""The log of a run: a row a step, none lost when the run is killed, none counted twice when it goes on."""
from __future__ import annotations

import csv
from pathlib import Path

import pytest

from edgekd.distillation import tracking
from edgekd.distillation.tracking import Tracker, read
from edgekd.errors import UsageError


def test_tracker__keeps_every_step_once_and_writes_a_table(tmp_path: Path) -> None:
    with Tracker(tmp_path) as first:
        for step in range(1, 4):
            first.log("encoder", {"step": step, "loss": 1.0 / step})
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write('{"stage": "encoder", "st')  # killed in the middle of a line
        f.write("\n")
    with Tracker(tmp_path) as again:
        again.log("encoder", {"step": 3, "loss": 0.25})
        again.log("prompts", {"step": 1, "loss": 2.0, "loss.iou_head": 0.5})
    rows = read(tmp_path / "log.jsonl")
    assert [(r["stage"], r["step"]) for r in rows] == [("encoder", 1), ("encoder", 2), ("encoder", 3), ("prompts", 1)]
    assert rows[2]["loss"] == 0.25
    table = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    assert [r["loss"] for r in table] == ["1.0", "0.5", "0.25", "2.0"] and table[3]["loss.iou_head"] == "0.5" and table[0]["loss.iou_head"] == ""


def test_tracker__rows_are_on_disk_before_the_end(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    tracker.log("encoder", {"step": 1, "loss": 0.5})
    assert len(read(tmp_path / "log.jsonl")) == 1
    tracker.close()


def test_tensorboard__writes_events(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="pip install 'edgekd[tracking]'")
    with Tracker(tmp_path, tensorboard=True) as tracker:
        tracker.log("encoder", {"step": 1, "loss": 0.5})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [e.value for e in found.Scalars("encoder/loss")] == [0.5]


def test_tensorboard__missing_is_told_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    real = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith("torch.utils.tensorboard"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match="not installed") as caught:
        tracking.summary_writer(tmp_path)
    assert "pip install" in str(caught.value.hint)


def test_curve__a_panel_a_stage(tmp_path: Path) -> None:
    from xml.etree import ElementTree

    from edgekd.report import learning

    with Tracker(tmp_path) as tracker:
        for stage, loss in (("encoder", 4.0), ("prompts", 2.0)):
            for step in range(1, 6):
                tracker.log(stage, {"step": step, "loss": loss / step})
        tracker.log("prompts", {"step": 6, "loss": None})
    drawn = learning.draw(tmp_path / "log.jsonl")
    assert drawn == str(tmp_path / "curve.svg")
    root = ElementTree.parse(drawn).getroot()
    titles = [e.text for e in root.iter("{http://www.w3.org/2000/svg}text") if e.get("class") == "title"]
    assert titles == ["loss, encoder", "loss, prompts"]
    assert sum(1 for e in root.iter("{http://www.w3.org/2000/svg}path") if e.get("class") == "line") == 2


def test_curve__none_without_two_steps(tmp_path: Path) -> None:
    from edgekd.report import learning

    with Tracker(tmp_path) as tracker:
        tracker.log("encoder", {"step": 1, "loss": 1.0})
    assert learning.draw(tmp_path / "log.jsonl") is None and learning.draw(tmp_path / "nothing.jsonl") is None
