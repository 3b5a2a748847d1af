"""Transport between the answers of a whole batch: Sinkhorn's distance of student and teacher (SinKD, arXiv 2402.17110)."""
from __future__ import annotations

import torch
from torch import Tensor

from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.distillation.points import Objective
from edgekd.distillation.relations import check_batch
from edgekd.distillation.softmax import exact, same_classes


class SinKD(Objective):
    """Sinkhorn's transport cost between student's and teacher's answers to the whole batch.

    Photo i's share sum_j P_ij D_ij of the cost: D_ij is the L1 distance between the student's softened probabilities of photo i and the
    teacher's of photo j, P the plan that Sinkhorn's iterations make of exp(-D / blur), rows and columns of sum 1. Smallest where the
    batches agree, up to the blur. Photos of the whole batch are compared with each other, not only each with itself.

    The paper's loss is the sum over the batch where this has its mean, and is added to `kd`.

    Args:
        blur: entropy of the plan; 0.1 in the paper's code.
        iterations: normalisations of rows, then columns.
    """

    name, family, paper = "sinkd", "optimal_transport", "Sinkhorn Distance Minimization for Knowledge Distillation (arXiv 2402.17110)"
    needs = frozenset({"logits"})
    min_batch = 2

    def __init__(self, temperature: float = 2.0, blur: float = 0.1, iterations: int = 20) -> None:
        super().__init__()
        self.temperature, self.blur, self.iterations = temperature, blur, iterations

    def bind(self, setup: Setup) -> None:
        """Refuses heads of different classes, and batches of one photo."""
        same_classes(setup, self.name)
        check_batch(setup, self.name, self.min_batch)

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """logits (B, C) -> (B,)."""
        ours, theirs = ((of["logits"].float() / self.temperature).softmax(1) for of in (student, teacher))
        with exact(ours):
            cost = torch.cdist(ours, theirs, p=1)
        return (plan(cost, self.blur, self.iterations) * cost).sum(1)


def plan(cost: Tensor, blur: float, iterations: int) -> Tensor:
    """(B, B) costs -> what goes from each row to each column, both of sum 1. In logarithms, so that a small blur does not underflow."""
    log_p = -cost / blur
    for _ in range(iterations):
        log_p = log_p - log_p.logsumexp(1, keepdim=True)
        log_p = log_p - log_p.logsumexp(0, keepdim=True)
    return log_p.exp()


objective = SinKD
