"""Self-distillation without a teacher: soft labels made from the student's own answer and Zipf's law (arXiv 2303.13005, USKD)."""
from __future__ import annotations

import torch
from torch import Tensor

from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.distillation.points import Objective
from edgekd.distillation.softmax import enough_classes, labels_of, without


class USKD(Objective):
    """Soft labels of the student's own making: its target probability, and Zipf's law over its ranking. No teacher.

    -alpha P_t log S_t - beta sum_i Z_i log N(S_i): P_t = 1 + S_t^2 - mean S_t^2 of the batch; Z gives the non-target classes 1, 1/2, 1/3, ...
    (scaled to 1) in the order of the student's own logits. Soft labels carry no gradient. A photo without a class costs nothing.

    The paper ranks the classes by the sum of these logits and those of a weak head on a middle layer, which a third term trains; here the
    student's own rank alone does.

    Args:
        alpha, beta: 1 and 0.1 in the paper.
    """

    name, family, paper = "uskd", "logit", "From Knowledge Distillation to Self-Knowledge Distillation (arXiv 2303.13005)"
    needs = frozenset({"logits", "classes"})
    asks_teacher = False
    least_at_teacher = False

    def __init__(self, alpha: float = 1.0, beta: float = 0.1) -> None:
        super().__init__()
        self.alpha, self.beta = alpha, beta

    def bind(self, setup: Setup) -> None:
        """Refuses a head of one class."""
        enough_classes(setup, self.name)

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """logits (B, C) -> (B,)."""
        logits = student["logits"].float()
        given = labels_of(context, logits.shape[1])
        if given is None:
            return logits.sum(1) * 0
        target, known = given
        s_t = logits.log_softmax(1).gather(1, target.unsqueeze(1)).squeeze(1)
        square = s_t.detach().exp().square()
        p_t = 1 + square - (square * known).sum() / known.sum().clamp(min=1)
        rest = without(logits, target)
        rank = rest.detach().argsort(1, descending=True).argsort(1)
        zipf = 1 / (rank + 1.0)
        of_rest = -(zipf / zipf.sum(1, keepdim=True) * rest.log_softmax(1)).sum(1)
        return torch.where(known, -self.alpha * p_t * s_t + self.beta * of_rest, 0.0)


objective = USKD
