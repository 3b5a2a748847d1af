"""Overlays: masks where they should be, prompts on top, and any shape of photo."""
from __future__ import annotations

import io

import numpy as np
import pytest
import report_sample as sample
from PIL import Image

from edgekd.report.overlays import PALETTE, compare, draw, iou, jpeg

GREY = np.full((60, 80, 3), 128, np.uint8)
NOWHERE = (np.zeros((0, 1, 2), np.float32), np.zeros((0, 1), np.float32))


def square(y: int = 20, x: int = 20, size: int = 20) -> np.ndarray:
    mask = np.zeros((60, 80), bool)
    mask[y:y + size, x:x + size] = True
    return mask


def drawn(masks: np.ndarray, points: np.ndarray = NOWHERE[0], labels: np.ndarray = NOWHERE[1], width: int = 80) -> np.ndarray:
    return np.asarray(draw(GREY, masks, points, labels, width=width)).astype(int)


def prompt(*points: tuple[float, float, int]) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray([[p[:2] for p in points]], np.float32), np.asarray([[p[2] for p in points]], np.float32)


def test_draw__fills_inside_and_leaves_the_rest() -> None:
    picture = drawn(square()[None])
    assert np.abs(picture[:10] - 128).max() <= 2 and np.abs(picture[50:] - 128).max() <= 2
    inside = picture[30, 30]
    expected = 128 * 0.58 + np.asarray(PALETTE[0]) * 0.42
    assert np.abs(inside - expected).max() <= 3


def test_draw__outlines_stronger_than_it_fills() -> None:
    picture = drawn(square()[None])
    edge, inside, colour = picture[30, 21], picture[30, 30], np.asarray(PALETTE[0])
    assert np.abs(edge - colour).sum() < np.abs(inside - colour).sum()


def test_draw__each_prompt_has_its_own_colour() -> None:
    picture = drawn(np.stack([square(x=10), square(x=50)]))
    assert np.abs(picture[30, 20] - picture[30, 60]).max() > 30


def test_draw__click_is_drawn_with_its_sign() -> None:
    none = np.zeros((1, 60, 80), bool)
    plus, minus = drawn(none, *prompt((40, 30, 1))), drawn(none, *prompt((40, 30, 0)))
    assert (plus[30, 40] > 230).all() and (minus[30, 40] > 230).all(), "the bar of both signs is white"
    assert (plus[26, 40] > 200).all() and minus[26, 40][1] < 120, "only a plus has the upright"
    assert np.abs(plus[:15] - 128).max() <= 2


def test_draw__box_is_drawn_from_any_corner_order() -> None:
    none = np.zeros((1, 60, 80), bool)
    a, b = drawn(none, *prompt((10, 10, 2), (70, 50, 3))), drawn(none, *prompt((70, 50, 2), (10, 10, 3)))
    assert np.array_equal(a, b) and np.abs(a[11:13, 30:50] - 128).max() > 40 and np.abs(a[25:35, 30:50] - 128).max() <= 2


@pytest.mark.parametrize("label", [-1, -2])
def test_draw__absent_points_leave_no_trace(label: int) -> None:
    none = np.zeros((1, 60, 80), bool)
    assert np.array_equal(drawn(none, *prompt((40, 30, label))), drawn(none))


def test_draw__degenerate_box_and_points_outside_do_not_fail() -> None:
    none = np.zeros((1, 60, 80), bool)
    drawn(none, *prompt((10, 10, 2), (10, 10, 3)))
    drawn(none, *prompt((-50, 900, 1)))


@pytest.mark.parametrize(("shape", "width"), [((60, 80), 40), ((80, 60), 40), ((1, 50), 100), ((50, 1), 8), ((700, 500), 64)])
def test_draw__keeps_the_shape_of_the_photo(shape: tuple[int, int], width: int) -> None:
    picture = draw(np.zeros((*shape, 3), np.uint8), np.ones((1, *shape), bool), *NOWHERE, width=width)
    assert picture.size == (width, max(1, round(shape[0] * width / shape[1])))


def test_draw__many_masks_reuse_the_palette() -> None:
    drawn(np.repeat(square()[None], len(PALETTE) + 2, axis=0))


def test_draw__changes_nothing_it_was_given() -> None:
    image, mask = sample.photo()
    before = image.copy(), mask.copy()
    draw(image, mask[None], *NOWHERE)
    assert np.array_equal(image, before[0]) and np.array_equal(mask, before[1])


@pytest.mark.parametrize(("a", "b", "expected"), [(square(), square(), 1.0), (square(), square(x=30), 1 / 3), (square(), square(y=40, x=60), 0.0), (square() & False, square() & False, 1.0)])
def test_iou(a: np.ndarray, b: np.ndarray, expected: float) -> None:
    assert iou(a, b) == pytest.approx(expected)


def test_compare__has_three_panels_of_one_size() -> None:
    found = sample.overlays(("coffee.jpg",))[0]
    assert [p.label for p in found.panels] == ["photo", "sam_nano", "repvit_m1"]
    sizes = {Image.open(io.BytesIO(p.jpeg)).size for p in found.panels}
    assert sizes == {(160, 120)} and found.title == "coffee.jpg"


def test_compare__caption_is_the_agreement() -> None:
    masks = np.stack([square(), square()])
    student = np.stack([square(), square(x=30)])
    points, labels = np.zeros((2, 1, 2), np.float32), np.ones((2, 1), np.float32)
    assert compare(GREY, masks, student, points, labels, title="a").caption == "agreement 0.67 over 2 prompts"
    assert compare(GREY, masks[:1], student[:1], points[:1], labels[:1], title="a").caption == "agreement 1.00"


def test_compare__without_prompts_says_so() -> None:
    assert compare(GREY, np.zeros((0, 60, 80), bool), np.zeros((0, 60, 80), bool), *NOWHERE, title="a").caption == "no prompts"


@pytest.mark.parametrize("wrong", [np.zeros((1, 60, 81), bool), np.zeros((2, 60, 80), bool)])
def test_compare__refuses_shapes_that_do_not_match(wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match="shapes do not match"):
        compare(GREY, wrong, np.zeros((1, 60, 80), bool), np.zeros((1, 1, 2), np.float32), np.ones((1, 1), np.float32), title="a")


def test_jpeg__is_the_same_for_the_same_picture() -> None:
    picture = Image.fromarray(GREY)
    assert jpeg(picture) == jpeg(picture) and jpeg(picture)[:2] == b"\xff\xd8"
