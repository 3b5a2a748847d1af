"""TAID: what the interpolated teacher says, how it moves by the fall of the loss, and that the student ends at the true teacher."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import classifying
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from classifying import Classifier, bind, outputs, trainer

from edgekd.distillation import points
from edgekd.distillation.outputs import Context, Outputs
from edgekd.distillation.targets.taid import TAID
from edgekd.errors import UsageError


def context(photos: int = 2, **more: Any) -> Context:
    return Context(torch.ones(photos, 1, 4, 4), steps=10, **more)


def random(seed: int, photos: int = 6, classes: int = 7) -> Outputs:
    g = torch.Generator().manual_seed(seed)
    return outputs(logits=torch.randn(photos, classes, generator=g) * 2, pooled=torch.randn(photos, 5, generator=g))


def taid(ours: Outputs, theirs: Outputs, objective: str = "kd", **options: Any) -> TAID:
    return bind(points.build("target", "taid", options), ours, theirs, context(photos=6), objectives=[{"name": objective}])


def test_taid__starts_between_student_and_teacher() -> None:
    ours, theirs = random(1), random(2)
    found = taid(ours, theirs)(ours, theirs, context(photos=6))
    assert torch.allclose(found["logits"], 0.6 * ours["logits"] + 0.4 * theirs["logits"]) and found.pooled is theirs.pooled


def test_taid__moves_by_the_fall_of_the_loss() -> None:
    ours, theirs = random(1), random(2)
    one = taid(ours, theirs, rate=0.1, momentum=0.5)
    one(ours, theirs, context(photos=6))
    assert one.t.item() == pytest.approx(0.4), "the first loss is only remembered"
    first = one.last.item()
    better = replace(ours, logits=ours["logits"].lerp(theirs["logits"], 0.5))
    goal = one(better, theirs, context(photos=6))
    loss = F.kl_div(better["logits"].log_softmax(1), goal["logits"].softmax(1), reduction="batchmean").item()
    trend = 0.5 * (first - loss) / first
    assert one.last.item() == pytest.approx(loss, rel=1e-5) and one.trend.item() == pytest.approx(trend, rel=1e-4)
    assert one.t.item() == pytest.approx(0.4 + 0.1 / (1 + np.exp(-trend)) * 0.6, rel=1e-5)
    one(better, theirs, replace(context(photos=6), step=9))
    assert one.t.item() == pytest.approx(0.4 + 0.6 * 0.9), "never behind the straight line"
    one(replace(better, logits=better["logits"] * torch.inf), theirs, context(photos=6))
    assert torch.isfinite(one.last) and one.t.item() == pytest.approx(0.94)
    assert set(one.state_dict()) == {"t", "last", "trend"}


def test_taid__mixes_the_embedding_where_no_logits_are_learned() -> None:
    """A teacher's further channels stay as they are; the student's coarser grid is brought to the teacher's."""
    small, large = torch.zeros(2, 3, 2, 2), torch.ones(2, 5, 4, 4)
    ours, theirs = Outputs.of({"embedding": small}), Outputs.of({"embedding": large})
    teacher = Classifier(0, 3)
    one = bind(points.build("target", "taid", {"start": 0.25}), ours, theirs, context(), teacher, objectives=[{"name": "feature_mse"}])
    found = one(ours, theirs, context())
    assert torch.equal(found["embedding"][:, :3], torch.full((2, 3, 4, 4), 0.25)) and torch.equal(found["embedding"][:, 3:], large[:, 3:])
    assert found.taps["embedding"] is found.embedding, "objectives that read it as a tap see the same"


def test_taid__refuses_what_cannot_be_mixed() -> None:
    with pytest.raises(UsageError, match="they have 3 and 4 channels"):
        taid(random(1, 6, 3), random(2, 6, 4))
    with pytest.raises(UsageError, match="start < end"):
        points.build("target", "taid", {"start": 1.0})


def test_training__taid_brings_the_student_to_the_teacher(tmp_path: Path) -> None:
    one = trainer(tmp_path, [{"name": "kd"}], targets=[{"name": "taid"}])
    photos = one.batches.batch(range(classifying.PHOTOS))

    def apart() -> float:
        with torch.no_grad():
            ours = Outputs.of(one.student.eval().outputs(photos.images))
        return points.build("objective", "kd", {})(ours, Outputs.of(photos.cached["classifier16"]), Context(photos.valid)).mean().item()

    before = apart()
    one.run()
    assert apart() < 0.5 * before and one.aux["target_0_taid"].t > 0.9
