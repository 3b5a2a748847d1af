"""Knowledge review: a teacher's early stage is learnt with the help of the student's later ones (Chen et al., arXiv 2104.09044).

From the deepest stage up, each is fused with what came from below by a learned attention, and the fused map is compared with the teacher's
stage at several scales (the hierarchical context loss).
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.distillation.losses import over_photo
from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.distillation.points import Objective
from edgekd.distillation.projectors import pairs_of, photo

SCALES = (4, 2, 1)


def context_loss(ours: Tensor, theirs: Tensor, valid: Tensor) -> Tensor:
    """The hierarchical context loss: squared errors of the maps (weight 1) and of their means on grids of 4, 2 and 1 cells a side (1/2, 1/4, 1/8), those
    that are coarser than the maps; divided by the sum of the weights. Cells without photo are left out: (B, C, h, w) -> (B,)."""
    inside = photo(valid, ours.shape[-2:])
    total, weights = over_photo((ours - theirs).square(), valid), 1.0
    for n, side in enumerate((s for s in SCALES if s < ours.shape[-2]), 1):
        share = F.adaptive_avg_pool2d(inside, side)
        a, b = (F.adaptive_avg_pool2d(x * inside, side) / share.clamp(min=1e-6) for x in (ours, theirs))
        some = (share > 0).float()
        total = total + 0.5**n * ((a - b).square().mean(1, keepdim=True) * some).sum((1, 2, 3)) / some.sum((1, 2, 3))
        weights += 0.5**n
    return total / weights


class Fusion(nn.Module):
    """One stage of the review: the stage's map (B, C, h, w) with what came from below -> as the teacher's (B, D, H, W), and what goes on up."""

    def __init__(self, channels: int, width: int, out: int, deepest: bool) -> None:
        super().__init__()
        self.inputs = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.GroupNorm(1, width))
        self.attention = None if deepest else nn.Sequential(nn.Conv2d(2 * width, 2, 1), nn.Sigmoid())
        self.outputs = nn.Sequential(nn.Conv2d(width, out, 3, padding=1, bias=False), nn.GroupNorm(1, out))

    def forward(self, x: Tensor, below: Tensor | None, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """below (B, width, any, any) -> (B, D, *grid), (B, width, *grid)."""
        x = self.inputs(x)
        if self.attention is not None and below is not None:
            below = F.interpolate(below, x.shape[-2:], mode="nearest")
            share = self.attention(torch.cat([x, below], dim=1))
            x = x * share[:, :1] + below * share[:, 1:]
        x = x if tuple(x.shape[-2:]) == grid else F.interpolate(x, grid, mode="nearest")
        return self.outputs(x), x


class ReviewKD(Objective):
    """Mean over stages of the hierarchical context loss between the student's stages, fused from the deepest up, and the teacher's.

    Args:
        width: channels in which stages are fused.
    """

    name, family, paper = "reviewkd", "feature", "Distilling Knowledge via Knowledge Review (arXiv 2104.09044)"
    needs = frozenset({"feats"})
    default_taps = "stages"
    least_at_teacher = False

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.width = width

    def bind(self, setup: Setup) -> None:
        """A fusion a stage, the deepest first."""
        self.pairs = pairs_of(setup, self.name)
        self.order = sorted(range(len(self.pairs)), key=lambda i: (self.pairs[i].ours[1], -i))
        self.stages = nn.ModuleList(Fusion(self.pairs[i].ours[0], self.width, self.pairs[i].theirs[0], n == 0) for n, i in enumerate(self.order))

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """feats (B, C, h, w) of both -> (B,)."""
        found, below = [], None
        for stage, i in zip(self.stages, self.order, strict=True):
            channels, *grid = self.pairs[i].theirs
            ours = student.feats[i].float()
            reviewed, below = stage(ours * photo(context.valid, ours.shape[-2:]), below, tuple(grid))
            found.append(context_loss(reviewed.float(), teacher.feats[i][:, :channels].float(), context.valid))
        return torch.stack(found).mean(0)


objective = ReviewKD
