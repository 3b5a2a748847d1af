"""One model in a process of its own: opened, run, measured, read back. A crash or a hang in it is the parent's to tell (`processes.py`).

The process tells how far it is in a small file that the parent reads: a stage, and how often it has got on (`Progress`).
"""
from __future__ import annotations

import json
import os
import re
import sys
import time
from typing import TYPE_CHECKING, Any

from .job import TOGETHER, Trouble
from .loop import Samples, interleave
from .runtimes import PACKAGES, Array, Session, first_line, missing, open_part
from .runtimes.programs import alive

if TYPE_CHECKING:
    from collections.abc import Callable

    from .job import Job, Model

TIMING, POWER = "timing", "power"
"""stages in which the device is under load: what the parent sees of the clock then counts"""
POWER_S = 3.0
"""seconds of uninterrupted use over which power is integrated"""
EVERY = 0.2
"""seconds between two notes of progress at most"""


class Progress:
    """The note of how far this process is, written so that a reader never sees half of it."""

    def __init__(self, path: str | None) -> None:
        self._path, self._stage, self._count, self._last = path, "", 0, 0.0

    def stage(self, name: str) -> None:
        """Another stage begins."""
        self._stage = name
        self._write()

    def beat(self) -> None:
        """It still works."""
        if time.monotonic() - self._last >= EVERY:
            self._write()

    def _write(self) -> None:
        self._count, self._last = self._count + 1, time.monotonic()
        if self._path:
            with open(f"{self._path}.part", "w", encoding="utf-8") as f:
                json.dump({"stage": self._stage, "count": self._count}, f)
            os.replace(f"{self._path}.part", self._path)


def measure(job: Job, model: Model, progress: Progress, *, power: bool) -> dict[str, Any]:
    """A model of the result (`edgekd.measured/1`), without its peak memory and energy. `power`: whether the parent watches a meter.

    Raises:
        Trouble: a runtime is missing or refuses a file, or a run fails; the component is named.
    """
    alive.append(progress.beat)
    sessions, load_ms = _open(job, model, progress)
    parts = {name: _call(session, model.parts[name].calls) for name, session in sessions.items()}
    for name, call in parts.items():
        progress.stage(f"first run of the {name}")
        _guarded(name, call)
    progress.stage(TIMING)
    samples = _samples(job, model, sessions, parts, progress)
    found: dict[str, Any] = {"id": model.id, "components": {}, "together_ms": samples[TOGETHER].values, "error": None}
    if power:
        progress.stage(POWER)
        found["windows"] = _windows(model, sessions, parts)
    for name, session in sessions.items():
        progress.stage(f"reading back the {name}")
        found["components"][name] = {**_described(samples[name], load_ms[name]), **_told(job, model, name, session)}
    found["notes"] = _notes(sessions, samples)
    if job.layers:
        silent = [model.parts[name].format for name, c in found["components"].items() if "layers" not in c]
        found["notes"] += [f"{format} tells no times of single layers" for format in dict.fromkeys(silent)]
    found["versions"] = {k: v for s in sessions.values() for k, v in s.versions.items()}
    for session in sessions.values():
        session.close()
    return found


def use_once(job: Job, model: Model, progress: Progress) -> dict[str, Any]:
    """Peak memory of opening everything and one use, in bytes."""
    alive.append(progress.beat)
    sessions, _ = _open(job, model, progress)
    progress.stage("one use")
    for name in model.together:
        _guarded(name, _call(sessions[name], model.parts[name].calls))
    return {"peak_memory_bytes": peak_memory_bytes()}


def peak_memory_bytes(status: str = "/proc/self/status") -> int:
    """The largest resident size this process, or a program that it ran, ever had.

    From VmHWM where there is one: `ru_maxrss` of a process started by a larger one begins with the parent's peak on Linux.
    """
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    programs = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    try:
        with open(status, encoding="utf-8") as f:
            own = next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return max(own, programs)


def _open(job: Job, model: Model, progress: Progress) -> tuple[dict[str, Session], dict[str, float]]:
    sessions: dict[str, Session] = {}
    took: dict[str, float] = {}
    for name, part in model.parts.items():
        progress.stage(f"opening the {name}")
        missing(part.format, job.tools)  # imports the runtime, which is no part of loading a file
        start = time.perf_counter()
        try:
            sessions[name] = open_part(part, job.threads, job.tools)
        except Trouble as e:
            raise Trouble(f"{name}: {e.what}", e.hint) from e
        except Exception as e:  # runtimes share no kind of error
            raise Trouble(f"{name}: {part.format} cannot open the file: {first_line(e)}", "the runtime on the board may be older than the file") from e
        took[name] = (time.perf_counter() - start) * 1e3
    return sessions, took


def _call(session: Session, count: int) -> Callable[[], object]:
    if count == 1:
        return session.run

    def repeated() -> None:
        for _ in range(count):
            session.run()

    return repeated


def _guarded(name: str, call: Callable[[], object]) -> None:
    try:
        call()
    except Trouble as e:
        raise Trouble(f"{name}: {e.what}", e.hint) from e
    except Exception as e:  # runtimes share no kind of error
        raise Trouble(f"{name}: it cannot be run: {first_line(e)}", "not enough memory, or an operator that this runtime has not") from e


def _samples(job: Job, model: Model, sessions: dict[str, Session], parts: dict[str, Callable[[], object]], progress: Progress) -> dict[str, Samples]:
    """Of every component, and together. Sessions that time themselves go one after the other, and together is then their sum."""
    wanted: dict[str, Any] = {"warmup": job.warmup, "repeats": job.repeats, "max_seconds": job.max_seconds, "mode": job.mode}
    itself = [name for name, s in sessions.items() if s.times_itself]
    found = {name: _times(sessions[name].samples(**wanted), model.parts[name].calls) for name in itself}
    todo = {name: call for name, call in parts.items() if name not in itself}
    if not itself and len(model.together) > 1:
        todo[TOGETHER] = lambda: [parts[name]() for name in model.together]
    waits = [s.synchronise for s in sessions.values() if s.synchronise]
    try:
        found.update(interleave(todo, synchronise=(lambda: [wait() for wait in waits]) if waits else None, alive=progress.beat, **wanted))
    except Trouble:
        raise
    except Exception as e:
        raise Trouble(f"{getattr(e, 'measuring', TOGETHER)}: a timed run fails: {first_line(e)}", "not enough memory, or a device that went away") from e
    if TOGETHER not in found:
        found[TOGETHER] = _sum([found[name] for name in model.together])
    return found


def _times(samples: Samples, calls: int) -> Samples:
    """Samples of single calls as those of a use that makes several."""
    if calls == 1:
        return samples
    whole = len(samples.values) // calls
    values = [sum(samples.values[i * calls:(i + 1) * calls]) for i in range(whole)] if whole else [v * calls for v in samples.values]
    return Samples(values, samples.warmup, samples.steady)


def _sum(several: list[Samples]) -> Samples:
    """The i-th samples of all, added up."""
    count = min(len(s.values) for s in several)
    return Samples([sum(s.values[i] for s in several) for i in range(count)], max(s.warmup for s in several), all(s.steady for s in several))


def _windows(model: Model, sessions: dict[str, Session], parts: dict[str, Callable[[], object]]) -> list[list[float]]:
    """[begun, ended, uses] of stretches whose energies add up to that of one use."""
    if any(s.times_itself for s in sessions.values()):
        told = [(sessions[name].window(POWER_S), model.parts[name].calls) for name in model.together]
        return [[w[0], w[1], w[2] / calls] for w, calls in told if w] if all(w for w, _ in told) else []
    begun, uses = time.monotonic(), 0
    while time.monotonic() - begun < POWER_S:
        for name in model.together:
            parts[name]()
        uses += 1
        for beat in alive:
            beat()
    return [[begun, time.monotonic(), float(uses)]]


def _described(samples: Samples, load_ms: float) -> dict[str, Any]:
    return {"samples_ms": samples.values, "warmup": samples.warmup, "steady": samples.steady and samples.drift is None, "outliers": samples.outliers,
            "load_ms": load_ms}


def _told(job: Job, model: Model, name: str, session: Session) -> dict[str, Any]:
    """What the runtime executed, its layers and its answers, as far as asked for and told."""
    try:
        facts = session.facts()
        told: dict[str, Any] = {"executed_precision": facts.precision, "executed_ops": facts.ops, "fell_back": facts.fell_back}
        layers = session.layers() if job.layers else None
        if job.answers:
            session.run()
            told["answers"] = {output: _write(job.folder, model.parts[name].file, name, output, array) for output, array in session.outputs().items()}
    except Trouble as e:
        raise Trouble(f"{name}: {e.what}", e.hint) from e
    except OSError as e:
        raise Trouble(f"{name}: its answers cannot be written: {e.strerror or e}", "make room on the board") from e
    if session.load_ms is not None:
        told["load_ms"] = session.load_ms
    if layers is not None:
        told["layers"] = layers
    return told


def _write(folder: str, beside: str, part: str, output: str, array: Array) -> str:
    """An answer beside the model's file, whole or not at all; its path in the job's folder."""
    path = os.path.join(os.path.dirname(beside), re.sub(r"[^A-Za-z0-9_-]", "_", f"{part}-{output}") + ".out.bin")
    with open(f"{path}.part", "wb") as f:
        f.write(array.data)
    os.replace(f"{path}.part", path)
    return os.path.relpath(path, folder).replace(os.sep, "/")


def _notes(sessions: dict[str, Session], samples: dict[str, Samples]) -> list[str]:
    found = list(dict.fromkeys(note for s in sessions.values() for note in s.notes))
    for name, s in samples.items():
        jump = s.drift
        if jump is not None:
            found.append(f"{name}: from sample {jump[0]} of {len(s.values)} on runs take {jump[1]:.2f} times as long as before")
    return found


def versions(job: Job) -> dict[str, str]:
    """package -> version, of the runtimes of a job and numpy."""
    from importlib import metadata

    found = {}
    for package in ["numpy", *dict.fromkeys(p for m in job.models for part in m.parts.values() for p in PACKAGES.get(part.format, ()))]:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
