"""What metrics are called, and how sure a difference is."""
from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from oracles import Empty, Oracle, Painted

from edgekd.errors import UsageError
from edgekd.tasks.promptable.metrics import DEFAULT_GROUPS, DETECTION, GROUPS, bootstrap_interval, check_groups, paired_interval
from edgekd.tasks.promptable.scoring import evaluate


def rows(values: list[float], count: int = 2, metric: str = "box_miou") -> list[dict[str, Any]]:
    return [{"id": f"p{i}", "instances": count, metric: v} for i, v in enumerate(values)]


def test_every_number_has_one_name_and_a_description() -> None:
    names = [n for group in GROUPS.values() for n in group]
    assert len(names) == len(set(names)) and not set(names) & set(DETECTION)
    assert all(text for group in (*GROUPS.values(), DETECTION) for text in group.values())
    assert {"noc80", "noc90", "center_oracle_miou", "center_iou_head_miou", "everything_ar1000"} <= set(names)
    assert check_groups(["noc", "box", "noc"]) == ("box", "noc") and check_groups(DEFAULT_GROUPS) == DEFAULT_GROUPS


def test_a_small_steady_gain_shows_only_when_paired() -> None:
    hard = np.random.default_rng(0).uniform(0.2, 0.9, 40)
    first, second = rows((hard + 0.02).tolist()), rows(hard.tolist())
    found = paired_interval(first, second, "box_miou")
    assert found["difference"] == pytest.approx(0.02) and found["low"] == pytest.approx(0.02) and found["high"] == pytest.approx(0.02)
    alone = [bootstrap_interval(np.array([r["box_miou"] for r in side]), np.ones(40)) for side in (first, second)]
    assert alone[0][0] < alone[1][1]  # the models' own intervals overlap
    back = paired_interval(second, first, "box_miou")
    assert back["difference"] == pytest.approx(-0.02)


def test_the_difference_is_over_instances_and_its_interval_holds_it() -> None:
    rng = np.random.default_rng(1)
    first, second = ([{"id": str(i), "instances": n, "x": float(v)} for i, (n, v) in enumerate(zip([1, 9, 3, 5] * 6, rng.uniform(size=24), strict=True))]
                     for _ in range(2))
    weights = [r["instances"] for r in first]
    found = paired_interval(first, second, "x")
    assert found["difference"] == pytest.approx(np.average([r["x"] for r in first], weights=weights) - np.average([r["x"] for r in second], weights=weights))
    assert found["low"] < found["difference"] < found["high"] and found == paired_interval(first, second, "x")
    own = [{**r, "instances": 1, "counts": {"x": n}} for r, n in zip(first, weights, strict=True)]
    assert paired_interval(own, second, "x") == found  # numbers over other instances say over how many


def test_only_the_same_photos_can_be_compared() -> None:
    with pytest.raises(UsageError, match="not of the same"):
        paired_interval(rows([0.1, 0.2]), rows([0.1]), "box_miou")
    with pytest.raises(UsageError, match="not of the same"):
        paired_interval(rows([0.1]), rows([0.1], count=3), "box_miou")
    with pytest.raises(UsageError, match="has no noc80"):
        paired_interval(rows([0.1]), rows([0.1]), "noc80")


def test_two_evaluations_and_their_json() -> None:
    good, bad = (evaluate(m, Painted(), metrics=("box", "noc", "everything")) for m in (Oracle(), Empty()))
    for metric, wanted in (("box_miou", 0.98), ("noc80", -19), ("everything_ar100", 0.9)):
        found = paired_interval(good.per_image, json.loads(json.dumps(bad.to_dict()))["per_image"], metric)
        assert abs(found["difference"]) >= abs(wanted) and np.sign(found["difference"]) == np.sign(wanted)
        assert found["difference"] == pytest.approx(good.metrics[metric] - bad.metrics[metric], abs=1e-5)
