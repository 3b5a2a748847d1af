"""Which student to train first. Latency needs no weights, so it is known before any training; accuracy is not.

With a latency budget the largest model that fits is the best bet for accuracy (training-free: parameters x pixels, the work it
can do). Without one the fastest comes first: an answer early, and then larger ones for as long as the recipe allows.
"""
from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgekd.report.schema import CandidateRow


@dataclass(frozen=True)
class Proposal:
    """A student at one size that is still worth training. `planned_ms` is its fastest candidate's; None when not known."""

    student: str
    image_size: int
    planned_ms: float | None
    capacity: float
    reason: str


def rank(rows: Sequence[CandidateRow], *, budget_ms: float | None, trained: Collection[tuple[str, int]] = ()) -> list[Proposal]:
    """The untrained (student, size) pairs with a candidate left, best bet first. The order of `rows` does not matter."""
    alive: dict[tuple[str, int], list[CandidateRow]] = {}
    for row in rows:
        if row.status == "accepted" and (row.student, row.image_size) not in trained and not row.trained:
            alive.setdefault((row.student, row.image_size), []).append(row)
    proposals = [_propose(group, budget_ms) for group in alive.values()]
    return sorted(proposals, key=_by_capacity if budget_ms is not None else _by_latency)


def _propose(group: Sequence[CandidateRow], budget_ms: float | None) -> Proposal:
    latencies = [r.latency_ms.p50 for r in group if r.latency_ms]
    planned = min(latencies, default=None)
    capacity = float(max(r.params or 0 for r in group)) * group[0].image_size ** 2
    speed = "its latency is not known yet" if planned is None else f"its fastest candidate takes {planned:.3g} ms"
    why = f"the largest left whose planned latency fits {budget_ms:g} ms" if budget_ms is not None else "the fastest of those left"
    return Proposal(group[0].student, group[0].image_size, planned, capacity, f"{why}: {speed}")


def _by_capacity(p: Proposal) -> tuple[float, float, str, int]:
    return (-p.capacity, p.planned_ms or 0.0, p.student, p.image_size)


def _by_latency(p: Proposal) -> tuple[float, float, str, int]:
    return (float("inf") if p.planned_ms is None else p.planned_ms, -p.capacity, p.student, p.image_size)
