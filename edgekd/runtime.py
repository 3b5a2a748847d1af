"""Opening an artifact: its files on their runtimes behind the task's contract, numpy in and numpy out. No torch."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from edgekd import artifact, plugins
from edgekd.artifact import DecoderSignature, Manifest
from edgekd.errors import EdgekdError
from edgekd.protocols import ABSENT, BOX_TOP_LEFT, NOT_A_POINT, Session

OUTPUTS: dict[DecoderSignature, tuple[str, str]] = {"batched": ("masks", "iou"), "sam": ("low_res_masks", "iou_predictions")}
"""decoder signature -> names of its mask logits (., 4, F/4, F/4) and their IoU"""


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
        session = self.session("decoder")
        found = [session.run(one) for one in self.feeds(as_array(embedding), points, as_array(labels), as_array(mask_input), as_array(has_mask))]
        masks, iou = OUTPUTS[self.manifest.decoder_signature]
        return np.concatenate([o[masks] for o in found]), np.concatenate([o[iou] for o in found])

    def feeds(self, embedding: np.ndarray, points: np.ndarray, labels: np.ndarray, mask_input: np.ndarray, has_mask: np.ndarray) -> list[dict[str, np.ndarray]]:
        """The decoder file's inputs for P prompts (see `decode`): one call, or P calls where its signature takes one prompt."""
        if self.manifest.decoder_signature == "sam":
            return list(official_inputs(embedding, points, labels, mask_input, has_mask))
        return [{"image_embeddings": embedding, "point_coords": points, "point_labels": labels, "mask_input": mask_input, "has_mask": has_mask}]

    def propose(self, embedding: Any) -> tuple[np.ndarray, np.ndarray]:
        """Embedding (1, E, s, s) of ONE image -> boxes (Q, 4) xyxy in the F frame and their scores (Q,) in 0..1, unsorted.

        Raises:
            EdgekdError: the artifact has no proposer.
        """
        out = self.session("proposer").run({"image_embeddings": as_array(embedding)})
        return out["boxes"][0], out["scores"][0]


def open_artifact(folder: Path, *, threads: int | None = None, verify: bool = True) -> ArtifactModel:
    """Open an artifact folder (or its manifest), after comparing its files with their hashes unless told otherwise.

    Raises:
        EdgekdError: it is no artifact, or a file is missing or damaged.
    """
    manifest = artifact.verify(folder) if verify else Manifest.load(folder)
    return ArtifactModel(artifact.manifest_path(folder).parent, manifest, threads=threads)


def official_inputs(
    embedding: np.ndarray, points: np.ndarray, labels: np.ndarray, mask_input: np.ndarray, has_mask: np.ndarray, size: tuple[int, int] = (1, 1)
) -> Iterator[dict[str, np.ndarray]]:
    """Prompts of one image (see `ArtifactModel.decode`) one by one as the inputs of SAM's own decoder signature, for a photo of
    `size` (height, width): absent points left out, the point that stands for "no box" appended."""
    for p, k, m, has in zip(points, labels, mask_input, has_mask, strict=True):
        p, k = p[k != ABSENT], k[k != ABSENT]
        if not (k >= BOX_TOP_LEFT).any():
            p, k = np.concatenate([p, np.zeros((1, 2), np.float32)]), np.append(k, np.float32(NOT_A_POINT))
        yield {"image_embeddings": embedding, "point_coords": as_array(p[None]), "point_labels": as_array(k[None]), "mask_input": as_array(m[None]),
               "has_mask_input": as_array([has]), "orig_im_size": as_array(size)}


def as_array(value: Any) -> np.ndarray:
    """An array or a torch tensor (any device, with or without gradient) -> contiguous float32 array."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().float().numpy()
    return np.ascontiguousarray(value, dtype=np.float32)
