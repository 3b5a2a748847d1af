"""What needs no model: the numbers that a promptable model has to beat before its own mean anything.

- `baseline/disc`: around a click, a disc of 32 pixels radius in a frame of 256 (the photo's long side); with several clicks,
  the discs of the positive ones without the pixels nearer to a negative one; for a box, the ellipse inscribed in it.
- `baseline/box_fill`: the box, filled; for clicks the same as the disc.
- `baseline/grabcut`: OpenCV's GrabCut (Rother et al. 2004), which fits colours of object and background.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from edgekd.data.prompts import Prompts
from edgekd.errors import EdgekdError, unknown
from edgekd.protocols import BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, NEGATIVE, POSITIVE
from edgekd.tasks.promptable.predictor import Masks, Predictor

FRAME = 256
RADIUS = 32
"""Of the disc, in pixels of a photo whose long side is FRAME."""
INSTALL = 'pip install "edgekd[baselines]"'


@dataclass(frozen=True)
class Drawn:
    """One prompt on a photo: `box` (4,) xyxy or None, clicks (N, 2) xy."""

    box: np.ndarray | None
    positive: np.ndarray
    negative: np.ndarray


def _split(points: np.ndarray, labels: np.ndarray) -> Drawn:
    """(N, 2) points and (N,) labels of one prompt, by what they mean."""
    corners = [points[labels == kind] for kind in (BOX_TOP_LEFT, BOX_BOTTOM_RIGHT)]
    box = np.concatenate([corners[0][0], corners[1][0]]) if all(len(c) for c in corners) else None
    return Drawn(box, points[labels == POSITIVE], points[labels == NEGATIVE])


def fill_box(box: np.ndarray, height: int, width: int) -> np.ndarray:
    """(4,) xyxy -> (H, W) bool: pixels whose centre is inside."""
    y, x = np.arange(height)[:, None] + 0.5, np.arange(width)[None] + 0.5
    return (x > box[0]) & (x < box[2]) & (y > box[1]) & (y < box[3])


def fill_ellipse(box: np.ndarray, height: int, width: int) -> np.ndarray:
    """(4,) xyxy -> (H, W) bool: the ellipse that touches the box's sides."""
    y, x = np.arange(height)[:, None] + 0.5, np.arange(width)[None] + 0.5
    (cx, cy), (rx, ry) = (box[:2] + box[2:]) / 2, np.maximum((box[2:] - box[:2]) / 2, 0.5)
    return ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1


def fill_discs(drawn: Drawn, height: int, width: int, radius: float) -> np.ndarray:
    """(H, W) bool: discs around the positive clicks, without what is nearer to a negative one."""
    near = _nearest(drawn.positive, height, width)
    return (near <= radius**2) & (near <= _nearest(drawn.negative, height, width))


def _nearest(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """(N, 2) -> (H, W) squared distance of each pixel's centre to the nearest point; infinite when there is none."""
    y, x = np.arange(height)[:, None] + 0.5, np.arange(width)[None] + 0.5
    out = np.full((height, width), np.inf)
    for px, py in points:
        np.minimum(out, (x - px) ** 2 + (y - py) ** 2, out=out)
    return out


class Drawing:
    """A baseline that looks at the prompt only."""

    def __init__(self, name: str, fill: Callable[[np.ndarray, int, int], np.ndarray]) -> None:
        self.name, self._fill = name, fill

    def start(self, image: np.ndarray) -> tuple[int, int]:
        """(H, W, 3) uint8 -> (H, W)."""
        return image.shape[0], image.shape[1]

    def masks(self, state: tuple[int, int], prompts: Prompts, mask_input: np.ndarray | None = None) -> Masks:
        """Draw each prompt."""
        radius = RADIUS * max(state) / FRAME
        drawn = [_split(p, k) for p, k in zip(prompts.points, prompts.labels, strict=True)]
        found = [self._fill(d.box, *state) if d.box is not None else fill_discs(d, *state, radius) for d in drawn]
        return Masks(np.stack(found), np.full(len(found), np.nan))


class GrabCut:
    """OpenCV's GrabCut at a long side of 256, five iterations; the mask is enlarged to the photo without smoothing.

    A box: everything outside is background. Clicks: 4 pixels around each are certain, 32 around a positive one
    probably object, 96 around it open, the rest background; of the result the pieces under positive clicks.
    """

    name = "baseline/grabcut"
    iterations = 5

    def __init__(self) -> None:
        try:
            import cv2
        except ImportError as e:
            raise EdgekdError("baseline/grabcut needs OpenCV, which is not installed", hint=INSTALL) from e
        self._cv2: Any = cv2

    def start(self, image: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
        """(H, W, 3) uint8 -> the photo at a long side of at most 256 (BGR) and its own (H, W)."""
        height, width = image.shape[:2]
        ratio = min(1.0, FRAME / max(height, width))
        size = (max(1, round(width * ratio)), max(1, round(height * ratio)))
        small = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
        return np.ascontiguousarray(small[..., ::-1]), (height, width)

    def masks(self, state: tuple[np.ndarray, tuple[int, int]], prompts: Prompts, mask_input: np.ndarray | None = None) -> Masks:
        """One GrabCut a prompt."""
        small, (height, width) = state
        ratio = np.array([small.shape[1] / width, small.shape[0] / height])
        found = [self._cut(small, _split(p * ratio, k)) for p, k in zip(prompts.points, prompts.labels, strict=True)]
        full = [np.asarray(Image.fromarray(m).resize((width, height), Image.Resampling.NEAREST)) for m in found]
        return Masks(np.stack(full), np.full(len(full), np.nan))

    def _cut(self, image: np.ndarray, drawn: Drawn) -> np.ndarray:
        """(h, w, 3) BGR -> (h, w) bool."""
        cv2 = self._cv2
        labels = self._first_guess(image.shape[0], image.shape[1], drawn)
        guess = (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)
        if guess.all() or not guess.any():  # two colour models need two sides
            return guess
        cv2.setRNGSeed(0)
        try:
            cv2.grabCut(image, labels, None, np.zeros((1, 65)), np.zeros((1, 65)), self.iterations, cv2.GC_INIT_WITH_MASK)
        except cv2.error:  # too few pixels on one side to fit colours
            return guess
        found = (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)
        return found if drawn.box is not None else _pieces_under(found, drawn.positive)

    def _first_guess(self, height: int, width: int, drawn: Drawn) -> np.ndarray:
        """(h, w) uint8 labels of GrabCut from a prompt."""
        cv2 = self._cv2
        near, far = _nearest(drawn.positive, height, width), _nearest(drawn.negative, height, width)
        labels = np.full((height, width), cv2.GC_BGD, dtype=np.uint8)
        if drawn.box is not None:
            labels[fill_box(drawn.box, height, width)] = cv2.GC_PR_FGD
        else:
            labels[near <= (3 * RADIUS) ** 2] = cv2.GC_PR_BGD
            labels[(near <= RADIUS**2) & (near <= far)] = cv2.GC_PR_FGD
        labels[near <= 16] = cv2.GC_FGD
        labels[(far <= 16) & (far < near)] = cv2.GC_BGD
        return labels


def _pieces_under(mask: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The connected pieces of a mask that hold one of the (N, 2) points."""
    numbered, _ = ndimage.label(mask)
    columns, rows = (np.clip(points[:, a].astype(int), 0, mask.shape[1 - a] - 1) for a in (0, 1))
    hit = numbered[rows, columns]
    return np.isin(numbered, hit[hit > 0])


_BASELINES: dict[str, Callable[[], Predictor]] = {
    "baseline/disc": lambda: Drawing("baseline/disc", fill_ellipse),
    "baseline/box_fill": lambda: Drawing("baseline/box_fill", fill_box),
    "baseline/grabcut": GrabCut,
}


def names() -> list[str]:
    """The baselines there are."""
    return list(_BASELINES)


def load(name: str) -> Predictor:
    """A baseline by name, ready for `evaluate` and `predict`.

    Raises:
        UsageError: no such baseline.
        EdgekdError: its package is missing; the hint says what to install.
    """
    if name not in _BASELINES:
        raise unknown("baseline", name, _BASELINES)
    return _BASELINES[name]()
