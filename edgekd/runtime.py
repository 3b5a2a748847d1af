"""Opening an artifact: its files on their runtimes behind the task's contract, numpy in and numpy out. No torch."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgekd import artifact, plugins
from edgekd.artifact import Manifest
from edgekd.errors import EdgekdError
from edgekd.protocols import Session

Call = Callable[[], object]
TOGETHER = "together"
"""The call that stands for one use of an artifact, all its components that this takes one after the other."""


class Opened:
    """An artifact with its sessions, which open when first used and stay open. Every task has a class of its own above this one."""

    def __init__(self, folder: Path, manifest: Manifest, *, threads: int | None = None) -> None:
        self.folder, self.manifest, self.threads = Path(folder), manifest, threads
        self.name, self.embed_dim, self.task = manifest.id, manifest.embed_dim, manifest.task
        self.preprocess = manifest.preprocess.to_preprocess()
        self._sessions: dict[str, Session] = {}

    def session(self, component: str) -> Session:
        """The opened session of one component.

        Raises:
            EdgekdError: no such component, or its runtime is missing or refuses the file.
        """
        if component not in self._sessions:
            if component not in self.manifest.components:
                raise EdgekdError(f"the artifact has no component '{component}'", where=self.folder,
                                  hint=f"components: {', '.join(self.manifest.components)}")
            exporter = plugins.exporter(self.manifest.format)
            available = exporter.availability()
            if not available.ok:
                raise EdgekdError(f"the runtime of '{exporter.format}' is missing here: {available.reason}", where=self.folder, hint=available.fix)
            part = self.manifest.components[component]
            self._sessions[component] = exporter.open(self.folder / part.file, scheme=part.scheme, threads=self.threads)
        return self._sessions[component]

    def photos(self, component: str, output: str, images: Any) -> np.ndarray:
        """(B, 3, S, S) or (3, S, S) normalised -> an output of the component that takes photos, (B, ...); one image a call of the runtime."""
        batch = as_array(images)
        batch = batch[None] if batch.ndim == 3 else batch
        session = self.session(component)
        return np.concatenate([session.run({"images": image[None]})[output] for image in batch])

    def calls(self, prompts: int) -> dict[str, Call]:
        """What is timed: each component alone, and `TOGETHER`."""
        raise NotImplementedError


def open_artifact(folder: Path, *, threads: int | None = None, verify: bool = True) -> Any:
    """Open an artifact folder (or its manifest) as its task does, after comparing its files with their hashes unless told otherwise.

    Raises:
        EdgekdError: it is no artifact, or a file is missing or damaged.
    """
    manifest = artifact.verify(folder) if verify else Manifest.load(folder)
    return plugins.task(manifest.task).open(artifact.manifest_path(folder).parent, manifest, threads=threads)


def as_array(value: Any) -> np.ndarray:
    """An array or a torch tensor (any device, with or without gradient) -> contiguous float32 array."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().float().numpy()
    return np.ascontiguousarray(value, dtype=np.float32)
