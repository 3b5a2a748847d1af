"""SA-1B's tars read in place, folders of tars and of pairs, and what is damaged in them."""
from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as pycoco

from edgekd.data import Sa1b, Subset, open_data
from edgekd.data import sa1b as module
from edgekd.errors import EdgekdError, UsageError
from edgekd.protocols import Dataset

HEIGHT, WIDTH = 24, 36


def mask(k: int) -> np.ndarray:
    out = np.zeros((HEIGHT, WIDTH), bool)
    out[2 * k:2 * k + 6, 3:20 + k] = True
    return out


def photo(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (WIDTH, HEIGHT), (10 * number % 256, 90, 200)).save(file, "JPEG")
    return file.getvalue()


def notes(number: int, count: int = 2, **changed: Any) -> bytes:
    """What SA-1B's json of an image holds."""
    annotations = []
    for k in range(count):
        run = pycoco.encode(np.asfortranarray(mask(k).astype(np.uint8)))
        annotations.append({"id": 100 * number + k, "segmentation": {"size": run["size"], "counts": run["counts"].decode()}, "area": int(mask(k).sum()),
                            "bbox": [3.0, 2.0 * k, 16.0 + k, 5.0], "point_coords": [[7.0, 2.0 * k + 3]], "predicted_iou": 0.9, "stability_score": 0.97,
                            "crop_box": [0, 0, WIDTH, HEIGHT]})
    image = {"image_id": number, "width": WIDTH, "height": HEIGHT, "file_name": f"sa_{number}.jpg"}
    return json.dumps({"image": image, "annotations": annotations, **changed}).encode()


def files(*numbers: int) -> dict[str, bytes]:
    return {name: data for n in numbers for name, data in ((f"sa_{n}.jpg", photo(n)), (f"sa_{n}.json", notes(n)))}


@pytest.fixture
def tar(tmp_path: Path) -> Callable[..., Path]:
    """`tar(members, name=)` writes one."""

    def write(members: dict[str, bytes], name: str = "sa_000020.tar", prefix: str = "", mode: Any = "w") -> Path:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        with tarfile.open(tmp_path / name, mode) as t:
            for member, data in members.items():
                info = tarfile.TarInfo(prefix + member)
                info.size, info.mtime = len(data), 1.5  # a fraction of a second takes an extended header, as Python's tarfile writes it
                t.addfile(info, io.BytesIO(data))
        return tmp_path / name

    return write


@pytest.mark.parametrize("prefix", ["", "./", "sa_000020/"])
def test_photos_and_masks_are_read_out_of_the_tar(tar: Callable[..., Path], prefix: str) -> None:
    path = tar(files(12, 3), prefix=prefix)
    data = open_data(path)
    assert isinstance(data, Sa1b) and isinstance(data, Dataset) and data.has_masks and data.name == "sa_000020" and data.skipped == []
    assert [s.id for s in data] == ["sa_12.jpg", "sa_3.jpg"]
    for _ in range(2):  # at random, more than once
        sample = data[1]
        assert sample.image.shape == (HEIGHT, WIDTH, 3) and abs(int(sample.image[0, 0, 0]) - 30) < 8
        assert sample.masks is not None and np.array_equal(sample.masks, np.stack([mask(0), mask(1)]))
    first = data.annotations(0)[0]
    assert first["point_coords"] == [[7.0, 3.0]] and first["bbox"] == [3.0, 0.0, 16.0, 5.0]
    assert sorted(p.name for p in path.parent.iterdir()) == ["sa_000020.tar"]  # nothing extracted


def test_a_folder_of_tars_is_one_dataset(tar: Callable[..., Path]) -> None:
    tar(files(1, 2), name="tars/sa_000000.tar")
    folder = tar(files(3, 2), name="tars/sa_000001.tar").parent
    data = open_data(folder)
    assert isinstance(data, Sa1b) and [s.id for s in data] == ["sa_1.jpg", "sa_2.jpg", "sa_3.jpg"] and data.name == "tars"
    assert len(data.skipped) == 2 and "another of this name" in data.skipped[0]


def test_an_extracted_folder_is_the_same(tar: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for name, content in files(1, 2).items():
        (tmp_path / "out" / name).write_bytes(content)
    out, packed = open_data(tmp_path / "out"), open_data(tar(files(1, 2)))
    assert isinstance(out, Sa1b)
    for a, b in zip(out, packed, strict=True):
        assert a.id == b.id and np.array_equal(a.image, b.image) and a.masks is not None and b.masks is not None and np.array_equal(a.masks, b.masks)
    assert isinstance(open_data(tmp_path, split="out"), Sa1b)


def test_other_folders_with_json_stay_folders_of_photos(make_photos: Callable[..., Path]) -> None:
    folder = make_photos(2)
    (folder / "photo0.json").write_text('{"taken": "yesterday"}')
    Image.new("RGB", (9, 9)).save(folder / "other.jpg")
    (folder / "other.json").write_text('{"taken": "yesterday"}')
    assert not open_data(folder).has_masks and len(open_data(folder)) == 3


def test_photos_without_masks_and_a_limit(tar: Callable[..., Path]) -> None:
    members = files(1, 2, 3) | {"sa_9.jpg": photo(9)}
    path = tar(members)
    unread = open_data(path, masks=False)
    assert not unread.has_masks and len(unread) == 4 and unread[3].masks is None and unread.fingerprint() != open_data(path).fingerprint()
    with pytest.raises(UsageError, match="no annotations"):
        unread.annotations(3)  # type: ignore[attr-defined]
    few = open_data(path, limit=2)
    assert isinstance(few, Sa1b) and [s.id for s in few] == ["sa_1.jpg", "sa_2.jpg"] and few.fingerprint() == open_data(path, limit=2).fingerprint()
    assert len(Subset(few, [1])) == 1


DAMAGE = {
    "sa_2.jpg": b"\xff\xd8 no photo", "sa_3.json": b'{"image": ', "sa_4.json": b'{"other": 1}', "sa_5.jpg": photo(5)[:200],
    "sa_6.json": notes(6).replace(b"[24, 36]", b"[24, 37]", 1),
}


@pytest.mark.parametrize("fully", [True, False])
def test_damaged_members_are_skipped_and_named(tar: Callable[..., Path], fully: bool, monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "READ_FULLY", 2000 if fully else 0)
    members = files(1, 2, 3, 4, 5, 6, 7) | DAMAGE | {"sa_8.json": notes(8), "sa_9.jpg": photo(9), "readme.txt": b"hello"}
    data = open_data(tar(members))
    named = {s.split(":")[0] for s in data.skipped}
    # the ends of a file say nothing about a json of another kind, but what is truncated is found
    expected = {"sa_8.json", "sa_9.jpg", "sa_2.jpg", "sa_3.json", "sa_5.jpg"} | ({"sa_4.json", "sa_6.json"} if fully else set())
    assert named == expected and len(data) == (2 if fully else 4) and data[0].masks is not None
    assert "sa_2.jpg" in capsys.readouterr().err
    if not fully:
        with pytest.raises(EdgekdError, match=r"sa_4\.json"):
            data[1]
        with pytest.raises(EdgekdError, match=r"sa_6\.json"):
            data[2]


def test_a_truncated_tar_keeps_what_is_whole(tar: Callable[..., Path]) -> None:
    path = tar(files(1, 2))
    whole = path.read_bytes()
    cut = whole.rindex(b'{"image"') + 100
    path.write_bytes(whole[:cut])
    data = open_data(path)
    assert [s.id for s in data] == ["sa_1.jpg"] and any("sa_2.json: the tar ends within it" in s for s in data.skipped)


def test_a_damaged_header_is_stepped_over(tar: Callable[..., Path]) -> None:
    path = tar(files(1, 2, 3))
    content = bytearray(path.read_bytes())
    at = next(a for a in range(0, len(content), 512) if content[a:a + 8] == b"sa_2.jpg")
    content[at:at + 512] = b"\x07" * 512
    path.write_bytes(content)
    data = open_data(path)
    assert [s.id for s in data] == ["sa_1.jpg", "sa_3.jpg"]
    assert any("damaged" in s for s in data.skipped) and any(s.startswith("sa_2.json: has no") for s in data.skipped)


def test_a_mask_of_another_size_than_the_photo(tar: Callable[..., Path]) -> None:
    image = {"image_id": 1, "width": WIDTH + 1, "height": HEIGHT, "file_name": "sa_1.jpg"}
    data = open_data(tar({"sa_1.jpg": photo(1), "sa_1.json": notes(1, count=0, image=image)}))
    with pytest.raises(EdgekdError, match=r"its json says 37 x 24[\s\S]*sa_1"):
        data[0]


@pytest.mark.parametrize("content", [{"readme.txt": b"x"}, {"sa_1.jpg": b"x"}, {}], ids=["other files", "a photo alone", "empty"])
def test_a_tar_without_pairs_is_refused(tar: Callable[..., Path], content: dict[str, bytes]) -> None:
    with pytest.raises(UsageError, match=r"no pair|not a tar"):
        open_data(tar(content))


def test_what_is_no_tar_is_refused(tar: Callable[..., Path], tmp_path: Path) -> None:
    for content in (b"", b"<!doctype html><html>404</html>", bytes(range(256)) * 9000):
        (tmp_path / "x.tar").write_bytes(content)
        with pytest.raises(UsageError, match="not a tar"):
            open_data(tmp_path / "x.tar")
    with pytest.raises(UsageError, match="compressed"):
        open_data(tar(files(1), name="y.tar", mode="w:gz"))
    with pytest.raises(UsageError, match=r"nor a tar[\s\S]*not compressed"):
        open_data(tar(files(1), name="y.tar.gz", mode="w:gz"))
    broken = {k: v[:40] for k, v in files(1).items()}
    with pytest.raises(UsageError, match="none of the 1 photos"):
        open_data(tar(broken, name="z.tar"))


def test_fingerprint_follows_the_tar(tar: Callable[..., Path]) -> None:
    path = tar(files(1, 2))
    before = open_data(path).fingerprint()
    assert open_data(path).fingerprint() == before
    tar(files(1, 2, 3))
    assert open_data(path).fingerprint() != before and open_data(path, limit=2).fingerprint() != before


def test_label_map__is_what_painting_the_masks_gives(tmp_path: Path) -> None:
    from edgekd.data.sa1b import run_edges, with_labels, with_masks
    from edgekd.distillation.batches import label_map
    from edgekd.protocols import Sample

    rng = np.random.default_rng(0)
    height, width = 90, 130
    file = io.BytesIO()
    Image.new("RGB", (width, height), (9, 9, 9)).save(file, "JPEG")
    shapes = [rng.random((height, width)) < share for share in (0.0, 0.5, 0.02, 1.0)]
    for _ in range(12):
        y, x, h, w = rng.integers(0, height), rng.integers(0, width), rng.integers(1, 60), rng.integers(1, 90)
        shapes.append(np.zeros((height, width), bool))
        shapes[-1][y:y + h, x:x + w] = True
    runs = [pycoco.encode(np.asfortranarray(m.astype(np.uint8))) for m in shapes]
    for run, shape in zip(runs, shapes, strict=True):
        starts, ends = run_edges(run["counts"])
        flat = np.zeros(height * width, bool)
        for a, b in zip(starts, ends, strict=True):
            flat[a:b] = True
        assert np.array_equal(flat.reshape(width, height).T, shape)
    told = {"image": {"height": height, "width": width}, "annotations": [{"segmentation": {"size": r["size"], "counts": r["counts"].decode()}} for r in runs]}
    image, labels = with_labels("a.jpg", file.getvalue(), told)
    seen, masks = with_masks("a.jpg", file.getvalue(), told)
    assert labels.dtype == np.int16 and np.array_equal(labels, label_map(Sample("a", seen, masks))) and np.array_equal(image, seen)
    nothing = with_labels("a.jpg", file.getvalue(), told | {"annotations": told["annotations"][:1]})[1]
    assert (nothing == 1).all(), "as of a photo without masks"


def test_label_map__of_a_dataset_and_its_part(tar: Callable[..., Path]) -> None:
    from edgekd.distillation.batches import label_map, labelled

    data = open_data(tar(files(12, 3, 5)))
    part = Subset(data, [2, 0])
    for one, index in ((data, 1), (part, 0)):
        image, labels = labelled(one, index)
        assert np.array_equal(labels, label_map(one[index])) and np.array_equal(image, one[index].image) and labels.max() == 2


def test_label_map__damaged_counts_are_an_error_with_a_name(tar: Callable[..., Path]) -> None:
    broken = json.loads(notes(1))
    broken["annotations"][0]["segmentation"]["counts"] = ""
    data = open_data(tar({"sa_1.jpg": photo(1), "sa_1.json": json.dumps(broken).encode()}))
    with pytest.raises(EdgekdError, match="run-length") as caught:
        data.label_map(0)  # type: ignore[attr-defined]
    assert "sa_1" in str(caught.value)
