"""Models in processes of their own: one that fails, crashes or hangs is told in words and does not stop the others. The parent watches: it waits, looks
at the board, and reads no more than one small file twice a second.
"""
from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any

from .job import Trouble
from .measuring import POWER, TIMING

if TYPE_CHECKING:
    from collections.abc import Callable

    from .job import Job

LOOK_S = 0.5
"""seconds between two looks"""
WORDS = 5
"""last lines of a process that are told"""
SET_PDEATHSIG = 1
START = "import sys; sys.path.insert(0, sys.argv[1]); import {package}.__main__ as runner; sys.path.pop(0); sys.exit(runner.main(sys.argv[2:]))"
"""Runs this package by its place alone, from a zip file or a folder, without what lies around it."""


class Stopped(BaseException):
    """Somebody told this process to end."""


def ask(job: Job, path: str, index: int, what: str, look: Callable[[bool], object], *, power: bool = False) -> dict[str, Any]:
    """What a fresh process says of model `index` of the job at `path`: `measure` or `memory`.

    Args:
        look: called twice a second, with whether the board is under load.

    Raises:
        Trouble: it failed, crashed, or said nothing for `hang_seconds`.
    """
    with tempfile.TemporaryDirectory(prefix="edgekd-", dir=job.folder) as folder:
        note, answer, words = (os.path.join(folder, name) for name in ("progress.json", "answer.json", "words.txt"))
        command = [*_ourselves(), path, "--child", what, "--model", str(index), "--progress", note, "--output", answer, *(["--power"] if power else [])]
        with open(words, "wb") as said:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            stage = _watch(process, note, look, job.hang_seconds)
        finally:
            _end(process)
        return _answer(answer, stage, process.returncode, words)


def follow() -> None:
    """This process ends with its parent, even one that was killed, where the kernel can see to it (Linux)."""
    try:
        ctypes.CDLL(None).prctl(SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    except (AttributeError, OSError):
        pass  # no Linux, or a libc without it


def _watch(process: subprocess.Popen[bytes], note: str, look: Callable[[bool], object], limit: float) -> str:
    """Wait for the end of a process; the stage it was in. Raises Trouble where it gets no further for `limit` seconds."""
    seen, since, stage = -1, time.monotonic(), "starting"
    while True:
        try:
            process.wait(LOOK_S)
            return _progress(note)[0] or stage
        except subprocess.TimeoutExpired:
            stage, count = _progress(note)
        look(stage in (TIMING, POWER))
        if count != seen:
            seen, since = count, time.monotonic()
        elif time.monotonic() - since > limit:
            raise Trouble(f"nothing happened for {limit:.0f} s while {stage or 'starting'}: it hangs, and was ended", "a smaller model, or another format")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Nothing of it, nor of what it started, is left running."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # it ended, with all that it started
    process.wait()


def _progress(note: str) -> tuple[str, int]:
    try:
        with open(note, encoding="utf-8") as f:
            told = json.load(f)
        return str(told["stage"]), int(told["count"])
    except (OSError, ValueError, KeyError):
        return "", 0


def _answer(path: str, stage: str, code: int, words: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as f:
            told: dict[str, Any] = json.load(f)
    except (OSError, ValueError):
        with open(words, encoding="utf-8", errors="replace") as f:
            last = [line.strip() for line in f.read().splitlines() if line.strip()][-WORDS:]
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        hint = "the board ran out of memory: a smaller model" if code == -signal.SIGKILL else "another format, or another version of its runtime"
        raise Trouble(f"the process ended {how} while {stage or 'starting'}{': ' + ' | '.join(last) if last else ''}", hint) from None
    if told.get("error"):
        raise Trouble(told["error"]["what"], told["error"]["hint"])
    return told


def _ourselves() -> list[str]:
    """The command that runs this package again."""
    here = os.path.dirname(os.path.abspath(__file__))
    return [sys.executable, "-c", START.format(package=os.path.basename(here)), os.path.dirname(here)]
