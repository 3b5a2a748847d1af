from __future__ import annotations

import builtins
from pathlib import Path

import numpy as np
import pytest
from edgekd.export import onnx as export_onnx
from edgekd.export import openvino as export_openvino
from edgekd.export.openvino import exporter
from tiny import conv_component, expected, linear_component, samples, tiny_sam

from edgekd.errors import EdgekdError, UsageError
from edgekd.models.sam import components
from edgekd.protocols import Component

openvino = pytest.importorskip("openvino")
BF16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
needs_bf16 = pytest.mark.skipif(not BF16, reason="this CPU has no bf16 arithmetic")


def written(component: Component, folder: Path, **options) -> Path:
    path = folder / f"{component.name}.xml"
    assert exporter.export(component, path, **options) == [path, path.with_suffix(".bin")]
    return path


def test_availability_names_the_version():
    found = exporter.availability()
    assert found.ok and found.version and found.version.startswith("openvino ")


def test_missing_openvino_is_told_with_the_command_that_mends_it(monkeypatch, tmp_path):
    monkeypatch.setattr(export_openvino, "package_version", lambda name: None)
    found = exporter.availability()
    assert not found.ok and "openvino" in (found.reason or "") and found.fix == 'pip install "edgekd[openvino]"'
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name == "openvino":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(EdgekdError) as e:
        exporter.export(conv_component(), tmp_path / "x.xml", scheme="fp32")
    assert e.value.hint == found.fix


def test_fp32_is_executed_in_fp32_on_every_machine(tmp_path):
    """Without the hint, CPUs with bf16 units would run bf16 without a word."""
    part = conv_component()
    session = exporter.open(written(part, tmp_path, scheme="fp32"), scheme="fp32", threads=1)
    assert session.executed_precision == "fp32"
    assert {k.split(":")[0] for k in session.executed_ops} >= {"Convolution"}
    inputs = samples(part)[0]
    np.testing.assert_allclose(session.run(inputs)["image_embeddings"], expected(part, inputs)[0], atol=1e-5)


@needs_bf16
def test_bf16_is_read_back_from_the_runtime(tmp_path):
    part = conv_component()
    session = exporter.open(written(part, tmp_path, scheme="bf16"), scheme="bf16", threads=1)
    assert session.executed_precision == "bf16" and any(k == "Convolution:bf16" for k in session.executed_ops)
    inputs = samples(part)[0]
    ours, theirs = session.run(inputs)["image_embeddings"], expected(part, inputs)[0]
    assert 1e-5 < np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 0.05


def test_bf16_is_refused_where_the_cpu_has_none(tmp_path, monkeypatch):
    class Core:
        def get_property(self, device, name):
            return ["FP32", "INT8"]

    monkeypatch.setattr(openvino, "Core", Core)
    for act in (lambda: exporter.export(conv_component(), tmp_path / "x.xml", scheme="bf16"), lambda: exporter.open(tmp_path / "x.xml", scheme="bf16")):
        with pytest.raises(EdgekdError, match=r"no bf16 arithmetic.*FP32, INT8"):
            act()


def test_static_int8_really_runs_integers(tmp_path, capfd):
    part = conv_component()
    session = exporter.open(written(part, tmp_path, scheme="w8a8_static", calibration=samples(part, 8)), scheme="w8a8_static", threads=1)
    assert session.executed_precision.startswith("int8"), session.executed_ops
    inputs = samples(part)[0]
    ours, theirs = session.run(inputs)["image_embeddings"], expected(part, inputs)[0]
    assert np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 0.1
    assert capfd.readouterr().out == "", "stdout is for data: NNCF's progress must not reach it"


@pytest.mark.parametrize(("prompts", "points"), [(1, 1), (5, 2), (16, 3)])
def test_the_decoder_is_dynamic_in_prompts_and_points(tmp_path, prompts, points):
    part = components(tiny_sam())["decoder"]
    session = exporter.open(written(part, tmp_path, scheme="fp32"), scheme="fp32", threads=1)
    rng = np.random.default_rng(prompts)
    inputs = {
        "image_embeddings": rng.standard_normal((1, 32, 4, 4)), "point_coords": rng.uniform(0, 64, (prompts, points, 2)),
        "point_labels": rng.integers(-2, 4, (prompts, points)), "mask_input": rng.standard_normal((prompts, 1, 16, 16)),
        "has_mask": rng.integers(0, 2, prompts)}
    inputs = {k: v.astype(np.float32) for k, v in inputs.items()}
    out = session.run(inputs)
    np.testing.assert_allclose(out["masks"], expected(part, inputs)[0], atol=1e-4)
    np.testing.assert_allclose(out["iou"], expected(part, inputs)[1], atol=1e-4)


def test_outputs_are_the_callers_own(tmp_path):
    part = linear_component()
    session = exporter.open(written(part, tmp_path, scheme="fp32"), scheme="fp32", threads=1)
    a, b = samples(part, 2)
    first = session.run(a)["y"]
    kept = first.copy()
    session.run(b)
    np.testing.assert_array_equal(first, kept)


def test_weights_are_not_halved_behind_ones_back(tmp_path):
    part = linear_component(64)
    path = written(part, tmp_path, scheme="fp32")
    assert path.with_suffix(".bin").stat().st_size >= 4 * sum(p.numel() for p in part.module.parameters())


def test_only_the_two_files_are_left(tmp_path):
    written(conv_component(), tmp_path, scheme="fp32")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["encoder.bin", "encoder.xml"]


def test_static_without_calibration_is_wrong_usage(tmp_path):
    with pytest.raises(UsageError, match="calibration images"):
        exporter.export(conv_component(), tmp_path / "x.xml", scheme="w8a8_static")


def test_unknown_scheme_gets_the_nearest_name(tmp_path):
    with pytest.raises(UsageError) as e:
        exporter.export(conv_component(), tmp_path / "x.xml", scheme="bf-16")
    assert "bf16" in (e.value.hint or "")


def test_a_file_that_is_no_model_is_one_error(tmp_path):
    (tmp_path / "x.xml").write_text("not a model")
    with pytest.raises(EdgekdError, match="cannot open"):
        exporter.open(tmp_path / "x.xml", scheme="fp32")


def test_large_components_are_read_from_a_graph_with_its_weights_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(export_onnx, "LARGE", 100)
    monkeypatch.setattr(export_onnx, "_graphs", type(export_onnx._graphs)())
    part = conv_component()
    session = exporter.open(written(part, tmp_path, scheme="fp32"), scheme="fp32", threads=1)
    inputs = samples(part)[0]
    np.testing.assert_allclose(session.run(inputs)["image_embeddings"], expected(part, inputs)[0], atol=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["encoder.bin", "encoder.xml"]
