"""CutMix for distillation: a rectangle of one photo is pasted into another, at the same place for student and teacher.

Yun et al., "CutMix" (arXiv 1905.04899), as one of the mixing rules that Choi et al. (arXiv 2211.03946) and the study of augmentations for
distillation compare. A pasted rectangle cuts instances in two, so objectives on masks refuse it.
"""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.distillation.batches import Batch
from edgekd.distillation.outputs import Setup
from edgekd.distillation.points import Policy
from edgekd.distillation.policies._shared import class_count, mixed_classes, objectives_on_masks, refuse_cached
from edgekd.errors import UsageError


class Cutmix(Policy):
    """x = (1 - M) x_i + M x_j where M is a rectangle of area 1 - a, a from Beta(alpha, alpha); classes count by the photo's pixels that are seen.

    Args:
        alpha: of the Beta distribution; 1 draws every area alike.
        share: of the photos of a batch that get a rectangle.
    """

    name, family, paper = "cutmix", "data", "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features (arXiv 1905.04899)"
    live = True

    def __init__(self, alpha: float = 1.0, share: float = 0.5) -> None:
        super().__init__()
        if alpha <= 0 or not 0 < share <= 1:
            raise UsageError(f"cutmix takes alpha > 0 and 0 < share <= 1, not alpha={alpha:g}, share={share:g}")
        self.alpha, self.share = alpha, share
        self.classes: int | None = None

    def bind(self, setup: Setup) -> None:
        """Raises UsageError when the teacher is a cache, or an objective learns from masks, which a rectangle would cut."""
        refuse_cached(self, setup)
        masked = objectives_on_masks(setup)
        if masked:
            raise UsageError(f"cutmix pastes rectangles over the instances that '{masked[0]}' learns from", where=setup.where,
                             hint="take mixup, whose prompts are those of the photo that counts more, or views")
        self.classes = class_count(setup)

    def mix(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The batch with rectangles of other photos of the batch in `share` of its photos."""
        size, side = len(batch.images), batch.images.shape[-1]
        rng = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
        chosen = torch.randperm(size, generator=generator)[: round(self.share * size)].tolist()
        partner = torch.randperm(size, generator=generator).to(batch.images.device)
        cut = torch.zeros(size, 1, side, side)
        for i in chosen:
            y0, y1, x0, x1 = rectangle(rng, rng.beta(self.alpha, self.alpha), side)
            cut[i, :, y0:y1, x0:x1] = 1
        cut = cut.to(batch.images.device)

        def both(images: Tensor) -> Tensor:
            return torch.where(F.interpolate(cut, images.shape[-2:]) > 0, images[partner], images)

        inside = (batch.labels >= 0).float().unsqueeze(1)
        over = F.interpolate(cut, inside.shape[-2:])
        kept, pasted = ((1 - over) * inside).sum((1, 2, 3)), (over * inside[partner]).sum((1, 2, 3))
        labels = torch.where(over[:, 0] > 0, batch.labels[partner], batch.labels)
        return replace(batch, images=both(batch.images), labels=labels, valid=(F.avg_pool2d((labels >= 0).float().unsqueeze(1), 4) > 0.5).float(),
                       classes=mixed_classes(batch.classes, partner, kept / (kept + pasted).clamp(min=1), self.classes),
                       teacher_images=None if batch.teacher_images is None else {n: both(t) for n, t in batch.teacher_images.items()})


def rectangle(rng: np.random.Generator, kept: float, side: int) -> tuple[int, int, int, int]:
    """y0, y1, x0, x1 of a rectangle with the square's shape and 1 - `kept` of its area, around any point and cut off at the border."""
    half = side * np.sqrt(1 - kept) / 2
    y, x = rng.uniform(0, side, 2)
    edges = (y - half, y + half, x - half, x + half)
    y0, y1, x0, x1 = (int(np.clip(round(e), 0, side)) for e in edges)
    return y0, y1, x0, x1


policy = Cutmix
