"""Rooflines: what is known of devices never measured, and the published figures that they are held against."""
from __future__ import annotations

import math

import latency_samples as samples
import pytest

from edgekd import target as targets
from edgekd.errors import UsageError
from edgekd.latency import quoted, roofline
from edgekd.latency.operators import Operator
from edgekd.target import Roofline

ROOF = Roofline(unit="GPU", gflops={"fp32": 1000, "fp16": 4000}, gb_per_s=100, efficiency=0.5, source="made up for this test")


def test_predict__takes_the_longer_of_arithmetic_and_traffic() -> None:
    bound, moved = samples.conv(256, 256, 32), samples.add(64, 64)
    assert roofline.predict_ms([bound], ROOF) == pytest.approx(2 * bound.macs / 500e9 * 1e3)
    copied = Operator("Transpose", inputs=moved.inputs[:1], outputs=moved.outputs)
    assert roofline.predict_ms([copied], ROOF) == pytest.approx(2 * 4 * 64**3 / 75e9 * 1e3)
    assert roofline.predict_ms([moved], ROOF) == 0.0, "what compilers join to the operator before it"


def test_predict__precision_counts_and_a_missing_one_falls_to_the_nearest() -> None:
    bound = [samples.conv(256, 256, 32)]
    whole, half = roofline.predict_ms(bound, ROOF), roofline.predict_ms(bound, ROOF, "fp16")
    assert half == pytest.approx(whole / 4) and roofline.predict_ms(bound, ROOF, "int8") == half


@pytest.mark.parametrize(("scheme", "precision"), [("fp32", "fp32"), ("fp16", "fp16"), ("bf16", "fp16"), ("w8a8_static", "int8"), ("w8a8_qat", "int8"),
                                                   ("w8_dynamic", "int8"), ("w4_weight_only", "fp32")])
def test_precision_of_schemes(scheme: str, precision: str) -> None:
    assert roofline.precision_of(scheme) == precision


def test_of_cpu__follows_instruction_sets_and_threads() -> None:
    one, four = (roofline.of_cpu("x86_64+avx512+vnni", n) for n in (1, 4))
    assert four.gflops["fp32"] == 4 * one.gflops["fp32"] and one.gflops["int8"] == 4 * one.gflops["fp32"]
    assert roofline.of_cpu("aarch64+asimd", 1).gflops["fp32"] < one.gflops["fp32"]


def test_of_target__only_for_formats_that_run_there() -> None:
    jetson, host = targets.resolve("jetson_orin_nano"), targets.resolve("host")
    assert roofline.of_target(jetson, "jetson_orin_nano", "tensorrt", 1) is jetson.roofline
    assert roofline.of_target(jetson, "jetson_orin_nano", "onnx", 1) is None
    assert roofline.of_target(targets.resolve("pixel_8"), "pixel_8", "litert", 1) is None
    assert roofline.of_target(host, "x86_64+avx2", "onnx", 2) is not None


def test_targets__rooflines_name_their_source_and_formats_of_theirs() -> None:
    found = {name: roof for name in targets.names() if (roof := targets.resolve(name).roofline) is not None}
    assert {"jetson_orin_nano", "jetson_agx_orin", "raspberry_pi_5"} <= set(found)
    for name, roof in found.items():
        assert len(roof.source) > 20 and set(roof.formats) <= set(targets.resolve(name).formats) and all(v > 0 for v in roof.gflops.values())


def test_target__a_wrong_roofline_is_told_of(tmp_path: object) -> None:
    from pathlib import Path

    path = Path(str(tmp_path)) / "mine.yaml"
    path.write_text("description: mine\ndevice: {transport: local, how: x}\nformats: {onnx: {schemes: [fp32]}}\nroofline: {unit: CPU, gflops: {fp64: 1}, gb_per_s: 0, source: x}\n")
    with pytest.raises(UsageError) as e:
        targets.resolve(path)
    assert "roofline" in str(e.value) and "gb_per_s" in str(e.value)


def test_quoted__rows_keep_their_source_and_are_never_measured() -> None:
    rows = quoted.compare()
    assert len(rows) == len(quoted.ROWS) >= 12
    for row in rows:
        assert row["provenance"] == "quoted" and row["source"] and row["quoted_ms"] > 0
        assert row["error"] == pytest.approx(row["predicted_ms"] / row["quoted_ms"] - 1, abs=2e-3)
        assert row["inside"] == (row["low_ms"] <= row["quoted_ms"] <= row["high_ms"])
    told = {(r["network"], r["device"], r["covers"]): r["quoted_ms"] for r in rows}
    assert told["edge_sam", "iphone_14", "encoder+decoder"] == pytest.approx(1000 / 38.7, abs=1e-3)
    assert told["nanosam", "jetson_agx_orin", "encoder"] == 4.2 and told["efficientvit_sam_xl1", "jetson_agx_orin", "encoder"] == 37.2


@pytest.mark.parametrize(("name", "gmacs"), [("edge_sam-1024", 20.05), ("mobile_sam-1024", 38.8), ("efficientvit_sam_l0-512", 34.8), ("efficientvit_sam_xl1-1024", 321.9)])
def test_quoted__networks_do_the_published_work(name: str, gmacs: float) -> None:
    """The work that the authors, or a count of their code, name: within a tenth, since counts differ in what they leave out."""
    assert math.isclose(sum(o.macs for o in quoted.networks()[name]) / 1e9, gmacs, rel_tol=0.1)
