"""Weights set by gradients: every objective pulls on the student with a chosen share of the strength of one that is the measure
(Gradient-guided Adaptive Modulation, RT-DETRv4, arXiv 2510.25257)."""
from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from edgekd.distillation.distributed import current
from edgekd.distillation.outputs import Context, Setup
from edgekd.distillation.points import Controller
from edgekd.distillation.weighing import check_whole, gradient, known_objective, several_objectives, shared_parameter
from edgekd.errors import UsageError


class GradientNorm(Controller):
    """With n_i the smoothed norm of objective i's gradient at a shared weight, p = w_i n_i / (w_i n_i + n_ref) is its share beside the reference. Where
    p leaves [share - band, share + band], w_i <- w_i x share (1 - p) / (p (1 - share)), so that p becomes `share`. The reference keeps weight 1.

    As the paper does, the weight is moved by odds when the share leaves its band. Simplified: the paper takes the share of one encoder module in
    the L1 norm of all gradients of an epoch, for one distillation loss; here it is the L2 norm at one weight, for every objective by itself, and
    smoothed over steps. The recipe's weights are where the weights start; from the first update on only the share counts.

    Args:
        reference: the objective that is the measure; none: the stage's first.
        share: of an objective's gradient beside the reference's, 0..1; 0.5 is equal strength.
        band: how far a share may be off before its weight is moved.
        momentum: what the norms keep of themselves from step to step.
        every: batches between two looks at the gradients; each costs a pass from the losses to that weight for every objective.
        at: path of the shared weight; none: the last trainable matrix of the encoder.
    """

    name, family, paper = "gradient_norm", "adaptive_weighting", "RT-DETRv4: GAM (arXiv 2510.25257)"
    norms: Tensor
    weights: Tensor
    looks: Tensor

    def __init__(self, reference: str = "", share: float = 0.5, band: float = 0.0, momentum: float = 0.9, every: int = 1, at: str = "") -> None:
        super().__init__()
        if not 0 < share < 1 or not 0 <= band < min(share, 1 - share):
            raise UsageError(f"gradient_norm: share is between 0 and 1 with room for the band, not {share} and {band}", hint="share: 0.5, band: 0.1")
        self.reference, self.share, self.band, self.momentum, self.every, self.at = reference, share, band, momentum, max(1, every), at

    def begin(self, setup: Setup) -> None:
        """A norm and a weight for each objective."""
        self.names = several_objectives(setup.stage, self.name)
        self.reference = known_objective(self.reference, setup.stage, self.name) if self.reference else self.names[0]
        check_whole(self.name)
        self._held = (setup.student,)
        shared_parameter(setup.student, self.at)
        self.register_buffer("norms", torch.zeros(len(self.names)))
        self.register_buffer("weights", torch.ones(len(self.names)))
        self.register_buffer("looks", torch.tensor(0))

    def weigh(self, losses: Mapping[str, Tensor], context: Context) -> dict[str, Tensor]:
        """losses (B,) of each objective -> the same, weighted."""
        if int(self.looks) % self.every == 0:
            at = shared_parameter(self._held[0], self.at)
            norms = torch.stack([gradient(losses[n].mean(), at).norm() for n in self.names])
            self.update(current().mean(norms).to(self.norms))
        self.looks += 1
        return {n: loss * self.weights[self.names.index(n)] for n, loss in losses.items()}

    @torch.no_grad()
    def update(self, norms: Tensor) -> None:
        """Take in the norms (objectives,) of a batch and move the weights; norms that are not finite are left out, as their step will be."""
        if not torch.isfinite(norms).all():
            return
        keep = 0.0 if int(self.looks) == 0 else self.momentum
        self.norms.mul_(keep).add_(norms, alpha=1 - keep)
        reference = self.norms[self.names.index(self.reference)]
        for i, name in enumerate(self.names):
            pull = self.weights[i] * self.norms[i]
            if name == self.reference or pull <= 0 or reference <= 0:
                continue
            p = pull / (pull + reference)
            if (p - self.share).abs() > self.band:
                self.weights[i] *= self.share * (1 - p) / (p * (1 - self.share))


controller = GradientNorm
