"""Seeded prompts of every kind, for whatever must see them all: the parity gate, calibration and latency. Numpy only."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgekd.protocols import BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, NEGATIVE, POSITIVE

KINDS = ("point", "points", "box", "point_box", "mask")
"""One click; three clicks; a box; a click in a box; a click with a mask of before."""

COUNTS = (1, 5, 16)
"""Prompts per call that an artifact is checked with: a graph that is right for one only has baked its batch in."""


@dataclass(frozen=True)
class Probe:
    """P prompts of N points in a square of F pixels: points (P, N, 2), labels (P, N), mask_input (P, 1, F/4, F/4), has_mask (P,); all float32."""

    kind: str
    points: np.ndarray
    labels: np.ndarray
    mask_input: np.ndarray
    has_mask: np.ndarray

    def inputs(self, embedding: np.ndarray) -> dict[str, np.ndarray]:
        """The decoder's inputs by name, with the embedding (1, E, s, s) of the image."""
        return {"image_embeddings": embedding, "point_coords": self.points, "point_labels": self.labels,
                "mask_input": self.mask_input, "has_mask": self.has_mask}


def probe(kind: str, count: int, side: int, rng: np.random.Generator) -> Probe:
    """`count` random prompts of one kind, inside the image."""
    size = float(side)
    centre = rng.uniform(0.25, 0.75, (count, 1, 2)) * size
    half = rng.uniform(0.05, 0.25, (count, 1, 2)) * size
    corners = np.concatenate([centre - half, centre + half], axis=1)
    clicks = centre + rng.uniform(-1, 1, (count, 3, 2)) * half
    corner_labels, click_labels = [BOX_TOP_LEFT, BOX_BOTTOM_RIGHT], [POSITIVE, NEGATIVE, POSITIVE]
    points, labels = {
        "point": (clicks[:, :1], click_labels[:1]),
        "points": (clicks, click_labels),
        "box": (corners, corner_labels),
        "point_box": (np.concatenate([clicks[:, :1], corners], axis=1), [POSITIVE, *corner_labels]),
        "mask": (clicks[:, :1], click_labels[:1]),
    }[kind]
    grid = np.stack(np.meshgrid(np.arange(side // 4), np.arange(side // 4), indexing="xy"), axis=-1) * 4.0 + 2.0
    distance = np.linalg.norm((grid[None] - centre[:, None]) / half[:, None], axis=-1)  # 1 on the ellipse inside the box
    blob = np.clip(8.0 * (1.0 - distance), -12.0, 12.0)[:, None]
    has = np.full(count, float(kind == "mask"))
    return Probe(kind, *(np.ascontiguousarray(a, dtype=np.float32) for a in (points, np.tile(labels, (count, 1)), blob * has[0], has)))


def pictures(count: int, image_size: int, rng: np.random.Generator) -> np.ndarray:
    """(count, 3, S, S) float32 stand-ins for normalised photos: smooth colour fields with hard-edged discs, about unit variance."""
    y, x = np.mgrid[0:image_size, 0:image_size] / image_size
    images = np.empty((count, 3, image_size, image_size), dtype=np.float32)
    for image in images:
        for channel in image:
            fx, fy, phase = rng.uniform(-12, 12, 2).tolist() + [rng.uniform(0, 6.28)]
            channel[:] = np.sin(fx * x + fy * y + phase) * rng.uniform(0.3, 1.0)
        for _ in range(6):
            cx, cy, radius = rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(0.05, 0.25)
            image[:, (x - cx) ** 2 + (y - cy) ** 2 < radius**2] = rng.uniform(-1.8, 1.8, (3, 1))
        image += rng.normal(0, 0.05, image.shape).astype(np.float32)
    return images
