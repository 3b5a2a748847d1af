"""Making a cache: whole shards, by one process or several, that go on where an earlier one stopped."""
from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor

from edgekd import console
from edgekd.data.images import preprocess
from edgekd.distillation.cache import format as files
from edgekd.distillation.cache.codec import Coded, codec_of, encode
from edgekd.distillation.cache.reading import Shard, TeacherCache, open_cache
from edgekd.distillation.taps import Taps
from edgekd.errors import EdgekdError, unknown
from edgekd.protocols import Dataset
from edgekd.recipe import CACHE_CODECS, CacheCodec
from edgekd.workspace import usable_folder, write_atomic

SHARD_IMAGES = 64
SHARD_BYTES = 128 * 2**20  # of raw fp16: what a writer holds in memory, and what a kill can cost
BATCH = 8
BATCH_PIXELS = 8 * 512 * 512  # attention over 1024 px takes gigabytes an image
PATIENCE = 3600.0  # seconds
POLL = 0.2
EMBEDDING: Mapping[str, str | None] = {"embedding": None}
Named = dict[str, Tensor]


@dataclass(frozen=True)
class Estimate:
    """What is left to do (predicted from `timed` images that were asked and coded): bytes on disk and seconds of this process alone."""

    images: int
    left: int
    bytes_per_image: float
    raw_fp16_bytes_per_image: int
    bytes: float
    seconds: float
    free_bytes: int
    timed: int

    def __str__(self) -> str:
        return f"{self.left} of {self.images} images to do, about {size(self.bytes)} and {console.duration(self.seconds)}; {size(self.free_bytes)} free"

    def to_dict(self) -> dict[str, Any]:
        """The JSON document."""
        return {"provenance": "predicted", **asdict(self)}


class Writer:
    """Asks the teacher and writes shards. What it asked for an estimate is not asked again."""

    def __init__(self, teacher: Any, dataset: Dataset, folder: Path, outputs: Mapping[str, str | None], codec: CacheCodec) -> None:
        if codec not in CACHE_CODECS:
            raise unknown("codec", codec, CACHE_CODECS)
        if not len(dataset):
            raise EdgekdError("there are no photos to cache", where=dataset.name)
        self.teacher, self.dataset, self.folder, self.names, self.codec = teacher, dataset, Path(folder), dict(outputs), codec
        self.fingerprint = files.cache_fingerprint(teacher, dataset, outputs, codec)
        self._taps = Taps(teacher, outputs)
        self._batch = max(1, min(BATCH, BATCH_PIXELS // teacher.preprocess.image_size**2))
        self._known: dict[int, tuple[str, Named]] = {}
        self.estimate: Estimate | None = None

    def ask(self, positions: Iterable[int]) -> tuple[list[str], Named]:
        """Names of photos, and what the teacher gives for them: (n, ...) float16 by output.

        Raises:
            EdgekdError: something infinite, NaN or too large for fp16; the photo is named.
        """
        wanted = list(positions)
        missing = [p for p in wanted if p not in self._known]
        for at in range(0, len(missing), self._batch):
            self._ask(missing[at : at + self._batch])
        found = [self._known.pop(p) for p in wanted]
        return [name for name, _ in found], {o: torch.stack([named[o] for _, named in found]) for o in self.names}

    def _ask(self, positions: list[int]) -> None:
        samples = [self.dataset[p] for p in positions]
        frames = torch.stack([torch.from_numpy(preprocess(s.image, self.teacher.preprocess)[0]) for s in samples])
        device = next((p.device for p in self.teacher.parameters()), frames.device) if isinstance(self.teacher, torch.nn.Module) else frames.device
        with torch.inference_mode():
            seen = self._taps.run(frames.to(device))
            half = {o: seen[o].to("cpu", torch.float16) for o in self.names}
        for n, (position, sample) in enumerate(zip(positions, samples, strict=True)):
            broken = next((o for o in self.names if not half[o][n].isfinite().all()), None)
            if broken:
                raise EdgekdError(f"the teacher '{self.teacher.name}' gives an infinite or NaN {broken}, or one too large for fp16", where=sample.id,
                                  hint="its weights are damaged, or the photo lies far outside what it takes")
            self._known[position] = (sample.id, {o: t[n].clone() for o, t in half.items()})

    def _coded(self, given: Named) -> dict[str, Coded]:
        return {o: encode(t, codec_of(o, tuple(t.shape[1:]), self.codec)) for o, t in given.items()}

    # --- before it starts -----------------------------------------------------------------------------------------------

    def plan(self) -> files.Json:
        """`index.json`: the one that is there if it is of the same cache, or a new one (the teacher is asked about one photo)."""
        try:
            found = open_cache(self.folder).plan
            if found["fingerprint"] == self.fingerprint:
                return found
        except EdgekdError:
            pass
        name, given = self.ask([0])
        self._known[0] = name[0], {o: t[0] for o, t in given.items()}
        shapes = {o: tuple(t.shape[1:]) for o, t in given.items()}
        raw = sum(2 * math.prod(s) for s in shapes.values())
        return {"schema": files.SCHEMA, "fingerprint": self.fingerprint, "code": files.CODE, "teacher": self.teacher.name,
                "preprocess": json.loads(json.dumps(asdict(self.teacher.preprocess))), "dataset": self.dataset.name, "images": len(self.dataset),
                "shard_images": max(1, min(SHARD_IMAGES, SHARD_BYTES // raw)), "codec": self.codec,
                "outputs": {o: {"shape": list(s), "codec": codec_of(o, s, self.codec), "tap": self.names[o]} for o, s in sorted(shapes.items())}}

    def foresee(self, layout: files.Layout, missing: list[int]) -> Estimate:
        """Size and time of the shards that are missing, from a few photos of the first of them."""
        positions = layout.positions(missing[0])[: self._batch]
        if len(positions) > 1 and positions[0] not in self._known:
            self._ask([positions[0]])  # the first call of a network is slower than the others: it is not timed
        rest = [p for p in positions if p not in self._known] or [positions[0]]
        begun = time.perf_counter()
        self._ask(rest)
        asked = (time.perf_counter() - begun) / len(rest)
        begun = time.perf_counter()
        coded = self._coded({o: torch.stack([self._known[p][1][o] for p in positions]) for o in self.names})
        coding = (time.perf_counter() - begun) / len(positions)
        left = sum(len(layout.positions(n)) for n in missing)
        record = sum(r.nbytes + 160 for c in coded.values() for r in c.records) / len(positions)  # with its line in the header and its photo's name
        shared = 800 + sum(a.nbytes + 120 for c in coded.values() for a in c.shared.values())
        total = record * left + shared * len(missing)
        raw = sum(2 * t.numel() for t in self._known[positions[0]][1].values())
        free = shutil.disk_usage(next(p for p in (self.folder, *self.folder.absolute().parents) if p.exists())).free
        self.estimate = Estimate(layout.images, left, total / left, raw, total, (asked + coding) * left, free, len(positions))
        return self.estimate

    # --- shards ---------------------------------------------------------------------------------------------------------

    def begin(self, plan: files.Json, claims: files.Claims) -> None:
        """Write the index, after taking away whatever is here of another cache."""
        path, layout = self.folder / files.INDEX, files.Layout(plan["images"], plan["shard_images"])
        with claims.folder(), files.explained(path, "all shards"):
            if path.exists():
                try:
                    if files.read_sealed(path) == plan:
                        return
                    console.log(f"{self.folder} holds the cache of something else: it is replaced")
                except (OSError, ValueError) as e:
                    console.log(f"{path} cannot be used ({e}): this cache is made anew")
            for number in {int(m[1]) for f in self.folder.glob("shard-*") if (m := re.fullmatch(r"shard-(\d{5,})", f.stem))}:
                told = files.about(self.folder, number)
                if told is None or told["fingerprint"] != self.fingerprint or number >= layout.shards:
                    files.about_path(self.folder, number).unlink(missing_ok=True)
                    files.shard_path(self.folder, number).unlink(missing_ok=True)
            files.write_sealed(path, plan)

    def make(self, layout: files.Layout, number: int) -> None:
        """Write one shard, then what is said about it."""
        for left in self.folder.glob(f".shard-{number:05d}.*"):
            left.unlink(missing_ok=True)  # of a writer that was killed: whoever makes a shard has claimed it
        positions, path = layout.positions(number), files.shard_path(self.folder, number)
        ids, given = self.ask(positions)
        coded = self._coded(given)
        tensors = {f"{o}/{k}": array for o, c in coded.items() for k, array in c.shared.items()}
        tensors |= {f"{o}/{p}": r for o, c in coded.items() for p, r in zip(positions, c.records, strict=True)}
        tensors = {k: np.ascontiguousarray(a) for k, a in tensors.items()}  # safetensors writes memory as it lies, whatever the strides
        head = {"schema": files.SCHEMA, "fingerprint": self.fingerprint, "number": number, "first": positions[0], "images": len(positions)}
        data = save(tensors, metadata={"edgekd": json.dumps(head)})
        if files.read_sealed(self.folder / files.INDEX)["fingerprint"] != self.fingerprint:
            raise EdgekdError("another process makes the cache of something else in this folder", where=self.folder, hint="give one of them another folder")
        todo = self.estimate.bytes if self.estimate else len(data)
        with files.explained(path, f"at most {size(max(todo, len(data)))}"):
            files.about_path(self.folder, number).unlink(missing_ok=True)
            write_atomic(path, data)
            self._read_back(path, positions[0], {o: t[0] for o, t in given.items()})
            try:
                files.write_sealed(files.about_path(self.folder, number), {**head, "file": path.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(),
                                                                           "ids": ids, "outputs": {o: c.facts() for o, c in coded.items()}})
            except OSError:
                path.unlink()  # room for the next attempt
                raise


    def _read_back(self, path: Path, position: int, wanted: Named) -> None:
        """One image as a reader gets it against what the teacher gave: a shard that cannot be read is not accepted."""
        got = Shard(path, {o: tuple(t.shape) for o, t in wanted.items()}).outputs(position)
        for name, value in wanted.items():
            error = (got[name].float() - value.float()).square().mean().sqrt()
            if not error <= 0.5 * value.float().square().mean().sqrt():
                path.unlink()
                raise EdgekdError(f"the {name} that was written cannot be read back: it is off by {float(error):.3g}", where=path,
                                  hint="this is a fault of edgekd or of the disk; --codec fp16 writes values as they are")


def build_cache(teacher: Any, dataset: Dataset, folder: Path, *, outputs: Mapping[str, str | None] = EMBEDDING, codec: CacheCodec = "packed",
                on_images: Callable[[int], None] | None = None, rank: int = 0, world: int = 1, patience: float = PATIENCE) -> TeacherCache:
    """Ask the teacher about every photo of `dataset`, keeping the shards that are there and whole.

    Several processes may work on one folder at once. Each begins with its own share and then takes what nobody is at work on, so that a
    process that dies leaves its share to the others; all of them return when everything is there. Each checks the shards of its own
    share: put a barrier behind the call before reading what others made.

    Args:
        teacher: frozen, in eval mode, on any device.
        dataset: photos in a fixed order.
        folder: of this cache alone; one made from something else is replaced.
        outputs: what to keep: name -> module path of a tap, None for an output of the teacher's own (`edgekd.distillation.taps`).
        codec: `packed`, `int8` or `fp16`, for maps; what is small stays fp16 (`codec.codec_of`).
        on_images: told how many more images are done, by whomever.
        rank, world: which of how many processes this is.
        patience: seconds to wait for others while nothing gets done.

    Raises:
        EdgekdError: the disk cannot hold it or is full, the teacher gives NaN, or the others do not finish.
    """
    folder = usable_folder(folder)
    writer = Writer(teacher, dataset, folder, outputs, codec)
    with closing(files.Claims(folder, rank, world)) as claims:
        plan = writer.plan()
        layout = files.Layout(plan["images"], plan["shard_images"])
        writer.begin(plan, claims)
        broken = {n for n in range(rank, layout.shards, world) if files.about_path(folder, n).exists() and not files.intact(folder, n)}
        missing = [n for n in sorted(range(layout.shards), key=lambda n: (n % world != rank, n)) if n in broken or not files.about_path(folder, n).exists()]
        tell = on_images or (lambda _: None)
        tell(layout.images - sum(len(layout.positions(n)) for n in missing))
        if missing:
            told = writer.foresee(layout, missing)
            console.log(f"cache of {teacher.name}: {told}")
            if told.bytes > told.free_bytes:
                raise EdgekdError(f"the cache needs about {size(told.bytes)} more, and the disk has {size(told.free_bytes)}", where=folder,
                                  hint="make room, name another --output, or take fewer photos (--limit)")
        made = _make_all(writer, layout, missing, broken, claims, tell, patience)
    return TeacherCache(folder, plan, made)


def _make_all(writer: Writer, layout: files.Layout, missing: list[int], broken: set[int], claims: files.Claims, on_images: Callable[[int], None],
              patience: float) -> int:
    """Make the missing shards in this order until all are there, by whomever; the number made here."""
    made, left, last = 0, list(missing), time.monotonic()
    while left:
        for number in list(left):
            there = number not in broken and files.about(writer.folder, number) is not None
            if not there:
                with claims.take(number) as ours:
                    there = ours and number not in broken and files.about(writer.folder, number) is not None  # made by another, just now
                    if ours and not there:
                        writer.make(layout, number)
                        made, there = made + 1, True
            if there:
                left.remove(number)
                on_images(len(layout.positions(number)))
                last = time.monotonic()
        if left and time.monotonic() - last > patience:
            raise EdgekdError(f"{len(left)} shards of the cache are still with other writers, and none was finished for {console.duration(patience)}",
                              where=writer.folder, hint="look at the other processes; shards that are done are kept, and the same command goes on")
        if left:
            time.sleep(POLL)
    return made


def estimate_cache(teacher: Any, dataset: Dataset, folder: Path, *, outputs: Mapping[str, str | None] = EMBEDDING, codec: CacheCodec = "packed") -> Estimate | None:
    """What `build_cache` would still have to do; None when everything is there. Writes nothing."""
    writer = Writer(teacher, dataset, folder, outputs, codec)
    plan = writer.plan()
    layout = files.Layout(plan["images"], plan["shard_images"])
    missing = [n for n in range(layout.shards) if (files.about(Path(folder), n) or {}).get("fingerprint") != writer.fingerprint]
    return writer.foresee(layout, missing) if missing else None


def size(count: float) -> str:
    """Bytes as people say them: `183 kB`, `5.4 GB`."""
    for unit, of in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= of:
            return f"{count / of:.3g} {unit}"
    return f"{count / 1e3:.0f} kB"
