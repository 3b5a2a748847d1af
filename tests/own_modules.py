"""Networks such as users have, which know nothing of edgekd, and factories that `--model own_modules:NAME` names; some are no good."""
from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tiny import ConvBn
from torch import Tensor, nn


class TwoOutputs(nn.Module):
    """(B, 3, H, W) -> {"features": (B, 8, H/2, W/2), "scores": (B, 5)}, with a convolution that folds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = ConvBn(3, 8, 2), nn.Conv2d(8, 8, 3, 1, 1), nn.Linear(8, 5)

    def forward(self, photo: Tensor) -> dict[str, Tensor]:
        features = self.body(self.stem(photo).relu())
        return {"features": features, "scores": self.head(features.mean((2, 3)))}


class Words(nn.Module):
    """Indices (B, L) and a mask (B, L) -> (scores (B, 4), (best (B,), None)): several inputs and types, nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.out = nn.Embedding(20, 16), nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
        weight = mask.float()[..., None]
        pooled = (self.inner(self.table(tokens)).relu() * weight).sum(1) / (weight.sum(1) + 1)
        scores = self.out(pooled)
        return scores, (scores.argmax(-1), None)


class Doing(nn.Module):
    """A module of one function, with a weight so that it is one."""

    def __init__(self, what: Any) -> None:
        super().__init__()
        self.weight, self.what = nn.Parameter(torch.ones(1)), what

    def forward(self, x: Tensor) -> Any:
        return self.what(x * self.weight)


def two() -> nn.Module:
    return TwoOutputs()  # in training mode, as every new module


def words() -> nn.Module:
    return Words()


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256))


def single() -> nn.Module:
    return nn.Linear(8, 1)


def wide() -> nn.Module:
    """Heavy enough for int8 to be faster than float."""
    return nn.Sequential(nn.Conv2d(3, 64, 3, 2, 1), nn.ReLU(), *(m for _ in range(3) for m in (nn.Conv2d(64, 64, 3, 1, 1), nn.BatchNorm2d(64), nn.ReLU())))


def nan() -> nn.Module:
    return Doing(lambda x: x / 0 - x / 0)


def constant() -> nn.Module:
    return Doing(lambda x: x * 0)


def random() -> nn.Module:
    return Doing(lambda x: nn.functional.dropout(x, 0.5, training=True))


def text() -> nn.Module:
    return Doing(lambda x: {"x": x, "name": "a cat"})


def across() -> nn.Module:
    """Mixes the rows of a batch: a file of one row a call cannot be the same."""
    return Doing(lambda x: x - x.mean(0, keepdim=True))


def even() -> nn.Module:
    """Takes even lengths only."""
    return Doing(lambda x: x + x.unflatten(1, (-1, 2)).flip(-1).flatten(1))


class BadFold(TwoOutputs):
    def fold(self, twice: int) -> nn.Module:
        return self


def bad_fold() -> nn.Module:
    return BadFold()


def weights() -> dict[str, Tensor]:
    return {"weight": torch.ones(1)}


def failing() -> nn.Module:
    raise RuntimeError("the weights are on the other machine")


READY = TwoOutputs()
NOTHING = 3


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"tokens": rng.integers(0, 20, (1, 7)), "mask": np.ones((1, 7), np.float32)}
