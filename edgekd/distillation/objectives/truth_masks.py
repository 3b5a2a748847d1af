"""The masks of the data themselves: focal + dice + predicted IoU, SAM's own training loss (arXiv 2304.02643, App. A)."""
from __future__ import annotations

import torch
from torch import Tensor

from edgekd.distillation.losses import best_answer, dice, focal, iou, on_cells
from edgekd.distillation.outputs import Context, Outputs
from edgekd.distillation.points import Objective


class TruthMasks(Objective):
    """`focal` x focal + `dice` x dice of the one mask that learns (the best of three for one click, mask 0 otherwise) + `iou` x the
    absolute error of its predicted IoU (TinySAM's form; SAM squares it)."""

    name, family, paper = "truth_masks", "prompt_in_the_loop", "SAM (arXiv 2304.02643, App. A), TinySAM (arXiv 2312.13789)"
    needs = frozenset({"masks", "iou", "truth"})
    asks_teacher = False

    def __init__(self, focal: float = 20.0, dice: float = 1.0, iou: float = 1.0) -> None:
        super().__init__()
        self.weights = (focal, dice, iou)

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """masks (P, 4, h, w), truth (P, F, F) -> (P,)."""
        assert student.masks is not None and student.iou is not None and context.valid_prompts is not None
        assert context.single is not None and context.truth is not None
        logits, valid = student.masks.float(), context.valid_prompts.unsqueeze(1)
        wide = on_cells(context.truth, logits).expand_as(logits)
        each = self.weights[0] * focal(logits, wide, valid) + self.weights[1] * dice(logits, wide, valid)
        true = iou((logits.detach() > 0) & (valid > 0), wide > 0)
        every, chosen = torch.arange(len(each), device=each.device), best_answer(each, context.single)
        return each[every, chosen] + self.weights[2] * (student.iou.float() - true).abs()[every, chosen]


objective = TruthMasks
