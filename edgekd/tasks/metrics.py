"""IoU and how sure a mean of it is."""
from __future__ import annotations

import numpy as np


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(..., H, W) bool masks -> (...) intersection over union; 1 where both are empty."""
    both = np.logical_and(a, b).sum(axis=(-2, -1))
    either = np.logical_or(a, b).sum(axis=(-2, -1))
    return np.where(either == 0, 1.0, both / np.maximum(either, 1))


def bootstrap_interval(sums: np.ndarray, counts: np.ndarray, *, seed: int = 0, resamples: int = 2000, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of sum(sums) / sum(counts), the mean over instances, when *images* are drawn again.

    Images, not instances: the instances of one photo share its difficulty, so drawing them apart would look too sure.

    Args:
        sums: (N,) sum of the metric over each image's instances.
        counts: (N,) number of instances of each image.
    """
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(sums), size=(resamples, len(sums)))
    means = np.asarray(sums)[drawn].sum(axis=1) / np.asarray(counts)[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
