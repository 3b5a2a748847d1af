"""Huber loss of the image embedding (NanoSAM, github.com/NVIDIA-AI-IOT/nanosam): squared near 0, absolute beyond, so outliers lead less."""
from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from edgekd.distillation.losses import aligned, over_photo
from edgekd.distillation.outputs import Context, Outputs
from edgekd.distillation.points import Objective


class FeatureHuber(Objective):
    """d^2 / 2 where |d| < delta, delta (|d| - delta / 2) beyond; mean over channels, then over the cells that are more than half photo.

    Args:
        delta: where the square ends, in units of the embedding.
    """

    name, family, paper = "feature_huber", "feature", "NanoSAM (NVIDIA-AI-IOT/nanosam)"
    needs = frozenset({"embedding"})

    def __init__(self, delta: float = 1.0) -> None:
        super().__init__()
        self.delta = delta

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """embeddings (B, E, s, s) -> (B,)."""
        ours, theirs = aligned(student["embedding"], teacher["embedding"])
        return over_photo(F.huber_loss(ours, theirs, reduction="none", delta=self.delta), context.valid)


objective = FeatureHuber
