"""Masked autoencoding of the teacher's features: what is hidden of the student's map must be told from what is seen (DMAE, Bai et al., arXiv 2208.12256).

The paper hides pixels from a ViT student, which then reads only the visible patches, and adds pixel reconstruction. A student here is any network
and sees the whole photo; its map is hidden in part instead, behind the tap, and a small transformer predicts the teacher's features of the hidden
cells. `visible` adds the paper's own term, features of the visible cells through a projector.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.distillation.points import Objective
from edgekd.distillation.projectors import Pair, heads_of, maps, pairs_of, photo, projector, resampled, uniform


class Decoder(nn.Module):
    """From a map with holes (B, C, h, w), what is shown of it (B, 1, h, w) -> (B, D, h, w): a learned token in every hole, places, transformer blocks."""

    def __init__(self, pair: Pair, grid: tuple[int, int], width: int, depth: int) -> None:
        super().__init__()
        self.inputs = nn.Conv2d(pair.ours[0], width, 1)
        self.token = nn.Parameter(torch.randn(1, width, 1, 1) * 0.02)
        self.places = nn.Parameter(torch.randn(1, width, *grid) * 0.02)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(width, heads_of(width, 4), 2 * width, dropout=0.0, activation="gelu", batch_first=True,
                                                               norm_first=True) for _ in range(depth))
        self.outputs = nn.Linear(width, pair.theirs[0])

    def forward(self, x: Tensor, shown: Tensor) -> Tensor:
        """What the teacher has in every cell."""
        grid = x.shape[-2:]
        tokens = (torch.where(shown > 0, self.inputs(x).to(self.token), self.token) + self.places).flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens)
        return self.outputs(tokens).transpose(1, 2).unflatten(2, grid)


class DMAE(Objective):
    """Mean over the hidden cells of (decoder(student with holes) - teacher)^2, plus `visible` x mean over the others of (p(student) - teacher)^2.

    Args:
        share: of cells that are hidden.
        visible: weight of the cells that are not.
        width: of the decoder.
        depth: of the decoder, in blocks.
        most: longest side of the grid that is compared; attention costs its fourth power.
    """

    name, family, paper = "dmae", "masked_feature", "Masked Autoencoders Enable Efficient Knowledge Distillers (arXiv 2208.12256)"
    needs = frozenset({"feats"})
    default_taps = "embedding"
    least_at_teacher = False

    def __init__(self, share: float = 0.75, visible: float = 0.0, width: int = 128, depth: int = 1, most: int = 16) -> None:
        super().__init__()
        self.share, self.visible, self.width, self.depth, self.most = share, visible, width, depth, most

    def bind(self, setup: Setup) -> None:
        """A decoder a pair."""
        self.pairs = pairs_of(setup, self.name)
        self.grids = [(min(p.grid[0], self.most), min(p.grid[1], self.most)) for p in self.pairs]
        self.decoders = nn.ModuleList(Decoder(p, grid, self.width, self.depth) for p, grid in zip(self.pairs, self.grids, strict=True))
        self.projectors = nn.ModuleList(projector(p.ours[0], p.theirs[0]) for p in self.pairs if self.visible)

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """feats (B, C, h, w) of both -> (B,)."""
        found = []
        for i, (ours, theirs) in enumerate(maps(student, teacher, self.pairs)):
            grid = self.grids[i]
            ours, theirs = resampled(ours, grid), resampled(theirs, grid)
            inside = photo(context.valid, grid)
            hidden = self.hidden(inside, context)
            shown = inside * (1 - hidden)
            found.append(over(self.decoders[i](ours, shown).float() - theirs, hidden))
            if self.visible:
                found[-1] = found[-1] + self.visible * over(self.projectors[i](ours).float() - theirs, shown)
        return torch.stack(found).mean(0)

    def hidden(self, inside: Tensor, context: Context) -> Tensor:
        """Which cells are hidden, (B, 1, h, w) 0/1: of the photo's cells the wanted share, at least one and never all of several."""
        order = uniform(context, inside).masked_fill(inside == 0, 2.0)
        count = inside.sum((1, 2, 3), keepdim=True)
        most = torch.maximum(count - 1, torch.ones_like(count))
        wanted = torch.minimum((count * self.share).round().clamp(min=1), most)
        rank = order.flatten(1).argsort(1).argsort(1).view_as(order)
        return (rank < wanted).to(inside)


def over(error: Tensor, cells: Tensor) -> Tensor:
    """Mean square over channels and the given cells: (B, C, h, w), (B, 1, h, w) 0/1 -> (B,)."""
    return (error.square().mean(1, keepdim=True) * cells).sum((1, 2, 3)) / cells.sum((1, 2, 3)).clamp(min=1)


objective = DMAE
