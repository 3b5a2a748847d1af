"""The table that ends a run in the terminal. Understandable without colour: the chosen row has an arrow, statuses are words."""
from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edgekd.budget import accuracy
from edgekd.decision import words
from edgekd.report import words as say
from edgekd.report.html import ordered
from edgekd.report.schema import CandidateRow, Report

STYLES = {"chosen": "bold green", "accepted": "", "rejected": "dim", "failed": "red"}


def table(report: Report, page: Path | None = None) -> Group:
    """Candidates, why some were not taken (their first reason), the verdict in a sentence, the path of the page. Latencies are p50."""
    found = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1))
    metric = words(report.budget.metric).replace(" with the teacher", "").replace(" ", "\n", 1)
    for i, head in enumerate(("candidate", "encoder\nms", "decoder\nms", "total\nms", "faster", "size\nMB", metric, "verdict")):
        found.add_column(head, justify="right" if 0 < i < 7 else "left", no_wrap=i > 0, overflow="fold")
    for row in ordered(report):
        status = "chosen" if row.id == report.chosen else row.status
        found.add_row(*_cells(row, report, status), style=STYLES[status])
    against = [row for row in ordered(report) if row.status != "accepted"]
    why = Table.grid(padding=(0, 2))
    for row in against:
        why.add_row(Text(f"  {say.short(row, report)}"), Text(row.reason.split("; ")[0]), style="dim")
    parts: list[RenderableType] = [found]
    if against:
        parts += [Text("\nnot taken, because"), why]
    parts += [Text(""), Text(say.headline(report), style="bold"), Text(f"{report.reason}.")]
    if report.nearest and report.nearest.give:
        parts += [Text("what would have to give, one limit alone:"), *(Text(f"  {one}") for one in report.nearest.give)]
    if any(r.latency_ms and r.latency_ms.provenance != "measured" for r in report.candidates):
        parts.append(Text(f"{say.MARKS['predicted']} predicted, {say.MARKS['quoted']} quoted; the other numbers were measured"))
    if page is not None:
        parts += [Text(""), Text.assemble("report: ", (str(page), "underline"))]
    return Group(*parts)


def _cells(row: CandidateRow, report: Report, status: str) -> list[Text]:
    parts = [row.components[n].latency_ms if n in row.components else None for n in ("encoder", "decoder")]
    times = [f"{say.number_ms(v.p50)}{'' if v.provenance == 'measured' else say.MARKS[v.provenance]}" if v else say.DASH for v in (*parts, row.latency_ms)]
    cells = [f"{'> ' if status == 'chosen' else '  '}{row.id}", *times, say.times(say.ratio(row, report)), say.megabytes(row.size_bytes),
             say.score(accuracy(row, report.budget.metric)), status]
    return [Text(c) for c in cells]
