"""Opening an artifact: its files on their runtimes behind the task's contract, numpy in and numpy out. No torch."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from edgekd import artifact, console, plugins, workspace
from edgekd.artifact import ArtifactComponent, Manifest, Tensor
from edgekd.errors import EdgekdError
from edgekd.protocols import Session, facts

Call = Callable[[], object]
TOGETHER = "together"
"""The call that stands for one use of an artifact, all its components that this takes one after the other."""


class Opened:
    """An artifact with its sessions, which open when first used and stay open. Every task has a class of its own above this one."""

    def __init__(self, folder: Path, manifest: Manifest, *, threads: int | None = None, stand_in: bool = False) -> None:
        self.folder, self.manifest, self.threads, self.stand_in = Path(folder), manifest, threads, stand_in
        self.name, self.embed_dim, self.task = manifest.id, manifest.embed_dim, manifest.task
        if manifest.preprocess is not None:
            self.preprocess = manifest.preprocess.to_preprocess()
        self._sessions: dict[str, Session] = {}

    @property
    def parts(self) -> Sequence[str]:
        """Its components, in the order of the manifest."""
        return list(self.manifest.components)

    def session(self, component: str) -> Session:
        """The opened session of one component.

        Raises:
            EdgekdError: no such component, or its runtime is missing or refuses the file.
        """
        if component not in self._sessions:
            if component not in self.manifest.components:
                raise EdgekdError(f"the artifact has no component '{component}'", where=self.folder,
                                  hint=f"components: {', '.join(self.manifest.components)}")
            self._sessions[component] = self._open(self.manifest.components[component])
        return self._sessions[component]

    def _open(self, part: ArtifactComponent) -> Session:
        exporter = plugins.exporter(part.format or self.manifest.format)
        available = exporter.availability()
        path = self.folder / part.file
        if available.runs:  # a board need not be able to write what it runs
            return fitted(exporter.open(path, scheme=part.scheme, threads=self.threads), part.inputs, part.outputs, part.fixed)
        session = facts(exporter).stand_in(path, scheme=part.scheme, threads=self.threads) if self.stand_in and available.ok else None
        if session is None:
            raise EdgekdError(f"the runtime of '{exporter.format}' is missing here: {available.reason}", where=self.folder, hint=available.fix)
        console.warn(f"{exporter.format} does not run here; {path.name} is computed by {session.stand_in_for}")  # type: ignore[attr-defined]
        return fitted(session, part.inputs, part.outputs, part.fixed)

    def photos(self, component: str, output: str, images: Any) -> np.ndarray:
        """(B, 3, S, S) or (3, S, S) normalised -> an output of the component that takes photos, (B, ...); one image a call of the runtime."""
        batch = as_array(images)
        batch = batch[None] if batch.ndim == 3 else batch
        session = self.session(component)
        return np.concatenate([session.run({"images": image[None]})[output] for image in batch])

    def calls(self, prompts: int) -> dict[str, Call]:
        """What is timed: each component alone, and `TOGETHER`."""
        raise NotImplementedError


class Fitting:
    """How inputs of any length become those of a file whose axes are fixed: rows of axis 0 go through in several calls, other axes are padded."""

    def __init__(self, inputs: Sequence[Tensor], fixed: Mapping[str, int]) -> None:
        self._inputs, self._fixed = {i.name: i for i in inputs}, fixed
        self.rows = next((symbol for i in inputs if i.shape and isinstance(symbol := i.shape[0], str)), None)

    def calls(self, inputs: Mapping[str, np.ndarray]) -> tuple[list[dict[str, np.ndarray]], int]:
        """The inputs of every call, the last row again where none is left; and how many rows there really are.

        Raises:
            EdgekdError: an axis that is padded is longer than the file's.
        """
        padded = {name: self._pad(name, value) for name, value in inputs.items()}
        rows = {name for name in padded if self.rows and name in self._inputs and self._inputs[name].shape[0] == self.rows}
        if not rows:
            return [padded], 0
        count, size = len(padded[next(iter(rows))]), self._fixed[str(self.rows)]
        picks = [[min(first + i, count - 1) for i in range(size)] for first in range(0, count, size)]
        return [{n: np.ascontiguousarray(v[picked]) if n in rows else v for n, v in padded.items()} for picked in picks], count

    def _pad(self, name: str, value: np.ndarray) -> np.ndarray:
        described = self._inputs.get(name)
        for axis, symbol in enumerate(described.shape if described else []):
            if axis == 0 or not isinstance(symbol, str):
                continue
            missing = self._fixed[symbol] - value.shape[axis]
            if missing < 0:
                raise EdgekdError(f"the file takes {self._fixed[symbol]} {symbol} at most, and is given {value.shape[axis]}", where=name,
                                  hint=f"export it again with --length {symbol}={value.shape[axis]}")
            widths = [(0, missing if a == axis else 0) for a in range(value.ndim)]
            value = np.pad(value, widths, constant_values=(described.pad if described else None) or 0.0) if missing else value
        return value


class Fitted:
    """A session whose file takes axes of one length, behind calls of any."""

    def __init__(self, session: Session, inputs: Sequence[Tensor], outputs: Sequence[Tensor], fixed: Mapping[str, int]) -> None:
        self.session, self.fixed, self._fitting = session, fixed, Fitting(inputs, fixed)
        self._follow = {o.name for o in outputs if o.shape and o.shape[0] == self._fitting.rows}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `edgekd.protocols.Session`."""
        calls, count = self._fitting.calls(inputs)
        found = [self.session.run(one) for one in calls]
        return {n: np.concatenate([one[n] for one in found])[:count] if n in self._follow else found[0][n] for n in found[0]}


class Refitted:
    """Calibration inputs of any length, as a file whose axes are fixed takes them. Re-iterable."""

    def __init__(self, samples: Iterable[Mapping[str, np.ndarray]], inputs: Sequence[Tensor], fixed: Mapping[str, int]) -> None:
        self._samples, self._fitting, self._fixed = samples, Fitting(inputs, fixed), dict(fixed)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for sample in self._samples:
            yield from self._fitting.calls(sample)[0]

    def fingerprint(self) -> str | None:
        """See `fingerprint_of`."""
        return fingerprint_of(self._samples, "refitted", self._fixed)


def fingerprint_of(samples: Any, *changed: Any) -> str | None:
    """Changes with what calibration inputs yield and with what is done to them (JSON-like values); None where they do not tell what they yield."""
    own = samples.fingerprint() if hasattr(samples, "fingerprint") else None
    return own and workspace.fingerprint([own, *changed])


def fitted(session: Session, inputs: Sequence[Tensor], outputs: Sequence[Tensor], fixed: Mapping[str, int]) -> Session:
    """The session, behind `Fitted` when its file's axes are fixed."""
    return cast(Session, Fitted(session, inputs, outputs, fixed)) if fixed else session


def open_artifact(folder: Path, *, threads: int | None = None, verify: bool = True, stand_in: bool = False) -> Any:
    """Open an artifact folder (or its manifest) as its task does, after comparing its files with their hashes unless told otherwise.

    Args:
        stand_in: where the format's runtime is not, take what computes the file's contents in its place (`edgekd.protocols.Facts.stand_in`).

    Raises:
        EdgekdError: it is no artifact, or a file is missing or damaged.
    """
    manifest = artifact.verify(folder) if verify else Manifest.load(folder)
    return plugins.task(manifest.task).open(artifact.manifest_path(folder).parent, manifest, threads=threads, stand_in=stand_in)


def as_array(value: Any) -> np.ndarray:
    """An array or a torch tensor (any device, with or without gradient) -> contiguous float32 array."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().float().numpy()
    return np.ascontiguousarray(value, dtype=np.float32)
