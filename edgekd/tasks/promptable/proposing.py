"""Boxes that a model's proposer finds in its embedding, for torch models and artifacts alike."""
from __future__ import annotations

from typing import Any

import numpy as np

from edgekd.data.images import Frame
from edgekd.protocols import Promptable
from edgekd.tasks.promptable.predictor import as_array, inference


def has_proposer(model: Promptable) -> bool:
    """Whether a torch model carries a proposer, or an artifact has one among its components."""
    manifest = getattr(model, "manifest", None)
    return "proposer" in manifest.components if manifest is not None else getattr(model, "proposer", None) is not None


def propose(model: Promptable, state: tuple[Any, Frame]) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (Q, 4) xyxy in pixels of the photo, clipped to it, and their scores (Q,) in 0..1. Boxes without area are left out.

    `state` is what `ModelPredictor.start` returned.
    """
    embedding, frame = state
    anything: Any = model
    with inference(model):
        boxes, scores = anything.propose(embedding)
    found = (as_array(boxes) / np.tile(frame.ratio, 2)).clip(0, [frame.width, frame.height] * 2)
    whole = (found[:, 2:] - found[:, :2] >= 1).all(axis=1)
    return found[whole], as_array(scores)[whole]
