from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from edgekd.measurement import Circumstances, Latency, Measurement, cpu, installed, quantile


def test_quantiles_of_known_samples():
    latency = Latency.from_samples(range(1, 102))
    assert (latency.p50, latency.p90, latency.p99, latency.mean, latency.min, latency.n) == (51, 91, 100, 51, 1, 101)
    assert latency.unit == "ms" and latency.provenance == "measured"


@pytest.mark.parametrize(("samples", "q", "value"), [([3.0], 0.99, 3.0), ([1.0, 2.0], 0.5, 1.5), ([1.0, 2.0, 4.0], 0.75, 3.0), ([1.0, 2.0], 1.0, 2.0)])
def test_quantile_interpolates(samples, q, value):
    assert quantile(samples, q) == value


def test_order_of_samples_does_not_matter():
    assert Latency.from_samples([5, 1, 3]) == Latency.from_samples([1, 3, 5])


@pytest.mark.parametrize("samples", [[], [1.0, math.nan], [1.0, math.inf], [0.0], [-1.0, 2.0]])
def test_bad_samples_are_refused(samples):
    with pytest.raises(ValueError):
        Latency.from_samples(samples)


def test_quantiles_out_of_order_are_refused():
    with pytest.raises(ValidationError, match="out of order"):
        Latency(p50=3, p90=2, p99=4, mean=3, min=1, n=10)


def test_measured_without_samples_is_refused_but_quoted_is_not():
    with pytest.raises(ValidationError, match="needs samples"):
        Latency(p50=1, p90=1, p99=1, mean=1, min=1, n=0)
    assert Latency(p50=1, p90=1, p99=1, mean=1, min=1, n=0, provenance="quoted").provenance == "quoted"


def test_latency_round_trips_through_json():
    latency = Latency.from_samples([1.5, 2.5])
    assert Latency.model_validate_json(latency.model_dump_json()) == latency


def test_unknown_keys_are_refused():
    with pytest.raises(ValidationError):
        Latency(p50=1, p90=1, p99=1, mean=1, min=1, n=1, p95=1)


def test_circumstances_say_where_and_when():
    c = Circumstances.capture(threads=2, precision_executed="int8", warmup=3, repeats=30)
    assert c.device and c.os and c.python.count(".") == 2 and c.date.endswith("+00:00")
    assert (c.threads, c.precision_executed, c.warmup, c.repeats) == (2, "int8", 3, 30)
    assert c.versions["numpy"]
    assert Circumstances.model_validate_json(c.model_dump_json()) == c


def test_versions_leave_out_what_is_not_installed():
    assert "no-such-package-at-all" not in installed(["numpy", "no-such-package-at-all"])


@pytest.mark.parametrize(("text", "name", "flags"), [
    ("model name\t: Fast CPU\nflags\t\t: fpu avx2 avx512_vnni amx_bf16\n", "Fast CPU", ["avx2", "avx512_vnni", "amx_bf16"]),
    ("Features\t: fp asimd asimddp\nModel\t\t: Some Board 5\n", "Some Board 5", ["asimd", "asimddp"]),
])
def test_cpu_is_read_on_x86_and_arm(tmp_path, text, name, flags):
    (tmp_path / "cpuinfo").write_text(text)
    device, found = cpu(tmp_path / "cpuinfo")
    assert device.startswith(name) and "cores" in device and found == flags


def test_cpu_without_cpuinfo(tmp_path):
    device, flags = cpu(tmp_path / "missing")
    assert device and flags == []


def test_a_number_never_travels_without_its_origin():
    with pytest.raises(ValidationError, match="no circumstances"):
        Measurement(quantity="peak_memory", value=1, unit="bytes")
    with pytest.raises(ValidationError, match="no source"):
        Measurement(quantity="peak_memory", value=1, unit="bytes", provenance="quoted")
    Measurement(quantity="speed", value=38.7, unit="fps", provenance="quoted", source="arXiv 2312.06660, table 1")
    Measurement(quantity="size", value=1, unit="bytes", circumstances=Circumstances.capture())
