"""Photos and masks. `open_data` takes whatever a user may call data: a folder, a COCO or LVIS json, tars (SA-1B, WebDataset), a pack,
procedural scenes."""
from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from edgekd import workspace
from edgekd.data.coco import Coco
from edgekd.data.folder import Folder
from edgekd.data.images import SUFFIXES, ImageError
from edgekd.data.pack import Pack, is_pack
from edgekd.data.sa1b import Sa1b, is_sa1b
from edgekd.data.webdataset import Shards, is_pattern, open_tars
from edgekd.errors import UsageError, closest, unknown
from edgekd.protocols import Dataset, Sample

__all__ = ["Coco", "Folder", "ImageError", "Pack", "Sa1b", "Shards", "Subset", "open_data"]

SCHEMES = ("scenes",)


class Subset:
    """Some items of a dataset, in the order given."""

    def __init__(self, dataset: Dataset, indices: Sequence[int], *, name: str | None = None) -> None:
        self.dataset, self.indices = dataset, list(indices)
        self.name = name or f"{dataset.name}[{len(self.indices)}]"
        self.skipped = dataset.skipped

    @property
    def has_masks(self) -> bool:
        return self.dataset.has_masks

    @property
    def has_classes(self) -> bool:
        return getattr(self.dataset, "has_classes", False)

    @property
    def class_names(self) -> list[str]:
        return getattr(self.dataset, "class_names", [])

    def classes_of(self, index: int) -> int | None:
        return self.dataset.classes_of(self.indices[index]) if self.has_classes else None  # type: ignore[attr-defined]

    @property
    def label_map(self) -> Callable[[int], tuple[np.ndarray, np.ndarray]] | None:
        """The dataset's own way to one map of all masks of a photo, where it has one."""
        found = getattr(self.dataset, "label_map", None)
        return None if found is None else lambda index: found(self.indices[index])

    @property
    def labels(self) -> str:
        return getattr(self.dataset, "labels", "ground truth")

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        return self.dataset[self.indices[index]]

    def __iter__(self) -> Iterator[Sample]:
        return (self.dataset[i] for i in self.indices)

    def fingerprint(self) -> str:
        return workspace.fingerprint(["subset", self.dataset.fingerprint(), self.indices])


def open_data(spec: str | Path, *, split: str | None = None, limit: int | None = None, masks: bool = True, images: str | Path | None = None) -> Dataset:
    """Open data by what the user wrote.

    `spec`: a folder of photos (or one photo), a COCO or LVIS json, SA-1B (a tar, a folder of tars or of extracted pairs), shards of
    WebDataset (a tar, a folder of tars, or a pattern: `shards/{000..009}.tar`), a data pack
    (a folder with `index.json`), or `scenes:seed=1,count=100`. `split`: of a pack, or a subfolder of a folder. `limit`: the first so many
    images only. `masks=False`: leave the labels unread. `images`: the folder with the images that a json names.

    Raises:
        UsageError: nothing there, nothing usable there, or an unknown scheme or split.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"a limit of {limit} images leaves nothing", hint="give 1 or more")
    dataset = _open(spec, split, limit, masks, images)
    if limit is not None and limit < len(dataset):
        return Subset(dataset, range(limit), name=f"{dataset.name}[:{limit}]")
    return dataset


def _open(spec: str | Path, split: str | None, limit: int | None, masks: bool, images: str | Path | None) -> Dataset:
    path = Path(spec).expanduser()
    if images is not None and path.suffix.lower() != ".json":
        raise UsageError("a folder of images is for a COCO or LVIS json only", where=spec, hint="leave --images out")
    scheme = re.match(r"([A-Za-z][\w+-]+):(?!\\)|^(scenes)$", str(spec))
    if scheme and not path.exists():
        name = scheme.group(1) or scheme.group(2)
        if name not in SCHEMES:
            raise unknown("data scheme", name, SCHEMES)
        _refuse_split(split, str(spec))
        from edgekd.data.scenes import Scenes

        return Scenes.parse(str(spec))
    if is_pattern(path):
        _refuse_split(split, str(spec))
        return Shards(path, masks=masks, limit=limit)
    if not path.exists():
        raise _missing(path)
    if path.is_dir():
        if is_pack(path):
            return Pack(path, split=split, masks=masks)
        folder = _subfolder(path, split)
        if not is_sa1b(folder):
            return Folder(folder, limit=limit)
        return open_tars(folder, masks=masks, limit=limit) if any(folder.glob("*.tar")) else Sa1b(folder, masks=masks, limit=limit)
    _refuse_split(split, str(spec))
    if path.suffix.lower() == ".json":
        return Coco(path, masks=masks, images=images, limit=limit)
    if path.suffix.lower() == ".tar":
        return open_tars(path, masks=masks, limit=limit)
    if path.suffix.lower() in SUFFIXES:
        return Folder(path, limit=limit)
    raise UsageError("this file is neither an image nor a COCO json nor a tar", where=path,
                     hint="give a folder of images, a COCO or LVIS .json, a .tar (not compressed) or a data pack")


def _refuse_split(split: str | None, spec: str) -> None:
    if split is not None:
        raise UsageError(f"this data has no split '{split}'", where=spec, hint="leave --split out")


def _subfolder(path: Path, split: str | None) -> Path:
    if split is None:
        return path
    if not (path / split).is_dir():
        raise unknown("split", split, [p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")])
    return path / split


def _missing(path: Path) -> UsageError:
    """The error for a path that is not there, with the nearest name that is."""
    near = closest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else None
    return UsageError(f"there is no data at {path}", hint=f"did you mean '{path.parent / near}'?" if near else
                      "give a folder of images, a COCO or LVIS .json, an SA-1B .tar, a data pack, or scenes:seed=1,count=100")
