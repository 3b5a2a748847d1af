"""Attention probabilities of transformers, token by token: KL divergence from the teacher's rows (MiniLM, Wang et al., arXiv 2002.10957)."""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.distillation.points import Objective
from edgekd.distillation.projectors import photo
from edgekd.errors import UsageError

LEAST = 1e-8
MOST_PREFIX_TOKENS = 5


def grid_of(tokens: int) -> int | None:
    """Side of the square that a sequence of tokens is, or ends in behind at most five others; None where it is none."""
    side = math.isqrt(tokens)
    return side if tokens - side * side <= MOST_PREFIX_TOKENS else None


def pooled(probabilities: Tensor, side: int) -> Tensor:
    """(B, h, N, N) over a square of tokens -> (B, h, side^2, side^2): queries averaged, keys added up, rows still sum to 1. Tokens before the picture's
    are left out."""
    old = grid_of(probabilities.shape[-1])
    assert old is not None
    p = probabilities[..., -old * old :, -old * old :]
    for _ in range(2):  # the last axis, then by transposing the one before
        p = F.adaptive_avg_pool2d(p.unflatten(-1, (old, old)).flatten(0, -3).unsqueeze(1), side).flatten(1).unflatten(0, p.shape[:-1]).transpose(-2, -1)
    return p / p.sum(-1, keepdim=True).clamp(min=LEAST)


class AttentionMaps(Objective):
    """KL(teacher's row || student's row) of attention, mean over rows and heads, mean over pairs. Different numbers of heads are averaged on both sides;
    different numbers of tokens of square pictures are pooled to the coarser square. Rows of padding are left out where the tokens are the cells of the
    embedding; windows have no place of their own, and all their rows count."""

    name, family, paper = "attention_maps", "attention", "MiniLM: Deep Self-Attention Distillation (arXiv 2002.10957)"
    needs = frozenset({"attention"})
    default_taps = "attention"

    def bind(self, setup: Setup) -> None:
        """Nothing to train; the token grids are settled."""
        self.sides: list[int | None] = []
        self.placed: list[int | None] = []  # the side of tokens that are the embedding's cells
        ours, theirs = setup.ours.feats, setup.theirs.feats
        if not ours or len(ours) != len(theirs):
            raise UsageError("objective 'attention_maps' compares pairs of attention", where=setup.where, hint="name pairs such as [attention2, attention5] under 'taps'")
        for whose, maps in (("student", ours), ("teacher", theirs)):
            for one in maps:
                if one.ndim != 4 or one.shape[-1] != one.shape[-2] or (one.float().sum(-1) - 1).abs().max() > 0.02:
                    raise UsageError(f"objective 'attention_maps' compares attention probabilities, and a tap of the {whose} gives {tuple(one.shape)} that are none",
                                     where=setup.where, hint="their taps are called attention0, attention1, ...; linear attention has none")
        for a, b in zip(ours, theirs, strict=True):
            sides = [grid_of(x.shape[-1]) for x in (a, b)]
            if a.shape[-1] == b.shape[-1]:
                self.sides.append(None)
            elif sides[0] is None or sides[1] is None:
                raise UsageError(f"attention over {a.shape[-1]} tokens cannot be compared with attention over {b.shape[-1]}", where=setup.where,
                                 hint="only tokens of square pictures are pooled; tap other blocks")
            else:
                self.sides.append(min(sides[0], sides[1]))
            embedding = setup.ours.embedding
            whole = embedding is not None and sides[0] == embedding.shape[-1]
            self.placed.append((self.sides[-1] or sides[0]) if whole else None)

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """feats: attention (B, h, N, N) of both -> (B,)."""
        found = []
        for ours, theirs, side, placed in zip(student.feats, teacher.feats, self.sides, self.placed, strict=True):
            ours, theirs = ours.float(), theirs.float()
            if ours.shape[1] != theirs.shape[1]:
                ours, theirs = ours.mean(1, keepdim=True), theirs.mean(1, keepdim=True)
            if side is not None:
                ours, theirs = pooled(ours, side), pooled(theirs, side)
            apart = theirs * (theirs.clamp(min=LEAST).log() - ours.clamp(min=LEAST).log())
            found.append(self.over_rows(apart.sum(-1).mean(1), placed, context))
        return torch.stack(found).mean(0)

    @staticmethod
    def over_rows(each: Tensor, placed: int | None, context: Context) -> Tensor:
        """Mean over rows (B, N) that are photo or stand before the picture -> (B,)."""
        if placed is None:
            return each.mean(1)
        inside = photo(context.valid, (placed, placed)).flatten(1)
        inside = F.pad(inside, (each.shape[1] - inside.shape[1], 0), value=1.0)
        return (each * inside).sum(1) / inside.sum(1)


objective = AttentionMaps
