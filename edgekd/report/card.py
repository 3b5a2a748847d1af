"""`MODEL_CARD.md`: what the model is, how it was made, its numbers with their protocol and provenance, its limits, how to run it."""
from __future__ import annotations

from collections.abc import Iterable

from edgekd.decision import words
from edgekd.measurement import Latency
from edgekd.report import html
from edgekd.report import words as say
from edgekd.report.schema import METRICS, CandidateRow, Report


def render(report: Report) -> str:
    """The card as Markdown. Names from outside cannot break out of a line or a table."""
    best = report.best
    clean = Report.model_validate(_clean(report.document()))
    found = ", ".join(f"{name} {value}" for name, value in html.pairs(clean.environment)) or "no environment was recorded"
    return html.environment().get_template("MODEL_CARD.md.j2").render(
        report=clean, best=clean.best, headline=say.headline(clean), where=say.device(clean), numbers=list(_numbers(clean, clean.best)) if clean.best else [],
        environment=found, predict=html.predict(best) if best else "", snippet=html.snippet(best) if best else "")


def _numbers(report: Report, best: CandidateRow) -> Iterable[tuple[str, str, str]]:
    parts = [(f"latency, {name}", c.latency_ms) for name, c in best.components.items()]
    for name, latency in [("latency, total", best.latency_ms), *parts]:
        if latency:
            yield name, _quantiles(latency), latency.provenance
    if report.speedup:
        yield f"speed-up against {report.speedup.baseline}", say.times(report.speedup.value), report.speedup.provenance
    for name, size in (("size on disk", best.size_bytes), ("peak memory", best.peak_memory_bytes)):
        if size is not None:
            yield name, f"{say.megabytes(size)} MB", "measured"
    for metric in METRICS:
        value = best.accuracy.value(metric) if best.accuracy else None
        if value is not None:
            yield words(metric), say.score(value), best.accuracy_provenance
    for name, part in best.components.items():
        for what, number in (part.parity or {}).items():
            if isinstance(number, float):
                yield f"parity, {name}: {what.replace('_', ' ')}", f"{number:.6g}", "predicted" if part.stand_in else "measured"


def _quantiles(latency: Latency) -> str:
    return f"{say.number_ms(latency.p50)} / {say.number_ms(latency.p90)} / {say.number_ms(latency.p99)} ms"


def _clean(value: object) -> object:
    """The same document, its texts on one line and without what Markdown would take for markup."""
    if isinstance(value, str):
        return " ".join(value.split()).replace("|", "/").replace("`", "'").replace("<", "‹").replace(">", "›")
    if isinstance(value, dict):
        return {name: _clean(v) for name, v in value.items()}
    return [_clean(v) for v in value] if isinstance(value, list) else value
