"""Rounding as integer kernels do it, computed in float: what sensitivity is found with and quantization-aware training trains through.

A quantized layer is a convolution or linear layer whose input, weight and output lie on grids: 2^8 levels between two ends for activations, one range
a tensor; 2^bits - 1 levels around 0 for weights, one step an output channel; its bias is rounded to input step x weight step. That is where the QDQ
pairs of ONNX, LiteRT and ExecuTorch stand. What follows a layer (activation, normalisation, sums, softmax) is computed in float there, and here.

`simulated` adds up whole numbers and scales the sum once, as kernels do (QLinearConv of onnxruntime, bit by bit): float arithmetic on rounded values
differs from that in the seventh digit, which moves one value in 10^5 to the next level, and a deep network makes of one such value as much noise as
rounding as a whole (repvit_s, encoder: 3 % of the embedding against 0.00001 %).
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from edgekd.tuning import Grid, layer_name

LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


def layers(module: nn.Module) -> dict[str, nn.Module]:
    """Layer name -> module, of everything that can be quantized."""
    return {layer_name(path): m for path, m in module.named_modules() if isinstance(m, LAYERS)}


def grids_of(module: nn.Module) -> dict[str, Grid]:
    """Layer name -> the ranges that were trained for it (its attribute `grid`)."""
    found = {name: getattr(m, "grid", None) for name, m in layers(module).items()}
    return {name: grid for name, grid in found.items() if isinstance(grid, Grid)}


def forget(module: nn.Module) -> None:
    """Take trained ranges away: the weights below `module` are about to leave their grid."""
    for layer in layers(module).values():
        for name in ("grid", "weight_bits"):
            layer.__dict__.pop(name, None)


def rounded(weight: Tensor, bits: int, axis: int | None = 0) -> Tensor:
    """weight rounded to 2^bits - 1 levels around 0, symmetric, with a step for every index of `axis` (None: one for all).

    The step is max|w| / (2^(bits-1) - 1) at 8 bits, which is what exporters write; below, where one large weight would cost all others their levels,
    at most LSQ's 2 mean|w| / sqrt(2^(bits-1) - 1) (arXiv 1902.08153).
    """
    most, step = 2 ** (bits - 1) - 1, step_of(weight, bits, axis)
    return ((weight.float() / step).round().clamp(-most, most) * step).to(weight.dtype)


def step_of(weight: Tensor, bits: int, axis: int | None = 0) -> Tensor:
    """The step of each index of `axis`, in a shape that broadcasts over the weight."""
    most = 2 ** (bits - 1) - 1
    other = tuple(i for i in range(weight.ndim) if i != axis)
    size = weight.detach().float().abs()
    step = size.amax(other, keepdim=True) / most
    if bits < 8:
        step = torch.minimum(step, 2 * size.mean(other, keepdim=True) / most**0.5)
    return step.clamp(min=1e-12)


def output_axis(module: nn.Module) -> int:
    """The axis of a layer's weight that is its output channels."""
    return 1 if isinstance(module, nn.ConvTranspose2d) else 0


def contained(weight: Tensor, bits: int, axis: int | None = 0) -> Tensor:
    """weight rounded to 2^bits - 1 levels, and these to the 255 of an 8-bit container whose step is max|w| / 127: what is left is in every format that
    writes 8 bits what it is here, and rounding it again changes nothing. A level moves by at most 1/254 of the largest."""
    return rounded(weight if bits == 8 else rounded(weight, bits, axis), 8, axis)


def leveled(x: Tensor, ends: Tensor, steps: int) -> Tensor:
    """x at the nearest of steps + 1 levels from ends[0] to ends[1] (2,), 0 being one of them. The gradient passes inside the ends. An end is moved by
    what lies beyond it (PACT, arXiv 1805.06085), and by what rounding to steps of another width would change (LSQ, arXiv 1902.08153)."""
    return _Leveled.apply(x, ends, steps)  # type: ignore[no-untyped-call, no-any-return]


def spread(ends: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The distance of two levels, and the number of the level that is 0."""
    low, high = ends[0].clamp(max=0.0), ends[1].clamp(min=0.0)
    step = ((high - low) / steps).clamp(min=1e-8)
    return step, (-low / step).round()


class _Leveled(torch.autograd.Function):
    """One pass forwards and one backwards; in steps, autograd would keep six maps of every layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ends: Tensor, steps: int) -> Tensor:
        ctx.save_for_backward(x, ends)
        ctx.steps = steps
        step, zero = spread(ends.float(), steps)
        return ((x.float() / step).round_().clamp_(-zero, steps - zero) * step).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (x, ends), steps, given = ctx.saved_tensors, ctx.steps, grads[0].float()
        step, zero = spread(ends.float(), steps)
        level = x.float() / step
        below, above = level < ends[0].clamp(max=0.0) / step, level > ends[1].clamp(min=0.0) / step
        inside = given.masked_fill(below | above, 0.0)
        wider = ((level.round().clamp_(-zero, steps - zero) - level) * inside).sum() / steps
        moved = torch.stack([given[below].sum() - wider, given[above].sum() + wider])
        return inside.to(x.dtype), moved.to(ends.dtype), None


def activation_step(ends: tuple[float, float], bits: int = 8) -> float:
    """The distance of two levels between these ends."""
    return max((max(ends[1], 0.0) - min(ends[0], 0.0)) / (2**bits - 1), 1e-8)


@contextmanager
def simulated(module: nn.Module, grids: Mapping[str, Grid] | None = None, *, bits: int = 8, axis: bool = True, activations: int = 8) -> Iterator[None]:
    """While it lasts, the named layers of `module` compute as integer kernels would; nothing stays behind.

    Args:
        grids: layer name -> its ranges; None: those that were trained (`grids_of`), whose weights lie on their grid already or are put there.
        bits: of the weights.
        axis: a step for every output channel; False: one for the whole weight.
        activations: bits of the activations.
    """
    chosen, known = grids_of(module) if grids is None else grids, layers(module)
    kernels = [_Kernel(known[name], grid, bits, axis, 2**activations - 1) for name, grid in chosen.items()]
    try:
        yield
    finally:
        for kernel in kernels:
            kernel.end()


class _Kernel:
    """A layer on integers while it lasts. Between calls it has its rounded weight, for what reads that without calling it."""

    def __init__(self, layer: Any, grid: Grid, bits: int, axis: bool, levels: int) -> None:
        self.layer, self.grid, self.levels = layer, grid, levels
        self.before = layer.weight.data, None if layer.bias is None else layer.bias.data
        along, weight = output_axis(layer) if axis else None, layer.weight.data.float()
        step, channels = step_of(weight, bits, along), weight.shape[output_axis(layer)] * getattr(layer, "groups", 1) ** (output_axis(layer) == 1)
        self.steps = step.flatten() if step.numel() == channels else step.flatten().repeat(channels // step.numel())
        whole, most = (weight / step).round(), 2 ** (bits - 1) - 1
        self.whole = whole.clamp_(-most, most)
        self.rounded, self.bias = (self.whole * step).to(layer.weight.dtype), self.before[1]
        self.into, self.out = (None if ends is None else spread(torch.tensor(ends, device=weight.device), levels) for ends in (grid.input, grid.output))
        if self.into is not None and self.bias is not None:
            self.bias = (self.bias.float() / (self.into[0] * self.steps)).round()
        self.hooks = [layer.register_forward_pre_hook(self.begin), layer.register_forward_hook(self.finish)]
        self.rest()

    def rest(self) -> None:
        """Leave the layer as it is between calls."""
        self.layer.weight.data = self.rounded
        if self.bias is not None:
            self.layer.bias.data = self.before[1] if self.into is None else (self.bias * self.into[0] * self.steps).to(self.rounded.dtype)

    def begin(self, _: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The input as whole numbers, 0 where it is 0."""
        if self.into is None:
            return None
        step, zero = self.into
        self.layer.weight.data = self.whole
        if self.bias is not None:
            self.layer.bias.data = self.bias
        return ((given[0].float() / step).round().clamp(-zero, self.levels - zero), *given[1:])

    def finish(self, _: nn.Module, given: tuple[Any, ...], found: Tensor) -> Tensor:
        """The sums at the levels of the output."""
        if self.into is not None:
            self.rest()
            unit = self.into[0] * self.steps if self.out is None else self.into[0] * self.steps / self.out[0]
            found = found * (unit if isinstance(self.layer, nn.Linear) else unit.view(-1, *[1] * (found.ndim - 2)))
        elif self.out is not None:
            found = found / self.out[0]
        if self.out is None:
            return found
        step, zero = self.out
        return found.round().clamp(-zero, self.levels - zero) * step

    def end(self) -> None:
        """Give the layer back as it was."""
        for hook in self.hooks:
            hook.remove()
        self.layer.weight.data = self.before[0]
        if self.before[1] is not None:
            self.layer.bias.data = self.before[1]


@torch.no_grad()
def observed(module: nn.Module, runs: Iterable[Any], run: Any) -> dict[str, Grid]:
    """Least and largest value of every layer's input and output over `run(one)` for each of `runs`: layer name -> its min-max grid."""
    ends: dict[str, list[float]] = {}
    hooks = []
    for name, layer in layers(module).items():
        def see(_: nn.Module, given: tuple[Any, ...], found: Tensor, name: str = name) -> None:
            low, high = given[0].aminmax()
            least, most = found.aminmax()
            now, old = [float(low), float(high), float(least), float(most)], ends.get(name, [0.0] * 4)
            ends[name] = [min(a, b) if i % 2 == 0 else max(a, b) for i, (a, b) in enumerate(zip(now, old, strict=True))]

        hooks.append(layer.register_forward_hook(see))
    try:
        for one in runs:
            run(one)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: Grid((e[0], e[1]), (e[2], e[3])) for name, e in ends.items()}
