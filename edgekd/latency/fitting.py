"""From rows to a model of a runtime on a device: the time of an operator from its features, and of a whole network from its operators.

One regression per kind of operator that was measured often enough, one per family of kinds (convolutions, products, the rest) for the others. What they
give is summed up and corrected by what whole networks say: tracing slows operators down, and starting one costs something that no operator shows.
The interval comes from networks of families that the model had not seen (`Fitted.calibrate`), which is what it will be asked about.
"""
from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgekd.latency import features
from edgekd.latency.database import NO_FAMILY, Database, ModelRow, OperatorRow
from edgekd.latency.operators import Operator
from edgekd.latency.regression import Array, Shape, Smooth, learn

LEAST_ROWS = 15
"""Rows from which a kind of operator has a regression of its own."""
TICK_MS = 0.001
"""Runtimes tell microseconds."""
SPREAD = 0.03
"""Relative error of a row at best: the same operator in another place of a network."""
LEVEL = 0.9
"""Share of networks that the interval is to hold."""
LEAST_FAMILIES = 3
BOUNDS = ([0.5, -0.005, 0.0], [2.0, 0.05, 2.0])
"""Of a factor, of milliseconds an operator and of milliseconds a call"""
KNEE = 25.0
"""32 MB, about what the last cache holds, as a power of 2"""
LEAST_SHARE = 0.5
"""of the sum of its operators that a network takes at least"""
UNKNOWN_FACTOR = 2.0
"""What is added to the interval, times the share of operators of kinds that were never measured."""


class Operators:
    """The time of operators. `shapes`: what was learned before, by kind; learned anew for the kinds that are missing."""

    def __init__(self, rows: Sequence[OperatorRow], shapes: Mapping[str, Shape] | None = None) -> None:
        self.shapes: dict[str, Shape] = dict(shapes or {})
        self._smooth: dict[str, Smooth] = {}
        groups: dict[str, list[int]] = defaultdict(list)
        timed = [row for row in rows if row.times]
        for number, row in enumerate(timed):
            groups[row.operator.kind].append(number)
            groups[f"any {row.operator.family}"].append(number)
        self.free = {kind for kind, numbers in groups.items() if not any(timed[n].ms >= 2 * TICK_MS for n in numbers)}
        """Kinds that take no time that a clock can tell."""
        if not timed:
            return
        x = features.table([r.operator for r in timed])
        ideal, ms = np.array([features.ideal_ms(r.operator) for r in timed]), np.array([r.ms for r in timed])
        y, noise = np.log(np.maximum(ms, TICK_MS / 2) / ideal), SPREAD**2 + (0.7 * TICK_MS / np.maximum(ms, TICK_MS)) ** 2
        for kind, numbers in groups.items():
            if len(numbers) >= LEAST_ROWS and kind not in self.free:
                self._add(kind, x[numbers], y[numbers], noise[numbers])

    def _add(self, kind: str, x: Array, y: Array, noise: Array) -> None:
        if kind not in self.shapes:
            self.shapes[kind] = learn(x, y, noise)
        self._smooth[kind] = Smooth(self.shapes[kind], x, y, noise)

    def __call__(self, operators: Sequence[Operator]) -> tuple[Array, list[bool]]:
        """Milliseconds of each, and whether its kind is known."""
        found, known = np.zeros(len(operators)), [True] * len(operators)
        groups: dict[str, list[int]] = defaultdict(list)
        for number, operator in enumerate(operators):
            kind = operator.kind
            if kind in self.free:
                continue
            if kind not in self._smooth:
                kind, known[number] = f"any {operator.family}", False
            groups[kind].append(number)
        for kind, numbers in groups.items():
            chosen = [operators[n] for n in numbers]
            ideal = np.array([features.ideal_ms(o) for o in chosen])
            found[numbers] = ideal * (np.exp(self._smooth[kind](features.table(chosen))[0]) if kind in self._smooth else 2.0)
        return found, known


@dataclass(frozen=True)
class Whole:
    """A network from its operators: `factor` times their sum, something for each of them (less than nothing where tracing cost more than starting
    an operator does), and something for the call."""

    factor: float = 1.0
    each_ms: float = 0.0
    call_ms: float = 0.0

    def __call__(self, sum_ms: float, count: int) -> float:
        return max(self.factor * sum_ms + self.each_ms * count, LEAST_SHARE * sum_ms) + self.call_ms

    @classmethod
    def fit(cls, sums: Sequence[tuple[float, int]], ms: Sequence[float]) -> Whole:
        """By relative least squares within `BOUNDS`, drawn a little to (1, 0, 0)."""
        from scipy.optimize import lsq_linear

        truth = np.array(ms)
        a = np.array([[total, count, 1.0] for total, count in sums]) / truth[:, None]
        pull = np.diag([1.0, 100.0, 5.0]) * 0.3  # as much as a network that is off by 30 %, by 3 us an operator or by 0.06 ms
        found = lsq_linear(np.concatenate([a, pull]), np.concatenate([np.ones(len(truth)), pull @ [1.0, 0.0, 0.0]]), bounds=BOUNDS).x
        return cls(*(float(v) for v in found))


Errors = Mapping[str, Sequence[tuple[float, float]]]
"""Family -> of each of its networks the logarithm (base 2) of its footprint, and log(predicted / measured)."""


def correction(errors: Errors) -> tuple[float, float]:
    """(offset, slope) of errors: what predictions were off by, and how much more for each halving of the footprint below `KNEE`. What fits into
    the caches runs faster than the same operators do in larger networks. By ridge regression; nothing for fewer than `LEAST_ROWS` networks."""
    points = [(max(0.0, KNEE - size), error) for values in errors.values() for size, error in values]
    if len(points) < LEAST_ROWS:
        return 0.0, 0.0
    a = np.array([[1.0, small] for small, _ in points])
    found = np.linalg.solve(a.T @ a + np.eye(2), a.T @ np.array([error for _, error in points]))
    return float(found[0]), float(found[1])


def corrected(size: float, error: float, by: tuple[float, float]) -> float:
    """An error, or 0, less what `correction` says of a footprint of 2**size bytes."""
    return error - by[0] - by[1] * max(0.0, KNEE - size)


@dataclass
class Fitted:
    """A model of one runtime on one device. `errors` are of networks predicted without their family, and without the correction that follows from them."""

    operators: Operators
    whole: Whole
    errors: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Database, told: Mapping[str, Any] | None = None) -> Fitted:
        """From rows; `told` is what an earlier fit has learned, which takes a second instead of a minute."""
        told = told or {}
        operators = Operators(rows.operators, {k: Shape.read(s) for k, s in told.get("shapes", {}).items()})
        taken = [m for m in rows.models if m.operators and all(rows.operators[n].times for n, _ in m.operators)]
        sums = [_sum(m, rows, operators) for m in taken]
        whole = Whole.fit(sums, [m.ms for m in taken]) if len(taken) >= LEAST_ROWS else Whole()
        return cls(operators, whole, {k: [(float(a), float(b)) for a, b in v] for k, v in told.get("errors", {}).items()})

    def calibrate(self, rows: Database) -> Fitted:
        """Fill in `errors` by leaving each family out in turn."""
        for family in sorted({m.family for m in rows.models} - {NO_FAMILY}):
            self.errors[family] = Fitted.of(rows.without(family)).errors_of([m for m in rows.models if m.family == family], rows)
        return self

    def errors_of(self, models: Sequence[ModelRow], rows: Database) -> list[tuple[float, float]]:
        """Of measured networks, whose operators are numbers into `rows`."""
        found = []
        for model in models:
            if operators := expanded(model, rows):
                found.append((_size(operators), math.log(self._plain(operators)[0] / model.ms)))
        return found

    def ms(self, operators: Sequence[Operator]) -> tuple[float, float]:
        """Milliseconds of a network, and the share of them that operators of unknown kinds take."""
        total, unknown = self._plain(operators)
        return total * math.exp(corrected(_size(operators), 0.0, correction(self.errors))), unknown

    def _plain(self, operators: Sequence[Operator]) -> tuple[float, float]:
        times, known = self.operators(operators)
        total = float(times.sum())
        unknown = float(sum(t for t, k in zip(times, known, strict=True) if not k))
        return self.whole(total, sum(o.kind not in self.operators.free for o in operators)), unknown / total if total else 0.0

    @property
    def spread(self) -> float | None:
        """Half the width of the interval, as a logarithm, from errors that are corrected by those of the other families; None when too few were left
        out to know."""
        if len(self.errors) < LEAST_FAMILIES:
            return None
        found = []
        for family, values in self.errors.items():
            by = correction({f: v for f, v in self.errors.items() if f != family})
            found += [abs(corrected(size, error, by)) for size, error in values]
        return conformal(found)

    def told(self) -> dict[str, Any]:
        """What takes long to learn, as JSON."""
        return {"shapes": {k: s.told() for k, s in sorted(self.operators.shapes.items())},
                "errors": {k: [(round(a, 2), round(b, 4)) for a, b in v] for k, v in sorted(self.errors.items())}}


def conformal(errors: Sequence[float], level: float = LEVEL) -> float:
    """The bound that the next error keeps to with this probability, if it is drawn as these were (split conformal prediction)."""
    ordered = sorted(errors)
    return ordered[min(len(ordered), math.ceil((len(ordered) + 1) * level)) - 1]


def expanded(model: ModelRow, rows: Database) -> list[Operator]:
    """A model's operators, each as often as it occurs."""
    return [rows.operators[n].operator for n, count in model.operators for _ in range(count)]


def _size(operators: Sequence[Operator]) -> float:
    return math.log2(max(1, features.footprint(operators)))


def _sum(model: ModelRow, rows: Database, operators: Operators) -> tuple[float, int]:
    """What its operators took one by one, and how many of them take any time."""
    used = [(rows.operators[n], count) for n, count in model.operators]
    return sum(row.ms * count for row, count in used), sum(count for row, count in used if row.operator.kind not in operators.free)
