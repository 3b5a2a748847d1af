"""Boards: the runner as one file, and what a board measured as profiles. How a job is written is in `jobs.py`, how it is carried out in `drivers/`."""
from __future__ import annotations

import io
import json
import os
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd import console, plugins
from edgekd.artifact import ArtifactComponent, Manifest
from edgekd.errors import EdgekdError, first_line
from edgekd.measurement import Circumstances, Latency
from edgekd.profiling import board, drivers
from edgekd.profiling.bare import ModelFile
from edgekd.profiling.board.job import JOB, RESULT
from edgekd.profiling.jobs import Asked, stage
from edgekd.profiling.layers import named
from edgekd.profiling.profile import ComponentProfile, Layer, Profile, _sizes
from edgekd.protocols import Session, facts
from edgekd.workspace import write_atomic, write_json

if TYPE_CHECKING:
    from edgekd.profiling.transport import Transport
    from edgekd.target import Target

__all__ = ["JOB", "RESULT", "RUNNER", "Asked", "Partly", "bundle", "compared", "profile_many", "profiles", "stage"]

RUNNER = "edgekd_runner.pyz"
LIMITS = {"fp32": 0.01, "fp16": 0.05, "bf16": 0.1, "int8": 0.15, "fp8": 0.15}
"""precision executed -> how far answers of a board may be from those of the same file here, relative and root mean square. Sums in another order differ by
1e-6, roundings of integers by a few per cent; kernels that overflow, or another file, by far more."""
OTHER = 0.15
DATE = (1980, 1, 1, 0, 0, 0)
MAIN = """import sys

if sys.version_info < (3, 8):
    sys.exit("this runner needs Python 3.8 or newer, and this is " + sys.version.split()[0])

from board.__main__ import main

sys.exit(main())
"""


class Partly(EdgekdError):
    """Some of what was to be measured was not; `profiles` are those that were."""

    profiles: list[Profile]
    errors: dict[str, str]
    """Model -> why the board does not run it; empty where the connection was lost, which a later attempt may mend."""


def bundle(path: Path) -> Path:
    """Write the runner: one file that any Python from 3.8 on runs. The same source gives the same bytes."""
    root = Path(board.__file__).parent
    packed = io.BytesIO(b"#!/usr/bin/env python3\n")
    packed.seek(0, io.SEEK_END)
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(zipfile.ZipInfo("__main__.py", DATE), MAIN)
        for file in sorted(root.rglob("*.py")):
            archive.writestr(zipfile.ZipInfo(f"board/{file.relative_to(root).as_posix()}", DATE), file.read_bytes())
    return write_atomic(Path(path), packed.getvalue())


def profile_many(device: Transport, folders: Sequence[Path | ModelFile], target: str | Target, asked: Asked) -> list[Profile]:
    """Profile artifacts, or model files alone, on a board that is connected.

    Raises:
        Partly: something does not run there, or the connection was lost for good; what was measured is in it.
        EdgekdError: the board cannot be used at all, or computes something else than the same file here.
    """
    with tempfile.TemporaryDirectory(prefix="edgekd-") as temp:
        staged = Path(temp)
        job = stage(folders, asked, target, staged)
        try:
            result, lost = drivers.measure(device, job, staged, target), None
        except Partly:
            raise
        except EdgekdError as e:
            result, lost = getattr(e, "partial", None) or {}, e
            if not result.get("models"):
                raise
        _say(result)
        found = profiles(job, result, folders, target, device.name, answers=compared(job, result, staged))
    _complain(job, result, folders, target, found, lost)
    return found


def _say(result: Mapping[str, Any]) -> None:
    """What whoever reads the numbers should know of how they came about."""
    for note in result.get("notes", []):
        console.log(note)
    for words in result["circumstances"].get("throttled", []):
        console.warn(f"the board was slowed down while it was measured: {words}")
    for model in result["models"]:
        restless = [name for name, part in model["components"].items() if part.get("steady") is False]
        if restless:
            console.warn(f"{model['id']}: the runs of its {' and '.join(restless)} did not become steady; something else may be at work on the board")


def profiles(job: Mapping[str, Any], result: Mapping[str, Any], folders: Sequence[Path | ModelFile], target: str | Target, transport: str, *,
             answers: Mapping[str, Mapping[str, float]] | None = None) -> list[Profile]:
    """What a board measured as profiles, of those models that it finished: a model that failed has none, and its error is in the result.

    Args:
        folders: of the job's models, in their order.
        answers: id -> component -> how far the board's answers are from ours (`compared`).

    Raises:
        EdgekdError: the result is not one of this job.
    """
    measured = {m["id"]: m for m in result.get("models", [])}
    found = []
    for asked, folder in zip(job["models"], folders, strict=True):
        one = measured.get(asked["id"])
        if one is None or one.get("error"):
            continue
        try:
            found.append(_profile(asked, one, folder, result["circumstances"], target, transport, (answers or {}).get(asked["id"])))
        except (KeyError, TypeError, ValueError) as e:
            raise EdgekdError(f"what the board said of {asked['id']} is not complete: {type(e).__name__} {first_line(e)}", hint="profile it again") from e
    return found


def compared(job: Mapping[str, Any], result: Mapping[str, Any], staged: Path) -> dict[str, dict[str, float]]:
    """id -> component -> relative error (root mean square, the worst output) of the board's answers to those of the same file, on the same inputs, here.
    What cannot be computed here is left out.

    Raises:
        EdgekdError: a component's error is beyond what its precision explains.
    """
    found: dict[str, dict[str, float]] = {}
    measured = {m["id"]: m for m in result.get("models", []) if not m.get("error")}
    for model in job["models"]:
        for name, part in model["components"].items():
            told = measured.get(model["id"], {}).get("components", {}).get(name, {})
            if not told.get("answers") or (session := _here(part, staged)) is None:
                continue
            error = _error(part, told["answers"], session, staged)
            kinds = (told.get("executed_precision") or part["scheme"]).split("+")
            limit = max(LIMITS.get(kind, OTHER) for kind in kinds)
            if not error <= limit:
                raise EdgekdError(f"the board computes something else: its {name} of {model['id']} is off by {error:.2g} of what the same file gives here, and "
                                  f"{limit:g} is what {' and '.join(kinds)} may differ by", where=part["file"],
                                  hint="its runtime is broken or of a version that reads the file differently; compare versions with edgekd doctor")
            found.setdefault(model["id"], {})[name] = error
    return found


def _here(part: Mapping[str, Any], staged: Path) -> Session | None:
    """The staged file on its runtime here, or on what stands in for it; None where there is neither."""
    exporter = plugins.exporter(part["format"])
    available = exporter.availability()
    try:
        if available.runs:
            return exporter.open(staged / part["file"], scheme=part["scheme"])
        session: Session | None = facts(exporter).stand_in(staged / part["file"], scheme=part["scheme"]) if available.ok else None
        return session
    except EdgekdError:
        return None


def _error(part: Mapping[str, Any], answers: Mapping[str, str], session: Session, staged: Path) -> float:
    inputs = {i["name"]: np.fromfile(staged / i["file"], dtype=i["dtype"]).reshape(i["shape"]) for i in part["inputs"]}
    worst = 0.0
    for name, expected in session.run(inputs).items():
        if name not in answers:
            continue
        told = (staged / answers[name]).read_bytes()
        wanted = np.asarray(expected, dtype=np.float64).ravel()
        got = np.frombuffer(told, dtype=expected.dtype if len(told) == expected.nbytes else np.float32).astype(np.float64)
        if got.size != wanted.size:
            return float("inf")
        scale = float(np.linalg.norm(wanted))
        worst = max(worst, float(np.linalg.norm(got - wanted)) / scale if scale else float(np.linalg.norm(got)), key=lambda e: float("inf") if np.isnan(e) else e)
    return worst


def _profile(asked: Mapping[str, Any], one: Mapping[str, Any], folder: Path | ModelFile, circumstances: Mapping[str, Any], target: str | Target, transport: str,
             answers: Mapping[str, float] | None) -> Profile:
    sizes, total = _sizes(folder)
    own = {} if isinstance(folder, ModelFile) else Manifest.load(folder).components
    parts = {name: ComponentProfile(
        latency_ms=Latency.from_samples(p["samples_ms"]), load_ms=p["load_ms"], size_bytes=sizes[name],
        executed_precision=p.get("executed_precision") or _written(own.get(name)) or asked["components"][name]["scheme"],
        executed_ops=p.get("executed_ops") or (own[name].executed_ops if name in own else {})) for name, p in one["components"].items()}
    precision = " / ".join(dict.fromkeys(p.executed_precision for p in parts.values()))
    inputs = {i["name"]: f"{'x'.join(map(str, i['shape']))}:{i['dtype']}" for part in asked["components"].values() for i in part["inputs"]}
    prompts = _prompts(asked)
    return Profile(
        id=folder.path.name if isinstance(folder, ModelFile) else Manifest.load(folder).id, target=target if isinstance(target, str) else target.name,
        prompts=prompts, components=parts, latency_ms=Latency.from_samples(one["together_ms"]), load_ms=sum(p.load_ms for p in parts.values()),
        peak_memory_bytes=one.get("peak_memory_bytes"), size_bytes=total, executed_precision=precision, transport=transport,
        circumstances=Circumstances(**{**circumstances, "precision_executed": precision}), layers=_layers(asked, one, folder), energy_mj=one.get("energy_mj"),
        fell_back={name: p["fell_back"] for name, p in one["components"].items() if p.get("fell_back")}, answers=dict(answers) if answers else None,
        inputs=inputs if isinstance(folder, ModelFile) else None)


def _written(part: ArtifactComponent | None) -> str | None:
    """What was read back from the file where it was written: of runtimes that do not tell what they execute, and execute what the file says."""
    return part.executed_precision if part else None


def _prompts(asked: Mapping[str, Any]) -> int:
    """How many prompts one use answers: the rows of the decoder's points, as often as it is called."""
    decoder = asked["components"].get("decoder")
    rows = [i["shape"][0] for i in (decoder or {}).get("inputs", []) if i["name"] in ("point_labels", "point_coords", "point_embeddings") and i["shape"]]
    return int(rows[0]) * int(decoder["calls"]) if decoder and rows else 1


def _layers(asked: Mapping[str, Any], one: Mapping[str, Any], folder: Path | ModelFile) -> list[Layer] | None:
    """What operators took, under the names of the network's modules where the file tells them."""
    if not any("layers" in p for p in one["components"].values()):
        return None
    found = []
    for name, part in one["components"].items():
        about = asked["components"][name]
        path = folder.path if isinstance(folder, ModelFile) else Path(folder) / Path(about["file"]).name
        found += named(name, part.get("layers") or [], facts(plugins.exporter(about["format"])).modules(path))
    return found


def _complain(job: Mapping[str, Any], result: Mapping[str, Any], folders: Sequence[Path | ModelFile], target: str | Target, found: list[Profile],
              lost: EdgekdError | None) -> None:
    """Raises Partly unless everything was measured."""
    if len(found) == len(folders) and lost is None:
        return
    board_name = target if isinstance(target, str) else target.name
    errors = {m["id"]: m["error"] for m in result.get("models", []) if m.get("error")}
    at, id = next(((i, m["id"]) for i, m in enumerate(job["models"]) if m["id"] in errors), (0, ""))
    where = folders[at].path if isinstance(folders[at], ModelFile) else folders[at]  # type: ignore[union-attr]
    if lost is not None:
        e = Partly(lost.what, where=lost.where, hint=lost.hint)
    elif id:
        others = f"; {len(found)} of {len(folders)} were measured" if len(folders) > 1 else ""
        e = Partly(f"the {'file' if isinstance(folders[at], ModelFile) else 'artifact'} does not run on '{board_name}': {errors[id]['what']}{others}", where=where,
                   hint=errors[id].get("hint"))
    else:
        e = Partly(f"'{board_name}' sent back {len(found)} of {len(folders)} measurements", hint="profile the rest again")
    e.profiles, e.errors = found, {} if lost else {id: error["what"] for id, error in errors.items()}
    raise e from lost


def keep(result: Mapping[str, Any]) -> Path:
    """Put a result that is not complete where it is not lost; its path."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgekd" / "partial"
    return write_json(root / f"{datetime.now(timezone.utc):%Y-%m-%dT%H%M%S%f}.json", json.loads(json.dumps(result)))
