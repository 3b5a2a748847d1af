"""The one measuring loop: warm up until steady, then take samples; several calls take turns.

A machine drifts (clock, heat, other people's work), so numbers taken minutes apart differ for reasons that are not the models'.
`interleave` measures A B C, C B A, A B C, ... in one process: drift hits all alike and ratios stay fair.

Warm-up ends by a rule on the spread: the last `WINDOW` runs have a coefficient of variation (standard deviation / mean) of 10 % at most. A
change-point test would need two such windows before it could say anything, and on a small board every run is seconds; it is made afterwards, over all
timed runs (`change_point`), and samples on both sides of a jump are not called steady.

How many: `repeats` samples of each call (`mode="count"`), or as many as fit into `max_seconds` of timed runs (`mode="time"`). Neither takes fewer than
`MIN_SAMPLES` unless fewer were asked for.

Outliers: nothing is ever dropped. Quantiles are those of all samples; samples above median + 5 median absolute deviations are counted and told, the
deviation being taken for 1 % of the median where a coarse clock makes it less.

Asynchronous devices: `synchronise` is called once before the clock starts, so that no earlier work is counted, and once before it stops.
"""
from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Clock = Callable[[], float]
    Call = Callable[[], object]

WINDOW = 5
"""Runs whose spread is looked at to call a warm-up steady, and the fewest on either side of a jump."""
MIN_SAMPLES = 10
"""Taken however long one run lasts: fewer make no p90."""
MOST_SAMPLES = 20000
"""Of one call: a fixed time of something very short would fill the memory."""
BURST = 3
"""Timed runs in a row per turn, after one untimed run that brings the weights back into the caches."""
OUTLYING = 5.0
"""Median absolute deviations above the median from which a sample is an outlier."""
LEAST_DEVIATION = 0.01
"""Of the median: what the deviation is taken for at least."""
JUMP = 0.05
"""Least difference between the medians on both sides of a change, as a share of the smaller."""
CHANCE = 0.01
"""How likely a change as large as this may be among samples that do not change."""
MODES = ("count", "time")


@dataclass
class Samples:
    """Run times in milliseconds, the runs made before them, and whether those had become steady."""

    values: list[float] = field(default_factory=list)
    warmup: int = 0
    steady: bool = False

    @property
    def spent_s(self) -> float:
        """Seconds of timed runs."""
        return sum(self.values) / 1e3

    @property
    def outliers(self) -> int:
        """How many samples are far above the rest; they count in the quantiles all the same."""
        return len(outliers(self.values))

    @property
    def drift(self) -> tuple[int, float] | None:
        """See `change_point`."""
        return change_point(self.values)


def outliers(values: Sequence[float]) -> list[float]:
    """The samples above median + `OUTLYING` median absolute deviations."""
    if not values:
        return []
    middle = statistics.median(values)
    deviation = max(statistics.median(abs(v - middle) for v in values), LEAST_DEVIATION * middle)
    return [v for v in values if v > middle + OUTLYING * deviation]


def change_point(values: Sequence[float]) -> tuple[int, float] | None:
    """Where samples jump to another level, and to how many times the level before; None where they do not.

    Pettitt's rank test (Applied Statistics 28, 1979): no assumption on how times are distributed, and single outliers weigh nothing. A change must be
    unlikely (`CHANCE`) and worth telling (`JUMP`).
    """
    n = len(values)
    if n < 2 * WINDOW:
        return None
    total, best, at = 0.0, 0.0, 0
    for k, rank in enumerate(_ranks(values)[:-1], start=1):
        total += 2 * rank - (n + 1)
        if abs(total) > best and WINDOW <= k <= n - WINDOW:
            best, at = abs(total), k
    if not at or 2 * math.exp(-6 * best * best / (n ** 3 + n ** 2)) > CHANCE:
        return None
    before, after = statistics.median(values[:at]), statistics.median(values[at:])
    return (at, after / before) if abs(after - before) > JUMP * min(before, after) else None


def _ranks(values: Sequence[float]) -> list[float]:
    """The place of each value among all, from 1; equal values share the mean of theirs."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    found = [0.0] * len(values)
    first = 0
    while first < len(order):
        last = first
        while last + 1 < len(order) and values[order[last + 1]] == values[order[first]]:
            last += 1
        for i in order[first:last + 1]:
            found[i] = (first + last) / 2 + 1
        first = last + 1
    return found


def warm_up(
    call: Call, *, least: int = 3, most: int = 30, cv: float = 0.1, max_seconds: float = 5.0, clock: Clock = time.perf_counter,
    synchronise: Call | None = None, alive: Call | None = None,
) -> Samples:
    """Run until the last `WINDOW` runs spread by less than `cv` (standard deviation / mean), within `most` runs and `max_seconds`.

    Returns Samples without values.
    """
    times: list[float] = []
    steady = False
    while not steady and len(times) < most and (len(times) < least or sum(times) < max_seconds):
        times.append(timed(call, clock, synchronise))
        recent = times[-WINDOW:]
        steady = len(times) >= max(least, WINDOW) and statistics.pstdev(recent) <= cv * statistics.fmean(recent)
        if alive:
            alive()
    return Samples(warmup=len(times), steady=steady)


def timed(call: Call, clock: Clock = time.perf_counter, synchronise: Call | None = None) -> float:
    """Seconds that one run takes. Runtimes on the CPU return when they are done; of others `synchronise` waits for the device."""
    if synchronise is None:
        start = clock()
        call()
        return clock() - start
    synchronise()
    start = clock()
    call()
    synchronise()
    return clock() - start


def measure(call: Call, *, warmup: int = 3, repeats: int = 30, max_seconds: float = 30.0, mode: str = "count", clock: Clock = time.perf_counter) -> Samples:
    """Samples of one call alone."""
    return interleave({"": call}, warmup=warmup, repeats=repeats, max_seconds=max_seconds, mode=mode, clock=clock)[""]


def interleave(
    calls: Mapping[str, Call], *, warmup: int = 3, repeats: int = 30, max_seconds: float = 30.0, mode: str = "count", clock: Clock = time.perf_counter,
    synchronise: Call | None = None, alive: Call | None = None,
) -> dict[str, Samples]:
    """Samples of each call, taken in turns of `BURST` whose order is reversed every round.

    By count: `repeats` of each; a call that has used `max_seconds` stops early, but never with fewer than min(repeats, MIN_SAMPLES) samples. By time:
    each until it has used `max_seconds`.

    Args:
        alive: called between runs, outside the clock: whoever watches learns that nothing hangs.

    Raises:
        ValueError: no such mode.
        Whatever a call raises, with the call's name in its attribute `measuring`.
    """
    if mode not in MODES:
        raise ValueError("no way to measure by {!r}; there are {}".format(mode, ", ".join(MODES)))
    found: dict[str, Samples] = {}
    name = ""
    try:
        for name, call in calls.items():
            found[name] = warm_up(call, least=warmup, max_seconds=max_seconds / 4, clock=clock, synchronise=synchronise, alive=alive)
        order = list(calls)
        while any(_wanted(s, repeats, max_seconds, mode) for s in found.values()):
            for name in order:
                burst = min(BURST, _wanted(found[name], repeats, max_seconds, mode))
                if burst:
                    calls[name]()
                    found[name].values += [timed(calls[name], clock, synchronise) * 1e3 for _ in range(burst)]
                if burst and alive:
                    alive()
            order.reverse()
    except Exception as e:
        e.measuring = name  # type: ignore[attr-defined]
        raise
    return found


def _wanted(s: Samples, repeats: int, max_seconds: float, mode: str) -> int:
    """How many samples are still to be taken."""
    over = s.spent_s >= max_seconds
    if mode == "time":
        most = MIN_SAMPLES if over else MOST_SAMPLES
    else:
        most = min(repeats, MIN_SAMPLES) if over else repeats
    return max(0, most - len(s.values))
