"""One prompt on one photo, and the PNG that comes of it."""
from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

sys.path.insert(0, str(Path(__file__).parent))
from oracles import Oracle, TorchOracle, painted

from edgekd.data.images import ImageError
from edgekd.errors import UsageError
from edgekd.protocols import BOX_BOTTOM_RIGHT, BOX_TOP_LEFT
from edgekd.tasks.promptable import baselines
from edgekd.tasks.promptable.predict import build_prompts, predict, predict_file, save_mask


@pytest.fixture
def truth() -> np.ndarray:
    masks = np.zeros((2, 96, 128), bool)
    masks[0, 16:56, 16:64] = True
    masks[1, 64:88, 72:120] = True
    return masks


@pytest.mark.parametrize("model", [Oracle(), TorchOracle()])
def test_clicks_and_boxes_find_their_instance(model: object, truth: np.ndarray) -> None:
    image = painted(truth)
    for prompt, k in (({"points": [(40, 30)]}, 0), ({"points": [(100, 75)]}, 1), ({"box": (16, 16, 64, 56)}, 0), ({"box": (120, 88, 72, 64)}, 1),
                      ({"points": [(40, 30), (100, 75)], "labels": [1, 0]}, 0)):
        found = predict(model, image, **prompt, single_click_rule="iou")  # type: ignore[arg-type]
        assert predict(model, image, **prompt).score == pytest.approx(0.1), "mask 0 unless told otherwise"  # type: ignore[arg-type]
        assert found.mask.shape == (96, 128) and found.mask.dtype == bool
        assert (found.mask & truth[k]).sum() / (found.mask | truth[k]).sum() > 0.9
        assert found.score == pytest.approx(0.9 if list(prompt) == ["points"] else 0.1)


def test_baselines_predict_without_a_score(truth: np.ndarray) -> None:
    found = predict(baselines.load("baseline/box_fill"), painted(truth), box=(16, 16, 64, 56))
    assert found.score is None and np.array_equal(found.mask, truth[0])


def test_the_prompt_is_built_as_models_read_it() -> None:
    prompts = build_prompts(50, 80, [(1, 2), (3, 4)], [1, 0], (60, 40, 10, 20))
    assert prompts.points.tolist() == [[[10, 20], [60, 40], [1, 2], [3, 4]]]
    assert prompts.labels.tolist() == [[BOX_TOP_LEFT, BOX_BOTTOM_RIGHT, 1, 0]]
    assert build_prompts(50, 80, [], None, (-5, -5, 999, 999)).points.tolist() == [[[0, 0], [80, 50]]]
    assert build_prompts(50, 80, [(80, 50)], None, None).single_click.all()


@pytest.mark.parametrize(("points", "labels", "box", "message"), [
    ([], None, None, r"prompt[\s\S]*--point x,y"),
    ([(81, 5)], None, None, "81,5 is outside the photo, which is 80 x 50"),
    ([(5, -1)], None, None, "outside the photo"),
    ([(5, 5)], [1, 0], None, "1 points but 2 labels"),
    ([(5, 5)], [2], None, "not a point's label"),
    ([], None, (10, 10, 10, 30), "no area"),
    ([], None, (90, 10, 99, 30), "no area"),
    ([(float("nan"), 5)], None, None, "outside the photo"),
])
def test_wrong_prompts_are_usage_errors(points: list[tuple[float, float]], labels: list[int] | None, box: tuple[float, float, float, float] | None,
                                        message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_prompts(50, 80, points, labels, box)


def test_the_png_has_the_size_of_the_upright_photo(tmp_path: Path, truth: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(painted(truth)).transpose(Image.Transpose.ROTATE_90)
    stored.save(tmp_path / "photo.png", exif=exif)
    found = predict_file(Oracle(), tmp_path / "photo.png", tmp_path / "deep" / "mask.png", points=[(40, 30)])
    with Image.open(tmp_path / "deep" / "mask.png") as mask, Image.open(tmp_path / "photo.png") as photo:
        assert mask.size == ImageOps.exif_transpose(photo).size == (128, 96) and mask.mode == "L" and mask.format == "PNG"
        assert np.array_equal(np.asarray(mask) == 255, found.mask) and set(np.unique(np.asarray(mask))) == {0, 255}


def test_always_a_png_and_no_leftovers(tmp_path: Path) -> None:
    save_mask(np.eye(5, dtype=bool), tmp_path / "mask.jpg")
    save_mask(np.eye(6, dtype=bool), tmp_path / "mask.jpg")
    save_mask(np.eye(4, dtype=bool), tmp_path / "mask")
    with Image.open(tmp_path / "mask.jpg") as image:
        assert image.format == "PNG" and image.size == (6, 6)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mask", "mask.jpg"]


def test_missing_and_broken_photos_and_unwritable_outputs(tmp_path: Path, truth: np.ndarray) -> None:
    with pytest.raises(UsageError, match=r"no such photo.*none\.png"):
        predict_file(Oracle(), tmp_path / "none.png", tmp_path / "m.png", points=[(1, 1)])
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff" + bytes(300))
    with pytest.raises(ImageError, match=r"broken\.jpg"):
        predict_file(Oracle(), tmp_path / "broken.jpg", tmp_path / "m.png", points=[(1, 1)])
    Image.fromarray(painted(truth)).save(tmp_path / "good.png")
    with pytest.raises(UsageError, match=r"cannot be written.*good\.png"):
        predict_file(Oracle(), tmp_path / "good.png", tmp_path / "good.png" / "m.png", points=[(40, 30)])
    assert not (tmp_path / "m.png").exists()
