"""The order of a photo's nearest neighbours in the batch, as the teacher has it; the order of the far ones says nothing (CPRD, arXiv 2407.07479)."""
from __future__ import annotations

import torch
from torch import Tensor

from edgekd.distillation.objectives.affinity import others
from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.distillation.points import Objective
from edgekd.distillation.relations import check_batch, cosines, own_channels, photo_vector
from edgekd.distillation.softmax import exact


class CPCRank(Objective):
    """Contrast of each of the teacher's `hard` nearest photos with all that the teacher ranks below it.

    Mean over k < hard of logsumexp_{l >= k} (s_l / temperature) - s_k / temperature: s the student's cosine similarities of a photo with the
    others of the batch, in the teacher's order. Widths may differ. The paper ranks texts for an image, and finds hard ones with a third model.

    Args:
        hard: neighbours whose order counts; the rest of the batch is only known to be farther than those.
    """

    name, family, paper = "cpc_rank", "contrastive", "How to Make Cross Encoder a Good Teacher: CPRD (arXiv 2407.07479)"
    needs = frozenset({"feats"})
    default_taps = "embedding"
    least_at_teacher = False  # it orders, and goes on pulling the ordered apart
    min_batch = 3

    def __init__(self, hard: int = 4, temperature: float = 0.1) -> None:
        super().__init__()
        self.hard, self.temperature = hard, temperature

    def bind(self, setup: Setup) -> None:
        """Refuses batches with fewer than two others."""
        check_batch(setup, self.name, self.min_batch)
        self.channels = own_channels(setup)

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """feats (B, C, h, w) or (B, D) -> (B,), the mean over the taps."""
        losses = []
        for ours, theirs, channels in zip(student.feats, teacher.feats, self.channels, strict=True):
            s, t = photo_vector(ours, context), photo_vector(theirs[:, :channels], context)
            with exact(s):
                near = others(cosines(s)) / self.temperature
                near = near.gather(1, others(cosines(t)).argsort(1, descending=True))
            below = near.flip(1).logcumsumexp(1).flip(1)
            losses.append((below - near)[:, : max(1, min(self.hard, near.shape[1] - 1))].mean(1))
        return torch.stack(losses).mean(0)


objective = CPCRank
