"""What each layer loses to 8 bits, in mask IoU and not in decibels alone: every layer rounded by itself, and all of them with the worst returned to
float one after the other.

Rounding is computed in torch (`edgekd.models.rounding`), where one variant of a model costs a few photos' inference and no export, so that the
ranking holds for every runtime that rounds there. What a runtime then really loses is measured on its own file (`edgekd.mixing`).
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgekd.errors import EdgekdError
from edgekd.models.rounding import layers, observed, simulated
from edgekd.tasks.evaluation import Judge
from edgekd.tuning import Grid

ENOUGH = 0.1
"""The cumulative walk ends where this share of the whole drop is left."""
MOST_KEPT = 16


@dataclass(frozen=True)
class Layer:
    """One layer alone at 8 bits. `miou_drop` is in points of agreement (100 x) lost by it, `sqnr_db` the ratio of signal to rounding noise in what
    the component puts out, `parameters` its weights."""

    name: str
    kind: str
    parameters: int
    miou_drop: float
    sqnr_db: float


@dataclass(frozen=True)
class Step:
    """All layers at 8 bits but the `kept` most sensitive ones, the last of them `layer`."""

    kept: int
    layer: str | None
    miou_drop: float


@dataclass(frozen=True)
class Sensitivity:
    """Layers from the most to the least sensitive, and what keeping more and more of them in float brings."""

    component: str
    weight_bits: int
    photos: int
    instances: int
    measure: str
    layers: list[Layer]
    cumulative: list[Step]
    unseen: list[str]
    """Layers that calibration never ran."""

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return {"measured_by": "rounding computed in torch, not on a runtime", **asdict(self)}


def sensitivity(model: Any, component: Any, calibration: Iterable[Mapping[str, np.ndarray]], judge: Judge, *, bits: int = 8,
                advance: Callable[[], None] = lambda: None) -> Sensitivity:
    """Find what every layer of a component costs.

    Args:
        model: the folded torch model in eval mode, as `judge` asks it; `component` is a part of it.
        calibration: inputs of the component, on which ranges are found.
        bits: of the weights; activations have 8.
        advance: called after every variant.

    Raises:
        EdgekdError: an activation is not finite.
    """
    module: nn.Module = component.module
    samples = [tuple(torch.from_numpy(np.asarray(one[name])) for name in component.example) for one in calibration]
    grids = observed(module, samples, lambda one: module(*one))
    if broken := [n for n, g in grids.items() if not all(math.isfinite(x) for x in (*(g.input or ()), *(g.output or ())))]:
        raise EdgekdError(f"activations are not finite on the calibration images: {', '.join(broken[:3])}", where=component.name,
                          hint="the model or a photo is damaged: edgekd evaluate MODEL --data PHOTOS")
    known, shown = layers(module), samples[0]
    reference = _run(module, shown)

    def drop(chosen: Mapping[str, Grid]) -> tuple[float, float]:
        with simulated(module, chosen, bits=bits):
            noise = _sqnr(reference, _run(module, shown))
            found = 100 * (1 - judge.agreement(model))
        advance()
        return found, noise

    alone = {name: drop({name: grid}) for name, grid in grids.items()}
    ranked = sorted(alone, key=lambda name: (-alone[name][0], alone[name][1]))
    found = [Layer(name, _kind(known[name]), sum(p.numel() for p in known[name].parameters()), *alone[name]) for name in ranked]
    return Sensitivity(component.name, bits, judge.photos, judge.instances, judge.measure, found, _cumulative(ranked, grids, drop),
                       sorted(set(known) - set(grids)))


def _cumulative(ranked: list[str], grids: Mapping[str, Grid], drop: Callable[[Mapping[str, Grid]], tuple[float, float]]) -> list[Step]:
    """Return layers to float, the most sensitive first, until little of the drop is left."""
    steps = [Step(0, None, drop(grids)[0])]
    left = dict(grids)
    for kept, name in enumerate(ranked[:min(MOST_KEPT, len(ranked) - 1)], 1):
        del left[name]
        steps.append(Step(kept, name, drop(left)[0]))
        if steps[-1].miou_drop <= ENOUGH * steps[0].miou_drop:
            break
    return steps


@torch.no_grad()
def _run(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    found = module(*inputs)
    return torch.cat([t.flatten().float() for t in found]) if isinstance(found, tuple) else found.flatten().float()


def _sqnr(reference: Tensor, found: Tensor) -> float:
    noise = float((found - reference).square().sum())
    return 10 * math.log10(max(float(reference.square().sum()), 1e-30) / max(noise, 1e-30))


def _kind(module: nn.Module) -> str:
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        side = "x".join(map(str, module.kernel_size))
        return f"{type(module).__name__} {side} {module.in_channels}->{module.out_channels}" + (" depthwise" if module.groups == module.in_channels > 1 else "")
    weight: Any = module.weight
    return f"{type(module).__name__} {weight.shape[1]}->{weight.shape[0]}"
