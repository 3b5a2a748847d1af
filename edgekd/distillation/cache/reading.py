"""Reading a cache, in any order, also while it is written."""
from __future__ import annotations

import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor

from edgekd.distillation.cache import format as files
from edgekd.distillation.cache.codec import Arrays, Decoder
from edgekd.errors import EdgekdError

OPEN_SHARDS = 256
REPAIR = "give the command that made the cache again: it makes this shard anew and keeps the others"


class TeacherCache:
    """A teacher's outputs by the position of a photo in its dataset. `made` counts the shards that this process had to compute.

    Only finished shards are seen. Those that other processes finish later are found when one of their images is asked for.
    """

    def __init__(self, folder: Path, plan: files.Json, made: int = 0) -> None:
        self.folder, self.plan, self.made = Path(folder), plan, made
        self.layout = files.Layout(plan["images"], plan["shard_images"])
        self._open: OrderedDict[int, Shard] = OrderedDict()

    def __len__(self) -> int:
        """Images that are there."""
        return sum(len(self.layout.positions(n)) for n in self._finished())

    def __getstate__(self) -> dict[str, Any]:
        """For worker processes: they open the shards themselves."""
        return {**self.__dict__, "_open": OrderedDict()}

    @property
    def complete(self) -> bool:
        """Whether every image is there."""
        return len(self._finished()) == self.layout.shards

    @property
    def index(self) -> files.Json:
        """`index.json` with what is said about every finished shard under `shards`, read now."""
        told = [files.about(self.folder, n) for n in self._finished()]
        return {**self.plan, "shards": [t for t in told if t is not None]}

    @property
    def bytes(self) -> int:
        """Size of the cache: shards, what is said about them, and the index."""
        paths = [self.folder / files.INDEX]
        for n in self._finished():
            paths += [files.shard_path(self.folder, n), files.about_path(self.folder, n)]
        return sum(p.stat().st_size for p in paths if p.exists())

    @property
    def raw_bytes_per_image(self) -> int:
        """What one image would take as fp16 and nothing else."""
        return sum(2 * math.prod(o["shape"]) for o in self.plan["outputs"].values())

    @property
    def teacher(self) -> str:
        """Name of the teacher."""
        return self.plan["teacher"]

    def outputs(self, position: int) -> dict[str, Tensor]:
        """What the teacher gave for image `position`, by name and without the batch axis; float16 as it was, or float32 where it was coded.

        Raises:
            IndexError: the dataset has no such image.
            EdgekdError: the image is not cached yet, or its shard is damaged.
        """
        if not 0 <= position < self.layout.images:
            raise IndexError(f"image {position} of {self.layout.images}")
        return self._shard(self.layout.shard_of(position)).outputs(position)

    def embedding(self, position: int) -> Tensor:
        """(E, s, s) of image `position`."""
        return self.outputs(position)["embedding"]

    def verify(self) -> None:
        """Compare every finished shard with its checksum.

        Raises:
            EdgekdError: some are missing or damaged; they are named.
        """
        bad = [n for n in self._finished() if not files.intact(self.folder, n)]
        if bad:
            names = ", ".join(files.shard_path(self.folder, n).name for n in bad[:8]) + (", ..." if len(bad) > 8 else "")
            raise EdgekdError(f"{len(bad)} of {self.layout.shards} shards missing or damaged: {names}", where=self.folder, hint=REPAIR)

    def _finished(self) -> list[int]:
        return [n for n in files.finished(self.folder) if n < self.layout.shards]

    def _shard(self, number: int) -> Shard:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        told = files.about(self.folder, number)
        if told is None or told["fingerprint"] != self.plan["fingerprint"]:
            raise EdgekdError(f"the images {self.layout.positions(number)[0]} to {self.layout.positions(number)[-1]} are not in the cache yet", where=self.folder,
                              hint="wait for its writer, or give the command that makes the cache again")
        self._open[number] = Shard(files.shard_path(self.folder, number), {k: tuple(o["shape"]) for k, o in self.plan["outputs"].items()})
        if len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)
        return self._open[number]


class Shard:
    """One opened shard: mapped, not read, so that an image costs its own bytes only."""

    def __init__(self, path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
        self.path = path
        try:
            self._file = safe_open(path, "numpy")
            names = set(self._file.keys())
            shared: dict[str, Arrays] = {o: {k: self._file.get_tensor(f"{o}/{k}") for k in ("mean", "scale", "basis") if f"{o}/{k}" in names} for o in shapes}
            self._decoders = {o: Decoder(shared[o], shape) for o, shape in shapes.items()}
        except (SafetensorError, OSError, RuntimeError, KeyError, ValueError) as e:
            raise self._damaged(e) from e

    def outputs(self, position: int) -> dict[str, Tensor]:
        """The outputs of one image."""
        try:
            found = {name: decode(self._record(f"{name}/{position}")) for name, decode in self._decoders.items()}
            wrong = next((n for n, t in found.items() if tuple(t.shape) != self._decoders[n].shape), None)
            if wrong:
                raise ValueError(f"{wrong} has another shape")
        except (SafetensorError, ValueError, RuntimeError, KeyError, AttributeError) as e:
            raise self._damaged(e) from e
        return found

    def _record(self, name: str) -> np.ndarray:
        return self._file.get_tensor(name)

    def _damaged(self, error: Exception) -> EdgekdError:
        return EdgekdError(f"a shard of the cache is damaged: {error}", where=self.path, hint=REPAIR)


def open_cache(folder: Path) -> TeacherCache:
    """A cache, finished or not.

    Raises:
        EdgekdError: there is none, it is of an older format, or its index cannot be read.
    """
    path = Path(folder) / files.INDEX
    if not path.is_file():
        raise EdgekdError("there is no cache here", where=folder, hint="make one: edgekd cache --teacher sam_nano --data PHOTOS --output FOLDER")
    try:
        return TeacherCache(Path(folder), files.read_sealed(path))
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise EdgekdError(f"the index of the cache cannot be read: {e}", where=path,
                          hint="give the command that made the cache again: what cannot be used is replaced") from e
