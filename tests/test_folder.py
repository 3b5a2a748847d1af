"""Folders of photos, and `open_data`, which decides what a user's words for data mean."""
from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgekd.data import Folder, Subset, open_data
from edgekd.errors import UsageError
from edgekd.protocols import Dataset


def photo(path: Path, colour: tuple[int, int, int] = (200, 10, 10), size: tuple[int, int] = (32, 24)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    for name in ("b.png", "a.jpg", "sub/c.webp", "sub/deeper/d.JPG", ".hidden.png", ".git/e.png", "__notes.txt"):
        if name.endswith("txt"):
            (root / name).write_text("not an image")
        else:
            photo(root / name)
    return root


def ids(dataset: Dataset) -> list[str]:
    return [s.id for s in dataset]


def test_recursive_sorted_hidden_left_out(photos: Path) -> None:
    data = Folder(photos)
    assert ids(data) == ["a.jpg", "b.png", "sub/c.webp", "sub/deeper/d.JPG"]
    assert len(data) == 4 and data.name == "photos" and not data.has_masks and data.skipped == []
    assert isinstance(data, Dataset)
    sample = data[1]
    assert sample.id == "b.png" and sample.image.shape == (24, 32, 3) and sample.masks is None
    with pytest.raises(IndexError):
        data[4]


def test_corrupt_photos_are_skipped_named_and_warned_about_once(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff" + os.urandom(500))
    (photos / "sub" / "empty.png").touch()
    whole = (photos / "a.jpg").read_bytes()
    (photos / "cut.jpg").write_bytes(whole[: len(whole) - 120])
    data = Folder(photos)
    assert ids(data) == ["a.jpg", "b.png", "sub/c.webp", "sub/deeper/d.JPG"]
    assert [s.split(":")[0] for s in data.skipped] == ["broken.jpg", "cut.jpg", "sub/empty.png"]
    err = capsys.readouterr().err
    assert err.count("warning") == 1 and "3 images skipped" in err and "broken.jpg" in err
    _ = list(data)
    assert capsys.readouterr().err == ""


def test_many_corrupt_photos_make_one_short_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo(tmp_path / "good.png")
    for i in range(25):
        (tmp_path / f"bad{i:02d}.jpg").write_bytes(b"x")
    assert len(Folder(tmp_path).skipped) == 25
    err = capsys.readouterr().err
    assert "and 15 more" in err and err.count("\n") == 1


def test_nothing_but_corrupt_photos(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"none of the 1 image files.*a\.jpg"):
        Folder(tmp_path)


def test_large_photos_are_read_at_max_side(tmp_path: Path) -> None:
    photo(tmp_path / "large.jpg", size=(3000, 1500))
    photo(tmp_path / "small.jpg", size=(30, 15))
    assert [s.image.shape for s in Folder(tmp_path)] == [(512, 1024, 3), (15, 30, 3)]
    assert [s.image.shape for s in Folder(tmp_path, max_side=100)] == [(50, 100, 3), (15, 30, 3)]


def test_fingerprint_follows_content_names_and_size(photos: Path) -> None:
    first = Folder(photos).fingerprint()
    assert Folder(photos).fingerprint() == first
    assert Folder(photos, max_side=64).fingerprint() != first
    photo(photos / "b.png", (0, 0, 255), (31, 24))
    second = Folder(photos).fingerprint()
    assert second != first
    (photos / "b.png").rename(photos / "z.png")
    assert Folder(photos).fingerprint() not in (first, second)


def test_linked_folders_are_followed_and_circles_end(photos: Path, tmp_path: Path) -> None:
    photo(tmp_path / "elsewhere" / "x.png")
    (photos / "link").symlink_to(tmp_path / "elsewhere")
    (photos / "sub" / "circle").symlink_to(photos)
    assert ids(Folder(photos)) == ["a.jpg", "b.png", "link/x.png", "sub/c.webp", "sub/deeper/d.JPG"]


def test_limit_checks_only_what_it_needs(tmp_path: Path) -> None:
    for i in range(70):
        photo(tmp_path / f"{i:03d}.png", size=(2, 2))
    (tmp_path / "000.png").write_bytes(b"x")
    (tmp_path / "069.png").write_bytes(b"x")
    data = open_data(tmp_path, limit=3)
    assert ids(data) == ["001.png", "002.png", "003.png"] and len(data.skipped) == 1


def test_open_data_opens_folder_and_single_photo(photos: Path) -> None:
    assert len(open_data(str(photos))) == 4
    assert ids(open_data(photos / "a.jpg")) == ["a.jpg"]
    assert len(open_data(photos, split="sub")) == 2


def test_limit_gives_the_first_images(photos: Path) -> None:
    assert ids(open_data(photos, limit=2)) == ["a.jpg", "b.png"]
    assert len(open_data(photos, limit=99)) == 4
    scenes = open_data("scenes:seed=1,count=5", limit=2)
    assert len(scenes) == 2 and scenes.has_masks and "[:2]" in scenes.name
    with pytest.raises(UsageError, match="limit"):
        open_data(photos, limit=0)


@pytest.mark.parametrize("missing", ["/no/such/folder", "nowhere/at/all"])
def test_missing_path_is_named(missing: str) -> None:
    with pytest.raises(UsageError, match=missing) as e:
        open_data(missing)
    assert e.value.exit_code == 2 and "hint:" in str(e.value)


def test_missing_path_suggests_the_near_name(photos: Path) -> None:
    with pytest.raises(UsageError, match=r"did you mean '.*photos'"):
        open_data(photos.parent / "fotos")


def test_empty_folder_says_image(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="image"):
        open_data(tmp_path)
    (tmp_path / "readme.txt").write_text("x")
    with pytest.raises(UsageError, match="image"):
        open_data(tmp_path)


def test_unknown_scheme_split_and_kind_of_file(photos: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown data scheme 'scene'[\s\S]*did you mean 'scenes'"):
        open_data("scene:seed=1")
    with pytest.raises(UsageError, match=r"unknown split 'subb'[\s\S]*did you mean 'sub'"):
        open_data(photos, split="subb")
    with pytest.raises(UsageError, match="no split 'val'"):
        open_data("scenes:seed=1,count=2", split="val")
    with pytest.raises(UsageError, match="neither an image nor a COCO json"):
        open_data(photos / "__notes.txt")


def test_scenes_by_spec() -> None:
    data = open_data("scenes:seed=3,count=2")
    assert len(data) == 2 and data.has_masks
    sample = data[0]
    assert sample.masks is not None and sample.masks.shape[1:] == sample.image.shape[:2]
    assert np.array_equal(sample.image, open_data("scenes:seed=3,count=2")[0].image)


def test_subset(photos: Path) -> None:
    whole = Folder(photos)
    part = Subset(whole, [3, 0])
    assert ids(part) == ["sub/deeper/d.JPG", "a.jpg"] and len(part) == 2 and part[1].id == "a.jpg"
    assert isinstance(part, Dataset) and not part.has_masks
    assert part.fingerprint() != whole.fingerprint() and part.fingerprint() != Subset(whole, [0, 3]).fingerprint()
    with pytest.raises(IndexError):
        part[2]
