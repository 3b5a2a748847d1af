"""ScaleKD: a cross-attention projector asks the student with the teacher's grid of questions, and the answer is compared in two views (Fan et al.,
arXiv 2411.06786).

Here: the cross-attention projector and dual-view feature mimicking. The third part, teacher parameter perception, runs the
student's features through the teacher's last stage, which needs the teacher live and stage-wise; it is left out.
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.distillation.losses import over_photo
from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.distillation.points import Objective
from edgekd.distillation.projectors import heads_of, pairs_of, photo, photo_mean, resampled
from edgekd.errors import UsageError


class CrossProjector(nn.Module):
    """Learned queries, one a cell of the teacher, attend to the student's cells: (B, C, h, w) -> (B, D, H, W)."""

    def __init__(self, channels: int, grid: tuple[int, int], width: int, out: tuple[int, int]) -> None:
        super().__init__()
        self.out, self.heads = out, heads_of(width)
        self.inputs = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.GroupNorm(1, width), nn.ReLU())
        self.places = nn.Parameter(torch.randn(1, width, *grid) * 0.02)
        self.queries = nn.Parameter(torch.randn(1, out[0] * out[1], width))
        self.q, self.kv, self.last = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """The student's map, as the teacher would lay it out."""
        tokens = (self.inputs(x) + self.places).flatten(2).transpose(1, 2)
        q = self.q(self.queries.expand(len(x), -1, -1)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(tokens).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        found = self.last(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        found = found + self.mlp(self.norm(found))
        return found.transpose(1, 2).unflatten(2, self.out)


def cosines(n: int) -> Tensor:
    """The orthonormal DCT-II of n values as a matrix (n, n): row k is the k-th frequency."""
    k, i = torch.arange(n).float()[:, None], torch.arange(n).float()[None, :]
    rows = math.sqrt(2 / n) * torch.cos(math.pi * (i + 0.5) * k / n)
    rows[0] /= math.sqrt(2)
    return rows


def without_low(x: Tensor, rows: Tensor, columns: Tensor, cut: int) -> Tensor:
    """x (B, C, h, w) without its lowest `cut` x `cut` frequencies; `rows`, `columns` are `cosines` of h and w."""
    spectrum = rows @ x @ columns.T
    keep = torch.ones_like(spectrum[0, 0])
    keep[:cut, :cut] = 0
    return rows.T @ (spectrum * keep) @ columns


def filled(x: Tensor, valid: Tensor, inside: Tensor) -> Tensor:
    """x (B, C, h, w) with the photo's mean in the padding, which then adds nothing to any frequency but the mean's."""
    return torch.where(inside > 0, x, photo_mean(x, valid)[..., None, None])


class ScaleKD(Objective):
    """spatial x |s - t|^2 + frequency x |s' - t'|^2 of unit vectors, cell by cell; s is the student through a cross-attention projector, s' through
    a second one; primes mean without the lowest frequencies, of which the mean would hide all others.

    Args:
        spatial: weight of the first view.
        frequency: weight of the second.
        cut: how many of the lowest frequencies each way are removed; 1, the paper's, is the mean alone.
        most: longest side of the grid that is compared; attention costs its fourth power (the paper's are 7 and 14).
    """

    name, family, paper = "scalekd", "feature", "ScaleKD: Strong Vision Transformers Could Be Excellent Teachers (arXiv 2411.06786)"
    needs = frozenset({"feats"})
    default_taps = "embedding"
    least_at_teacher = False

    def __init__(self, spatial: float = 1.0, frequency: float = 1.0, cut: int = 1, most: int = 16) -> None:
        super().__init__()
        self.weights, self.cut, self.most = (spatial, frequency), cut, most

    def bind(self, setup: Setup) -> None:
        """Two projectors a pair."""
        self.pairs = pairs_of(setup, self.name)
        self.grids = [tuple((min(p[1], self.most), min(p[2], self.most)) for p in (pair.ours, pair.theirs)) for pair in self.pairs]
        small = next((theirs for _, theirs in self.grids if min(theirs) <= self.cut), None)
        if small:
            raise UsageError(f"objective 'scalekd' removes {self.cut} frequencies each way of a map of {small[0]} x {small[1]}", where=setup.where,
                             hint="tap a finer map of the teacher, or lower 'cut'")
        self.projectors = nn.ModuleList(nn.ModuleList(CrossProjector(p.ours[0], ours, p.theirs[0], theirs) for _ in range(2))
                                        for p, (ours, theirs) in zip(self.pairs, self.grids, strict=True))

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """feats (B, C, h, w) of both -> (B,)."""
        found = []
        for i, (pair, (grid, out)) in enumerate(zip(self.pairs, self.grids, strict=True)):
            ours, theirs = resampled(student.feats[i].float(), grid), resampled(teacher.feats[i][:, : pair.theirs[0]].float(), out)
            inside = photo(context.valid, out)
            ours = ours * photo(context.valid, grid)
            spatial, frequency = (p(ours).float() for p in list(self.projectors[i].children()))
            rows, columns = (cosines(n).to(theirs) for n in out)
            with torch.autocast(theirs.device.type, enabled=False):
                views = [(spatial, theirs), tuple(without_low(filled(x, context.valid, inside), rows, columns, self.cut) for x in (frequency, theirs))]
            apart = [over_photo((F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1, keepdim=True), context.valid) for a, b in views]
            found.append(self.weights[0] * apart[0] + self.weights[1] * apart[1])
        return torch.stack(found).mean(0)


objective = ScaleKD
