"""Simulated prompts as tensors: in the mask, uniform over the error region, with the labels of SAM."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from edgekd.distillation.clicks import around, boxes, central_cell, draw_cell, error_click, first_prompts, pick_cell, row_counts
from edgekd.distillation.clicks import cells as shares
from edgekd.protocols import ABSENT, BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, NEGATIVE, POSITIVE


def square(size: int, y0: int, y1: int, x0: int, x1: int) -> torch.Tensor:
    mask = torch.zeros(1, size, size, dtype=torch.bool)
    mask[:, y0:y1, x0:x1] = True
    return mask


def cells(points: torch.Tensor) -> torch.Tensor:
    return ((points - 1.5) / 4).round().long()


def test_pick_cell__is_uniform_over_the_mask() -> None:
    mask = square(16, 2, 4, 5, 10).expand(5000, 16, 16)
    x, y = cells(pick_cell(mask, torch.Generator().manual_seed(0))).unbind(1)
    assert mask[torch.arange(5000), y, x].all()
    counts = torch.bincount(y * 16 + x, minlength=256)
    counts = counts[counts > 0].float()
    assert len(counts) == 10
    chi_square = float(((counts - 500) ** 2 / 500).sum())
    assert chi_square < 27.9, "p = 0.001 at 9 degrees of freedom"


def test_pick_cell__never_lands_on_weight_zero_at_the_edges() -> None:
    mask = torch.zeros(2, 8, 8)
    mask[0, 0, 0] = mask[1, 7, 7] = 1
    for seed in range(20):
        found = cells(pick_cell(mask, torch.Generator().manual_seed(seed)))
        assert found.tolist() == [[0, 0], [7, 7]]


def test_pick_cell__an_empty_mask_gives_the_middle() -> None:
    assert cells(pick_cell(torch.zeros(1, 8, 8))).tolist() == [[0, 4]]


def test_central_cell__is_far_from_the_border() -> None:
    x, y = cells(central_cell(square(32, 4, 25, 6, 27)))[0].tolist()
    assert 10 <= x <= 22 and 8 <= y <= 20


def test_boxes__lie_on_pixel_edges() -> None:
    """The prompt encoder adds half a pixel, so the edges 8 and 20 are given as 7.5 and 19.5."""
    assert boxes(square(32, 4, 12, 8, 20)).tolist() == [[[7.5, 3.5], [19.5, 11.5]]]


def test_boxes__noise_is_bounded() -> None:
    mask = square(64, 8, 56, 8, 56).expand(500, 64, 64)
    moved = (boxes(mask, 0.1, 3.0, torch.Generator().manual_seed(1)) - boxes(mask)).abs()
    assert moved.mean() > 0 and moved.max() <= 3.0


def test_first_prompts__boxes_and_clicks_share_a_batch() -> None:
    mask = square(64, 8, 40, 12, 50).expand(400, 64, 64)
    points, labels = first_prompts(mask, mask[:, ::4, ::4], 0.5, torch.Generator().manual_seed(0))
    as_box = labels[:, 0] == BOX_TOP_LEFT
    assert 120 < int(as_box.sum()) < 280
    assert (labels[as_box] == torch.tensor([BOX_TOP_LEFT, BOX_BOTTOM_RIGHT])).all()
    assert (labels[~as_box] == torch.tensor([POSITIVE, ABSENT])).all()
    clicks = cells(points[~as_box][:, 0])
    assert mask[0, ::4, ::4][clicks[:, 1], clicks[:, 0]].all()


def test_first_prompts__one_coin_for_the_batch() -> None:
    mask = square(64, 8, 40, 12, 50).expand(30, 64, 64)
    seen = set()
    for seed in range(12):
        _, labels = first_prompts(mask, mask[:, ::4, ::4], 0.5, torch.Generator().manual_seed(seed), together=True)
        kinds = set(labels[:, 0].tolist())
        assert len(kinds) == 1
        seen |= kinds
    assert seen == {BOX_TOP_LEFT, POSITIVE}


def test_first_prompts__several_clicks_all_in_the_mask() -> None:
    mask = square(64, 8, 40, 12, 50).expand(300, 64, 64)
    points, labels = first_prompts(mask, mask[:, ::4, ::4], 0.3, torch.Generator().manual_seed(0), clicks=(2, 5), central=0.0)
    assert points.shape == (300, 5, 2) and labels.shape == (300, 5)
    as_box = labels[:, 0] == BOX_TOP_LEFT
    assert (labels[as_box] == torch.tensor([BOX_TOP_LEFT, BOX_BOTTOM_RIGHT, ABSENT, ABSENT, ABSENT])).all()
    counts = (labels[~as_box] == POSITIVE).sum(1)
    assert set(counts.tolist()) == {2, 3, 4, 5}
    at = cells(points[~as_box][labels[~as_box] == POSITIVE])
    assert mask[0, ::4, ::4][at[:, 1], at[:, 0]].all()


def test_first_prompts__a_box_without_noise_is_the_mask_s_own() -> None:
    mask = square(64, 8, 40, 12, 50)
    points, _ = first_prompts(mask, mask[:, ::4, ::4], 1.0, jitter=0.0)
    assert points.tolist() == boxes(mask).tolist()


def test_error_click__fewer_wrong_cells_than_asked_for_is_absent() -> None:
    truth, prediction = square(16, 0, 4, 0, 4), square(16, 0, 4, 0, 2)  # 8 cells are missing
    for fewest, wanted in ((8, POSITIVE), (9, ABSENT)):
        assert error_click(prediction, truth, generator=torch.Generator().manual_seed(0), fewest=fewest)[1].item() == wanted


def test_error_click__positive_on_what_is_missing_negative_on_what_is_too_much() -> None:
    truth, prediction = square(16, 0, 4, 0, 4), square(16, 0, 4, 2, 6)
    seen = set()
    for seed in range(40):
        point, label = error_click(prediction, truth, generator=torch.Generator().manual_seed(seed))
        x, y = cells(point[:, 0])[0].tolist()
        assert bool(prediction[0, y, x]) != bool(truth[0, y, x])
        assert label.item() == (POSITIVE if truth[0, y, x] else NEGATIVE)
        seen.add(label.item())
    assert seen == {POSITIVE, NEGATIVE}


def test_error_click__nothing_wrong_is_absent() -> None:
    mask = square(16, 0, 4, 0, 4)
    assert error_click(mask, mask)[1].item() == ABSENT


def test_error_click__padding_is_never_clicked() -> None:
    valid = square(16, 0, 16, 0, 2)
    for seed in range(20):
        point, _ = error_click(square(16, 0, 0, 0, 0), square(16, 0, 16, 0, 16), valid, torch.Generator().manual_seed(seed))
        assert cells(point[:, 0])[0, 0] < 2


# --- against the loop over masks -------------------------------------------------------------------------------------------


def looped(prediction: torch.Tensor, truth: torch.Tensor, generator: torch.Generator, fewest: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """EdgeSAM's sampling, mask by mask: columns and rows (P, 2) of cells of the error region, each alike likely, and labels (P,)."""
    found, labels = [], []
    for ours, theirs in zip(prediction, truth, strict=True):
        candidates = (ours != theirs).nonzero()
        if len(candidates) < fewest:
            found.append(torch.zeros(2, dtype=torch.long))
            labels.append(ABSENT)
        else:
            row, column = candidates[torch.randint(len(candidates), (1,), generator=generator)][0]
            found.append(torch.stack([column, row]))
            labels.append(POSITIVE if theirs[row, column] else NEGATIVE)
    return torch.stack(found), torch.tensor(labels).float()


def chi_square(one: torch.Tensor, other: torch.Tensor) -> tuple[float, int]:
    """Pearson's statistic of two samples of equal size over the same cells, and its degrees of freedom."""
    both = (one + other).float()
    used = both > 0
    return float((((one - other) ** 2)[used] / both[used]).sum()), int(used.sum()) - 1


@pytest.mark.parametrize("width", [16, 20], ids=["eight at a time", "a width that is no multiple of 8"])
def test_error_click__is_distributed_as_the_loop_over_masks(width: int) -> None:
    truth, prediction = torch.zeros(1, 16, width, dtype=torch.bool), torch.zeros(1, 16, width, dtype=torch.bool)
    truth[:, 3:9, 2:9], prediction[:, 5:12, 4:12] = True, True
    truth[:, 15, width - 1] = True  # the last cell of all
    draws = 40_000
    many = torch.Generator().manual_seed(1)
    point, label = error_click(prediction.expand(draws, -1, -1), truth.expand(draws, -1, -1), generator=torch.Generator().manual_seed(0), fewest=10)
    x, y = cells(point[:, 0]).unbind(1)
    theirs, their_labels = looped(prediction.expand(4000, -1, -1), truth.expand(4000, -1, -1), many)
    region = (prediction ^ truth)[0]
    assert region[y, x].all() and region[theirs[:, 1], theirs[:, 0]].all()
    ours_count = torch.bincount(y * width + x, minlength=16 * width)[region.flatten()].float()
    size = int(region.sum())
    even = float(((ours_count - draws / size) ** 2 / (draws / size)).sum())
    assert even < size - 1 + 3.1 * (2 * (size - 1)) ** 0.5, "p = 0.001: each cell alike likely"
    statistic, freedom = chi_square(torch.bincount(y[:4000] * width + x[:4000], minlength=16 * width), torch.bincount(theirs[:, 1] * width + theirs[:, 0], minlength=16 * width))
    assert freedom == size - 1 and statistic < freedom + 3.1 * (2 * freedom) ** 0.5, "p = 0.001: the two samples are of one distribution"
    shares_of_positive = [float((labels == POSITIVE).float().mean()) for labels in (label[:, 0], their_labels)]
    assert abs(shares_of_positive[0] - shares_of_positive[1]) < 0.04


def test_error_click__below_ten_wrong_cells_none_like_the_loop() -> None:
    truth = torch.zeros(3, 16, 16, dtype=torch.bool)
    prediction = truth.clone()
    for number, wrong in enumerate((9, 10, 11)):
        prediction[number].view(-1)[100 : 100 + wrong] = True
    _, label = error_click(prediction, truth, generator=torch.Generator().manual_seed(0), fewest=10)
    _, theirs = looped(prediction, truth, torch.Generator().manual_seed(0))
    assert label[:, 0].tolist() == theirs.tolist() == [ABSENT, NEGATIVE, NEGATIVE]


@pytest.mark.parametrize("shape", [(5, 7, 16), (3, 4, 12), (2, 3, 2048), (4, 64, 64)])
def test_row_counts__are_sums(shape: tuple[int, int, int]) -> None:
    masks = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    masks[0] = True
    assert torch.equal(row_counts(masks), masks.sum(-1))
    assert torch.equal(row_counts(masks.transpose(1, 2)), masks.transpose(1, 2).sum(-1))


def test_draw_cell__every_cell_once_as_the_uniform_number_grows() -> None:
    mask = torch.rand(1, 9, 8, generator=torch.Generator().manual_seed(2)) < 0.4
    inside = mask[0].nonzero()
    uniform = (torch.arange(len(inside)) / len(inside) + 1e-6)[:, None]
    column, row, count = draw_cell(mask.expand(len(inside), -1, -1), uniform)
    assert torch.equal(torch.stack([row, column], 1), inside) and (count == len(inside)).all()
    column, row, _ = draw_cell(mask, torch.tensor([[1 - 2.0**-24]]))
    assert [int(row), int(column)] == inside[-1].tolist()
    column, row, count = draw_cell(torch.zeros(1, 9, 8, dtype=torch.bool), torch.tensor([[0.3]]))
    assert (int(row) * 8 + int(column), int(count)) == (36, 0)


def test_cells_and_around__are_average_pooling() -> None:
    masks = torch.rand(3, 24, 32, generator=torch.Generator().manual_seed(0)) < 0.6
    assert torch.equal(shares(masks), F.avg_pool2d(masks.float(), 4))
    for size in (5, 9, 17):
        assert torch.allclose(around(masks, size), F.avg_pool2d(masks.float(), size, 1, size // 2), atol=1e-6)
