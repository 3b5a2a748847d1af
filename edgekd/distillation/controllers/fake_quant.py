"""Quantization-aware distillation: the student trains with the rounding of integer kernels in its forward pass, and ends with weights on the grid and
with the ranges of its activations.

Polino, Pascanu, Alistarh, "Model compression via distillation and quantization" (arXiv 1802.05668): distil a student whose weights are
quantized in every forward pass while the gradient reaches the float ones straight through. Activations are clipped to learned ranges, as in
PACT (arXiv 1805.06085), and the steps of weights below 8 bits learn as in LSQ (arXiv 1902.08153).
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from edgekd.distillation import taps
from edgekd.distillation.controllers._weights import chosen_layers, put, take
from edgekd.distillation.distributed import current
from edgekd.distillation.outputs import Setup
from edgekd.distillation.points import Controller
from edgekd.errors import UsageError
from edgekd.models import tying
from edgekd.models.rounding import contained, leveled, output_axis, rounded, spread, step_of
from edgekd.tuning import Grid

SETTLED_BATCHES = 4
"""Batches whose extremes the ranges take in before they are left to the gradient."""


class FakeQuant(Controller):
    """Rounds what `edgekd.models.rounding` rounds, in every layer that the stage trains: weights for every output channel, biases, and what goes into
    a layer and comes out of it, to levels between two ends that start at the extremes of a few batches and then learn. Gradients pass as if nothing was
    rounded. A tensor that leaves one layer and enters the next has one range (`edgekd.models.tying`).

    The step of a channel is max|w| / 127 at 8 bits, which is what exporters write. Below it is learned, and starts where the squared error is
    least; the levels then lie in the 8-bit container in which they are exported (`rounding.contained`), which changes nothing more.

    While the stage trains, its state and averages hold the float weights under their plain names. At its end the rounded weights take their
    place, and the layers carry their ranges (`grid`): checkpoint and `w8a8_qat` or `w4a8_qat` exports are what was trained. That holds for a
    student that is folded (`edgekd distill` sees to it): folding after training makes new weights. Decoders and box proposers stay in float.

    Args:
        bits: of the weights, 2 to 8.
        activations: bits of the activations; 0 leaves them in float (weight-only schemes). Only those of 8 bits can be exported.
        skip: paths of modules of the student that stay in float, with all below them, or patterns of paths (`encoder.neck.*`).
    """

    name, family = "fake_quant", "quantization_aware"
    paper = "Model compression via distillation and quantization (arXiv 1802.05668)"

    settled: Tensor

    def __init__(self, bits: int = 8, activations: int = 8, skip: list[str] | None = None) -> None:
        super().__init__()
        if not 2 <= bits <= 8 or not (activations == 0 or 2 <= activations <= 8):
            raise UsageError(f"fake_quant takes 2 to 8 bits, and 0 or 2 to 8 for activations, not bits={bits}, activations={activations}")
        self.bits, self.activations, self.skip = bits, activations, skip or []
        self.ranges, self.steps = nn.ModuleList(), nn.ModuleList()
        self.register_buffer("settled", torch.tensor(False))
        self._held: tuple[dict[str, nn.Module]] = ({},)
        self._places: dict[tying.Place, int] = {}
        self._undo: list[Any] = []

    def begin(self, setup: Setup) -> None:
        """Put the rounding into the student.

        Raises:
            UsageError: nothing that the stage trains has weights to round, or `skip` names no module.
        """
        student: Any = setup.student
        assert setup.context.images is not None
        images, chosen = setup.context.images[:1], chosen_layers(student, self.skip, setup.where, self.name)
        groups = tying.ranges(student, lambda: taps.outputs(student, images))
        called = {name for group in groups for name, _ in group.places}
        called -= tying.cells(student, lambda: taps.outputs(student, images))  # a level more in one of them is a level more in a whole channel
        chosen = {path: m for path, m in chosen.items() if path in called}  # others lend their weight to a function that rounds nothing
        self._held = (chosen,)
        for group in groups if self.activations else ():
            places = [place for place in group.places if place[0] in chosen]
            if places:
                self._places.update(dict.fromkeys(places, len(self.ranges)))
                self.ranges.append(Range(self.activations, group.rectified, _calls(places)))
        for path, module in chosen.items():
            self._round(path, module)

    def _round(self, path: str, module: Any) -> None:
        axis = output_axis(module)
        step = Step(module.weight, self.bits, axis) if self.bits < 8 else None
        if step is not None:
            self.steps.append(step)
        weight = Rounded(self.bits, axis, step)
        self._undo += put(module, "weight", weight)
        if not self.activations:
            return
        into, out = self._places[path, "input"], self._places[path, "output"]
        if module.bias is not None:
            self._undo += put(module, "bias", RoundedBias(weight, self.ranges[into]))  # type: ignore[arg-type]
        if not any(self._places.get((p, "output")) == into for p in self._held[0]):  # else it is rounded where it comes from
            self._undo.append(module.register_forward_pre_hook(Before(self.ranges[into])))
        self._undo.append(module.register_forward_hook(After(self.ranges[out])))

    def finish(self) -> None:
        """Take the rounding out again. The rounded weights and the ranges stay; of a stage that was finished before, those that it left."""
        (chosen,) = self._held
        for undo in self._undo:
            undo.remove()
        ends = [one.grid() for one in self.ranges]  # type: ignore[operator]
        for path, module in chosen.items():
            for name in ("weight", "bias") if self.activations and module.bias is not None else ("weight",):
                take(module, name, keep=not bool(self.settled))
            if self.activations == 8:
                layer: Any = module
                layer.grid = Grid(ends[self._places[path, "input"]], ends[self._places[path, "output"]])
                layer.weight_bits = self.bits
        self._undo, self._held = [], ({},)
        self.settled.fill_(True)


class Step(nn.Module):
    """The learned step of every output channel of one weight, as a multiple of the one it starts with: steps of all sizes then learn alike."""

    first: Tensor

    def __init__(self, weight: Tensor, bits: int, axis: int) -> None:
        super().__init__()
        self.most = 2 ** (bits - 1) - 1
        self.register_buffer("first", best_step(weight, bits, axis))
        self.stretch = nn.Parameter(torch.ones(weight.shape[axis]))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight at its levels. The gradient reaches it within the outermost levels, and the step as in LSQ."""
        each = weight.numel() // self.stretch.numel()
        step = self.first * _scaled(self.stretch.clamp(min=0.05), (each * self.most) ** -0.5).view(self.first.shape)
        place = (weight.float() / step).clamp(-self.most, self.most)
        return (place + (place.round() - place).detach()) * step


class Rounded(nn.Module):
    """A weight as it is after rounding; a parametrization, without a state of its own."""

    def __init__(self, bits: int, axis: int = 0, step: Step | None = None) -> None:
        super().__init__()
        self.bits, self.axis, self._step = bits, axis, (step,)  # in a tuple: its state is the controller's
        self.unit: Tensor | None = None
        """The step of the container of every channel, as of the last time."""

    def forward(self, weight: Tensor) -> Tensor:
        """weight -> the same shape, each channel on a grid of its own."""
        (step,) = self._step
        near = weight if step is None else step(weight)
        found = contained(weight.detach(), self.bits, self.axis) if step is None else rounded(near.detach(), 8, self.axis)
        self.unit = step_of(found, 8, self.axis).flatten()
        return near + (found - near).detach()


class RoundedBias(nn.Module):
    """A bias as an integer kernel adds it: in steps of input x weight."""

    def __init__(self, weight: Rounded, into: Range) -> None:
        super().__init__()
        self._of = (weight, into)

    def forward(self, bias: Tensor) -> Tensor:
        """(O,) -> (O,)."""
        weight, into = self._of
        if weight.unit is None or weight.unit.shape != bias.shape:  # a transposed convolution in groups has fewer steps than channels
            return bias
        step = weight.unit * spread(into.ends.detach(), into.levels)[0]
        return bias + ((bias.detach() / step).round() * step - bias).detach()


class Range(nn.Module):
    """Rounds tensors to levels between two ends. They start at the extremes of the first batches and learn as multiples of what these were."""

    first: Tensor
    seen: Tensor

    def __init__(self, bits: int, rectified: bool = False, calls: int = 1) -> None:
        super().__init__()
        self.levels, self.rectified, self.settling = 2**bits - 1, rectified, SETTLED_BATCHES * calls
        self.register_buffer("first", torch.zeros(2))
        self.register_buffer("seen", torch.tensor(0))
        self.stretch = nn.Parameter(torch.ones(2))

    @property
    def ends(self) -> Tensor:
        """(2,): low <= 0 <= high."""
        return self.first * self.stretch.clamp(min=0.05)

    def forward(self, x: Tensor) -> Tensor:
        """x at its levels, in float32: bf16 does not hold them."""
        if int(self.seen) < self.settling:
            with torch.no_grad():
                low, high = current().mean(torch.stack(x.detach().aminmax()).float().to(self.first.device))
                low = self.first[0] if self.rectified else torch.minimum(self.first[0], low)
                self.first = torch.stack([low, torch.maximum(self.first[1], high)])  # not in place: the last call's gradient needs the old one
                self.seen += 1
        return leveled(x.float(), self.first * _scaled(self.stretch.clamp(min=0.05), x.numel() ** -0.5), self.levels)

    def grid(self) -> tuple[float, float]:
        """The ends as they are exported, both a level."""
        step, zero = spread(self.ends.detach(), self.levels)
        return float(-zero * step), float((self.levels - zero) * step)


class Before:
    """A hook that rounds what goes into a layer."""

    def __init__(self, how: nn.Module) -> None:
        self.how = how

    def __call__(self, _: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.how(given[0]), *given[1:])


class After(Before):
    """A hook that rounds what comes out of a layer."""

    def __call__(self, _: nn.Module, __: tuple[Any, ...], found: Any = None) -> Any:  # type: ignore[override]
        return self.how(found)


def _calls(places: list[tying.Place]) -> int:
    """How often a range is asked in a forward pass: where it comes from, or everywhere it goes to."""
    ends = [end for _, end in places]
    return ends.count("output") or len(ends)


def _scaled(x: Tensor, scale: float) -> Tensor:
    """x, with its gradient times `scale`: what a whole map says about one number would drown the gradients of weights."""
    return x * scale + (x * (1 - scale)).detach()


def best_step(weight: Tensor, bits: int, axis: int) -> Tensor:
    """The step of every channel that rounds with the least squared error, of 30 between a fifth of max|w| / levels and all of it."""
    weight, most = weight.detach().float(), 2 ** (bits - 1) - 1
    other = tuple(i for i in range(weight.ndim) if i != axis)
    widest = (weight.abs().amax(other, keepdim=True) / most).clamp(min=1e-12)
    best, least = widest, torch.full_like(widest, torch.inf)
    for share in torch.linspace(0.2, 1.0, 30).tolist():
        step = widest * share
        error = ((weight / step).round().clamp(-most, most) * step - weight).square().sum(other, keepdim=True)
        best, least = torch.where(error < least, step, best), torch.minimum(error, least)
    return best


controller = FakeQuant
