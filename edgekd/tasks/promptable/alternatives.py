"""How well the IoU head chooses among a model's four masks, against an oracle that knows the truth."""
from __future__ import annotations

from typing import Any

import numpy as np

from edgekd.data.prompts import Prompts
from edgekd.errors import UsageError
from edgekd.tasks.promptable.metrics import iou
from edgekd.tasks.promptable.predictor import THRESHOLD, ModelPredictor, Predictor


def oracle(model: Predictor, state: Any, prompts: Prompts, truth: np.ndarray, kind: str) -> dict[str, np.ndarray]:
    """All four masks of each prompt against the truth.

    Args:
        state: of the photo, from `model.start`.
        truth: (K, H, W) bool, one mask a prompt.
        kind: how the names begin, `box` or `center`.

    Returns:
        (K,) each: `<kind>_oracle_miou`, `<kind>_iou_head_miou` and `<kind>_iou_head_gap`, their difference.

    Raises:
        UsageError: the model gives one mask only (a baseline).
    """
    if not isinstance(model, ModelPredictor):
        raise UsageError(f"'{model.name}' gives one mask a prompt and predicts no IoU, so there is nothing to choose from", hint="leave out the metrics 'oracle'")
    logits, predicted = model.decode(state, prompts)
    # one prompt at a time: four masks of dozens of instances of a large photo would take gigabytes
    true = np.array([iou(state[1].mask_to_image(own) > THRESHOLD, mask) for own, mask in zip(logits, truth, strict=True)])
    best, chosen = true.max(axis=1), true[np.arange(len(true)), np.argmax(predicted, axis=1)]
    return {f"{kind}_oracle_miou": best, f"{kind}_iou_head_miou": chosen, f"{kind}_iou_head_gap": best - chosen}
