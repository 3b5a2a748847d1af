"""From rows to a model of a runtime on a device: the time of an operator from its features, and of a whole network from its operators.

One regression per kind of operator that was measured often enough, one per family of kinds (convolutions, products, the rest) for the others. What they
give is summed up and corrected by what whole networks say: tracing slows operators down, and starting one costs something that no operator shows.
The interval comes from networks of families that the model had not seen (`Fitted.calibrate`), which is what it will be asked about.
"""
from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
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


@dataclass
class Fitted:
    """A model of one runtime on one device. `errors`: family -> log(predicted / measured) of its networks, predicted without it."""

    operators: Operators
    whole: Whole
    errors: dict[str, list[float]] = field(default_factory=dict)
    models: int = 0

    @classmethod
    def of(cls, rows: Database, told: Mapping[str, Any] | None = None) -> Fitted:
        """From rows; `told` is what an earlier fit has learned, which takes a second instead of a minute."""
        told = told or {}
        operators = Operators(rows.operators, {k: Shape.read(s) for k, s in told.get("shapes", {}).items()})
        taken = [m for m in rows.models if m.operators and all(rows.operators[n].times for n, _ in m.operators)]
        sums = [_sum(m, rows, operators) for m in taken]
        whole = Whole.fit(sums, [m.ms for m in taken]) if len(taken) >= LEAST_ROWS else Whole()
        return cls(operators, whole, {k: list(v) for k, v in told.get("errors", {}).items()}, len(taken))

    def calibrate(self, rows: Database, families: Iterable[str] | None = None) -> Fitted:
        """Fill in `errors` by leaving each family out in turn."""
        for family in families if families is not None else sorted({m.family for m in rows.models} - {NO_FAMILY}):
            without = Fitted.of(rows.without(family))
            self.errors[family] = [math.log(without.ms(expanded(m, rows))[0] / m.ms) for m in rows.models if m.family == family and m.operators]
        return self

    def ms(self, operators: Sequence[Operator]) -> tuple[float, float]:
        """Milliseconds of a network, and the share of them that operators of unknown kinds take."""
        times, known = self.operators(operators)
        total = float(times.sum())
        unknown = float(sum(t for t, k in zip(times, known, strict=True) if not k))
        return self.whole(total, sum(o.kind not in self.operators.free for o in operators)), unknown / total if total else 0.0

    @property
    def spread(self) -> float | None:
        """Half the width of the interval, as a logarithm; None when too few families were left out to know."""
        if len(self.errors) < LEAST_FAMILIES:
            return None
        return conformal([abs(e) for values in self.errors.values() for e in values])

    def told(self) -> dict[str, Any]:
        """What takes long to learn, as JSON."""
        return {"shapes": {k: s.told() for k, s in sorted(self.operators.shapes.items())},
                "errors": {k: [round(e, 4) for e in v] for k, v in sorted(self.errors.items())}}


def conformal(errors: Sequence[float], level: float = LEVEL) -> float:
    """The bound that the next error keeps to with this probability, if it is drawn as these were (split conformal prediction)."""
    ordered = sorted(errors)
    return ordered[min(len(ordered), math.ceil((len(ordered) + 1) * level)) - 1]


def expanded(model: ModelRow, rows: Database) -> list[Operator]:
    """A model's operators, each as often as it occurs."""
    return [rows.operators[n].operator for n, count in model.operators for _ in range(count)]


def _sum(model: ModelRow, rows: Database, operators: Operators) -> tuple[float, int]:
    """What its operators took one by one, and how many of them take any time."""
    used = [(rows.operators[n], count) for n, count in model.operators]
    return sum(row.ms * count for row, count in used), sum(count for row, count in used if row.operator.kind not in operators.free)
