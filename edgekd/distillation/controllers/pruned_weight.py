"""The less data is kept, the more the teacher counts beside the labels (Distilling the Knowledge in Data Pruning, arXiv 2403.07854)."""
from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from edgekd.distillation.outputs import Context, Setup
from edgekd.distillation.points import Controller
from edgekd.distillation.weighing import known_objective
from edgekd.errors import UsageError


class PrunedWeight(Controller):
    """a(f) L_teacher + (1 - a(f)) L_labels with a(f) = full + (pruned - full)(1 - f) and f the share of the photos that is kept. The paper finds by
    search that the best a falls as f grows and gives no formula: the straight line between two measured ends is ours.

    Args:
        kept: f, 0..1; what the stage's data policy leaves of the photos.
        labels: the objective that learns from labels; all others learn from the teacher.
        full: a with all photos.
        pruned: a with next to none.
    """

    name, family, paper = "pruned_weight", "adaptive_weighting", "Distilling the Knowledge in Data Pruning (arXiv 2403.07854)"

    def __init__(self, kept: float, labels: str, full: float = 0.5, pruned: float = 1.0) -> None:
        super().__init__()
        if not all(0 <= x <= 1 for x in (kept, full, pruned)):
            raise UsageError(f"pruned_weight: kept, full and pruned are shares of 1, not {kept}, {full}, {pruned}")
        self.labels, self.alpha = labels, full + (pruned - full) * (1 - kept)

    def begin(self, setup: Setup) -> None:
        """The label's objective must be there."""
        known_objective(self.labels, setup.stage, self.name)

    def weigh(self, losses: Mapping[str, Tensor], context: Context) -> dict[str, Tensor]:
        """losses (B,) of each objective -> the same, weighted."""
        return {n: loss * (1 - self.alpha if n == self.labels else self.alpha) for n, loss in losses.items()}


controller = PrunedWeight
