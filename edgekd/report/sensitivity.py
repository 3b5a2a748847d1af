"""What 8 bits cost layer by layer, as a page that stands alone: a bar a layer, and the walk that returns the worst to float."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from markupsafe import Markup

from edgekd.report.charts import curve
from edgekd.report.figures import Curve
from edgekd.workspace import write_atomic

WIDTH, ROW, NAME, MOST = 900, 18, 300, 60
STYLE = """body { font: 14px sans-serif; color: #374151; background: #fff; margin: 2rem auto; max-width: 920px; padding: 0 1rem } h1 { font-size: 1.3rem }
h2 { font-size: 1rem; margin-top: 2rem } svg { width: 100%; height: auto } text { font: 12px sans-serif; fill: #374151 } .axis, .tick { font-size: 11px; fill: #6b7280 }
.grid { stroke: #e5e7eb } .base, .tickmark { stroke: #9ca3af } .line { fill: none; stroke: #2563eb; stroke-width: 1.6 } .dot { fill: #2563eb } .bar { fill: #2563eb }
.negative { fill: #9ca3af } p { line-height: 1.45 }
@media (prefers-color-scheme: dark) { body { background: #111827; color: #d1d5db } text { fill: #d1d5db } .grid { stroke: #374151 } .axis, .tick { fill: #9ca3af } }"""


class Bar(Protocol):
    """A layer and what it costs."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def miou_drop(self) -> float: ...
    @property
    def sqnr_db(self) -> float: ...


class Kept(Protocol):
    """All layers rounded but so many."""

    @property
    def kept(self) -> int: ...
    @property
    def miou_drop(self) -> float: ...


class Found(Protocol):
    """`edgekd.quantization.sensitivity.Sensitivity`."""

    @property
    def component(self) -> str: ...
    @property
    def photos(self) -> int: ...
    @property
    def instances(self) -> int: ...
    @property
    def measure(self) -> str: ...
    @property
    def layers(self) -> Sequence[Bar]: ...
    @property
    def cumulative(self) -> Sequence[Kept]: ...


def page(path: Path, title: str, found: Found) -> Path:
    """Write the page at `path`, atomically."""
    steps = found.cumulative
    walk = curve(Curve("points lost", "layers in float", tuple(s.kept for s in steps), tuple(s.miou_drop for s in steps)), WIDTH, 260)
    rest = Markup("<p>{} further layers cost less.</p>").format(len(found.layers) - MOST) if len(found.layers) > MOST else ""
    body = Markup("""<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title><style>{style}</style>
<h1>{title}</h1><p>Points (0..100) of {measure}; {photos} photos, {instances} instances. Rounding is computed in torch, so no runtime is in these numbers.</p>
<h2>One layer of the {component} rounded alone</h2>{bars}{rest}<h2>All rounded but the most sensitive ones: points lost, by layers in float</h2>{walk}</html>
""").format(title=title, style=Markup(STYLE), measure=found.measure, photos=found.photos, instances=found.instances, component=found.component,
            bars=_bars(found.layers[:MOST]), rest=rest, walk=walk or Markup("<p>{:.3g} points with all rounded.</p>").format(steps[0].miou_drop))
    return write_atomic(path, body)


def _bars(layers: Sequence[Bar]) -> Markup:
    most = max([layer.miou_drop for layer in layers] + [1e-9])
    parts = []
    for i, layer in enumerate(layers):
        y, length = i * ROW, max(0.0, layer.miou_drop) / most * (WIDTH - NAME - 190)
        parts.append(Markup('<text x="{}" y="{}" text-anchor="end">{}</text><rect class="bar" x="{}" y="{}" width="{:.1f}" height="{}"/><text x="{:.1f}" y="{}">{:.3g}'
                            '<title>{}</title></text><text class="tick" x="{}" y="{}" text-anchor="end">{:.0f} dB</text>').format(
            NAME - 8, y + 13, layer.name, NAME, y + 3, max(length, 1.0), ROW - 6, NAME + max(length, 1.0) + 6, y + 13, layer.miou_drop, layer.kind, WIDTH - 4, y + 13, layer.sqnr_db))
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="mask IoU lost by each layer">{}</svg>').format(WIDTH, len(layers) * ROW + 4, Markup("").join(parts))
