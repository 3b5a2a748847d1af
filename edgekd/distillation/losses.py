"""Losses on embeddings and mask logits with the padding left out: what the objectives and the teacher's own training share."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def aligned(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Student's and teacher's embedding on the student's grid and channels, as float32: ours (B, E, s, s), theirs (B, >= E, t, t) ->
    two (B, E, s, s). Channels after the first E are what a foreign teacher keeps for its own decoder."""
    ours, theirs = ours.float(), theirs[:, : ours.shape[1]].float()
    if theirs.shape[-1] != ours.shape[-1]:
        theirs = F.interpolate(theirs, ours.shape[-2:], mode="bilinear", align_corners=False, antialias=True)
    return ours, theirs


def over_photo(error: Tensor, valid: Tensor) -> Tensor:
    """Mean over channels, then over the cells that are more than half photo: error (B, C, s, s), valid (B, 1, h, w) 0/1 -> (B,)."""
    inside = (F.interpolate(valid, error.shape[-2:], mode="bilinear", align_corners=False) > 0.5).float()
    error = error.mean(1, keepdim=True) * inside
    return error.sum((1, 2, 3)) / inside.sum((1, 2, 3)).clamp(min=1)


def on_grid(masks: Tensor, logits: Tensor) -> Tensor:
    """The teacher's mask logits (P, M, a, a) at the resolution of the student's (P, M, h, w), as float32."""
    masks = masks.float()
    return masks if masks.shape[-1] == logits.shape[-1] else F.interpolate(masks, logits.shape[-2:], mode="bilinear", align_corners=False, antialias=True)


def on_cells(truth: Tensor, logits: Tensor) -> Tensor:
    """True masks (P, F, F) bool at the resolution of logits (P, M, h, w) -> (P, 1, h, w), 1.0 where more than half of a cell is inside."""
    return (F.interpolate(truth.float().unsqueeze(1), logits.shape[-2:], mode="area") > 0.5).float()


def bce(logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Mean binary cross-entropy over valid cells: logits, target (..., h, w), valid broadcastable 0/1 -> (...)."""
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none") * valid
    return loss.sum((-2, -1)) / valid.expand_as(loss).sum((-2, -1)).clamp(min=1)


def focal(logits: Tensor, target: Tensor, valid: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Mean focal loss (arXiv 1708.02002) over valid cells: the same shapes as `bce`; cells that are right already count little."""
    p = logits.sigmoid()
    wrong = p + target - 2 * p * target  # 1 - p where the target is 1, p where it is 0
    share = alpha * target + (1 - alpha) * (1 - target)
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none") * share * wrong.pow(gamma) * valid
    return loss.sum((-2, -1)) / valid.expand_as(loss).sum((-2, -1)).clamp(min=1)


def dice(logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """1 - Dice over valid cells with a smoothing of 1 (EdgeSAM's form): the same shapes as `bce`."""
    p, t = logits.sigmoid() * valid, target * valid
    return 1 - (2 * (p * t).sum((-2, -1)) + 1) / (p.sum((-2, -1)) + t.sum((-2, -1)) + 1)


def iou(prediction: Tensor, truth: Tensor) -> Tensor:
    """Intersection over union of boolean masks (..., h, w) -> (...); 1 where both are empty."""
    both, either = (prediction & truth).sum((-2, -1)), (prediction | truth).sum((-2, -1))
    return (both.float() + (either == 0)) / either.clamp(min=1)


def answers(each: Tensor, single: Tensor) -> Tensor:
    """Losses of the four masks (P, 4) -> (P,): mask 0 always, and the mean of the alternatives where they mean something (`single`)."""
    return each[:, 0] + single.to(each) * each[:, 1:].mean(1)


def best_answer(each: Tensor, several: Tensor) -> Tensor:
    """Losses of the four masks (P, 4) -> index (P,) of the one that learns: the best of the alternatives where several are given
    (`several` (P,)), mask 0 elsewhere. SAM's rule (arXiv 2304.02643, App. A)."""
    return torch.where(several.bool(), 1 + each.detach()[:, 1:].argmin(1), 0)
