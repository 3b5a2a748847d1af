"""Distiller's MI-alpha: the student's features should tell which photo the teacher looked at (He et al., arXiv 2109.11105).

A lower bound of the mutual information between the two networks' features, between the bound of NWJ (alpha 0: no bias, much variance) and
InfoNCE (alpha 1: at most the logarithm of the batch); Poole et al., arXiv 1905.06922, whose I_alpha this is.
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.distillation.points import Objective
from edgekd.distillation.projectors import maps, pairs_of, photo_mean
from edgekd.errors import UsageError


def mi_alpha(scores: Tensor, baseline: Tensor, alpha: float) -> Tensor:
    """log(B / alpha) - log r_jj + r_j of every photo, (B,), which is a constant minus its part of I_alpha, and never below 0.

    r_ij = e^f_ij / (alpha m_j + (1 - alpha) e^a_j): scores f (B, B) of student i with teacher j, baseline a (B,) of teacher j. m_j is the mean of e^f_ij
    over i; in r_j, the mean of r_ij over i other than j, it is their mean alone, as these are drawn without j.
    """
    batch = len(scores)
    floor = baseline + math.log1p(-alpha) if alpha < 1 else torch.full_like(baseline, -torch.inf)

    def below(logs: Tensor) -> Tensor:
        return torch.logaddexp(logs + math.log(alpha), floor)

    every = scores.logsumexp(0) - math.log(batch)
    others = scores.masked_fill(torch.eye(batch, dtype=torch.bool, device=scores.device), -torch.inf).logsumexp(0) - math.log(batch - 1)
    return math.log(batch / alpha) - (scores.diagonal() - below(every)) + (others - below(others)).exp()


class Distiller(Objective):
    """log(B / alpha) - I_alpha, photo by photo: the critic f is the cosine of both means through linear layers, over a temperature; mean over pairs.

    Args:
        alpha: between 0 (not included) and 1.
        temperature: of the critic.
        width: in which both are compared.
    """

    name, family, paper = "distiller", "feature", "Distiller: A Systematic Study of Model Distillation Methods (arXiv 2109.11105)"
    needs = frozenset({"feats"})
    default_taps = "embedding"
    least_at_teacher = False
    min_batch = 2

    def __init__(self, alpha: float = 0.9, temperature: float = 0.1, width: int = 64) -> None:
        super().__init__()
        if not 0 < alpha <= 1:
            raise UsageError(f"objective 'distiller' takes an alpha above 0 and at most 1, not {alpha:g}", where="options", hint="alpha: 0.9")
        self.alpha, self.temperature, self.width = alpha, temperature, width

    def bind(self, setup: Setup) -> None:
        """Two linear layers and a baseline a pair."""
        self.pairs = pairs_of(setup, self.name)
        self.ours = nn.ModuleList(nn.Linear(p.ours[0], self.width) for p in self.pairs)
        self.theirs = nn.ModuleList(nn.Linear(p.theirs[0], self.width) for p in self.pairs)
        self.baselines = nn.ModuleList(nn.Linear(self.width, 1) for _ in self.pairs)

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """feats (B, C, h, w) of both -> (B,)."""
        found = []
        for i, (ours, theirs) in enumerate(maps(student, teacher, self.pairs)):
            a = F.normalize(self.ours[i](photo_mean(ours, context.valid)).float(), dim=1)
            b = F.normalize(self.theirs[i](photo_mean(theirs, context.valid)).float(), dim=1)
            found.append(mi_alpha(a @ b.T / self.temperature, self.baselines[i](b).float().squeeze(1), self.alpha))
        return torch.stack(found).mean(0)


objective = Distiller
