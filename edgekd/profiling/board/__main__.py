"""The runner: `python edgekd_runner.pyz job.json [--output result.json]`. It needs Python 3.8 and the runtimes of the files it is given, and installs nothing.

Models are measured one after the other, each in a process of its own. What is finished is kept at once in `result.partial.jsonl` beside the job, and
the same command goes on from there. One line of JSON on stdout at the end; words meanwhile on stderr.

    --most N        stop after N models; the same command goes on
    --can F F ...   whether files of these formats run here: one line of JSON, exit code 0 when all do
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
from typing import TYPE_CHECKING, Any

from . import measuring
from .circumstances import Board, Watch
from .job import JOB, RESULT, Job, Model, Trouble, read
from .partial import Partial
from .power import Meter, meter
from .processes import Stopped, ask, follow
from .runtimes import missing

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, measure, write. 0: done, or as far as `--most` says; 1: it cannot be done; 130, 143: told to stop, what is finished is kept."""
    a = _parser().parse_args(arguments)
    try:
        if a.can is not None:
            return _can(a.can)
        if a.job is None:
            raise Trouble("no job was given", "python edgekd_runner.pyz job.json")
        job = read(a.job)
        if a.child:
            return _child(job, a)
        _listen()
        print(json.dumps(carry_out(job, a.job, a.output or os.path.join(job.folder, "result.json"), most=a.most)))
    except Trouble as e:
        print(f"{e.what}\n  hint: {e.hint}", file=sys.stderr)
        print(json.dumps({"schema": RESULT, "error": e.told()}))
        return 1
    except Stopped as e:
        print("stopped; what is finished is kept", file=sys.stderr)
        return 128 + int(str(e))
    return 0


def carry_out(job: Job, path: str, output: str, *, most: int | None = None) -> dict[str, Any]:
    """Measure what is not finished yet and write the result; a summary of it.

    Raises:
        Trouble: results cannot be kept here.
        Stopped: told to by a signal.
    """
    partial, board = Partial(job.folder, job.key), Board()
    watch = Watch(board)
    watch.resume(partial.begin(watch.state()))
    todo = [i for i, model in enumerate(job.models) if model.id not in partial.finished]
    tells = meter() if todo else None
    try:
        if tells:
            tells.settle()
        for index in todo[:most]:
            _one(job, path, index, partial, watch, tells)
    finally:
        if tells:
            tells.close()
    found = [partial.finished[m.id] for m in job.models if m.id in partial.finished]
    complete = len(found) == len(job.models)
    versions = dict(measuring.versions(job))
    for one in found:
        versions.update(one.get("versions") or {})
    circumstances = watch.told(threads=job.threads, warmup=job.warmup, repeats=job.repeats, versions=versions)
    seen = [words for one in found for words in one.get("throttled", [])]
    circumstances["throttled"] = list(dict.fromkeys([*seen, *circumstances["throttled"]]))
    result = {"schema": RESULT, "complete": complete, "models": [{k: v for k, v in one.items() if k not in ("notes", "versions", "throttled")} for one in found],
              "circumstances": circumstances,
              "notes": [f"{one['id']}: {note}" for one in found for note in one.get("notes", [])]}
    _write(output, result)
    failed = [one["id"] for one in found if one["error"]]
    return {"schema": RESULT, "complete": complete, "models": len(job.models), "finished": len(found), "failed": failed, "result": os.path.abspath(output)}


def _one(job: Job, path: str, index: int, partial: Partial, watch: Watch, tells: Meter | None) -> None:
    """Measure one model and keep what came of it."""
    model = job.models[index]
    print(f"{model.id} ({index + 1} of {len(job.models)})", file=sys.stderr)
    throttled = set(watch.throttled())
    try:
        partial.start(model.id)
        found = ask(job, path, index, "measure", lambda load: watch.look(load=load), power=tells is not None)
        windows = found.pop("windows", [])
        found["energy_mj"], how = tells.energy(windows) if tells else (None, "")
        found["notes"] += [how] if how else []
        found["peak_memory_bytes"] = _peak(job, path, index, found) if job.memory else None
    except Trouble as e:
        if "cannot keep results" in e.what:
            raise
        found = failed(model, e)
        print(f"  {e.what}", file=sys.stderr)
    except Stopped:
        partial.stop(model.id)
        raise
    found["throttled"] = [words for words in watch.throttled() if words not in throttled]
    partial.finish(found)


def _peak(job: Job, path: str, index: int, found: dict[str, Any]) -> int | None:
    """In one more process, which opens everything and runs once. Where only that fails the model is measured all the same."""
    try:
        return int(ask(job, path, index, "memory", lambda load: None)["peak_memory_bytes"])
    except Trouble as e:
        found["notes"].append(f"its peak memory is not known: {e.what}")
        return None


def failed(model: Model, why: Trouble) -> dict[str, Any]:
    """A model of the result that came to nothing."""
    return {"id": model.id, "components": {}, "together_ms": [], "peak_memory_bytes": None, "energy_mj": None, "notes": [], "versions": {}, "error": why.told()}


def _child(job: Job, a: argparse.Namespace) -> int:
    """The other side of `processes.ask`."""
    follow()
    model, progress = job.models[a.model], measuring.Progress(a.progress)
    try:
        found = measuring.measure(job, model, progress, power=a.power) if a.child == "measure" else measuring.use_once(job, model, progress)
    except Trouble as e:
        found = {"error": e.told()}
    _write(a.output, found)
    sys.stdout.flush()
    os._exit(0)  # some runtimes crash when Python takes them down


def _can(formats: Sequence[str]) -> int:
    told = {format: missing(format, {}) for format in formats}
    print(json.dumps({"python": sys.executable, "version": platform.python_version(), "formats": told}))
    return 1 if any(told.values()) else 0


def _listen() -> None:
    """What is told to stop stops at once, with its processes; the partial results are whole at any moment."""
    def stop(number: int, frame: Any) -> None:
        raise Stopped(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)


def _write(path: str, value: dict[str, Any]) -> None:
    try:
        with open(f"{path}.part", "w", encoding="utf-8") as f:
            json.dump(value, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(f"{path}.part", path)
    except OSError as e:
        raise Trouble(f"the board cannot keep results: {e.strerror or e} ({path})", "make room there") from e


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="edgekd_runner.pyz", description=f"Measure the models of a job ({JOB}) on this machine.")
    parser.add_argument("job", nargs="?", metavar="job.json")
    parser.add_argument("--output", metavar="result.json", help="beside the job when left out")
    parser.add_argument("--most", type=int, help="stop after so many models")
    parser.add_argument("--can", nargs="+", metavar="FORMAT", help="whether files of these formats run here")
    for name in ("--child", "--progress"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--power", action="store_true", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
