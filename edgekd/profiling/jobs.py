"""Writing a job (`edgekd.job/1`) for a board: the files of models, and the very arrays that `Opened.calls` feeds them, as raw numbers.

What a model is fed is heard from its own calls, so that every task, decoder signature and file of fixed lengths is staged as it is run here. One use is
then the calls of each component as often as it makes them; what a caller computes in between (points that it embeds) is left out.
"""
from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd import plugins
from edgekd.artifact import ArtifactComponent, Tensor
from edgekd.errors import EdgekdError
from edgekd.profiling.bare import PART, ModelFile, OpenedFile
from edgekd.profiling.board.job import JOB
from edgekd.protocols import Session
from edgekd.runtime import TOGETHER, Opened, fitted, open_artifact
from edgekd.workspace import write_json

if TYPE_CHECKING:
    from edgekd.target import Target


@dataclass(frozen=True)
class Asked:
    """How a board is to measure. `prompts` are answered in one use of a promptable model."""

    warmup: int = 3
    repeats: int = 30
    threads: int | None = None
    prompts: int = 1
    max_seconds: float = 8.0
    memory: bool = True
    layers: bool = False
    mode: str = "count"


@dataclass
class _Staged:
    """A component's inputs in one use, and what belongs to it."""

    given: dict[str, np.ndarray]
    calls: int
    outputs: list[str]
    files: list[Path]
    file: Path
    format: str
    scheme: str
    dynamic: set[str]


def stage(folders: Sequence[Path | ModelFile], asked: Asked, target: str | Target, folder: Path) -> dict[str, Any]:
    """Write `job.json` and all it names into `folder`; the job.

    Raises:
        EdgekdError: an artifact is damaged, or a model file alone does not run here, where its inputs are found out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    models: list[dict[str, Any]] = []
    for index, one in enumerate(folders):
        id, parts, together = _of_file(one) if isinstance(one, ModelFile) else _of_artifact(Path(one), asked)
        taken = {m["id"] for m in models}
        own, unique = f"m{index}", next(n for n in (id, *(f"{id} ({k})" for k in range(2, len(folders) + 2))) if n not in taken)
        models.append({"id": unique, "components": {name: _write(part, name, folder, own) for name, part in parts.items()}, "together": together})
    tools = {} if isinstance(target, str) else dict(target.device.tools)
    job = {"schema": JOB, "models": models, "threads": asked.threads, "warmup": asked.warmup, "repeats": asked.repeats, "max_seconds": asked.max_seconds,
           "mode": asked.mode, "memory": asked.memory, "layers": asked.layers, "answers": True, "tools": tools}
    write_json(folder / "job.json", job)
    return job


def _of_artifact(folder: Path, asked: Asked) -> tuple[str, dict[str, _Staged], list[str]]:
    """Its components as they are called in one use, and the order in which one use takes them."""
    model: Opened = open_artifact(folder, threads=asked.threads)
    heard = {name: _Heard(name, _session(model, part), part) for name, part in model.manifest.components.items()}
    order: list[str] = []
    for name, session in heard.items():
        part = model.manifest.components[name]
        model._sessions[name] = fitted(session, part.inputs, part.outputs, part.fixed)
        session.order = order
    calls, found = model.calls(asked.prompts), {}
    for name, session in heard.items():
        session.seen.clear()
        calls[name]()
        part = model.manifest.components[name]
        given = {i.name: session.seen[0][i.name].astype(i.dtype, copy=False) for i in part.inputs if i.name in session.seen[0]}
        beside = [model.folder / f for f in part.files if f not in part.host]
        found[name] = _Staged(given, len(session.seen), [o.name for o in part.outputs], beside, model.folder / part.file, part.format or model.manifest.format,
                              part.scheme, {i.name for i in part.inputs if any(isinstance(n, str) and n not in part.fixed for n in i.shape)})
    order.clear()
    calls[TOGETHER]()
    return model.name, found, list(dict.fromkeys(order))


def _of_file(file: ModelFile) -> tuple[str, dict[str, _Staged], list[str]]:
    opened = OpenedFile(file)
    given = opened.sample()
    dynamic = {p.name for p in opened.session(PART).inputs if None in p.shape}
    outputs = list(opened.session(PART).run(given))
    return opened.name, {PART: _Staged(given, 1, outputs, file.files, file.path, file.format, file.scheme, dynamic)}, [PART]


def _session(model: Opened, part: ArtifactComponent) -> Session | None:
    """The file on its runtime, where that is here; answers of one component are what the next is really given then."""
    exporter = plugins.exporter(part.format or model.manifest.format)
    if not exporter.availability().runs:
        return None
    try:
        return exporter.open(model.folder / part.file, scheme=part.scheme, threads=model.threads)
    except EdgekdError:
        return None  # a runtime of another version: the board's own may do


class _Heard:
    """A session that remembers what it is given. Without a runtime its answers are seeded numbers of the right shapes."""

    def __init__(self, name: str, session: Session | None, part: ArtifactComponent) -> None:
        self._name, self._session, self._part = name, session, part
        self.seen: list[dict[str, np.ndarray]] = []
        self.order: list[str] = []

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `edgekd.protocols.Session`."""
        self.seen.append({name: np.ascontiguousarray(value) for name, value in inputs.items()})
        self.order.append(self._name)
        if self._session is not None:
            return self._session.run(inputs)
        lengths = {symbol: inputs[i.name].shape[axis] for i in self._part.inputs if i.name in inputs
                   for axis, symbol in enumerate(i.shape) if isinstance(symbol, str)} | self._part.fixed
        rng = np.random.default_rng(0)
        return {o.name: _drawn(o, lengths, rng) for o in self._part.outputs}

    inputs: Any = ()
    executed_precision = ""
    executed_ops: Any = {}


def _drawn(port: Tensor, lengths: Mapping[str, int], rng: np.random.Generator) -> np.ndarray:
    shape = [n if isinstance(n, int) else lengths.get(n, 1) for n in port.shape]
    return rng.standard_normal(shape).astype(port.dtype)


def _write(part: _Staged, name: str, folder: Path, own: str) -> dict[str, Any]:
    """Put a component's files and inputs into `folder/own`; its entry in the job."""
    root = part.file.parent
    for file in part.files:
        _place(file, folder / own / file.relative_to(root))
    inputs = []
    for key, value in part.given.items():
        at = f"{own}/{name}-{re.sub(r'[^A-Za-z0-9_-]', '_', key)}.in.bin"
        (folder / at).write_bytes(np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("<")).tobytes())
        inputs.append({"name": key, "dtype": value.dtype.name, "shape": list(value.shape), "file": at, "dynamic": key in part.dynamic})
    return {"format": part.format, "scheme": part.scheme, "file": f"{own}/{part.file.name}", "files": [f"{own}/{f.relative_to(root).as_posix()}" for f in part.files],
            "inputs": inputs, "outputs": part.outputs, "calls": part.calls}


def _place(file: Path, to: Path) -> None:
    """The file once more, as a second name of it where that can be had: models take gigabytes."""
    to.parent.mkdir(parents=True, exist_ok=True)
    if file.is_dir():
        shutil.copytree(file, to, dirs_exist_ok=True)
        return
    if to.exists():
        return  # components may share a file
    try:
        os.link(file.resolve(), to)
    except OSError:
        shutil.copyfile(file, to)
