"""Masks as COCO run lengths, which JSON can hold: `{"size": [H, W], "counts": "..."}`, by pycocotools."""
from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco


def encode(masks: np.ndarray) -> list[dict[str, Any]]:
    """(N, H, W) bool -> N run lengths with `counts` as ASCII text."""
    if not len(masks):
        return []
    columns = np.asfortranarray(masks.astype(np.uint8, copy=False).transpose(1, 2, 0))
    return [{"size": [int(n) for n in r["size"]], "counts": r["counts"].decode("ascii")} for r in coco.encode(columns)]


def decode(rles: Sequence[Mapping[str, Any]], height: int, width: int) -> np.ndarray:
    """N run lengths of one photo -> (N, height, width) bool."""
    if not rles:
        return np.zeros((0, height, width), dtype=bool)
    with warnings.catch_warnings():  # pycocotools 2.0.11 under numpy 2: its array type does not know the keyword `copy`
        warnings.simplefilter("ignore", DeprecationWarning)
        return np.asarray(coco.decode(list(rles))).transpose(2, 0, 1).astype(bool)


def area(rle: Mapping[str, Any]) -> int:
    """Pixels of the mask."""
    return int(coco.area(rle))


def bbox(rle: Mapping[str, Any]) -> list[float]:
    """[x, y, width, height] in pixels, on pixel edges."""
    return [float(v) for v in coco.toBbox(rle)]


def overlaps(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """N and M run lengths -> (N, M) IoU."""
    if not a or not b:
        return np.zeros((len(a), len(b)))
    return np.asarray(coco.iou(list(a), list(b), [False] * len(b)))
