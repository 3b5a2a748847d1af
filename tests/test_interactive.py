"""Clicks until a mask is good, on models that need a known number of them."""
from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from oracles import Empty, Oracle, Painted

from edgekd.data.prompts import Prompts, center_clicks, deepest_error
from edgekd.protocols import ABSENT, NEGATIVE, POSITIVE
from edgekd.tasks.promptable.interactive import MOST_CLICKS, number_of_clicks
from edgekd.tasks.promptable.predictor import Masks, predictor
from edgekd.tasks.promptable.scoring import evaluate

SIZE = 40


def square(row: int, column: int, side: int = 10) -> np.ndarray:
    mask = np.zeros((SIZE, SIZE), bool)
    mask[row:row + side, column:column + side] = True
    return mask


class Steps:
    """A predictor whose IoU after n clicks is `schedule[n - 1]` (the last one for ever): so many of the object's 100 pixels, row by row."""

    name = "steps"

    def __init__(self, truth: np.ndarray, schedules: list[list[float]]) -> None:
        self.truth, self.schedules = truth, schedules
        self.asked: list[Prompts] = []
        self.fed: list[bool] = []

    def start(self, image: np.ndarray) -> Any:
        return None

    def masks(self, state: Any, prompts: Prompts, mask_input: np.ndarray | None = None) -> Masks:
        self.asked.append(prompts)
        self.fed.append(mask_input is not None)
        if mask_input is not None:
            assert mask_input.shape == (len(prompts), 2, 2)
        out = []
        for points, labels in zip(prompts.points, prompts.labels, strict=True):
            x, y = points[0].astype(int)
            k = int(np.flatnonzero(self.truth[:, y, x])[0])
            clicks = int((labels != ABSENT).sum())
            schedule = self.schedules[k]
            keep = round(100 * schedule[min(clicks, len(schedule)) - 1])
            mask = np.zeros((SIZE, SIZE), bool)
            mask[tuple(i[:keep] for i in np.nonzero(self.truth[k]))] = True
            out.append(mask)
        return Masks(np.stack(out), np.zeros(len(out)), np.zeros((len(out), 2, 2)))


TRUTH = np.stack([square(2, 2), square(20, 2), square(2, 20), square(20, 20)])


def test_clicks_are_counted_until_each_target() -> None:
    model = Steps(TRUTH, [[1.0], [0.5, 0.82, 0.85, 0.95], [0.8, 0.7, 0.9], [0.5, 0.85]])
    found = number_of_clicks(model, None, TRUTH)
    assert found["noc80"].tolist() == [1, 2, 1, 2] and found["noc90"].tolist() == [1, 4, 3, 20]
    assert found["noc80_failure"].tolist() == [0, 0, 0, 0] and found["noc90_failure"].tolist() == [0, 0, 0, 1]
    assert [len(p) for p in model.asked] == [4, 3, 3, 2, *[1] * 16]  # whoever is done is asked no more
    assert [p.labels.shape[1] for p in model.asked] == list(range(1, MOST_CLICKS + 1)) and model.fed == [False] + [True] * 19


def test_the_last_click_may_still_reach_it() -> None:
    late = [[0.5] * 19 + [0.9]]
    found = number_of_clicks(Steps(TRUTH[:1], late), None, TRUTH[:1])
    assert found["noc90"].tolist() == found["noc80"].tolist() == [20] and found["noc90_failure"].tolist() == [0]
    never = number_of_clicks(Steps(TRUTH[:1], [[0.5]]), None, TRUTH[:1], most=5)
    assert never["noc90"].tolist() == [5] and never["noc90_failure"].tolist() == [1]


def test_clicks_start_in_the_middle_and_go_to_the_deepest_error() -> None:
    model = Steps(TRUTH[:1], [[0.5, 0.7, 1.0]])
    number_of_clicks(model, None, TRUTH[:1], feed_mask=False)
    last = model.asked[-1]
    assert np.array_equal(last.points[0, 0], center_clicks(TRUTH[:1])[0]) and last.labels.tolist() == [[POSITIVE] * 3]
    # 5 of 10 rows are missing below row 7, then 3 below row 9: the middle row, the first of the columns that are deep enough
    assert last.points[0, 1].tolist() == [4.5, 9.5] and last.points[0, 2].tolist() == [3.5, 10.5]
    assert not any(model.fed)


def test_a_known_first_answer_is_not_asked_again() -> None:
    model = Steps(TRUTH, [[1.0]] * 4)
    first = model.masks(None, Prompts.clicks(center_clicks(TRUTH)))
    number_of_clicks(model, None, TRUTH, first=first)
    assert len(model.asked) == 1


def test_a_model_with_few_points_fails_by_then() -> None:
    class Limited(Oracle):
        max_points = 3

        def decode(self, *args: Any, **more: Any) -> tuple[np.ndarray, np.ndarray]:
            masks, score = super().decode(*args, **more)
            masks[:] = -1
            return masks, score

    data, model = Painted(count=1), Limited()
    asked = predictor(model)
    truth = data[0].masks
    assert truth is not None
    found = number_of_clicks(asked, asked.start(data[0].image), truth)
    assert found["noc80"].tolist() == [20] * 3 and found["noc80_failure"].tolist() == [1] * 3 and model.decodes == 3
    assert "takes 3 points" in evaluate(model, data, metrics=("noc",)).protocol["prompts"][0]


def test_in_an_evaluation() -> None:
    good, bad = (evaluate(m, Painted(), metrics=("noc",)).metrics for m in (Oracle(), Empty()))
    assert good == {"noc80": 1, "noc90": 1, "noc80_failure": 0, "noc90_failure": 0}
    assert bad == {"noc80": 20, "noc90": 20, "noc80_failure": 1, "noc90_failure": 1}


def brute_depth(region: np.ndarray) -> np.ndarray:
    """Distance of each pixel of a region to the nearest pixel outside, the ring around the photo included."""
    padded = np.pad(region, 1)
    inside, outside = np.argwhere(padded), np.argwhere(~padded)
    depth = np.zeros(padded.shape)
    for r, c in inside:
        depth[r, c] = np.sqrt(((outside - (r, c)) ** 2).sum(axis=1).min())
    return depth[1:-1, 1:-1]


@pytest.mark.parametrize("seed", range(12))
def test_the_deepest_error_by_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth, predicted = (np.kron(rng.random((4, 5)) < 0.5, np.ones((4, 4), bool)) for _ in range(2))
    clicked = rng.random(truth.shape) < 0.2
    point, label = deepest_error(predicted, truth, clicked)
    missed, extra = (np.where(clicked, 0, brute_depth(r)) for r in (truth & ~predicted, predicted & ~truth))
    column, row = np.floor(point).astype(int)
    assert label == (POSITIVE if missed.max() > extra.max() else NEGATIVE) and not clicked[row, column]
    assert (missed if label == POSITIVE else extra)[row, column] == pytest.approx(max(missed.max(), extra.max()))


def test_nothing_left_to_click() -> None:
    mask, none = square(3, 3), np.zeros((SIZE, SIZE), bool)
    assert deepest_error(mask, mask, none)[1] == ABSENT
    assert deepest_error(none, mask, mask)[1] == ABSENT  # wrong, but every wrong pixel was clicked
    assert deepest_error(mask, none, none)[1] == NEGATIVE and deepest_error(none, mask, none)[1] == POSITIVE
