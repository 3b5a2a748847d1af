"""How the report says things: numbers with units, short names of candidates, the verdict as one sentence."""
from __future__ import annotations

import re

from edgekd.budget import MB, accuracy, latency_ceiling, ms
from edgekd.decision import words
from edgekd.report.schema import CandidateRow, Report

DASH, AGREEMENT = "–", "teacher_agreement.box"
MARKS = {"measured": "●", "predicted": "◐", "quoted": "○"}
VERDICTS = {"met": "Budget met", "missed": "Budget missed", "unverified": "Not verified on the device"}


def number_ms(value: float | None) -> str:
    """Milliseconds without the unit: 4.13, 41.3, 413."""
    return DASH if value is None else ms(value).removesuffix(" ms")


def megabytes(size: int | None) -> str:
    """Bytes as MB (10^6) without the unit."""
    return DASH if size is None else f"{size / MB:.0f}" if size >= 100 * MB else f"{size / MB:.1f}" if size >= MB else f"{size / MB:.2f}"


def score(value: float | None) -> str:
    """An accuracy of 0..1 with three digits."""
    return DASH if value is None else f"{value:.3f}"


def times(value: float | None) -> str:
    """A ratio: 11.2×."""
    return DASH if value is None else f"{value:.0f}×" if value >= 100 else f"{value:.1f}×" if value >= 2 else f"{value:.2f}×"


def millions(count: int | None) -> str:
    """A number of parameters: 5.1 M."""
    return DASH if count is None else f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count / 1e3:.0f} k"


def duration(seconds: float | None) -> str:
    """How long a run took: 2 min 41 s."""
    if seconds is None:
        return DASH
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def short(row: CandidateRow, report: Report) -> str:
    """The parts of a candidate's name in which the candidates differ."""
    rows = report.candidates
    parts = [row.student]
    if len({r.image_size for r in rows}) > 1:
        parts.append(str(row.image_size))
    if len({r.format for r in rows}) > 1:
        parts.append(row.format)
    return " ".join([*parts, row.scheme])


def ratio(a: CandidateRow, report: Report) -> float | None:
    """How many times faster than the teacher a candidate is; None unless both are known in the same way."""
    mine, base = a.latency_ms, report.teacher.latency_ms
    return base.p50 / mine.p50 if mine and base and mine.provenance == base.provenance else None


def limits(report: Report) -> list[str]:
    """The budget, limit by limit."""
    b, ceiling = report.budget, latency_ceiling(report.budget)
    tail = "" if b.percentile == "p50" else f" ({b.percentile})"
    said = [f"at least {b.fps:g} photos a second{tail}" if b.fps is not None else f"at most {ceiling:g} ms{tail}" if ceiling is not None else "",
            *(f"at most {most:g} ms for the {part}{tail}" for part, most in b.components.items()),
            f"at most {b.everything_ms:g} ms to segment everything{tail}" if b.everything_ms is not None else "",
            f"at most {b.size_mb:g} MB" if b.size_mb is not None else "", f"at most {b.memory_mb:g} MB of memory" if b.memory_mb is not None else "",
            f"at most {b.energy_mj:g} mJ" if b.energy_mj is not None else "",
            f"{words(b.metric)} of at least {b.min_accuracy:g}" if b.min_accuracy is not None else "",
            f"{words(b.metric)} at most {b.max_drop:g} below the teacher" if b.max_drop is not None else ""]
    return [s for s in said if s]


def device(report: Report) -> str:
    """What the numbers were taken on: the processor when it was this machine, else the device by its name."""
    name = report.environment.get("device") if report.target.transport == "local" else None
    found = str(name or report.target.device or report.target.name)
    for noise in (r"\((R|TM|r|tm)\)", r" CPU\b", r" @ [0-9.]+ ?GHz", r" Processor\b"):
        found = re.sub(noise, "", found)
    return found


def headline(report: Report) -> str:
    """The verdict in one sentence."""
    best = report.best
    if best is None:
        asked = f" of {' and '.join(limits(report))}" if limits(report) else ""
        return f"No candidate meets the budget{asked}."
    took = f"segments a photo in {ms(best.latency_ms.p50)}" if best.latency_ms else "was built, but not timed,"
    if best.latency_ms and best.latency_ms.provenance != "measured":
        took = f"should take {ms(best.latency_ms.p50)} ({best.latency_ms.provenance})"
    fast = f", {times(report.speedup.value)} faster than {report.teacher.name}" if report.speedup else ""
    value = accuracy(best, report.budget.metric)
    near = "" if value is None else f", and agrees with it at {value:.2f} IoU" if fast and report.budget.metric == AGREEMENT else \
        f", with {value:.2f} {words(report.budget.metric)}"
    return f"{best.student} {took} on {device(report)}{fast}{near}."
