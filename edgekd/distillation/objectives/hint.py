"""FitNets' hint: a regressor on the student's map predicts the teacher's (Romero et al., arXiv 1412.6550, sec. 2.2)."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from edgekd.distillation.losses import over_photo
from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.distillation.points import Objective
from edgekd.distillation.projectors import maps, pairs_of, projector


class Hint(Objective):
    """Mean of (r(student) - teacher)^2, r a convolution that trains with the student; mean over pairs. The finer map is brought to the other's grid.

    Args:
        kernel: side of the regressor's convolution, odd.
    """

    name, family, paper = "hint", "feature", "FitNets: Hints for Thin Deep Nets (arXiv 1412.6550)"
    needs = frozenset({"feats"})
    default_taps = "embedding"
    least_at_teacher = False

    def __init__(self, kernel: int = 1) -> None:
        super().__init__()
        self.kernel = kernel

    def bind(self, setup: Setup) -> None:
        """A regressor a pair."""
        self.pairs = pairs_of(setup, self.name)
        self.regressors = nn.ModuleList(projector(p.ours[0], p.theirs[0], self.kernel) for p in self.pairs)

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """feats (B, C, h, w) of both -> (B,)."""
        both = zip(self.regressors, maps(student, teacher, self.pairs), strict=True)
        return torch.stack([over_photo((r(ours).float() - theirs).square(), context.valid) for r, (ours, theirs) in both]).mean(0)


objective = Hint
