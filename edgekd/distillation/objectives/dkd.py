"""Decoupled distillation: how sure the teacher is of the class, and how it ranks all others, weighted apart (arXiv 2203.08679)."""
from __future__ import annotations

from torch import Tensor

from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.distillation.points import Objective
from edgekd.distillation.softmax import one_against_rest, same_classes, soft_kl, target_class, without


class DKD(Objective):
    """KL of the target class against the rest and KL among all other classes, weighted apart.

    T^2 (alpha KL(class against the rest) + beta KL(among all other classes)). Plain KD is alpha = 1 and beta = the teacher's doubt.

    Args:
        beta: 8 in the paper on 100 classes, 0.5 to 2 on ImageNet.
        labels: the class is the data's where it says one; false (or a photo without): the teacher's best.
    """

    name, family, paper = "dkd", "logit", "Decoupled Knowledge Distillation (arXiv 2203.08679)"
    needs = frozenset({"logits"})

    def __init__(self, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0, labels: bool = True) -> None:
        super().__init__()
        self.alpha, self.beta, self.temperature, self.labels = alpha, beta, temperature, labels

    def bind(self, setup: Setup) -> None:
        """Refuses heads of different classes."""
        same_classes(setup, self.name)

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """logits (B, C) -> (B,)."""
        ours, theirs = student["logits"].float(), teacher["logits"].float()
        target, t = target_class(context, theirs, self.labels), self.temperature
        of_class = t**2 * soft_kl(one_against_rest(ours / t, target), one_against_rest(theirs / t, target))
        of_rest = soft_kl(without(ours, target), without(theirs, target), t)
        return self.alpha * of_class + self.beta * of_rest


objective = DKD
