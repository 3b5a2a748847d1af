"""Features after their mean and scale are taken out: what correlates counts, not how large it is (PKD, Cao et al., arXiv 2207.02039)."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from edgekd.distillation.losses import over_photo
from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.distillation.points import Objective
from edgekd.distillation.projectors import bridge, maps, pairs_of, photo


def standardised(x: Tensor, inside: Tensor) -> Tensor:
    """x (B, C, h, w) with mean 0 and variance 1 over the cells inside (B, 1, h, w), channel by channel."""
    count = inside.sum((2, 3), keepdim=True)
    x = x - (x * inside).sum((2, 3), keepdim=True) / count
    return x * ((x.square() * inside).sum((2, 3), keepdim=True) / count + 1e-6).rsqrt()


class NormFeature(Objective):
    """Half the mean of (standardised student - standardised teacher)^2, which is 1 - Pearson's correlation of every channel over the photo.

    Statistics are those of one photo, so that a loss does not depend on the rest of its batch (the paper's are the batch's).
    """

    name, family, paper = "norm_feature", "feature", "PKD: Pearson Correlation Coefficient (arXiv 2207.02039)"
    needs = frozenset({"feats"})
    default_taps = "embedding"

    def bind(self, setup: Setup) -> None:
        """A projector for each pair of different widths."""
        self.pairs = pairs_of(setup, self.name)
        self.projectors = nn.ModuleList(bridge(p.ours[0], p.theirs[0]) for p in self.pairs)

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """feats (B, C, h, w) of both -> (B,), 0 to 2."""
        found = []
        for project, (ours, theirs) in zip(self.projectors, maps(student, teacher, self.pairs), strict=True):
            inside = photo(context.valid, theirs.shape[-2:])
            found.append(over_photo((standardised(project(ours).float(), inside) - standardised(theirs, inside)).square() / 2, context.valid))
        return torch.stack(found).mean(0)


objective = NormFeature
