"""Mask losses on logits, per prompt, with padding left out: what the objectives and the teacher's own training share."""
from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def bce(logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Mean binary cross-entropy over valid cells: logits, target (..., h, w), valid broadcastable 0/1 -> (...)."""
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none") * valid
    return loss.sum((-2, -1)) / valid.expand_as(loss).sum((-2, -1)).clamp(min=1)


def dice(logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """1 - Dice over valid cells with a smoothing of 1 (EdgeSAM's form): the same shapes as `bce`."""
    p, t = logits.sigmoid() * valid, target * valid
    return 1 - (2 * (p * t).sum((-2, -1)) + 1) / (p.sum((-2, -1)) + t.sum((-2, -1)) + 1)


def iou(prediction: Tensor, truth: Tensor) -> Tensor:
    """Intersection over union of boolean masks (..., h, w) -> (...); 1 where both are empty."""
    both, either = (prediction & truth).sum((-2, -1)), (prediction | truth).sum((-2, -1))
    return (both.float() + (either == 0)) / either.clamp(min=1)
