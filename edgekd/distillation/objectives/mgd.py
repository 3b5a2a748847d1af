"""Masked generative distillation: from part of the student's map a small block must make the whole of the teacher's (Yang et al., arXiv 2205.01529)."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from edgekd.distillation.losses import over_photo
from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.distillation.points import Objective
from edgekd.distillation.projectors import bridge, maps, pairs_of, photo, uniform


class MGD(Objective):
    """Mean of (G(mask x p(student)) - teacher)^2 over all cells of the photo; mask hides a random share of cells, G is two 3x3 convolutions with a ReLU.

    Args:
        share: of cells that are hidden (the paper: 0.5 for segmentation, 0.65 for detection).
    """

    name, family, paper = "mgd", "masked_feature", "Masked Generative Distillation (arXiv 2205.01529)"
    needs = frozenset({"feats"})
    default_taps = "embedding"
    least_at_teacher = False

    def __init__(self, share: float = 0.5) -> None:
        super().__init__()
        self.share = share

    def bind(self, setup: Setup) -> None:
        """A projector where widths differ, and a generator, for each pair."""
        self.pairs = pairs_of(setup, self.name)
        self.projectors = nn.ModuleList(bridge(p.ours[0], p.theirs[0]) for p in self.pairs)
        self.generators = nn.ModuleList(self.generator(p.theirs[0]) for p in self.pairs)

    @staticmethod
    def generator(width: int) -> nn.Module:
        """(B, width, h, w) -> the same."""
        return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """feats (B, C, h, w) of both -> (B,)."""
        found = []
        for project, generate, (ours, theirs) in zip(self.projectors, self.generators, maps(student, teacher, self.pairs), strict=True):
            shown = (uniform(context, ours) >= self.share) * photo(context.valid, ours.shape[-2:])
            found.append(over_photo((generate(project(ours) * shown).float() - theirs).square(), context.valid))
        return torch.stack(found).mean(0)


objective = MGD
