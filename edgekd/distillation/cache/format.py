"""The files of a cache and what they say. docs/cache.md describes them byte by byte.

    index.json                   what the cache is made from and how it is cut: written first, and never touched again
    shard-00000.safetensors      the outputs of images 0 .. shard_images - 1
    shard-00000.json             what is in it, its SHA-256 and the photos' names: written after it. A shard without one does not exist

There is no list of shards: which one holds an image is a division, and which are finished is a look into the folder. So writers share no
file that one could overwrite for another, and a reader needs nothing but the index to read while they write.
"""
from __future__ import annotations

import errno
import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgekd.checkpoint import weights_sha256
from edgekd.errors import EdgekdError
from edgekd.protocols import Dataset
from edgekd.recipe import CacheCodec
from edgekd.workspace import fingerprint, sha256, write_json

SCHEMA = "edgekd.cache/2"
CODE = 1
"""Raised by hand when the same teacher and photo would be cached as other numbers: preprocessing, taps or codec have changed what they
compute. `tests/test_cache.py` notices by recorded values. A hash of the sources would throw away terabytes for a comment."""
INDEX = "index.json"
FOLDER = 2**40  # the byte that stands for the whole folder
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
Json = dict[str, Any]


def cache_fingerprint(teacher: Any, dataset: Dataset, outputs: Mapping[str, str | None], codec: CacheCodec) -> str:
    """Of everything that the bytes of a cache depend on: weights, preprocessing, photos and their order, outputs, codec, and the code."""
    return fingerprint([SCHEMA, CODE, weights_sha256(teacher), asdict(teacher.preprocess), dataset.fingerprint(), sorted(outputs.items()), codec])


@dataclass(frozen=True)
class Layout:
    """How images are cut into shards."""

    images: int
    shard_images: int

    @property
    def shards(self) -> int:
        """How many there will be."""
        return -(-self.images // self.shard_images)

    def positions(self, number: int) -> range:
        """The images of a shard."""
        return range(number * self.shard_images, min((number + 1) * self.shard_images, self.images))

    def shard_of(self, position: int) -> int:
        """The shard that holds an image."""
        return position // self.shard_images


def shard_path(folder: Path, number: int) -> Path:
    """`shard-00007.safetensors`."""
    return folder / f"shard-{number:05d}.safetensors"


def about_path(folder: Path, number: int) -> Path:
    """`shard-00007.json`, what is said about the shard."""
    return folder / f"shard-{number:05d}.json"


# --- documents that know whether they are whole -----------------------------------------------------------------------------


def write_sealed(path: Path, document: Json) -> None:
    """A JSON document with a digest of itself, atomically."""
    write_json(path, {**document, "digest": fingerprint(document)})


def read_sealed(path: Path) -> Json:
    """A document without its digest.

    Raises:
        ValueError: it is of another schema, or not as it was written.
        OSError: it is not there.
    """
    document = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise ValueError(f"its schema is {document.get('schema') if isinstance(document, dict) else None}, not {SCHEMA}")
    digest = document.pop("digest", None)
    if digest != fingerprint(document):
        raise ValueError("it does not match its own digest")
    return document


def about(folder: Path, number: int) -> Json | None:
    """What is said about a finished shard; None when it is not finished, or said by something damaged."""
    try:
        return read_sealed(about_path(folder, number))
    except (OSError, ValueError):
        return None


def finished(folder: Path) -> list[int]:
    """Numbers of the shards that are there, without opening any."""
    found = (re.fullmatch(r"shard-(\d{5,})\.json", name) for name in os.listdir(folder))
    return sorted(int(m[1]) for m in found if m)


def intact(folder: Path, number: int) -> bool:
    """Whether a shard's bytes are those that were written."""
    told = about(folder, number)
    return told is not None and shard_path(folder, number).is_file() and sha256(shard_path(folder, number)) == told["sha256"]


# --- several writers ----------------------------------------------------------------------------------------------------


class Claims:
    """Who writes which shard: a lock on byte N of `.writers` is a claim on shard N.

    The kernel drops the locks of a process that dies, however it dies, so a claim is never stale. Where the file system has no locks,
    every writer keeps to its own share. One process is one writer: its threads do not exclude each other.
    """

    def __init__(self, folder: Path, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self._file = open(folder / ".writers", "a+b")  # noqa: SIM115 - held as long as the claims are

    def close(self) -> None:
        """Give up every claim."""
        self._file.close()

    @contextmanager
    def folder(self) -> Iterator[None]:
        """Alone in the folder, within the block; shards may be made meanwhile by those who were here before."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX, 1, FOLDER)
        except OSError:
            yield  # no locks here
            return
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, FOLDER)

    @contextmanager
    def take(self, number: int) -> Iterator[bool]:
        """Whether the shard is ours, within the block."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except OSError as e:
            yield number % self.world == self.rank and e.errno not in (errno.EACCES, errno.EAGAIN)
            return
        try:
            yield True
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, number)


@contextmanager
def explained(path: Path, left: str) -> Iterator[None]:
    """Errors of writing as a person can act on them; `left` says how much is still to be written."""
    try:
        yield
    except OSError as e:
        if e.errno not in FULL:
            raise EdgekdError(f"the cache cannot be written: {e.strerror or e}", where=path, hint="finished shards are kept; the same command goes on") from e
        raise EdgekdError("the disk is full" if e.errno != errno.EFBIG else "the file would be larger than this process may write", where=path,
                          hint=f"make room ({left} are still to be written) and give the same command again: finished shards are kept") from e
