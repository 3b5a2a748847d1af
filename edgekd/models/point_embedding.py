"""What the caller of an `embedded` decoder computes itself: points and labels -> tokens, in float32 on the host. Numpy only.

The numbers of `models/prompt_encoder.py`'s `PromptEncoder.points`, from a small file beside the decoder (`docs/decoder-signatures.md`). The file is
JSON, which phones and browsers read without a library, and holds float32 values exactly.
"""
from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgekd.errors import EdgekdError
from edgekd.protocols import ABSENT, BOX_TOP_LEFT, NOT_A_POINT

FILE = "prompt_encoder.json"
SCHEMA = "edgekd.prompt_encoder/1"
ABSENT_BIAS = -32.0
"""What is added to the attention scores of an absent token in files: e^-32 is far below float32's resolution, and a range that ends there leaves an 8-bit
score steps of a quarter. With -1e4 they would be 39 wide, and all scores of the present tokens one. An absent token's score would have to be 16 above the
best of the others to be noticed; those of the shipped models are at most 1.5 above."""


@dataclass(frozen=True)
class PointEmbedding:
    """Points -> tokens of width E. `gaussian` (2, E/2); `labels`, a label -> its embedding (E,); `side` is F, that of the square points are in;
    `padded`, to how many tokens a prompt is filled up (0: it gets one of its own); `absent_bias`, the attention bias of an absent token."""

    side: int
    padded: int
    absent_bias: float
    gaussian: np.ndarray
    labels: Mapping[int, np.ndarray]

    @property
    def own(self) -> int:
        """Tokens that are added to those of the points."""
        return self.padded or 1

    def __call__(self, points: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """points (P, N, 2) xy in the F frame, labels (P, N) -> tokens (P, N + own, E) and their attention bias (P, N + own), float32."""
        points, labels = np.asarray(points, np.float32), np.asarray(labels, np.float32)
        if self.padded:
            missing = self.padded - (labels != ABSENT).sum(axis=1, keepdims=True)
            extra, place = np.where(np.arange(self.padded) < missing, NOT_A_POINT, ABSENT), -1.0
        else:
            extra, place = np.where((labels >= BOX_TOP_LEFT).any(axis=1, keepdims=True), ABSENT, NOT_A_POINT), 0.0
        labels = np.concatenate([labels, extra.astype(np.float32)], axis=1)
        points = np.concatenate([points, np.full((*extra.shape, 2), place, np.float32)], axis=1)
        angle = np.float32(2 * math.pi) * ((2 * ((points + np.float32(0.5)) / np.float32(self.side)) - 1) @ self.gaussian)
        tokens = np.concatenate([np.sin(angle), np.cos(angle)], axis=-1)
        if not self.padded:
            tokens = tokens * (labels >= 0)[..., None]
        for label, embedding in self.labels.items():
            tokens = tokens + (labels == label)[..., None] * embedding
        return tokens.astype(np.float32), np.where(labels == ABSENT, self.absent_bias, 0.0).astype(np.float32)

    def inputs(self, batched: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Inputs of the `batched` decoder, by name, as those of the `embedded` one."""
        tokens, bias = self(batched["point_coords"], batched["point_labels"])
        kept = {name: value for name, value in batched.items() if name not in ("point_coords", "point_labels")}
        return kept | {"point_tokens": tokens, "token_bias": bias}

    def encode(self) -> bytes:
        """The contents of its file."""
        document = {"schema": SCHEMA, "side": self.side, "padded": self.padded, "absent_bias": self.absent_bias, "gaussian": self.gaussian.tolist(),
                    "labels": {str(label): embedding.tolist() for label, embedding in self.labels.items()}}
        return json.dumps(document, separators=(",", ":")).encode() + b"\n"

    @classmethod
    def decode(cls, contents: bytes, where: Path | str = FILE) -> PointEmbedding:
        """What `encode` wrote.

        Raises:
            EdgekdError: it is not that.
        """
        try:
            found = json.loads(contents)
            if found["schema"] != SCHEMA:
                raise ValueError(f"its schema is {found['schema']!r}, not {SCHEMA!r}")
            gaussian = np.array(found["gaussian"], np.float32)
            labels = {int(label): np.array(embedding, np.float32) for label, embedding in found["labels"].items()}
            if gaussian.ndim != 2 or any(embedding.shape != (2 * gaussian.shape[1],) for embedding in labels.values()):
                raise ValueError("its tables do not fit each other")
            return cls(int(found["side"]), int(found["padded"]), float(found["absent_bias"]), gaussian, labels)
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            reason = f"it has no {e}" if isinstance(e, KeyError) else e
            raise EdgekdError(f"the host's part of the decoder cannot be read: {reason}", where=where, hint="export the model again") from e
