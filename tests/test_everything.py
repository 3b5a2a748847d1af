"""Segment everything: three ways of asking, the filters, what is written, and a click's box."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles import Empty, Oracle, Painted, TorchOracle, painted
from PIL import Image
from pycocotools import mask as coco

from edgekd.data.prompts import Prompts
from edgekd.errors import UsageError
from edgekd.protocols import ABSENT, BOX_BOTTOM_RIGHT, BOX_TOP_LEFT
from edgekd.tasks.promptable.everything import BATCH, Settings, everything, resolve_mode, stability, suppress, suppress_boxes
from edgekd.tasks.promptable.granularity import BoxedClicks, add_boxes, refine_click
from edgekd.tasks.promptable.metrics import iou
from edgekd.tasks.promptable.proposing import propose
from edgekd.tasks.promptable.saving import draw, everything_file, save_everything


class Proposing(Oracle):
    """The oracle with a proposer that knows the photo's boxes, each twice, and one that holds nothing; sure of mask 0 too."""

    def decode(self, *args: Any, **more: Any) -> tuple[np.ndarray, np.ndarray]:
        masks, iou = super().decode(*args, **more)
        return masks, np.maximum(iou, 0.9 * np.eye(4, dtype=np.float32)[0])

    def proposer(self, embedding: Any) -> tuple[np.ndarray, np.ndarray]:
        red, rows = embedding[0, 0], list[list[float]]()
        for value in np.unique(red[red > 0]):
            y, x = np.nonzero(red == value)
            box = [x.min(), y.min(), x.max() + 1, y.max() + 1]
            rows += [box, [box[0] + 0.5, *box[1:]]]
        rows.append([60, 60, 60.2, 64])
        return np.array([rows], dtype=np.float32), np.linspace(0.9, 0.5, len(rows), dtype=np.float32)[None]

    def propose(self, embedding: Any) -> tuple[np.ndarray, np.ndarray]:
        boxes, scores = self.proposer(embedding)
        return boxes[0], scores[0]


def found_all(found: np.ndarray, truth: np.ndarray) -> bool:
    """Every true mask is among those found, up to corners rounded by enlarging."""
    return bool((iou(found[:, None], truth[None]).max(axis=0) > 0.95).all())


@pytest.mark.parametrize("mode", ["grid", "hierarchical", "proposals"])
def test_every_way_finds_every_object_once(mode: Any) -> None:
    for sample in Painted():
        found = everything(Proposing(), sample.image, mode=mode)
        truth = sample.masks
        assert truth is not None and found_all(found.masks, truth) and found.mode == mode
        objects = [s for s in found if s.area < 32 * 32]
        assert len(objects) == len(truth)
        assert all(coco.area(s.rle) == s.area == s.mask.sum() and s.predicted_iou == pytest.approx(0.9) and s.stability_score == 1 for s in found)


def test_torch_and_numpy_models_find_the_same() -> None:
    image = Painted()[0].image
    one, other = (everything(m, image, mode="grid", settings=Settings(points_per_side=12)) for m in (TorchOracle(), Oracle()))
    assert [s.rle for s in one] == [s.rle for s in other] and len(one) == 3


def test_each_way_asks_what_it_says() -> None:
    image = Painted()[0].image
    grid, coarse, boxes = (everything(Proposing(), image, mode=m) for m in ("grid", "hierarchical", "proposals"))
    assert grid.work.prompts == 32 * 32 and grid.work.calls == 32 * 32 // BATCH
    assert 256 < coarse.work.prompts < 32 * 32 - 80  # the objects cover about a fifth of the photo
    assert boxes.work.prompts == 3 and boxes.work.calls == 1
    assert all(s.click is None and s.box is not None for s in boxes) and all(s.box is None and s.click is not None for s in grid)
    assert min(grid.work.seconds["decoder"], boxes.work.seconds["proposer"], grid.work.seconds["encoder"]) > 0


def test_a_dense_click_only_where_no_sure_mask_lies() -> None:
    asked: list[np.ndarray] = []

    class Watched(Oracle):
        def decode(self, embedding: Any, points: Any, labels: Any, *more: Any) -> Any:
            asked.append(points[:, 0])
            return super().decode(embedding, points, labels, *more)

    sample = Painted()[0]
    assert sample.masks is not None
    everything(Watched(), sample.image, mode="hierarchical")
    clicks = np.concatenate(asked)[:-3] + 0.5  # at the end the boxes of the three that were found
    later = clicks[256:].astype(int)
    assert not sample.masks.any(axis=0)[later[:, 1], later[:, 0]].any() and len(later) > 500 and len(np.unique(clicks, axis=0)) == len(clicks)


def test_at_worst_it_asks_as_much_as_the_grid() -> None:
    image = np.zeros((48, 64, 3), np.uint8)
    nothing = everything(Oracle(), image, mode="hierarchical", settings=Settings(points_per_side=5))
    assert nothing.work.prompts == 25 and len(nothing) == 0
    assert everything(Oracle(), image, mode="hierarchical", settings=Settings(points_per_side=1)).work.prompts == 1


def test_auto_takes_the_proposer_where_there_is_one() -> None:
    assert resolve_mode(Proposing(), "auto") == "proposals" and resolve_mode(Oracle(), "auto") == "hierarchical"
    with pytest.raises(UsageError, match=r"no proposer[\s\S]*hierarchical"):
        everything(Oracle(), Painted()[0].image, mode="proposals")
    with pytest.raises(UsageError, match="griid"):
        resolve_mode(Oracle(), "griid")
    with pytest.raises(UsageError, match="max_masks is 0"):
        everything(Oracle(), Painted()[0].image, settings=Settings(max_masks=0))


def test_filters_and_the_best_guess() -> None:
    image = Painted()[0].image
    assert len(everything(Oracle(), image, mode="grid", settings=Settings(points_per_side=12, max_masks=2))) == 2
    strict = everything(Oracle(), image, mode="grid", settings=Settings(points_per_side=12, pred_iou=0.95))
    assert len(strict) == 1 and strict.segments[0].predicted_iou == pytest.approx(0.9)
    small = everything(Oracle(), image, mode="grid", settings=Settings(points_per_side=12, area=(0.06, 0.95)))
    assert len(small) == 1 and small.segments[0].area > 0.06 * 64 * 64
    assert len(everything(Empty(), image, mode="hierarchical")) == 0


def test_a_photo_that_is_not_square() -> None:
    masks = np.zeros((2, 64, 32), bool)
    masks[0, 8:28, 4:20], masks[1, 36:60, 8:28] = True, True
    found = everything(Oracle(), painted(masks), mode="hierarchical")
    assert found.masks.shape[1:] == (64, 32) and iou(found.masks[:, None], masks[None]).max(axis=0).min() > 0.9
    assert all(s.bbox[0] >= 0 and s.bbox[0] + s.bbox[2] <= 32 and s.bbox[1] + s.bbox[3] <= 64 for s in found)


def test_proposals_are_clipped_to_the_photo_and_in_its_pixels() -> None:
    boxes, scores = propose(Proposing(), (np.zeros((1, 3, 64, 64), np.float32), _frame(24, 96)))
    assert boxes.shape == (0, 4) and scores.shape == (0,)  # the only box is below the photo, in the padding
    image = np.zeros((1, 3, 64, 64), np.float32)
    image[0, 0, 8:24, 32:64] = 50  # a square of 64 for a photo 96 wide and 24 high, of which 16 rows are photo
    boxes, scores = propose(Proposing(), (image, _frame(24, 96)))
    assert boxes == pytest.approx(np.array([[48, 12, 96, 24], [48.75, 12, 96, 24]])) and scores.tolist() == pytest.approx([0.9, 0.7])


def _frame(height: int, width: int) -> Any:
    from edgekd.data.images import Frame

    return Frame(height, width, 64)


def test_stability_and_suppression_of_masks() -> None:
    sharp, soft = np.full((1, 4, 4), -8.0), np.full((1, 4, 4), -8.0)
    sharp[0, :2], soft[0, :2], soft[0, 1] = 8, 8, 0.5
    assert stability(np.concatenate([sharp, soft])).tolist() == [1.0, 0.5]
    masks = np.zeros((3, 8, 8), bool)
    masks[0, :4], masks[1, :5], masks[2, 6:] = True, True, True
    assert suppress(masks, 0.7, 9) == [0, 2] and suppress(masks, 0.9, 9) == [0, 1, 2] and suppress(masks, 0.9, 1) == [0] and suppress(masks[:0], 0.7, 9) == []


def test_suppression_equals_comparing_all_pairs() -> None:
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 40, (60, 2))
    boxes = np.round(np.concatenate([corners, corners + rng.uniform(5, 24, (60, 2))], axis=1))
    scores = rng.uniform(size=60)
    masks = np.zeros((60, 64, 64), bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.astype(int), strict=True):
        mask[y0:y1, x0:x1] = True
    order, slow = np.argsort(-scores), list[int]()
    for i in order:
        if all(iou(masks[i], masks[j]) <= 0.4 for j in slow):
            slow.append(int(i))
    assert 10 < len(slow) < 60
    assert suppress_boxes(boxes, scores, 0.4, 99).tolist() == slow and suppress_boxes(boxes, scores, 0.4, 5).tolist() == slow[:5]
    assert [int(order[i]) for i in suppress(masks[order], 0.4, 99)] == slow
    assert suppress_boxes(boxes[:0], scores[:0], 0.4, 5).tolist() == []


def test_what_is_written_is_cocos(tmp_path: Path) -> None:
    sample = Painted()[0]
    found = everything(Proposing(), sample.image, mode="proposals")
    rows = json.loads(save_everything(found, tmp_path / "all.json", image=sample.image).read_text())
    assert len(rows) == 3 and coco.area(rows[0]["segmentation"]) == found.masks[0].sum()
    assert set(rows[0]) == {"segmentation", "bbox", "area", "predicted_iou", "stability_score", "point_coords", "box_prompt", "crop_box"}
    assert rows[0]["crop_box"] == [0, 0, 64, 64] and rows[0]["segmentation"]["size"] == [64, 64]
    clicked = everything(Oracle(), sample.image, mode="grid", settings=Settings(points_per_side=8))
    row = json.loads(save_everything(clicked, tmp_path / "clicks.json").read_text())[0]
    assert "box_prompt" not in row and len(row["point_coords"]) == 1 and not (tmp_path / "clicks.png").exists()
    with Image.open(tmp_path / "all.png") as picture:
        pixels = np.asarray(picture)
    changed = (pixels != sample.image).any(axis=2)
    assert np.array_equal(changed, found.masks.any(axis=0))


def test_a_large_photo_is_drawn_smaller() -> None:
    image = np.zeros((700, 2600, 3), np.uint8)
    found = everything(Oracle(), image, mode="grid", settings=Settings(points_per_side=2))
    assert draw(image, found).size == (1280, 345)


def test_a_file_from_photo_to_json(tmp_path: Path) -> None:
    Image.fromarray(Painted()[0].image).save(tmp_path / "photo.png")
    found = everything_file(Oracle(), tmp_path / "photo.png", tmp_path / "out" / "all.json", settings=Settings(points_per_side=8))
    assert len(json.loads((tmp_path / "out" / "all.json").read_text())) == len(found) and (tmp_path / "out" / "all.png").is_file()
    with pytest.raises(UsageError, match="no such photo"):
        everything_file(Oracle(), tmp_path / "none.png", tmp_path / "all.json")
    with pytest.raises(UsageError, match=r"JSON[\s\S]*all\.json"):
        everything_file(Oracle(), tmp_path / "photo.png", tmp_path / "all.png")


def test_a_clicks_box_is_the_best_of_the_nearest() -> None:
    boxes = np.array([[0, 0, 20, 20], [4, 4, 16, 16], [0, 0, 64, 64], [30, 30, 40, 40]], dtype=float)
    scores = np.array([0.8, 0.75, 0.9, 0.95])
    clicks = Prompts.clicks(np.array([[10, 10], [50, 50], [10, 10]]), np.array([1, 1, 0]))
    joined = add_boxes(clicks, boxes, scores, nearest=2)
    assert joined.labels.tolist() == [[1, BOX_TOP_LEFT, BOX_BOTTOM_RIGHT], [1, BOX_TOP_LEFT, BOX_BOTTOM_RIGHT], [0, ABSENT, ABSENT]]
    assert joined.points[0, 1:].ravel().tolist() == [0, 0, 20, 20] and joined.points[1, 1:].ravel().tolist() == [0, 0, 64, 64]
    assert add_boxes(clicks, boxes, scores, nearest=3).points[0, 1:].ravel().tolist() == [0, 0, 64, 64]
    assert (add_boxes(clicks, boxes, scores * 0.1).labels[:, 1:] == ABSENT).all()
    boxed = Prompts.boxes(boxes[:1])
    assert add_boxes(boxed, boxes, scores).labels.tolist() == [[BOX_TOP_LEFT, BOX_BOTTOM_RIGHT, ABSENT, ABSENT]]


def test_boxed_clicks_are_a_predictor() -> None:
    sample, model = Painted()[0], Proposing()
    asked = BoxedClicks(model)
    state = asked.start(sample.image)
    clicks = Prompts.clicks(np.array([[3.0, 3.0], [12.0, 26.0]]))
    joined = refine_click(model, state, clicks)
    assert joined.points.shape == (2, 3, 2) and joined.labels[:, 1:].tolist() == [[BOX_TOP_LEFT, BOX_BOTTOM_RIGHT]] * 2
    assert sample.masks is not None and iou(asked.masks(state, clicks).masks, sample.masks[:2]).min() > 0.95
    with pytest.raises(UsageError, match="no proposer"):
        BoxedClicks(Oracle())
