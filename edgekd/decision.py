"""The decision: pure functions from measurements and a budget to verdicts in words. No files, no clock, no model.

`plan_verdicts` speaks before training (latency needs no weights), `judge` afterwards, `choose` picks, `next_action` says what the
loop does next. The rules, in the order in which a candidate meets them:

1. it was built, and equals the student it came from (or it *failed*);
2. the runtime executes the precision that was asked for, and it is faster than its float parent (same student, size, format);
3. it is faster than its teacher;
4. it keeps to the budget (`edgekd.budget`): latency of the whole and of components, size, memory, energy;
5. it loses little accuracy to its parent, and keeps to the accuracy floor.

Being dominated is no reason for rejection. By the budget's objective the most accurate candidate is chosen, the fastest, or (balanced) the fastest of
those whose accuracy is within a stated tolerance of the best; `auto` is the first where latency is limited, else the last. None depends on the order of
the rows, nor changes when a candidate is added that is worse than another one in accuracy and latency.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from edgekd.budget import Gap, Limit, accuracy, gap, give, latency_ceiling, limits, ms, over, took
from edgekd.report.schema import METRICS, BudgetRow, CandidateRow, Nearest, Stage, Verdict
from edgekd.search.proposer import Proposal, rank

Budget = BudgetRow


@dataclass(frozen=True)
class Rules:
    """The margins of the decision; the report states them."""

    faster: float = 0.05
    """A reduced precision must be faster than its parent by at least this much (two measurements of one thing differ by about as
    much), unless its size is what the budget asks for."""
    parent_drop: float = 0.02
    """Accuracy that a scheme may lose to its parent."""
    same_accuracy: float = 0.002
    """Accuracies nearer than this are a tie, which latency decides."""
    balance: float = 0.02
    """Without a latency budget: accuracy worth giving up for speed."""
    predicted_slack: float = 0.25
    """A predicted latency rejects before training only when it is beyond the budget by this much."""


RULES = Rules()


@dataclass(frozen=True)
class Decision:
    """What `choose` found. `reason` is one sentence that names the rule."""

    chosen: str | None
    verdict: Verdict
    reason: str
    nearest: Nearest | None = None


@dataclass(frozen=True)
class Action:
    """What the loop does next: train this student at this size, or stop, and why."""

    kind: Literal["train", "stop"]
    reason: str
    student: str | None = None
    image_size: int | None = None


# --- verdicts ----------------------------------------------------------------------------------------------------------


def plan_verdicts(rows: Sequence[CandidateRow], budget: Budget, *, rules: Rules = RULES) -> list[CandidateRow]:
    """Before training: the rows, with those rejected that no training can bring within the latency, size or memory budget."""
    verdicts = []
    for row in rows:
        beyond = over(row, limits(budget), slack=rules.predicted_slack) if row.status == "accepted" else []
        verdicts.append(row.turned("rejected", "; ".join(beyond) + " (before training)", "plan") if beyond else row)
    return verdicts


def judge(rows: Sequence[CandidateRow], budget: Budget, teacher_accuracy: float | None = None, *, teacher_ms: float | None = None,
          rules: Rules = RULES) -> list[CandidateRow]:
    """The rows with the status and the reason that the rules give them; rows already rejected or failed stay as they are.

    Args:
        rows: every candidate, parents among them.
        budget: the limits.
        teacher_accuracy: the teacher's value of `budget.metric`; an agreement with the teacher is 1 for the teacher itself.
        teacher_ms: the teacher's latency on the same device, when measured.
        rules: the margins.
    """
    by_id = {row.id: row for row in rows}
    return [_judge_one(row, by_id.get(row.parent or ""), budget, floor(budget, teacher_accuracy), teacher_ms, rules) for row in rows]


def floor(budget: Budget, teacher_accuracy: float | None = None) -> float | None:
    """The accuracy that must be reached: the stricter of `min_accuracy` and the teacher's minus `max_drop`."""
    if teacher_accuracy is None and budget.metric.startswith("teacher_agreement"):
        teacher_accuracy = 1.0
    floors = [] if budget.min_accuracy is None else [budget.min_accuracy]
    if budget.max_drop is not None and teacher_accuracy is not None:
        floors.append(teacher_accuracy - budget.max_drop)
    return max(floors, default=None)


def _judge_one(row: CandidateRow, parent: CandidateRow | None, budget: Budget, least: float | None, teacher_ms: float | None,
               rules: Rules) -> CandidateRow:
    if row.status != "accepted":
        return row
    broken = [f"{name} does not match the student it came from" for name, c in sorted(row.components.items())
              if (c.parity or {}).get("passed") is False]
    if broken:
        return row.turned("failed", "; ".join(broken), "export")
    found: list[tuple[Stage, str]] = [("profile", r) for r in (*_fell_back(row), *_slower(row, parent, teacher_ms, rules, for_size=budget.size_mb is not None),
                                                               *over(row, limits(budget)))]
    if row.accuracy is None and not row.trained:
        found = found or [("train", "not trained: the loop stopped before it")]
    else:
        found += [("evaluate", r) for r in _inaccurate(row, parent, budget, least, rules)]
    return row.turned("rejected", "; ".join(r for _, r in found), found[0][0]) if found else row


def _fell_back(row: CandidateRow) -> list[str]:
    """A reduced precision that the runtime quietly runs as fp32. Weight-only schemes compute in float by design."""
    executed = {c.executed_precision for c in row.components.values() if c.executed_precision}
    if row.scheme == "fp32" or "weight_only" in row.scheme or executed != {"fp32"}:
        return []
    notes = [c.note for c in row.components.values() if c.note]
    return [f"asked for {row.scheme}, the runtime executed fp32" + (f" ({notes[0]})" if notes else "")]


def _slower(row: CandidateRow, parent: CandidateRow | None, teacher_ms: float | None, rules: Rules, *, for_size: bool) -> list[str]:
    if row.latency_ms is None:
        return []
    reasons, mine = [], row.latency_ms.p50
    # A measured latency is never held against a predicted one.
    if parent and parent.latency_ms and parent.latency_ms.provenance == row.latency_ms.provenance:
        other = parent.latency_ms.p50
        if mine > other * (1 - rules.faster) and not for_size:
            how = f"({mine / other:.2f}x slower)" if mine > other else f"(no faster: {rules.faster:.0%} is asked)"
            reasons.append(f"{row.scheme} took {ms(mine)}, its {parent.scheme} parent {ms(other)} {how}")
    if teacher_ms is not None and row.latency_ms.provenance == "measured" and mine >= teacher_ms:
        reasons.append(f"{ms(mine)} is no faster than the teacher's {ms(teacher_ms)}")
    return reasons


def _inaccurate(row: CandidateRow, parent: CandidateRow | None, budget: Budget, least: float | None, rules: Rules) -> list[str]:
    name, value = words(budget.metric), accuracy(row, budget.metric)
    if value is None:
        return [f"its {name} was not measured"]
    reasons, before = [], accuracy(parent, budget.metric) if parent else None
    if before is not None and before - value > rules.parent_drop:
        reasons.append(f"{row.scheme} lost {before - value:.3f} to its {parent.scheme if parent else 'float'} parent in {name} "
                       f"({before:.3f} to {value:.3f}, {rules.parent_drop:g} is allowed)")
    if least is not None and value < least:
        reasons.append(f"{name} {value:.3f} is below the floor of {least:.3f} by {least - value:.3f}")
    return reasons


# --- the choice --------------------------------------------------------------------------------------------------------


def choose(rows: Sequence[CandidateRow], budget: Budget, teacher_accuracy: float | None = None, *, rules: Rules = RULES) -> Decision:
    """The best of judged rows, or the nearest one and its gap."""
    able = [r for r in rows if r.status == "accepted" and accuracy(r, budget.metric) is not None]
    if not able:
        return _missed(rows, budget, teacher_accuracy)
    # What was measured on the target comes before what is only predicted for it.
    able = [r for r in able if _measured(r)] or able
    best = max(_known(r, budget.metric) for r in able)
    allowed = {"most-accurate": rules.same_accuracy, "balanced": rules.balance, "fastest": float("inf")}[objective(budget)]
    close = [r for r in able if _known(r, budget.metric) >= best - allowed]
    chosen = min(close, key=lambda r: (_took(r, budget), -_known(r, budget.metric), r.size_bytes or 0, r.id))
    reason = _why(chosen, able, best, budget, rules)
    if not _measured(chosen):
        how = chosen.latency_ms.provenance if chosen.latency_ms else "not known"
        return Decision(chosen.id, "unverified", f"{reason}; its latency is {how}, not measured on the target")
    if unknown := [limit.name for limit in limits(budget, floor(budget, teacher_accuracy)) if limit.of(chosen) is None]:
        return Decision(chosen.id, "unverified", f"{reason}; its {' and '.join(unknown)} could not be measured")
    return Decision(chosen.id, "met", reason)


def objective(budget: Budget) -> Literal["fastest", "most-accurate", "balanced"]:
    """What is chosen of all that keeps to the limits, with `auto` resolved."""
    if budget.objective != "auto":
        return budget.objective
    return "balanced" if latency_ceiling(budget) is None else "most-accurate"


def _why(chosen: CandidateRow, able: Sequence[CandidateRow], best: float, budget: Budget, rules: Rules) -> str:
    name, value = words(budget.metric), _known(chosen, budget.metric)
    took_words = f" and takes {ms(_took(chosen, budget))}" if chosen.latency_ms else ""
    among = f"of {len(able)} candidates" if len(able) > 1 else "and only candidate"
    ceiling = latency_ceiling(budget)
    within = f" within {ceiling:g} ms" if ceiling is not None else ""
    if objective(budget) == "fastest":
        return f"the fastest {among}{within} that keeps to the rest of the budget: {chosen.id} has {name} {value:.3f}{took_words}"
    if objective(budget) == "balanced":
        head = "without a latency budget" if budget.objective == "auto" else f"balanced{within}"
        return f"{head}, the fastest candidate within {rules.balance:g} of the best {name} ({best:.3f}): {chosen.id} has {value:.3f}{took_words}"
    tie = f" (within {rules.same_accuracy:g} of the best, {best:.3f}, and faster)" if value < best else ""
    return f"the most accurate {among}{within}: {chosen.id} has {name} {value:.3f}{tie}{took_words}"


def _missed(rows: Sequence[CandidateRow], budget: Budget, teacher_accuracy: float | None) -> Decision:
    found = limits(budget, floor(budget, teacher_accuracy))
    gaps = [(row, missed) for row in rows if row.status != "failed" and (missed := gap(row, found))]
    if not gaps:
        failed = sorted({r.reason for r in rows if r.status == "failed"})
        why = f"no candidate could be built ({failed[0]})" if rows and len(failed) and all(r.status == "failed" for r in rows) else \
            "every candidate was rejected, none of them for the budget" if rows else "there was no candidate to try"
        return Decision(None, "missed", why)
    row, missed = min(gaps, key=lambda pair: (pair[1].relative, _took(pair[0], budget), pair[0].id))
    return Decision(None, "missed", f"no candidate meets the budget; the nearest, {row.id}, misses it by {missed.words}", _nearest(row, missed, rows, found))


def _nearest(row: CandidateRow, missed: Gap, rows: Sequence[CandidateRow], found: Sequence[Limit]) -> Nearest:
    by = missed.by
    return Nearest(id=row.id, gap_ms=by.get("latency_ms"), gap_mb=by.get("size_mb"), gap_memory_mb=by.get("memory_mb"), gap_accuracy=by.get("accuracy"),
                   gaps=by, reason=row.reason or missed.words, give=give(rows, found))


# --- the loop ----------------------------------------------------------------------------------------------------------


def next_action(rows: Sequence[CandidateRow], budget: Budget, teacher_accuracy: float | None = None, *, max_students: int | None = None,
                rules: Rules = RULES) -> Action:
    """Train which student next, or stop. `rows` are planned ones (latency known, untrained) and those already trained and measured.

    Args:
        rows: every candidate.
        budget: the limits.
        teacher_accuracy: as for `judge`.
        max_students: (student, size) pairs that the recipe lets train.
        rules: the margins.
    """
    planned = plan_verdicts(rows, budget, rules=rules)
    trained = {(r.student, r.image_size) for r in rows if r.trained}
    left = rank(planned, budget_ms=None if objective(budget) == "fastest" else latency_ceiling(budget), trained=trained)
    decision = choose(judge([r for r in planned if r.trained], budget, teacher_accuracy, rules=rules), budget, teacher_accuracy, rules=rules)
    if not left:
        if trained:
            return Action("stop", "every student that can meet the budget has been trained")
        return Action("stop", f"nothing to train: {_missed(planned, budget, teacher_accuracy).reason}")
    if max_students is not None and len(trained) >= max_students:
        return Action("stop", f"{len(trained)} trained, as many as the recipe allows")
    if decision.chosen and objective(budget) != "balanced":
        chosen = next(r for r in rows if r.id == decision.chosen)
        left = _faster(left, chosen) if objective(budget) == "fastest" else _larger(left, chosen)
        if not left:
            better = "no faster student is left" if objective(budget) == "fastest" else "no larger student fits it"
            return Action("stop", f"{decision.chosen} meets the budget, and {better}")
    return Action("train", left[0].reason, left[0].student, left[0].image_size)


def _larger(proposals: Iterable[Proposal], chosen: CandidateRow) -> list[Proposal]:
    """Proposals with more capacity than what already meets the budget: a smaller one is unlikely to be more accurate."""
    return [p for p in proposals if p.capacity > float(chosen.params or 0) * chosen.image_size ** 2]


def _faster(proposals: Iterable[Proposal], chosen: CandidateRow) -> list[Proposal]:
    """Proposals that may be faster than what already meets the budget."""
    known = chosen.latency_ms
    return [p for p in proposals if p.planned_ms is None or known is None or p.planned_ms < known.p50]


# --- words and numbers -------------------------------------------------------------------------------------------------


def words(metric: str) -> str:
    """A metric's name in a sentence."""
    return METRICS.get(metric, metric)


def _measured(row: CandidateRow) -> bool:
    return row.latency_ms is not None and row.latency_ms.provenance == "measured"


def _known(row: CandidateRow, metric: str) -> float:
    value = accuracy(row, metric)
    assert value is not None
    return value


def _took(row: CandidateRow, budget: Budget) -> float:
    value = took(row.latency_ms, budget)
    return float("inf") if value is None else value
