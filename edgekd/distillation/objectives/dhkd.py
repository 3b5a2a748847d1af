"""Two heads: probabilities are learned by the student's own, raw logits by a second one, which share the backbone only (arXiv 2411.08937)."""
from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.distillation.points import Objective
from edgekd.distillation.softmax import same_classes, soft_kl


class DHKD(Objective):
    """KL of the probabilities on the student's head, BinaryKL of the raw logits on a second one.

    KL of the own head's probabilities (as `kd`) + `aux` x BinaryKL-Norm of a second linear head on `pooled`:
    T^2 sum_c KL(1/2 || sigmoid((aux_c - teacher_c) / T)), least where the logits themselves are equal.

    On one head the two have contrary gradients and the head collapses. The paper's own head learns the labels instead (add
    `cross_entropy`), and it drops contrary gradients in the backbone; this does not.

    Args:
        aux: weight of the second head's loss, a sum over the classes.
        logit_temperature: T of that loss, 2 in the authors' code.
    """

    name, family, paper = "dhkd", "logit", "Dual-Head Knowledge Distillation (arXiv 2411.08937)"
    needs = frozenset({"logits", "pooled"})
    least_at_teacher = False

    def __init__(self, aux: float = 1.0, temperature: float = 4.0, logit_temperature: float = 2.0) -> None:
        super().__init__()
        self.weight, self.temperature, self.logit_temperature = aux, temperature, logit_temperature

    def bind(self, setup: Setup) -> None:
        """Makes the second head."""
        self.head = nn.Linear(setup.ours["pooled"].shape[1], same_classes(setup, self.name))

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """logits (B, C), pooled (B, D) -> (B,)."""
        theirs, t = teacher["logits"].float(), self.logit_temperature
        apart = (self.head(student["pooled"]).float() - theirs) / t
        binary = t**2 * ((F.softplus(apart) + F.softplus(-apart)) / 2 - math.log(2)).sum(1)
        return soft_kl(student["logits"], theirs, self.temperature) + self.weight * binary


objective = DHKD
