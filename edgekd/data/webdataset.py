"""Shards of photos as WebDataset writes them (`000017.jpg`, `000017.cls`, ... in tars), read in place, at random, without extracting anything."""
from __future__ import annotations

import glob
import json
import re
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate, islice, product
from pathlib import Path
from typing import Any

import numpy as np

from edgekd import workspace
from edgekd.data import tar_index
from edgekd.data.checks import file_stamp, warn_skipped
from edgekd.data.images import read_image
from edgekd.data.sa1b import Sa1b, Span, members, parse_notes, with_labels, with_masks
from edgekd.errors import EdgekdError, UsageError
from edgekd.protocols import Sample

PATTERN = re.compile(r"[{*?\[]")
BRACES = re.compile(r"\{([^{}]*)\}")
LOOKED_AT = 16
"""Members of a tar that are looked at to tell SA-1B from others."""


class Shards:
    """The photos of tars, in the order of the tars and of their bytes.

    The files of a sample share the part of their name before the first dot. A photo is `jpg`, `jpeg`, `png` or `webp`; beside it `cls` is
    its class, a number; `json` its masks where it is SA-1B's; `txt` a text. Other files are left alone. Damaged photos are skipped and named.

    Args:
        pattern: a tar, a folder with tars, or a pattern: `shards/{000..009}.tar`, `shards/*.tar`.
        masks: False: leave masks unread.
        limit: stop after so many usable photos; tars behind them are not looked at.

    Raises:
        UsageError: nothing usable there.
    """

    def __init__(self, pattern: str | Path, *, masks: bool = True, limit: int | None = None) -> None:
        self.tars = expand(pattern)
        self.name = Path(pattern).stem if len(self.tars) == 1 else Path(pattern).name
        if limit is None:
            tar_index.prepare(self.tars)
        self.skipped: list[str] = []
        self.has_masks = False
        self._indices: list[tar_index.TarIndex] = []
        self._rows: list[np.ndarray] = []
        for index in tar_index.open_indices(self.tars):
            noted = index.rows["notes"][:, 1] >= 0
            if not any(map(len, self._rows)):  # the first photos say whether these shards have masks
                self.has_masks = masks and bool(noted.any())
            self.skipped += index.skipped
            if self.has_masks:
                self.skipped += [f"{index.key(int(i))}: has no annotations" for i in np.flatnonzero(~noted)]
            rows = np.flatnonzero(noted) if self.has_masks else np.arange(len(index))
            self._indices.append(index)
            self._rows.append(rows if limit is None else rows[: limit - sum(map(len, self._rows))])
            if limit is not None and sum(map(len, self._rows)) == limit:
                break
        self._ends = list(accumulate(len(r) for r in self._rows))
        warn_skipped(self.name, self.skipped)
        if not len(self):
            said = f": {self.skipped[0]}" if self.skipped else ""
            raise UsageError(f"there is no photo that can be read in {len(self.tars)} tar{'s' * (len(self.tars) > 1)}{said}", where=pattern,
                             hint=f"a sample's files share a name, and one of them is a {', '.join(tar_index.PHOTOS)}")
        labels = [int(i.rows["label"].max()) for i in self._indices if len(i)]
        self.class_names = [str(n) for n in range(max(labels) + 1)]

    @property
    def has_classes(self) -> bool:
        """Whether any photo has a class."""
        return bool(self.class_names)

    def classes_of(self, index: int) -> int | None:
        """The class of a photo."""
        found, row = self._at(index)
        label = int(found.rows[row]["label"])
        return None if label == tar_index.NO_CLASS else label

    def text_of(self, index: int) -> str | None:
        """What is in the `txt` beside a photo."""
        found, row = self._at(index)
        span = found.beside(row, "text")
        return None if span is None else span.read().decode("utf-8", "replace")

    def annotations(self, index: int) -> list[dict[str, Any]]:
        """SA-1B's annotations of a photo, as its json has them."""
        found, row = self._at(index)
        span = found.beside(row, "notes")
        return [] if span is None else list(json.loads(span.read())["annotations"])

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Sample:
        name, data, notes = self._bytes(index)
        if not self.has_masks:
            return Sample(name, read_image(name, data=data), label=self.classes_of(index))
        return Sample(name, *with_masks(name, data, parse_notes(notes, name)), label=self.classes_of(index))

    def label_map(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """A photo and one map of its masks (`sa1b.with_labels`), which takes a fraction of the time of the masks."""
        name, data, notes = self._bytes(index)
        if not self.has_masks:
            image = read_image(name, data=data)
            return image, np.ones(image.shape[:2], np.int16)
        return with_labels(name, data, parse_notes(notes, name))

    def _bytes(self, index: int) -> tuple[str, bytes, Span]:
        """Name and content of a photo, and where its annotations are."""
        found, row = self._at(index)
        suffix, photo = found.photo(row)
        name = f"{found.key(row)}.{suffix}" if len(self.tars) == 1 else f"{found.tar.stem}/{found.key(row)}.{suffix}"
        return name, photo.read(), found.beside(row, "notes") or Span(found.tar, 0, 0)

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def fingerprint(self) -> str:
        """Names, sizes and times of the tars, and how many photos of each."""
        return workspace.fingerprint(["shards", self.has_masks, [[i.tar.name, *file_stamp(i.tar), len(r)] for i, r in zip(self._indices, self._rows, strict=True)]])

    def _at(self, index: int) -> tuple[tar_index.TarIndex, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        shard = bisect_right(self._ends, index)
        return self._indices[shard], int(self._rows[shard][index - (self._ends[shard - 1] if shard else 0)])


def open_tars(path: str | Path, *, masks: bool = True, limit: int | None = None) -> Sa1b | Shards:
    """A tar or a folder of tars: SA-1B where they hold it, else shards."""
    first = Path(path) if Path(path).is_file() else min(Path(path).glob("*.tar"), default=None)
    return Sa1b(path, masks=masks, limit=limit) if first is None or _is_sa1b(first) else Shards(path, masks=masks, limit=limit)


def _is_sa1b(tar: Path) -> bool:
    """Whether a tar's first files are called as SA-1B's are. Of one that shows no photo, SA-1B's reader says what is wrong."""
    try:
        seen = [Path(name).name.lower() for name, _ in islice(members(tar, []), LOOKED_AT)]
    except EdgekdError:
        return True
    if not any(name.endswith(tuple(f".{kind}" for kind in tar_index.PHOTOS)) for name in seen):
        return True
    return any(re.fullmatch(r"sa_\d+\.(jpg|json)", name) for name in seen)


def is_pattern(spec: str | Path) -> bool:
    """Whether this names tars by a pattern."""
    return bool(PATTERN.search(str(spec))) and str(spec).lower().endswith(".tar") and not Path(spec).exists()


def expand(pattern: str | Path) -> list[Path]:
    """The tars of a pattern in order, with braces and wildcards filled in.

    Raises:
        UsageError: none, or a named one is not there.
    """
    path = Path(pattern).expanduser()
    if path.is_dir():
        found = sorted(path.glob("*.tar"))
    elif path.is_file():
        found = [path]
    else:
        found = []
        for name in _braces(str(path)):
            here = sorted(map(Path, glob.glob(name))) if re.search(r"[*?\[]", name) else [Path(name)]
            if not here or not here[0].is_file():
                raise UsageError(f"there is no tar at {name}", where=pattern, hint="a pattern names tars that are there: shards/{000..009}.tar, shards/*.tar")
            found += here
    if not found:
        raise UsageError("there is no tar in this folder", where=pattern)
    return list(dict.fromkeys(found))


def _braces(text: str) -> list[str]:
    """`{000..002}` and `{a,b}` filled in, in every combination."""
    choices = []
    for inner in BRACES.findall(text):
        numbers = re.fullmatch(r"(\d+)\.\.(\d+)", inner)
        if numbers is None:
            choices.append(inner.split(","))
            continue
        first, last = numbers.groups()
        if int(last) < int(first):
            raise UsageError(f"the range {{{inner}}} holds nothing", where=text, hint="{000..009} counts upwards")
        choices.append([str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)])
    plain = BRACES.sub("\0", text)
    return ["".join(part + mark for part, mark in zip(plain.split("\0"), (*chosen, ""), strict=True)) for chosen in product(*choices)]
