"""Channel-wise distillation: where in the picture each channel fires, as a distribution over space (Shu et al., arXiv 2011.13256)."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.distillation.points import Objective
from edgekd.distillation.projectors import bridge, maps, pairs_of, photo

NEVER = -1e9
"""A logit of what is left out: probability 0, and unlike -inf with a gradient."""


def channel_kl(ours: Tensor, theirs: Tensor, inside: Tensor, temperature: float) -> Tensor:
    """T^2 / C x sum over channels of KL(theirs || ours), each a softmax over the cells inside: (B, C, h, w), (B, 1, h, w) -> (B,)."""
    a, b = (x.flatten(2).div(temperature).masked_fill(inside.flatten(2) == 0, NEVER).log_softmax(2) for x in (ours, theirs))
    return temperature**2 * (b.exp() * (b - a)).sum(2).mean(1)


class CWD(Objective):
    """T^2 / C x sum over channels of KL(softmax(teacher / T) || softmax(student / T)) over the photo's cells; 1x1 projector where widths differ.

    Args:
        temperature: T; the paper's is 4.
    """

    name, family, paper = "cwd", "feature", "Channel-wise Knowledge Distillation for Dense Prediction (arXiv 2011.13256)"
    needs = frozenset({"feats"})
    default_taps = "embedding"

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__()
        self.temperature = temperature

    def bind(self, setup: Setup) -> None:
        """A projector for each pair of different widths."""
        self.pairs = pairs_of(setup, self.name)
        self.projectors = nn.ModuleList(bridge(p.ours[0], p.theirs[0]) for p in self.pairs)

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """feats (B, C, h, w) of both -> (B,)."""
        found = []
        for project, (ours, theirs) in zip(self.projectors, maps(student, teacher, self.pairs), strict=True):
            found.append(channel_kl(project(ours).float(), theirs, photo(context.valid, theirs.shape[-2:]), self.temperature))
        return torch.stack(found).mean(0)


objective = CWD
