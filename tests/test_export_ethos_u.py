from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from edgekd.export import ethos_u as export_ethos_u
from edgekd.export.ethos_u import Npu, exporter
from tiny import conv_component, expected, samples

from edgekd.errors import CannotTake, EdgekdError, UsageError
from edgekd.protocols import Component, package_version

missing = [p for p in ("litert-torch", "ai-edge-quantizer", "ai-edge-litert", "ethos-u-vela") if not package_version(p)]
pytestmark = pytest.mark.skipif(bool(missing), reason='vela or LiteRT is not installed here: pip install "edgekd[ethos-u]"')


@pytest.fixture(scope="module")
def encoder() -> Component:
    return conv_component()


@pytest.fixture(scope="module")
def written(encoder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ethos")
    path = folder / "encoder_vela.tflite"
    files = exporter.export(encoder, path, scheme="w8a8_static", calibration=samples(encoder, 8))
    assert [f.name for f in files] == ["encoder_vela.tflite", "encoder.tflite", "encoder_vela.csv"]
    assert sorted(p.name for p in folder.iterdir()) == sorted(f.name for f in files), "nothing else is left"
    return path


def test_it_is_built_and_estimates_are_marked_as_predicted(encoder, written, capfd):
    found = exporter.check(encoder, written, scheme="w8a8_static")
    assert found.state == "built" and found.precision == "int8" and found.ops["CONV_2D:i8"] == 2 and found.ops["CUSTOM:npu"] >= 1
    about = found.details
    assert about["provenance"] == "predicted" and about["accelerator"] == "Ethos_U85_512" and about["system_config"] == "Ethos_U85_SYS_DRAM_Mid"
    assert about["inference_ms"] == pytest.approx(about["cycles_total"] / about["core_clock_hz"] * 1e3)
    assert about["cycles_npu"] > 0 and about["sram_kib"] > 0 and about["macs"] > 10_000
    assert about["cpu_operators"] == {"QUANTIZE": 1, "DEQUANTIZE": 1} and "CPU" in about["not_included"]
    assert found.ops["QUANTIZE (on the CPU):i8"] == 1 and "2 operators left to the CPU" in found.how
    assert capfd.readouterr().out == "", "stdout is for data"


def test_the_stand_in_computes_the_int8_file(encoder, written):
    session = exporter.stand_in(written, scheme="w8a8_static", threads=1)
    assert "int8" in session.stand_in_for and session.executed_precision == "int8"
    inputs = samples(encoder, 8)[0]
    got, wanted = session.run(inputs)["image_embeddings"], expected(encoder, inputs)[0]
    assert 0 < np.linalg.norm(got - wanted) / np.linalg.norm(wanted) < 0.1
    with pytest.raises(EdgekdError, match="on the device only"):
        exporter.open(written, scheme="w8a8_static")


def test_another_accelerator_gives_other_estimates(encoder, written, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEKD_ETHOS_U", "ethos-u55-128")
    path = tmp_path / "encoder_vela.tflite"
    exporter.export(encoder, path, scheme="w8a8_static", calibration=samples(encoder, 8))
    small, large = (exporter.check(encoder, p, scheme="w8a8_static").details for p in (path, written))
    assert small["accelerator"] == "Ethos_U55_128" and small["memory_mode"] == "Shared_Sram" and small["inference_ms"] != large["inference_ms"]


def test_what_vela_refuses_is_told_and_leaves_nothing(encoder, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEKD_ETHOS_U", "ethos-u85-512,No_Such_System,Dedicated_Sram_384KB")
    with pytest.raises(EdgekdError, match="No_Such_System") as e:
        exporter.export(encoder, tmp_path / "encoder_vela.tflite", scheme="w8a8_static", calibration=samples(encoder, 4))
    assert e.value.where == "encoder" and list(tmp_path.iterdir()) == []
    monkeypatch.setenv("EDGEKD_ETHOS_U", "ethos-u85-7,Ethos_U85_SYS_DRAM_Mid,Dedicated_Sram_384KB")
    with pytest.raises(EdgekdError, match="ethos-u85-7"):
        exporter.export(encoder, tmp_path / "encoder_vela.tflite", scheme="w8a8_static", calibration=samples(encoder, 4))


def test_npus_are_named_in_velas_words():
    assert Npu.parse("ethos-u65-512") == Npu("ethos-u65-512", "Ethos_U65_High_End", "Dedicated_Sram")
    assert Npu.parse("ethos-u55-64, A, B") == Npu("ethos-u55-64", "A", "B")
    for wrong in ("cortex-m4", "ethos-u55-64,A"):
        with pytest.raises(UsageError):
            Npu.parse(wrong)


def test_a_damaged_table_is_told(encoder, written, tmp_path):
    for file in written.parent.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "encoder_vela.csv").write_text("a,b\n1,2\n")
    with pytest.raises(EdgekdError, match="table of estimates cannot be read"):
        exporter.check(encoder, tmp_path / "encoder_vela.tflite", scheme="w8a8_static")


def test_calibration_and_scheme_are_asked_for(encoder, tmp_path):
    with pytest.raises(UsageError, match="needs calibration") as e:
        exporter.export(encoder, tmp_path / "x_vela.tflite", scheme="w8a8_static")
    assert e.value.exit_code == 2 and isinstance(e.value, CannotTake), "another component than the encoder goes to the CPU's format instead"
    with pytest.raises(UsageError, match="unknown ethos_u scheme"):
        exporter.export(encoder, tmp_path / "x_vela.tflite", scheme="fp32", calibration=[])


def test_availability_never_says_that_it_runs(monkeypatch):
    found = exporter.availability()
    assert found.ok and not found.runs and found.version and found.version.startswith("vela ")
    monkeypatch.setattr(export_ethos_u, "package_version", lambda name: None if name == "ethos-u-vela" else "1")
    found = exporter.availability()
    assert not found.ok and not found.runs and "ethos-u-vela" in (found.reason or "") and found.fix == 'pip install "edgekd[ethos-u]"'
