"""An exported classifier against the model it came from: logits as numbers, and the class that users see."""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from edgekd.parity import EXACT, difference, sound, too_far
from edgekd.probes import pictures
from edgekd.protocols import Component, Session
from edgekd.tasks.classification.scoring import logits_of

PICTURES = 16
"""Seeded pictures beside the given images in fp32. Ranges that were found on photos do not hold for them: 8 bits are compared on what is given."""
TIE = 0.02
"""Of the range of a picture's logits: classes that are nearer to the likeliest than this are as good as it. Below the noise of 8 bits."""
EXACT_TOP1 = 1.0
LOSSY_TOP1, LOSSY_ERROR = 0.5, 0.7
"""Of every scheme but fp32. Worse is broken; whether it is good enough is for the accuracy of the artifact to say. The error is relative to the spread
of the logits (8-bit EfficientNet-Lite0 in onnxruntime: 0.48, with 0.85 of the classes the same)."""


class Reference:
    """The model's own logits of a few photos and of seeded pictures. `images` (n, 3, S, S)."""

    def __init__(self, model: Any, images: np.ndarray, *, seed: int = 0) -> None:
        self.given = len(images)
        self.images = np.concatenate([images, pictures(PICTURES, model.preprocess.image_size, np.random.default_rng(seed))]).astype(np.float32)
        self.logits = logits_of(model, self.images)
        sound(model.name, "logits", self.logits)

    def samples(self, part: Component) -> list[dict[str, np.ndarray]]:
        """The images that were given, one a call."""
        return [{"images": image[None]} for image in self.images[: self.given]]

    def adapt(self, part: Component, samples: Iterable[Mapping[str, np.ndarray]]) -> Iterable[Mapping[str, np.ndarray]]:
        """Calibration inputs as they are."""
        return samples

    def compare(self, part: Component, session: Session, scheme: str) -> tuple[dict[str, Any], str | None]:
        """Difference of the logits, its size relative to their spread, and the share of pictures with the same class."""
        count = len(self.images) if scheme == "fp32" else self.given
        expected, found = self.logits[:count], np.concatenate([session.run({"images": image[None]})["logits"] for image in self.images[:count]])
        report: dict[str, Any] = difference(expected, found)
        spread = expected - expected.mean(axis=-1, keepdims=True)
        relative = float(np.linalg.norm(expected - found) / max(float(np.linalg.norm(spread)), 1e-12)) if report["finite"] else float("inf")
        report |= {"relative_error": relative, "top1_agreement": same_class(expected, found), "images": count}
        if scheme == "fp32":
            report["limits"] = {"max_relative": EXACT.max_relative, "max_abs": EXACT.max_abs, "top1_agreement": EXACT_TOP1}
            return report, too_far(report, EXACT) or _classes(report["top1_agreement"], EXACT_TOP1)
        report["limits"] = {"relative_error": LOSSY_ERROR, "top1_agreement": LOSSY_TOP1}
        if not report["finite"]:
            return report, "its output holds NaN or infinity"
        if relative > LOSSY_ERROR:
            return report, f"its logits differ by {relative:.2g} of their spread (limit {LOSSY_ERROR:g})"
        return report, _classes(report["top1_agreement"], LOSSY_TOP1)

    def checked(self) -> str:
        """What was compared."""
        return f"parity of logits and of the likeliest class on {len(self.images)} pictures"


def same_class(reference: np.ndarray, other: np.ndarray) -> float:
    """Share of the rows (N, K) whose largest entry in `other` is the largest of `reference`, or one of those as large but for `TIE`."""
    chosen = np.take_along_axis(reference, np.nan_to_num(other).argmax(-1)[:, None], -1)[:, 0]
    largest, smallest = reference.max(-1), reference.min(-1)
    return float((chosen >= largest - TIE * (largest - smallest)).mean())


def _classes(found: float, least: float) -> str | None:
    return f"it names the model's class for {found:.3f} of the pictures only (limit {least:g})" if found < least else None
