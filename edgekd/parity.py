"""An artifact against the model it came from, on the runtime's own output: what all tasks share. Each task compares what its users see.

How far numbers may differ in fp32 is stated once, in `EXACT`; a task says what a reduced precision may do (`LOSSY` of its parity module).
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgekd.errors import EdgekdError


@dataclass(frozen=True)
class Limits:
    """What still counts as the same model: the largest difference, `max_abs` in the outputs' own unit or `max_relative` as a share of the
    reference's largest value, whichever is more; and the least of what users see: mask IoU, or the task's own agreement."""

    max_relative: float
    min_mask_iou: float
    max_abs: float = 0.0


EXACT = Limits(max_relative=1e-5, min_mask_iou=0.999, max_abs=1e-4)
"""fp32: within 1e-4 for logits up to 10, within 1e-5 of the largest above that (shipped models: 2e-5 for logits of 20, in both runtimes)"""


def sound(model: str, what: str, output: np.ndarray) -> None:
    """Raises EdgekdError when an output is NaN, infinite or constant: anything or nothing would agree with it."""
    if not np.isfinite(output).all():
        raise EdgekdError(f"the model's {what} holds NaN or infinity", where=model, hint="its weights are damaged or training diverged")
    if output.std() < 1e-8:
        raise EdgekdError(f"the model's {what} is constant, so that any file would agree with it", where=model,
                          hint="its weights look uninitialised: load a checkpoint")


def difference(reference: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """max_abs, max_relative (of the reference's largest value), relative_l2 and whether everything is finite."""
    finite = bool(np.isfinite(other).all())
    gap = np.abs(reference.astype(np.float64) - (other if finite else np.zeros_like(other)))
    largest, norm = float(np.abs(reference).max()), float(np.linalg.norm(reference))
    return {"max_abs": float(gap.max()), "max_relative": float(gap.max()) / max(largest, 1e-12),
            "relative_l2": float(np.linalg.norm(gap)) / max(norm, 1e-12), "finite": finite}


def too_far(parity: Mapping[str, Any], limits: Limits) -> str | None:
    """Why the numbers of an output are not the model's any more, or None."""
    if not parity["finite"]:
        return "its output holds NaN or infinity"
    if parity["max_abs"] > limits.max_abs and parity["max_relative"] > limits.max_relative:
        return (f"its output differs by up to {parity['max_abs']:.2g}, {parity['max_relative']:.2g} of the range "
                f"(limits {limits.max_abs:g} and {limits.max_relative:g}; either will do)")
    return None
