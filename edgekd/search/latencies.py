"""What candidates that were not measured take, from those that were: the same student in another format, a smaller one, another input size.

A regression of log milliseconds on the work and the input size, with a term for every architecture and for every (format, scheme). After a handful
of measurements on a device it says which of hundreds of students are worth a measurement there. What it says is marked `predicted`, with an interval.
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgekd.measurement import Latency
from edgekd.search.estimate import memberships, regress

FAR = 1.28155
"""Standard deviations to the 90th percentile."""


@dataclass(frozen=True)
class Point:
    """What the latency of a candidate depends on."""

    id: str
    family: str
    kind: str
    """Format and scheme."""
    gmacs: float
    size: int


@dataclass(frozen=True)
class Guess:
    """The logarithm of milliseconds, as mean and standard deviation."""

    mean: float
    sd: float

    @property
    def latency(self) -> Latency:
        """As a row holds it: the median, and an interval from one standard deviation below."""
        ms = [math.exp(self.mean + k * self.sd) for k in (-1.0, 0.0, FAR, 2 * FAR)]
        return Latency(p50=ms[1], p90=ms[2], p99=ms[3], mean=math.exp(self.mean + self.sd**2 / 2), min=ms[0], n=0, provenance="predicted")


def guess(points: Sequence[Point], measured: Mapping[str, float], told: Mapping[str, float] | None = None, *, noise: float = 0.08, told_noise: float = 0.2) -> dict[str, Guess]:
    """Latencies of all points; nothing for any of them before the first is known.

    Args:
        points: candidates, measured ones among them.
        measured: id -> ms.
        told: id -> ms that a predictor of the device says, which counts as a measurement of less weight.
    """
    told = {i: ms for i, ms in (told or {}).items() if i not in measured}
    known = {**told, **measured}
    places = [i for i, p in enumerate(points) if p.id in known]
    if not places:
        return {}
    work = np.log([max(p.gmacs, 1e-4) for p in points])
    side = np.log([p.size for p in points])
    families, kinds = memberships([p.family for p in points]), memberships([p.kind for p in points])
    x = np.column_stack([work - work[places].mean(), side - side[places].mean(), families, kinds, np.ones(len(points))])
    y = np.log([known[points[i].id] for i in places])
    centre = float(y.mean())
    mean = np.concatenate([[0.75, 0.3], np.zeros(x.shape[1] - 2)])  # less than in proportion: a model has a floor that no work explains
    sd = np.concatenate([[0.2, 0.3], np.full(families.shape[1], 0.3), np.full(kinds.shape[1], 0.4), [0.3]])
    weight = np.array([1.0 if points[i].id in measured else noise / told_noise for i in places])[:, None]
    found = regress(x[places] * weight, (y - centre) * weight[:, 0], x, mean=mean, sd=sd, noise=noise)
    return {p.id: Guess(centre + float(m), float(s)) for p, m, s in zip(points, found.mean, found.sd, strict=True)}
