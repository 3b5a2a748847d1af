"""What objectives share that compare maps of two networks: which maps, on which grid, without the padding, through which projector."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.distillation.draws import Draws
from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.errors import UsageError


@dataclass(frozen=True)
class Pair:
    """Shapes (C, h, w) of the two maps of one pair."""

    ours: tuple[int, int, int]
    theirs: tuple[int, int, int]

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) that both are compared on: the coarser one."""
        return min(self.ours[1], self.theirs[1]), min(self.ours[2], self.theirs[2])


def pairs_of(setup: Setup, name: str) -> list[Pair]:
    """What an objective is given by its taps. Of a foreign teacher's embedding only the first `embed_dim` channels count.

    Raises:
        UsageError: there is nothing to compare, or something that is no map.
    """
    ours, theirs = setup.ours.feats, setup.theirs.feats
    if not ours or len(ours) != len(theirs):
        raise UsageError(f"objective '{name}' compares pairs of maps, and there are {len(ours)} of the student and {len(theirs)} of the teacher",
                         where=setup.where, hint="name [student's, teacher's] pairs under 'taps'")
    for whose, maps in (("student", ours), ("teacher", theirs)):
        for one in maps:
            if one.ndim != 4:
                raise UsageError(f"objective '{name}' compares maps (B, C, h, w), and a tap of the {whose} gives {tuple(one.shape)}", where=setup.where,
                                 hint="tap a block, or tokens of a square picture")
    width = getattr(setup.teacher, "embed_dim", None)
    kept = [min(t.shape[1], width) if width and t is setup.theirs.embedding else t.shape[1] for t in theirs]
    return [Pair(tuple(a.shape[1:]), (c, *b.shape[2:])) for a, b, c in zip(ours, theirs, kept, strict=True)]  # type: ignore[arg-type]


def maps(student: Outputs, teacher: Outputs, pairs: Sequence[Pair]) -> Iterator[tuple[Tensor, Tensor]]:
    """The pairs as float32 on the coarser grid of the two: (B, C, h, w) of the student and (B, D, h, w) of the teacher."""
    for ours, theirs, pair in zip(student.feats, teacher.feats, pairs, strict=True):
        yield resampled(ours.float(), pair.grid), resampled(theirs[:, : pair.theirs[0]].float(), pair.grid)


def resampled(x: Tensor, grid: Sequence[int]) -> Tensor:
    """x (B, C, h, w) -> (B, C, *grid), bilinear and antialiased."""
    return x if tuple(x.shape[-2:]) == tuple(grid) else F.interpolate(x, list(grid), mode="bilinear", align_corners=False, antialias=True)


def photo(valid: Tensor, grid: Sequence[int]) -> Tensor:
    """Cells that are more than half photo, as `losses.over_photo` counts them: (B, 1, *grid) 0/1. All cells of a photo too thin to fill one."""
    inside = (F.interpolate(valid, list(grid), mode="bilinear", align_corners=False) > 0.5).float()
    return torch.where(inside.sum((1, 2, 3), keepdim=True) > 0, inside, 1.0)


def photo_mean(x: Tensor, valid: Tensor) -> Tensor:
    """Mean over the photo's cells: x (B, C, h, w) -> (B, C)."""
    inside = photo(valid, x.shape[-2:])
    return (x * inside).sum((2, 3)) / inside.sum((2, 3))


def uniform(context: Context, like: Tensor) -> Tensor:
    """A number in [0, 1) for every cell of `like` (B, C, h, w) -> (B, 1, h, w), however many processes share the batch."""
    return Draws.of(context.draws or context.generator).rand(len(like), 1, *like.shape[-2:]).to(like)


def projector(ours: int, theirs: int, kernel: int = 1) -> nn.Module:
    """A convolution from the student's channels to the teacher's, (B, ours, h, w) -> (B, theirs, h, w)."""
    return nn.Conv2d(ours, theirs, kernel, padding=kernel // 2)


def bridge(ours: int, theirs: int) -> nn.Module:
    """A 1x1 projector where widths differ, nothing where they are equal."""
    return nn.Identity() if ours == theirs else projector(ours, theirs)


def heads_of(width: int, most: int = 8) -> int:
    """The most heads, a power of two, that divide a width."""
    return max(h for h in (1, 2, 4, 8) if h <= most and width % h == 0)
