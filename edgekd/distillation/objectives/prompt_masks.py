"""Masks of the same prompt: BCE + dice to the teacher's mask, as in EdgeSAM's second phase (arXiv 2312.06660 sec. 3.2)."""
from __future__ import annotations

from torch import Tensor

from edgekd.distillation.losses import answers, bce, dice, on_grid
from edgekd.distillation.outputs import Context, Outputs
from edgekd.distillation.points import Objective


class PromptMasks(Objective):
    """`bce` x BCE + `dice` x dice. All four masks learn from the teacher's mask of the same index for one click, mask 0 alone otherwise.

    Args:
        soft: learn the teacher's probabilities instead of its mask thresholded at 0 (EdgeSAM thresholds).
    """

    name, family, paper = "prompt_masks", "prompt_in_the_loop", "EdgeSAM phase 2 (arXiv 2312.06660)"
    needs = frozenset({"masks"})

    def __init__(self, bce: float = 5.0, dice: float = 5.0, soft: bool = False) -> None:
        super().__init__()
        self.weights, self.soft = (bce, dice), soft

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """masks (P, 4, h, w) -> (P,)."""
        assert student.masks is not None and teacher.masks is not None and context.valid_prompts is not None and context.single is not None
        logits = student.masks.float()
        target = on_grid(teacher.masks, logits)
        target = target.sigmoid() if self.soft else (target > 0).float()
        valid = context.valid_prompts.unsqueeze(1)
        return answers(self.weights[0] * bce(logits, target, valid) + self.weights[1] * dice(logits, target, valid), context.single)


objective = PromptMasks
