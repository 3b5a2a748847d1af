"""The codecs of the cache: their error and rate are what is said of them, on every kind of map, and old records stay readable."""
from __future__ import annotations

import base64
import math
import zlib

import numpy as np
import pytest
import torch
from torch import Tensor

from edgekd.distillation.cache import codec
from edgekd.distillation.cache.codec import Decoder, codec_of, encode


def correlated(n: int = 6, channels: int = 32, side: int = 24, rank: int = 4, seed: int = 0, noise: float = 0.05) -> Tensor:
    """(n, C, side, side): a few sources mixed into all channels, a little noise, means and scales of their own."""
    g = torch.Generator().manual_seed(seed)
    sources = torch.randn(n, rank, side * side, generator=g)
    mixed = torch.randn(channels, rank, generator=g) @ sources + noise * torch.randn(n, channels, side * side, generator=g)
    loud = torch.logspace(-2, 2, channels)[:, None]
    return (loud * (mixed + torch.randn(channels, 1, generator=g))).view(n, channels, side, side).half()


def white(n: int = 4, channels: int = 32, side: int = 24) -> Tensor:
    return torch.randn(n, channels, side, side, generator=torch.Generator().manual_seed(1)).half()


def back(values: Tensor, name: codec.CacheCodec) -> tuple[Tensor, codec.Coded]:
    coded = encode(values, name)
    decode = Decoder(coded.shared, tuple(values.shape[1:]))
    return torch.stack([decode(r).float() for r in coded.records]), coded


def relative(values: Tensor, got: Tensor) -> Tensor:
    """Of every channel: root mean square error over standard deviation."""
    axes = (0, 2, 3)
    return (got - values.float()).square().mean(axes).sqrt() / values.float().std(axes).clamp(min=1e-9)


def size(coded: codec.Coded) -> int:
    return sum(a.nbytes for a in coded.shared.values()) + sum(r.nbytes for r in coded.records)


# --- rate and error -------------------------------------------------------------------------------------------------------


def test_packed__errs_by_the_step_and_no_channel_more_than_another() -> None:
    values = correlated(12)
    got, coded = back(values, "packed")
    assert coded.step == pytest.approx(codec.STEP) and "basis" in coded.shared
    errors = relative(values, got)
    assert float(errors.max()) < 1.3 * codec.STEP / math.sqrt(12), "a uniform error of one step, however loud the channel is"
    assert coded.snr_db == pytest.approx(-20 * math.log10(float((errors.square().mean()).sqrt())), abs=0.5)


def test_packed__spends_what_rate_distortion_theory_says() -> None:
    """Gaussian sources: 0.25 bits over the Shannon bound, and what Huffman codes and the shared tensors take."""
    values = correlated(24, side=32, noise=0.5)
    coded = encode(values, "packed")
    normal = ((values.float() - values.float().mean((0, 2, 3), keepdim=True)) / values.float().std((0, 2, 3), keepdim=True)).transpose(0, 1).flatten(1)
    power = torch.linalg.eigvalsh(normal @ normal.T / normal.shape[1]).clamp(min=1e-9)
    bound = float((power / (codec.STEP**2 / 12)).log2().clamp(min=0).mean() / 2)
    assert bound + 0.2 < coded.bits < bound + 0.5
    assert coded.bits == pytest.approx(8 * size(coded) / values.numel())


@pytest.mark.parametrize("values", [white(), white(1), correlated(1), correlated(2, side=8, channels=64), white(3, 4, 64)], ids=["white", "one", "few", "small", "4 channels"])
def test_packed__keeps_to_its_bits_whatever_it_is_given(values: Tensor) -> None:
    got, coded = back(values, "packed")
    assert 8 * size(coded) / values.numel() <= codec.MOST_BITS + 1e-6
    assert float(relative(values, got).max()) < 0.15


def test_packed__halving_the_step_is_six_decibels_and_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "MOST_BITS", 16.0)
    found = []
    for step in (1 / 8, 1 / 16):
        monkeypatch.setattr(codec, "STEP", step)
        found.append(back(white(), "packed")[1])
    assert found[1].snr_db - found[0].snr_db == pytest.approx(6.02, abs=0.1)  # type: ignore[operator]
    assert found[1].bits - found[0].bits == pytest.approx(1, abs=0.1)


def test_packed__a_rotation_is_kept_only_where_it_pays() -> None:
    assert "basis" in encode(correlated(12), "packed").shared
    assert "basis" not in encode(white(), "packed").shared, "nothing to gain"
    assert "basis" not in encode(correlated(1, 512, 4), "packed").shared, "the matrix is larger than the maps"


def test_int8__is_within_half_a_step_of_every_channel() -> None:
    values = correlated()
    got, coded = back(values.flatten(2), "int8")
    x = values.float().flatten(2)
    spread = (x - x.mean((0, 2), keepdim=True)).abs().amax((0, 2))
    assert float(((got - x).abs().amax((0, 2)) / spread).max()) <= 0.5 / 127 + 1e-3
    assert coded.bits == pytest.approx(8 + 64 / (len(x) * x.shape[2]))


def test_fp16__is_what_it_was() -> None:
    values = correlated()
    got, coded = back(values, "fp16")
    assert torch.equal(got, values.float()) and coded.bits == 16


@pytest.mark.parametrize("name", ["packed", "int8"])
def test_codec__constant_and_dead_channels_come_back(name: codec.CacheCodec) -> None:
    values = correlated(12)
    values[:, 3], values[:, 7] = 5.0, 0.0
    got, _ = back(values if name == "packed" else values.flatten(2), name)
    assert torch.allclose(got[:, 3], torch.tensor(5.0)) and (got[:, 7].abs() < 1e-6).all()
    same, coded = back(torch.full((2, 16, 16, 16), 3.0).half() if name == "packed" else torch.full((2, 16, 256), 3.0).half(), name)
    assert torch.allclose(same, torch.tensor(3.0)) and coded.snr_db is None


def test_packed__values_far_out_need_two_bytes_and_come_back() -> None:
    values = white(2, 16, 64)
    values[1, 5, 7, 7] = 600.0
    got, coded = back(values, "packed")
    assert len(zlib.decompress(coded.records[1].tobytes())) == 2 * values[1].numel()
    assert abs(float(got[1, 5, 7, 7]) - 600) < 60 * codec.STEP
    assert float(relative(values, got).max()) < 0.15


def test_packed__beyond_two_bytes_the_step_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "LOUDEST", 20)
    values = white(2, 16, 64)
    got, coded = back(values, "packed")
    assert coded.step is not None and coded.step > codec.STEP and float((got - values.float()).abs().max()) <= 0.51 * coded.step * 1.1


# --- what is coded --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "shape", "expected"), [
    ("embedding", (128, 16, 16), "packed"), ("encoder.blocks.5", (256, 8, 8), "packed"), ("embedding", (32, 4, 4), "fp16"), ("logits", (1000,), "fp16"),
    ("pooled", (5000,), "fp16"), ("attention3", (8, 256, 256), "fp16"), ("tokens", (197, 768), "fp16"), ("pooled", (5000, 1, 1), "fp16")])
def test_codec_of__only_maps_are_coded(name: str, shape: tuple[int, ...], expected: str) -> None:
    assert codec_of(name, shape, "packed") == expected
    assert codec_of(name, shape, "fp16") == "fp16"


# --- records --------------------------------------------------------------------------------------------------------------


def test_decoder__refuses_damaged_records() -> None:
    values = correlated(12)
    coded = encode(values, "packed")
    decode = Decoder(coded.shared, tuple(values.shape[1:]))
    flipped = coded.records[0].copy()
    flipped[len(flipped) // 2] ^= 1
    for broken in (flipped, coded.records[0][:-5], np.frombuffer(zlib.compress(b"short"), np.uint8)):
        with pytest.raises(ValueError):
            decode(broken)


def test_decoder__reads_what_was_written_at_format_2() -> None:
    """A record of two axes and four channels as it was first written: the format may grow, but this must stay readable."""
    shared = {"mean": np.array([1, -2, 0, 10], np.float32), "scale": np.array([1, 2, 0.5, 100], np.float32),
              "basis": np.array([[0.5, 0.25], [-0.5, 0.25], [0.25, -0.5], [0.125, 0.5]], np.float16)}
    decode = Decoder(shared, (4, 2, 2))
    small = decode(np.frombuffer(base64.b64decode(SMALL), np.uint8))
    q = np.array([[1, -2, 3, 0], [100, -128, 127, 5]], np.float32)
    assert np.array_equal(small.numpy(), (shared["mean"][:, None] + shared["scale"][:, None] * (shared["basis"].astype(np.float32) @ q)).reshape(4, 2, 2))
    large = decode(np.frombuffer(base64.b64decode(LARGE), np.uint8))
    q = np.array([[300, -2, -300, 0], [32639, -32768, 128, -129]], np.float32)
    assert np.array_equal(large.numpy(), (shared["mean"][:, None] + shared["scale"][:, None] * (shared["basis"].astype(np.float32) @ q)).reshape(4, 2, 2))


SMALL = "eAFj/MfMkNJQzwoACycCaw=="
LARGE = "eAHT+XeFoZ6hoZ6R4T9DfQPjfwA3NAZ8"
