"""A benchmark program on a device without Python: found or brought there, run, and what it says read without trust. What all of them share."""
from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from edgekd import workspace
from edgekd.errors import EdgekdError
from edgekd.profiling.transport import Completed, Transport
from edgekd.profiling.transport._elf import check_arch

PLACES = ("/data/local/tmp/{name}",)
"""Where people put such programs on a phone, besides on its PATH."""
UNKNOWN = re.compile(r"unknown command line flag '(\w+)'|Unknown command line flag '(\w+)'")
"""gflags' and abseil's words for a flag that this version of the program does not have."""
SHORT_S = 30.0


@dataclass(frozen=True)
class Launch:
    """What one start of a program measured.

    Args:
        samples: milliseconds, in the order they were taken.
        load_ms: of the model; None where the program does not say.
        runs: that each sample is the mean of. 1: a sample is a run.
        warmup: runs before them.
    """

    samples: list[float]
    load_ms: float | None
    runs: int = 1
    warmup: int = 0


@dataclass(frozen=True)
class Executed:
    """What the runtime says it executed. `precision` is empty where it does not say and does what the file says, "unknown" where that may be something else."""

    precision: str = ""
    ops: Mapping[str, int] = field(default_factory=dict)
    fell_back: Sequence[str] = ()
    layers: Sequence[Mapping[str, Any]] | None = None
    note: str | None = None


@dataclass
class Program:
    """One that can be started on a device. `about` tells which build it is."""

    device: Transport
    name: str
    path: str
    about: str
    libraries: str | None = None
    timeout_s: float = 120.0
    without: set[str] = field(default_factory=set)
    """Flags that it turned out not to have."""

    def run(self, *words: str) -> Completed:
        """Start it with these words, its unknown flags left out, and wait.

        Raises:
            EdgekdError: it fails, with its last words, or takes too long.
        """
        while True:
            given = [w for w in words if w.lstrip("-").partition("=")[0] not in self.without]
            prefix = ["env", f"LD_LIBRARY_PATH={self.libraries}"] if self.libraries else []
            done = self.device.run([*prefix, self.path, *given], timeout_s=self.timeout_s)
            unknown = {a or b for a, b in UNKNOWN.findall(done.stdout + done.stderr)} & {w.lstrip("-").partition("=")[0] for w in given}
            if done.code == 0:
                return done
            if not unknown:
                last = [line.strip() for line in f"{done.stdout}\n{done.stderr}".splitlines() if line.strip()][-3:]
                raise EdgekdError(f"{self.name} failed with code {done.code}: {' / '.join(last)[:400] or 'it said nothing'}", where=self.device.name,
                                  hint="its version may be older than the file, or it lacks an operator: try a newer build of it")
            self.without |= unknown


class Tool(Protocol):
    """One component on the program of its format. Everything raises EdgekdError where the program fails."""

    def launch(self, *, warmup: int, seconds: float) -> Launch:
        """Start it once: a few runs after so many for warming up, within so many seconds."""
        ...

    def executed(self, *, layers: bool) -> Executed:
        """What it runs, by one more start where that tells."""
        ...

    def memory(self) -> int | None:
        """Bytes at its peak, by one more start; None where the program does not say."""
        ...

    def answers(self) -> dict[str, str]:
        """Output -> file on the device, of those that the program writes."""
        ...


def bring(device: Transport, name: str, tools: Mapping[str, str], where: str, arch: tuple[str, int | None]) -> Program:
    """A program for the device: the one that the target names (a file here, else a path there), or one that is there already.

    Raises:
        EdgekdError: there is none, or it is built for another processor; nothing was pushed then. Says where to get it.
    """
    given = tools.get(name)
    libraries = _libraries(device, tools, arch)
    if given is not None and (local := Path(given).expanduser()).is_file():
        check_arch(local, arch[0], arch[1])
        there = device.push(local)
        done = device.run(["chmod", "755", there], timeout_s=SHORT_S)
        if done.code:
            raise EdgekdError(f"{name} cannot be made a program there: {done.stderr.strip()}", where=there, hint="name another `folder` in the target's device")
        return Program(device, name, there, f"sha256 {workspace.sha256(local)[:12]}", libraries)
    for path in (given,) if given is not None else (name, *(p.format(name=name) for p in PLACES)):
        done = device.run(["sh", "-c", 'p=$(command -v -- "$1") && [ -f "$p" ] && [ -x "$p" ] && echo "$p"', "edgekd", path], timeout_s=SHORT_S)
        if done.code == 0 and done.stdout.strip():
            found = done.stdout.strip()
            return Program(device, name, found, f"on the device at {found}", libraries)
    named = f", neither here nor there at {given}, which the target names" if given is not None else ""
    raise EdgekdError(f"{name}, which this format is measured by on the device, is missing{named}", where=device.name,
                      hint=f"{where}; then in the target: device: {{tools: {{{name}: /path/to/{name}}}}}")


def _libraries(device: Transport, tools: Mapping[str, str], arch: tuple[str, int | None]) -> str | None:
    """Folders on the device with the shared libraries that the target's tools name, local files separated by `:`."""
    folders = []
    for text in filter(None, tools.get("libraries", "").split(os.pathsep)):
        local = Path(text).expanduser()
        if not local.is_file():
            raise EdgekdError("a shared library that the target names is not here", where=text, hint="device: {tools: {libraries: /path/libonnxruntime.so}}")
        check_arch(local, arch[0], arch[1])
        folders.append(device.push(local).rpartition("/")[0])
    return ":".join(folders) or None


def numbers(pattern: str, text: str) -> list[float]:
    """All numbers that a pattern with one group finds."""
    found = []
    for said in re.findall(pattern, text):
        try:
            found.append(float(said))
        except ValueError:
            continue
    return found
