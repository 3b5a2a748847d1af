"""Soft targets: the student gives every class the teacher's probability, softened (Hinton et al., arXiv 1503.02531). No labels are read."""
from __future__ import annotations

from torch import Tensor

from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.distillation.points import Objective
from edgekd.distillation.softmax import same_classes, soft_kl


class KD(Objective):
    """KL of the softened probabilities; no labels are read.

    T^2 KL(softmax(teacher / T) || softmax(student / T)).

    Args:
        temperature: T. Above 1 small probabilities count more; 1 for teachers of a thousand classes, 4 for a few.
    """

    name, family, paper = "kd", "logit", "Distilling the Knowledge in a Neural Network (arXiv 1503.02531)"
    needs = frozenset({"logits"})

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__()
        self.temperature = temperature

    def bind(self, setup: Setup) -> None:
        """Refuses heads of different classes."""
        same_classes(setup, self.name)

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """logits (B, C) -> (B,)."""
        return soft_kl(student["logits"], teacher["logits"], self.temperature)


objective = KD
