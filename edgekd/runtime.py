"""Opening an artifact: its files on their runtimes behind the task's contract, numpy in and numpy out. No torch."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edgekd import artifact, plugins
from edgekd.artifact import Manifest
from edgekd.errors import EdgekdError
from edgekd.protocols import Session


class ArtifactModel:
    """An exported promptable model (see `edgekd.protocols.Promptable`). Sessions open when first used and stay open."""

    def __init__(self, folder: Path, manifest: Manifest, *, threads: int | None = None) -> None:
        self.folder, self.manifest, self.threads = Path(folder), manifest, threads
        self.name, self.embed_dim = manifest.id, manifest.embed_dim
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

    def embed(self, images: Any) -> np.ndarray:
        """(B, 3, S, S) or (3, S, S) normalised -> (B, E, F/16, F/16); one image per call of the runtime."""
        batch = as_array(images)
        batch = batch[None] if batch.ndim == 3 else batch
        session = self.session("encoder")
        return np.concatenate([session.run({"images": image[None]})["image_embeddings"] for image in batch])

    def decode(self, embedding: Any, points: Any, labels: Any, mask_input: Any = None, has_mask: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """Prompts of ONE image: embedding (1, E, s, s), points (P, N, 2) xy in the F frame, labels (P, N), mask_input
        (P, 1, F/4, F/4) with has_mask (P,) -> mask logits (P, 4, F/4, F/4), IoU (P, 4)."""
        points, side = as_array(points), self.preprocess.side // 4
        count = points.shape[0]
        if mask_input is None:
            mask_input, has_mask = np.zeros((count, 1, side, side), np.float32), np.zeros(count, np.float32)
        elif has_mask is None:
            has_mask = np.ones(count, np.float32)
        out = self.session("decoder").run({"image_embeddings": as_array(embedding), "point_coords": points, "point_labels": as_array(labels),
                                           "mask_input": as_array(mask_input), "has_mask": as_array(has_mask)})
        return out["masks"], out["iou"]


def open_artifact(folder: Path, *, threads: int | None = None, verify: bool = True) -> ArtifactModel:
    """Open an artifact folder (or its manifest), after comparing its files with their hashes unless told otherwise.

    Raises:
        EdgekdError: it is no artifact, or a file is missing or damaged.
    """
    manifest = artifact.verify(folder) if verify else Manifest.load(folder)
    return ArtifactModel(artifact.manifest_path(folder).parent, manifest, threads=threads)


def as_array(value: Any) -> np.ndarray:
    """An array or a torch tensor (any device, with or without gradient) -> contiguous float32 array."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().float().numpy()
    return np.ascontiguousarray(value, dtype=np.float32)
