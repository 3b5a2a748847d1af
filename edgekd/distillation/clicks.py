"""Prompts as tensors, simulated at the resolution of the mask logits, for all masks of a batch at once.

SAM's prompt simulation (arXiv 2304.02643, App. A) without a loop over masks: the first prompt is a point or a jittered box, the
next ones are points drawn uniformly from the error region. A click is the centre of a cell of the S/4 grid.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.distillation.draws import Draws, Source, pick
from edgekd.protocols import ABSENT, BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, NEGATIVE, POSITIVE

CELL = 4  # input pixels a side of one logit
FEWEST_ERROR_CELLS = 1


def pick_cell(weights: Tensor, generator: Source = None, side: int = CELL) -> Tensor:
    """weights (P, h, w) >= 0 -> xy (P, 2) in the S frame of one cell of `side` pixels drawn in proportion; the centre cell where all are 0.
    A mask (bool) is drawn from evenly, and in a fraction of the time."""
    uniform = Draws.of(generator).rand(len(weights), 1)
    if weights.dtype == torch.bool:
        column, row, _ = draw_cell(weights, uniform)
        return torch.stack([column, row], dim=1) * side + (side / 2 - 0.5)
    flat = weights.flatten(1).float()
    middle = torch.arange(flat.shape[1], device=flat.device) == flat.shape[1] // 2
    flat = torch.where(flat.sum(1, keepdim=True) > 0, flat, middle.to(flat))
    index = pick(flat, uniform).squeeze(1)
    width = weights.shape[-1]
    return torch.stack([index % width, index // width], dim=1) * side + (side / 2 - 0.5)


def draw_cell(masks: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """masks (P, h, w) bool, uniform (P, 1) in [0, 1) -> column, row of a cell inside, each alike likely (the centre cell where none is), and
    the number of cells inside, (P,) each.

    The n-th cell in reading order, n = floor(uniform x number): its row from the rows' counts, its column within that row alone. Nothing
    but the counts looks at all cells.
    """
    prompts, height, width = masks.shape
    per_row = row_counts(masks)
    until = per_row.cumsum(1)
    total = until[:, -1:]
    nth = (uniform.to(masks.device).double() * total).long()
    row = torch.searchsorted(until, nth, right=True).clamp(max=height - 1)
    line = masks[torch.arange(prompts, device=masks.device), row.squeeze(1)].cumsum(1)
    column = torch.searchsorted(line, nth - (until - per_row).gather(1, row), right=True).clamp(max=width - 1)
    middle = (height * width) // 2
    empty = total == 0
    row, column = torch.where(empty, middle // width, row), torch.where(empty, middle % width, column)
    return column.squeeze(1), row.squeeze(1), total.squeeze(1)


def row_counts(masks: Tensor) -> Tensor:
    """masks (P, h, w) bool -> (P, h) long, how many are true. Eight at a time, as the bytes of one number, a hundred times as fast as `sum`."""
    if masks.shape[-1] % 8 or masks.shape[-1] > 8 * 255:
        return masks.sum(-1)
    return masks.contiguous().view(torch.int64).sum(-1, keepdim=True).view(torch.uint8).sum(-1)


def cells(masks: Tensor) -> Tensor:
    """masks (P, S, S) bool -> (P, S/4, S/4) float, the share of every cell that is inside. A tenth of `avg_pool2d`'s time."""
    count = masks.view(torch.uint8)
    count = sum((count[:, i::CELL] for i in range(1, CELL)), start=count[:, ::CELL])
    count = sum((count[:, :, i::CELL] for i in range(1, CELL)), start=count[:, :, ::CELL])
    return count.float() / CELL**2


def around(masks: Tensor, size: int) -> Tensor:
    """masks (P, h, w) bool -> (P, h, w) float, the share of the square of `size` cells around each that is inside, from a summed-area
    table: the same time for every size."""
    half = size // 2
    table = F.pad(masks.float(), (half + 1, half, half + 1, half)).cumsum(2).cumsum(1)
    rows = table[:, size:] - table[:, :-size]
    return (rows[:, :, size:] - rows[:, :, :-size]) / size**2


def central_cell(masks: Tensor, generator: Source = None) -> Tensor:
    """masks (P, h, w) bool -> xy (P, 2) in the S frame of a cell far from the border (a box-filtered distance transform)."""
    depth = masks.float()
    for size in (5, 9, 17):
        depth = depth + around(masks, size)
    inside = depth * masks
    return pick_cell(inside == inside.amax((1, 2), keepdim=True), generator)


def boxes(masks: Tensor, jitter: float = 0.0, limit: float = 20.0, generator: Source = None) -> Tensor:
    """masks (P, H, W) bool at the input resolution -> corners (P, 2, 2) in the S frame; noise of std `jitter` x side, at most `limit` px."""
    height, width = masks.shape[-2:]
    columns, rows = masks.any(1), masks.any(2)
    x = torch.arange(width, device=masks.device).float()
    y = torch.arange(height, device=masks.device).float()
    x0, x1 = torch.where(columns, x, width).amin(1), torch.where(columns, x + 1, 0).amax(1)
    y0, y1 = torch.where(rows, y, height).amin(1), torch.where(rows, y + 1, 0).amax(1)
    corners = torch.stack([x0, y0, x1, y1], dim=1)
    if jitter:
        side = torch.stack([x1 - x0, y1 - y0, x1 - x0, y1 - y0], dim=1)
        corners = corners + (Draws.of(generator).randn(*corners.shape).to(corners) * jitter * side).clamp(-limit, limit)
    # the model sees points at pixel centres (+0.5 inside the prompt encoder): edges of a box are half a pixel further
    return corners.unflatten(1, (2, 2)) - 0.5


def first_prompts(masks: Tensor, low: Tensor, box_share: float, generator: Source = None, *, together: bool = False,
                  jitter: float = 0.1, central: float = 0.5, clicks: tuple[int, int] = (1, 1)) -> tuple[Tensor, Tensor]:
    """masks (P, S, S) bool and the same at logit resolution (P, h, w) -> points (P, N, 2), labels (P, N), N = max(2, most clicks).

    A box takes the first two places; clicks take theirs, the others are absent. `box_share` of the prompts are boxes, or with `together`
    all are or none is; a prompt has `clicks` = (fewest, most) points, the first of them central with a chance of `central`, else, like
    all others, anywhere in the mask. `jitter` is the noise of a box as a share of its side.
    """
    prompts, most, device, draws = len(masks), clicks[1], masks.device, Draws.of(generator)
    as_box = ((draws.once().expand(prompts) if together else draws.rand(prompts)) < box_share).to(device)
    anywhere = pick_cell(low, draws)
    click = torch.where((draws.rand(prompts, 1) < central).to(device), central_cell(low, draws), anywhere)
    limit = 20.0 * masks.shape[-1] / 1024  # SAM's 20 px are of a 1024 px frame
    corners = boxes(masks, jitter, max(limit, 5.0), draws)
    points = torch.stack([click, *(pick_cell(low, draws) for _ in range(most - 1))] if most > 1 else [click, click], dim=1)
    count = clicks[0] + (draws.rand(prompts, 1) * (most + 1 - clicks[0])).long() if most > 1 else torch.ones(prompts, 1)
    labels = torch.where(torch.arange(points.shape[1]) < count, POSITIVE, ABSENT).to(device)
    box_points = torch.cat([corners, corners[:, 1:].expand(-1, points.shape[1] - 2, -1)], dim=1)
    box_labels = torch.tensor([BOX_TOP_LEFT, BOX_BOTTOM_RIGHT, *[ABSENT] * (points.shape[1] - 2)], device=device)
    points = torch.where(as_box[:, None, None], box_points, points)
    return points, torch.where(as_box[:, None], box_labels, labels).float()


def error_click(prediction: Tensor, truth: Tensor, valid: Tensor | None = None, generator: Source = None, side: int = CELL,
                fewest: int = FEWEST_ERROR_CELLS) -> tuple[Tensor, Tensor]:
    """prediction, truth (P, h, w) bool -> point (P, 1, 2), label (P, 1): uniform over the cells where they differ, positive
    where the truth is 1; absent where fewer than `fewest` differ. `side` is that of a cell in input pixels."""
    wrong = prediction ^ truth
    if valid is not None:
        wrong = wrong & valid
    column, row, count = draw_cell(wrong, Draws.of(generator).rand(len(wrong), 1))
    positive = truth[torch.arange(len(truth), device=truth.device), row, column]
    label = torch.where(count < fewest, ABSENT, torch.where(positive, POSITIVE, NEGATIVE))
    point = torch.stack([column, row], dim=1) * side + (side / 2 - 0.5)
    return point.unsqueeze(1), label.unsqueeze(1).float()
