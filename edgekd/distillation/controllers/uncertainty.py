"""Weights that are trained: each objective has an uncertainty of its own (Kendall et al., arXiv 1705.07115; positive form arXiv 1805.06334)."""
from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.distillation.outputs import Context, Setup
from edgekd.distillation.points import Controller
from edgekd.distillation.weighing import several_objectives


class Uncertainty(Controller):
    """sum_i L_i / (2 s_i^2) + log(1 + s_i^2) with trained s_i^2 (arXiv 1805.06334); with `positive: false` Kendall's log s_i in place of the logarithm,
    whose sum falls below 0 once losses are small. The recipe's weights are inside L_i.

    Args:
        positive: keep the sum above 0.
        start: s_i^2 of all objectives at the beginning; 0.5 starts with weights of 1.
    """

    name, family, paper = "uncertainty", "adaptive_weighting", "Multi-Task Learning Using Uncertainty (arXiv 1705.07115), Auxiliary Tasks (arXiv 1805.06334)"

    def __init__(self, positive: bool = True, start: float = 0.5) -> None:
        super().__init__()
        self.positive, self.start = positive, start

    def begin(self, setup: Setup) -> None:
        """A trained logarithm of s^2 for each objective: a vector, so that weight decay spares it."""
        self.names = several_objectives(setup.stage, self.name)
        self.log_variance = nn.Parameter(torch.full((len(self.names),), self.start).log())

    def weigh(self, losses: Mapping[str, Tensor], context: Context) -> dict[str, Tensor]:
        """losses (B,) of each objective -> the same, weighted, each with its own penalty."""
        found = {}
        for name, loss in losses.items():
            s = self.log_variance[self.names.index(name)].float()
            found[name] = loss * (-s).exp() / 2 + (F.softplus(s) if self.positive else s / 2)
        return found


controller = Uncertainty
