"""Normalised distillation: the non-target logits are softmaxed among themselves, so that their sum cannot differ (arXiv 2303.13005, NKD)."""
from __future__ import annotations

from torch import Tensor

from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.distillation.points import Objective
from edgekd.distillation.softmax import same_classes, target_class, without


class NKD(Objective):
    """Cross-entropy of the target class and, normalised among themselves, of all other classes.

    -T_t log S_t - gamma T^2 sum_i N(T_i) log N(S_i) over the classes i that are not the target t, N being a softmax among those.

    A cross-entropy in both parts, as in the paper: its least value is not 0. The paper adds cross-entropy with the labels: objective
    `cross_entropy`.

    Args:
        gamma: 1.5 in the paper.
        labels: the target is the data's class where it says one; false (or a photo without): the teacher's best.
    """

    name, family, paper = "nkd", "logit", "From Knowledge Distillation to Self-Knowledge Distillation (arXiv 2303.13005)"
    needs = frozenset({"logits"})
    least_at_teacher = False  # -T_t log S_t falls until S_t is 1

    def __init__(self, gamma: float = 1.5, temperature: float = 1.0, labels: bool = True) -> None:
        super().__init__()
        self.gamma, self.temperature, self.labels = gamma, temperature, labels

    def bind(self, setup: Setup) -> None:
        """Refuses heads of different classes."""
        same_classes(setup, self.name)

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """logits (B, C) -> (B,)."""
        ours, theirs = student["logits"].float(), teacher["logits"].float()
        target, t = target_class(context, theirs, self.labels), self.temperature
        at = target.unsqueeze(1)
        of_class = -(theirs.softmax(1).gather(1, at) * ours.log_softmax(1).gather(1, at)).squeeze(1)
        of_rest = -((without(theirs, target) / t).softmax(1) * (without(ours, target) / t).log_softmax(1)).sum(1)
        return of_class + self.gamma * t**2 * of_rest


objective = NKD
