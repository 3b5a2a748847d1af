"""Direction of the features cell by cell, where norms differ between networks.

The cosine part of feature distillation as in Theia (arXiv 2407.20179) and AM-RADIO (arXiv 2312.06709).
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.distillation.losses import over_photo
from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.distillation.points import Objective
from edgekd.distillation.projectors import bridge, maps, pairs_of


class FeatureCosine(Objective):
    """1 - cos(student, teacher) of every cell's channels, mean over the photo's cells and pairs; a 1x1 projector only where widths differ."""

    name, family, paper = "feature_cosine", "feature", "AM-RADIO (arXiv 2312.06709), Theia (arXiv 2407.20179)"
    needs = frozenset({"feats"})
    default_taps = "embedding"

    def bind(self, setup: Setup) -> None:
        """A projector for each pair of different widths."""
        self.pairs = pairs_of(setup, self.name)
        self.projectors = nn.ModuleList(bridge(p.ours[0], p.theirs[0]) for p in self.pairs)

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """feats (B, C, h, w) of both -> (B,), 0 to 2."""
        both = zip(self.projectors, maps(student, teacher, self.pairs), strict=True)
        return torch.stack([over_photo(1 - F.cosine_similarity(p(ours).float(), theirs, dim=1).unsqueeze(1), context.valid) for p, (ours, theirs) in both]).mean(0)


objective = FeatureCosine
