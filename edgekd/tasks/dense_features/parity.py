"""An exported model of dense features against the model it came from: the numbers, and the direction of every cell."""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from edgekd.parity import EXACT, difference, sound, too_far
from edgekd.protocols import Component, Session
from edgekd.tasks.dense_features.scoring import cosines, embed

EXACT_COSINE = 0.99999
LOSSY_COSINE = 0.5
"""Mean over cells, of every scheme but fp32. Below it is broken; whether it is good enough is for the accuracy of the artifact to say."""


class Reference:
    """The model's own features of a few images. `images` (n, 3, S, S)."""

    def __init__(self, model: Any, images: np.ndarray) -> None:
        self.images = images
        self.embeddings = np.concatenate([embed(model, image[None]) for image in images])
        sound(model.name, "embedding", self.embeddings)

    def samples(self, part: Component) -> list[dict[str, np.ndarray]]:
        """The images, one a call."""
        return [{"images": image[None]} for image in self.images]

    def adapt(self, part: Component, samples: Iterable[Mapping[str, np.ndarray]]) -> Iterable[Mapping[str, np.ndarray]]:
        """Calibration inputs as they are."""
        return samples

    def compare(self, part: Component, session: Session, scheme: str) -> tuple[dict[str, Any], str | None]:
        """Difference of the features, and the mean and least cosine of a cell."""
        found = np.concatenate([session.run(one)["embedding"] for one in self.samples(part)])
        report: dict[str, Any] = difference(self.embeddings, found)
        each = cosines(_cells(self.embeddings), _cells(found)) if report["finite"] else np.full(1, -1.0)
        least = EXACT_COSINE if scheme == "fp32" else LOSSY_COSINE
        report |= {"cosine": float(each.mean()), "least_cosine": float(each.min()), "images": len(self.images), "limits": {"cosine": least}}
        if not report["finite"]:
            return report, "its output holds NaN or infinity"
        if scheme == "fp32":
            report["limits"] |= {"max_relative": EXACT.max_relative, "max_abs": EXACT.max_abs}
            if reason := too_far(report, EXACT):
                return report, reason
        return report, f"the cosine of its features with the model's is {report['cosine']:.4f} (limit {least:g})" if report["cosine"] < least else None

    def checked(self) -> str:
        """What was compared."""
        return f"parity of the features of {len(self.images)} pictures"


def _cells(embeddings: np.ndarray) -> np.ndarray:
    """(n, E, s, s) -> (n s s, E)."""
    return np.moveaxis(embeddings, 1, -1).reshape(-1, embeddings.shape[1])
