"""The predicted IoU of the teacher, so that best-of-three still works after compression (the reference recipes skip it)."""
from __future__ import annotations

from torch import Tensor

from edgekd.distillation.outputs import Context, Outputs
from edgekd.distillation.points import Objective


class IouHead(Objective):
    """Squared error of the four predicted IoUs."""

    name, family, paper = "iou_head", "prompt_in_the_loop", "SAM's IoU head (arXiv 2304.02643, App. A), distilled"
    needs = frozenset({"iou"})

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """iou (P, 4) -> (P,)."""
        assert student.iou is not None and teacher.iou is not None
        return (student.iou.float() - teacher.iou.float()).square().mean(1)


objective = IouHead
