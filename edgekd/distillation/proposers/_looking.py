"""What proposers share: the same photos for models of any size, what models give for them, and encoders without anybody's training."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.data.images import preprocess
from edgekd.errors import UsageError
from edgekd.protocols import Dataset, Preprocess


def photos(data: Dataset, count: int) -> list[np.ndarray]:
    """`count` photos spread evenly over the data, or all of them."""
    if not len(data):
        raise UsageError("a proposer looks at photos, and there are none", where=data.name)
    return [data[int(i)].image for i in np.unique(np.linspace(0, len(data) - 1, count).round())]


def frames(images: Sequence[np.ndarray], spec: Preprocess) -> Tensor:
    """(N, 3, S, S) as a model sees them."""
    return torch.stack([torch.from_numpy(preprocess(image, spec)[0]) for image in images])


def redrawn(model: Any, seed: int) -> Any:
    """The model with every weight of its encoder drawn again, the same for the same seed: a checkpoint that ships must not win a contest of
    untrained networks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in encoder(model).modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
    return model


def encoder(model: Any) -> nn.Module:
    """What students differ in."""
    return getattr(model, "encoder", model)


def size(model: Any) -> int:
    """Parameters of the encoder."""
    return sum(p.numel() for p in encoder(model).parameters())


def on_one_grid(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps (B, *, h, w) as float32 on the coarser of their grids."""
    side = min(a.shape[-1], b.shape[-1])
    return F.adaptive_avg_pool2d(a.float(), side), F.adaptive_avg_pool2d(b.float(), side)
