"""Teacher outputs on disk: safetensors shards, an index with a checksum of each, and a fingerprint of what they were made from.

    cache/index.json            schema, fingerprint, teacher, dataset, shape of one embedding, shards with SHA-256 and ids
    cache/shard-00000.safetensors   what was asked for by name, "embedding" (n, E, s, s) float16 and more

A shard is written whole or not at all, and the index after it, so a killed run goes on with the next shard. A shard whose bytes
do not match its checksum is made again. Another teacher, preprocessing or dataset has another fingerprint and is never mixed in.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from edgekd.checkpoint import weights_sha256
from edgekd.data.images import preprocess
from edgekd.distillation.taps import Taps
from edgekd.errors import EdgekdError
from edgekd.protocols import Dataset
from edgekd.workspace import atomic_path, fingerprint, sha256, write_json

SCHEMA = "edgekd.cache/1"
SHARD_IMAGES = 64
BATCH = 8


EMBEDDING: Mapping[str, str | None] = {"embedding": None}


def cache_fingerprint(teacher: Any, dataset: Dataset, outputs: Mapping[str, str | None] = EMBEDDING) -> str:
    """Of everything an output depends on."""
    return fingerprint([SCHEMA, weights_sha256(teacher), asdict(teacher.preprocess), dataset.fingerprint(), sorted(outputs.items())])


class TeacherCache:
    """The embeddings of a dataset's images, by their position in it. `made` counts the shards that this process had to compute."""

    def __init__(self, folder: Path, index: dict[str, Any], made: int = 0) -> None:
        self.folder, self.index, self.made = Path(folder), index, made
        self._open: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return sum(len(s["ids"]) for s in self.index["shards"])

    @property
    def bytes(self) -> int:
        """Size of all shards."""
        return sum(s["bytes"] for s in self.index["shards"])

    @property
    def teacher(self) -> str:
        """Name of the teacher."""
        return self.index["teacher"]

    def outputs(self, position: int) -> dict[str, Tensor]:
        """What the teacher gave for image `position`, by name, float16 without the batch axis. Shards stay mapped, so that any order is fast."""
        number = position // SHARD_IMAGES
        if number not in self._open:
            self._open[number] = load_file(self.folder / self.index["shards"][number]["file"])
        return {name: tensor[position % SHARD_IMAGES] for name, tensor in self._open[number].items()}

    def embedding(self, position: int) -> Tensor:
        """(E, s, s) of image `position`."""
        return self.outputs(position)["embedding"]

    def verify(self) -> None:
        """Compare every shard with its checksum.

        Raises:
            EdgekdError: one is missing or damaged; it is named.
        """
        for shard in self.index["shards"]:
            if not intact(self.folder, shard):
                raise EdgekdError("a shard of the cache is missing or damaged", where=self.folder / shard["file"],
                                  hint="run the command that made the cache again: it makes this shard anew")


def intact(folder: Path, shard: dict[str, Any]) -> bool:
    """Whether the bytes on disk are those that were written."""
    path = folder / shard["file"]
    return path.is_file() and sha256(path) == shard["sha256"]


def open_cache(folder: Path) -> TeacherCache:
    """A finished or unfinished cache.

    Raises:
        EdgekdError: there is none, or its index cannot be read.
    """
    path = Path(folder) / "index.json"
    if not path.is_file():
        raise EdgekdError("there is no cache here", where=folder, hint="make one: edgekd cache --teacher sam_nano --data PHOTOS --output FOLDER")
    try:
        index = json.loads(path.read_text())
        if index["schema"] != SCHEMA:
            raise ValueError(f"its schema is {index['schema']}")
        return TeacherCache(folder, index)
    except (ValueError, KeyError, TypeError) as e:
        raise EdgekdError(f"the index of the cache cannot be read: {e}", where=path, hint="delete the folder and make the cache again") from e


def build_cache(teacher: Any, dataset: Dataset, folder: Path, *, outputs: Mapping[str, str | None] = EMBEDDING, on_images: Callable[[int], None] | None = None) -> TeacherCache:
    """Ask the teacher about every image of `dataset`, keeping the shards that are there and whole.

    Args:
        teacher: frozen, in eval mode.
        dataset: photos in a fixed order.
        folder: of this cache alone; one made from something else is replaced.
        outputs: what to keep: name -> module path of a tap, None for an output of the teacher's own (`edgekd.distillation.taps`).
        on_images: told how many more images are done.
    """
    folder = Path(folder)
    index: dict[str, Any] = {"schema": SCHEMA, "fingerprint": cache_fingerprint(teacher, dataset, outputs), "teacher": teacher.name, "dataset": dataset.name,
             "images": len(dataset), "preprocess": asdict(teacher.preprocess), "dtype": "float16", "outputs": sorted(outputs), "shards": []}
    old = _reusable(folder, index["fingerprint"])
    made = 0
    for number, start in enumerate(range(0, len(dataset), SHARD_IMAGES)):
        positions = range(start, min(start + SHARD_IMAGES, len(dataset)))
        shard = old.get(f"shard-{number:05d}.safetensors")
        if shard is None or not intact(folder, shard):
            shard = _write_shard(teacher, dataset, folder, number, positions, outputs)
            made += 1
        index["shards"].append(shard)
        write_json(folder / "index.json", index)
        if on_images:
            on_images(len(positions))
    return TeacherCache(folder, index, made)


def _reusable(folder: Path, wanted: str) -> dict[str, dict[str, Any]]:
    """file -> shard of a cache made from the same things; empty when there is none."""
    try:
        found = open_cache(folder).index
    except EdgekdError:
        return {}
    return {s["file"]: s for s in found["shards"]} if found["fingerprint"] == wanted else {}


def _write_shard(teacher: Any, dataset: Dataset, folder: Path, number: int, positions: range, outputs: Mapping[str, str | None]) -> dict[str, Any]:
    path = folder / f"shard-{number:05d}.safetensors"
    samples = [dataset[i] for i in positions]
    parts: list[dict[str, Tensor]] = []
    taps = Taps(teacher, outputs)
    for at in range(0, len(samples), BATCH):
        frames = torch.stack([torch.from_numpy(preprocess(s.image, teacher.preprocess)[0]) for s in samples[at : at + BATCH]])
        with torch.inference_mode():
            seen = taps.run(frames)
            parts.append({name: seen[name].to(torch.float16) for name in outputs})
    found = {name: torch.cat([p[name] for p in parts]).contiguous() for name in outputs}
    broken = next((name for name, t in found.items() if not torch.isfinite(t).all()), None)
    if broken:
        raise EdgekdError(f"the teacher '{teacher.name}' gives infinite or NaN {broken}s", where=samples[0].id,
                          hint="its weights are damaged, or a photo lies far outside what it takes")
    with atomic_path(path) as temp:
        save_file(found, temp)
    try:
        load_file(path)
    except SafetensorError as e:  # a full disk can still cut a file short
        raise EdgekdError(f"the shard cannot be read back: {e}", where=path, hint="is the disk full?") from e
    return {"file": path.name, "sha256": sha256(path), "bytes": path.stat().st_size, "ids": [s.id for s in samples]}
