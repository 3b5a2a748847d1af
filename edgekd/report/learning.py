"""The learning curves of one training as a picture that stands alone: a panel a stage, from `log.jsonl`."""
from __future__ import annotations

from itertools import groupby
from pathlib import Path

from markupsafe import Markup

from edgekd.distillation.tracking import read
from edgekd.report.charts import curve
from edgekd.report.figures import Curve
from edgekd.workspace import write_atomic

WIDTH, HEIGHT, ACROSS = 330, 184, 2
STYLE = """text { font: 12px sans-serif; fill: #374151 } .axis, .tick { font-size: 11px; fill: #6b7280 } .grid { stroke: #e5e7eb } .base, .tickmark { stroke: #9ca3af }
.line { fill: none; stroke: #2563eb; stroke-width: 1.6 } .dot { fill: #2563eb } .title { font-weight: 600 }"""


def draw(log: Path) -> str | None:
    """Write `curve.svg` beside a log; its path, or None where no stage has two steps with a finite loss."""
    rows = [r for r in read(log) if r["loss"] is not None] if log.is_file() else []
    found = [Curve("", stage, tuple(r["step"] for r in own), tuple(r["loss"] for r in own)) for stage, own in
             ((stage, list(group)) for stage, group in groupby(rows, key=lambda r: r["stage"]))]
    panels = [(c.stage, curve(c, WIDTH, HEIGHT)) for c in found if len(c.steps) > 1]
    if not panels:
        return None
    down = -(-len(panels) // ACROSS)
    size = (min(len(panels), ACROSS) * (WIDTH + 20), down * (HEIGHT + 34))
    parts = [Markup('<svg x="{}" y="{}" width="{}" height="{}">{}</svg><text class="title" x="{}" y="{}">{}</text>').format(
        i % ACROSS * (WIDTH + 20), i // ACROSS * (HEIGHT + 34) + 24, WIDTH, HEIGHT, panel, i % ACROSS * (WIDTH + 20) + 10, i // ACROSS * (HEIGHT + 34) + 16, f"loss, {stage}")
        for i, (stage, panel) in enumerate(panels)]
    page = Markup('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}"><style>{}</style><rect width="100%" height="100%" fill="#fff"/>{}</svg>\n')
    return str(write_atomic(log.with_name("curve.svg"), page.format(*size, STYLE, Markup("").join(parts))))
