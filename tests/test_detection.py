"""AP of box-prompted masks, against pycocotools run by itself and against cases made by hand."""
from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from oracles import Empty, Oracle, Painted, by_pycocotools, coco_scene, write_coco

from edgekd.data import open_data
from edgekd.errors import UsageError
from edgekd.tasks.promptable import baselines
from edgekd.tasks.promptable.detection import detection_ap
from edgekd.tasks.promptable.matching import match
from edgekd.tasks.promptable.precision import Precision, intervals, paired_interval, resampled


def boxes(tmp_path: Path, rows: list[tuple[int, tuple[float, ...], float, int | None]]) -> Path:
    entries = [{"image_id": 70 + i, "bbox": list(b), "score": s, **({} if c is None else {"category_id": c})} for i, b, s, c in rows]
    (tmp_path / "boxes.json").write_text(json.dumps(entries))
    return tmp_path / "boxes.json"


@pytest.mark.parametrize("seed", range(4))
def test_precision_is_pycocotools_own(seed: int) -> None:
    truth, found = coco_scene(np.random.default_rng(seed), 12, (1, 3, 7))
    for categories in (True, False):
        expected = by_pycocotools(truth, found, use_cats=int(categories))[:6]
        got = Precision(match(truth, found, categories=categories, most=100)).metrics()
        for name, value in zip(("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"), expected, strict=True):
            assert got.get(name, -1) == pytest.approx(value, abs=1e-9), name


def test_photos_drawn_twice_count_twice() -> None:
    truth, found = coco_scene(np.random.default_rng(5), 6, (1, 2))
    precision = Precision(match(truth, found, categories=True, most=100))
    weights = np.array([2.0, 0, 1, 3, 0, 1])
    drawn = [i for i, w in enumerate(weights) for _ in range(int(w))]
    again = Precision(match([truth[i] for i in drawn], [found[i] for i in drawn], categories=True, most=100))
    assert precision.metrics(weights)["ap"] == pytest.approx(again.metrics()["ap"], abs=1e-3)  # equal scores are in another order
    assert [w.sum() for w in resampled(6, 3, 0)] == [6, 6, 6]


def test_intervals_hold_the_number_and_a_paired_one_is_narrower() -> None:
    truth, found = coco_scene(np.random.default_rng(6), 20, (1,))
    _, other = coco_scene(np.random.default_rng(7), 20, (1,))
    good, bad = (Precision(match(truth, f, categories=False, most=100)) for f in (found, other))
    low, high = intervals(good)["ap"]
    assert low < good.metrics()["ap"] < high and intervals(good) == intervals(good)
    same = paired_interval(good, good, "ap")
    assert same == {"difference": 0, "low": 0, "high": 0}
    difference = paired_interval(good, bad, "ap")
    assert difference["low"] <= difference["difference"] <= difference["high"] and difference["low"] > 0
    with pytest.raises(ValueError, match="photos"):
        paired_interval(good, Precision(match(truth[:3], found[:3], categories=False, most=9)), "ap")


PHOTOS = [[{"box": (0, 0, 16, 12)}, {"box": (0, 20, 20, 12), "category_id": 18}], [{"box": (8, 8, 40, 32)}]]
RIGHT = [(0, (0, 0, 16, 12), 0.9, 1), (0, (0, 20, 20, 12), 0.8, 18), (1, (8, 8, 40, 32), 0.7, 1)]


def test_right_boxes_and_the_right_masks_are_all_of_it(tmp_path: Path) -> None:
    data = open_data(write_coco(tmp_path, PHOTOS))
    found = detection_ap(Oracle(), data, boxes=boxes(tmp_path, RIGHT))  # type: ignore[arg-type]
    assert found.metrics["ap"] > 0.97 and found.metrics["ap50"] == pytest.approx(1) and found.metrics["ap75"] == pytest.approx(1)
    assert set(found.metrics) == {"ap", "ap50", "ap75", "ap_small", "ap_medium"} == set(found.interval95) and (found.images, found.instances) == (2, 3)
    document = json.loads(json.dumps(found.to_dict()))
    assert document["ap50"] == pytest.approx(1) and "precision" not in document
    assert document["protocol"]["prompts"] == ["the boxes of boxes.json"] and "detector" in document["protocol"]["scores"]
    assert document["per_image"][0] == {"id": "0.png", "instances": 2, "boxes": 2}


def test_what_is_missed_wrong_and_mistaken_lowers_it(tmp_path: Path) -> None:
    data = open_data(write_coco(tmp_path, PHOTOS))
    half = detection_ap(Oracle(), data, boxes=boxes(tmp_path, RIGHT[:2]))  # type: ignore[arg-type]
    assert half.metrics["ap50"] == pytest.approx((51 / 101 + 1) / 2)  # category 1: one of two
    wrong = [(0, (30, 40, 9, 9), 0.95, 1), *RIGHT]
    assert detection_ap(Oracle(), data, boxes=boxes(tmp_path, wrong)).metrics["ap50"] == pytest.approx((2 / 3 + 1) / 2)  # type: ignore[arg-type]
    renamed = [(i, b, s, 18 if c == 1 else 1) for i, b, s, c in RIGHT]
    assert detection_ap(Oracle(), data, boxes=boxes(tmp_path, renamed)).metrics["ap"] == 0  # type: ignore[arg-type]
    assert detection_ap(Empty(), data, boxes=boxes(tmp_path, RIGHT)).metrics["ap"] == 0  # type: ignore[arg-type]
    agnostic = detection_ap(Oracle(), data, boxes=boxes(tmp_path, [(i, b, s, None) for i, b, s, _ in RIGHT]))  # type: ignore[arg-type]
    assert agnostic.metrics["ap50"] == pytest.approx(1) and "as one" in agnostic.protocol["metric"]


def test_ground_truth_boxes_are_scored_by_predicted_iou(tmp_path: Path) -> None:
    class Mistaken(Oracle):
        """Surest of a wrong answer: every second mask is empty and has the highest predicted IoU."""

        def decode(self, *args: Any, **more: Any) -> tuple[np.ndarray, np.ndarray]:
            masks, score = super().decode(*args, **more)
            masks[1::2], score[1::2] = -1, score[1::2] + 1
            return masks, score

    data = open_data(write_coco(tmp_path, PHOTOS, categories=(1, 18)))
    right = detection_ap(Oracle(), data)
    assert right.metrics["ap50"] == pytest.approx(1) and "ground truth" in right.protocol["prompts"][0] and "predicted IoU" in right.protocol["scores"]
    assert detection_ap(Mistaken(), data).metrics["ap50"] == pytest.approx(0.5)  # category 18 is lost
    plain = detection_ap(Oracle(), Painted(count=2))
    assert plain.metrics["ap50"] == pytest.approx(1) and "as one" in plain.protocol["metric"]
    disc = detection_ap(baselines.load("baseline/box_fill"), data)
    assert disc.metrics["ap"] == pytest.approx(1) and disc.protocol["image_size"] is None


def test_the_mask_rule_decides_which_mask(tmp_path: Path) -> None:
    class Slots(Oracle):
        """Right in slot 2 only, and knows it."""

        def decode(self, *args: Any, **more: Any) -> tuple[np.ndarray, np.ndarray]:
            masks, score = super().decode(*args, **more)
            masks[:, 0] = -1
            return masks, score

    data = open_data(write_coco(tmp_path, PHOTOS))
    first, best = (detection_ap(Slots(), data, mask_rule=r) for r in ("first", "iou"))  # type: ignore[arg-type]
    assert first.metrics["ap"] == 0 and best.metrics["ap50"] == pytest.approx(1)
    assert "mask 0" in first.protocol["mask"] and "predicted IoU" in best.protocol["mask"]
    with pytest.raises(UsageError, match="mask rule 'best'"):
        detection_ap(Slots(), data, mask_rule="best")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="predicts no IoU"):
        detection_ap(baselines.load("baseline/disc"), data, mask_rule="iou")


def test_masks_on_a_crowd_count_neither_way(tmp_path: Path) -> None:
    crowd = [[{"box": (0, 0, 16, 12)}, {"box": (32, 32, 32, 32), "iscrowd": 1}]]
    found = [(0, (36, 36, 8, 8), 0.99, 1), (0, (0, 0, 16, 12), 0.5, 1)]
    fill = baselines.load("baseline/box_fill")
    data = open_data(write_coco(tmp_path, crowd))
    assert detection_ap(fill, data, boxes=boxes(tmp_path, found)).metrics["ap"] == pytest.approx(1)  # type: ignore[arg-type]
    plain = open_data(write_coco(tmp_path, [crowd[0][:1]]))
    assert detection_ap(fill, plain, boxes=boxes(tmp_path, found)).metrics["ap"] == pytest.approx(0.5)  # type: ignore[arg-type]


def test_lvis_counts_only_what_was_looked_for(tmp_path: Path) -> None:
    fill = baselines.load("baseline/box_fill")
    extra = [(0, (40, 40, 9, 9), 0.99, c) for c in (1, 3, 18)]
    right = [(0, (0, 0, 16, 12), 0.5, 1), (1, (8, 8, 40, 32), 0.4, 3)]
    photos = [[{"box": (0, 0, 16, 12)}], [{"box": (8, 8, 40, 32), "category_id": 3}]]
    given = boxes(tmp_path, [*extra, *right])  # type: ignore[list-item]
    plain = detection_ap(fill, open_data(write_coco(tmp_path, photos, categories=(1, 3, 18))), boxes=given)
    assert plain.metrics["ap"] == pytest.approx(0.5) and plain.protocol["max_boxes"] == 100
    asked = {"neg_category_ids": [18], "not_exhaustive_category_ids": []}
    federated = detection_ap(fill, open_data(write_coco(tmp_path, photos, categories=(1, 3, 18), **asked)), boxes=given)
    # in the first photo 3 was not looked for, 1 was: its extra mask is wrong, that of 3 is not
    assert federated.metrics["ap"] == pytest.approx((0.5 + 1) / 2) and federated.protocol["max_boxes"] == 300
    assert "federated" in federated.protocol["metric"]
    lenient = {"neg_category_ids": [18], "not_exhaustive_category_ids": [1]}
    assert detection_ap(fill, open_data(write_coco(tmp_path, photos, categories=(1, 3, 18), **lenient)), boxes=given).metrics["ap"] == pytest.approx(1)


def test_a_part_of_the_data_and_boxes_outside_the_photo(tmp_path: Path) -> None:
    rows = [*RIGHT, (1, (-50, -50, 20, 20), 0.9, 1), (0, (5, 5, 0, 9), 0.9, 1)]
    path = write_coco(tmp_path, PHOTOS)
    for limit in (1, 2):
        found = detection_ap(Oracle(), open_data(path, limit=limit), boxes=boxes(tmp_path, rows))  # type: ignore[arg-type]
        assert found.metrics["ap50"] == pytest.approx(1) and found.images == limit and found.per_image[0]["boxes"] == 2


BAD = {
    "{": "json of detections", "3": "json of detections", '{"images": []}': "json of detections", '[{"image_id": 70}]': "json of detections",
    '[{"image_id": 70, "bbox": [1, 2, 3], "score": 1}]': "four numbers", '[{"image_id": 70, "bbox": [1, 2, 3, NaN], "score": 1}]': "four numbers",
    '[{"image_id": 5, "bbox": [1, 2, 3, 4], "score": 1, "category_id": 1}]': "1 of the images with boxes are not in truth.json: 5",
    '[{"image_id": 70, "bbox": [1, 2, 3, 4], "score": 1, "category_id": 99}]': "categories 99",
    '[{"image_id": 70, "bbox": [1, 2, 3, 4], "score": 1, "category_id": 1}, {"image_id": 70, "bbox": [1, 2, 3, 4], "score": 1}]': "some have none",
}


@pytest.mark.parametrize(("text", "message"), BAD.items(), ids=range(len(BAD)))
def test_boxes_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    data = open_data(write_coco(tmp_path, PHOTOS))
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(UsageError, match=message):
        detection_ap(Oracle(), data, boxes=tmp_path / "bad.json")


def test_boxes_need_their_own_ground_truth(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a COCO json"):
        detection_ap(Oracle(), Painted(), boxes=boxes(tmp_path, RIGHT))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no such file"):
        detection_ap(Oracle(), open_data(write_coco(tmp_path, PHOTOS)), boxes=tmp_path / "none.json")
    with pytest.raises(UsageError, match="no masks"):
        detection_ap(Oracle(), open_data(write_coco(tmp_path, [[]])))
