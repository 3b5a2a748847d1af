"""How alike the patches of a photo are to each other, as the teacher sees them: a graph of tokens, which needs no projector (arXiv 2306.12442;
token relations of Hybrid Distill, arXiv 2306.15876)."""
from __future__ import annotations

import torch
from torch import Tensor

from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.distillation.points import Objective
from edgekd.distillation.relations import check_maps, common_grid, inside, mean_over, own_channels, tokens
from edgekd.distillation.softmax import exact, soft_kl


class TokenRelations(Objective):
    """Squared difference (or KL) of the similarities of a photo's patches to each other.

    Mean squared difference of the cosine similarities (N, N) of a photo's tokens; with a `temperature` instead T^2 KL of their softmax over
    the other tokens. Cells of padding take no part; widths may differ.

    Of the token graph this is the term within a photo; the paper's other terms compare tokens of different photos: objective `correspondence`.

    Args:
        temperature: 0 compares the similarities themselves.
        most: tokens at most; larger maps are averaged onto a coarser grid (memory grows with the square).
    """

    name, family, paper = "token_relations", "relation", "Knowledge Distillation via Token-level Relationship Graph (arXiv 2306.12442)"
    needs = frozenset({"feats"})
    default_taps = "embedding"

    def __init__(self, temperature: float = 0.0, most: int = 256) -> None:
        super().__init__()
        self.temperature, self.most = temperature, most

    def bind(self, setup: Setup) -> None:
        """Refuses taps that are no maps."""
        check_maps(setup, self.name)
        self.channels = own_channels(setup)

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """feats (B, C, h, w) -> (B,), the mean over the taps."""
        losses = []
        for ours, theirs, channels in zip(student.feats, teacher.feats, self.channels, strict=True):
            grid = common_grid(ours, theirs, self.most)
            here = inside(context.valid, grid).flatten(1)
            s, t = tokens(ours, grid), tokens(theirs[:, :channels], grid)
            with exact(s):
                losses.append(self.compare(s @ s.transpose(1, 2), t @ t.transpose(1, 2), here))
        return torch.stack(losses).mean(0)

    def compare(self, ours: Tensor, theirs: Tensor, here: Tensor) -> Tensor:
        """Similarities (B, N, N) of each, tokens that are photo (B, N) -> (B,)."""
        pairs = here.unsqueeze(1) & here.unsqueeze(2)
        if not self.temperature:
            return mean_over((ours - theirs).square(), pairs, (1, 2))
        apart = pairs & ~torch.eye(here.shape[1], dtype=torch.bool, device=here.device)
        return mean_over(soft_kl(ours, theirs, self.temperature, there=apart), here, 1)


objective = TokenRelations
