"""The result of an evaluation, whatever the task, and how sure a mean is. Numpy only."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from edgekd.errors import UsageError

AGREEMENT = "teacher_agreement."
"""How the names of numbers that compare with the teacher begin."""


class Progress(Protocol):
    """What `edgekd.console.progress` yields."""

    def advance(self, n: int = 1, **fields: object) -> None: ...


@dataclass(frozen=True)
class Judge:
    """What precisions of one source model are judged by, on a few photos; larger is better, both in 0..1."""

    score: Callable[[Any], float]
    """The accuracy `Task.compared_by` of a torch model or an artifact."""
    agreement: Callable[[Any], float]
    """How alike its answers are to the source's own; near 1 this tells two precisions apart long before `score` does."""
    photos: int
    instances: int
    measure: str
    """What `agreement` is, in words."""


@dataclass
class Evaluation:
    """Means over instances (of tasks without instances: over photos), their 95 % intervals, how they were made, and the values of each photo."""

    model: str
    metrics: dict[str, float]
    teacher_agreement: dict[str, float] | None
    interval95: dict[str, tuple[float, float]]
    """Metric (`teacher_agreement.box` for agreements) -> (low, high), bootstrapped over photos."""
    images: int
    instances: int
    protocol: dict[str, Any]
    per_image: list[dict[str, Any]] = field(default_factory=list)
    """One row a photo: `id`, `instances`, the mean of each metric over its instances, and under `counts` the number of instances of those
    metrics that are over others (segment-everything's)."""

    @property
    def accuracy(self) -> dict[str, Any]:
        """The numbers alone, as a report's `accuracy` holds them."""
        agreement = {"teacher_agreement": self.teacher_agreement} if self.teacher_agreement else {}
        return {**self.metrics, **agreement}

    def to_dict(self, *, per_image: bool = True) -> dict[str, Any]:
        """A JSON document, the metrics at the top."""
        document = {"model": self.model, **self.accuracy, "images": self.images, "instances": self.instances,
                    "interval95": {k: list(v) for k, v in self.interval95.items()}, "protocol": self.protocol}
        return {**document, "per_image": self.per_image} if per_image else document


def bootstrap_interval(sums: np.ndarray, counts: np.ndarray, *, seed: int = 0, resamples: int = 2000, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of sum(sums) / sum(counts), the mean over instances, when *images* are drawn again.

    Images, not instances: the instances of one photo share its difficulty, so drawing them apart would look too sure.

    Args:
        sums: (N,) sum of the metric over each image's instances.
        counts: (N,) number of instances of each image, 1 or more.
    """
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(sums), size=(resamples, len(sums)))
    means = np.asarray(sums)[drawn].sum(axis=1) / np.asarray(counts)[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def over_photos(name: str, rows: Sequence[Mapping[str, Any]], protocol: dict[str, Any], *, seed: int = 0) -> Evaluation:
    """The evaluation of a task that has one value a photo.

    Args:
        rows: one a photo: `id` and its metrics, those of agreement as `teacher_agreement.NAME`; a photo may lack some.
        seed: of the bootstrap.
    """
    names = list(dict.fromkeys(key for row in rows for key in row if key != "id"))
    means: dict[str, float] = {}
    intervals: dict[str, tuple[float, float]] = {}
    for metric in names:
        values = np.array([row[metric] for row in rows if metric in row], dtype=np.float64)
        means[metric], intervals[metric] = float(values.mean()), bootstrap_interval(values, np.ones(len(values)), seed=seed)
    agreement = {m.removeprefix(AGREEMENT): v for m, v in means.items() if m.startswith(AGREEMENT)}
    return Evaluation(name, {m: v for m, v in means.items() if not m.startswith(AGREEMENT)}, agreement or None, intervals, len(rows), len(rows), protocol,
                      [{"id": row["id"], "instances": 1, **{k: round(float(v), 6) for k, v in row.items() if k != "id"}} for row in rows])


def refuse(options: Mapping[str, Any], task: str) -> None:
    """Raises UsageError when an evaluation was given options that its task does not have."""
    if options:
        name = next(iter(options)).replace("_", "-")
        raise UsageError(f"an evaluation of the task {task} takes no --{name}", hint="it is for promptable_segmentation; leave it out")
