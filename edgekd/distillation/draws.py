"""Random numbers of a step that do not depend on how many processes share it.

Every process draws the numbers of the whole batch from one seed and takes its own rows, so that two processes of b photos train on the
prompts, clicks and masks that one process of 2 b would draw. Numbers are made on the CPU: the same on every device.
"""
from __future__ import annotations

import torch
from torch import Tensor


class Draws:
    """The draws of one step.

    `own` is a generator of this process alone, for what need not be equal to one process with the whole batch (plug-ins); drawing from it
    does not disturb the shared numbers.

    Args:
        seed: of the step, the same in every process.
        rank: which part of the batch is this process's, 0..world-1; the parts are equally large.
    """

    def __init__(self, seed: int, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world
        self.shared = torch.Generator().manual_seed(seed)
        self.own = torch.Generator().manual_seed(seed * 8_191 + rank + 1)

    @classmethod
    def of(cls, source: Draws | torch.Generator | None) -> Draws:
        """Draws of one process from a generator, or from torch's own where there is none."""
        if isinstance(source, Draws):
            return source
        made = cls(0)
        made.shared = made.own = torch.default_generator if source is None else source
        return made

    def rand(self, rows: int, *shape: int) -> Tensor:
        """(rows, *shape) uniform in [0, 1): this process's rows of the whole batch's."""
        return self._rows(torch.rand(rows * self.world, *shape, generator=self.shared), rows)

    def randn(self, rows: int, *shape: int) -> Tensor:
        """(rows, *shape) normal: this process's rows of the whole batch's."""
        return self._rows(torch.randn(rows * self.world, *shape, generator=self.shared), rows)

    def once(self) -> Tensor:
        """(1,) uniform in [0, 1), the same in every process."""
        return torch.rand(1, generator=self.shared)

    def integer(self, below: int) -> int:
        """0..below-1, the same in every process."""
        return int(torch.randint(below, (), generator=self.shared))

    def _rows(self, whole: Tensor, rows: int) -> Tensor:
        return whole[self.rank * rows : (self.rank + 1) * rows]


Source = Draws | torch.Generator | None
"""What functions that draw take; a generator is that of one process."""


def pick(weights: Tensor, uniform: Tensor) -> Tensor:
    """The inverse of the cumulative sum: weights (R, n) >= 0, uniform (R, k) in [0, 1) -> indices (R, k), drawn in proportion, never one of
    weight 0; the last index where all are 0. Cheaper than `torch.multinomial`, and each row depends on its own numbers alone."""
    cumulative = weights.float().cumsum(1)
    # never quite the total: rounded up to it, a number would fall behind the last index that has a weight
    at = uniform.to(cumulative.device) * cumulative[:, -1:] * (1 - 2.0**-22)
    return torch.searchsorted(cumulative, at, right=True).clamp(max=weights.shape[1] - 1)
