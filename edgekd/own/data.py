"""What a user's own model is shown: arrays from .npz and .npy files, or photos where its one input is an image.

    a .npz file      one call: an array an input, by the inputs' names; of a model with one input the array's name does not matter
    a .npy file      one call of a model with one input
    photos           of a model with one input (B, 3, H, W) or (B, H, W, 3): stretched to H x W, scaled to 0..1 unless told otherwise

Arrays that lack the batch axis get one; a stack of N where the input takes 1 is N calls.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edgekd.data import open_data
from edgekd.errors import UsageError
from edgekd.protocols import Dataset
from edgekd.tasks.tensors.inputs import Input

ARRAYS = (".npz", ".npy")
CALIBRATION, HELD_OUT = 32, 16
"""Calls, at most, that ranges are found on; and that answers are compared on."""


@dataclass(frozen=True)
class Photos:
    """How photos become an input: (pixel - mean) / std of RGB in 0..255. `size` is (height, width) where the input takes any."""

    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (255.0, 255.0, 255.0)
    size: tuple[int, int] | None = None

    @classmethod
    def of(cls, mean: Sequence[float] | None, std: Sequence[float] | None, size: tuple[int, int] | None) -> Photos | None:
        """What was asked for; None where nothing was. Raises UsageError for numbers that cannot be."""
        if mean is None and std is None and size is None:
            return None
        for name, values in (("mean", mean), ("std", std)):
            if values is not None and len(values) not in (1, 3):
                raise UsageError(f"--{name} takes one number or three, not {len(values)}", hint=f"for instance --{name} 123.675,116.28,103.53")
        return cls(_three(mean, cls.mean), _three(std, cls.std), size)

    def __post_init__(self) -> None:
        if min(self.std) < 1:
            times = ",".join(f"{s * 255:g}" for s in self.std)
            raise UsageError(f"--std is for RGB in 0..255, and {min(self.std):g} is too small",
                             hint=f"for one of 0..1 multiply by 255: --std {times}, and --mean too")


def _three(values: Sequence[float] | None, otherwise: tuple[float, float, float]) -> tuple[float, float, float]:
    if values is None:
        return otherwise
    red, green, blue = values if len(values) == 3 else [*values] * 3
    return red, green, blue


class Calls:
    """Inputs of several calls, read when they are asked for. Re-iterable; the same array is not kept."""

    def __init__(self, source: Any, indices: Sequence[int] | None = None) -> None:
        self.source, self.indices = source, list(range(len(source))) if indices is None else list(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return (self.source[i] for i in self.indices)

    def spread(self, most: int) -> Calls:
        """At most so many, from all over."""
        count = min(len(self), most)
        return Calls(self.source, [self.indices[i * len(self) // count] for i in range(count)])

    def split(self) -> tuple[Calls, Calls, bool]:
        """What ranges are found on, what answers are compared on, and whether these are different calls: every fourth is held out."""
        if len(self) < 2:
            return self, self, False
        held = self.indices[1::4]
        seen = [i for i in self.indices if i not in set(held)]
        return Calls(self.source, seen).spread(CALIBRATION), Calls(self.source, held).spread(HELD_OUT), True


def read(data: str | Path, inputs: Sequence[Input], lengths: Mapping[str, int], photos: Photos | None = None) -> Calls:
    """The calls that a folder or file holds.

    Args:
        lengths: of axes of any length, for photos: the size that they are stretched to where `photos` says none.

    Raises:
        UsageError: there are none, they do not fit the inputs, or they are photos and the model takes no image.
    """
    path = Path(data).expanduser()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else []
    arrays = [p for p in files if p.suffix.lower() in ARRAYS and not p.name.startswith(".")]
    if arrays:
        return Calls(_Arrays(arrays, inputs))
    if (image := image_input(inputs)) is None:
        raise UsageError("photos can be shown to a model with one input of 3 channels only", where=path,
                         hint=f"give a folder of .npz files with an array an input: {', '.join(i.words() for i in inputs)}")
    return Calls(_Pictures(open_data(data, masks=False), inputs[0], *image, lengths, photos or Photos()))


def image_input(inputs: Sequence[Input]) -> tuple[int, int, int] | None:
    """(axis of the channels, of the height, of the width) where the one input is an image of 3 channels."""
    if len(inputs) == 1 and len(inputs[0].shape) == 4:
        if inputs[0].shape[1] == 3:
            return 1, 2, 3
        if inputs[0].shape[3] == 3:
            return 3, 1, 2
    return None


class _Arrays:
    """Calls in .npz and .npy files: (file, row of a stack or None)."""

    def __init__(self, files: Sequence[Path], inputs: Sequence[Input]) -> None:
        self.inputs, self.rows = list(inputs), list[tuple[Path, int | None]]()
        for file in files:
            counts = {self._stacked(array, one) for one, array in self._raw(file)}
            if len(counts) > 1:
                raise UsageError(f"its arrays are of {' and '.join(str(c or 1) for c in counts)} calls", where=file,
                                 hint="give all the same number, or one call a file")
            count = counts.pop()
            self.rows += [(file, None)] if count is None else [(file, row) for row in range(count)]
            self[len(self.rows) - 1]  # shapes and types of each file, before anything is started

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        file, row = self.rows[index]
        return {one.name: _fit(array if row is None else array[row:row + 1], one, file) for one, array in self._raw(file)}

    def _raw(self, file: Path) -> list[tuple[Input, np.ndarray]]:
        try:
            loaded = np.load(file, allow_pickle=False)
            held: dict[str, np.ndarray] = {"": loaded} if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded.files}
        except (OSError, ValueError, EOFError, KeyError) as e:
            raise UsageError(f"the arrays cannot be read: {e}", where=file, hint="write them with numpy.savez(FILE, NAME=array)") from e
        except Exception as e:  # zipfile.BadZipFile and zlib.error, which share no base class
            raise UsageError(f"the file is damaged: {e}", where=file) from e
        if len(self.inputs) == 1 and len(held) == 1:
            return [(self.inputs[0], next(iter(held.values())))]
        if missing := [i.name for i in self.inputs if i.name not in held]:
            raise UsageError(f"it has no array '{missing[0]}'", where=file, hint=f"it holds {', '.join(filter(None, held)) or 'one array without a name'}; "
                             f"the model takes {', '.join(i.words() for i in self.inputs)}")
        return [(i, held[i.name]) for i in self.inputs]

    @staticmethod
    def _stacked(array: np.ndarray, one: Input) -> int | None:
        """How many calls a stack holds, where the input takes one at a time."""
        return len(array) if one.shape and one.shape[0] == 1 and array.ndim == len(one.shape) and len(array) > 1 else None


def _fit(array: np.ndarray, one: Input, file: Path) -> np.ndarray:
    """The array as the input takes it."""
    if array.ndim == len(one.shape) - 1 and (one.shape[0] == 1 or isinstance(one.shape[0], str)):
        array = array[None]
    if array.ndim != len(one.shape) or any(isinstance(n, int) and n != m for n, m in zip(one.shape, array.shape, strict=True)):
        raise UsageError(f"the array of '{one.name}' has the shape {array.shape}", where=file, hint=f"the model takes {one.words()}")
    if array.size == 0:
        raise UsageError(f"the array of '{one.name}' is empty: {array.shape}", where=file)
    dtype = np.dtype(one.dtype)
    if array.dtype.kind not in "fiub":
        raise UsageError(f"the array of '{one.name}' is of the type {array.dtype}", where=file, hint=f"the model takes {one.words()}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise UsageError(f"the array of '{one.name}' holds NaN or infinity", where=file)
    found = np.ascontiguousarray(array.astype(dtype))
    if dtype.kind != "f" and not np.array_equal(found, array):
        raise UsageError(f"the array of '{one.name}' is of the type {array.dtype} and cannot be made {dtype}", where=file, hint=f"the model takes {one.words()}")
    return found


class _Pictures:
    """Photos as an image input. An input of whole numbers gets the pixels as they are."""

    def __init__(self, dataset: Dataset, one: Input, channels: int, height: int, width: int, lengths: Mapping[str, int], photos: Photos) -> None:
        self.dataset, self.one, self.channels, self.photos = dataset, one, channels, photos
        axes = (one.shape[height], one.shape[width])
        free = [n for n in axes if isinstance(n, str)]
        if photos.size is None and (missing := [n for n in free if n not in lengths]):
            raise UsageError(f"the input takes pictures of any size, and none is given for {' and '.join(missing)}",
                             hint="give one with --size 224 or --size 224x320")
        asked = photos.size or tuple(lengths[n] if isinstance(n, str) else n for n in axes)
        if any(isinstance(n, int) and n != size for n, size in zip(axes, asked, strict=True)):
            raise UsageError(f"--size {asked[0]}x{asked[1]} does not fit the input {one.words()}", hint="leave it out")
        self.size = (asked[0], asked[1])
        self.batch = one.shape[0] if isinstance(one.shape[0], int) else 1

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        height, width = self.size
        photo = Image.fromarray(self.dataset[index].image).resize((width, height), Image.Resampling.BILINEAR)
        pixels, dtype = np.asarray(photo), np.dtype(self.one.dtype)
        if dtype.kind == "f":
            pixels = (pixels.astype(np.float32) - np.array(self.photos.mean, np.float32)) / np.array(self.photos.std, np.float32)
        pixels = pixels if self.channels == 3 else pixels.transpose(2, 0, 1)
        return {self.one.name: np.ascontiguousarray(np.repeat(pixels[None], self.batch, axis=0).astype(dtype))}


def words(calls: Calls) -> dict[str, Any]:
    """What was shown, for a document."""
    source = calls.source
    if not isinstance(source, _Pictures):
        return {"kind": "arrays", "count": len(calls)}
    return {"kind": "photos", "count": len(calls), "mean": list(source.photos.mean), "std": list(source.photos.std), "size": list(source.size),
            "fit": "stretch", "scale": "(pixel - mean) / std of RGB in 0..255"}
