"""Numbers that carry where they come from: latency quantiles, single values, and the circumstances of both.

A number is `measured` (on a device, with circumstances), `predicted` (by a model of the device) or `quoted` (from a
source that is named). It says which wherever it is shown, so that a quoted figure never passes for a measured one.
"""
from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import Self

Provenance = Literal["measured", "predicted", "quoted"]

# The instruction sets that decide which kernels a runtime picks: the rest of the CPU's flags would only be noise.
TELLING_FLAGS = ("avx", "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "amx_tile",
                 "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve")
PACKAGES = ("edgekd", "torch", "onnx", "onnxruntime", "onnxscript", "openvino", "nncf", "numpy", "coremltools", "executorch", "torchao", "litert-torch",
            "ai-edge-litert", "ai-edge-quantizer", "ncnn", "pnnx", "tensorrt", "tensorrt-rtx", "onnxruntime-qnn", "ethos-u-vela")


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def quantile(ordered: Sequence[float], q: float) -> float:
    """The q-quantile (0..1) of sorted samples, interpolated linearly between neighbours."""
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


class Latency(_Model):
    """A distribution of run times in milliseconds. `n` is the number of samples behind it (0 when not measured here)."""

    p50: float = Field(gt=0)
    p90: float = Field(gt=0)
    p99: float = Field(gt=0)
    mean: float = Field(gt=0)
    min: float = Field(gt=0)
    n: int = Field(ge=0)
    unit: Literal["ms"] = "ms"
    provenance: Provenance = "measured"

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.min <= self.p50 <= self.p90 <= self.p99:
            raise ValueError(f"quantiles out of order: min {self.min}, p50 {self.p50}, p90 {self.p90}, p99 {self.p99}")
        if self.provenance == "measured" and self.n == 0:
            raise ValueError("a measured latency needs samples")
        return self

    @classmethod
    def from_samples(cls, samples: Iterable[float], *, provenance: Provenance = "measured") -> Latency:
        """Quantiles of samples in milliseconds.

        Raises:
            ValueError: no samples, or one that is not a positive number.
        """
        ordered = sorted(float(s) for s in samples)
        if not ordered:
            raise ValueError("no samples")
        if not all(math.isfinite(s) and s > 0 for s in ordered):
            raise ValueError(f"latency samples must be positive numbers, got {ordered[0]} .. {ordered[-1]}")
        return cls(p50=quantile(ordered, 0.5), p90=quantile(ordered, 0.9), p99=quantile(ordered, 0.99), min=ordered[0],
                   mean=math.fsum(ordered) / len(ordered), n=len(ordered), provenance=provenance)


class Circumstances(_Model):
    """Under what a number was taken. Two numbers with different circumstances are not compared without saying so."""

    device: str
    cpu_flags: list[str] = []
    os: str
    python: str
    versions: dict[str, str] = {}
    threads: int | None = None
    precision_executed: str | None = None
    date: str
    load_average: float | None = None
    warmup: int | None = None
    repeats: int | None = None
    soc: str | None = None
    governor: str | None = None
    """Of the CPU's clock: `performance`, `schedutil`, ..."""
    clock_mhz: tuple[float, float] | None = None
    """Of the fastest core, before and after."""
    power_mode: str | None = None
    """Of a Jetson (`nvpmodel`): `MAXN`, `15W`."""
    temperature_c: tuple[float, float] | None = None
    """Of the hottest sensor, before and after."""
    throttled: list[str] = []
    """What slowed the device down while it was measured, in words; empty when nothing was seen."""

    @classmethod
    def capture(cls, *, threads: int | None = None, precision_executed: str | None = None, warmup: int | None = None,
                repeats: int | None = None, packages: Sequence[str] = PACKAGES) -> Circumstances:
        """The circumstances here and now; packages that are not installed are left out."""
        device, flags = cpu()
        return cls(device=device, cpu_flags=flags, os=platform.platform(terse=True), python=platform.python_version(),
                   versions=installed(packages), threads=threads, precision_executed=precision_executed,
                   date=datetime.now(timezone.utc).isoformat(timespec="seconds"), load_average=_load_average(),
                   warmup=warmup, repeats=repeats)


class Measurement(_Model):
    """One number other than a latency (bytes, a ratio, an accuracy), with its origin.

    A measured one has circumstances; a quoted one names its source.
    """

    quantity: str
    value: float
    unit: str
    provenance: Provenance = "measured"
    circumstances: Circumstances | None = None
    source: str | None = None

    @model_validator(mode="after")
    def _has_origin(self) -> Self:
        if self.provenance == "measured" and self.circumstances is None:
            raise ValueError(f"measured {self.quantity} has no circumstances")
        if self.provenance == "quoted" and not self.source:
            raise ValueError(f"quoted {self.quantity} names no source")
        return self


def installed(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """package -> installed version, without importing any of them."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, list[str]]:
    """The processor's name with its core count, and its telling instruction sets."""
    model, flags = platform.processor() or platform.machine(), set[str]()
    try:
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model"):
                model = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
    except OSError:
        pass  # not Linux: the platform's own name must do
    return f"{model} ({os.cpu_count()} cores)", [f for f in TELLING_FLAGS if f in flags]


def _load_average() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
