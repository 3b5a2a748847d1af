"""The limits of a budget as values: what of a candidate each one holds to what, by how much it is missed, and what would have to give.

A budget may limit the whole task (encoder and one prompt, or k; or segment everything), one component, the files, memory, energy and accuracy. A limit
whose quantity is not known of a candidate says nothing about it.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekd.report.schema import METRICS, BudgetRow, CandidateRow

if TYPE_CHECKING:
    from edgekd.measurement import Latency

MB = 1_000_000


@dataclass(frozen=True)
class Limit:
    """One limit. `of` is the quantity of a candidate in `unit`, None where it is not known; a `floor` must be reached, a ceiling kept to."""

    field: str
    name: str
    unit: str
    bound: float
    of: Callable[[CandidateRow], float | None]
    floor: bool = False
    timed: bool = False
    """Whether it is of latency, which may be predicted."""

    def excess(self, row: CandidateRow) -> float | None:
        """By how much the row misses it, in its unit; None when it does not."""
        value = self.of(row)
        if value is None:
            return None
        gap = self.bound - value if self.floor else value - self.bound
        return gap if gap > 0 else None


def limits(budget: BudgetRow, least: float | None = None) -> list[Limit]:
    """The limits of a budget, those of latency first; `least` is the accuracy that must be reached."""
    found = _timed(budget)
    if budget.size_mb is not None:
        found.append(Limit("size_mb", "size", "MB", budget.size_mb, lambda r: None if r.size_bytes is None else r.size_bytes / MB))
    if budget.memory_mb is not None:
        found.append(Limit("memory_mb", "peak memory", "MB", budget.memory_mb, lambda r: None if r.peak_memory_bytes is None else r.peak_memory_bytes / MB))
    if budget.energy_mj is not None:
        found.append(Limit("energy_mj", "energy", "mJ", budget.energy_mj, lambda r: r.energy_mj))
    if least is not None:
        found.append(Limit("accuracy", METRICS.get(budget.metric, budget.metric), "", least, lambda r: accuracy(r, budget.metric), floor=True))
    return found


def _timed(budget: BudgetRow) -> list[Limit]:
    found = []
    ceiling = latency_ceiling(budget)
    if ceiling is not None:
        found.append(Limit("latency_ms", "", "ms", ceiling, lambda r: took(r.latency_ms, budget), timed=True))
    for part, most in budget.components.items():
        found.append(Limit(f"components.{part}", part, "ms", most, lambda r, p=part: took(r.components[p].latency_ms if p in r.components else None, budget),  # type: ignore[misc]
                           timed=True))
    if budget.everything_ms is not None:
        found.append(Limit("everything_ms", "segment everything", "ms", budget.everything_ms, lambda r: took(r.everything_ms, budget), timed=True))
    return found


def latency_ceiling(budget: BudgetRow) -> float | None:
    """Milliseconds of one use: the stricter of `latency_ms` and what `fps` leaves for a photo."""
    given = [ms for ms in (budget.latency_ms, 1e3 / budget.fps if budget.fps else None) if ms is not None]
    return min(given, default=None)


def took(latency: Latency | None, budget: BudgetRow) -> float | None:
    """The quantile that the budget asks for, in ms."""
    return None if latency is None else float(getattr(latency, budget.percentile))


def limited(budget: BudgetRow) -> bool:
    """Whether anything is limited that needs no training to be known."""
    return bool(limits(budget))


def accuracy(row: CandidateRow, metric: str) -> float | None:
    """The row's value of a metric such as `teacher_agreement.box`."""
    return row.accuracy.value(metric) if row.accuracy else None


def over(row: CandidateRow, found: Iterable[Limit], *, slack: float = 0.0) -> list[str]:
    """Every limit but the accuracy's that a row misses, in words. A predicted latency misses one only beyond the limit by `slack`, and at the low end of
    its interval."""
    said = []
    for limit in found:
        gap = limit.excess(row)
        if gap is None or limit.floor or (limit.timed and not _surely(row, limit, slack)):
            continue
        value = limit.bound + gap
        if limit.timed:
            origin = "" if row.latency_ms is None or row.latency_ms.provenance == "measured" else f" ({row.latency_ms.provenance})"
            of = f"{limit.name} " if limit.name else ""
            said.append(f"{of}{ms(value)}{origin} is over the budget of {limit.bound:g} ms by {ms(gap)}")
        else:
            said.append(f"{limit.name} {value:.1f} {limit.unit} is over the budget of {limit.bound:g} {limit.unit} by {gap:.2g} {limit.unit}")
    return said


def _surely(row: CandidateRow, limit: Limit, slack: float) -> bool:
    value, latency = limit.of(row), row.latency_ms
    if latency is None or latency.provenance == "measured" or value is None:
        return True
    return min(value / (1 + slack), value * latency.min / latency.p50) > limit.bound


@dataclass(frozen=True)
class Gap:
    """By how much a row misses each limit that it misses; `relative` is the worst of them as a share of its limit."""

    by: dict[str, float]
    relative: float
    words: str


def gap(row: CandidateRow, found: Sequence[Limit]) -> Gap | None:
    """None when the row misses no limit (it was rejected for something else)."""
    missed = [(limit, excess) for limit in found if (excess := limit.excess(row)) is not None]
    if not missed:
        return None
    said = " and ".join(_by(limit, excess) for limit, excess in missed)
    return Gap({limit.field: excess for limit, excess in missed}, max(excess / max(limit.bound, 1e-12) for limit, excess in missed), said)


def _by(limit: Limit, excess: float) -> str:
    if limit.floor:
        return f"{excess:.3f} in accuracy"
    if limit.timed:
        return ms(excess) + (f" ({limit.name})" if limit.name else "")
    return f"{excess:.3g} {limit.unit} of memory" if limit.field == "memory_mb" else f"{excess:.2g} {limit.unit}"


def give(rows: Iterable[CandidateRow], found: Sequence[Limit]) -> list[str]:
    """What would have to give: for each limit alone, the least that it must be loosened so that some candidate keeps to all; none where no single one helps.

    Only rows count whose every limited quantity is known."""
    known = [r for r in rows if r.status != "failed" and all(limit.of(r) is not None for limit in found)]
    said = []
    for limit in found:
        fit = [r for r in known if all(other is limit or other.excess(r) is None for other in found)]
        if not fit:
            continue
        best = max if limit.floor else min
        row = best(fit, key=lambda r, of=limit.of: (of(r), r.id))  # type: ignore[misc]
        said.append(f"{limit.name or 'latency'} {_loosened(limit, row)} instead of {limit.bound:.4g}{limit.unit and ' ' + limit.unit}: {row.id}")
    return said


def _loosened(limit: Limit, row: CandidateRow) -> str:
    value = limit.of(row)
    assert value is not None
    return f"{value:.3f}" if limit.floor else ms(value) if limit.timed else f"{value:.4g} {limit.unit}"


def ms(value: float) -> str:
    """Milliseconds with three significant digits: 6.10 ms, 41.3 ms, 0.0021 ms."""
    text = f"{value:.0f}" if value >= 100 else f"{value:#.3g}" if value >= 1 else f"{value:.2g}"
    return f"{text} ms"
