"""A chain of convolutions for what tells layers apart, with names that begin alike, a tensor that is rounded twice, and a channel that is all but dead."""
from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from edgekd.models.rounding import contained, layers, observed, output_axis
from edgekd.protocols import Component
from edgekd.tuning import Grid


class Chain(nn.Module):
    """(1, 4, 8, 8) -> (1, 4, 8, 8). `features.1` reads what `features.0` writes; `features.10` comes after a GELU, `last` after a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.ModuleDict({name: nn.Conv2d(4, 4, 3, 1, 1) for name in ("0", "1", "10")})
        self.last = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features["1"](self.features["0"](x))
        x = self.features["10"](nn.functional.gelu(x))
        return self.last(torch.relu(x))


NAMES = ["features.0", "features.1", "features.10", "last"]


def chain() -> Component:
    """Seeded, as an encoder. Channel 2 of `features.10` has a bias and no weights."""
    torch.manual_seed(0)
    module = Chain().eval()
    with torch.no_grad():
        module.features["10"].weight[2] = 0.0  # type: ignore[index]
        module.features["10"].bias[2] = 2.0  # type: ignore[index]
    return Component("encoder", module, {"images": torch.randn(1, 4, 8, 8)}, ("image_embeddings",))


def trained(*, twice: bool = True) -> tuple[Component, dict[str, Grid]]:
    """The chain as quantization-aware training leaves it: weights on their grid, and ranges for every layer. `twice`: what one layer writes and the next
    reads is rounded to different levels by each."""
    part = chain()
    with torch.no_grad():
        for layer in layers(part.module).values():
            layer.weight.data = contained(layer.weight.data, 8, output_axis(layer))  # type: ignore[union-attr, operator, arg-type]
        grids = observed(part.module, photos(), lambda one: part.module(torch.from_numpy(one["images"])))
    if twice:
        return part, {name: Grid(grid.input, (grid.output[0] * 0.9, grid.output[1] * 0.8)) if grid.output else grid for name, grid in grids.items()}
    before = {"features.1": "features.0", "last": "features.10"}
    return part, {name: Grid(grids[before[name]].output if name in before else grid.input, grid.output) for name, grid in grids.items()}


class photos:
    """Calibration inputs that say what they are, and count how often they are looked at."""

    looked = 0

    def __init__(self, count: int = 6) -> None:
        self.count = count

    def fingerprint(self) -> str:
        return f"{type(self).__name__} {self.count}"

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        rng = np.random.default_rng(3)
        for i in range(self.count):
            type(self).looked += 1
            yield {"images": (rng.standard_normal((1, 4, 8, 8)) * (1 + i)).astype(np.float32)}
