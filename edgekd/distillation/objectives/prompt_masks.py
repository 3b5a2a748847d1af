"""Masks of the same prompt: BCE + dice to the teacher's mask, as in EdgeSAM's second phase (arXiv 2312.06660 sec. 3.2)."""
from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from edgekd.distillation.losses import bce, dice
from edgekd.distillation.objectives import Context, Objective, Outputs


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
        logits, target = student.masks.float(), teacher.masks.float()
        if target.shape[-1] != logits.shape[-1]:
            target = F.interpolate(target, logits.shape[-2:], mode="bilinear", align_corners=False, antialias=True)
        target = target.sigmoid() if self.soft else (target > 0).float()
        valid = context.valid_prompts.unsqueeze(1)
        each = self.weights[0] * bce(logits, target, valid) + self.weights[1] * dice(logits, target, valid)
        return each[:, 0] + context.single.to(each) * each[:, 1:].mean(1)


objective = PromptMasks
