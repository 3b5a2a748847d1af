"""The report of a run: `report.json` for programs, `report.html` for people, `MODEL_CARD.md` for whoever gets the model.

The page and the card are made from files alone (`report.json` and the figures in `report/`), so `rebuild` makes them again at any
time. Importing this package loads neither the templates nor the drawing.
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgekd.report import schema
from edgekd.report.schema import Report
from edgekd.workspace import write_atomic

if TYPE_CHECKING:
    from rich.console import Group

    from edgekd.report.figures import Curve, Overlay

__all__ = ["Report", "rebuild", "terminal_table", "write"]


def write(run_folder: Path, report: Report, overlays: Sequence[Overlay] = (), curves: Sequence[Curve] = ()) -> Path:
    """Write report.json, the figures, report.html and MODEL_CARD.md, each atomically; the path of the page."""
    from edgekd.report import figures

    figures.save(run_folder, overlays, curves)
    schema.save(Path(run_folder) / "report.json", report)
    return rebuild(run_folder)


def rebuild(run_folder: Path) -> Path:
    """Make the page and the card again from the files of a run; the path of the page.

    Raises:
        EdgekdError: the run has no report yet, or its files are damaged.
    """
    from edgekd.report import card, figures, html

    folder = Path(run_folder)
    report = schema.load(folder / "report.json")
    write_atomic(folder / "MODEL_CARD.md", card.render(report))
    return write_atomic(folder / "report.html", html.render(report, *figures.load(folder)))


def terminal_table(report: Report, page: Path | None = None) -> Group:
    """What `compress` ends with: the candidates, the chosen one set off, the verdict and where the page is."""
    from edgekd.report import terminal

    return terminal.table(report, page)
