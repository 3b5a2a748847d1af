"""A job carried out by our one-file runner, on a board that has a Python with the runtimes.

Models are asked for one at a time and their results fetched as they come, so that a connection lost for good loses the model in work and no more. A
connection lost for a while is made again by the transport, and the runner goes on where it was.
"""
from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd import console
from edgekd.errors import EdgekdError
from edgekd.profiling.board.job import PARTIAL, RESULT
from edgekd.profiling.board.runtimes import MODULES, PROGRAMS

if TYPE_CHECKING:
    from edgekd.profiling.transport import Completed, Transport
    from edgekd.target import Target

TRIES = 3
"""How often in a row the runner is started again after a connection was lost."""
OPEN_S, ENGINE_S = 900.0, 3700.0
"""For opening a model, reading it back and its memory; for building an engine of TensorRT."""


class Interrupted(EdgekdError):
    """The board was lost for good. `partial` is a result (`edgekd.measured/1`) of the models that were finished."""

    partial: dict[str, Any]


def measure(device: Transport, job: dict[str, Any], folder: Path, target: str | Target) -> dict[str, Any]:
    """See `edgekd.profiling.drivers`.

    Raises:
        Interrupted: the connection was lost and could not be made again.
        EdgekdError: no Python of the board can run this, or the runner refuses the job.
    """
    from edgekd.profiling import boards

    boards.bundle(folder / boards.RUNNER)
    there = device.push(folder)
    python = choose(device, job, target)
    command, failures = [python, f"{there}/{boards.RUNNER}", f"{there}/job.json", "--most", "1"], 0
    while True:
        try:
            told = _told(device.run(command, timeout_s=limit(job)), device.name)
            result = _fetch(device, there, folder)
        except Refused:
            raise
        except EdgekdError as e:
            failures = _again(e, failures, job, folder)
            continue
        failures = 0
        for id in told["failed"][-1:]:
            console.log(f"{id}: {_why(result, id)}")
        if told["complete"]:
            return result


class Refused(EdgekdError):
    """The runner says why it does nothing: trying again changes nothing."""


def choose(device: Transport, job: Mapping[str, Any], target: str | Target) -> str:
    """The Python of the board that has every runtime the job needs, or, where no one has, that of the most formats.

    Raises:
        EdgekdError: none has any.
    """
    named = None if isinstance(target, str) else target.device.python
    ask = getattr(device, "python", named or "python3")
    if not callable(ask):
        return str(named or ask)
    tools = job.get("tools") or {}
    formats = sorted({p["format"] for m in job["models"] for p in m["components"].values()})
    groups = {f: [""] if PROGRAMS.get(f) in tools else list(MODULES.get(f, ())) or [""] for f in formats}  # "": it needs no module
    first: EdgekdError | None = None
    for some in [formats, *([[f] for f in formats] if len(formats) > 1 else [])]:
        for modules in itertools.product(*(groups[f] for f in some)):
            needs = [m for m in dict.fromkeys(modules) if m]
            try:
                return str(ask([*needs, "numpy"] if needs else []))
            except EdgekdError as e:
                first = first or e
    assert first is not None
    raise first


def limit(job: Mapping[str, Any]) -> float:
    """Seconds that one model may take at most; the runner ends what hangs long before."""
    calls = max(len(m["components"]) + 1 for m in job["models"])
    engines = any(p["format"] == "tensorrt" for m in job["models"] for p in m["components"].values())
    return OPEN_S + 30 * float(job.get("max_seconds", 8.0)) * calls + (ENGINE_S if engines else 0)


def _told(done: Completed, where: str) -> dict[str, Any]:
    """What the runner says at its end."""
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    try:
        told = json.loads(lines[-1])
        assert told["schema"] == RESULT
    except (IndexError, ValueError, KeyError, TypeError, AssertionError):
        last = " | ".join(done.stderr.strip().splitlines()[-3:])
        raise EdgekdError(f"the runner ended with exit code {done.code}{': ' + last if last else ''}", where=where, hint="the board may be out of memory") from None
    if told.get("error"):
        raise Refused(told["error"]["what"], where=where, hint=told["error"]["hint"])
    found: dict[str, Any] = told
    return found


def _again(why: EdgekdError, failures: int, job: Mapping[str, Any], folder: Path) -> int:
    """Count a failure. Raises Interrupted after `TRIES` of them, with what was fetched so far and the place where it is kept."""
    from edgekd.profiling import boards

    if failures < TRIES:
        console.warn(f"{why.what}; going on with what is finished ({failures + 1} of {TRIES})")
        return failures + 1
    partial = _fetched(job, folder)
    count, all_ = len(partial["models"]), len(job["models"])
    kept = f"; {count} of {all_} models are finished, and kept in {boards.keep(partial)}" if count else ""
    e = Interrupted(f"{why.what}{kept}", where=why.where, hint=why.hint)
    e.partial = partial
    raise e from why


def _fetch(device: Transport, there: str, folder: Path) -> dict[str, Any]:
    """The result as it is now, with the answers that it names."""
    result: dict[str, Any] = json.loads(device.pull(f"{there}/result.json", folder / "result.json").read_text(encoding="utf-8"))
    device.pull(f"{there}/{PARTIAL}", folder / PARTIAL)
    for name in _answers(result["models"]):
        if not (folder / name).exists():
            device.pull(f"{there}/{name}", folder / name)
    return result


def _answers(models: Sequence[Mapping[str, Any]]) -> list[str]:
    """Files of the result, by their path in the job's folder; none that leads out of it."""
    names = [name for m in models for p in m["components"].values() for name in (p.get("answers") or {}).values()]
    return [name for name in names if not Path(name).is_absolute() and ".." not in Path(name).parts]


def _fetched(job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The last result that came through, or an empty one."""
    try:
        found: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError):
        return {"schema": RESULT, "complete": False, "models": [], "circumstances": {}, "notes": []}


def _why(result: Mapping[str, Any], id: str) -> str:
    return next((str(m["error"]["what"]) for m in result["models"] if m["id"] == id and m.get("error")), "")
