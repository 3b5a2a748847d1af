"""Norm and direction: features grow along the teacher's mean feature of their class (ND loss of KD++, arXiv 2305.17007)."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.distillation.distributed import current
from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.distillation.points import Objective
from edgekd.distillation.softmax import exact, target_class


class ND(Objective):
    """Features as long as the teacher's, along the teacher's mean feature of their class.

    1 - <f, e> / max(|f|, |f_T|): f the student's `pooled`, f_T the teacher's, e the direction of the teacher's mean feature of the photo's
    class. A feature as long as the teacher's that points along e costs 0.

    The paper computes the class means beforehand; here they are running means over the photos seen so far, this batch's included, and exact after
    an epoch. A student of another width gets a linear layer, which trains along.

    Args:
        labels: the class is the data's where it says one; false (or a photo without): the teacher's best.
    """

    name, family, paper = "nd", "norm_direction", "Improving Knowledge Distillation via Regularizing Feature Norm and Direction (arXiv 2305.17007)"
    needs = frozenset({"logits", "pooled"})
    least_at_teacher = False

    means: Tensor
    counts: Tensor

    def __init__(self, labels: bool = True) -> None:
        super().__init__()
        self.labels = labels

    def bind(self, setup: Setup) -> None:
        """Makes room for the means, and a projector where widths differ."""
        ours, theirs = setup.ours["pooled"].shape[1], setup.theirs["pooled"].shape[1]
        self.projector = nn.Identity() if ours == theirs else nn.Linear(ours, theirs, bias=False)
        classes = setup.theirs["logits"].shape[1]
        self.register_buffer("means", torch.zeros(classes, theirs))
        self.register_buffer("counts", torch.zeros(classes))

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """pooled (B, D) -> (B,)."""
        ours, theirs = self.projector(student["pooled"]).float(), teacher["pooled"].float()
        target = target_class(context, teacher["logits"], self.labels)
        if self.training:
            self.remember(theirs, target)
        direction = F.normalize(self.means[target], dim=1)
        longest = torch.maximum(ours.norm(dim=1), theirs.norm(dim=1)).clamp(min=1e-6)
        return 1 - (ours * direction).sum(1) / longest

    @torch.no_grad()
    def remember(self, features: Tensor, classes: Tensor) -> None:
        """Move the means to include these features (B, D) of these classes (B,), and those of all other processes."""
        features, classes = current().cat(features), current().cat(classes)
        with exact(features):
            new = F.one_hot(classes, len(self.counts)).float()
            self.counts += new.sum(0)
            share = 1 / self.counts.clamp(min=1)
            self.means += share.unsqueeze(1) * (new.T @ features - new.sum(0).unsqueeze(1) * self.means)


objective = ND
