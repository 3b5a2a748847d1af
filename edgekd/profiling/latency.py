"""The measuring loop (`edgekd.profiling.board.loop`, which says how it measures) for what is timed in this process."""
from __future__ import annotations

from collections.abc import Callable

from edgekd.profiling.board.loop import BURST, MIN_SAMPLES, WINDOW, Samples, change_point, interleave, measure, outliers, timed, warm_up

__all__ = ["BURST", "MIN_SAMPLES", "WINDOW", "Call", "Clock", "Samples", "change_point", "interleave", "measure", "outliers", "timed", "warm_up"]

Clock = Callable[[], float]
Call = Callable[[], object]
