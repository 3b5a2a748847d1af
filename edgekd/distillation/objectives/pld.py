"""List-wise ranking: the student orders all classes as the teacher does, the true class first (Plackett-Luce, arXiv 2506.12542)."""
from __future__ import annotations

import torch
from torch import Tensor

from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.distillation.points import Objective
from edgekd.distillation.softmax import same_classes, target_class


class PLD(Objective):
    """Plackett-Luce likelihood of the teacher's order of all classes, the target class first.

    sum_k q_k (logsumexp of s at places k.. - s at place k), the student's logits s in the teacher's order with the target class first, each
    choice weighted by the teacher's probability q of that class. It replaces both cross-entropy and KD.

    Args:
        temperature: of the teacher's weights q.
        labels: the target is the data's class where it says one; false (or a photo without): the teacher's best.
    """

    name, family, paper = "pld", "logit", "PLD: A Choice-Theoretic List-Wise Knowledge Distillation (arXiv 2506.12542)"
    needs = frozenset({"logits"})
    least_at_teacher = False  # it orders, and goes on pulling the ordered apart

    def __init__(self, temperature: float = 1.0, labels: bool = True) -> None:
        super().__init__()
        self.temperature, self.labels = temperature, labels

    def bind(self, setup: Setup) -> None:
        """Refuses heads of different classes."""
        same_classes(setup, self.name)

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """logits (B, C) -> (B,)."""
        ours, theirs = student["logits"].float(), teacher["logits"].float()
        first = target_class(context, theirs, self.labels).unsqueeze(1)
        order = theirs.scatter(1, first, torch.inf).argsort(1, descending=True)
        s, q = ours.gather(1, order), (theirs / self.temperature).softmax(1).gather(1, order)
        remaining = s.flip(1).logcumsumexp(1).flip(1)
        return (q * (remaining - s)).sum(1)


objective = PLD
