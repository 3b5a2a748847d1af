"""Label-free distillation with a symmetric divergence, for any photos at all (SSLD, "Beyond Self-Supervision", arXiv 2103.05959)."""
from __future__ import annotations

import torch
from torch import Tensor

from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.distillation.points import Objective
from edgekd.distillation.softmax import same_classes, soft_kl


class SSLD(Objective):
    """Half the sum of both KL divergences (or Jensen-Shannon); no labels are read.

    (KL(teacher || student) + KL(student || teacher)) / 2 of the probabilities, which is what PaddleClas computes as its "JS" loss.

    Args:
        mixture: the textbook's Jensen-Shannon divergence instead, to the mean of the two distributions: at most ln 2, so gentle on what
            is far off.
    """

    name, family, paper = "ssld", "logit", "Beyond Self-Supervision: SSLD (arXiv 2103.05959)"
    needs = frozenset({"logits"})

    def __init__(self, temperature: float = 1.0, mixture: bool = False) -> None:
        super().__init__()
        self.temperature, self.mixture = temperature, mixture

    def bind(self, setup: Setup) -> None:
        """Refuses heads of different classes."""
        same_classes(setup, self.name)

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """logits (B, C) -> (B,)."""
        t = self.temperature
        ours, theirs = (student["logits"].float() / t).log_softmax(1), (teacher["logits"].float() / t).log_softmax(1)
        if self.mixture:
            middle = torch.stack([ours, theirs]).logsumexp(0)  # log of twice the mean: soft_kl scales it
            return t**2 * (soft_kl(middle, ours) + soft_kl(middle, theirs)) / 2
        return t**2 * (soft_kl(ours, theirs) + soft_kl(theirs, ours)) / 2


objective = SSLD
