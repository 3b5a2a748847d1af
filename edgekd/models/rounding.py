"""Rounding as integer kernels do it, computed in float: what sensitivity is found with and quantization-aware training trains through.

A quantized layer is a convolution or linear layer whose input, weight and output lie on grids: 2^8 levels between two ends for activations, one range
a tensor; 2^bits - 1 levels around 0 for weights, one step an output channel; its bias is rounded to input step x weight step. That is where the QDQ
pairs of ONNX, LiteRT and ExecuTorch stand. What follows a layer (activation, normalisation, sums, softmax) is computed in float there, and here.
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


def leveled(x: Tensor, ends: Tensor, steps: int) -> Tensor:
    """x at the nearest of steps + 1 levels from ends[0] to ends[1] (2,), 0 being one of them. The gradient passes inside the ends, and
    moves an end by what lies beyond it (PACT, arXiv 1805.06085)."""
    low, high = ends[0].clamp(max=0.0), ends[1].clamp(min=0.0)
    step = ((high - low) / steps).clamp(min=1e-8).detach()
    zero = (-low / step).round()
    inside = torch.clamp(x.float(), low, high)
    level = ((x.detach().float() / step).round().clamp(-zero, steps - zero) * step).detach()
    return (inside + (level - inside).detach()).to(x.dtype)


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
    undo, weights = [], []
    for name, grid in chosen.items():
        layer: Any = known[name]
        weights.append((layer, layer.weight.data, None if layer.bias is None else layer.bias.data))
        along = output_axis(layer) if axis else None
        if layer.bias is not None and grid.input is not None:
            step = step_of(layer.weight, bits, along).flatten().expand(layer.bias.shape) * activation_step(grid.input, activations)
            layer.bias.data = (layer.bias.data.float() / step).round().mul(step).to(layer.bias.dtype)
        layer.weight.data = rounded(layer.weight.data, bits, along)
        undo += [layer.register_forward_pre_hook(_Input(grid.input, activations)), layer.register_forward_hook(_Output(grid.output, activations))]
    try:
        yield
    finally:
        for hook in undo:
            hook.remove()
        for layer, weight, bias in weights:
            layer.weight.data = weight
            if bias is not None:
                layer.bias.data = bias


class _Input:
    def __init__(self, ends: tuple[float, float] | None, bits: int) -> None:
        self.ends, self.steps = ends, 2**bits - 1

    def __call__(self, module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return None if self.ends is None else (leveled(given[0], torch.tensor(self.ends), self.steps), *given[1:])


class _Output(_Input):
    def __call__(self, module: nn.Module, given: tuple[Any, ...], found: Any = None) -> Any:  # type: ignore[override]
        return None if self.ends is None else leveled(found, torch.tensor(self.ends), self.steps)


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
