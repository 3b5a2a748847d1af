"""The data pack: a tiny one of each kind made here, and the real ones where they lie beside the checkout."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgekd.data import Pack, open_data
from edgekd.errors import EdgekdError, UsageError
from edgekd.protocols import Dataset

SHARED = Path(__file__).resolve().parents[2] / "shared/data"
real = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data pack is not beside this checkout")


def write(root: Path, kind: str, items: list[dict[str, Any]], splits: dict[str, list[str]], arrays: dict[str, np.ndarray]) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(root / name)
    (root / "index.json").write_text(json.dumps({"format": 1, "name": root.name, "kind": kind, "items": items}))
    (root / "splits.json").write_text(json.dumps(splits))
    return root


def item(name: str, **more: Any) -> dict[str, Any]:
    return {"id": name, "split": "train", "image": f"images/{name}.png", "width": 30, "height": 20, **more}


def labelled(tmp_path: Path, kind: str, *maps: np.ndarray, primary: int = 0) -> Path:
    arrays = {"images/a.png": np.zeros((20, 30, 3), np.uint8), **{f"masks/a_{i}.png": m.astype(np.uint8) for i, m in enumerate(maps)}}
    masks = [{"file": f"masks/a_{i}.png", "annotator": i, "n_regions": 2} for i in range(len(maps))]
    return write(tmp_path / kind, kind, [item("a", masks=masks, primary=primary)], {"train": ["a"], "val": []}, arrays)


def test_regions_are_split_into_connected_pieces(tmp_path: Path) -> None:
    labels = np.ones((20, 30), np.uint8)
    labels[:, 10:14] = 2  # cuts label 1 into a left piece of 10 columns and a right one of 16
    labels[0, 0] = 3  # one pixel of 600: below 1 %
    sample = Pack(labelled(tmp_path, "regions", labels), split="train")[0]
    assert sample.masks is not None and [int(m.sum()) for m in sample.masks] == [320, 199, 80]
    assert sample.masks.dtype == bool and not (sample.masks.sum(axis=0) > 1).any()
    assert sample.masks[0][:, 14:].all() and not sample.masks[0][:, :14].any()


def test_diagonal_touch_is_not_connected(tmp_path: Path) -> None:
    labels = np.ones((20, 30), np.uint8)
    labels[:10, :15] = labels[10:, 15:] = 2
    sample = Pack(labelled(tmp_path, "regions", labels))[0]
    assert sample.masks is not None and len(sample.masks) == 4


def test_instances_keep_their_pieces_and_background_is_none(tmp_path: Path) -> None:
    labels = np.zeros((20, 30), np.uint8)
    labels[2:5, 2:5] = labels[10:12, 2:5] = 4  # one object in two pieces, as when something lies across it
    labels[15, 15] = 2
    sample = Pack(labelled(tmp_path, "instances", labels))[0]
    assert sample.masks is not None and [int(m.sum()) for m in sample.masks] == [1, 15]


def test_the_primary_annotator_is_used(tmp_path: Path) -> None:
    first, second = np.ones((20, 30), np.uint8), np.ones((20, 30), np.uint8)
    second[:, 15:] = 2
    sample = Pack(labelled(tmp_path, "regions", first, second, primary=1))[0]
    assert sample.masks is not None and len(sample.masks) == 2


def test_alphas_count_only_when_clean(tmp_path: Path) -> None:
    alpha = np.zeros((20, 30), np.uint8)
    alpha[5:15, 5:15] = 200
    alpha[0, 0] = 127
    notes = {"a": {"area": 0.17, "certain": 0.95}, "b": {"area": 0.01, "certain": 0.99}, "c": {"area": 0.9, "certain": 0.99},
             "d": {"area": 0.17, "certain": 0.5}}
    items = [item(k, label=1, saliency={"file": f"saliency/{k}.png", **v}) for k, v in notes.items()] + [item("e", label=2)]
    arrays = {f"images/{k}.png": np.zeros((20, 30, 3), np.uint8) for k in "abcde"} | {f"saliency/{k}.png": alpha for k in "abcd"}
    data = Pack(write(tmp_path / "p", "classification", items, {"train": list("abcde")}, arrays))
    assert data.has_masks and "not" not in data.labels and "model-made" in data.labels
    masks = [s.masks for s in data]
    assert masks[0] is not None and masks[0].shape == (1, 20, 30) and masks[0].sum() == 100
    assert masks[1:] == [None] * 4


def test_photos_have_no_masks(tmp_path: Path) -> None:
    data = Pack(write(tmp_path / "demo", "photos", [item("a")], {"demo": ["a"]}, {"images/a.png": np.zeros((20, 30, 3), np.uint8)}))
    assert isinstance(data, Dataset) and not data.has_masks and data[0].masks is None


def test_splits(tmp_path: Path) -> None:
    arrays = {f"images/{k}.png": np.zeros((20, 30, 3), np.uint8) for k in "abc"}
    root = write(tmp_path / "p", "photos", [item(k) for k in "abc"], {"train": ["c", "a"], "val": ["b"]}, arrays)
    assert [s.id for s in open_data(root, split="train")] == ["c", "a"]
    assert [s.id for s in open_data(root, split="val")] == ["b"]
    assert len(open_data(root)) == 3 and len(open_data(root, split="train", limit=1)) == 1
    assert open_data(root, split="val").name == "p/val"
    with pytest.raises(UsageError, match=r"unknown split 'vall'[\s\S]*did you mean 'val'"):
        open_data(root, split="vall")
    assert len({open_data(root, split=s).fingerprint() for s in ("train", "val", None)}) == 3


def test_masks_can_be_left_unread(tmp_path: Path) -> None:
    root = labelled(tmp_path, "regions", np.ones((20, 30), np.uint8))
    (root / "masks/a_0.png").unlink()
    data = open_data(root, masks=False)
    assert not data.has_masks and data[0].masks is None and data.fingerprint()


def test_corrupt_photos_are_skipped_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = {f"images/{k}.png": np.zeros((20, 30, 3), np.uint8) for k in "ab"}
    root = write(tmp_path / "p", "photos", [item(k) for k in "ab"], {"train": ["a", "b", "ghost"]}, arrays)
    (root / "images/a.png").write_bytes(b"broken")
    data = Pack(root)
    assert [s.id for s in data] == ["b"] and len(data.skipped) == 2
    assert "images/a.png" in data.skipped[0] and "ghost" in data.skipped[1] and "ghost" in capsys.readouterr().err
    (root / "images/b.png").unlink()
    with pytest.raises(UsageError, match="image"):
        Pack(root)


def test_damaged_masks_are_errors_that_name_the_file(tmp_path: Path) -> None:
    root = labelled(tmp_path, "regions", np.ones((10, 10), np.uint8))
    with pytest.raises(EdgekdError, match=r"a_0\.png"):
        Pack(root)[0]
    (root / "masks/a_0.png").write_bytes(b"broken")
    with pytest.raises(EdgekdError, match=r"a_0\.png"):
        Pack(root)[0]


def test_unknown_format_and_missing_splits(tmp_path: Path) -> None:
    root = labelled(tmp_path, "regions", np.ones((20, 30), np.uint8))
    (root / "splits.json").unlink()
    with pytest.raises(UsageError, match=r"splits\.json"):
        open_data(root)
    (root / "splits.json").write_text("{}")
    index = json.loads((root / "index.json").read_text())
    (root / "index.json").write_text(json.dumps({**index, "format": 2}))
    with pytest.raises(UsageError, match="format 2"):
        open_data(root)


def test_a_folder_with_another_index_json_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text('{"hello": 1}')
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    assert len(open_data(tmp_path)) == 1


@real
@pytest.mark.parametrize(("name", "split", "count", "least"), [("bsds500", "val", 100, 2), ("nuclei", "val", 40, 1)])
def test_real_masks(name: str, split: str, count: int, least: int) -> None:
    data = open_data(SHARED / name, split=split)
    assert len(data) == count and data.has_masks and data.skipped == []
    for index in (0, count // 2):
        sample = data[index]
        assert sample.masks is not None and len(sample.masks) >= least
        assert sample.masks.shape[1:] == sample.image.shape[:2] and sample.masks.any(axis=(1, 2)).all()


@real
def test_real_alphas_and_photos() -> None:
    data = open_data(SHARED / "imagenet-sample", split="val")
    found = [data[i].masks for i in range(len(data))]
    clean = [m for m in found if m is not None]
    assert data.has_masks and 20 < len(clean) < 60 and all(0.02 < m.mean() < 0.75 for m in clean)
    assert not open_data(SHARED / "demo").has_masks


@real
def test_fingerprints_of_real_splits_differ() -> None:
    assert open_data(SHARED / "nuclei", split="val").fingerprint() != open_data(SHARED / "nuclei", split="train").fingerprint()
