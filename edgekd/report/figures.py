"""The pictures and curves of a report, kept in `report/` of the run folder so that the page can be made again from files alone.

    report/figures.json   what belongs to what
    report/00-0.jpg ...   the panels of the overlays
"""
from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from edgekd.errors import EdgekdError
from edgekd.workspace import write_atomic, write_json

FOLDER = "report"


@dataclass(frozen=True)
class Panel:
    """One picture with its label, as JPEG bytes."""

    label: str
    jpeg: bytes


@dataclass(frozen=True)
class Overlay:
    """Pictures of one photo side by side. `title` is usually the file's name: text of the user, never trusted as markup."""

    title: str
    caption: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Curve:
    """How a student learned in one stage: `values[i]` (a loss or a score, see `what`) after `steps[i]` optimizer steps."""

    student: str
    stage: str
    steps: tuple[int, ...]
    values: tuple[float, ...]
    what: str = "loss"

    def __post_init__(self) -> None:
        if len(self.steps) != len(self.values):
            raise ValueError(f"{len(self.steps)} steps but {len(self.values)} values")
        if not all(math.isfinite(v) for v in self.values):
            raise ValueError(f"the {self.what} of {self.student} holds a value that is not a number")


def save(run_folder: Path, overlays: Sequence[Overlay], curves: Sequence[Curve]) -> Path:
    """Write the figures; `figures.json` last, so that it never names a picture that is not there."""
    folder = Path(run_folder) / FOLDER
    listed = []
    for i, overlay in enumerate(overlays):
        panels = []
        for j, panel in enumerate(overlay.panels):
            file = f"{i:02d}-{j}.jpg"
            write_atomic(folder / file, panel.jpeg)
            panels.append({"label": panel.label, "file": file})
        listed.append({"title": overlay.title, "caption": overlay.caption, "panels": panels})
    return write_json(folder / "figures.json", {"overlays": listed, "curves": [asdict(c) for c in curves]})


def load(run_folder: Path) -> tuple[list[Overlay], list[Curve]]:
    """The figures of a run; none when it has none.

    Raises:
        EdgekdError: they are damaged.
    """
    folder = Path(run_folder) / FOLDER
    index = folder / "figures.json"
    if not index.is_file():
        return [], []
    try:
        found = json.loads(index.read_text(encoding="utf-8"))
        overlays = [Overlay(o["title"], o["caption"], tuple(Panel(p["label"], (folder / Path(p["file"]).name).read_bytes()) for p in o["panels"]))
                    for o in found["overlays"]]
        curves = [Curve(c["student"], c["stage"], tuple(c["steps"]), tuple(c["values"]), c["what"]) for c in found["curves"]]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise EdgekdError(f"the report's figures cannot be read: {e}", where=index,
                          hint="delete this folder to make the report without figures") from e
    return overlays, curves
