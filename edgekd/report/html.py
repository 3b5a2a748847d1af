"""`report.html`: one file with everything in it, made from a report and its figures. No network, no time of day, no chance."""
from __future__ import annotations

import base64
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from edgekd.budget import accuracy
from edgekd.decision import RULES, words
from edgekd.measurement import Latency, Provenance
from edgekd.report import charts
from edgekd.report import words as say
from edgekd.report.figures import Curve, Overlay
from edgekd.report.schema import Accuracy, CandidateRow, ComponentRow, Report

TEMPLATES = Path(__file__).with_name("templates")
PREPROCESS = {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]}


@dataclass(frozen=True)
class Cell:
    """One number of the table: its text, a smaller line below, what to sort by ('' when unknown) and its provenance."""

    text: str
    sub: str = ""
    sort: str = ""
    provenance: str | None = None


@dataclass(frozen=True)
class Bar:
    """One model's time, as shares of the longest one's in percent."""

    name: str
    detail: str
    encoder: float
    decoder: float
    total: str
    split: str
    other: bool


def render(report: Report, overlays: Sequence[Overlay] = (), curves: Sequence[Curve] = ()) -> str:
    """The whole page. Every text of the report is escaped."""
    best = report.best
    return environment().get_template("report.html.j2").render(
        report=report, best=best, headline=say.headline(report), where=say.device(report), verdict=say.VERDICTS[report.verdict], limits=say.limits(report), rules=RULES,
        style=Markup((TEMPLATES / "style.css").read_text(encoding="utf-8")), script=Markup((TEMPLATES / "script.js").read_text(encoding="utf-8")),
        bars=bars(report), columns=columns(report), table=[(row, cells(row, report)) for row in ordered(report)], teacher_cells=teacher_cells(report),
        against=[c for c in ordered(report) if c.status != "accepted"], wide=charts.tradeoff(report, 1056, 400, "wide"), small=charts.tradeoff(report, 358, 320, "small"),
        overlays=overlays, curves=[(c, charts.curve(c)) for c in curves if len(c.steps) > 1], metric=words(report.budget.metric),
        score=accuracy(best, report.budget.metric) if best else None, pairs=pairs(report.environment), target=pairs(report.target.model_dump(exclude_none=True)),
        predict=predict(best) if best else "", snippet=snippet(best) if best else "")


@cache
def environment() -> Environment:
    """The templates with our filters; markup in any value is escaped, and a name that a template misspells is an error."""
    made = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=lambda name: name is None or ".html" in name, undefined=StrictUndefined,
                       trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    made.filters |= {"ms": say.number_ms, "mb": say.megabytes, "score": say.score, "times": say.times, "millions": say.millions,
                     "duration": say.duration, "data_uri": data_uri, "executed": executed}
    made.globals |= {"marks": say.MARKS}
    return made


def data_uri(jpeg: bytes) -> str:
    """A picture as part of the page."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()


def ordered(report: Report) -> list[CandidateRow]:
    """The chosen one, then the accepted by accuracy, then the rejected and the failed, each by latency."""
    metric, rank = report.budget.metric, {"accepted": 0, "rejected": 1, "failed": 2}

    def key(row: CandidateRow) -> tuple[bool, int, float, float, str]:
        value = accuracy(row, metric) if row.status == "accepted" else None
        return (row.id != report.chosen, rank[row.status], -(value or 0.0), row.latency_ms.p50 if row.latency_ms else float("inf"), row.id)

    return sorted(report.candidates, key=key)


# --- the table ---------------------------------------------------------------------------------------------------------


def columns(report: Report) -> list[str]:
    """Heads of the number columns; what no candidate has gets none."""
    return ["encoder, ms", "decoder, ms", "total, ms", "speed-up", "size, MB", *(["memory, MB"] if _has_memory(report) else []), *_scored(report)]


SCORES = {"agreement": {"teacher_agreement.box": "box", "teacher_agreement.center": "click"},
          "mIoU": {"box_miou": "box", "center_miou": "click", "center_plus1_miou": "2 clicks", "center_plus2_miou": "3 clicks"}}
"""Column -> metric -> its prompt; the first one known is the number of the column, the others stand below it."""


def cells(row: CandidateRow, report: Report) -> list[Cell]:
    """The numbers of one candidate, in the order of `columns`."""
    return [*_times(row.components, row.latency_ms), _ratio(say.ratio(row, report), row.latency_ms), _size(row.size_bytes),
            *([_size(row.peak_memory_bytes)] if _has_memory(report) else []), *_scores(row.accuracy, report, row.accuracy_provenance)]


def teacher_cells(report: Report) -> list[Cell]:
    """The same numbers of the teacher."""
    t = report.teacher
    return [*_times(t.components, t.latency_ms), _ratio(1.0, t.latency_ms) if t.latency_ms else Cell(say.DASH), _size(t.size_bytes),
            *([Cell(say.DASH)] if _has_memory(report) else []), *_scores(t.accuracy, report)]


def _times(components: Mapping[str, ComponentRow], total: Latency | None) -> list[Cell]:
    parts = [components[name].latency_ms if name in components else None for name in ("encoder", "decoder")]
    return [_latency(part) for part in parts] + [_latency(total, quantiles=True)]


def _latency(found: Latency | None, quantiles: bool = False) -> Cell:
    if found is None:
        return Cell(say.DASH)
    return Cell(say.number_ms(found.p50), f"p90 {say.number_ms(found.p90)}" if quantiles else "", str(found.p50), found.provenance)


def _ratio(value: float | None, latency: Latency | None) -> Cell:
    return Cell(say.times(value), sort=str(value), provenance=latency.provenance if latency else None) if value is not None else Cell(say.DASH)


def _size(size: int | None) -> Cell:
    return Cell(say.megabytes(size), sort=str(size), provenance="measured") if size is not None else Cell(say.DASH)


def _scores(found: Accuracy | None, report: Report, provenance: Provenance = "measured") -> Iterable[Cell]:
    for name in _scored(report):
        known = [(prompt, value) for metric, prompt in SCORES[name].items() if found and (value := found.value(metric)) is not None]
        ends = dict.fromkeys((known[1], known[-1])) if len(known) > 1 else ()  # one click, and the most clicks
        below = f"{known[1][0]} {' → '.join(f'{value:.2f}' for _, value in ends)}" if ends else ""
        yield Cell(f"{known[0][1]:.3f}", below, str(known[0][1]), provenance) if known else Cell(say.DASH)


def _scored(report: Report) -> list[str]:
    return [name for name, metrics in SCORES.items() if any(accuracy(r, m) is not None for r in report.candidates for m in metrics)]


def executed(components: Mapping[str, ComponentRow]) -> str:
    """The precision really executed, once when all parts agree: `bf16`, or `int8 / fp32` for encoder / decoder; what the file says where it did not run."""
    return " / ".join(dict.fromkeys(c.executed_precision + ("" if c.state == "ran" else f" ({c.state}, not run)")
                                    for c in components.values() if c.executed_precision))


def _has_memory(report: Report) -> bool:
    return any(r.peak_memory_bytes is not None for r in report.candidates)


# --- the rest ----------------------------------------------------------------------------------------------------------


def bars(report: Report) -> list[Bar]:
    """Where the time goes: the teacher, the float parent of what was chosen (or came nearest), and that one. Empty without a split."""
    best, t = report.shown, report.teacher
    parent = report.row(best.parent) if best else None
    shown: list[tuple[str, str, Mapping[str, ComponentRow], Latency | None, bool]] = [(t.name, "teacher", t.components, t.latency_ms, True)]
    shown += [(f"{r.student} {r.scheme}", f"{r.format}, {r.image_size} px", r.components, r.latency_ms, r is parent) for r in (parent, best) if r]
    timed = [(name, detail, *split, other) for name, detail, parts, total, other in shown if (split := _split(parts, total))]
    longest = max((total for _, _, _, _, total, _ in timed), default=0.0)
    # A bar is as long as the total; the medians of the parts, timed on their own, only divide it.
    return [Bar(name, detail, 100 * total / longest * e / (e + d), 100 * total / longest * d / (e + d), say.number_ms(total), f"{say.number_ms(e)} + {say.number_ms(d)}", other)
            for name, detail, e, d, total, other in timed] if len(timed) > 1 else []


def _split(parts: Mapping[str, ComponentRow], total: Latency | None) -> tuple[float, float, float] | None:
    found = [parts[n].latency_ms for n in ("encoder", "decoder") if n in parts]
    if len(found) != 2 or found[0] is None or found[1] is None:
        return None
    encoder, decoder = found[0].p50, found[1].p50
    return encoder, decoder, total.p50 if total else encoder + decoder


def pairs(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested mapping as lines of name and value."""
    lines: list[tuple[str, str]] = []
    for name, value in values.items():
        if value is None or value == [] or value == {}:
            continue
        if isinstance(value, Mapping):
            lines += pairs(value, f"{prefix}{name} ")
        else:
            lines.append((f"{prefix}{name}".replace("_", " "), ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)))
    return lines


def predict(best: CandidateRow) -> str:
    """The command that uses the artifact."""
    return f"edgekd predict {shlex.quote(f'artifacts/{best.id}')} photo.jpg --point 320,240 --output mask.png"


def snippet(best: CandidateRow) -> str:
    """A program that uses the files without edgekd; empty for a format that Python cannot run."""
    if not (TEMPLATES / f"use_{best.format}.py.j2").is_file():
        return ""
    hint = best.scheme if best.scheme in ("bf16", "f16") else "f32"
    return environment().get_template(f"use_{best.format}.py.j2").render(size=best.image_size, hint=hint, **PREPROCESS).rstrip()
