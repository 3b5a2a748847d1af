"""How much has to go until a measured latency is met. Pure: what cuts and what measures are given, so that no clock decides a test."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Generic, Protocol, TypeVar

MOST = 0.9
"""Share of the channels that can go at most."""
CLOSE = 0.97
"""Of the target: a latency this near below it is good enough."""
ROUNDS = 7
"""Cuts that are measured for a number of blocks, at most: 0.9 / 2**6 is less than 8 of 512 channels."""
CONFIRM = 3
"""Times that a cut which met the target must be narrowed when it does not meet it again."""


class Cut(Protocol):
    """An encoder after pruning; `widths` tell cuts apart that differ in their ratio only."""

    @property
    def widths(self) -> Any: ...


C = TypeVar("C", bound=Cut)


@dataclass(frozen=True)
class Step:
    """One measured cut. `ratio` of the channels went, `removed` blocks; the embedding kept `cosine` to the parent's."""

    ratio: float
    removed: int
    ms: float
    cosine: float

    def told(self) -> dict[str, Any]:
        """For a result."""
        return {k: round(v, 5) for k, v in asdict(self).items()}


@dataclass(frozen=True)
class Found:
    """The cut that was chosen, or the fastest where none met the target, and all that were measured in their order."""

    step: Step
    met: bool
    history: tuple[Step, ...]


class Search(Generic[C]):
    """`make(ratio, removed)` cuts, `measure(cut)` gives milliseconds, `near(cut)` the cosine."""

    def __init__(self, make: Callable[[float, int], C], measure: Callable[[C], float], near: Callable[[C], float]) -> None:
        self.make, self.measure, self.near = make, measure, near
        self.history: list[Step] = []
        self._known: dict[str, Step] = {}

    def step(self, ratio: float, removed: int, *, again: bool = False) -> Step:
        """Cut and measure, unless the same shape was measured already."""
        cut = self.make(ratio, removed)
        key = repr((removed, cut.widths))
        if key not in self._known or again:
            near = self._known[key].cosine if key in self._known else self.near(cut)
            self._known[key] = Step(ratio, removed, self.measure(cut), near)
            self.history.append(self._known[key])
        return self._known[key]

    def within(self, target_ms: float, *, depth: int = 0) -> Found:
        """The cut nearest to its parent that meets the target: of the widths alone, and with 1, 2, ... up to `depth` blocks less for as long
        as that keeps the embedding nearer than the number before."""
        best = self._narrowed(target_ms, 0)
        for removed in range(1, depth + 1):
            other = self._narrowed(target_ms, removed)
            if best is not None and (other is None or other.cosine <= best.cosine):
                break
            best = other
        if best is None:
            return self._fastest(target_ms)
        return self._confirmed(best, target_ms)

    def _narrowed(self, target_ms: float, removed: int) -> Step | None:
        """The widest cut that meets the target without this many blocks; None when the narrowest does not."""
        whole = self.step(0.0, removed) if removed else None
        if whole is not None and whole.ms <= target_ms:
            return whole
        low, high, best = 0.0, MOST, self.step(MOST, removed)
        if best.ms > target_ms:
            return None
        for _ in range(ROUNDS - 1):
            if best.ms >= CLOSE * target_ms:
                break
            middle = (low + high) / 2
            tried = self.step(middle, removed)
            if tried.ms <= target_ms:
                high, best = middle, tried
            else:
                low = middle
        return best

    def _confirmed(self, best: Step, target_ms: float) -> Found:
        """Measure the choice once more, for one run below the target may be chance; narrow it where it does not hold."""
        ratio = best.ratio
        for _ in range(CONFIRM + 1):
            again = self.step(ratio, best.removed, again=True)
            if again.ms <= target_ms:
                return Found(again, True, tuple(self.history))
            ratio = min(MOST, ratio + 1 / 32)
        return self._fastest(target_ms)

    def _fastest(self, target_ms: float) -> Found:
        step = min(self.history, key=lambda s: s.ms)
        return Found(step, step.ms <= target_ms, tuple(self.history))
