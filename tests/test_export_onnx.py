from __future__ import annotations

import gc
import logging
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from edgekd.export import onnx as export_onnx
from edgekd.export.onnx import content_key, exporter, float_graph, quantizable
from tiny import conv_component, expected, linear_component, samples, tiny_sam

from edgekd.errors import EdgekdError, UsageError
from edgekd.models.sam import DecoderShape, components
from edgekd.protocols import Component


def ops(path: Path) -> list[str]:
    return [n.op_type for n in onnx.load(path).graph.node]


def written(component: Component, folder: Path, **options) -> Path:
    path = folder / f"{component.name}.onnx"
    assert exporter.export(component, path, **options) == [path]
    return path


def test_availability_names_the_version():
    found = exporter.availability()
    assert found.ok and found.version and found.version.startswith("onnxruntime ")


def test_missing_packages_are_named_with_the_fix(monkeypatch):
    monkeypatch.setattr(export_onnx, "package_version", lambda name: None if name == "onnxslim" else "1")
    found = exporter.availability()
    assert not found.ok and "onnxslim" in (found.reason or "") and found.fix == "pip install edgekd"


def test_fp32_computes_what_torch_does(tmp_path):
    part = conv_component()
    session = exporter.open(written(part, tmp_path, scheme="fp32"), scheme="fp32", threads=1)
    inputs = samples(part)[0]
    np.testing.assert_allclose(session.run(inputs)["image_embeddings"], expected(part, inputs)[0], atol=1e-5)
    assert session.executed_precision == "fp32"
    assert session.executed_ops and all(isinstance(n, int) for n in session.executed_ops.values())


@pytest.mark.parametrize(("prompts", "points"), [(1, 1), (1, 3), (2, 1), (5, 2), (16, 3), (16, 1), (3, 9)])
def test_the_decoder_is_dynamic_in_prompts_and_points(tmp_path, prompts, points):
    part = components(tiny_sam())["decoder"]
    session = exporter.open(written(part, tmp_path, scheme="fp32"), scheme="fp32", threads=1)
    rng = np.random.default_rng(prompts * 10 + points)
    inputs = {
        "image_embeddings": rng.standard_normal((1, 32, 4, 4)), "point_coords": rng.uniform(0, 64, (prompts, points, 2)),
        "point_labels": rng.integers(-2, 4, (prompts, points)), "mask_input": rng.standard_normal((prompts, 1, 16, 16)),
        "has_mask": rng.integers(0, 2, prompts)}
    inputs = {k: v.astype(np.float32) for k, v in inputs.items()}
    masks, iou = expected(part, inputs)
    out = session.run(inputs)
    assert out["masks"].shape == (prompts, 4, 16, 16) and out["iou"].shape == (prompts, 4)
    np.testing.assert_allclose(out["masks"], masks, atol=1e-4)
    np.testing.assert_allclose(out["iou"], iou, atol=1e-4)


def test_dynamic_axes_carry_their_names():
    graph = float_graph(components(tiny_sam())["decoder"]).graph
    shapes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in [*graph.input, *graph.output]}
    assert shapes["point_coords"] == ["prompts", "points", 2]
    assert shapes["masks"] == ["prompts", 4, 16, 16]


def test_static_int8_really_runs_integers(tmp_path):
    part = conv_component()
    session = exporter.open(written(part, tmp_path, scheme="w8a8_static", calibration=samples(part, 8)), scheme="w8a8_static", threads=1)
    assert session.executed_precision == "int8" and session.executed_ops["QLinearConv"] == 2
    inputs = samples(part)[0]
    ours, theirs = session.run(inputs)["image_embeddings"], expected(part, inputs)[0]
    error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    assert 1e-6 < error < 0.1


def test_symmetric_style_for_devices_that_want_it(tmp_path):
    """TensorRT refuses zero points other than 0 and quantized biases."""
    part = conv_component()
    graph = onnx.load(written(part, tmp_path, scheme="w8a8_static", calibration=samples(part), qdq="s8s8_symmetric")).graph
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    zeros = [constants[n.input[2]] for n in graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert zeros and all(z.dtype == np.int8 and not z.any() for z in zeros)


def test_unsigned_style_by_default(tmp_path):
    part = conv_component()
    graph = onnx.load(written(part, tmp_path, scheme="w8a8_static", calibration=samples(part))).graph
    constants = {t.name: t.data_type for t in graph.initializer}
    assert {constants[n.input[2]] for n in graph.node if n.op_type == "QuantizeLinear"} == {onnx.TensorProto.UINT8}


def test_weights_are_per_channel(tmp_path):
    part = conv_component()
    graph = onnx.load(written(part, tmp_path, scheme="w8a8_static", calibration=samples(part))).graph
    sizes = {t.name: t.dims for t in graph.initializer}
    assert any(list(sizes[n.input[1]]) == [8] for n in graph.node if n.op_type == "DequantizeLinear")


def test_dynamic_int8_on_linear_layers(tmp_path):
    part = linear_component(64)
    path = written(part, tmp_path, scheme="w8_dynamic")
    session = exporter.open(path, scheme="w8_dynamic", threads=1)
    assert session.executed_precision == "int8", session.executed_ops
    inputs = samples(part)[0]
    np.testing.assert_allclose(session.run(inputs)["y"], expected(part, inputs)[0], atol=0.1)


def test_dynamic_int8_of_convolutions_is_refused_not_a_silent_no_op(tmp_path):
    with pytest.raises(EdgekdError, match="nothing to quantize") as e:
        exporter.export(conv_component(), tmp_path / "x.onnx", scheme="w8_dynamic")
    assert "w8a8_static" in (e.value.hint or "")
    assert list(tmp_path.iterdir()) == []


def test_static_without_calibration_is_wrong_usage(tmp_path):
    with pytest.raises(UsageError, match="calibration images"):
        exporter.export(conv_component(), tmp_path / "x.onnx", scheme="w8a8_static")


@pytest.mark.parametrize(("options", "near"), [({"scheme": "w8a8"}, "w8a8_static"), ({"scheme": "fp32", "qdq": "u8u8"}, "u8s8")])
def test_unknown_options_get_the_nearest_name(tmp_path, options, near):
    with pytest.raises(UsageError) as e:
        exporter.export(conv_component(), tmp_path / "x.onnx", **options)
    assert near in (e.value.hint or "")


def test_calibration_may_be_a_stream(tmp_path):
    part, seen = conv_component(), []

    class Stream:
        def __iter__(self):
            for sample in samples(part, 6):
                seen.append(1)
                yield sample

    written(part, tmp_path, scheme="w8a8_static", calibration=Stream())
    assert len(seen) >= 6


def test_prompt_tokens_stay_in_float():
    """In the decoder only what has a fixed length per prompt is quantized statically; the tokens' own layers are not."""
    graph = float_graph(components(tiny_sam())["decoder"])
    static, dynamic = quantizable(graph, dynamic=False), quantizable(graph, dynamic=True)
    assert len(static) > 0 and len(dynamic) > 0
    assert not {n.name for n in graph.graph.node if n.op_type == "Softmax"} & {*static, *dynamic}
    nodes = {n.name: n for n in graph.graph.node}
    shapes = {v.name: v.type.tensor_type.shape.dim for v in [*graph.graph.value_info, *graph.graph.input]}
    assert not any(d.dim_param for name in static for d in list(shapes.get(nodes[name].input[0], []))[1:])


def test_the_same_content_is_captured_once(monkeypatch):
    calls = []
    real = export_onnx._capture
    monkeypatch.setattr(export_onnx, "_graphs", type(export_onnx._graphs)())
    monkeypatch.setattr(export_onnx, "_capture", lambda c: calls.append(c) or real(c))
    float_graph(conv_component())
    float_graph(conv_component())  # another object, the same weights
    assert len(calls) == 1
    changed = conv_component()
    with torch.no_grad():
        next(changed.module.parameters()).add_(1)
    float_graph(changed)
    assert len(calls) == 2


def test_the_key_sees_attributes_and_shapes_too():
    a, b = linear_component(), linear_component()
    assert content_key(a) == content_key(b)
    b.module.scale = 2.0  # what no parameter shows may still change the graph
    assert content_key(a) != content_key(b)
    b.module.scale, a.module.kind, b.module.kind = None, DecoderShape(64), DecoderShape(32)  # a configuration is an attribute like any other
    a.module.scale = None
    assert content_key(a) != content_key(b)
    c = linear_component()
    c.example = {"x": torch.randn(5, 8)}
    assert content_key(a) != content_key(c)


def test_a_caller_cannot_spoil_the_kept_graph():
    first = float_graph(conv_component())
    del first.graph.node[:]
    assert len(float_graph(conv_component()).graph.node) > 0


def test_training_mode_is_refused():
    part = conv_component()
    part.module.train()
    with pytest.raises(EdgekdError, match="training mode"):
        float_graph(part)


def test_what_cannot_be_captured_is_one_error_with_the_reason(tmp_path):
    class Fickle(torch.nn.Module):
        def forward(self, x):
            return x * 2 if float(x.sum()) > 0 else x.flip(0)

    with pytest.raises(EdgekdError, match="cannot be captured") as e:
        exporter.export(Component("head", Fickle().eval(), {"x": torch.randn(2, 2)}, ("y",)), tmp_path / "x.onnx", scheme="fp32")
    assert e.value.where == "head" and "\n" not in e.value.what
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_model_is_one_error(tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"not a model")
    with pytest.raises(EdgekdError, match="cannot open"):
        exporter.open(tmp_path / "x.onnx", scheme="fp32")


def test_nothing_is_left_in_the_temporary_folder_or_the_log(tmp_path, monkeypatch, caplog, capfd):
    float_graph(conv_component())  # torch makes a folder of its own with the first capture of a process
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    out = tmp_path / "out"
    part = conv_component()
    monkeypatch.setattr(export_onnx, "_graphs", type(export_onnx._graphs)())
    with caplog.at_level(logging.WARNING):
        session = exporter.open(written(part, out, scheme="w8a8_static", calibration=samples(part)), scheme="w8a8_static")
        assert session.executed_ops
    kept = Path(next(iter(export_onnx._graphs.values())).name)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([kept.name, "out"]), "the float graph is kept for the next scheme"
    export_onnx._graphs.clear()
    gc.collect()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert capfd.readouterr().out == ""


@pytest.fixture
def small_limit(monkeypatch):
    """Every component counts as one that does not fit into a protobuf message."""
    monkeypatch.setattr(export_onnx, "LARGE", 100)
    monkeypatch.setattr(export_onnx, "_graphs", type(export_onnx._graphs)())


@pytest.mark.parametrize("scheme", ["fp32", "fp16", "w8a8_static"])
def test_weights_of_large_components_lie_beside_the_graph(tmp_path, small_limit, scheme, capfd):
    part = linear_component(256)
    path = tmp_path / "encoder.onnx"
    files = exporter.export(part, path, scheme=scheme, calibration=samples(part))
    assert files == [path, tmp_path / "encoder.onnx.data"] and sorted(tmp_path.iterdir()) == files
    assert capfd.readouterr().out == "", "stdout is for data"
    graph = onnx.load(path, load_external_data=False).graph
    places = {e.value for t in graph.initializer for e in t.external_data if e.key == "location"}
    assert places == {"encoder.onnx.data"}, "the folder can be moved"
    inputs = samples(part)[0]
    session = exporter.open(path, scheme=scheme, threads=1)
    ours, theirs = session.run(inputs)["y"], expected(part, inputs)[0]
    assert np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < {"fp32": 1e-5, "fp16": 1e-2, "w8a8_static": 0.1}[scheme]
    assert session.executed_precision.startswith("int8" if scheme == "w8a8_static" else "fp") and session.executed_ops


def test_large_and_small_graphs_are_the_same_but_for_where_the_weights_are(tmp_path, small_limit, monkeypatch):
    part = components(tiny_sam())["decoder"]
    large = onnx.load(exporter.export(part, tmp_path / "a.onnx", scheme="fp32")[0])
    monkeypatch.setattr(export_onnx, "LARGE", 10**9)
    monkeypatch.setattr(export_onnx, "_graphs", type(export_onnx._graphs)())
    small = onnx.load(exporter.export(part, tmp_path / "b.onnx", scheme="fp32")[0])
    assert [n.op_type for n in large.graph.node] == [n.op_type for n in small.graph.node]
    weights = [{t.name: onnx.numpy_helper.to_array(t) for t in g.graph.initializer} for g in (large, small)]
    assert weights[0].keys() == weights[1].keys() and all(np.array_equal(v, weights[1][k]) for k, v in weights[0].items())


def test_nodes_carry_the_name_of_their_module(tmp_path):
    graph = float_graph(components(tiny_sam())["encoder"]).graph
    modules = {p.value for n in graph.node for p in n.metadata_props if p.key == "module"}
    assert {"squeeze", "neck", "norm"} <= modules


@pytest.mark.parametrize("form,fused", [("none", "Gelu"), ("tanh", "FastGelu")])
def test_a_gelu_is_one_operator_for_onnxruntime(form: str, fused: str, tmp_path: Path) -> None:
    """In the order of factors that torch's exporter writes, onnxruntime does not know it and runs five."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(approximate=form), torch.nn.Linear(8, 8)).eval()
    part = Component("encoder", module, {"x": torch.randn(4, 8)}, ("y",))
    exporter.export(part, tmp_path / "a.onnx", scheme="fp32")
    session = exporter.open(tmp_path / "a.onnx", scheme="fp32")
    with torch.no_grad():
        wanted = module(part.example["x"]).numpy()
    np.testing.assert_allclose(session.run({"x": part.example["x"].numpy()})["y"], wanted, atol=1e-6)
    assert any(op in (fused, "BiasGelu") for op in session.executed_ops) and not {"Erf", "Tanh"} & set(session.executed_ops)
