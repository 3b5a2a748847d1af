"""COCO and LVIS json: three kinds of segmentation, our decoder against pycocotools, where images are looked for, and what is refused."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as pycoco

from edgekd.data import Coco, open_data
from edgekd.data.coco import decode_segmentation, decompress_counts, fill_polygons, runs_to_mask
from edgekd.errors import EdgekdError, UsageError
from edgekd.protocols import Dataset

HEIGHT, WIDTH = 20, 30


def compress(mask: np.ndarray) -> str:
    """By pycocotools."""
    return pycoco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()


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
    kinds = [POLYGON["segmentation"], {"size": [HEIGHT, WIDTH], "counts": runs(mask)}, {"size": [HEIGHT, WIDTH], "counts": compress(mask)}]
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
def test_run_lengths_are_read_as_pycocotools_writes_them(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((HEIGHT * 9, WIDTH * 9)) < rng.choice([0.0, 0.001, 0.05, 0.5, 1.0])
    assert decompress_counts(compress(mask)) == runs(mask)
    for counts in (compress(mask), runs(mask)):
        assert np.array_equal(decode_segmentation({"size": list(mask.shape), "counts": counts}, *mask.shape), mask)


@pytest.mark.parametrize("counts", ["zz", "5", "53:", "53:3o", "\n\n", "5" + "o" * 20 + "1", [3, -3, 20], [3, 5], "é", 7, None, [[1]]])
def test_damaged_run_lengths_are_refused(counts: object) -> None:
    with pytest.raises(UsageError, match="run"):
        decode_segmentation({"size": [4, 6], "counts": counts}, 4, 6)


@pytest.mark.parametrize("segmentation", [{"size": [4, 6]}, {"counts": [24]}, {"size": 4, "counts": [24]}, 3, "x", [3], [["a"] * 6], [[0, 1, 2, 3, 4, 5, 6]],
                                          [[0, 0, 1e9, 0, 1e9, 1e9]], [[0, 0, float("nan"), 0, 3, 3]]])
def test_other_segmentations_are_refused(segmentation: object) -> None:
    with pytest.raises(UsageError, match=r"polygon|run"):
        decode_segmentation(segmentation, 4, 6)


def test_runs_of_another_size_are_refused() -> None:
    with pytest.raises(EdgekdError, match="not 4 x 4"):
        runs_to_mask([3, 5], 4, 4)


def test_polygons_are_drawn_as_coco_draws_them() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        polygons = [(rng.uniform(-3, 1, (5, 2)) + rng.uniform(2, 30, (5, 2))).ravel().round(2).tolist() for _ in range(2)]
        expected = pycoco.decode(pycoco.merge(pycoco.frPyObjects(polygons, HEIGHT, WIDTH))).astype(bool)
        assert np.array_equal(decode_segmentation(polygons, HEIGHT, WIDTH), expected)


def test_polygons_fill_what_they_enclose() -> None:
    assert np.array_equal(fill_polygons([[2, 3, 12, 3, 12, 9, 2, 9]], HEIGHT, WIDTH), rectangle(2, 3, 12, 9))
    assert fill_polygons([[-5, -5, 99, -5, 99, 99, -5, 99]], HEIGHT, WIDTH).all()
    assert not fill_polygons([], HEIGHT, WIDTH).any() and not fill_polygons([[1, 1, 9, 9]], HEIGHT, WIDTH).any()


def test_polygon_area_of_a_circle() -> None:
    angle = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    mask = fill_polygons([np.stack([50 + 40 * np.cos(angle), 50 + 40 * np.sin(angle)], axis=1).ravel().tolist()], 100, 100)
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
    data = Coco(path)
    masks = data[0].masks
    assert masks is not None and len(masks) == 1
    assert [a["id"] for a in data.annotations(0)] == [1, 2, 3] and data.annotations(1) == []  # for COCO's AP, which ignores crowds itself
    assert not Coco(write(tmp_path / "crowd", [{**POLYGON, "iscrowd": 1}])).has_masks


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


def lvis(tmp_path: Path, *, split: str = "val2017") -> Path:
    """An LVIS json: no file names but addresses, and the categories that were looked for in vain."""
    path = write(tmp_path / "annotations", [{"id": 1, "image_id": 7, "category_id": 3, "area": 60, "segmentation": POLYGON["segmentation"]}],
                 images=tmp_path / split, name="lvis_v1_val.json")
    data = json.loads(path.read_text())
    data["images"] = [{**{k: v for k, v in r.items() if k != "file_name"}, "coco_url": f"http://images.cocodataset.org/{split}/{r['file_name']}",
                       "neg_category_ids": [5], "not_exhaustive_category_ids": [3]} for r in data["images"]]
    data["categories"] = [{"id": 3, "name": "spoon", "frequency": "r"}, {"id": 5, "name": "fork"}]
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize("split", ["val2017", "train2017"])
def test_lvis_has_addresses_instead_of_names(tmp_path: Path, split: str) -> None:
    data = open_data(lvis(tmp_path, split=split))
    assert isinstance(data, Coco) and [s.id for s in data] == ["one.png", "two.png"] and data.categories == {3: "spoon", 5: "fork"}
    masks = data[0].masks
    assert masks is not None and np.array_equal(masks, rectangle(2, 3, 12, 9)[None])
    assert data.record(0)["neg_category_ids"] == [5] and data.annotations(0)[0]["category_id"] == 3


@pytest.mark.parametrize("given", ["elsewhere", "elsewhere/val2017"])
def test_images_in_a_folder_of_the_users(tmp_path: Path, given: str) -> None:
    path = lvis(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "val2017").rename(tmp_path / "elsewhere/val2017")
    with pytest.raises(UsageError, match="none of the 2 images"):
        Coco(path)
    assert len(open_data(path, images=tmp_path / given)) == 2
    with pytest.raises(UsageError, match="no folder"):
        open_data(path, images=tmp_path / "nowhere")
    with pytest.raises(UsageError, match="json only"):
        open_data(tmp_path / "elsewhere", images=tmp_path / given)


def test_a_limit_stops_at_so_many_readable_images(tmp_path: Path) -> None:
    path = write(tmp_path, [POLYGON])
    data = open_data(path, limit=1)
    assert len(data) == 1 and data.name == "instances[:1]" and data.fingerprint() != open_data(path).fingerprint()
    (tmp_path / "one.png").write_bytes(b"broken")
    later = open_data(path, limit=1)
    assert [s.id for s in later] == ["two.png"] and later.skipped[0].startswith("one.png")


def test_what_does_not_fit_is_named_at_once(tmp_path: Path) -> None:
    wrong = {"id": 4, "image_id": 7, "segmentation": {"size": [HEIGHT, 3], "counts": [60]}}
    with pytest.raises(UsageError, match=r"run-length[\s\S]*annotation 4"):
        Coco(write(tmp_path, [wrong]))
    path = write(tmp_path, [{**POLYGON, "category_id": 8}])
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "categories": [{"id": 1, "name": "x"}]}))
    with pytest.raises(UsageError, match="category 8"):
        Coco(path)
    path.write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    with pytest.raises(UsageError, match="names no images"):
        Coco(path)
    path.write_text(json.dumps([{"image_id": 7, "bbox": [0, 0, 1, 1], "score": 1.0, "category_id": 1}]))
    with pytest.raises(UsageError, match=r"list of detections[\s\S]*--boxes"):
        Coco(path)
    damaged = Coco(write(tmp_path, [{"id": 6, "image_id": 7, "segmentation": {"size": [HEIGHT, WIDTH], "counts": "5"}}]))
    with pytest.raises(UsageError, match=r"run[\s\S]*annotation 6"):
        damaged[0]


def test_fingerprint_follows_the_json(tmp_path: Path) -> None:
    first = Coco(write(tmp_path, [POLYGON])).fingerprint()
    assert Coco(tmp_path / "instances.json").fingerprint() == first
    data = json.loads((tmp_path / "instances.json").read_text())
    data["annotations"][0]["segmentation"][0][0] = 1
    (tmp_path / "instances.json").write_text(json.dumps(data))
    assert Coco(tmp_path / "instances.json").fingerprint() != first
