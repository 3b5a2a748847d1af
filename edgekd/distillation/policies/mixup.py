"""Mixup for distillation: student and teacher see the same weighted sum of two photos, and the teacher says what it is.

Choi, Jeon, Shukla, Turaga, "Understanding the Role of Mixup in Knowledge Distillation: An Empirical Study" (arXiv 2211.03946): mixing and
distilling both smooth, and too much of both hurts; their rules are a mild strength and mixing only part of a batch (partial mixup). Their
third rule, a temperature from the spread of the logits, belongs to the objective.
"""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from edgekd.distillation.batches import Batch
from edgekd.distillation.outputs import Setup
from edgekd.distillation.points import Policy
from edgekd.distillation.policies._shared import class_count, mixed_classes, refuse_cached
from edgekd.errors import UsageError


class Mixup(Policy):
    """x = a x_i + (1 - a) x_j with a drawn from Beta(alpha, alpha) and folded to a >= 1/2, for `share` of the photos of a batch.

    Classes become shares (B, C); masks, prompts and padding stay those of the photo that counts more. A photo with a >= 1/2 of itself is
    what prompts ask about, so that promptable batches may be mixed too.

    Args:
        alpha: strength; small is mostly one photo.
        share: of the photos of a batch that are mixed (partial mixup); 1 mixes all.
    """

    name, family, paper = "mixup", "data", "Understanding the Role of Mixup in Knowledge Distillation: An Empirical Study (arXiv 2211.03946)"
    live = True

    def __init__(self, alpha: float = 0.2, share: float = 0.5) -> None:
        super().__init__()
        if alpha <= 0 or not 0 < share <= 1:
            raise UsageError(f"mixup takes alpha > 0 and 0 < share <= 1, not alpha={alpha:g}, share={share:g}")
        self.alpha, self.share = alpha, share
        self.classes: int | None = None

    def bind(self, setup: Setup) -> None:
        """Raises UsageError when the stage's teacher is a cache."""
        refuse_cached(self, setup)
        self.classes = class_count(setup)

    def mix(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The batch with `share` of its photos mixed with another of the batch."""
        size = len(batch.images)
        rng = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
        own = torch.ones(size)
        chosen = torch.randperm(size, generator=generator)[: round(self.share * size)]
        drawn = torch.from_numpy(rng.beta(self.alpha, self.alpha, len(chosen))).float()
        own[chosen] = torch.maximum(drawn, 1 - drawn)
        partner = torch.randperm(size, generator=generator).to(batch.images.device)
        own = own.to(batch.images.device)

        def both(images: torch.Tensor) -> torch.Tensor:
            return torch.lerp(images[partner], images, own[:, None, None, None])

        return replace(batch, images=both(batch.images), classes=mixed_classes(batch.classes, partner, own, self.classes),
                       teacher_images=None if batch.teacher_images is None else {n: both(t) for n, t in batch.teacher_images.items()})


policy = Mixup
