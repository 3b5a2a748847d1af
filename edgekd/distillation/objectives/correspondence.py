"""Which patch of another photo a patch belongs to, as the teacher finds it: correspondences, learned by their ranking (CoTAP, arXiv 2509.09429)."""
from __future__ import annotations

import torch
from torch import Tensor

from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.distillation.points import Objective
from edgekd.distillation.relations import check_batch, check_maps, common_grid, inside, mean_over, own_channels, tokens
from edgekd.distillation.softmax import exact, soft_kl


class Correspondence(Objective):
    """Average precision (or KL) of which patches of another photo a patch is like, as the teacher has it.

    For each patch of a photo and all patches of the next photo of the batch: 1 - average precision of the student's order of similarity, the
    teacher's similarities (0..1 over the patches) being how relevant each is; steps are sigmoids of slope 1 / `temperature`. With `ranking`
    false, T^2 KL of the softmax over the next photo's patches instead.

    Of the paper this is the correspondence loss; its filter with learned prototypes of objects is left out, and so are its crops: the teacher is
    another network here, not the student's average.

    Args:
        most: patches at most; with `ranking` memory grows with the third power.
    """

    name, family, paper = "correspondence", "contrastive", "Semantic Concentration for Self-Supervised Dense Representations: CoTAP (arXiv 2509.09429)"
    needs = frozenset({"feats"})
    default_taps = "embedding"
    min_batch = 2

    def __init__(self, ranking: bool = True, temperature: float = 0.05, most: int = 64) -> None:
        super().__init__()
        self.ranking, self.temperature, self.most = ranking, temperature, most

    def bind(self, setup: Setup) -> None:
        """Refuses taps that are no maps, and batches of one photo."""
        check_maps(setup, self.name)
        check_batch(setup, self.name, self.min_batch)
        self.channels = own_channels(setup)

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """feats (B, C, h, w) -> (B,), the mean over the taps."""
        losses = []
        for ours, theirs, channels in zip(student.feats, teacher.feats, self.channels, strict=True):
            grid = common_grid(ours, theirs, self.most)
            here = inside(context.valid, grid).flatten(1)
            s, t = tokens(ours, grid), tokens(theirs[:, :channels], grid)
            with exact(s):
                near, wanted = (x @ x.roll(-1, 0).transpose(1, 2) for x in (s, t))
            losses.append(mean_over(self.compare(near, wanted, here.roll(-1, 0).unsqueeze(1).expand_as(near)), here, 1))
        return torch.stack(losses).mean(0)

    def compare(self, ours: Tensor, theirs: Tensor, there: Tensor) -> Tensor:
        """Similarities (B, N, M) of each, patches that are photo (B, N, M) -> (B, N)."""
        if self.ranking:
            return 1 - average_precision(ours, relevance(theirs, there), there, self.temperature)
        return soft_kl(ours, theirs, self.temperature, there=there)


def relevance(similarity: Tensor, there: Tensor) -> Tensor:
    """Similarities (..., M) stretched to 0..1 over the patches that are there; 0 for the others."""
    low = similarity.masked_fill(~there, torch.inf).amin(-1, keepdim=True)
    high = similarity.masked_fill(~there, -torch.inf).amax(-1, keepdim=True)
    return torch.where(there, (similarity - low) / (high - low).clamp(min=1e-6), 0.0)


def average_precision(scores: Tensor, relevant: Tensor, there: Tensor, temperature: float) -> Tensor:
    """Mean over the items j, weighted by their relevance, of the mean relevance of what is ranked as high as j: scores, relevant and there (..., M)
    -> (...). Relevant 0/1 and a small temperature give the usual average precision. j itself counts whole."""
    above = ((scores.unsqueeze(-2) - scores.unsqueeze(-1)) / temperature).sigmoid() * there.unsqueeze(-2)  # [j, k]: k above j
    above = above.diagonal_scatter(there.to(above), dim1=-2, dim2=-1)
    precision = (above * relevant.unsqueeze(-2)).sum(-1) / above.sum(-1).clamp(min=1e-6)
    return (relevant * precision).sum(-1) / relevant.sum(-1).clamp(min=1e-6)


objective = Correspondence
