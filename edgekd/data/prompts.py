"""Prompts made from masks, as in the evaluation protocols of SAM and EdgeSAM. Numpy only.

Coordinates are continuous photo coordinates (see `edgekd.data.images`): clicks lie on pixel centres, box edges on pixel
edges, so a filled box is exactly the rectangle that it was made from.
"""
from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from edgekd.protocols import ABSENT, BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, NEGATIVE, POSITIVE


@dataclass(frozen=True)
class Prompts:
    """P prompts of N points each on one photo: `points` (P, N, 2) float xy, `labels` (P, N) int (see `edgekd.protocols`)."""

    points: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        if self.points.shape != (*self.labels.shape, 2) or self.labels.ndim != 2:
            raise ValueError(f"points {self.points.shape} and labels {self.labels.shape} do not belong together")

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def boxes(cls, boxes: np.ndarray) -> Prompts:
        """(P, 4) xyxy -> two corner points each."""
        corners = np.asarray(boxes, dtype=np.float64).reshape(-1, 2, 2)
        return cls(corners, np.tile([BOX_TOP_LEFT, BOX_BOTTOM_RIGHT], (len(corners), 1)))

    @classmethod
    def clicks(cls, points: np.ndarray, labels: np.ndarray | None = None) -> Prompts:
        """(P, 2) xy -> one click each, positive unless `labels` (P,) says otherwise."""
        points = np.asarray(points, dtype=np.float64).reshape(-1, 1, 2)
        chosen = np.full(len(points), POSITIVE) if labels is None else np.asarray(labels)
        return cls(points, chosen.reshape(-1, 1))

    def join(self, other: Prompts) -> Prompts:
        """The points of both, prompt by prompt."""
        return Prompts(np.concatenate([self.points, other.points], axis=1), np.concatenate([self.labels, other.labels], axis=1))

    def __getitem__(self, index: slice | np.ndarray) -> Prompts:
        return Prompts(self.points[index], self.labels[index])

    @property
    def single_click(self) -> np.ndarray:
        """(P,) bool: exactly one click and no box, the prompt that may mean a part, an object or a group."""
        present = self.labels >= NEGATIVE
        return (present.sum(axis=1) == 1) & ~np.isin(self.labels, (BOX_TOP_LEFT, BOX_BOTTOM_RIGHT)).any(axis=1)


def box_from_mask(mask: np.ndarray) -> np.ndarray:
    """(H, W) bool, not empty -> (4,) xyxy on pixel edges: x1 and y1 lie behind the last pixel."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        raise ValueError("an empty mask has no box")
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=np.float64)


def boxes_from_masks(masks: np.ndarray) -> np.ndarray:
    """(P, H, W) bool -> (P, 4) xyxy."""
    return np.array([box_from_mask(m) for m in masks]).reshape(-1, 4)


def center_click(mask: np.ndarray) -> np.ndarray:
    """(H, W) bool, not empty -> (2,) xy: the innermost pixel's centre, the first of equals in reading order.

    The maximum of the distance transform, with the photo's border counted as an edge of the mask: otherwise the click
    for a sky would lie on the border. The border is a zero ring around the mask's box, which gives the same distances.
    """
    x0, y0, x1, y1 = box_from_mask(mask).astype(int)
    distance = ndimage.distance_transform_edt(np.pad(mask[y0:y1, x0:x1], 1))
    row, column = np.unravel_index(np.argmax(distance), distance.shape)
    return np.array([x0 + column - 1 + 0.5, y0 + row - 1 + 0.5])


def center_clicks(masks: np.ndarray) -> np.ndarray:
    """(P, H, W) bool -> (P, 2) xy."""
    return np.array([center_click(m) for m in masks]).reshape(-1, 2)


def error_click(predicted: np.ndarray, truth: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """A correcting click, uniform over the wrong pixels: positive where truth was missed, negative where too much was taken.

    Both masks (H, W) bool. When nothing is wrong the label is ABSENT, and models leave the point out.
    """
    wrong = np.flatnonzero(predicted != truth)
    if not wrong.size:
        return np.zeros(2), ABSENT
    row, column = np.unravel_index(wrong[rng.integers(wrong.size)], truth.shape)
    return np.array([column + 0.5, row + 0.5]), POSITIVE if truth[row, column] else NEGATIVE


def error_clicks(predicted: np.ndarray, truth: np.ndarray, rng: np.random.Generator) -> Prompts:
    """`error_click` of each pair of (P, H, W) masks, as P one-point prompts."""
    clicks = [error_click(p, t, rng) for p, t in zip(predicted, truth, strict=True)]
    return Prompts.clicks(np.array([c[0] for c in clicks]), np.array([c[1] for c in clicks], dtype=int))


def deepest_error(predicted: np.ndarray, truth: np.ndarray, clicked: np.ndarray) -> tuple[np.ndarray, int]:
    """The next click of an interactive session: the wrong pixel that lies deepest in its region, and which way it corrects.

    Missed and superfluous pixels are regions of their own, and the photo's border is an edge of both (the convention of RITM, arXiv
    2102.06583, sec. 4: maxima of two distance transforms; superfluous on a tie). A pixel clicked before is not clicked again.

    Args:
        predicted, truth, clicked: (H, W) bool.

    Returns:
        (2,) xy and POSITIVE or NEGATIVE; ABSENT when no wrong pixel is left to click.
    """
    wrong = predicted != truth
    if not (wrong & ~clicked).any():
        return np.zeros(2), ABSENT
    x0, y0, x1, y1 = box_from_mask(wrong).astype(int)
    wanted, free = truth[y0:y1, x0:x1], ~clicked[y0:y1, x0:x1]
    depths = [ndimage.distance_transform_edt(np.pad(wrong[y0:y1, x0:x1] & side, 1))[1:-1, 1:-1] * free for side in (wanted, ~wanted)]
    label = POSITIVE if depths[0].max() > depths[1].max() else NEGATIVE
    depth = depths[0 if label == POSITIVE else 1]
    row, column = np.unravel_index(np.argmax(depth), depth.shape)
    return np.array([x0 + column + 0.5, y0 + row + 0.5]), label


def grid_points(per_side: int, height: int, width: int) -> np.ndarray:
    """(per_side², 2) xy at the centres of a regular grid, row by row."""
    steps = (np.arange(per_side) + 0.5) / per_side
    x, y = np.meshgrid(steps * width, steps * height)
    return np.stack([x.ravel(), y.ravel()], axis=1)


def sample_rng(seed: int, sample_id: str, *more: int) -> np.random.Generator:
    """The random numbers that belong to one sample, whatever else is evaluated and in which order."""
    return np.random.default_rng([seed, zlib.crc32(sample_id.encode()), *more])
