"""Masks against annotated masks by pycocotools' COCOeval: what recall (`recall`) and precision (`detection`) are both counted from."""
from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

AREAS = ("all", "small", "medium", "large")
ANY_CATEGORY = -1
CATEGORY = 1
"""Of instances in data without categories."""


@dataclass(frozen=True)
class Matched:
    """One photo's masks of one category, best first, against its instances of one range of areas, at T = 10 IoU thresholds.

    `scores` (D,), `hit` (T, D) bool, `ignored` (T, D) bool: neither right nor wrong (on a crowd, or of another area), `instances` counted.
    """

    image: int
    scores: np.ndarray
    hit: np.ndarray
    ignored: np.ndarray
    instances: int


@dataclass(frozen=True)
class Matches:
    """Area -> category -> what there is of each photo (photos without such instances and masks are left out)."""

    thresholds: np.ndarray
    by_area: dict[str, dict[int, list[Matched]]]
    images: int


def match(truth: Sequence[Sequence[dict[str, Any]]], found: Sequence[Sequence[dict[str, Any]]], *, categories: bool, most: int) -> Matches:
    """COCO's greedy matching, best mask first, photo by photo.

    Args:
        truth: the instances of each photo: `segmentation` (run lengths), `area`, `iscrowd`, `category_id`.
        found: the masks of each photo: `segmentation` (run lengths), `score`, `category_id`.
        categories: False: whatever the category.
        most: masks a photo (and category) that count, the best by score.
    """
    evaluation = COCOeval(_coco(truth), _coco(found), "segm")
    evaluation.params.useCats = int(categories)
    evaluation.params.maxDets = [most]
    evaluation.params.imgIds = list(range(1, len(truth) + 1))
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        evaluation.evaluate()
    params = evaluation.params
    groups = params.catIds if categories else [ANY_CATEGORY]
    entries = iter(evaluation.evalImgs)
    by_area: dict[str, dict[int, list[Matched]]] = {a: {} for a in AREAS}
    for group in groups:
        for area in AREAS:
            by_area[area][group] = [_matched(i, e) for i, e in zip(range(len(truth)), entries, strict=False) if e is not None]
    return Matches(np.asarray(params.iouThrs), by_area, len(truth))


def _matched(image: int, entry: dict[str, Any]) -> Matched:
    return Matched(image, np.asarray(entry["dtScores"], dtype=float), np.asarray(entry["dtMatches"]) > 0, np.asarray(entry["dtIgnore"], dtype=bool),
                   int((np.asarray(entry["gtIgnore"]) == 0).sum()))


def _coco(photos: Sequence[Sequence[dict[str, Any]]]) -> COCO:
    """Rows of each photo as pycocotools' index. Numbers are ours, from 1: to it, a match with number 0 is none."""
    rows = list(_numbered(photos))
    index = COCO()
    index.dataset = {"images": [{"id": i, "height": 0, "width": 0} for i in range(1, len(photos) + 1)], "annotations": rows,
                     "categories": [{"id": c} for c in sorted({r["category_id"] for r in rows})]}
    with contextlib.redirect_stdout(io.StringIO()):
        index.createIndex()
    return index


def _numbered(photos: Sequence[Sequence[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    number = 0
    for image, rows in enumerate(photos, start=1):
        for row in rows:
            number += 1
            yield {"iscrowd": 0, "category_id": CATEGORY, **row, "id": number, "image_id": image}
