"""Prompts as tensors, simulated at the resolution of the mask logits, for all masks of a batch at once.

SAM's prompt simulation (arXiv 2304.02643, App. A) without a loop over masks: the first prompt is a point or a jittered box, the
next ones are points drawn uniformly from the error region. A click is the centre of a cell of the S/4 grid.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.protocols import ABSENT, BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, NEGATIVE, POSITIVE

CELL = 4  # input pixels a side of one logit
FEWEST_ERROR_CELLS = 1


def pick_cell(weights: Tensor, generator: torch.Generator | None = None, side: int = CELL) -> Tensor:
    """weights (P, h, w) >= 0 -> xy (P, 2) in the S frame of one cell of `side` pixels drawn in proportion; the centre cell where all are 0."""
    flat = weights.flatten(1).float()
    flat = torch.where(flat.sum(1, keepdim=True) > 0, flat, F.one_hot(torch.tensor(flat.shape[1] // 2), flat.shape[1]).to(flat))
    # inverse of the cumulative sum: one uniform number a row, cheaper on a CPU than torch.multinomial
    cumulative = flat.cumsum(1)
    uniform = torch.rand(len(flat), 1, generator=generator) * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, uniform, right=True).squeeze(1).clamp(max=flat.shape[1] - 1)
    width = weights.shape[-1]
    return torch.stack([index % width, index // width], dim=1) * side + (side / 2 - 0.5)


def central_cell(masks: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """masks (P, h, w) bool -> xy (P, 2) in the S frame of a cell far from the border (a box-filtered distance transform)."""
    depth = masks.float().unsqueeze(1)
    for size in (5, 9, 17):
        depth = depth + F.avg_pool2d(masks.float().unsqueeze(1), size, 1, size // 2)
    inside = depth.squeeze(1) * masks
    return pick_cell(inside == inside.amax((1, 2), keepdim=True), generator)


def boxes(masks: Tensor, jitter: float = 0.0, limit: float = 20.0, generator: torch.Generator | None = None) -> Tensor:
    """masks (P, H, W) bool at the input resolution -> corners (P, 2, 2) in the S frame; noise of std `jitter` x side, at most `limit` px."""
    height, width = masks.shape[-2:]
    columns, rows = masks.any(1), masks.any(2)
    x = torch.arange(width).float()
    y = torch.arange(height).float()
    x0, x1 = torch.where(columns, x, width).amin(1), torch.where(columns, x + 1, 0).amax(1)
    y0, y1 = torch.where(rows, y, height).amin(1), torch.where(rows, y + 1, 0).amax(1)
    corners = torch.stack([x0, y0, x1, y1], dim=1)
    if jitter:
        side = torch.stack([x1 - x0, y1 - y0, x1 - x0, y1 - y0], dim=1)
        corners = corners + (torch.randn(corners.shape, generator=generator) * jitter * side).clamp(-limit, limit)
    # the model sees points at pixel centres (+0.5 inside the prompt encoder): edges of a box are half a pixel further
    return corners.unflatten(1, (2, 2)) - 0.5


def first_prompts(masks: Tensor, low: Tensor, box_share: float, generator: torch.Generator | None = None, *, together: bool = False,
                  jitter: float = 0.1, central: float = 0.5, clicks: tuple[int, int] = (1, 1)) -> tuple[Tensor, Tensor]:
    """masks (P, S, S) bool and the same at logit resolution (P, h, w) -> points (P, N, 2), labels (P, N), N = max(2, most clicks).

    A box takes the first two places; clicks take theirs, the others are absent. `box_share` of the prompts are boxes, or with `together`
    all are or none is; a prompt has `clicks` = (fewest, most) points, the first of them central with a chance of `central`, else, like
    all others, anywhere in the mask. `jitter` is the noise of a box as a share of its side.
    """
    prompts, most = len(masks), clicks[1]
    as_box = torch.rand(1 if together else prompts, generator=generator).expand(prompts) < box_share
    anywhere = pick_cell(low, generator)
    click = torch.where((torch.rand(prompts, 1, generator=generator) < central), central_cell(low, generator), anywhere)
    limit = 20.0 * masks.shape[-1] / 1024  # SAM's 20 px are of a 1024 px frame
    corners = boxes(masks, jitter, max(limit, 5.0), generator)
    points = torch.stack([click, *(pick_cell(low, generator) for _ in range(most - 1))] if most > 1 else [click, click], dim=1)
    count = torch.randint(clicks[0], most + 1, (prompts, 1), generator=generator) if most > 1 else torch.ones(prompts, 1)
    labels = torch.where(torch.arange(points.shape[1]) < count, POSITIVE, ABSENT)
    box_points = torch.cat([corners, corners[:, 1:].expand(-1, points.shape[1] - 2, -1)], dim=1)
    box_labels = torch.tensor([BOX_TOP_LEFT, BOX_BOTTOM_RIGHT, *[ABSENT] * (points.shape[1] - 2)])
    points = torch.where(as_box[:, None, None], box_points, points)
    return points, torch.where(as_box[:, None], box_labels, labels).float()


def error_click(prediction: Tensor, truth: Tensor, valid: Tensor | None = None, generator: torch.Generator | None = None, side: int = CELL,
                fewest: int = FEWEST_ERROR_CELLS) -> tuple[Tensor, Tensor]:
    """prediction, truth (P, h, w) bool -> point (P, 1, 2), label (P, 1): uniform over the cells where they differ, positive
    where the truth is 1; absent where fewer than `fewest` differ. `side` is that of a cell in input pixels."""
    wrong = prediction ^ truth
    if valid is not None:
        wrong = wrong & valid
    point = pick_cell(wrong, generator, side)
    cell = ((point - (side / 2 - 0.5)) / side).round().long()
    positive = truth[torch.arange(len(truth)), cell[:, 1], cell[:, 0]]
    label = torch.where(positive, POSITIVE, NEGATIVE)
    label = torch.where(wrong.flatten(1).sum(1) < fewest, ABSENT, label)
    return point.unsqueeze(1), label.unsqueeze(1).float()
