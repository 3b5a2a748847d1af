"""An exported model of dense features on its runtime, numpy in and numpy out. No torch."""
from __future__ import annotations

from typing import Any

import numpy as np

from edgekd.probes import pictures
from edgekd.runtime import TOGETHER, Call, Opened


class ArtifactFeatures(Opened):
    """Photos in, features out."""

    def embed(self, images: Any) -> np.ndarray:
        """(B, 3, S, S) or (3, S, S) normalised -> (B, E, s, s)."""
        return self.photos("encoder", "embedding", images)

    def calls(self, prompts: int) -> dict[str, Call]:
        """One photo."""
        session, image = self.session("encoder"), {"images": pictures(1, self.preprocess.image_size, np.random.default_rng(0))}
        return {"encoder": lambda: session.run(image), TOGETHER: lambda: session.run(image)}
