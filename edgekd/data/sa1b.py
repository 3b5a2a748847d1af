"""SA-1B as it is downloaded: `sa_000020.tar` with `sa_N.jpg` and `sa_N.json`, read in place, or a folder of such tars or of such pairs."""
from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekd import workspace
from edgekd.data.checks import CHECK_SIDE, file_stamp, warn_skipped
from edgekd.data.coco import decode_segmentation
from edgekd.data.images import ImageError, read_image
from edgekd.errors import EdgekdError, UsageError
from edgekd.protocols import Sample

BLOCK = 512
"""Of a tar: headers and contents begin at multiples of it."""
READ_FULLY = 2000
"""Up to so many photos each is decoded (at 1/8) and each json parsed before anything starts; of more, only their first and last bytes are
looked at, which finds what is truncated or something else."""
PHOTO, NOTES = ".jpg", ".json"


@dataclass(frozen=True)
class Span:
    """Where a file's bytes lie: all of a file, or a part of a tar."""

    file: Path
    start: int
    size: int

    def read(self, first: int = 0, count: int | None = None) -> bytes:
        """`count` bytes from `first` on (all: None); fewer when the file ends before."""
        with open(self.file, "rb") as f:
            f.seek(self.start + first)
            return f.read(self.size - first if count is None else count)


class Sa1b:
    """The photos of SA-1B that have their annotations, in the order of their names, with one mask an annotation.

    Nothing is extracted: the headers of a tar are read once, photos by their offset. A damaged header is stepped over, up to the next
    sound one. Damaged photos and annotations, and photos without annotations, are skipped and named in `skipped`.

    Args:
        path: a tar, a folder with tars, or a folder with extracted pairs.
        masks: False: photos alone, whether annotated or not.
        limit: stop after so many usable photos.

    Raises:
        UsageError: nothing usable there.
    """

    def __init__(self, path: str | Path, *, masks: bool = True, limit: int | None = None) -> None:
        self.path, self.has_masks = Path(path), masks
        self.name = self.path.stem if self.path.is_file() else self.path.resolve().name
        self.skipped: list[str] = []
        self._tars = [self.path] if self.path.is_file() else sorted(self.path.glob("*.tar"))
        found = self._index()
        pairs = [(n, files[PHOTO], files.get(NOTES)) for n, files in sorted(found.items()) if PHOTO in files and (NOTES in files or not masks)]
        if not pairs:
            damage = f"; {self.skipped[0]}" if self.skipped else ""
            raise UsageError(f"there is no pair of sa_N.jpg and sa_N.json here{damage}", where=self.path,
                             hint="SA-1B's tars hold a photo and a json of the same name for each image")
        lone = [f"{n}{PHOTO}: has no {n}{NOTES}" for n, files in sorted(found.items()) if masks and PHOTO in files and NOTES not in files]
        self.skipped += lone + [f"{n}{NOTES}: has no {n}{PHOTO}" for n, files in sorted(found.items()) if PHOTO not in files]
        self._items: list[tuple[str, Span, Span | None]] = []
        self._keep_readable(pairs, len(pairs) if limit is None else limit)
        warn_skipped(self.name, self.skipped)
        if not self._items:
            raise UsageError(f"none of the {len(pairs)} photos here can be read: {self.skipped[0]}", where=self.path)

    def _index(self) -> dict[str, dict[str, Span]]:
        """Name without suffix -> suffix -> where its bytes are."""
        found: dict[str, dict[str, Span]] = {}
        for name, span in self._members():
            stem, suffix = os.path.splitext(os.path.basename(name))
            if stem.startswith(".") or suffix.lower() not in (PHOTO, NOTES):
                continue
            if suffix.lower() in found.setdefault(stem, {}):
                self.skipped.append(f"{name}: there is another of this name")
            else:
                found[stem][suffix.lower()] = span
        return found

    def _members(self) -> Iterator[tuple[str, Span]]:
        for tar in self._tars:
            yield from members(tar, self.skipped)
        if not self._tars:
            for entry in sorted(os.scandir(self.path), key=lambda e: e.name):
                if entry.is_file():
                    yield entry.name, Span(Path(entry.path), 0, entry.stat().st_size)

    def _keep_readable(self, pairs: list[tuple[str, Span, Span | None]], limit: int) -> None:
        """Check in blocks, so that a small `limit` reads only what it needs."""
        fully = min(len(pairs), limit) <= READ_FULLY
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            for first in range(0, len(pairs), 64):
                block = pairs[first:first + 64]
                for pair, reason in zip(block, pool.map(lambda p: self._problem(p[0], p[1], p[2], fully), block), strict=True):
                    if len(self._items) == limit:
                        return
                    if reason is None:
                        self._items.append(pair)
                    else:
                        self.skipped.append(reason)

    def _problem(self, stem: str, photo: Span, notes: Span | None, fully: bool) -> str | None:
        """Why a pair cannot be used, or None."""
        if not fully:
            return _odd_ends(stem, photo, notes if self.has_masks else None)
        try:
            read_image(f"{stem}{PHOTO}", max_side=CHECK_SIDE, data=photo.read())
            if notes is not None and self.has_masks:
                check_notes(parse_notes(notes, stem), stem)
        except EdgekdError as e:
            return f"{e.where}: {e.what}"
        return None

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Sample:
        stem, photo, _ = self._items[index]
        name, data = f"{stem}{PHOTO}", photo.read()
        if not self.has_masks:
            return Sample(name, read_image(name, data=data))
        return Sample(name, *with_masks(name, data, self._notes(index)))

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def label_map(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """A photo and one map of its masks (`with_labels`)."""
        stem, photo, _ = self._items[index]
        return with_labels(f"{stem}{PHOTO}", photo.read(), self._notes(index))

    def annotations(self, index: int) -> list[dict[str, Any]]:
        """As the json has them: `segmentation`, `bbox` (x, y, w, h), `point_coords` (the click SA-1B's mask was made from), `predicted_iou`, ..."""
        return list(self._notes(index)["annotations"])

    def _notes(self, index: int) -> dict[str, Any]:
        stem, _, notes = self._items[index]
        if notes is None:
            raise UsageError("this photo has no annotations", where=stem)
        return parse_notes(notes, stem)

    def fingerprint(self) -> str:
        """Names and order of the photos, and sizes and times of the files they are in."""
        files = self._tars or [f for _, photo, notes in self._items for f in (photo.file, notes.file if notes else photo.file)]
        return workspace.fingerprint(["sa1b", self.has_masks, [i[0] for i in self._items], [[f.name, *file_stamp(f)] for f in files]])


def with_masks(name: str, data: bytes, notes: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """A photo (H, W, 3) uint8 from its file's bytes and its masks (K, H, W) bool from its json, without those that are empty.

    Raises:
        EdgekdError: photo and json do not fit each other.
    """
    image = _image(name, data, notes)
    masks = np.zeros((len(notes["annotations"]), *image.shape[:2]), dtype=bool)
    for mask, annotation in zip(masks, notes["annotations"], strict=True):
        mask[:] = decode_segmentation(annotation["segmentation"], *image.shape[:2], where=f"{os.path.splitext(name)[0]}{NOTES}")
    return image, masks[masks.any(axis=(1, 2))]


def with_labels(name: str, data: bytes, notes: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """A photo (H, W, 3) uint8 and one map (H, W) int16 of its masks, numbered from 1 in their order, small ones on top; 0 elsewhere, 1 everywhere
    of a photo without any. The same as painting `with_masks`, in a thirtieth of the time: a hundred masks of a whole photo are never made.

    Raises:
        EdgekdError: photo and json do not fit each other.
    """
    image = _image(name, data, notes)
    painted: list[tuple[int, int, tuple[np.ndarray, np.ndarray]]] = []
    for annotation in notes["annotations"]:
        try:
            edges = run_edges(annotation["segmentation"]["counts"])
        except (TypeError, ValueError, IndexError) as e:
            raise EdgekdError(f"a run-length mask cannot be read: {e}", where=f"{os.path.splitext(name)[0]}{NOTES}") from e
        if area := int((edges[1] - edges[0]).sum()):
            painted.append((area, len(painted) + 1, edges))
    labels = np.full(image.shape[0] * image.shape[1], 0 if painted else 1, np.int16)  # column by column, as the runs go
    for _, number, (starts, ends) in sorted(painted, key=lambda one: -one[0]):
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            labels[start:end] = number
    return image, np.ascontiguousarray(labels.reshape(image.shape[1], image.shape[0]).T)


def run_edges(counts: str | bytes) -> tuple[np.ndarray, np.ndarray]:
    """Where the runs of a mask start and end in its pixels, column by column, from COCO's compressed counts: groups of five bits, the lowest
    first, of each count's difference to the one before the last."""
    groups = np.frombuffer(counts.encode() if isinstance(counts, str) else counts, np.uint8).astype(np.int64) - 48
    last = np.flatnonzero((groups & 32) == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    shift = 5 * (np.arange(len(groups)) - np.repeat(first, last - first + 1))
    found = np.add.reduceat((groups & 31) << shift, first)
    found[(groups[last] & 16) != 0] -= (1 << (shift[last] + 5))[(groups[last] & 16) != 0]
    found[1::2], found[2::2] = found[1::2].cumsum(), found[2::2].cumsum()
    edges = found.cumsum()
    return edges[: len(edges) // 2 * 2 : 2], edges[1::2]


def _image(name: str, data: bytes, notes: dict[str, Any]) -> np.ndarray:
    image, size = read_image(name, data=data), (notes["image"]["height"], notes["image"]["width"])
    if image.shape[:2] != size:  # annotated as stored, before EXIF turned it
        image = read_image(name, data=data, orient=False)
    if image.shape[:2] != size:
        raise ImageError(f"the image is {image.shape[1]} x {image.shape[0]} pixels, its json says {size[1]} x {size[0]}", where=name)
    return image


def members(tar: Path, damaged: list[str]) -> Iterator[tuple[str, Span]]:
    """The files of an uncompressed tar by name, headers only; what cannot be used is named in `damaged`.

    Not `tarfile.open`, which gives up at the first damaged header, and everything behind it with it.

    Raises:
        UsageError: not a tar, or a compressed one.
    """
    end, at, lost, sound = tar.stat().st_size, 0, 0, 0
    with open(tar, "rb") as f:
        while at + BLOCK <= end:
            f.seek(at)
            block = f.read(BLOCK)
            at += BLOCK
            if not block.strip(b"\0"):
                continue
            try:
                header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except tarfile.HeaderError:
                if not sound and lost * BLOCK >= 1 << 20:  # a megabyte without one header
                    break
                lost += 1
                continue
            if lost:
                damaged.append(f"{tar.name}: {lost * BLOCK} bytes before {header.name} are damaged")
            lost, sound = 0, sound + 1
            if header.isreg() and at + header.size > end:
                damaged.append(f"{header.name}: the tar ends within it")
            elif header.isreg():
                yield header.name, Span(tar, at, header.size)
            at += -(-header.size // BLOCK) * BLOCK
    if not sound:
        raise UsageError("this is not a tar, or a compressed one, which cannot be read at random", where=tar,
                         hint=f"check the download; of a compressed one: gunzip {tar.name}")
    if lost:
        damaged.append(f"{tar.name}: its last {lost * BLOCK} bytes are damaged")


def is_sa1b(folder: Path) -> bool:
    """Whether a folder holds tars and no photos beside them, or pairs of photo and SA-1B json."""
    names = {e.name for e in os.scandir(folder) if e.is_file() and not e.name.startswith(".")}
    photos = {os.path.splitext(n)[0] for n in names if n.lower().endswith(PHOTO)}
    if not photos:
        return any(n.lower().endswith(".tar") for n in names)
    pair = next((s for s in sorted(photos) if f"{s}{NOTES}" in names), None)
    if pair is None:
        return False
    file = folder / f"{pair}{NOTES}"
    try:
        parse_notes(Span(file, 0, file.stat().st_size), pair)
    except EdgekdError:
        return pair.startswith("sa_")
    return True


def parse_notes(notes: Span, stem: str) -> dict[str, Any]:
    """An image's json, with what is used of it there.

    Raises:
        EdgekdError: it is damaged or something else.
    """
    try:
        data = json.loads(notes.read())
        _ = data["image"]["height"], data["image"]["width"], [a["segmentation"]["size"] for a in data["annotations"]]
    except (ValueError, KeyError, TypeError) as e:
        raise EdgekdError(f"cannot be read as SA-1B's annotations: {type(e).__name__} {e}", where=f"{stem}{NOTES}") from e
    return data


def _odd_ends(stem: str, photo: Span, notes: Span | None) -> str | None:
    """What the first and last bytes of a pair say against it, or None."""
    if photo.read(0, 2) != b"\xff\xd8":
        return f"{stem}{PHOTO}: is not a JPEG"
    if photo.read(max(0, photo.size - 2)) != b"\xff\xd9":
        return f"{stem}{PHOTO}: is truncated"
    whole = notes is None or (notes.read(0, 32).lstrip()[:1] == b"{" and notes.read(max(0, notes.size - 32)).rstrip()[-1:] == b"}")
    return None if whole else f"{stem}{NOTES}: is truncated or not a json"


def check_notes(data: dict[str, Any], stem: str) -> None:
    """Run-length masks must have their image's size."""
    size = [data["image"]["height"], data["image"]["width"]]
    for annotation in data["annotations"]:
        if list(annotation["segmentation"]["size"]) != size:
            raise EdgekdError(f"a run-length mask is {annotation['segmentation']['size']}, its image {size} (height, width)",
                              where=f"{stem}{NOTES}")
