"""Differentiable quantization: the few values that a layer's weights may have are themselves trained.

Polino, Pascanu, Alistarh, "Model compression via distillation and quantization" (arXiv 1802.05668, section 4): every weight is replaced by the nearest of
2^bits points, and the gradient of a point is the sum of those of its weights. The points need not be equally far apart: they start where k-means puts
them, and go where the distillation loss is least.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from edgekd.distillation.controllers._weights import chosen_layers, put, take
from edgekd.distillation.outputs import Setup
from edgekd.distillation.points import Controller
from edgekd.errors import UsageError

ROUNDS = 20
"""Of k-means; in one dimension it has settled by then."""


class QuantizationPoints(Controller):
    """The weights of every layer become a palette of 2^bits values of its own, which is trained; which value a weight has follows from the weight as it
    was. Biases and norms train as they do.

    Formats with palettes (`w4_weight_only` of Core ML) hold such weights exactly, others as floats. Activations stay in float.

    Args:
        bits: of a weight, 1 to 8: a palette has 2^bits values.
        skip: paths of modules of the student that stay as they are, with all below them, or patterns of paths.
    """

    name, family = "quantization_points", "quantization_aware"
    paper = "Model compression via distillation and quantization, section 4 (arXiv 1802.05668)"

    settled: Tensor

    def __init__(self, bits: int = 4, skip: list[str] | None = None) -> None:
        super().__init__()
        if not 1 <= bits <= 8:
            raise UsageError(f"quantization_points takes 1 to 8 bits, not bits={bits}")
        self.bits, self.skip = bits, skip or []
        self.palettes = nn.ModuleList()
        self.register_buffer("settled", torch.tensor(False))
        self._held: tuple[list[nn.Module]] = ([],)
        self._undo: list[Any] = []

    def begin(self, setup: Setup) -> None:
        """Put the palettes into the student.

        Raises:
            UsageError: nothing that the stage trains has weights, or `skip` names no module.
        """
        chosen: list[Any] = list(chosen_layers(setup.student, self.skip, setup.where, self.name).values())
        self._held = (chosen,)
        for module in chosen:
            self.palettes.append(Palette(module.weight, self.bits))
            self._undo += put(module, "weight", Chosen(self.palettes[-1]))  # type: ignore[arg-type]

    def finish(self) -> None:
        """Leave the values of the palettes as the weights; of a stage that was finished before, those that it left."""
        (chosen,) = self._held
        for undo in self._undo:
            undo.remove()
        for module in chosen:
            take(module, "weight", keep=not bool(self.settled))
        self._undo, self._held = [], ([],)
        self.settled.fill_(True)


class Palette(nn.Module):
    """The points of one layer, in units of what its weights deviate by: palettes of all sizes then learn alike."""

    unit: Tensor

    def __init__(self, weight: Tensor, bits: int) -> None:
        super().__init__()
        self.register_buffer("unit", weight.detach().float().std(correction=0).clamp(min=1e-12))
        self.points = nn.Parameter(k_means(weight.detach().float().flatten() / self.unit, 2**bits))

    def forward(self, weight: Tensor) -> Tensor:
        """weight -> the nearest point of each, of the same shape. The gradient reaches the points only."""
        points = self.points.sort().values
        between = (points[1:] + points[:-1]).detach() / 2
        return points[torch.bucketize(weight.detach().float() / self.unit, between)] * self.unit


class Chosen(nn.Module):
    """A weight at the points of a palette that is kept elsewhere; a parametrization."""

    def __init__(self, palette: Palette) -> None:
        super().__init__()
        self._palette = (palette,)

    def forward(self, weight: Tensor) -> Tensor:
        """weight -> the same shape."""
        return self._palette[0](weight).to(weight.dtype)  # type: ignore[no-any-return]


def k_means(values: Tensor, count: int) -> Tensor:
    """values (N,) -> (count,) points, each the mean of the values that are nearest to it; they start at the quantiles."""
    ordered = values.sort().values
    points = ordered[((torch.arange(count) + 0.5) / count * len(ordered)).long().clamp(max=len(ordered) - 1)]
    for _ in range(ROUNDS):
        nearest = torch.bucketize(ordered, (points[1:] + points[:-1]) / 2)
        total = torch.zeros(count).index_add_(0, nearest, ordered)
        members = torch.zeros(count).index_add_(0, nearest, torch.ones_like(ordered))
        points = torch.where(members > 0, total / members.clamp(min=1), points)
    return points


controller = QuantizationPoints
