"""How training went, in files that any tool reads: `log.jsonl` as it goes, `log.csv` at the end, TensorBoard when asked for.

A row a step: stage, step, loss, learning rate, gradient norm, and each objective's share of the loss. A run that goes on after a kill logs the
steps since its last checkpoint again; the last row of a step is the one that counts.
"""
from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgekd.errors import UsageError
from edgekd.workspace import write_atomic

Row = dict[str, Any]
FIRST = ("stage", "step", "loss", "lr", "norm")


class Tracker:
    """Writes the log of one run into `folder`.

    Args:
        tensorboard: write event files into `folder/tensorboard` too.

    Raises:
        UsageError: TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path, *, tensorboard: bool = False) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._writer = summary_writer(self.folder / "tensorboard") if tensorboard else None
        self._file = open(self.folder / "log.jsonl", "a", encoding="utf-8")  # noqa: SIM115  closed in close()

    def log(self, stage: str, row: Row) -> None:
        """One step; on disk when this returns."""
        self._file.write(json.dumps({"stage": stage, **{k: _short(v) for k, v in row.items()}}) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in row.items():
                if name != "step" and value is not None:
                    self._writer.add_scalar(f"{stage}/{name}", value, row["step"])

    def close(self) -> None:
        """Finish the files; `log.csv` holds every step once."""
        self._file.close()
        rows = read(self.folder / "log.jsonl")
        if rows:
            write_atomic(self.folder / "log.csv", as_csv(rows))
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read(path: Path) -> list[Row]:
    """The rows of a `log.jsonl`, every step of a stage once, in the order of stages and steps; a last line that was cut short is left out."""
    found: dict[tuple[str, int], Row] = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        found.pop((row["stage"], row["step"]), None)
        found[row["stage"], row["step"]] = row
    stages = list(dict.fromkeys(stage for stage, _ in found))
    return sorted(found.values(), key=lambda row: (stages.index(row["stage"]), row["step"]))


def as_csv(rows: Sequence[Row]) -> str:
    """A table with a column for everything that any row has."""
    columns = [*FIRST, *sorted({name for row in rows for name in row} - set(FIRST))]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def summary_writer(folder: Path) -> Any:
    """TensorBoard's writer. Raises UsageError when it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise UsageError("TensorBoard is not installed", hint="pip install 'edgekd[tracking]', or leave --tensorboard out: log.jsonl and log.csv are always written") from e
    return SummaryWriter(str(folder))


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value
