"""Forward and reverse KL, balanced for each photo by who of the two is surer (BD-KD, arXiv 2212.12965)."""
from __future__ import annotations

import torch
from torch import Tensor

from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.distillation.points import Objective
from edgekd.distillation.softmax import entropy, same_classes, soft_kl


class BDKD(Objective):
    """Forward and reverse KL; the one that brings the student's entropy to the teacher's counts more.

    T^2 (a KL(teacher || student) + b KL(student || teacher)). A student less sure than the teacher gets b = `lean`, which draws it to the
    teacher's peak; a surer one gets a = `lean`, which spreads it over all that the teacher holds possible. The other weight is 1.

    The paper's teacher trains along and learns from the reverse KL; here it is frozen.

    Args:
        lean: weight of the divergence that the entropies call for; 1 is the plain sum of both.
    """

    name, family, paper = "bd_kd", "divergence", "BD-KD: Balancing the Divergences for Online Knowledge Distillation (arXiv 2212.12965)"
    needs = frozenset({"logits"})

    def __init__(self, lean: float = 2.0, temperature: float = 4.0) -> None:
        super().__init__()
        self.lean, self.temperature = lean, temperature

    def bind(self, setup: Setup) -> None:
        """Refuses heads of different classes."""
        same_classes(setup, self.name)

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """logits (B, C) -> (B,)."""
        ours, theirs, t = student["logits"], teacher["logits"], self.temperature
        unsure = entropy(ours.detach(), t) > entropy(theirs, t)
        forward, reverse = torch.where(unsure, 1.0, self.lean), torch.where(unsure, self.lean, 1.0)
        return forward * soft_kl(ours, theirs, t) + reverse * soft_kl(theirs, ours, t)


objective = BDKD
