"""The charts of the page: SVG made by hand, so that it is small, prints, follows the page's colours and needs no script.

Colours come from CSS classes of the page. `Markup.format` escapes every text.
"""
from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from edgekd.budget import accuracy, latency_ceiling, ms
from edgekd.decision import words
from edgekd.report.figures import Curve
from edgekd.report.schema import CandidateRow, Report
from edgekd.report.words import score, short
from edgekd.search.pareto import front

NARROW = 500  # below this width the chart keeps to the words that matter
LETTER = 6.4  # mean width of a letter at 12 px
# Where a name may stand, best first: anchor and offset from its point.
PLACES = (("start", 14, 4), ("middle", 0, -16), ("end", -14, 4), ("start", 8, -13), ("end", -8, -13), ("middle", 0, 26), ("start", 8, 22), ("end", -8, 22))
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Axis:
    """Values to pixels: `lo..hi` of the data on `start..end` of the picture."""

    lo: float
    hi: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        f: Callable[[float], float] = math.log10 if self.log else float
        return self.start + (f(value) - f(self.lo)) / (f(self.hi) - f(self.lo)) * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        """About `count` round numbers within the axis."""
        if self.log:
            decades = range(math.floor(math.log10(self.lo)) - 1, math.ceil(math.log10(self.hi)) + 1)
            for steps in ((1, 2, 5), (1, 3), (1,)):
                found = [s * 10.0 ** d for d in decades for s in steps if self.lo <= s * 10.0 ** d <= self.hi]
                if len(found) <= count + 2:
                    break
            return found
        raw = (self.hi - self.lo) / count
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= raw * 0.999)
        first = math.ceil(self.lo / step - 1e-9)
        return [round(i * step, 12) for i in range(first, math.floor(self.hi / step + 1e-9) + 1)]


def spread(values: Sequence[float], start: float, end: float, *, log: bool = False, pad: float = 0.08) -> Axis:
    """An axis that holds all values with some air around them."""
    lo, hi = min(values), max(values)
    if log:
        air = max(math.log10(hi / lo) * pad, 0.05)
        return Axis(lo / 10 ** air, hi * 10 ** air, start, end, log=True)
    air = max((hi - lo) * pad, abs(hi) * 0.02, 1e-6)
    return Axis(lo - air, hi + air, start, end)


def tradeoff(report: Report, width: int, height: int, css: str = "") -> Markup:
    """Accuracy against latency: every measured candidate, the front, the teacher, and the budget. Empty without two points."""
    metric = report.budget.metric
    rows = [r for r in report.candidates if r.latency_ms and accuracy(r, metric) is not None and r.status != "failed"]
    if len(rows) < 2:
        return Markup("")
    teacher = _teacher_point(report)
    xs = [_x(r) for r in rows] + ([teacher[0]] if teacher else []) + ([limit] if (limit := latency_ceiling(report.budget)) else [])
    ys = [_y(r, metric) for r in rows] + ([teacher[1]] if teacher else [])
    log = max(xs) > 6 * min(xs)
    x, y = spread(xs, 52, width - 14, log=log), spread(ys, height - 44, 16, pad=0.1)
    top = Axis(y.lo, min(y.hi, 1.02), y.start, y.end)
    parts = [*_grid(x, top, width, height, f"latency, ms (p50 of encoder and decoder{', log scale' if log else ''})"), *_budget(report, x, top)]
    kept = front([r for r in rows if r.status == "accepted"], _x, lambda r: _y(r, metric))
    parts += _steps(kept, metric, x, top)
    labels = _Labels(width, [*_covered(kept, metric, x, top), *((x(_x(r)) - 5, top(_y(r, metric)) - 5, x(_x(r)) + 5, top(_y(r, metric)) + 5) for r in rows)])
    if teacher:
        parts += _teacher(report.teacher.name, x(teacher[0]), top(teacher[1]), labels)
    parts += [_dot(r, report, x, top) for r in sorted(rows, key=lambda r: (r.id == report.chosen, r.status == "accepted"))]
    parts += _names(kept, report, x, top, labels)
    title = f"{words(metric)[0].upper()}{words(metric)[1:]} against latency"
    return _svg(width, height, title, [*parts, Markup('<text class="axis" x="8" y="10">{}</text>').format(words(metric))], css)


def curve(found: Curve, width: int = 330, height: int = 184) -> Markup:
    """How one student learned: loss over steps, on a log scale when it fell far."""
    if len(found.steps) < 2:
        return Markup("")
    log = min(found.values) > 0 and max(found.values) > 8 * min(found.values)
    x = Axis(min(found.steps), max(max(found.steps), min(found.steps) + 1), 48, width - 10)
    y = spread(found.values, height - 44, 12, log=log)
    path = " ".join(f"{'L' if i else 'M'}{x(s):.1f} {y(v):.1f}" for i, (s, v) in enumerate(zip(found.steps, found.values, strict=True)))
    end = (x(found.steps[-1]), y(found.values[-1]))
    parts = _grid(x, y, width, height, "steps", ticks=(4, 3))
    parts += [Markup('<path class="line" d="{}"/><circle class="dot chosen" cx="{:.1f}" cy="{:.1f}" r="3.5"/>').format(path, *end),
              Markup('<text class="label" x="{:.1f}" y="{:.1f}" text-anchor="end">{}</text>').format(end[0], max(end[1] - 9, 10), f"{found.values[-1]:.3g}")]
    return _svg(width, height, f"{found.what} of {found.student}, {found.stage}, from {found.values[0]:.3g} to {found.values[-1]:.3g}", parts)


# --- parts -------------------------------------------------------------------------------------------------------------


def _svg(width: int, height: int, title: str, parts: Sequence[Markup], css: str = "") -> Markup:
    head = Markup('<svg class="{css}" viewBox="0 0 {w} {h}" style="max-width:{w}px" role="img" aria-label="{title}">').format(css=css, w=width, h=height, title=title)
    return head + Markup("\n").join(parts) + Markup("</svg>")


def _grid(x: Axis, y: Axis, width: int, height: int, below: str, ticks: tuple[int, int] = (6, 5)) -> list[Markup]:
    parts = []
    for t in y.ticks(ticks[1]):
        parts.append(Markup('<line class="grid" x1="{a:.1f}" x2="{b:.1f}" y1="{v:.1f}" y2="{v:.1f}"/><text class="tick" x="{c:.1f}" y="{d:.1f}" '
                            'text-anchor="end">{t:.4g}</text>').format(a=x.start, b=x.end, v=y(t), c=x.start - 7, d=y(t) + 4, t=t))
    for t in x.ticks(ticks[0] if width > NARROW else 4):
        parts.append(Markup('<line class="tickmark" x1="{v:.1f}" x2="{v:.1f}" y1="{a:.1f}" y2="{b:.1f}"/><text class="tick" x="{v:.1f}" y="{c:.1f}" '
                            'text-anchor="middle">{t:.6g}</text>').format(v=x(t), a=y.start, b=y.start + 4, c=y.start + 17, t=t))
    parts.append(Markup('<line class="base" x1="{:.1f}" x2="{:.1f}" y1="{v:.1f}" y2="{v:.1f}"/>').format(x.start, x.end, v=y.start))
    parts.append(Markup('<text class="axis" x="{:.1f}" y="{:.1f}" text-anchor="end">{}</text>').format(x.end, height - 6, below if width > NARROW or len(below) < 20 else below.split(" (")[0]))
    return parts


def _budget(report: Report, x: Axis, y: Axis) -> list[Markup]:
    limit = latency_ceiling(report.budget)
    if limit is None:
        return []
    at = x(limit)
    return [Markup('<rect class="within" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(x.start, y.end, at - x.start, y.start - y.end),
            Markup('<line class="limit" x1="{v:.1f}" x2="{v:.1f}" y1="{:.1f}" y2="{:.1f}"/>').format(y.end, y.start, v=at),
            Markup('<text class="axis" x="{:.1f}" y="{:.1f}" text-anchor="{}">budget {:g} ms</text>').format(
                *((at + 6, y.start - 8, "start") if at - x.start < 100 else (at - 6, y.start - 8, "end")), limit)]


def _steps(kept: Sequence[CandidateRow], metric: str, x: Axis, y: Axis) -> list[Markup]:
    """The front as a line of steps, not slopes: nothing lies between two candidates."""
    if len(kept) < 2:
        return []
    path = f"M{x(_x(kept[0])):.1f} {y(_y(kept[0], metric)):.1f}" + "".join(f"H{x(_x(r)):.1f}V{y(_y(r, metric)):.1f}" for r in kept[1:])
    return [Markup('<path class="front" d="{}"/>').format(path)]


def _covered(kept: Sequence[CandidateRow], metric: str, x: Axis, y: Axis) -> list[Box]:
    """What the steps cover, for the labels to keep off."""
    at = [(x(_x(r)), y(_y(r, metric))) for r in kept]
    level = [(a[0], a[1] - 1, b[0], a[1] + 1) for a, b in itertools.pairwise(at)]
    return level + [(b[0] - 1, b[1], b[0] + 1, a[1]) for a, b in itertools.pairwise(at)]


def _dot(row: CandidateRow, report: Report, x: Axis, y: Axis) -> Markup:
    kind = "chosen" if row.id == report.chosen else row.status
    cx, cy = x(_x(row)), y(_y(row, report.budget.metric))
    assert row.latency_ms is not None
    tip = f"{short(row, report)}\n{ms(row.latency_ms.p50)} {row.latency_ms.provenance}, {score(_y(row, report.budget.metric))}"
    tip += f"\n{row.status}: {row.reason}" if row.reason else f"\n{row.status}"
    halo = Markup('<circle class="halo" cx="{:.1f}" cy="{:.1f}" r="11"/>').format(cx, cy) if kind == "chosen" else Markup("")
    mark = Markup('<path class="dot rejected" d="M{a:.1f} {c:.1f}L{b:.1f} {d:.1f}M{b:.1f} {c:.1f}L{a:.1f} {d:.1f}"/>').format(
        a=cx - 4, b=cx + 4, c=cy - 4, d=cy + 4) if kind == "rejected" else Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="{}"/>').format(
        kind, cx, cy, 6 if kind == "chosen" else 5)
    target = Markup('<circle class="hit" cx="{:.1f}" cy="{:.1f}" r="13"/>').format(cx, cy)
    return Markup('<g class="point" tabindex="0" data-id="{}" data-tip="{}" aria-label="{}">').format(row.id, tip, tip.replace("\n", ", ")) + halo + mark + target + Markup("</g>")


def _teacher(name: str, cx: float, cy: float, labels: _Labels) -> list[Markup]:
    labels.taken.append((cx - 6, cy - 6, cx + 6, cy + 6))
    mark = Markup('<path class="dot teacher" d="M{x:.1f} {t:.1f}L{r:.1f} {y:.1f}L{x:.1f} {b:.1f}L{l:.1f} {y:.1f}Z"/>').format(
        x=cx, y=cy, t=cy - 7, b=cy + 7, l=cx - 7, r=cx + 7)
    return [mark, labels.place(f"{name} (teacher)", cx, cy, "label soft")]


def _names(kept: Sequence[CandidateRow], report: Report, x: Axis, y: Axis, labels: _Labels) -> list[Markup]:
    """Names of the chosen (or nearest) one and of the front; the rest say theirs when pointed at."""
    metric, best = report.budget.metric, report.shown
    named = ([best] if best and best.latency_ms and accuracy(best, metric) is not None else []) + [r for r in kept if r is not best]
    if labels.width < NARROW:
        named = named[:1]
    return [labels.place(short(r, report), x(_x(r)), y(_y(r, metric)), "label" if r is best else "label soft", always=r is best) for r in named]


class _Labels:
    """Places names beside points where they cover no point and no other name; a name that fits nowhere is left out."""

    def __init__(self, width: float, taken: list[Box]) -> None:
        self.width, self.taken = width, taken

    def place(self, text: str, cx: float, cy: float, kind: str, *, always: bool = False) -> Markup:
        """The text element; empty when there is no room, unless it must be there `always` (then over whatever is in its way)."""
        wide = len(text) * LETTER
        inside: list[tuple[bool, int, str, int, int, Box]] = []
        for anchor, dx, dy in PLACES:
            left = cx + dx - {"start": 0.0, "middle": wide / 2, "end": wide}[anchor]
            box = (left - 5, cy + dy - 11, left + wide + 5, cy + dy + 3)
            if left >= 54 and left + wide <= self.width - 2 and box[1] >= 12:
                free = not any(_overlap(box, other) for other in self.taken if not _around(other, cx, cy))
                inside.append((not free, len(inside), anchor, dx, dy, box))
        if not inside or ((best := min(inside))[0] and not always):
            return Markup("")
        _, _, anchor, dx, dy, box = best
        self.taken.append(box)
        return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(kind, cx + dx, cy + dy, anchor, text)


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _around(box: Box, x: float, y: float) -> bool:
    """Whether a box is the point's own mark."""
    return abs((box[0] + box[2]) / 2 - x) < 1e-6 and abs((box[1] + box[3]) / 2 - y) < 1e-6


def _teacher_point(report: Report) -> tuple[float, float] | None:
    value = 1.0 if report.budget.metric.startswith("teacher_agreement") else \
        report.teacher.accuracy.value(report.budget.metric) if report.teacher.accuracy else None
    return (report.teacher.latency_ms.p50, value) if report.teacher.latency_ms and value is not None else None


def _x(row: CandidateRow) -> float:
    assert row.latency_ms is not None
    return row.latency_ms.p50


def _y(row: CandidateRow, metric: str) -> float:
    value = accuracy(row, metric)
    assert value is not None
    return value


