"""AR@K of segment-everything, against pycocotools run by itself, and on models that see everything or nothing."""
from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from oracles import Empty, Oracle, Painted, by_pycocotools, coco_scene, write_coco

from edgekd.data import Subset, open_data
from edgekd.data.joined import Joined
from edgekd.errors import UsageError
from edgekd.tasks.promptable.recall import UNFILTERED, EverythingRecall, instances, recall
from edgekd.tasks.promptable.scoring import evaluate


@pytest.mark.parametrize("seed", range(4))
def test_recall_is_pycocotools_own(seed: int) -> None:
    truth, found = coco_scene(np.random.default_rng(seed), 10, (1, 3))
    sums: dict[str, list[tuple[float, int]]] = {}
    for own, its in zip(truth, found, strict=True):
        for name, value in recall(own, its).items():
            sums.setdefault(name, []).append(value)
    got = {name: sum(v[0] for v in values) / sum(v[1] for v in values) for name, values in sums.items()}
    stats = by_pycocotools(truth, found, use_cats=0)
    names = {"everything_ar10": 7, "everything_ar100": 8, "everything_ar1000_small": 9, "everything_ar1000_medium": 10, "everything_ar1000_large": 11}
    for name, at in names.items():  # never more than 100 masks here, so that 100 and 1000 are the same
        assert got.get(name, -1) == pytest.approx(stats[at], abs=1e-9), name
    assert got["everything_ar1000"] == got["everything_ar100"]


def test_only_the_best_masks_count() -> None:
    data = Painted(count=1)
    truth = instances(data, 0, data[0])
    wrong = [{**truth[0], "score": 1.0} for _ in range(9)]  # the same instance again and again
    right = [{**t, "score": 0.5 - 0.1 * k} for k, t in enumerate(truth)]
    found = recall(truth, [*wrong, *right])
    assert found["everything_ar10"] == (1, 3) and found["everything_ar100"] == (3, 3) == found["everything_ar1000"]
    assert recall(truth, [])["everything_ar10"] == (0, 3)


class _Unsure(Oracle):
    """Right, but never sure of it."""

    def decode(self, *args: Any, **more: Any) -> tuple[np.ndarray, np.ndarray]:
        masks, score = super().decode(*args, **more)
        return masks, score * 0.1


def test_a_model_that_sees_everything_and_one_that_sees_nothing() -> None:
    good = evaluate(Oracle(), Painted(), metrics=("everything",), max_instances=1)
    assert good.metrics["everything_ar100"] > 0.9 and good.metrics["everything_ar10"] == good.metrics["everything_ar1000"]
    how = good.protocol["everything"]
    assert how["instances"] == 9 and how["photos"] == 3 and how["mode"] == "hierarchical" and how["masks_per_photo"] >= 3  # all of them, not one a photo
    assert how["settings"]["max_masks"] == 1000 and good.per_image[0]["counts"]["everything_ar10"] == 3
    bad = evaluate(Empty(), Painted(), metrics=("everything",), everything_mode="grid")
    assert set(bad.metrics.values()) == {0} and bad.protocol["everything"]["mode"] == "grid"
    loose = evaluate(_Unsure(), Painted(), metrics=("everything",), everything_mode="grid", everything_settings=UNFILTERED)
    strict = evaluate(_Unsure(), Painted(), metrics=("everything",), everything_mode="grid")
    assert loose.metrics["everything_ar100"] > 0.9 > 0.5 > strict.metrics["everything_ar100"]
    assert loose.protocol["everything"]["settings"]["pred_iou"] == 0 < strict.protocol["everything"]["settings"]["pred_iou"]
    with pytest.raises(UsageError, match="proposer"):
        evaluate(Oracle(), Painted(), metrics=("everything",), everything_mode="proposals")


def test_crowds_and_areas_of_a_coco_json(tmp_path: Path) -> None:
    data = open_data(write_coco(tmp_path, [[{"box": (0, 0, 16, 12)}, {"box": (32, 32, 32, 32), "iscrowd": 1}], []]))
    whole = instances(data, 0, data[0])
    assert [t["iscrowd"] for t in whole] == [0, 1] and whole[0]["area"] == 192
    subset = Subset(data, [1, 0])
    joined = Joined([Painted(count=2), subset])
    assert instances(subset, 1, subset[1]) == instances(joined, 3, joined[3]) == whole and instances(subset, 0, subset[0]) == []
    assert len(instances(joined, 0, joined[0])) == 3
    asked = EverythingRecall(Oracle())
    assert asked.add(data, 1, data[1]) == {} and asked.add(data, 0, data[0])["everything_ar10"][1] == 1 and asked.photos == 1
