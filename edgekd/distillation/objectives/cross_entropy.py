"""Cross-entropy with the data's own labels: what distillation is compared with, and what several methods add to it."""
from __future__ import annotations

from torch import Tensor

from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.distillation.points import Objective
from edgekd.distillation.softmax import enough_classes, label_loss


class CrossEntropy(Objective):
    """Cross-entropy with the data's labels or mixed shares of them; a photo without one costs 0.

    -sum_c y_c log softmax(student)_c with y the photo's class, or its shares of classes after mixing.

    Args:
        smoothing: this share of y is spread over all classes alike.
    """

    name, family, paper = "cross_entropy", "logit", "the labels themselves; smoothing: Rethinking the Inception Architecture (arXiv 1512.00567)"
    needs = frozenset({"logits", "classes"})
    asks_teacher = False
    least_at_teacher = False

    def __init__(self, smoothing: float = 0.0) -> None:
        super().__init__()
        self.smoothing = smoothing

    def bind(self, setup: Setup) -> None:
        """Refuses a head of one class."""
        enough_classes(setup, self.name)

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """logits (B, C) -> (B,)."""
        return label_loss(student["logits"], context, self.smoothing)


objective = CrossEntropy
