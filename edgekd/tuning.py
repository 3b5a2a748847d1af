"""How a component is quantized, beyond the name of its scheme: what `edgekd.schemes` makes of a scheme's text, and what exporters are told.

A layer is a module of the component with weights, by its path there; of a model that wraps another, without the leading `model.`: for instance
`features.3.token_mixer.0` of an encoder. The names are the torch ones in every format.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

FloatType = Literal["fp32", "fp16", "bf16"]
Method = Literal["minmax", "percentile", "entropy", "mse"]


@dataclass(frozen=True)
class Grid:
    """Where a trained layer's activations are rounded: (low, high) of its input and of its output, both with 0 in between. An end that is None
    is not rounded."""

    input: tuple[float, float] | None
    output: tuple[float, float] | None


@dataclass(frozen=True)
class Tuning:
    """What a quantizer is told. The defaults are edgekd's own choice in every format."""

    keep: Mapping[str, FloatType] = field(default_factory=dict)
    """Layer -> the float type it stays in."""
    rest: FloatType = "fp32"
    """What computes everything that is not integer, where `keep` does not say it."""
    weight_bits: int = 8
    """Levels of the weights: 4 means 15 levels, in whatever container the format has for them."""
    granularity: Literal["channel", "tensor"] = "channel"
    """Whether every output channel of a weight has a step of its own."""
    symmetric: bool | None = None
    """Whether 0 is the middle of the activations' levels; None: as the target's style wants it."""
    method: Method = "minmax"
    """How activation ranges follow from what calibration saw."""
    equalized: bool = False
    """Cross-layer equalisation, or what the library has of its kind (SmoothQuant), before ranges are found."""
    corrected: bool | None = None
    """Bias correction; None: the format's own default."""
    naive: bool = False
    """The library's own defaults, and nothing of what edgekd keeps in float: what it is compared with. Takes no other option."""
    quantizer: Literal["", "modelopt"] = ""
    """A library in place of the format's usual one."""
    grids: Mapping[str, Grid] = field(default_factory=dict)
    """Layer -> trained ranges, which take the place of calibration; layers without one stay in float. Weights then lie on their grid already."""

    def changed(self) -> dict[str, Any]:
        """The fields that are not at their defaults."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != getattr(PLAIN, f.name)}


PLAIN = Tuning()


def stays_float(name: str, tuning: Tuning) -> bool:
    """Whether a layer stays in float."""
    return name in tuning.keep or (bool(tuning.grids) and name not in tuning.grids)


def layer_name(path: str) -> str:
    """A module's path in a component -> the layer's name."""
    return path.removeprefix("model.")
