"""An exported classifier on its runtime, numpy in and numpy out. No torch."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edgekd.artifact import Manifest
from edgekd.probes import pictures
from edgekd.runtime import TOGETHER, Call, Opened


class ArtifactClassifier(Opened):
    """Photos in, logits out. `classes` is their number, `labels` their names where they are known."""

    def __init__(self, folder: Path, manifest: Manifest, *, threads: int | None = None, stand_in: bool = False) -> None:
        super().__init__(folder, manifest, threads=threads, stand_in=stand_in)
        self.labels = tuple(manifest.labels)
        self.classes = int(manifest.components["classifier"].outputs[0].shape[-1])

    def logits(self, images: Any) -> np.ndarray:
        """(B, 3, S, S) or (3, S, S) normalised -> (B, K)."""
        return self.photos("classifier", "logits", images)

    def calls(self, prompts: int) -> dict[str, Call]:
        """One photo."""
        session, image = self.session("classifier"), {"images": pictures(1, self.preprocess.image_size, np.random.default_rng(0))}
        return {"classifier": lambda: session.run(image), TOGETHER: lambda: session.run(image)}
