"""One prompt on one photo -> one mask, and the mask as a PNG."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edgekd.data.images import read_image
from edgekd.data.prompts import Prompts
from edgekd.errors import UsageError
from edgekd.protocols import NEGATIVE, POSITIVE, Promptable
from edgekd.tasks.promptable.predictor import DEFAULT_RULE, Predictor, Rule, predictor
from edgekd.workspace import atomic_path

Point = tuple[float, float]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Prediction:
    """A mask (H, W) bool on the photo, and the IoU that the model predicts for it (None for models that predict none)."""

    mask: np.ndarray
    score: float | None

    def document(self) -> dict[str, Any]:
        """What `edgekd predict` shows."""
        return {"area": int(self.mask.sum()), "predicted_iou": self.score}


def predict(model: Promptable | Predictor, image: np.ndarray, *, points: Sequence[Point] = (), labels: Sequence[int] | None = None,
            box: Box | None = None, single_click_rule: Rule = DEFAULT_RULE) -> Prediction:
    """Segment what a prompt means.

    Args:
        image: (H, W, 3) uint8 RGB, upright.
        points: clicks (x, y) in pixels of the photo.
        labels: 1 (object) or 0 (not the object) for each click; all 1 when left out.
        box: (x0, y0, x1, y1) in pixels of the photo; corners in any order, clipped to the photo.

    Raises:
        UsageError: no prompt, a click outside the photo, a box without area, or a label other than 0 and 1.
    """
    prompts = build_prompts(image.shape[0], image.shape[1], points, labels, box)
    asked = predictor(model, rule=single_click_rule)
    answer = asked.masks(asked.start(image), prompts)
    score = float(answer.scores[0])
    return Prediction(answer.masks[0], None if np.isnan(score) else score)


def build_prompts(height: int, width: int, points: Sequence[Point], labels: Sequence[int] | None, box: Box | None) -> Prompts:
    """One checked prompt (P = 1): the box's corners first, then the clicks."""
    if not len(points) and box is None:
        raise UsageError("there is nothing to segment without a prompt", hint="give --point x,y or --box x0,y0,x1,y1")
    signs = [POSITIVE] * len(points) if labels is None else list(labels)
    if len(signs) != len(points):
        raise UsageError(f"{len(points)} points but {len(signs)} labels", hint="give one label (1 or 0) for each point")
    for (x, y), sign in zip(points, signs, strict=True):
        if not (0 <= x <= width and 0 <= y <= height):
            raise UsageError(f"the point {x:g},{y:g} is outside the photo, which is {width} x {height}", hint="x counts from the left, y from the top")
        if sign not in (POSITIVE, NEGATIVE):
            raise UsageError(f"{sign} is not a point's label", hint="1 is on the object, 0 is not")
    clicks = Prompts(np.asarray(points, dtype=np.float64).reshape(1, -1, 2), np.asarray(signs, dtype=int).reshape(1, -1))
    if box is None:
        return clicks
    corners = np.sort(np.asarray(box, dtype=np.float64).reshape(2, 2), axis=0).clip(0, [width, height])
    if not (corners[1] > corners[0]).all():
        raise UsageError(f"the box {','.join(f'{v:g}' for v in box)} has no area inside the photo, which is {width} x {height}",
                         hint="give --box x0,y0,x1,y1 in pixels")
    return Prompts.boxes(corners.reshape(1, 4)).join(clicks)


def save_mask(mask: np.ndarray, path: str | Path) -> Path:
    """Write a (H, W) bool mask as an 8-bit PNG, 255 on the object, atomically; always PNG, whatever the name ends with."""
    try:
        with atomic_path(Path(path)) as temp, open(temp, "wb") as file:
            Image.fromarray(mask.astype(np.uint8) * 255).save(file, format="PNG")
    except OSError as e:
        raise UsageError(f"the mask cannot be written: {e.strerror or e}", where=path, hint="name another file with --output") from e
    return Path(path)


def predict_file(model: Promptable | Predictor, photo: str | Path, output: str | Path, *, points: Sequence[Point] = (),
                 labels: Sequence[int] | None = None, box: Box | None = None, single_click_rule: Rule = DEFAULT_RULE) -> Prediction:
    """`predict` on a file: the mask has the size of the photo as it is shown (turned upright by its EXIF orientation).

    Raises:
        UsageError: a wrong prompt, no such photo, or an output that cannot be written.
        ImageError: the photo cannot be read.
    """
    if not Path(photo).is_file():
        raise UsageError("there is no such photo", where=photo)
    found = predict(model, read_image(photo), points=points, labels=labels, box=box, single_click_rule=single_click_rule)
    save_mask(found.mask, output)
    return found
