"""COCO's average precision from matched masks, also of photos drawn again: what the bootstrap of an AP needs."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from edgekd.tasks.promptable.matching import AREAS, Matched, Matches

RECALLS = np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True)
class _Ranked:
    """All masks of a category, best first: their photo (D,), right and wrong (T, D); and the instances of each photo (N,)."""

    image: np.ndarray
    right: np.ndarray
    wrong: np.ndarray
    instances: np.ndarray

    def average_precision(self, weights: np.ndarray) -> np.ndarray | None:
        """(T,) AP when photo n counts weights[n] times; None without instances."""
        total = float(weights @ self.instances)
        if total == 0:
            return None
        times = weights[self.image]
        right, wrong = np.cumsum(self.right * times, axis=1), np.cumsum(self.wrong * times, axis=1)
        precision = right / np.maximum(right + wrong, np.spacing(1))
        envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        found = np.zeros(len(right))
        for t, recall in enumerate(right / total):
            at = np.searchsorted(recall, RECALLS, side="left")
            found[t] = envelope[t, at[at < recall.size]].sum() / RECALLS.size
        return found


class Precision:
    """The APs of a model on a set of photos.

    Args:
        unchecked: photo -> categories of which not every instance is annotated there (LVIS): masks of them that match nothing are not wrong.
    """

    def __init__(self, matches: Matches, unchecked: dict[int, frozenset[int]] | None = None) -> None:
        self.images, self._thresholds = matches.images, matches.thresholds
        self._ranked = {area: [self._rank(category, photos, unchecked or {}) for category, photos in matches.by_area[area].items() if photos]
                        for area in AREAS}

    def _rank(self, category: int, photos: list[Matched], unchecked: dict[int, frozenset[int]]) -> _Ranked:
        order = np.argsort(-np.concatenate([p.scores for p in photos]), kind="stable")
        image = np.concatenate([np.full(len(p.scores), p.image) for p in photos])[order]
        hit, ignored = (np.concatenate([getattr(p, name) for p in photos], axis=1)[:, order] for name in ("hit", "ignored"))
        lenient = np.isin(image, [i for i, categories in unchecked.items() if category in categories])
        instances = np.zeros(self.images)
        instances[[p.image for p in photos]] = [p.instances for p in photos]
        return _Ranked(image, hit & ~ignored, ~hit & ~ignored & ~lenient, instances)

    def metrics(self, weights: np.ndarray | None = None) -> dict[str, float]:
        """`ap`, `ap50`, `ap75`, `ap_small`, `ap_medium`, `ap_large`; those without instances are left out.

        Args:
            weights: (N,) how often each photo counts (once: None).
        """
        weights = np.ones(self.images) if weights is None else weights
        found: dict[str, float] = {}
        for area, ranked in self._ranked.items():
            curves = [c for c in (r.average_precision(weights) for r in ranked) if c is not None]
            if not curves:
                continue
            mean = np.mean(curves, axis=0)
            found["ap" if area == "all" else f"ap_{area}"] = float(mean.mean())
            if area == "all":
                found |= {f"ap{round(100 * t)}": float(v) for t, v in zip(self._thresholds, mean, strict=True) if round(100 * t) in (50, 75)}
        return found


def resampled(images: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """(N,) how often each photo was drawn, `resamples` times."""
    rng = np.random.default_rng(seed)
    for _ in range(resamples):
        yield np.bincount(rng.integers(images, size=images), minlength=images).astype(float)


def intervals(precision: Precision, *, seed: int = 0, resamples: int = 200, level: float = 0.95) -> dict[str, tuple[float, float]]:
    """Percentile interval of each AP when photos are drawn again."""
    drawn = [precision.metrics(w) for w in resampled(precision.images, resamples, seed)]
    return {name: _quantiles([d[name] for d in drawn if name in d], level) for name in precision.metrics()}


def paired_interval(first: Precision, second: Precision, metric: str, *, seed: int = 0, resamples: int = 200, level: float = 0.95) -> dict[str, float]:
    """`difference`, `low` and `high` of an AP of two models on the same photos, as `edgekd.tasks.promptable.metrics.paired_interval`.

    Raises:
        ValueError: they are not of the same number of photos.
    """
    if first.images != second.images:
        raise ValueError(f"one is of {first.images} photos, the other of {second.images}")
    drawn = [(first.metrics(w), second.metrics(w)) for w in resampled(first.images, resamples, seed)]
    low, high = _quantiles([a[metric] - b[metric] for a, b in drawn if metric in a and metric in b], level)
    return {"difference": first.metrics()[metric] - second.metrics()[metric], "low": low, "high": high}


def _quantiles(values: list[float], level: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
