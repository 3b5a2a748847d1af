"""Shards read in place: patterns, classes, masks, what is damaged, an index that is made once, and an order that keeps neighbours together."""
from __future__ import annotations

import io
import json
import os
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as pycoco

from edgekd.data import Sa1b, Shards, open_data, tar_index
from edgekd.data.order import windowed
from edgekd.data.webdataset import expand
from edgekd.errors import UsageError
from edgekd.protocols import Dataset

HEIGHT, WIDTH = 24, 36


def photo(value: int, kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (WIDTH, HEIGHT), (value, 90, 200)).save(file, kind)
    return file.getvalue()


def notes() -> bytes:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[4:10, 5:20] = True
    run = pycoco.encode(np.asfortranarray(mask.astype(np.uint8)))
    annotation = {"id": 1, "segmentation": {"size": run["size"], "counts": run["counts"].decode()}, "point_coords": [[7.0, 5.0]]}
    return json.dumps({"image": {"image_id": 1, "width": WIDTH, "height": HEIGHT, "file_name": "x.jpg"}, "annotations": [annotation]}).encode()


def write(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as t:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            t.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(autouse=True)
def own_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    return tmp_path / "user-cache/edgekd/tars"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three tars of two photos, the value of each its number times ten, and a class."""
    for t in range(3):
        write(tmp_path / f"shards/{t:03d}.tar", {f"{t}{i}.{end}": data for i in range(2) for end, data in
                                                (("jpg", photo(10 * (2 * t + i))), ("cls", str(2 * t + i).encode()), ("txt", b"a photo"))})
    return tmp_path / "shards"


def values(data: Dataset) -> list[int]:
    return [round(int(s.image[0, 0, 0]) / 10) for s in data]


@pytest.mark.parametrize(("pattern", "wanted"), [("*.tar", [0, 1, 2, 3, 4, 5]), ("{000..001}.tar", [0, 1, 2, 3]), ("{002,000}.tar", [4, 5, 0, 1]),
                                                 ("00{1..2}.tar", [2, 3, 4, 5]), ("001.tar", [2, 3]), ("", [0, 1, 2, 3, 4, 5])])
def test_photos_are_read_out_of_the_tars(shards: Path, pattern: str, wanted: list[int]) -> None:
    data = open_data(f"{shards}/{pattern}" if pattern else shards)
    assert isinstance(data, Shards) and isinstance(data, Dataset) and not data.has_masks and data.skipped == []
    assert values(data) == wanted
    assert data.has_classes and [data.classes_of(i) for i in range(len(data))] == wanted and data[0].label == wanted[0]
    assert data.text_of(0) == "a photo" and len(data.class_names) == max(wanted) + 1
    assert sorted(p.name for p in shards.iterdir()) == ["000.tar", "001.tar", "002.tar"], "nothing extracted"
    assert len({s.id for s in data}) == len(data)


def test_kinds__png_and_webp_and_names_with_folders(tmp_path: Path) -> None:
    data = open_data(write(tmp_path / "a.tar", {"./x/1.png": photo(10, "PNG"), "x/2.webp": photo(20, "WEBP"), "x/2.depth.png": photo(99, "PNG"),
                                                "x/3.jpeg": photo(30), "y/3.JPG": photo(40), "readme.md": b"hello", "__index__": b""}))
    assert [s.id for s in data] == ["x/1.png", "x/2.webp", "x/3.jpeg", "y/3.jpg"]
    assert isinstance(data, Shards) and not data.has_classes and data.classes_of(0) is None


def test_masks__of_sa1b_s_notes_under_any_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", {"1.jpg": photo(10), "1.json": notes(), "2.jpg": photo(20), "2.json": notes()[:-30], "3.json": b'{"width": 3}', "3.jpg": photo(30)})
    data = open_data(path)
    assert isinstance(data, Shards) and data.has_masks and [s.id for s in data] == ["1.jpg"]
    assert data.skipped == ["2: has no annotations", "3: has no annotations"]
    assert data[0].masks is not None and data[0].masks.sum() == 6 * 15 and data.annotations(0)[0]["point_coords"] == [[7.0, 5.0]]
    plain = open_data(path, masks=False)
    assert not plain.has_masks and len(plain) == 3 and plain[0].masks is None and plain.fingerprint() != data.fingerprint()


def test_sa1b_s_own_tars_stay_sa1b_s(tmp_path: Path) -> None:
    path = write(tmp_path / "sa/sa_000020.tar", {"sa_1.jpg": photo(10), "sa_1.json": notes()})
    assert isinstance(open_data(path), Sa1b) and isinstance(open_data(path.parent), Sa1b)
    through = open_data(tmp_path / "sa/*.tar")
    assert isinstance(through, Shards) and through.has_masks and np.array_equal(through[0].masks, open_data(path)[0].masks)  # type: ignore[arg-type]


def test_damage__is_skipped_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = photo(10)
    path = write(tmp_path / "a.tar", {"1.jpg": whole, "2.jpg": whole[: len(whole) // 2], "3.jpg": b"", "4.cls": b"1", "5.jpg": photo(50), "5.cls": b"cat",
                                      "6.jpg": photo(60), "6.cls": b"2\n"})
    data = open_data(path)
    assert values(data) == [1, 5, 6] and [data.classes_of(i) for i in range(3)] == [None, None, 2]  # type: ignore[attr-defined]
    assert sorted(s.split(":")[0] for s in data.skipped) == ["2.jpg", "3.jpg", "4.cls", "5.cls"]
    assert "2.jpg" in capsys.readouterr().err
    cut = tmp_path / "cut.tar"
    cut.write_bytes(path.read_bytes()[:600])
    with pytest.raises(UsageError, match="no photo that can be read"):
        Shards(cut)


@pytest.mark.parametrize(("pattern", "said"), [("{000..004}.tar", "no tar at .*003.tar"), ("x*.tar", "no tar at"), ("{004..002}.tar", "holds nothing")])
def test_a_pattern_without_tars_is_refused(shards: Path, pattern: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        open_data(shards / pattern)


def test_expand__every_combination_in_order() -> None:
    from edgekd.data.webdataset import _braces

    assert _braces("a{0..1}-{x,y}.tar") == ["a0-x.tar", "a0-y.tar", "a1-x.tar", "a1-y.tar"] and _braces("plain.tar") == ["plain.tar"]


def test_expand__a_tar_named_twice_is_read_once(shards: Path) -> None:
    assert [p.name for p in expand(shards / "{000,000,001}.tar")] == ["000.tar", "001.tar"]


def test_index__is_made_once_and_again_for_a_tar_that_changed(shards: Path, own_index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scanned: list[str] = []
    scan = tar_index.scan
    monkeypatch.setattr(tar_index, "scan", lambda tar: scanned.append(tar.name) or scan(tar))
    first = open_data(shards / "*.tar")
    again = open_data(shards / "*.tar")
    assert scanned == ["000.tar", "001.tar", "002.tar"] and values(again) == values(first) and again.fingerprint() == first.fingerprint()
    assert len(list(own_index.iterdir())) == 6, "two files a tar, no lock left"
    write(shards / "001.tar", {"new.jpg": photo(70)})
    changed = open_data(shards / "*.tar")
    assert scanned[3:] == ["001.tar"] and values(changed) == [0, 1, 7, 4, 5] and changed.fingerprint() != first.fingerprint()


def test_index__a_damaged_one_is_made_again_and_a_folder_without_room_is_no_obstacle(shards: Path, own_index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_data(shards / "*.tar")
    for file in own_index.glob("*.npy"):
        file.write_bytes(file.read_bytes()[:-9])
    assert values(open_data(shards / "*.tar")) == list(range(6))
    (shards / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(shards / "file"))
    assert values(open_data(shards / "*.tar")) == list(range(6))


def test_index__a_limit_looks_at_the_tars_it_needs(shards: Path, own_index: Path) -> None:
    data = open_data(shards / "*.tar", limit=3)
    assert values(data) == [0, 1, 2] and len(list(own_index.glob("*.npy"))) == 2


def test_index__is_made_by_one_of_several_at_a_time(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scanned: list[str] = []
    scan, gate = tar_index.scan, threading.Barrier(2)
    monkeypatch.setattr(tar_index, "scan", lambda tar: scanned.append(tar.name) or scan(tar))
    found: list[list[int]] = []

    def work() -> None:
        gate.wait()
        found.append(values(open_data(shards / "*.tar")))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert found == [list(range(6))] * 2 and sorted(scanned) == ["000.tar", "001.tar", "002.tar"]


def test_reading__opens_no_more_than_it_is_asked(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_data(shards / "*.tar")
    opened: list[str] = []
    real = open

    def watched(file: object, *rest: object, **named: object) -> object:
        if str(file).endswith(".tar"):
            opened.append(os.path.basename(str(file)))
        return real(file, *rest, **named)  # type: ignore[call-overload]

    monkeypatch.setattr("builtins.open", watched)
    assert values([data[4], data[0]]) == [4, 0] and opened == ["002.tar", "000.tar"]  # type: ignore[arg-type]


def test_windowed__every_photo_once_and_neighbours_together() -> None:
    rng: Callable[[int], np.random.Generator] = lambda seed: np.random.default_rng([seed, 1])
    for count in (1, 63, 64, 1000, 4097):
        order = windowed(count, 256, rng(0))
        assert sorted(order.tolist()) == list(range(count))
        assert order.tolist() == windowed(count, 256, rng(0)).tolist(), "a function of its seed: a run that goes on draws the same"
    order = windowed(6400, 256, rng(1))
    for at in range(0, 6400, 256):
        assert len({i // 64 for i in order[at : at + 256]}) == 4, "a window is whole runs of 64"
    assert order[:256].tolist() != sorted(order[:256].tolist()) and order.tolist() != windowed(6400, 256, rng(2)).tolist()
