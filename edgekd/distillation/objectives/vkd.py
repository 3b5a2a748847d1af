"""V_kD: an orthogonal projector, which can only turn the student's features, and a teacher that is normalised first (Miles et al., arXiv 2403.06213).

A free projector can learn the teacher's detail in place of the student. One with orthonormal columns keeps all inner products of the
student's features, so what is left to reduce is the student's own. The teacher is standardised for tasks that discriminate, and
whitened for tasks that generate, where collapsing on few directions would hurt.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from edgekd.distillation.losses import over_photo
from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.distillation.points import Objective
from edgekd.distillation.projectors import maps, pairs_of, photo
from edgekd.errors import UsageError

TARGETS = ("standardise", "whiten", "none")


def standardise(theirs: Tensor) -> Tensor:
    """Channels of every cell to mean 0 and variance 1: (B, D, h, w) -> the same (the authors' layer norm without weights)."""
    return F.layer_norm(theirs.movedim(1, -1), theirs.shape[1:2]).movedim(-1, 1)


def whiten(theirs: Tensor, inside: Tensor, eps: float = 1e-4) -> Tensor:
    """Channels uncorrelated and of variance 1 over the cells inside (B, 1, h, w) of the batch: (B, D, h, w) -> the same (ZCA)."""
    cells = theirs.movedim(1, -1)[inside[:, 0] > 0]
    mean = cells.mean(0)
    covariance = (cells - mean).T @ (cells - mean) / len(cells)
    values, vectors = torch.linalg.eigh(covariance + eps * covariance.diagonal().mean() * torch.eye(len(covariance), device=cells.device))
    turn = vectors * values.clamp(min=1e-12).rsqrt() @ vectors.T
    return ((theirs.movedim(1, -1) - mean) @ turn).movedim(-1, 1)


class VKD(Objective):
    """Smooth L1 between the student's features through an orthogonal projector P (P^T P = 1) and the normalised teacher's; mean over cells, pairs.

    Args:
        target: what is done to the teacher: standardise, whiten, or none.
    """

    name, family, paper = "vkd", "feature", "V_kD: Improving Knowledge Distillation using Orthogonal Projections (arXiv 2403.06213)"
    needs = frozenset({"feats"})
    default_taps = "embedding"
    least_at_teacher = False

    def __init__(self, target: str = "standardise") -> None:
        super().__init__()
        if target not in TARGETS:
            raise UsageError(f"objective 'vkd' knows no target '{target}'", where="options", hint=f"targets: {', '.join(TARGETS)}")
        self.target = target

    def bind(self, setup: Setup) -> None:
        """A projector a pair, orthogonal from the start and after every step by its parametrisation."""
        self.pairs = pairs_of(setup, self.name)
        # by matrix exponentials, as in the paper; torch's default for matrices that are not square (2.13, householder) collapses to 0 in training
        self.projectors = nn.ModuleList(orthogonal(nn.Linear(p.ours[0], p.theirs[0], bias=False), orthogonal_map="matrix_exp") for p in self.pairs)

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """feats (B, C, h, w) of both -> (B,)."""
        found = []
        with torch.autocast(context.valid.device.type, enabled=False):  # bf16 would not be orthogonal any more
            for project, (ours, theirs) in zip(self.projectors, maps(student, teacher, self.pairs), strict=True):
                if self.target == "standardise":
                    theirs = standardise(theirs)
                elif self.target == "whiten":
                    theirs = whiten(theirs, photo(context.valid, theirs.shape[-2:]))
                turned = project(ours.movedim(1, -1)).movedim(-1, 1)
                found.append(over_photo(F.smooth_l1_loss(turned, theirs, reduction="none"), context.valid))
        return torch.stack(found).mean(0)


objective = VKD
