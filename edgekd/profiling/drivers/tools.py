"""A job carried out by the runtimes' own benchmark programs, where there is no Python: LiteRT's, ExecuTorch's and ONNX Runtime's, supplied by the user.

Each is started many times, and the components take turns, so that a phone that grows warm or a program that starts badly hits all alike. What is a single run
counts as a sample; where a program tells means only, so does a mean, and the notes say of how many. No quantile of a program's own is taken over. A model
that fails has its error, and the others go on.
"""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edgekd.errors import EdgekdError
from edgekd.profiling.board import loop
from edgekd.profiling.board.job import RESULT
from edgekd.profiling.drivers import _tool_executorch, _tool_litert, _tool_onnx
from edgekd.profiling.drivers._program import Launch, Program, Tool, bring
from edgekd.profiling.transport import Lost
from edgekd.profiling.transport._android import Look, circumstances

if TYPE_CHECKING:
    from edgekd.profiling.transport import Transport
    from edgekd.profiling.transport.adb import Adb
    from edgekd.target import Target

PROGRAMS = {"litert": (_tool_litert.NAME, _tool_litert.WHERE), "executorch": (_tool_executorch.NAME, _tool_executorch.WHERE),
            "onnx": (_tool_onnx.NAME, _tool_onnx.WHERE)}
"""format -> the program that measures it, and where to get it."""
SLOW = 5.0
"""Starting a program, loading and warming up may take so many times the seconds that a component is timed for."""


TRIES = 3
"""Of one step, where the device goes away in the middle."""


@dataclass
class Timed:
    """A component, and what it took so far."""

    tool: Tool
    calls: int
    launches: list[Launch] = field(default_factory=list)
    wall_s: float = 0.0

    @property
    def samples(self) -> list[float]:
        """Milliseconds of one use of the component."""
        return [s * self.calls for one in self.launches for s in one.samples]

    def wanted(self, job: Mapping[str, Any]) -> bool:
        """Whether another start is needed, by the rule of `board/loop.py`; what a start takes besides counts too, but less."""
        most, enough = job.get("max_seconds", 8.0), len(self.samples)
        over = sum(self.samples) / 1e3 >= most or self.wall_s >= SLOW * most
        if job.get("mode", "count") == "time":
            return not over or enough < loop.MIN_SAMPLES
        repeats = job.get("repeats", 30)
        return enough < (min(repeats, loop.MIN_SAMPLES) if over else repeats)

    def take(self, job: Mapping[str, Any], clock: Callable[[], float] = time.monotonic) -> None:
        """One more start."""
        began = clock()
        self.launches.append(self.tool.launch(warmup=job.get("warmup", 3), seconds=job.get("max_seconds", 8.0)))
        self.wall_s += clock() - began

    def kept(self, job: Mapping[str, Any]) -> list[float]:
        """No more than were asked for."""
        return self.samples if job.get("mode", "count") == "time" else self.samples[:max(1, job.get("repeats", 30))]


@dataclass
class Work:
    """A job while it is carried out."""

    job: Mapping[str, Any]
    folder: Path
    timed: dict[str, dict[str, Timed]] = field(default_factory=dict)
    errors: dict[str, dict[str, Any]] = field(default_factory=dict)
    programs: dict[str, Program] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def guarded(self, model: str, work: Callable[[], None]) -> None:
        """Do something for one model, again where the device went away and came back; what goes wrong becomes its error. A device that stays away is
        everybody's."""
        for left in range(TRIES, 0, -1):
            try:
                return work()
            except Lost as e:
                if left == 1:
                    raise
                self.say(f"the device went away while it was measured, and came back: {e.what}")
            except EdgekdError as e:
                self.errors[model] = {"what": f"{e.what}{f' ({e.where})' if e.where is not None else ''}", "hint": e.hint}
                self.timed.pop(model, None)
                return None

    def say(self, note: str | None) -> None:
        """Once."""
        if note and note not in self.notes:
            self.notes.append(note)


def measure(device: Transport, job: dict[str, Any], folder: Path, target: str | Target) -> dict[str, Any]:
    """See `edgekd.profiling.drivers`.

    Raises:
        Lost: the device went away and did not come back.
        EdgekdError: the job's files cannot be copied there.
    """
    phone, tools = cast("Adb", device), {} if isinstance(target, str) else {**target.device.tools, **job.get("tools", {})}
    work, before = Work(job, Path(folder)), phone.look()
    for model in job["models"]:
        work.guarded(model["id"], lambda m=model: _stage(work, m))  # type: ignore[misc]
    there = phone.push(work.folder) if len(work.errors) < len(job["models"]) else ""
    for model in job["models"]:
        if model["id"] not in work.errors:
            work.guarded(model["id"], lambda m=model: _open(work, phone, m, there, tools, before))  # type: ignore[misc]
    seen, done, after = list[str](), list[dict[str, Any]](), before

    def result() -> dict[str, Any]:
        about = circumstances(before, after, seen, job, {name: p.about for name, p in work.programs.items()})
        return {"schema": RESULT, "complete": not work.errors and len(done) == len(job["models"]), "models": done, "circumstances": about, "notes": work.notes}

    try:
        seen += _take_turns(work, phone)
        for model in job["models"]:
            done.append(_finish(work, phone, model))
        after = phone.look()
    except Lost as e:
        e.partial = result()  # type: ignore[attr-defined]
        raise
    return result()


def _stage(work: Work, model: Mapping[str, Any]) -> None:
    """What has to lie in the folder before it is pushed."""
    for name, part in model["components"].items():
        if part["format"] not in PROGRAMS:
            raise EdgekdError(f"no program for files of the format '{part['format']}' is known on such a device", where=name,
                              hint=f"export it to one of {', '.join(PROGRAMS)}")
        if part["format"] == "onnx":
            _tool_onnx.stage(part, work.folder)


def _open(work: Work, phone: Adb, model: Mapping[str, Any], there: str, tools: Mapping[str, str], look: Look) -> None:
    """The programs of a model's components, brought there when first needed."""
    threads, found = work.job.get("threads"), dict[str, Timed]()
    for name, part in model["components"].items():
        program_name, where = PROGRAMS[part["format"]]
        if program_name not in work.programs:
            work.programs[program_name] = bring(phone, program_name, tools, where, look.arch)
        program = work.programs[program_name]
        program.timeout_s = 120 + 10 * work.job.get("max_seconds", 8.0)
        tool: Any
        if part["format"] == "litert":
            tool = _tool_litert.Litert(program, part, there, threads, tools)
        elif part["format"] == "executorch":
            tool = _tool_executorch.Executorch(program, part, there, threads, work.folder)
        else:
            tool = _tool_onnx.Onnx(program, part, there, threads, tools)
        work.say(tool.note)
        found[name] = Timed(tool, max(1, int(part.get("calls", 1))))
    work.timed[model["id"]] = found


def _take_turns(work: Work, phone: Adb) -> list[str]:
    """Start programs in turns, their order reversed every round, until every component has its samples; what limited the device meanwhile."""
    seen, forwards = list[str](), True
    while todo := [(m, n) for m, parts in work.timed.items() for n, t in parts.items() if t.wanted(work.job)]:
        for model, name in todo if forwards else todo[::-1]:
            if model in work.timed:
                work.guarded(model, lambda m=model, n=name: work.timed[m][n].take(work.job))  # type: ignore[misc]
        forwards = not forwards
        seen += phone.look().limits()
    return seen


def _finish(work: Work, phone: Adb, model: Mapping[str, Any]) -> dict[str, Any]:
    """A model of the result."""
    parts = dict[str, dict[str, Any]]()
    if model["id"] in work.timed:
        work.guarded(model["id"], lambda: parts.update({n: _component(work, phone, model, n, t) for n, t in work.timed[model["id"]].items()}))
    if model["id"] not in work.timed:
        return {"id": model["id"], "components": {}, "together_ms": [], "peak_memory_bytes": None, "energy_mj": None, "error": work.errors[model["id"]]}
    timed = work.timed[model["id"]]
    together = [sum(several) for several in zip(*(timed[n].kept(work.job) for n in model["together"]), strict=False)]
    work.say("a model's own time is the sum of its components', each of which ran in a process of its own")
    return {"id": model["id"], "components": parts, "together_ms": together, "peak_memory_bytes": _memory(work, timed), "energy_mj": None, "error": None}


def _memory(work: Work, timed: Mapping[str, Timed]) -> int | None:
    """Bytes of all components, where all of their programs tell."""
    if not work.job.get("memory"):
        return None
    try:
        peaks = [t.tool.memory() for t in timed.values()]
    except EdgekdError as e:
        work.say(f"peak memory is not known: {e.what}")
        return None
    known = [p for p in peaks if p is not None]
    if len(known) < len(peaks):
        return None
    if len(known) > 1:
        work.say("peak memory is the sum of the components', each with a runtime of its own: together they take less")
    return sum(known)


def _component(work: Work, phone: Adb, model: Mapping[str, Any], name: str, timed: Timed) -> dict[str, Any]:
    samples, executed = timed.kept(work.job), timed.tool.executed(layers=bool(work.job.get("layers")))
    work.say(executed.note)
    means = max(one.runs for one in timed.launches)
    if means > 1:
        work.say(f"{model['components'][name]['format']}: its program tells no single runs: each of the {len(samples)} samples is the mean of {means} runs, so "
                 "that their spread is smaller than that of runs")
    recent, loads = samples[-loop.WINDOW:], [one.load_ms for one in timed.launches if one.load_ms is not None]
    steady = len(recent) == loop.WINDOW and statistics.pstdev(recent) <= 0.1 * statistics.fmean(recent) and loop.change_point(samples) is None
    found: dict[str, Any] = {"samples_ms": samples, "warmup": timed.launches[-1].warmup, "steady": steady, "outliers": len(loop.outliers(samples)),
                             "load_ms": statistics.median(loads) if loads else 0.0, "executed_precision": executed.precision,
                             "executed_ops": dict(executed.ops), "fell_back": list(executed.fell_back)}
    if not loads:
        work.say("the program does not tell how long a model takes to load")
    if executed.layers is not None:
        found["layers"] = [dict(row) for row in executed.layers]
    if work.job.get("answers"):
        base = Path(model["components"][name]["file"]).parent
        told = {output: (file, f"{base}/{name}.{output.replace('/', '_')}.bin") for output, file in timed.tool.answers().items()}
        for file, local in told.values():
            phone.pull(file, work.folder / local)
        if told:
            found["answers"] = {output: local for output, (_, local) in told.items()}
    return found
