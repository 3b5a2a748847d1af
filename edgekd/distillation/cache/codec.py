"""How a teacher's outputs are written: as they are (`fp16`), a byte a value (`int8`), or a few bits a value (`packed`).

A map x (C, h, w) is stored as integers q with which  x = mean + scale * (basis @ q):

1. every channel is centred and divided by its own standard deviation, so that no channel drowns in the rounding of a louder one;
2. the channels are rotated to their principal axes (Karhunen-Loeve transform), which puts what they share into a few of them. The
   rotation is orthogonal: the error of rounding stays the same size and is spread evenly over the channels;
3. all axes are rounded to multiples of one step, `STEP` of a channel's standard deviation, or a coarser one where that would
   take more than `MOST_BITS` a value. With equal steps the axes get the bits that rate-distortion theory gives them (reverse water-filling);
4. the integers of an image, axis by axis, are Huffman-coded by zlib in blocks of a few axes, each with a table of its own.

Mean, scale and basis belong to a shard and lie in it: shards can be read and made without one another. The bytes are in docs/cache.md.
"""
from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from edgekd.recipe import CacheCodec

STEP = 1 / 12
"""Of a channel's standard deviation. An error of 2.4 % of it, 32 dB below the signal."""
MOST_BITS = 4.5
"""A value, everything in the shard counted: 0.28 of fp16."""
SMALL = 4096
"""Tensors with fewer values stay fp16: vectors and logits are little beside a map, and losses on logits look at small differences."""
FEWEST_PLACES = 64  # of a map, so that what channels share is paid for
COLUMNS = 32768  # places whose channels the statistics are taken from
LOUDEST = 127 * 256 + 127  # what a low and a high int8 reach
MEMORY_LEVEL = 6  # of zlib: blocks of 4096 symbols
Arrays = dict[str, np.ndarray]


@dataclass
class Coded:
    """One output of the images of a shard: what they share, and a record of each. `bits` a value; `snr_db` signal over error, in decibels."""

    shared: Arrays
    records: list[np.ndarray]
    codec: CacheCodec
    bits: float
    snr_db: float | None = None
    step: float | None = None

    def facts(self) -> dict[str, object]:
        """For the shard's description."""
        numbers = {"bits_per_value": self.bits, "snr_db": self.snr_db, "step": self.step}
        return {"codec": self.codec, **{k: round(v, 4) for k, v in numbers.items() if v is not None}}


def codec_of(name: str, shape: tuple[int, ...], codec: CacheCodec) -> CacheCodec:
    """What an output of one image, without a batch axis, is written with when `codec` is asked for.

    Only maps (C, h, w) are worth the effort. Attention probabilities stay as they are: losses take logarithms of the small ones.
    """
    large = len(shape) == 3 and math.prod(shape) >= SMALL and math.prod(shape[1:]) >= FEWEST_PLACES
    return codec if large and not name.startswith("attention") else "fp16"


def encode(values: Tensor, codec: CacheCodec) -> Coded:
    """values (n, ...) float16 of n images -> their records. `packed` and `int8` take maps (n, C, h, w)."""
    if codec == "fp16":
        return Coded({}, list(values.numpy()), "fp16", 16.0)
    return (_int8 if codec == "int8" else _packed)(values.flatten(2))


# --- reading ------------------------------------------------------------------------------------------------------------


@dataclass
class Decoder:
    """Turns records of one output in one shard back into tensors."""

    shared: Arrays
    shape: tuple[int, ...]
    _matrix: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.shared:
            self._mean, self._scale = (torch.from_numpy(self.shared[k])[:, None] for k in ("mean", "scale"))
            if "basis" in self.shared:
                self._matrix = self._scale * torch.from_numpy(self.shared["basis"]).float()

    def __call__(self, record: np.ndarray) -> Tensor:
        """A record as it lies in the shard -> the output: float16 as it was, or float32.

        Raises:
            ValueError: the record is damaged.
        """
        if record.dtype == np.float16:
            return torch.from_numpy(record)
        if record.dtype == np.int8:
            return (self._mean + self._scale * torch.from_numpy(record.reshape(len(record), -1)).float()).reshape(self.shape)
        places = math.prod(self.shape[1:])
        rows = self.shape[0] if self._matrix is None else self._matrix.shape[1]
        q = torch.from_numpy(_integers(_inflate(record), rows * places)).reshape(rows, places)
        x = self._mean + self._scale * q if self._matrix is None else torch.addmm(self._mean, self._matrix, q)
        return x.reshape(self.shape)


def _inflate(record: np.ndarray) -> bytes:
    try:
        return zlib.decompress(record.tobytes())
    except zlib.error as e:
        raise ValueError(str(e)) from e


def _integers(data: bytes, count: int) -> np.ndarray:
    """`count` integers as float32: their low bytes, and behind these their high bytes where one is not zero."""
    if len(data) not in (count, 2 * count):
        raise ValueError(f"{len(data)} bytes for {count} values")
    values = np.frombuffer(data, np.int8).astype(np.float32)
    return values if len(data) == count else values[:count] + 256 * values[count:]


# --- writing ------------------------------------------------------------------------------------------------------------


def _int8(values: Tensor) -> Coded:
    """values (n, C, places): the largest deviation from a channel's mean becomes 127."""
    x = values.float()
    mean = x.mean((0, 2))
    spread = (x - mean[:, None]).abs().amax((0, 2))
    scale = torch.where(spread > 0, spread / 127, 1.0)
    q = ((x - mean[:, None]) / scale[:, None]).round()
    error = (mean[:, None] + scale[:, None] * q - x).square().sum()
    shared = {"mean": mean.numpy(), "scale": scale.numpy()}
    bits = 8 * (x.numel() + _size(shared)) / x.numel()
    return Coded(shared, list(q.to(torch.int8).numpy()), "int8", bits, _decibels(x.var((0, 2)).sum() * len(x) * x.shape[2], error))


def _packed(values: Tensor) -> Coded:
    """values (n, C, places): rotated, rounded and Huffman-coded, with a coarser step until the shard keeps to `MOST_BITS`."""
    sample = _columns(values)
    mean, std = sample.mean(1), sample.std(1, correction=0)
    scale = torch.where(std > 0, std, 1.0)
    normal = (sample - mean[:, None]) / scale[:, None]
    power, axes = torch.linalg.eigh((normal @ normal.T).double() / normal.shape[1])
    power, axes = power.flip(0).clamp(min=0), axes.flip(1).float()
    step, rotated = STEP, _worth_rotating(power, values.numel())
    forward = axes.half().float() if rotated else None
    while True:
        q, noise, signal, step = _rounded(values, mean, scale, forward, step)
        used = max(int(np.flatnonzero(q.any((0, 2)))[-1]) + 1 if q.any() else 1, 1)
        shared = {"mean": mean.numpy(), "scale": (scale if rotated else scale * step).numpy()}
        if forward is not None:
            q = q[:, :used]
            shared["basis"] = (forward[:, :used] * step).half().numpy()
        records = [_deflate(one) for one in q]
        bits = 8 * (sum(map(len, records)) + _size(shared)) / values.numel()
        if bits <= MOST_BITS:
            return Coded(shared, records, "packed", bits, _decibels(signal, noise), step)
        step *= 2 ** (bits - MOST_BITS + 0.02)  # a bit fewer a value for each doubling


def _columns(values: Tensor) -> Tensor:
    """values (n, C, places) -> (C, at most COLUMNS) float32: the places that statistics are taken from."""
    flat = values.transpose(0, 1).flatten(1)
    if flat.shape[1] > COLUMNS:
        flat = flat[:, torch.randperm(flat.shape[1], generator=torch.Generator().manual_seed(0))[:COLUMNS]]
    return flat.float()


def _worth_rotating(power: Tensor, count: int) -> bool:
    """Whether the bits that a rotation saves on `count` values are more than its own matrix takes; `power` (C,) of the axes.

    A Gaussian of variance v rounded to multiples of s takes about log2(2 pi e v / s^2) / 2 bits.
    """
    def bits(variance: Tensor) -> float:
        return float((1 + 2 * math.pi * math.e * variance / STEP**2).log2().mean() / 2)

    used = int((power > STEP**2 / 12).sum())
    return count * (bits(torch.ones_like(power)) - bits(power)) > 16 * len(power) * used


def _rounded(values: Tensor, mean: Tensor, scale: Tensor, forward: Tensor | None, step: float) -> tuple[np.ndarray, float, float, float]:
    """Integers (n, C, places) int16, the squared errors and squares that they stand for (both in standard deviations), and the step."""
    q = np.empty(tuple(values.shape), np.int16)
    noise = signal = 0.0
    for n, x in enumerate(values):
        y = (x.float() - mean[:, None]) / scale[:, None]
        y = y if forward is None else forward.T @ y
        if float(y.abs().max()) > LOUDEST * step:  # not seen in any network: one value thousands of standard deviations out
            return _rounded(values, mean, scale, forward, 1.01 * float(y.abs().max()) / LOUDEST)
        whole = (y / step).round()
        noise += float((y - whole * step).square().sum())
        signal += float(y.square().sum())
        q[n] = whole.numpy()
    return q, noise, signal, step


def _deflate(q: np.ndarray) -> np.ndarray:
    """q (rows, places) int16 -> a zlib stream, as bytes."""
    low = q.astype(np.int8)
    high = ((q - low) >> 8).astype(np.int8)
    coder = zlib.compressobj(6, zlib.DEFLATED, zlib.MAX_WBITS, MEMORY_LEVEL, zlib.Z_RLE)
    data = coder.compress(low.tobytes() + (high.tobytes() if high.any() else b"")) + coder.flush()
    return np.frombuffer(data, np.uint8)


def _size(arrays: Arrays) -> int:
    return sum(a.nbytes for a in arrays.values())


def _decibels(signal: float | Tensor, noise: float | Tensor) -> float | None:
    return 10 * math.log10(float(signal) / float(noise)) if float(noise) > 0 and float(signal) > 0 else None
