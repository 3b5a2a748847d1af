"""IoU, how sure a mean is, and the names of all numbers that an evaluation can give."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgekd.errors import UsageError, unknown
from edgekd.tasks.evaluation import bootstrap_interval

GROUPS: dict[str, dict[str, str]] = {
    "box": {"box_miou": "the ground-truth box"},
    "center": {"center_miou": "one click at the mask's innermost pixel"},
    "clicks": {"center_plus1_miou": "the centre click and one more, drawn uniformly from the pixels the model got wrong",
               "center_plus2_miou": "the centre click and two more"},
    "oracle": {
        "box_oracle_miou": "the ground-truth box; of the model's four masks the one with the highest true IoU",
        "box_iou_head_miou": "the same box; of the four masks the one with the highest predicted IoU",
        "box_iou_head_gap": "box_oracle_miou - box_iou_head_miou: what a perfect IoU head would gain",
        "center_oracle_miou": "the centre click; of the four masks the one with the highest true IoU",
        "center_iou_head_miou": "the same click; of the four masks the one with the highest predicted IoU",
        "center_iou_head_gap": "center_oracle_miou - center_iou_head_miou"},
    "noc": {
        "noc80": "clicks until IoU 0.8, each at the deepest wrong pixel; 20 where 20 are not enough",
        "noc90": "clicks until IoU 0.9",
        "noc80_failure": "share of instances that 20 clicks do not bring to IoU 0.8",
        "noc90_failure": "share of instances that 20 clicks do not bring to IoU 0.9"},
    "everything": {
        "everything_ar10": "COCO's average recall (IoU 0.5:0.95, class-agnostic) of the 10 best masks of segment-everything",
        "everything_ar100": "of the 100 best masks", "everything_ar1000": "of the 1000 best masks",
        "everything_ar1000_small": "instances below 32² pixels only", "everything_ar1000_medium": "instances of 32² to 96² pixels",
        "everything_ar1000_large": "instances above 96² pixels"},
}
"""Group, as it is asked for -> name of the number -> what it is. All are means over instances; `noc*` (clicks) apart all lie in 0..1. The one
place where they are written down: the protocol of a result quotes it."""
DEFAULT_GROUPS = ("box", "center", "clicks")
AGREEMENTS = {"box": "IoU with the teacher's mask on the same box", "center": "IoU with the teacher's mask on the same centre click"}
DETECTION = {
    "ap": "COCO's AP of masks, IoU 0.5:0.95, mean over categories", "ap50": "AP at IoU 0.5", "ap75": "AP at IoU 0.75",
    "ap_small": "AP of instances below 32² pixels", "ap_medium": "AP of instances of 32² to 96² pixels", "ap_large": "AP of instances above 96² pixels",
}
"""The names of `edgekd.tasks.promptable.detection`."""


def check_groups(groups: Sequence[str]) -> tuple[str, ...]:
    """The groups asked for, each once, in the order of `GROUPS`.

    Raises:
        UsageError: none, or one that there is not.
    """
    for group in groups:
        if group not in GROUPS:
            raise unknown("metric group", group, GROUPS)
    if not groups:
        raise UsageError("there is nothing to measure", hint=f"groups of metrics: {', '.join(GROUPS)}")
    return tuple(g for g in GROUPS if g in groups)


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(..., H, W) bool masks -> (...) intersection over union; 1 where both are empty."""
    both = np.logical_and(a, b).sum(axis=(-2, -1))
    either = np.logical_or(a, b).sum(axis=(-2, -1))
    return np.where(either == 0, 1.0, both / np.maximum(either, 1))


def weight(row: Mapping[str, Any], metric: str) -> int:
    """The number of instances that a photo's mean of a metric is over."""
    return int(row.get("counts", {}).get(metric, row["instances"]))


def paired_interval(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]], metric: str, *, seed: int = 0,
                    level: float = 0.95) -> dict[str, float]:
    """How much better the first of two models is than the second on the same photos.

    The photos are drawn again for both at once: what makes a photo hard for both falls out of the difference, so the interval is much
    narrower than the two models' own. A difference whose interval holds 0 shows nothing.

    Args:
        first, second: the `per_image` rows of two evaluations by one protocol.
        metric: as in the rows, `teacher_agreement.box` for agreements.

    Returns:
        `difference`, `low` and `high`.

    Raises:
        UsageError: the rows are not of the same photos and instances, or one lacks the metric.
    """
    mine, others = ({r["id"]: r for r in rows if metric in r} for rows in (first, second))
    if not mine or not others:
        raise UsageError(f"one of the two evaluations has no {metric} of each photo", hint="evaluate both with the same metrics")
    if mine.keys() != others.keys() or any(weight(mine[i], metric) != weight(others[i], metric) for i in mine):
        raise UsageError(f"the two evaluations are not of the same photos and instances, so their {metric} cannot be compared photo by photo",
                         hint="evaluate both on the same data with the same seed and limits")
    counts = np.array([weight(row, metric) for row in mine.values()])
    gains = np.array([row[metric] - others[i][metric] for i, row in mine.items()]) * counts
    low, high = bootstrap_interval(gains, counts, seed=seed, level=level)
    return {"difference": float(gains.sum() / counts.sum()), "low": low, "high": high}
