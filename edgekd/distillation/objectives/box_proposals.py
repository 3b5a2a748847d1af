"""Boxes of the instances for the box proposer: a score that expects its box's IoU, and GIoU for the box.

As MobileSAMv2 (arXiv 2312.09579) and EdgeSAM's proposal module (arXiv 2312.06660, sec. 3.2.3) replace a grid of clicks or add a box to a
click. The score learns the IoU of its own box (quality focal loss, arXiv 2006.04388), which is what suppression ranks by.
"""
from __future__ import annotations

import torch
from torch import Tensor

from edgekd.distillation.outputs import Context, Outputs
from edgekd.distillation.points import Objective
from edgekd.models.proposer import RANGES, SLOTS, STRIDE, places, ranges

REACH = 0.25
"""A slot is a box's own when it lies within this share of its width and height of its centre; the nearest slot always is."""
MOST_SLOTS = 9
"""Slots a box has, the nearest."""


class BoxProposals(Objective):
    """`score` x quality focal loss + `box` x GIoU. Trains `student.proposer` on the boxes of the data, or of the teacher's own masks.

    Args:
        beta: how much slots that are right already count less.
    """

    name, family, paper = "box_proposals", "dense_prediction", "EdgeSAM sec. 3.2.3 (arXiv 2312.06660); MobileSAMv2 (arXiv 2312.09579)"
    needs = frozenset({"boxes"})
    asks_teacher = False

    def __init__(self, score: float = 1.0, box: float = 2.0, beta: float = 2.0) -> None:
        super().__init__()
        self.score, self.box, self.beta = score, box, beta

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """proposals: boxes (B, Q, 4) and scores (B, Q); context.boxes: B times (n, 4) -> (B,)."""
        assert student.proposals is not None and context.boxes is not None
        boxes, scores = student.proposals
        each = [loss(b, s, wanted, beta=self.beta) for b, s, wanted in zip(boxes, scores, context.boxes, strict=True)]
        return torch.stack([self.score * s + self.box * b for s, b in each])


def loss(boxes: Tensor, scores: Tensor, wanted: Tensor, *, beta: float = 2.0) -> tuple[Tensor, Tensor]:
    """One image: proposed boxes (Q, 4) with scores (Q,), and the boxes (n, 4) that are wanted, xyxy in the F frame -> (score loss, box loss),
    both by the number of slots that are some box's own."""
    boxes, scores = boxes.float(), scores.float().clamp(1e-6, 1 - 1e-6)
    owner = assign(wanted.to(boxes), round((len(boxes) / len(SLOTS)) ** 0.5))
    own = owner >= 0
    target, missed = torch.zeros_like(scores), scores.new_zeros(())
    if own.any():
        overlap, generalised = iou_and_giou(boxes[own], wanted.to(boxes)[owner[own]])
        target = target.masked_scatter(own, overlap.detach())
        missed = (1 - generalised).sum()
    entropy = -(target * scores.log() + (1 - target) * (1 - scores).log())
    count = own.sum().clamp(min=1)
    return ((target - scores).abs().pow(beta) * entropy).sum() / count, missed / count


def assign(wanted: Tensor, cells: int) -> Tensor:
    """Boxes (n, 4) xyxy in the F frame -> (Q,) index of the box whose slot this is, -1 for none; of several the smallest."""
    centres, _ = places(cells, wanted.device)
    if not len(wanted):
        return torch.full((len(centres),), -1, dtype=torch.long, device=wanted.device)
    sides = (wanted[:, 2:] - wanted[:, :2]).clamp(min=1e-3)
    limits = torch.tensor([most for _, most in RANGES[:-1]], device=wanted.device)
    kind = torch.bucketize(sides.amax(dim=1) / (cells * STRIDE), limits, right=True)
    offset = (centres - (wanted[:, None, :2] + wanted[:, None, 2:]) / 2) / sides[:, None]
    far = offset.abs().amax(dim=2) + (ranges(cells).to(wanted.device) != kind[:, None]) * 1e6  # (n, Q)
    nearest = torch.topk(far, min(MOST_SLOTS, far.shape[1]), largest=False)
    chosen = nearest.values <= REACH
    chosen[:, 0] = True
    size = torch.full_like(far, torch.inf).scatter_(1, nearest.indices, torch.where(chosen, sides.prod(dim=1, keepdim=True), torch.inf))
    least = size.min(dim=0)
    return torch.where(least.values.isfinite(), least.indices, -1)


def iou_and_giou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of boxes (m, 4) xyxy -> IoU (m,) and generalised IoU (m,) (arXiv 1902.09630)."""
    def size(box: Tensor) -> Tensor:
        return (box[:, 2:] - box[:, :2]).clamp(min=0).prod(dim=1)

    both = size(torch.cat([torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:])], dim=1))
    hull = size(torch.cat([torch.minimum(a[:, :2], b[:, :2]), torch.maximum(a[:, 2:], b[:, 2:])], dim=1)).clamp(min=1e-6)
    union = (size(a) + size(b) - both).clamp(min=1e-6)
    return both / union, both / union - (hull - union) / hull


objective = BoxProposals
