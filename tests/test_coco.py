"""COCO json: three kinds of segmentation, our decoder against known strings, and where images are looked for."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgekd.data import Coco, open_data
from edgekd.data.coco import decode_segmentation, decompress_counts, fill_polygon, runs_to_mask
from edgekd.errors import EdgekdError, UsageError
from edgekd.protocols import Dataset

HEIGHT, WIDTH = 20, 30


def compress(counts: list[int]) -> str:
    """The encoder of the published format, for round trips."""
    out = []
    for i, count in enumerate(counts):
        value = count - (counts[i - 2] if i > 2 else 0)
        more = True
        while more:
            bits = value & 0x1F
            value >>= 5
            more = value != -1 if bits & 0x10 else value != 0
            out.append(chr((bits | (0x20 if more else 0)) + 48))
    return "".join(out)


def runs(mask: np.ndarray) -> list[int]:
    flat = np.concatenate([[0], mask.T.ravel().astype(int)])
    edges = np.flatnonzero(np.diff(flat)) if mask.any() else np.array([], int)
    return np.diff(np.concatenate([[0], edges, [mask.size]])).tolist()


def rectangle(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[y0:y1, x0:x1] = True
    return mask


def write(root: Path, annotations: list[dict[str, Any]], *, images: Path | None = None, name: str = "instances.json", **record: Any) -> Path:
    folder = images or root
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT), (9, 99, 199)).save(folder / "one.png")
    Image.new("RGB", (WIDTH, HEIGHT), (1, 2, 3)).save(folder / "two.png")
    records = [{"id": i, "file_name": f, "height": HEIGHT, "width": WIDTH, **record} for i, f in ((7, "one.png"), (3, "two.png"))]
    root.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(json.dumps({"images": records, "annotations": annotations, "categories": []}))
    return root / name


POLYGON = {"id": 1, "image_id": 7, "segmentation": [[2, 3, 12, 3, 12, 9, 2, 9]], "iscrowd": 0}


def test_polygon_rle_and_compressed_rle_give_the_same_mask(tmp_path: Path) -> None:
    mask = rectangle(2, 3, 12, 9)
    kinds = [POLYGON["segmentation"], {"size": [HEIGHT, WIDTH], "counts": runs(mask)}, {"size": [HEIGHT, WIDTH], "counts": compress(runs(mask))}]
    path = write(tmp_path, [{"id": i, "image_id": 7, "segmentation": s} for i, s in enumerate(kinds)])
    data = Coco(path)
    assert isinstance(data, Dataset) and data.has_masks and len(data) == 2 and data.skipped == []
    sample = data[0]
    assert sample.id == "one.png" and sample.masks is not None and sample.masks.shape == (3, HEIGHT, WIDTH)
    assert sample.masks.dtype == bool and all(np.array_equal(m, mask) for m in sample.masks)
    other = data[1]
    assert other.id == "two.png" and other.masks is not None and other.masks.shape == (0, HEIGHT, WIDTH)


def test_decompress_known_string() -> None:
    # 6x4 image, columns: 5 background, 3 object, 10 background, 6 object
    assert decompress_counts("53:3") == [5, 3, 10, 6]
    assert decompress_counts(b"53:3") == [5, 3, 10, 6]


@pytest.mark.parametrize("seed", range(8))
def test_compressed_round_trip(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((HEIGHT * 9, WIDTH * 9)) < rng.choice([0.001, 0.05, 0.5])
    counts = runs(mask)
    assert decompress_counts(compress(counts)) == counts
    assert np.array_equal(decode_segmentation({"size": list(mask.shape), "counts": compress(counts)}, *mask.shape), mask)


def test_runs_of_another_size_are_refused() -> None:
    with pytest.raises(EdgekdError, match="not 4 x 4"):
        runs_to_mask([3, 5], 4, 4)


def test_polygons_fill_pixel_centres() -> None:
    assert np.array_equal(fill_polygon(np.array([[2, 3], [12, 3], [12, 9], [2, 9]], float), HEIGHT, WIDTH), rectangle(2, 3, 12, 9))
    assert fill_polygon(np.array([[2.4, 3.4], [3.6, 3.4], [3.6, 4.6], [2.4, 4.6]]), HEIGHT, WIDTH).sum() == 4
    assert fill_polygon(np.array([[2.6, 3.6], [3.4, 3.6], [3.4, 4.4], [2.6, 4.4]]), HEIGHT, WIDTH).sum() == 0
    beyond = fill_polygon(np.array([[-5, -5], [99, -5], [99, 99], [-5, 99]], float), HEIGHT, WIDTH)
    assert beyond.all()


def test_polygon_area_of_a_circle() -> None:
    angle = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    mask = fill_polygon(np.stack([50 + 40 * np.cos(angle), 50 + 40 * np.sin(angle)], axis=1), 100, 100)
    assert mask.sum() == pytest.approx(np.pi * 1600, rel=0.005)
    assert mask[50, 50] and not mask[5, 5]


def test_several_polygons_are_one_mask_and_a_concave_one_stays_concave() -> None:
    two = decode_segmentation([[0, 0, 4, 0, 4, 4, 0, 4], [10, 10, 14, 10, 14, 14, 10, 14]], HEIGHT, WIDTH)
    assert np.array_equal(two, rectangle(0, 0, 4, 4) | rectangle(10, 10, 14, 14))
    u = decode_segmentation([[0, 0, 12, 0, 12, 10, 8, 10, 8, 4, 4, 4, 4, 10, 0, 10]], HEIGHT, WIDTH)
    assert np.array_equal(u, rectangle(0, 0, 12, 10) & ~rectangle(4, 4, 8, 10))


def test_crowds_and_empty_masks_are_left_out(tmp_path: Path) -> None:
    path = write(tmp_path, [POLYGON, {**POLYGON, "id": 2, "iscrowd": 1}, {**POLYGON, "id": 3, "segmentation": [[1.6, 1.6, 1.8, 1.6, 1.8, 1.8]]},
                            {"id": 4, "image_id": 7, "bbox": [0, 0, 5, 5]}])
    masks = Coco(path)[0].masks
    assert masks is not None and len(masks) == 1


@pytest.mark.parametrize(("json_at", "images_at"), [("x", "x"), ("x", "x/images"), ("x/annotations", "x"), ("x/annotations", "x/images"),
                                                    ("x/annotations", "x/val2017")])
def test_images_are_found_in_the_usual_places(tmp_path: Path, json_at: str, images_at: str) -> None:
    path = write(tmp_path / json_at, [POLYGON], images=tmp_path / images_at, name="instances_val2017.json")
    assert len(Coco(path)) == 2


def test_missing_and_corrupt_images_are_skipped_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, [POLYGON])
    (tmp_path / "two.png").unlink()
    data = Coco(path)
    assert len(data) == 1 and data.skipped == ["two.png: the image does not exist"]
    assert "two.png" in capsys.readouterr().err
    (tmp_path / "one.png").write_bytes(b"broken")
    with pytest.raises(UsageError, match="image"):
        Coco(path)


def test_annotations_of_the_stored_orientation(tmp_path: Path) -> None:
    path = write(tmp_path, [POLYGON])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "one.png", exif=exif)
    sample = Coco(path)[0]
    assert sample.image.shape == (HEIGHT, WIDTH, 3) and sample.masks is not None


def test_a_photo_of_another_size_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, [POLYGON], width=99)
    with pytest.raises(EdgekdError, match="99"):
        Coco(path)[0]


@pytest.mark.parametrize("text", ["[]", "{", '{"images": 3}', '{"images": [{"id": 1}]}', '{"images": [], "annotations": [{}]}', "3"])
def test_other_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UsageError, match="COCO json"):
        open_data(tmp_path / "x.json")


def test_without_masks_and_without_annotations(tmp_path: Path) -> None:
    path = write(tmp_path, [POLYGON])
    unread = open_data(path, masks=False)
    assert not unread.has_masks and unread[0].masks is None and unread.fingerprint() != open_data(path).fingerprint()
    bare = open_data(write(tmp_path / "bare", []))
    assert not bare.has_masks and bare[0].masks is None


def test_fingerprint_follows_the_json(tmp_path: Path) -> None:
    first = Coco(write(tmp_path, [POLYGON])).fingerprint()
    assert Coco(tmp_path / "instances.json").fingerprint() == first
    data = json.loads((tmp_path / "instances.json").read_text())
    data["annotations"][0]["segmentation"][0][0] = 1
    (tmp_path / "instances.json").write_text(json.dumps(data))
    assert Coco(tmp_path / "instances.json").fingerprint() != first
