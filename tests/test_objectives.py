"""Objectives against numbers worked out by hand."""
from __future__ import annotations

import numpy as np
import pytest
import torch

from edgekd.distillation import points
from edgekd.distillation.losses import aligned, focal
from edgekd.distillation.objectives.point_masks import uncertain_points
from edgekd.distillation.outputs import Context, Outputs
from edgekd.errors import UsageError


def test_feature_mse__leaves_padding_out() -> None:
    ours, theirs = torch.zeros(1, 2, 4, 4), torch.ones(1, 2, 4, 4)
    theirs[:, :, 2:] = 100
    valid = torch.zeros(1, 1, 16, 16)
    valid[:, :, :8] = 1
    loss = points.build("objective", "feature_mse", {})(Outputs(ours), Outputs(theirs), Context(valid))
    assert loss.tolist() == [1.0]


def masks_context(prompts: int, size: int, single: list[bool]) -> Context:
    return Context(torch.ones(1, 1, size, size), torch.ones(prompts, size, size), torch.tensor(single))


def test_prompt_masks__by_hand() -> None:
    teacher_logits, student_logits = torch.full((1, 4, 2, 2), 5.0), torch.zeros(1, 4, 2, 2)
    loss = points.build("objective", "prompt_masks", {"bce": 1.0, "dice": 0.0})(Outputs(torch.zeros(0), student_logits), Outputs(torch.zeros(0), teacher_logits),
                                                                      masks_context(1, 2, [False]))
    assert loss.item() == pytest.approx(np.log(2))
    dice = points.build("objective", "prompt_masks", {"bce": 0.0, "dice": 1.0})(Outputs(torch.zeros(0), student_logits), Outputs(torch.zeros(0), teacher_logits),
                                                                      masks_context(1, 2, [False]))
    assert dice.item() == pytest.approx(1 - (2 * 2 + 1) / (2 + 4 + 1))


def test_prompt_masks__alternatives_learn_from_one_click_only() -> None:
    teacher_logits, student_logits = torch.full((2, 4, 2, 2), 5.0), torch.full((2, 4, 2, 2), 9.0)
    student_logits[:, 2] = -9.0
    loss = points.build("objective", "prompt_masks", {})(Outputs(torch.zeros(0), student_logits), Outputs(torch.zeros(0), teacher_logits), masks_context(2, 2, [True, False]))
    assert loss[0] > 10 and loss[1] < 0.1


def test_iou_head__is_a_squared_error() -> None:
    ours, theirs = Outputs(torch.zeros(0), iou=torch.zeros(1, 4)), Outputs(torch.zeros(0), iou=torch.tensor([[0.0, 1.0, 0.0, 1.0]]))
    assert points.build("objective", "iou_head", {})(ours, theirs, masks_context(1, 2, [True])).tolist() == [0.5]


def embeddings(difference: float) -> tuple[Outputs, Outputs, Context]:
    """Two cells of photo that differ by `difference`, two of padding that differ by far more."""
    theirs = torch.full((1, 2, 2, 2), difference)
    theirs[:, :, 1] = 77.0
    valid = torch.ones(1, 1, 8, 8)
    valid[:, :, 4:] = 0
    return Outputs(torch.zeros(1, 2, 2, 2)), Outputs(theirs), Context(valid)


@pytest.mark.parametrize(("name", "options", "difference", "wanted"), [
    ("feature_mse", {}, 3.0, 9.0), ("feature_l1", {}, -3.0, 3.0), ("feature_huber", {}, 0.5, 0.125), ("feature_huber", {}, 3.0, 2.5),
    ("feature_huber", {"delta": 2.0}, 3.0, 2.0 * (3.0 - 1.0)),
])
def test_feature_objectives__by_hand(name: str, options: dict, difference: float, wanted: float) -> None:
    assert points.build("objective", name, options)(*embeddings(difference)).tolist() == pytest.approx([wanted])


def test_aligned__leaves_a_foreign_teacher_s_further_channels_out() -> None:
    ours, theirs = aligned(torch.zeros(1, 2, 4, 4), torch.cat([torch.ones(1, 2, 8, 8), torch.full((1, 3, 8, 8), 9.0)], dim=1))
    assert ours.shape == theirs.shape == (1, 2, 4, 4) and bool((theirs == 1).all())


def test_focal__by_hand() -> None:
    """p = sigmoid(ln 3) = 0.75: 0.25 x 0.25^2 x -ln 0.75 where the target is 1, 0.75 x 0.75^2 x -ln 0.25 where it is 0."""
    logits, valid = torch.full((1, 1, 2), float(np.log(3))), torch.ones(1, 1, 2)
    wanted = (0.25 * 0.25**2 * -np.log(0.75) + 0.75 * 0.75**2 * -np.log(0.25)) / 2
    assert focal(logits, torch.tensor([[[1.0, 0.0]]]), valid).item() == pytest.approx(wanted)


def test_decoder_tokens__alternatives_count_for_one_click() -> None:
    ours, theirs = torch.zeros(2, 5, 3), torch.zeros(2, 5, 3)
    theirs[:, :2], theirs[:, 2:] = 1.0, 4.0
    found = points.build("objective", "decoder_tokens", {})(Outputs(torch.zeros(0), tokens=ours), Outputs(torch.zeros(0), tokens=theirs), masks_context(2, 2, [False, True]))
    assert found.tolist() == pytest.approx([1.0, (2 * 1 + 3 * 4) / 5])


def truth_context(truth: torch.Tensor, size: int, single: list[bool]) -> Context:
    prompts = len(truth)
    return Context(torch.ones(1, 1, size, size), torch.ones(prompts, size, size), torch.tensor(single), truth, generator=torch.Generator().manual_seed(0))


def test_hard_masks__weigh_what_the_student_is_behind_in() -> None:
    """Teacher right everywhere; student right on the left half only: IoU 1 against 0.5, weight sigmoid(1 / 0.5 - 1)."""
    truth = torch.ones(1, 8, 8, dtype=torch.bool)
    theirs, ours = torch.full((1, 4, 2, 2), 30.0), torch.full((1, 4, 2, 2), 30.0)
    ours[..., 1] = -30.0
    context = truth_context(truth, 2, [False])
    found = points.build("objective", "hard_masks", {"eps": 0.0})(Outputs(torch.zeros(0), ours), Outputs(torch.zeros(0), theirs), context)
    assert found.item() == pytest.approx(0.5 / (1 + np.exp(-1)))
    plain = points.build("objective", "hard_masks", {"weighted": False, "logits": True})(Outputs(torch.zeros(0), ours), Outputs(torch.zeros(0), theirs), context)
    assert plain.item() == pytest.approx(30.0)


def test_truth_masks__the_best_alternative_learns_after_one_click() -> None:
    truth = torch.ones(2, 8, 8, dtype=torch.bool)
    ours = torch.full((2, 4, 2, 2), -30.0)
    ours[:, 2] = 30.0
    ours.requires_grad_(True)
    iou = torch.tensor([[0.0, 0.0, 0.9, 0.0]]).repeat(2, 1)
    found = points.build("objective", "truth_masks", {})(Outputs(torch.zeros(0), ours, iou), Outputs(torch.zeros(0)), truth_context(truth, 2, [True, False]))
    assert found[0].item() == pytest.approx(0.1, abs=1e-4), "right mask; 0.9 predicted where 1.0 is true"
    assert found[1].item() > 20 * 0.25 * 20, "mask 0, wrong everywhere: focal 0.25 x 30 and dice, and its IoU of 0 is predicted rightly"
    found[1].backward()
    assert ours.grad is not None and bool((ours.grad[1, 0] != 0).any()) and bool((ours.grad[1, 1:] == 0).all())


def test_point_masks__looks_where_the_student_is_unsure() -> None:
    logits = torch.linspace(-8, 8, 32).expand(1, 32, 32).contiguous()  # unsure at x = 0.5
    xy = uncertain_points(logits, 400, 3.0, 0.75, torch.Generator().manual_seed(0))
    distance = (xy[0, :, 0] - 0.5).abs()
    assert xy.shape == (1, 400, 2) and float(distance[:300].max()) < 0.2 and float(distance[300:].max()) > 0.4


def test_point_masks__by_hand() -> None:
    truth = torch.ones(1, 8, 8, dtype=torch.bool)
    ours = torch.zeros(1, 4, 2, 2)
    ours[:, 3] = 40.0
    for several, wanted in ((0.0, 20 * np.log(2) + 1 - (2 * 8 + 1) / (8 + 16 + 1)), (1.0, 0.0)):
        one = points.build("objective", "point_masks", {"side": 4, "several": several})
        assert one(Outputs(torch.zeros(0), ours), Outputs(torch.zeros(0)), truth_context(truth, 2, [True])).item() == pytest.approx(wanted, abs=1e-4)


def test_objectives__unknown_names_and_options() -> None:
    with pytest.raises(UsageError, match="did you mean 'feature_mse'"):
        points.build("objective", "feture_mse", {})
    with pytest.raises(UsageError, match="temperature"):
        points.build("objective", "prompt_masks", {"temperature": 2})
