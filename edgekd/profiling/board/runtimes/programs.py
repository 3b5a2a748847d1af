"""Running a runtime's own program: its words kept, its time limited, whoever watches us told that it still works."""
from __future__ import annotations

import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..job import Trouble

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

BEAT = 2.0
"""Seconds between two signs of life."""
alive: list[Callable[[], object]] = []
"""What is called as a sign of life; filled by who opens sessions."""


@dataclass
class Said:
    """What a program wrote, stdout and stderr together, and when each line came (`time.monotonic()`)."""

    lines: list[str]
    times: list[float]

    @property
    def text(self) -> str:
        """All of it."""
        return "\n".join(self.lines)


def execute(command: Sequence[str], folder: str, *, timeout: float) -> Said:
    """Run a program to its end in `folder`.

    Raises:
        Trouble: it cannot be started, fails, or takes longer than `timeout` seconds; its last words are given.
    """
    name = command[0].rsplit("/", 1)[-1]
    said = Said([], [])
    with tempfile.TemporaryFile() as nothing:
        try:
            process = subprocess.Popen(list(command), cwd=folder, stdin=nothing, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        except OSError as e:
            raise Trouble(f"{name} cannot be run: {e.strerror or e}", "is it built for this board?") from e
    reader = threading.Thread(target=_read, args=(process, said), daemon=True)
    reader.start()
    until = time.monotonic() + timeout
    try:
        while reader.is_alive() and time.monotonic() < until:
            reader.join(BEAT)
            for beat in alive:
                beat()
        if reader.is_alive():
            raise Trouble(f"{name} does not end within {timeout:.0f} s; its last words: {_last(said)}", "a smaller model, or build the engine beforehand")
        process.wait(timeout=60)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    if process.returncode:
        raise Trouble(f"{name} fails (exit code {process.returncode}): {_last(said)}", f"run it by hand: {' '.join(command)}")
    return said


def _read(process: subprocess.Popen[str], said: Said) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        said.lines.append(line.rstrip("\n"))
        said.times.append(time.monotonic())


def _last(said: Said) -> str:
    """The last errors it wrote, or its last lines."""
    errors = [line for line in said.lines if "[E]" in line or "error" in line.lower() or "unknown option" in line.lower()]
    return " | ".join(line.strip()[:300] for line in (errors or said.lines)[-3:]) or "nothing"
