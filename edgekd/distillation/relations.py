"""Vectors of photos and tokens of maps, on one grid and without the padding: what relations and contrasts are computed from."""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.distillation.outputs import Context, Setup
from edgekd.errors import UsageError


def check_batch(setup: Setup, name: str, fewest: int) -> None:
    """Raises UsageError: the stage's batches are too small for photos to be compared with each other."""
    if setup.stage.batch_size < fewest:
        raise UsageError(f"objective '{name}' compares {fewest} photos of a batch with each other, and a batch has {setup.stage.batch_size}",
                         where=setup.where, hint=f"batch_size: {max(fewest, 8)}; accumulating gradients does not help")


def check_maps(setup: Setup, name: str) -> None:
    """Raises UsageError: a tap gives no maps (B, C, h, w)."""
    for whose, of in (("student", setup.ours), ("teacher", setup.theirs)):
        wrong = next((f for f in of.feats if f.ndim != 4), None)
        if wrong is not None:
            raise UsageError(f"objective '{name}' compares patches, and a tap of the {whose} gives {list(wrong.shape)}, no map", where=setup.where,
                             hint="take taps such as embedding or stage4")


def own_channels(setup: Setup) -> list[int]:
    """Of each of the teacher's taps the channels that mean something to others: a promptable teacher's embedding may carry more behind its first
    `embed_dim`, for its own decoder."""
    whole = setup.theirs.embedding
    dim = getattr(setup.teacher, "embed_dim", None)
    return [dim if dim and whole is not None and f.ndim == 4 and f.shape == whole.shape and dim < f.shape[1] else f.shape[1] for f in setup.theirs.feats]


def inside(valid: Tensor, grid: tuple[int, int]) -> Tensor:
    """Which cells of a grid are more than half photo: valid (B, 1, h, w) 0/1 -> (B, gh, gw) bool."""
    return F.interpolate(valid.float(), grid, mode="area")[:, 0] > 0.5


def photo_vector(x: Tensor, context: Context) -> Tensor:
    """One vector a photo: the mean over the cells of the photo of a map (B, C, h, w), or (B, D) as it is -> (B, C) float32."""
    if x.ndim == 2:
        return x.float()
    x, here = x.float().flatten(2), inside(context.valid, (x.shape[2], x.shape[3])).flatten(1).unsqueeze(1)
    return (x * here).sum(2) / here.sum(2).clamp(min=1)


def common_grid(ours: Tensor, theirs: Tensor, most: int) -> tuple[int, int]:
    """The finest grid that neither map (B, C, h, w) has to be enlarged for, with at most `most` cells."""
    h, w = min(ours.shape[2], theirs.shape[2]), min(ours.shape[3], theirs.shape[3])
    shrink = min(1.0, math.sqrt(most / (h * w)))
    return max(1, math.floor(h * shrink + 1e-6)), max(1, math.floor(w * shrink + 1e-6))


def tokens(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """A map (B, C, h, w), averaged onto a grid, as unit vectors (B, N, C) float32 of its N cells."""
    return F.normalize(F.adaptive_avg_pool2d(x.float(), grid).flatten(2).transpose(1, 2), dim=2)


def cosines(x: Tensor) -> Tensor:
    """Cosine similarity of every vector with every other: (B, D) -> (B, B)."""
    unit = F.normalize(x, dim=1)
    return unit @ unit.T


def mean_over(x: Tensor, mask: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Mean of x where mask (broadcastable, 0/1 or bool) says so; 0 where it says so nowhere."""
    mask = mask.expand_as(x).to(x)
    return torch.where(mask > 0, x, 0.0).sum(dim) / mask.sum(dim).clamp(min=1)
