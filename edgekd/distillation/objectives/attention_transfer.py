"""Attention transfer: where a stage has its energy, summed over channels (Zagoruyko & Komodakis, arXiv 1612.03928). Needs no projector."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.distillation.points import Objective
from edgekd.distillation.projectors import pairs_of, photo, resampled
from edgekd.errors import UsageError

FORMS = ("paper", "code")


def energy(x: Tensor, grid: tuple[int, int], inside: Tensor) -> Tensor:
    """Mean square over channels of x (B, C, h, w) on a grid, 0 outside (B, 1, *grid), as a unit vector of cells: (B, cells)."""
    return F.normalize((resampled(x.float().square().mean(1, keepdim=True), grid) * inside).flatten(1), dim=1)


class AttentionTransfer(Objective):
    """Q / |Q|, Q the sum over channels of F^2 in every cell: |q_s - q_t|_2 (eq. 2), or the mean square of the difference (the authors' code). Sum over
    pairs, as in the paper.

    Args:
        form: paper (the norm), or code (the mean square, smaller by the number of cells).
    """

    name, family, paper = "attention_transfer", "attention", "Paying More Attention to Attention (arXiv 1612.03928)"
    needs = frozenset({"feats"})
    default_taps = "stages"

    def __init__(self, form: str = "paper") -> None:
        super().__init__()
        if form not in FORMS:
            raise UsageError(f"objective 'attention_transfer' knows no form '{form}'", where="options", hint=f"forms: {', '.join(FORMS)}")
        self.form = form

    def bind(self, setup: Setup) -> None:
        """Maps of any width; the energies are compared on the coarser grid."""
        self.pairs = pairs_of(setup, self.name)

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """feats (B, C, h, w) of both -> (B,)."""
        found = []
        for ours, theirs, pair in zip(student.feats, teacher.feats, self.pairs, strict=True):
            inside = photo(context.valid, pair.grid)
            apart = energy(ours, pair.grid, inside) - energy(theirs[:, : pair.theirs[0]], pair.grid, inside)
            found.append(torch.linalg.vector_norm(apart, dim=1) if self.form == "paper" else apart.square().sum(1) / inside.sum((1, 2, 3)))
        return torch.stack(found).sum(0)


objective = AttentionTransfer
