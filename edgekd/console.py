"""What a person sees while a verb works: logs, warnings and progress, all on stderr. Data goes to stdout, by `emit` and `table`.

On a terminal, progress is one live bar. Anywhere else (a pipe, a log file, `--json`) it is a plain line at most every
five seconds, so that a log stays readable and nothing but the document reaches stdout.
"""
from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any, Protocol

PLAIN_INTERVAL_S = 5.0

_plain = False


class Progress(Protocol):
    """What `progress` yields: count what is done and show what matters beside it."""

    def advance(self, n: int = 1, **fields: object) -> None:
        """`n` more are done; `fields` (`loss=0.31`) are shown until the next call replaces them."""
        ...


@dataclass(frozen=True)
class Place:
    """Which process of a launch (`torchrun`, `accelerate launch`) this is: `rank` of `world`, `local` on its machine."""

    rank: int = 0
    world: int = 1
    local: int = 0


_loud = _met = False


def place() -> Place:
    """From what launchers set. One process alone unless all of it is there and makes sense: a shell may hold leftovers of anything."""
    try:
        rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        _ = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError):
        return Place()
    return Place(rank, world, local) if 0 <= rank < world and local >= 0 else Place()


def one_voice(run: Callable[[], int]) -> int:
    """Run a verb so that of several processes only the first is heard, and of another no more than the error that it ends with, if `speak`
    was called; the first on each machine also when it fails before the processes have met."""
    here = place()
    if here.world > 1:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # each process of torch's repeats the same remarks
    if here.rank == 0:
        return run()
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        code = run()
    if code and (_loud or (here.local == 0 and not _met)):
        text = said.getvalue()
        print(f"process {here.rank}: {text[max(0, text.rfind('error: ')):].rstrip()}", file=sys.stderr, flush=True)
    return code


def met() -> None:
    """The processes of this launch know each other now: `speak` decides who tells an error."""
    global _met
    _met = True


def speak() -> None:
    """Let this process tell the error that it ends with."""
    global _loud
    _loud = True


def plain(on: bool = True) -> None:
    """Never draw: plain lines even on a terminal (`--json` sets it)."""
    global _plain
    _plain = on


def interactive() -> bool:
    """Whether stderr is a terminal that a live bar may be drawn on."""
    return not _plain and sys.stderr.isatty()


def log(message: str) -> None:
    """One line about what happens now."""
    print(message, file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """One line about what went on but not as expected."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


def emit(document: Any) -> None:
    """The one JSON document of `--json`, on stdout. NaN and infinity become null: they are not JSON."""
    print(json.dumps(_finite(document), indent=2, ensure_ascii=False, default=str), flush=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str | None = None) -> None:
    """A table for people, on stdout; numbers are aligned right, None is a dash."""
    from rich.console import Console
    from rich.table import Table

    numeric = [bool(rows) and all(isinstance(r[i], (int, float, type(None))) for r in rows) for i in range(len(columns))]
    view = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for name, right in zip(columns, numeric, strict=True):
        view.add_column(name, justify="right" if right else "left", overflow="fold")
    for row in rows:
        view.add_row(*(_cell(v) for v in row))
    # A pipe has no width: without one rich folds every row at 80 columns.
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(view)


@contextmanager
def progress(total: int | None, description: str) -> Iterator[Progress]:
    """Show how far a loop is: `with progress(100, "distill") as p: ...; p.advance(loss=0.3)`.

    Args:
        total: how many steps there are, or None when nobody knows; then there is no time to go.
        description: what is being done, in a word or two.
    """
    if interactive():
        with _rich_progress(total, description) as bar:
            yield bar
        return
    lines = PlainProgress(total, description)
    try:
        yield lines
    finally:
        lines.close()


class PlainProgress:
    """Progress as lines: `distill 40/200 20 % loss 0.31, 35 s to go`, never closer than `PLAIN_INTERVAL_S`."""

    def __init__(self, total: int | None, description: str, *, clock: Callable[[], float] = time.monotonic,
                 write: Callable[[str], None] = log) -> None:
        self.total, self.description, self.done = total, description, 0
        self._clock, self._write, self._fields = clock, write, dict[str, object]()
        self._start = self._last = clock()
        self._shown = -1

    def advance(self, n: int = 1, **fields: object) -> None:
        """Count `n` more; write a line when the last one is old enough."""
        self.done += n
        self._fields.update(fields)
        if self._clock() - self._last >= PLAIN_INTERVAL_S:
            self._show()

    def close(self) -> None:
        """The last line, for loops that were long enough to have had one before."""
        if self._shown >= 0 and self._shown != self.done:
            self._show()

    def _show(self) -> None:
        now = self._clock()
        self._last, self._shown = now, self.done
        of = f"/{self.total} ({self.done / self.total:.0%})" if self.total else ""
        left = ""
        if self.total and 0 < self.done < self.total:
            left = f", {duration((now - self._start) / self.done * (self.total - self.done))} to go"
        shown = "".join(f" {k} {_cell(v)}" for k, v in self._fields.items())
        self._write(f"{self.description} {self.done}{of}{shown}{left}")


@contextmanager
def _rich_progress(total: int | None, description: str) -> Iterator[Progress]:
    from rich import progress as rp
    from rich.console import Console

    bar = rp.Progress(rp.TextColumn("{task.description}"), rp.BarColumn(bar_width=28), rp.MofNCompleteColumn(), rp.TextColumn("{task.fields[shown]}"),
                      rp.TimeElapsedColumn(), rp.TimeRemainingColumn(), console=Console(stderr=True), transient=False)
    with bar:
        task = bar.add_task(description, total=total, shown="")
        fields: dict[str, object] = {}

        class _Bar:
            def advance(self, n: int = 1, **new: object) -> None:
                fields.update(new)
                bar.update(task, advance=n, shown=" ".join(f"{k} {_cell(v)}" for k, v in fields.items()))

        yield _Bar()


def duration(seconds: float) -> str:
    """A time as people say it: `42 s`, `3 min 10 s`, `2 h 05 min`."""
    whole = round(max(0.0, seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _cell(value: object) -> str:
    if value is None:
        return "—"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if abs(value) != float("inf") and value == value else None
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value
