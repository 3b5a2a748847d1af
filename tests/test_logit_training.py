"""Each objective on logits and pooled features distils a small classifier into another, from the cache, through a whole stage."""
from __future__ import annotations

from pathlib import Path

import classifying
import pytest
import torch
from classifying import fall, trainer

TRAINED = {"kd": {}, "dkd": {}, "nkd": {}, "uskd": {}, "dhkd": {}, "ssld": {}, "lelp": {"photos": 10}, "cross_entropy": {}, "dist": {}, "pld": {}, "bd_kd": {},
           "sinkd": {}, "nd": {}, "class_vectors": {"scale": 20.0}, "dho": {}, "vl2v": {}}


@pytest.mark.parametrize(("name", "options"), TRAINED.items())
def test_training__the_loss_falls(tmp_path: Path, name: str, options: dict) -> None:
    assert fall(trainer(tmp_path, [{"name": name, "options": options}])) < 0.9


@pytest.mark.parametrize("name", ["kd", "dkd", "ssld", "dhkd", "dist", "bd_kd", "sinkd"])
def test_training__the_student_comes_to_answer_as_the_teacher(tmp_path: Path, name: str) -> None:
    one = trainer(tmp_path, [{"name": name}], steps=60)
    photos = one.batches.batch(range(classifying.PHOTOS))
    theirs = photos.cached["classifier16"]["logits"].argmax(1)
    assert len(theirs.unique()) > 1, "a teacher that always says the same would prove nothing"

    def agreement() -> float:
        with torch.no_grad():
            return float((one.student.eval().outputs(photos.images)["logits"].argmax(1) == theirs).float().mean())

    before = agreement()
    one.run()
    assert agreement() >= max(0.8, before)


@pytest.mark.parametrize("name", ["dho", "cross_entropy", "uskd", "nd", "dkd"])
def test_training__some_photos_without_labels(tmp_path: Path, name: str) -> None:
    assert fall(trainer(tmp_path, [{"name": name}], photos=classifying.Photos(some=True))) < 0.95


@pytest.mark.parametrize("changes", [{"objectives": [{"name": "nd"}, {"name": "lelp", "options": {"photos": 10}}]},
                                     {"objectives": [{"name": "kd"}], "targets": [{"name": "taid", "options": {"rate": 0.05}}]}], ids=["nd-lelp", "taid"])
def test_training__killed_and_resumed_equals_one_run(tmp_path: Path, changes: dict) -> None:
    whole = trainer(tmp_path / "whole", **changes, steps=12)
    whole.run()
    cut = trainer(tmp_path / "cut", **changes, steps=12)
    cut.set_modes()
    for _ in range(7):
        cut.result.curve.append(cut.train_step())
    cut.save()
    resumed = trainer(tmp_path / "cut", **changes, steps=12)
    resumed.run()
    for one, other in ((whole.student, resumed.student), (whole.aux, resumed.aux)):
        for (key, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
            assert torch.allclose(a.float(), b.float(), atol=1e-4), key


def test_training__bfloat16(tmp_path: Path) -> None:
    assert fall(trainer(tmp_path, [{"name": n} for n in ("kd", "sinkd", "dist", "nd", "class_vectors")], precision="bf16")) < 0.9


