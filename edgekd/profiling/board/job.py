"""The job a board is given: what `job.json` says (schema `edgekd.job/1`), read and checked. docs/devices.md describes it and the result."""
from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

JOB, RESULT, PARTIAL = "edgekd.job/1", "edgekd.measured/1", "result.partial.jsonl"
DTYPES = {"float32": 4, "float16": 2, "float64": 8, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1}
"""numpy's name of a type -> bytes of one number"""
TOGETHER = "together"


class Trouble(Exception):
    """Something that the one at the other end must read: what is wrong, and what to do about it."""

    def __init__(self, what: str, hint: str | None = None) -> None:
        super().__init__(what)
        self.what, self.hint = what, hint

    def told(self) -> dict[str, Any]:
        """As a result carries it."""
        return {"what": self.what, "hint": self.hint}


@dataclass
class Input:
    """One array a component is given: a file of raw little-endian numbers in C order."""

    name: str
    dtype: str
    shape: list[int]
    file: str
    dynamic: bool = False
    """Whether the file takes other shapes too."""


@dataclass
class Part:
    """A component: its files (absolute paths), what it is given, and how often one use of the model calls it."""

    name: str
    format: str
    scheme: str
    file: str
    files: list[str]
    inputs: list[Input]
    outputs: list[str]
    calls: int = 1
    providers: list[str] | None = None

    def arrays(self) -> dict[str, Any]:
        """The inputs as numpy arrays, by name."""
        import numpy as np

        return {i.name: np.fromfile(i.file, dtype=np.dtype(i.dtype).newbyteorder("<")).astype(i.dtype, copy=False).reshape(i.shape) for i in self.inputs}


@dataclass
class Model:
    """What is measured as one: `together` are the components that one use takes, in their order."""

    id: str
    parts: dict[str, Part]
    together: list[str]


@dataclass
class Job:
    """See docs/devices.md. `folder` holds all files; `key` changes with anything in the job."""

    folder: str
    key: str
    models: list[Model]
    threads: int | None = None
    warmup: int = 3
    repeats: int = 30
    max_seconds: float = 8.0
    mode: str = "count"
    memory: bool = True
    layers: bool = False
    answers: bool = True
    tools: dict[str, str] = field(default_factory=dict)
    hang_seconds: float = 300.0
    """A process that says nothing for as long is taken for dead; building an engine has a limit of its own."""


def read(path: str) -> Job:
    """The job in a file.

    Raises:
        Trouble: there is none, it is of another version, something in it is missing or wrong, or a file it names is not there.
    """
    try:
        with open(path, encoding="utf-8") as f:
            text = f.read()
        raw = json.loads(text)
    except OSError as e:
        raise Trouble(f"the job cannot be read: {e.strerror or e} ({path})", "name the job.json that edgekd wrote") from e
    except ValueError as e:
        raise Trouble(f"the job is no JSON: {e} ({path})", "copy the folder anew") from e
    if not isinstance(raw, dict) or raw.get("schema") != JOB:
        said = raw.get("schema") if isinstance(raw, dict) else None
        raise Trouble(f"this is no job that this runner knows: it says {said!r}, and {JOB!r} is known", "take job and runner from the same edgekd")
    folder = os.path.dirname(os.path.abspath(path))
    try:
        models = [_model(m, folder) for m in raw["models"]]
        told: dict[str, Any] = {name: kind(raw[name]) for name, kind in KINDS.items() if raw.get(name) is not None}
        job = Job(folder, hashlib.sha256(text.encode()).hexdigest()[:16], models, **told)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise Trouble(f"something in the job is missing or wrong: {type(e).__name__} {e} ({path})", "take job and runner from the same edgekd") from e
    _check(job)
    return job


KINDS: dict[str, Any] = {"threads": int, "warmup": int, "repeats": int, "max_seconds": float, "mode": str, "memory": bool, "layers": bool, "answers": bool,
                         "tools": dict, "hang_seconds": float}


def _model(raw: Mapping[str, Any], folder: str) -> Model:
    parts = {name: _part(name, part, folder) for name, part in raw["components"].items()}
    together = list(raw.get("together") or parts)
    if not parts or any(name not in parts for name in together):
        raise ValueError(f"model {raw['id']!r} has the components {', '.join(parts)}, and {', '.join(together)} are to run together")
    return Model(str(raw["id"]), parts, together)


def _part(name: str, raw: Mapping[str, Any], folder: str) -> Part:
    inputs = [Input(str(i["name"]), str(i["dtype"]), [int(n) for n in i["shape"]], inside(folder, i["file"]), bool(i.get("dynamic"))) for i in raw["inputs"]]
    return Part(name, str(raw["format"]), str(raw["scheme"]), inside(folder, raw["file"]), [inside(folder, f) for f in raw.get("files") or [raw["file"]]],
                inputs, [str(o) for o in raw.get("outputs") or []], max(1, int(raw.get("calls", 1))), raw.get("providers"))


def inside(folder: str, name: str) -> str:
    """A file of the job. Raises ValueError for one that is not in its folder."""
    path = os.path.normpath(os.path.join(folder, name))
    if os.path.isabs(name) or not path.startswith(folder.rstrip(os.sep) + os.sep):
        raise ValueError(f"{name!r} is not in the job's folder")
    return path


def _check(job: Job) -> None:
    if sys.byteorder != "little":
        raise Trouble("this machine is big-endian, and the job's numbers are little-endian", "none: no such board is known")
    if job.mode not in ("count", "time"):
        raise Trouble(f"no way to measure by {job.mode!r}", "it is 'count' or 'time'")
    for model in job.models:
        for part in model.parts.values():
            for file in [*part.files, *(i.file for i in part.inputs)]:
                if not os.path.exists(file):
                    raise Trouble(f"a file of the job is missing: {os.path.relpath(file, job.folder)}", "copy the whole folder")
            for i in part.inputs:
                if i.dtype not in DTYPES:
                    raise Trouble(f"the input {i.name} is of {i.dtype}, which is none of {', '.join(DTYPES)}", "take job and runner from the same edgekd")
                wanted, there = math.prod(i.shape) * DTYPES[i.dtype], os.path.getsize(i.file)
                if there != wanted:
                    raise Trouble(f"the input {i.name} has {there} bytes instead of {wanted}: {os.path.relpath(i.file, job.folder)}", "copy the folder anew")
