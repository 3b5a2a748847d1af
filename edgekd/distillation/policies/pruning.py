"""Data pruning: from a chosen part of the photos and the teacher's answers on them, nearly what all of them teach.

Ben-Baruch et al., "Distilling the Knowledge in Data Pruning" (arXiv 2403.07854): with a teacher, a random part is as good as one chosen by
score, down to small parts; and the fewer photos, the more the teacher should count against labels. That weight is the objectives' own.
"""
from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from edgekd.distillation.outputs import Context, Setup
from edgekd.distillation.points import Policy
from edgekd.errors import UsageError


class Pruning(Policy):
    """The share `keep` of the photos is drawn, the others never: a random part, or those of the largest ("hard") or smallest ("easy") mean loss.

    A random part is settled before the first step. One by score is settled when every photo was drawn `after` times, and counts from the
    epoch after the next on: what an epoch draws must not hang on how far ahead batches are made, nor on where a killed run went on.

    Args:
        keep: share of the photos that stays.
        by: "random", "hard" or "easy".
        after: epochs of looking at all photos, for a choice by loss.
        seed: of the random part.
    """

    name, family, paper = "pruning", "data", "Distilling the Knowledge in Data Pruning (arXiv 2403.07854)"

    loss: Tensor
    seen: Tensor
    drawn: Tensor
    kept: Tensor
    settled: Tensor

    def __init__(self, keep: float = 0.5, by: Literal["random", "hard", "easy"] = "random", after: int = 1, seed: int = 0) -> None:
        super().__init__()
        if not 0 < keep <= 1 or by not in ("random", "hard", "easy") or after < 1:
            raise UsageError(f"pruning takes 0 < keep <= 1, by random, hard or easy, and after >= 1, not keep={keep:g}, by={by}, after={after}")
        self.keep, self.by, self.after, self.seed = keep, by, after, seed

    def bind(self, setup: Setup) -> None:
        """Room for the loss of every photo of `context.images_total`."""
        images = setup.context.images_total
        assert images > 0, "the step must know how many photos there are"
        self.count = max(1, round(self.keep * images))
        self.register_buffer("loss", torch.zeros(images))
        self.register_buffer("seen", torch.zeros(images))
        self.register_buffer("drawn", torch.zeros((), dtype=torch.long))
        self.register_buffer("kept", torch.ones(images, dtype=torch.bool))
        self.register_buffer("settled", torch.tensor(False))
        if self.by == "random":
            self._settle(torch.from_numpy(np.random.default_rng([self.seed, images]).permutation(images)))

    def weights(self, images: int, domains: np.ndarray, epoch: int) -> np.ndarray | None:
        """1 for what is kept and 0 for the rest; None while all photos are looked at."""
        early = self.by != "random" and epoch <= self.after
        return None if early or not self.settled else self.kept.cpu().numpy().astype(float)

    def observe(self, losses: Tensor, context: Context) -> None:
        """Keep the mean loss of each photo, and choose once all were seen often enough."""
        if self.settled:
            return
        assert context.places is not None
        places, found = context.places.to(self.loss.device), losses.detach().float().to(self.loss.device)
        self.loss.index_add_(0, places, found)
        self.seen.index_add_(0, places, torch.ones_like(found))
        self.drawn += len(places)
        if self.drawn >= self.after * len(self.seen):
            mean = self.loss / self.seen.clamp(min=1)
            self._settle(mean.argsort(descending=self.by == "hard", stable=True))

    def _settle(self, order: Tensor) -> None:
        self.kept.zero_()
        self.kept[order[: self.count].to(self.kept.device)] = True
        self.settled.fill_(True)


policy = Pruning
