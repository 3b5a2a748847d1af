"""Test-time augmentation: the teacher answers as the average over a photo and its mirror images.

Averages of predictions over transformed copies of a photo are old (Krizhevsky et al. 2012); Shanmugam et al., "Better Aggregation in
Test-Time Augmentation" (arXiv 2011.11156), say when they help. As a teacher, the average is what the student learns in one pass.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from edgekd.distillation.points import Preparation
from edgekd.distillation.preparations._prepared import Ask, View, averaged, stride_of, with_outputs
from edgekd.distillation.taps import Seen
from edgekd.errors import UsageError
from edgekd.protocols import Dataset


class Tta(Preparation):
    """Mean over the photo and its mirror images: of embeddings mirrored back, and of logits and pooled features as they are.

    It makes every look of the teacher 2 (or 4) times as dear. Taps inside the teacher stay those of the photo itself.

    Args:
        flips: "horizontal", or "both" for up and down too, for photos without an upright.
    """

    name, family, paper = "tta", "teacher_preparation", "Better Aggregation in Test-Time Augmentation (arXiv 2011.11156)"

    def __init__(self, flips: str = "horizontal") -> None:
        if flips not in ("horizontal", "both"):
            raise UsageError(f"tta takes flips horizontal or both, not '{flips}'")
        self.flips = flips

    def prepare(self, teacher: Any, data: Dataset, folder: Path) -> Any:
        """The same teacher with averaged outputs."""
        views = [View(flip=True)] if self.flips == "horizontal" else [View(flip=True), View(upside_down=True), View(flip=True, upside_down=True)]
        stride, width = stride_of(teacher), getattr(teacher, "embed_dim", None)

        def change(ask: Ask, images: Tensor) -> Seen:
            return averaged(ask, images, views, stride, width, everything=True)

        return with_outputs(teacher, change, "tta", [len(views)])


preparation = Tta
