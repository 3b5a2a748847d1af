"""Interactive segmentation: how many clicks until a mask is good (NoC, the number of clicks).

Protocol of the field (RITM, arXiv 2102.06583, sec. 4): the first click at the innermost pixel of the object, each next one at the deepest
wrong pixel; an instance that 20 clicks do not bring to the wanted IoU counts as 20 and as a failure.
"""
from __future__ import annotations

from typing import Any

import numpy as np

from edgekd.data.prompts import Prompts, center_clicks, deepest_error
from edgekd.protocols import ABSENT
from edgekd.tasks.promptable.metrics import iou
from edgekd.tasks.promptable.predictor import Masks, Predictor, max_points

TARGETS = {"noc80": 0.8, "noc90": 0.9}
MOST_CLICKS = 20


def number_of_clicks(model: Predictor, state: Any, truth: np.ndarray, *, first: Masks | None = None, feed_mask: bool = True,
                     most: int = MOST_CLICKS) -> dict[str, np.ndarray]:
    """Click until every instance is good, all instances of the photo in one call a click.

    A model that takes fewer than `most` points in a prompt cannot be corrected any further; what it did not reach by then is a failure.

    Args:
        state: of the photo, from `model.start`.
        truth: (K, H, W) bool.
        first: the answers to the centre clicks, where they are known already.
        feed_mask: give the logits of the last answer along with the next click.

    Returns:
        For each name in `TARGETS`: (K,) clicks, and under `<name>_failure` (K,) 0 or 1.
    """
    prompts = Prompts.clicks(center_clicks(truth))
    answer = model.masks(state, prompts) if first is None else first
    reached = {name: np.full(len(truth), most + 1) for name in TARGETS}
    clicked = np.zeros(truth.shape, dtype=bool)
    open_ = np.arange(len(truth))
    can = min(most, max_points(model) or most)
    for clicks in range(1, most + 1):
        quality = iou(answer.masks, truth[open_])
        for name, wanted in TARGETS.items():
            reached[name][open_] = np.where(quality >= wanted, np.minimum(reached[name][open_], clicks), reached[name][open_])
        going = quality < max(TARGETS.values())
        if clicks >= can or not going.any():
            break
        _remember(clicked, open_, prompts)
        open_, prompts = open_[going], prompts[going]
        logits = answer.logits[going] if feed_mask and answer.logits is not None else None
        prompts = prompts.join(_next_clicks(answer.masks[going], truth[open_], clicked[open_]))
        answer = model.masks(state, prompts, logits)
    found: dict[str, np.ndarray] = {name: np.minimum(r, most).astype(float) for name, r in reached.items()}
    return {**found, **{f"{name}_failure": (r > most).astype(float) for name, r in reached.items()}}


def _remember(clicked: np.ndarray, which: np.ndarray, prompts: Prompts) -> None:
    """Mark the pixels of the last click of each prompt."""
    at = np.floor(prompts.points[:, -1]).astype(int)
    real = prompts.labels[:, -1] != ABSENT
    clicked[which[real], at[real, 1], at[real, 0]] = True


def _next_clicks(predicted: np.ndarray, truth: np.ndarray, clicked: np.ndarray) -> Prompts:
    """One more click for each of (K, H, W) answers."""
    found = [deepest_error(p, t, c) for p, t, c in zip(predicted, truth, clicked, strict=True)]
    return Prompts.clicks(np.array([f[0] for f in found]), np.array([f[1] for f in found], dtype=int))
