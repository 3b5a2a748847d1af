"""Correlation instead of equality: the student ranks the classes of a photo, and the photos for a class, as the teacher does (arXiv 2205.10536)."""
from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.distillation.points import Objective
from edgekd.distillation.relations import check_batch
from edgekd.distillation.softmax import same_classes


class DIST(Objective):
    """1 - Pearson correlation of the probabilities, over the classes of a photo and over the photos of a class.

    T^2 (beta (1 - Pearson over the classes of a photo) + gamma (1 - Pearson over the photos of a class, mean over classes)) of the
    softened probabilities.

    The second belongs to the batch. A photo's share of it is B / 2 times its squared difference of the standardised columns, which is never
    negative and whose mean over the batch is the whole.
    """

    name, family, paper = "dist", "logit", "Knowledge Distillation from A Stronger Teacher (arXiv 2205.10536)"
    needs = frozenset({"logits"})
    min_batch = 2

    def __init__(self, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__()
        self.beta, self.gamma, self.temperature = beta, gamma, temperature

    def bind(self, setup: Setup) -> None:
        """Refuses heads of different classes, and batches of one photo."""
        same_classes(setup, self.name)
        check_batch(setup, self.name, self.min_batch)

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """logits (B, C) -> (B,)."""
        ours, theirs = ((of["logits"].float() / self.temperature).softmax(1) for of in (student, teacher))
        inter = (standard(ours, 1) - standard(theirs, 1)).square().sum(1) / 2
        intra = (standard(ours, 0) - standard(theirs, 0)).square().mean(1) * len(ours) / 2
        return self.temperature**2 * (self.beta * inter + self.gamma * intra)


def standard(p: Tensor, dim: int) -> Tensor:
    """Centred and of length 1 along an axis, so that half the squared distance of two is 1 - their Pearson correlation."""
    return F.normalize(p - p.mean(dim, keepdim=True), dim=dim, eps=1e-8)


objective = DIST
