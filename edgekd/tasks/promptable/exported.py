"""An exported promptable model: encoder, decoder and perhaps a proposer on their runtime, numpy in and numpy out. No torch."""
from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np

from edgekd.artifact import DecoderSignature
from edgekd.errors import EdgekdError
from edgekd.models.point_embedding import FILE, PointEmbedding
from edgekd.probes import pictures, probe
from edgekd.protocols import ABSENT, BOX_TOP_LEFT, NOT_A_POINT
from edgekd.runtime import TOGETHER, Call, Opened, as_array

OUTPUTS: dict[DecoderSignature, tuple[str, str]] = {"batched": ("masks", "iou"), "sam": ("low_res_masks", "iou_predictions"), "embedded": ("masks", "iou")}
"""decoder signature -> names of its mask logits (., 4, F/4, F/4) and their IoU"""


class ArtifactModel(Opened):
    """An exported promptable model (see `edgekd.protocols.Promptable`)."""

    def embed(self, images: Any) -> np.ndarray:
        """(B, 3, S, S) or (3, S, S) normalised -> (B, E, F/16, F/16); one image per call of the runtime."""
        return self.photos("encoder", "image_embeddings", images)

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
        given = {"image_embeddings": embedding, "point_coords": points, "point_labels": labels, "mask_input": mask_input, "has_mask": has_mask}
        return [self.point_embedding.inputs(given) if self.manifest.decoder_signature == "embedded" else given]

    @cached_property
    def point_embedding(self) -> PointEmbedding:
        """What embeds points for a decoder with the signature `embedded`.

        Raises:
            EdgekdError: the artifact has no such file, or it cannot be read.
        """
        path = self.folder / FILE
        if FILE not in self.manifest.components["decoder"].host or not path.is_file():
            raise EdgekdError(f"the decoder takes embedded points, and {FILE}, which they are embedded with, is missing", where=self.folder,
                              hint="export the model again, or copy the whole folder")
        return PointEmbedding.decode(path.read_bytes(), path)

    def propose(self, embedding: Any) -> tuple[np.ndarray, np.ndarray]:
        """Embedding (1, E, s, s) of ONE image -> boxes (Q, 4) xyxy in the F frame and their scores (Q,) in 0..1, unsorted.

        Raises:
            EdgekdError: the artifact has no proposer.
        """
        out = self.session("proposer").run({"image_embeddings": as_array(embedding)})
        return out["boxes"][0], out["scores"][0]

    def calls(self, prompts: int) -> dict[str, Call]:
        """The encoder alone, the decoder alone for `prompts` clicks, and one after the other with what the signature leaves to the caller: ready
        to be timed. The proposer belongs to segment-everything, not to a prompt: it is not in `TOGETHER`."""
        rng, spec = np.random.default_rng(0), self.preprocess
        image = {"images": pictures(1, spec.image_size, rng)}
        encoder, decoder = self.session("encoder"), self.session("decoder")
        p = probe("point", prompts, spec.side, rng)
        embedded = encoder.run(image)["image_embeddings"]
        asked = self.feeds(embedded, p.points, p.labels, p.mask_input, p.has_mask)

        def together() -> object:
            embedding = encoder.run(image)["image_embeddings"]
            return [decoder.run(one) for one in self.feeds(embedding, p.points, p.labels, p.mask_input, p.has_mask)]

        alone: dict[str, Call] = {"encoder": lambda: encoder.run(image), "decoder": lambda: [decoder.run(one) for one in asked], TOGETHER: together}
        if "proposer" in self.manifest.components:
            proposer = self.session("proposer")
            alone["proposer"] = lambda: proposer.run({"image_embeddings": embedded})
        return alone


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
