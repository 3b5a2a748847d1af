"""Boxes, clicks and grids made from masks."""
from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from edgekd.data.prompts import (
    Prompts,
    box_from_mask,
    boxes_from_masks,
    center_click,
    center_clicks,
    error_click,
    error_clicks,
    grid_points,
    sample_rng,
)
from edgekd.protocols import ABSENT, BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, NEGATIVE, POSITIVE
from edgekd.tasks.promptable.baselines import fill_box


def rectangle(x0: int, y0: int, x1: int, y1: int, height: int = 40, width: int = 50) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[y0:y1, x0:x1] = True
    return mask


def blob(seed: int) -> np.ndarray:
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(40, 50)), 4)
    return noise > np.quantile(noise, 0.8)


@pytest.mark.parametrize("corners", [(3, 4, 20, 30), (0, 0, 50, 40), (7, 9, 8, 10), (49, 39, 50, 40)])
def test_a_filled_box_is_the_rectangle_it_was_made_from(corners: tuple[int, int, int, int]) -> None:
    mask = rectangle(*corners)
    box = box_from_mask(mask)
    assert tuple(box) == corners
    assert np.array_equal(fill_box(box, 40, 50), mask)


def test_boxes_hold_every_pixel_and_no_empty_side() -> None:
    for seed in range(5):
        mask = blob(seed)
        x0, y0, x1, y1 = box_from_mask(mask).astype(int)
        assert mask[y0:y1, x0:x1].sum() == mask.sum()
        assert mask[y0].any() and mask[y1 - 1].any() and mask[:, x0].any() and mask[:, x1 - 1].any()


def test_empty_masks_have_no_prompts() -> None:
    for make in (box_from_mask, center_click):
        with pytest.raises(ValueError, match="empty"):
            make(np.zeros((4, 4), bool))
    assert boxes_from_masks(np.zeros((0, 4, 4), bool)).shape == (0, 4) and center_clicks(np.zeros((0, 4, 4), bool)).shape == (0, 2)


def test_center_click_of_simple_shapes() -> None:
    assert center_click(rectangle(10, 5, 21, 16)).tolist() == [15.5, 10.5]  # odd sides: the one middle pixel
    assert center_click(rectangle(7, 9, 8, 10)).tolist() == [7.5, 9.5]


def test_the_border_of_the_photo_counts_as_an_edge() -> None:
    assert center_click(np.ones((21, 31), bool))[1] == 10.5
    sky = rectangle(0, 0, 50, 21)
    assert 10 < center_click(sky)[0] < 40 and center_click(sky)[1] == 10.5


def test_center_click_is_inside_even_of_a_ring() -> None:
    y, x = np.mgrid[:60, :60]
    distance = np.hypot(x - 30, y - 30)
    ring = (distance > 12) & (distance < 25)
    cx, cy = center_click(ring)
    assert ring[int(cy), int(cx)] and 16 < np.hypot(cx - 30.5, cy - 30.5) < 21


@pytest.mark.parametrize("seed", range(6))
def test_center_click_equals_the_transform_of_the_whole_padded_mask(seed: int) -> None:
    mask = blob(seed)
    whole = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    row, column = np.unravel_index(whole.argmax(), whole.shape)
    assert center_click(mask).tolist() == [column + 0.5, row + 0.5]


def test_error_click_labels() -> None:
    truth, rng = rectangle(10, 10, 20, 20), np.random.default_rng(0)
    missed, label = error_click(np.zeros_like(truth), truth, rng)
    assert label == POSITIVE and truth[int(missed[1]), int(missed[0])]
    extra, label = error_click(truth | rectangle(30, 10, 40, 20), truth, rng)
    assert label == NEGATIVE and 30 < extra[0] < 40
    assert error_click(truth, truth, rng)[1] == ABSENT


def test_error_click_is_uniform_over_both_kinds_of_error() -> None:
    truth, rng = rectangle(0, 0, 10, 10), np.random.default_rng(0)
    predicted = rectangle(20, 0, 50, 10)  # 100 pixels missed, 300 too many
    drawn = [error_click(predicted, truth, rng) for _ in range(2000)]
    assert np.mean([label == POSITIVE for _, label in drawn]) == pytest.approx(0.25, abs=0.04)
    points = np.array([p for p, label in drawn if label == NEGATIVE])
    assert points.mean(axis=0) == pytest.approx([35, 5], abs=1) and (points % 1 == 0.5).all()


def test_error_clicks_belong_to_their_sample() -> None:
    truth = np.stack([blob(1), blob(2), blob(3)])
    predicted = np.stack([blob(4), blob(2), blob(5)])
    one, again = (error_clicks(predicted, truth, sample_rng(0, "photo", 1)) for _ in range(2))
    assert np.array_equal(one.points, again.points) and one.labels[1, 0] == ABSENT
    other = error_clicks(predicted, truth, sample_rng(0, "another", 1))
    assert not np.array_equal(one.points, other.points)
    assert not np.array_equal(one.points, error_clicks(predicted, truth, sample_rng(1, "photo", 1)).points)


def test_grid_points_are_cell_centres_row_by_row() -> None:
    assert grid_points(2, 40, 80).tolist() == [[20, 10], [60, 10], [20, 30], [60, 30]]
    points = grid_points(8, 30, 50)
    assert points.shape == (64, 2) and points.min() > 0 and (points < [50, 30]).all()


def test_prompts_join_slice_and_tell_single_clicks() -> None:
    boxes, clicks = Prompts.boxes(np.array([[1, 2, 3, 4], [5, 6, 7, 8]])), Prompts.clicks(np.array([[1, 1], [2, 2]]))
    assert boxes.labels.tolist() == [[BOX_TOP_LEFT, BOX_BOTTOM_RIGHT]] * 2 and boxes.points[1].tolist() == [[5, 6], [7, 8]]
    both = boxes.join(clicks)
    assert both.points.shape == (2, 3, 2) and len(both[1:]) == 1
    absent = Prompts.clicks(np.zeros((2, 2)), np.array([ABSENT, NEGATIVE]))
    assert boxes.single_click.tolist() == [False, False] and clicks.single_click.tolist() == [True, True]
    assert both.single_click.tolist() == [False, False]
    assert clicks.join(absent).single_click.tolist() == [True, False]  # an absent point is no point


def test_prompts_check_their_shapes() -> None:
    with pytest.raises(ValueError, match="belong together"):
        Prompts(np.zeros((2, 3, 2)), np.zeros((2, 2)))
