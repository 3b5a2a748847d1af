"""COCO run lengths: there and back, and what pycocotools reads of them."""
from __future__ import annotations

import json

import numpy as np
import pytest
from pycocotools import mask as coco

from edgekd.tasks.promptable import rle


@pytest.fixture
def masks() -> np.ndarray:
    """(3, 7, 9): a filled box, two separate pixels, all of it."""
    found = np.zeros((3, 7, 9), dtype=bool)
    found[0, 2:5, 3:8] = True
    found[1, 0, 0] = found[1, 6, 8] = True
    found[2] = True
    return found


def test_there_and_back_through_json(masks: np.ndarray) -> None:
    text = json.dumps(rle.encode(masks))
    assert np.array_equal(rle.decode(json.loads(text), 7, 9), masks)


def test_others_can_read_it(masks: np.ndarray) -> None:
    runs = rle.encode(masks)
    assert runs[0]["size"] == [7, 9] and isinstance(runs[0]["counts"], str)
    assert [int(coco.area(r)) for r in runs] == masks.sum(axis=(1, 2)).tolist() == [rle.area(r) for r in runs]


def test_boxes_are_on_pixel_edges(masks: np.ndarray) -> None:
    assert [rle.bbox(r) for r in rle.encode(masks)] == [[3, 2, 5, 3], [0, 0, 9, 7], [0, 0, 9, 7]]


def test_overlaps(masks: np.ndarray) -> None:
    runs = rle.encode(masks)
    assert rle.overlaps(runs[:1], runs) == pytest.approx(np.array([[1, 0, 15 / 63]]))
    assert rle.overlaps([], runs).shape == (0, 3) and rle.overlaps(runs, []).shape == (3, 0)


def test_no_masks() -> None:
    assert rle.encode(np.zeros((0, 4, 5), dtype=bool)) == [] and rle.decode([], 4, 5).shape == (0, 4, 5)
