"""Where everything lies in a tar, found once: one pass through the file that also opens every photo, kept as an array that is mapped, not read.

    ~/.cache/edgekd/tars/<fingerprint>.npy    one row a photo: its key, and start and size of each of its files in the tar
    ~/.cache/edgekd/tars/<fingerprint>.json   what cannot be used, by name

The fingerprint is of the tar's path, size and time. Both files are written whole or not at all; of several processes one makes them, and
where the folder cannot be written the index lives as long as the process. A row takes about 150 bytes.
"""
from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from edgekd import workspace
from edgekd.data.checks import CHECK_SIDE, file_stamp
from edgekd.data.images import read_image
from edgekd.data.sa1b import Span, check_notes, members, parse_notes
from edgekd.errors import EdgekdError

PHOTOS = ("jpg", "jpeg", "png", "webp")
VERSION = 1
KEY_BYTES = 64
"""Longer keys make a wider column of this tar's index."""
AT_ONCE = 64
NO_CLASS = -1


class TarIndex:
    """The photos of one tar in the order of their bytes: `rows` (n,) and what was `skipped`."""

    def __init__(self, tar: Path, rows: np.ndarray, skipped: list[str]) -> None:
        self.tar, self.rows, self.skipped = tar, rows, skipped

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, row: int) -> str:
        """The sample's name in the tar, without suffix."""
        return bytes(self.rows[row]["key"]).decode("utf-8", "surrogateescape")

    def photo(self, row: int) -> tuple[str, Span]:
        """Suffix and place of a photo."""
        found = self.rows[row]
        return PHOTOS[found["kind"]], Span(self.tar, *map(int, found["photo"]))

    def beside(self, row: int, what: str) -> Span | None:
        """Where the `notes` (SA-1B's annotations) or the `text` of a photo are; None without."""
        start, size = map(int, self.rows[row][what])
        return None if size < 0 else Span(self.tar, start, size)


def folder() -> Path:
    """Where indices are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgekd" / "tars"


def open_indices(tars: Sequence[Path]) -> Iterator[TarIndex]:
    """The index of every tar in order, made where there is none. What another process is at work on is left to it."""
    for tar in tars:
        yield find(tar) or make(tar)


def prepare(tars: Iterable[Path]) -> None:
    """Make the indices that nobody has made or is making; those that are being made by others are not waited for."""
    for tar in tars:
        if find(tar) is None:
            with locked(tar, wait=False) as mine:
                if mine:
                    make(tar, hold=False)


def find(tar: Path) -> TarIndex | None:
    """The index of a tar as it is now, or None."""
    base = _base(tar)
    try:
        skipped = json.loads(base.with_suffix(".json").read_text())
        return TarIndex(tar, np.load(base.with_suffix(".npy"), mmap_mode="r"), skipped)
    except (OSError, ValueError):
        return None


def make(tar: Path, *, hold: bool = True) -> TarIndex:
    """Read a tar from end to end and keep its index.

    Raises:
        UsageError: not a tar, or a compressed one.
    """
    with locked(tar) if hold else contextlib.nullcontext():
        if (found := find(tar)) is not None:
            return found
        rows, skipped = scan(tar)
        base = _base(tar)
        try:
            workspace.write_json(base.with_suffix(".json"), skipped)
            with workspace.atomic_path(base.with_suffix(".npy")) as temp:
                np.save(temp, rows)
        except OSError:
            return TarIndex(tar, rows, skipped)
        return find(tar) or TarIndex(tar, rows, skipped)


def scan(tar: Path) -> tuple[np.ndarray, list[str]]:
    """The rows of a tar and what is wrong in it; every photo is decoded (JPEGs at 1/8) and every annotation parsed."""
    skipped: list[str] = []
    found: dict[str, dict[str, Span]] = {}
    for name, span in members(tar, skipped):
        base = os.path.basename(name)
        stem, _, suffix = base.partition(".")
        if stem and suffix.lower() in (*PHOTOS, "json", "cls", "txt"):
            found.setdefault(name[: len(name) - len(base)].removeprefix("./") + stem, {}).setdefault(suffix.lower(), span)
    lone = [k for k, files in found.items() if not any(kind in files for kind in PHOTOS)]
    skipped += [f"{k}.{next(iter(found.pop(k)))}: has no photo" for k in lone]
    rows: list[tuple[Any, ...]] = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        ordered = iter(sorted(found.items(), key=lambda item: min(s.start for s in item[1].values())))
        while block := list(islice(ordered, AT_ONCE)):
            for row, problems in pool.map(lambda item: _row(*item), block):
                skipped += problems
                rows += [row] if row else []
    width = max([KEY_BYTES, *(len(r[0]) for r in rows)])
    layout = [("key", f"S{width}"), ("kind", "i1"), ("photo", "<i8", 2), ("notes", "<i8", 2), ("text", "<i8", 2), ("label", "<i8")]
    return np.array(rows, dtype=layout), skipped


def _row(key: str, files: dict[str, Span]) -> tuple[tuple[Any, ...] | None, list[str]]:
    """A photo's row, or None when it cannot be read, and what is wrong with it or beside it."""
    kind = next(k for k in PHOTOS if k in files)
    try:
        read_image(f"{key}.{kind}", max_side=CHECK_SIDE, data=files[kind].read())
    except EdgekdError as e:
        return None, [f"{key}.{kind}: {e.what}"]
    problems, label, notes = [], NO_CLASS, (0, -1)
    if "cls" in files:
        try:
            label = int(files["cls"].read())
        except ValueError:
            problems.append(f"{key}.cls: holds no number of a class")
    if "json" in files:
        with contextlib.suppress(EdgekdError):  # a json beside a photo may be anything; it is read where it is SA-1B's
            told = parse_notes(files["json"], key)
            try:
                check_notes(told, key)
                notes = (files["json"].start, files["json"].size)
            except EdgekdError as e:
                problems.append(f"{e.where}: {e.what}")
    text = (files["txt"].start, files["txt"].size) if "txt" in files else (0, -1)
    photo = (files[kind].start, files[kind].size)
    return (key.encode("utf-8", "surrogateescape"), PHOTOS.index(kind), photo, notes, text, label), problems


@contextlib.contextmanager
def locked(tar: Path, *, wait: bool = True) -> Iterator[bool]:
    """Whether this process may make the index of a tar now; without a folder to write to, always."""
    try:
        folder().mkdir(parents=True, exist_ok=True)
        file = open(_base(tar).with_suffix(".lock"), "w")  # noqa: SIM115  closed below
    except OSError:
        yield True
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True
        with contextlib.suppress(OSError):
            os.unlink(file.name)


def _base(tar: Path) -> Path:
    return folder() / workspace.fingerprint([VERSION, str(tar.resolve()), *file_stamp(tar)])
