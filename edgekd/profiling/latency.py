"""The measuring loop: warm up until steady, then take samples; several candidates take turns.

A machine drifts (clock, heat, other people's work), so numbers taken minutes apart differ for reasons that are not the models'.
`interleave` measures A B C, C B A, A B C, ... in one process: drift hits all alike and ratios stay fair.
"""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

WINDOW = 5
"""Runs whose spread is looked at to call a warm-up steady."""
MIN_SAMPLES = 10
"""Taken however long one run lasts: fewer make no p90."""
BURST = 3
"""Timed runs in a row per turn, after one untimed run that brings the weights back into the caches."""

Clock = Callable[[], float]
Call = Callable[[], object]


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


def warm_up(call: Call, *, least: int = 3, most: int = 30, cv: float = 0.1, max_seconds: float = 5.0, clock: Clock = time.perf_counter) -> Samples:
    """Run until the last `WINDOW` runs spread by less than `cv` (standard deviation / mean), within `most` runs and `max_seconds`.

    Returns Samples without values.
    """
    times: list[float] = []
    steady = False
    while not steady and len(times) < most and (len(times) < least or sum(times) < max_seconds):
        times.append(timed(call, clock))
        recent = times[-WINDOW:]
        steady = len(times) >= max(least, WINDOW) and statistics.pstdev(recent) <= cv * statistics.fmean(recent)
    return Samples(warmup=len(times), steady=steady)


def timed(call: Call, clock: Clock = time.perf_counter) -> float:
    """Seconds that one run takes. Runtimes on the CPU return when they are done, so nothing has to be waited for."""
    start = clock()
    call()
    return clock() - start


def measure(call: Call, *, warmup: int = 3, repeats: int = 30, max_seconds: float = 30.0, clock: Clock = time.perf_counter) -> Samples:
    """Samples of one call alone."""
    return interleave({"": call}, warmup=warmup, repeats=repeats, max_seconds=max_seconds, clock=clock)[""]


def interleave(
    calls: Mapping[str, Call], *, warmup: int = 3, repeats: int = 30, max_seconds: float = 30.0, clock: Clock = time.perf_counter
) -> dict[str, Samples]:
    """`repeats` samples of each call, taken in turns of `BURST` whose order is reversed every round.

    A call that has used `max_seconds` stops early, but never with fewer than min(repeats, MIN_SAMPLES) samples.
    """
    found = {name: warm_up(call, least=warmup, max_seconds=max_seconds / 4, clock=clock) for name, call in calls.items()}
    least = min(repeats, MIN_SAMPLES)

    def wanted(s: Samples) -> int:
        over = s.spent_s >= max_seconds
        return max(0, (least if over else repeats) - len(s.values))

    order = list(calls)
    while any(wanted(s) for s in found.values()):
        for name in order:
            burst = min(BURST, wanted(found[name]))
            if burst:
                calls[name]()
                found[name].values += [timed(calls[name], clock) * 1e3 for _ in range(burst)]
        order.reverse()
    return found
