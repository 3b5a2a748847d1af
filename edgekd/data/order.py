"""The order of an epoch for data that is slow to read at random: neighbours in the shards stay neighbours in time."""
from __future__ import annotations

import numpy as np

RUN = 64
"""Photos that lie together and are drawn within one window: a shard of the teacher's cache, some 60 MB of SA-1B's tars."""


def windowed(count: int, window: int, rng: np.random.Generator) -> np.ndarray:
    """Positions 0..count-1, each once: runs of `RUN` in a shuffled order, and within every `window` of them all photos shuffled."""
    runs = [np.arange(at, min(at + RUN, count)) for at in range(0, count, RUN)]
    together = max(1, window // RUN)
    order = rng.permutation(len(runs))
    return np.concatenate([rng.permutation(np.concatenate([runs[r] for r in order[at : at + together]])) for at in range(0, len(runs), together)])
