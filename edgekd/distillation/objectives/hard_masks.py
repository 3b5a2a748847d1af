"""The teacher's masks with TinySAM's weight for hard ones (arXiv 2312.13789): where the student is behind its teacher, it learns more.

The weight of a mask is sigmoid(IoU_teacher / (IoU_student + eps) - 1), both against the true mask: 0.5 where they are equal.
"""
from __future__ import annotations

from torch import Tensor

from edgekd.distillation.losses import answers, iou, on_cells, on_grid
from edgekd.distillation.outputs import Context, Outputs
from edgekd.distillation.points import Objective


class HardMasks(Objective):
    """Weighted absolute error of the masks, mean over the photo. The paper does not say whether of logits or probabilities.

    Args:
        weighted: False gives every mask the same weight, 1.
        logits: compare logits, whose scale differs by teacher; probabilities otherwise.
        eps: keeps the ratio finite where the student misses the mask altogether.
    """

    name, family, paper = "hard_masks", "prompt_in_the_loop", "TinySAM (arXiv 2312.13789)"
    needs = frozenset({"masks", "truth"})

    def __init__(self, weighted: bool = True, logits: bool = False, eps: float = 1e-3) -> None:
        super().__init__()
        self.weighted, self.logits, self.eps = weighted, logits, eps

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """masks (P, 4, h, w), truth (P, F, F) -> (P,)."""
        assert student.masks is not None and teacher.masks is not None and context.valid_prompts is not None
        assert context.single is not None and context.truth is not None
        ours = student.masks.float()
        theirs, valid = on_grid(teacher.masks, ours), context.valid_prompts.unsqueeze(1)
        error = (ours - theirs).abs() if self.logits else (ours.sigmoid() - theirs.sigmoid()).abs()
        each = (error * valid).sum((2, 3)) / valid.sum((2, 3)).clamp(min=1)
        if self.weighted:
            truth, inside = on_cells(context.truth, ours) > 0, valid > 0
            behind = iou((theirs > 0) & inside, truth) / (iou((ours.detach() > 0) & inside, truth) + self.eps)
            each = each * (behind - 1).sigmoid()
        return answers(each, context.single)


objective = HardMasks
