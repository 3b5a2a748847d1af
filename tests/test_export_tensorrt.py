"""TensorRT: what is written, what NVIDIA's parser and compiler say of it, what is asked of the device and read from there. No GPU is needed."""
from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from edgekd.export import _tensorrt_build as building
from edgekd.export import _tensorrt_graph as graphs
from edgekd.export import _trtexec as trtexec
from edgekd.export import tensorrt as format
from edgekd.export._tensorrt_mixed import LEAST_SCALE, float_weights
from edgekd.export._tensorrt_run import pieces
from edgekd.export.onnx import exporter as onnx_exporter
from edgekd.export.onnx import float_file
from edgekd.export.tensorrt import exporter
from PIL import Image
from tiny import conv_component, expected, samples, tiny_sam
from torch import nn

from edgekd import artifact
from edgekd.errors import EdgekdError, UsageError
from edgekd.exporting import export_model
from edgekd.models.sam import components
from edgekd.protocols import Component, package_version
from edgekd.runtime import open_artifact
from edgekd.tasks.promptable.predict import predict_file
from edgekd.tuning import Tuning

CONSUMER = Path(__file__).resolve().parents[1] / "examples/consumers/tensorrt_click.py"
STATIC = ("w8a8_static", "fp8_static")


def inputs_of(component: Component, count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Random inputs; prompts with labels and places that there are."""
    found, rng = samples(component, count, seed), np.random.default_rng(seed)
    for one in found if component.name == "decoder" else []:
        one["point_coords"] = rng.uniform(0, 64, one["point_coords"].shape).astype(np.float32)
        one["point_labels"] = rng.integers(-2, 4, one["point_labels"].shape).astype(np.float32)
        one["has_mask"] = rng.integers(0, 2, one["has_mask"].shape).astype(np.float32)
    return found


@pytest.fixture
def rtx() -> Any:
    """NVIDIA's compiler for desktop GPUs: the same parser, and it needs no GPU."""
    if package_version(format.RTX) is None:
        pytest.skip('tensorrt-rtx is not installed: pip install "edgekd[tensorrt]"')
    return building.load("tensorrt_rtx")


@pytest.fixture
def without_rtx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(format, "package_version", lambda name: None if name == format.RTX else package_version(name))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`written(name, scheme)`: a component of the tiny model and its file, exported once."""
    folder, parts = tmp_path_factory.mktemp("tensorrt"), components(tiny_sam())

    @functools.cache
    def one(name: str, scheme: str) -> tuple[Component, Path]:
        path = folder / scheme / f"{name}.onnx"
        files = exporter.export(parts[name], path, scheme=scheme, calibration=inputs_of(parts[name], 3))
        assert files == [path, path.with_suffix(".build.json"), path.with_suffix(".build_engine.sh")]
        assert exporter.files(path) == files and sorted(path.parent.glob(f"{name}.*")) == sorted(files)
        assert not list(path.parent.glob(".*"))
        return parts[name], path

    return one


def error(component: Component, path: Path, scheme: str) -> float:
    """Relative error of a file in its stand-in."""
    inputs = inputs_of(component, 1, seed=9)[0]
    got = list(exporter.stand_in(path, scheme=scheme, threads=1).run(inputs).values())
    return max(float(np.linalg.norm(g - w) / np.linalg.norm(w)) for g, w in zip(got, expected(component, inputs), strict=True))


# --- what is written


@pytest.mark.parametrize("name", ["encoder", "decoder"])
@pytest.mark.parametrize(("scheme", "least", "most"), [("fp32", 0, 1e-5), ("fp16", 1e-5, 5e-3), ("w8a8_static", 1e-3, 0.06), ("fp8_static", 1e-2, 0.16)])
def test_a_file_computes_what_torch_does(written: Any, name: str, scheme: str, least: float, most: float) -> None:
    """Also that eight bits are less than sixteen: an error of nothing would mean that nothing was quantized."""
    assert least <= error(*written(name, scheme), scheme) < most


@pytest.mark.parametrize(("scheme", "precision"), [("fp32", "fp32"), ("fp16", "fp16"), ("w8a8_static", "int8"), ("fp8_static", "fp8")])
def test_precision_is_read_from_the_file(written: Any, scheme: str, precision: str) -> None:
    encoder = graphs.inside(written("encoder", scheme)[1])
    assert encoder.precision == precision and encoder.arithmetic == {"i8" if precision == "int8" else precision: 7}
    found = graphs.inside(written("decoder", scheme)[1])
    assert found.precision.split("+")[0] == precision and (found.quantize > 0) == (scheme in STATIC)


def test_what_is_between_eight_bit_layers_is_fp16_and_positions_are_not(written: Any) -> None:
    path = written("decoder", "w8a8_static")[1]
    found = graphs.inside(path)
    assert found.precision == "int8+fp16+fp32" and found.arithmetic["fp16"] > found.arithmetic["fp32"] == 1
    assert exporter.stand_in(path, scheme="w8a8_static").kept_fp32 == found.kept_fp32 == {"prompt_encoder.pe_layer": "angles of a position code"}


@pytest.mark.parametrize("scheme", format.SCHEMES)
def test_inputs_and_outputs_are_float32_and_named_as_the_component_has_them(written: Any, scheme: str) -> None:
    component, path = written("decoder", scheme)
    graph = onnx.load(path).graph
    assert [v.name for v in graph.input] == list(component.example) and tuple(v.name for v in graph.output) == component.outputs
    assert {v.type.tensor_type.elem_type for v in [*graph.input, *graph.output]} == {onnx.TensorProto.FLOAT}


@pytest.mark.parametrize("scheme", format.SCHEMES)
def test_files_keep_onnx_rules(written: Any, scheme: str) -> None:
    """The converter to fp16 leaves casts behind their readers, which onnx forbids."""
    for name in ("encoder", "decoder"):
        onnx.checker.check_model(str(written(name, scheme)[1]), full_check=True)


@pytest.mark.parametrize("scheme", STATIC)
def test_quantization_is_what_tensorrt_takes(written: Any, scheme: str) -> None:
    _, path = written("encoder", scheme)
    graph = onnx.load(path).graph
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    nodes = [n for n in graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert nodes and all(not constants[n.input[2]].astype(np.float32).any() for n in nodes)
    assert {constants[n.input[2]].dtype.name for n in nodes} == {"int8" if scheme == "w8a8_static" else "float8_e4m3fn"}
    assert any(constants[n.input[1]].size > 1 for n in nodes), "weights are per channel"
    graphs.refuse_unsound(path)


def test_fp8_weights_are_rounded_from_floats_not_from_integers(written: Any) -> None:
    """A weight near zero is nothing in int8 and a number in fp8."""
    component, path = written("encoder", "fp8_static")
    tensors = {t.name: onnx.numpy_helper.to_array(t).astype(np.float32) for t in onnx.load(path).graph.initializer}
    floats = float_weights(float_file(component))
    found = {name: value for name, value in tensors.items() if name.endswith("_quantized") and value.ndim == 4 and value.size > 500}
    assert found
    for name, value in found.items():
        weight, scale = floats[name.removesuffix("_quantized")], tensors[name.replace("_quantized", "_scale")].reshape(-1, 1, 1, 1)
        normal = abs(weight) > 2**-6 * scale
        assert np.median(abs(value * scale - weight)[normal] / abs(weight)[normal]) < 0.04, "half a place of E4M3 is 1/16"
        assert abs(value).max() == pytest.approx(448, rel=0.07)


def constants_of(path: Path, ends: str) -> dict[str, np.ndarray]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer if t.name.endswith(ends)}


@pytest.mark.parametrize("scheme", STATIC)
def test_a_channel_next_to_nothing_is_rounded_by_a_scale_that_fp16_holds(tmp_path: Path, scheme: str) -> None:
    """As folding a batch norm leaves them. fp16's nearest would be off by far more than the eight bits are, or 0."""
    part = conv_component()
    with torch.no_grad():
        weight = next(part.module.parameters())
        weight[0].mul_(1e-4)
        weight[1].mul_(1e-12)
    path = tmp_path / "encoder.onnx"
    exporter.export(part, path, scheme=scheme, calibration=samples(part))
    scales, values = constants_of(path, "0.weight_scale")["0.weight_scale"], constants_of(path, "0.weight_quantized")["0.weight_quantized"].astype(np.float32)
    assert scales.dtype == np.float16 and (scales > 0).all() and scales.min() == np.float16(2**-24)
    error = abs(values[0] * scales[0].astype(np.float32) - weight.detach().numpy()[0]).max() / abs(weight[0]).max().item()
    assert 0 < error < (0.01 if scheme == "w8a8_static" else 0.07)
    assert exporter.stand_in(path, scheme=scheme).kept_fp32 == {} and graphs.inside(path).precision == {"w8a8_static": "int8", "fp8_static": "fp8"}[scheme]


def test_an_activation_whose_scale_fp16_cannot_hold_keeps_its_layers(tmp_path: Path) -> None:
    part = conv_component()
    with torch.no_grad():
        for parameter in list(part.module.parameters())[:2]:
            parameter.mul_(1e-5)
    path = tmp_path / "encoder.onnx"
    exporter.export(part, path, scheme="w8a8_static", calibration=samples(part))
    small = [v for v in constants_of(path, "_scale").values() if v.min() < LEAST_SCALE and v.ndim == 0]
    assert small and all(v.dtype == np.float32 for v in small)
    assert set(exporter.stand_in(path, scheme="w8a8_static").kept_fp32.values()) == {"a scale of its 8-bit values is below 8e-06"}
    assert error(part, path, "w8a8_static") < 0.1


def test_overflowing_layers_of_a_quantized_graph_stay_in_fp32(tmp_path: Path) -> None:
    part = conv_component()
    with torch.no_grad():
        next(part.module.parameters()).mul_(1e6)
    path = tmp_path / "encoder.onnx"
    exporter.export(part, path, scheme="w8a8_static", calibration=samples(part))
    session = exporter.stand_in(path, scheme="w8a8_static")
    assert session.kept_fp32 and error(part, path, "w8a8_static") < 0.1


@pytest.mark.parametrize(("scheme", "tuned"), [("w8a8_static", {"method": "percentile"}), ("w8a8_static", {"granularity": "tensor", "symmetric": True}),
                                               ("fp8_static", {"method": "mse"})])
def test_ways_to_quantize_are_honoured_and_still_what_tensorrt_takes(tmp_path: Path, scheme: str, tuned: dict[str, Any]) -> None:
    part = components(tiny_sam())["encoder"]
    given = inputs_of(part, 3)
    given[0]["images"][0, 0, 0, 0] = 40.0  # an outlier, which the extremes contain
    files = [exporter.export(part, tmp_path / name, scheme=scheme, calibration=given, tuning=t)[0]
             for name, t in (("a.onnx", Tuning()), ("b.onnx", Tuning(**tuned)))]
    plain, other = (constants_of(f, "_scale") for f in files)
    graphs.refuse_unsound(files[1])
    if "method" in tuned:
        assert other["images_scale"] < plain["images_scale"]
    else:
        assert all(s.size == 1 for s in other.values()) and any(s.size > 1 for s in plain.values())


@pytest.mark.parametrize("scheme", ["w8a8_static", "fp8_static", "fp16"])
def test_layers_are_kept_in_the_float_type_asked_for(tmp_path: Path, scheme: str) -> None:
    part = components(tiny_sam())["encoder"]
    path = exporter.export(part, tmp_path / "a.onnx", scheme=scheme, calibration=inputs_of(part, 3), tuning=Tuning(keep={"neck": "fp32"}))[0]
    found = graphs.inside(path)
    assert found.kept_fp32 == {"neck": "asked for"} and found.arithmetic["fp32"] == 1
    if scheme != "fp16":
        path = exporter.export(part, tmp_path / "b.onnx", scheme=scheme, calibration=inputs_of(part, 3), tuning=Tuning(keep={"neck": "fp16"}))[0]
        assert graphs.inside(path).arithmetic["fp16"] == 1 and not graphs.inside(path).kept_fp32


def test_what_a_float_scheme_does_not_take_is_wrong_usage(tmp_path: Path) -> None:
    part = conv_component()
    for scheme, tuning in (("fp16", Tuning(method="mse")), ("fp32", Tuning(keep={"0": "fp16"}))):
        with pytest.raises(UsageError):
            exporter.export(part, tmp_path / "a.onnx", scheme=scheme, calibration=samples(part), tuning=tuning)
    assert list(tmp_path.iterdir()) == []


def test_onnxruntimes_own_integer_kernels_are_not_used(written: Any) -> None:
    """They are wrong for fp16 scales without a word; when this fails they have been mended, and the stand-in may use them."""
    import onnxruntime as ort

    component, path = written("encoder", "w8a8_static")
    inputs = samples(component, 1, seed=9)[0]
    options = ort.SessionOptions()
    options.log_severity_level = 3
    plain = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, inputs)[0]
    wanted = expected(component, inputs)[0]
    if np.linalg.norm(plain - wanted) / np.linalg.norm(wanted) < 0.06:
        pytest.skip(f"onnxruntime {package_version('onnxruntime')} is right")
    assert error(component, path, "w8a8_static") < 0.06


@pytest.mark.parametrize("scheme", ["fp16", "w8a8_static", "fp8_static"])
def test_without_samples_it_is_wrong_usage(tmp_path: Path, scheme: str) -> None:
    with pytest.raises(UsageError, match="calibration images"):
        exporter.export(conv_component(), tmp_path / "x.onnx", scheme=scheme)
    assert list(tmp_path.iterdir()) == []


def test_unknown_schemes_get_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as e:
        exporter.export(conv_component(), tmp_path / "x.onnx", scheme="fp61")
    assert "fp16" in (e.value.hint or "")


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(format, "write_json", full)
    with pytest.raises(OSError, match="No space"):
        exporter.export(conv_component(), tmp_path / "x.onnx", scheme="fp32")
    assert list(tmp_path.iterdir()) == []


def test_anything_that_can_be_quantized_is_needed(tmp_path: Path) -> None:
    part = Component("encoder", nn.Sequential(nn.ReLU()).eval(), {"x": torch.randn(1, 3)}, ("y",))
    with pytest.raises(EdgekdError, match="nothing to quantize"):
        exporter.export(part, tmp_path / "x.onnx", scheme="w8a8_static", calibration=samples(part))
    assert list(tmp_path.iterdir()) == []


# --- where it runs


@pytest.mark.parametrize(("packages", "gpu", "runs", "said"), [
    ({}, False, False, "no CUDA GPU and no TensorRT"), ({"tensorrt": "10.3.0"}, False, False, "no CUDA GPU"), ({}, True, False, "no TensorRT"),
    ({"tensorrt": "10.3.0"}, True, True, None), ({"tensorrt-cu13": "11.1.0"}, True, True, None)])
def test_availability(monkeypatch: pytest.MonkeyPatch, packages: dict[str, str], gpu: bool, runs: bool, said: str | None) -> None:
    monkeypatch.setattr(format, "package_version", lambda name: packages.get(name))
    monkeypatch.setattr(format, "gpu", lambda: gpu)
    found = exporter.availability()
    assert found.ok and found.runs == runs and (said is None or (found.reason or "").endswith(said))
    assert runs or 'pip install "edgekd[tensorrt]"' in (found.fix or "")
    assert not runs or (found.version or "").startswith("tensorrt 1")


def test_opening_without_tensorrt_says_what_is_missing(written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr("edgekd.export._tensorrt_run.Device", lambda: SimpleNamespace(name="GPU"))
    with pytest.raises(EdgekdError, match="tensorrt cannot be imported") as e:
        exporter.open(written("encoder", "fp32")[1], scheme="fp32")
    assert "JetPack" in (e.value.hint or "")


def test_a_file_alone_cannot_be_built(tmp_path: Path) -> None:
    with pytest.raises(EdgekdError, match="how its engine is built"):
        exporter.open(tmp_path / "encoder.onnx", scheme="fp16")


# --- what NVIDIA's compiler says


@pytest.mark.parametrize(("name", "scheme", "precision"), [
    ("encoder", "fp16", "fp16"), ("encoder", "w8a8_static", "int8"), ("encoder", "fp8_static", "fp8"), ("decoder", "w8a8_static", "int8+fp16+fp32")])
def test_rtx_compiles_it(written: Any, rtx: Any, name: str, scheme: str, precision: str) -> None:
    component, path = written(name, scheme)
    found = exporter.check(component, path, scheme=scheme)
    assert found.state == "built" and found.precision == precision == graphs.inside(path).precision
    assert f"TensorRT-RTX {rtx.__version__}" in found.how and "not a Jetson engine" in found.how
    built = {sm for engine in found.details["engines"] for sm in engine["sm"]}
    assert {89, 120} <= built and (86 in built) == (scheme != "fp8_static")
    assert all(engine["bytes"] > 10_000 for engine in found.details["engines"])
    assert found.details["layers"] > 40 and (found.details["quantize"] > 0) == (scheme in STATIC)
    arithmetic = {"fp16": "fp16", "w8a8_static": "i8", "fp8_static": "fp8"}[scheme]
    assert found.ops["convolution:" + arithmetic if name == "encoder" else "matrix_multiply:" + arithmetic] > 0
    json.dumps(found.details)


def test_rtx_refuses_fp8_for_a_gpu_without(written: Any, rtx: Any) -> None:
    """So that `fp8_from` is no guess."""
    log = building.logger(rtx)
    _, path = written("encoder", "fp8_static")
    builder, network = building.parse(rtx, log, path)
    config = building.configure(rtx, builder, network, format.read_spec(path))
    config.num_compute_capabilities = 1
    config.set_compute_capability(rtx.ComputeCapability.SM86, 0)
    with pytest.raises(building.Refused, match="fp8"):
        building.serialized(rtx, log, builder, network, config)


class Odd(nn.Module):
    """Something that TensorRT has no operator for."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.linalg.det(x)[..., None, None]


def odd(folder: Path) -> tuple[Component, Path]:
    part = Component("encoder", Odd().eval(), {"x": torch.randn(1, 4, 4)}, ("y",))
    path = folder / "encoder.onnx"
    exporter.export(part, path, scheme="fp32")
    return part, path


def test_rtx_names_the_node_it_refuses(tmp_path: Path, rtx: Any) -> None:
    part, path = odd(tmp_path)
    (node,) = (n.name for n in onnx.load(path).graph.node if n.op_type == "Det")
    with pytest.raises(EdgekdError, match=f"operator Det of node '{node}': it has no such operator") as e:
        exporter.check(part, path, scheme="fp32")
    assert e.value.where == "encoder" and e.value.hint


def test_an_output_whose_size_an_input_sets_is_refused_with_the_way_out(tmp_path: Path, rtx: Any) -> None:
    """As in segment-anything's own decoder file, whose last input is the photo's size, in float."""
    helper, tensor = onnx.helper, onnx.helper.make_tensor_value_info
    nodes = [helper.make_node("Cast", ["orig_im_size"], ["size"], name="whole", to=onnx.TensorProto.INT64),
             helper.make_node("Slice", ["x", "start", "size"], ["y"], name="crop")]
    graph = helper.make_graph(nodes, "decoder", [tensor("x", 1, [8, 8]), tensor("orig_im_size", 1, [2])], [tensor("y", 1, ["h", "w"])],
                              [onnx.numpy_helper.from_array(np.zeros(2, np.int64), "start")])
    path = tmp_path / "decoder.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    path.with_suffix(".build.json").write_text(json.dumps(trtexec.build_spec({}, path.name, scheme="fp32")))
    with pytest.raises(EdgekdError, match="orig_im_size is a shape tensor") as e:
        exporter.check(Component("decoder", nn.Identity(), {}, ("y",)), path, scheme="fp32")
    assert "--decoder-signature batched" in (e.value.hint or "")


def test_rtx_refuses_shapes_that_do_not_fit(written: Any, rtx: Any) -> None:
    log = building.logger(rtx)
    _, path = written("decoder", "fp32")
    builder, network = building.parse(rtx, log, path)
    spec = format.read_spec(path)
    with pytest.raises(building.Refused, match="no shapes for point_coords"):
        building.configure(rtx, builder, network, {**spec, "shapes": {}})


def test_without_rtx_the_file_is_held_against_what_is_documented(written: Any, without_rtx: None) -> None:
    component, path = written("decoder", "w8a8_static")
    found = exporter.check(component, path, scheme="w8a8_static")
    assert found.state == "checked" and found.precision == "int8+fp16+fp32" and "documents" in found.how
    assert found.ops["MatMul:fp16"] > 0 and found.details["not_documented"] == []


def test_without_rtx_an_unknown_operator_is_refused_by_node(tmp_path: Path, without_rtx: None) -> None:
    part, path = odd(tmp_path)
    with pytest.raises(EdgekdError, match=r"no operator Det \(node '.+'\)"):
        exporter.check(part, path, scheme="fp32")


def test_quantization_for_other_runtimes_is_refused_by_node(tmp_path: Path) -> None:
    part = conv_component()
    onnx_exporter.export(part, tmp_path / "encoder.onnx", scheme="w8a8_static", calibration=samples(part), qdq="u8s8")
    with pytest.raises(EdgekdError, match=r"of node '.+': (a quantized bias|its type is neither int8 nor fp8)"):
        graphs.refuse_unsound(tmp_path / "encoder.onnx")


@pytest.mark.parametrize(("ends", "value", "said"), [("_zero_point", 1, "a zero point is not 0"), ("_scale", 0, "a scale is not positive")])
def test_damaged_quantization_is_refused_by_node(written: Any, tmp_path: Path, ends: str, value: int, said: str) -> None:
    model = onnx.load(written("encoder", "w8a8_static")[1])
    for tensor in [t for t in model.graph.initializer if t.name.endswith(ends)][:1]:
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.full_like(onnx.numpy_helper.to_array(tensor), value), tensor.name))
    onnx.save(model, tmp_path / "encoder.onnx")
    with pytest.raises(EdgekdError, match=f"of node '.+': {said}"):
        graphs.refuse_unsound(tmp_path / "encoder.onnx")


def test_a_file_in_another_precision_than_asked_for_is_refused(written: Any) -> None:
    component, path = written("encoder", "fp32")
    with pytest.raises(EdgekdError, match="computes in fp32, and fp16 was asked for"):
        exporter.check(component, path, scheme="fp16")


def test_a_damaged_file_is_refused(written: Any, tmp_path: Path) -> None:
    component, path = written("encoder", "fp16")
    for file in exporter.files(path):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / path.name).write_bytes(path.read_bytes()[:2000])
    with pytest.raises(EdgekdError, match="no sound ONNX file"):
        exporter.check(component, tmp_path / path.name, scheme="fp16")


# --- what is asked of the device


def test_the_profile_has_the_shapes_of_prompts_and_points(written: Any) -> None:
    spec = format.read_spec(written("decoder", "fp16")[1])
    assert spec["shapes"]["point_coords"] == {"min": [1, 1, 2], "opt": [4, 3, 2], "max": [64, 16, 2]}
    assert spec["axes"]["point_coords"] == {"0": "prompts", "1": "points"} and set(spec["shapes"]) == {"point_coords", "point_labels", "mask_input", "has_mask"}
    assert format.read_spec(written("encoder", "fp16")[1])["shapes"] == {}


def test_axes_of_somebody_elses_model_get_a_range_too() -> None:
    assert trtexec.build_spec({"x": ["rows", 8]}, "head.onnx", scheme="fp32", usual={"rows": 3})["shapes"] == {"x": {"min": [1, 8], "opt": [3, 8], "max": [24, 8]}}


def test_command_lines(written: Any) -> None:
    spec = format.read_spec(written("decoder", "fp16")[1])
    steps = trtexec.run_on_device(spec, lengths={"prompts": 16, "points": 1}, trtexec="/opt/trtexec", folder="/data/job")
    assert list(steps) == ["build", "time", "layers"] and all(step[0] == "/opt/trtexec" for step in steps.values())
    assert {"--onnx=/data/job/decoder.onnx", "--saveEngine=/data/job/decoder.engine", "--stronglyTyped", "--noTF32", "--skipInference",
            "--timingCacheFile=/data/job/timing.cache", "--exportLayerInfo=/data/job/decoder.layers.json", "--profilingVerbosity=detailed",
            "--maxShapes=point_coords:64x16x2,point_labels:64x16,mask_input:64x1x16x16,has_mask:64"} <= set(steps["build"])
    assert {"--loadEngine=/data/job/decoder.engine", "--exportTimes=/data/job/decoder.times.json", "--noDataTransfers",
            "--shapes=point_coords:16x1x2,point_labels:16x1,mask_input:16x1x16x16,has_mask:16"} <= set(steps["time"])
    assert "--exportProfile=/data/job/decoder.profile.json" in steps["layers"] and "--skipInference" not in steps["time"]
    encoder = trtexec.run_on_device(format.read_spec(written("encoder", "fp16")[1]))
    assert not [option for step in encoder.values() for option in step if "hapes" in option]


FAKE = """#!/bin/sh
echo "$@" >> "{log}"
for option in "$@"; do case "$option" in
  --saveEngine=*) printf engine > "${{option#--saveEngine=}}"; [ -z "{fail}" ] || exit 1 ;;
esac; done
"""


@pytest.mark.parametrize(("arguments", "calls"), [([], 1), (["time"], 3)])
def test_the_script_calls_trtexec(written: Any, tmp_path: Path, arguments: list[str], calls: int) -> None:
    path = written("decoder", "fp16")[1]
    tool, log = tmp_path / "trtexec", tmp_path / "log"
    tool.write_text(FAKE.format(log=log, fail=""))
    tool.chmod(0o755)
    script = tmp_path / path.with_suffix(".build_engine.sh").name
    script.write_bytes(path.with_suffix(".build_engine.sh").read_bytes())
    assert os.access(path.with_suffix(".build_engine.sh"), os.X_OK)
    subprocess.run(["sh", str(script), *arguments], check=True, env={**os.environ, "TRTEXEC": str(tool)}, cwd="/", timeout=30)
    lines = log.read_text().splitlines()
    assert len(lines) == calls and "--onnx=decoder.onnx" in lines[0] and "--minShapes=point_coords:1x1x2," in lines[0]
    assert (tmp_path / "decoder.engine").read_text() == "engine" and not (tmp_path / "decoder.engine.part").exists()
    assert calls == 1 or ("--exportTimes=decoder.times.json" in lines[1] and "--exportProfile=decoder.profile.json" in lines[2])


def test_a_build_that_fails_leaves_no_engine(written: Any, tmp_path: Path) -> None:
    tool = tmp_path / "trtexec"
    tool.write_text(FAKE.format(log=tmp_path / "log", fail="yes"))
    tool.chmod(0o755)
    script = tmp_path / "encoder.build_engine.sh"
    script.write_bytes(written("encoder", "fp16")[1].with_suffix(".build_engine.sh").read_bytes())
    assert subprocess.run(["sh", str(script)], env={**os.environ, "TRTEXEC": str(tool)}, timeout=30).returncode == 1
    assert not (tmp_path / "encoder.engine").exists()


# --- what is read from the device: samples written by hand in the form of TensorRT's published sampleReporting.cpp, with figures of no meaning

TIMES = """[
  { "startEnqMs" : 1.5,   "endEnqMs" : 1.75,   "startH2dMs" : 2,   "endH2dMs" : 2,   "startComputeMs" : 2,   "endComputeMs" : 3.5,
   "startD2hMs" : 3.5,   "endD2hMs" : 3.5,   "h2dMs" : 0,   "computeMs" : 1.5,   "d2hMs" : 0,   "latencyMs" : 1.5 }
, { "startEnqMs" : 4, "endEnqMs" : 4.5, "startH2dMs" : 5, "endH2dMs" : 5, "startComputeMs" : 5, "endComputeMs" : 7, "startD2hMs" : 7, "endD2hMs" : 7,
    "h2dMs" : 0, "computeMs" : 2, "d2hMs" : 0, "latencyMs" : 2 }
]"""
PROFILE = """[
  { "count" : 7 }
, { "name" : "conv", "timeMs" : 14, "averageMs" : 2, "medianMs" : 2, "percentage" : 80 }
, { "name" : "Reformatting CopyNode for Input Tensor 0", "timeMs" : 3.5, "averageMs" : 0.5, "medianMs" : 0.5, "percentage" : 20 }
]"""
LAYERS = """{"Layers": [
  {"Name": "reformat", "LayerType": "Reformat", "Inputs": [{"Name": "x", "Dimensions": [1,3,8,8], "Format/Datatype": "Row major linear FP32"}], "Outputs": []},
  {"Name": "conv", "LayerType": "CaskConvolution", "ParameterType": "Convolution", "TacticName": "int8_kernel",
   "Inputs": [{"Name": "q", "Dimensions": [1,3,8,8], "Format/Datatype": "Four wide channel vectorized row major Int8 format"}], "Outputs": []},
  {"Name": "{ForeignNode[a...b]}", "LayerType": "gemm", "Inputs": [{"Name": "t", "Dimensions": [4,8], "Format/Datatype": "Half"}], "Outputs": []},
  {"Name": "start", "LayerType": "Constant", "Inputs": [], "Outputs": [{"Name": "c", "Dimensions": [1], "Format/Datatype": "Row major linear FP16 format"}]},
  {"Name": "shape", "LayerType": "ShapeHostToDevice", "Inputs": [], "Outputs": []}
], "Bindings": ["x", "y"]}"""


def test_reading_what_trtexec_wrote(tmp_path: Path) -> None:
    for name, text in {"times": TIMES, "profile": PROFILE, "layers": LAYERS}.items():
        (tmp_path / name).write_text(text)
    times = trtexec.read_times(tmp_path / "times")
    assert times.latency == [1.5, 2] and times.compute == [1.5, 2] and times.enqueue == [0.25, 0.5]
    assert trtexec.read_profile(tmp_path / "profile") == {"conv": 2, "Reformatting CopyNode for Input Tensor 0": 0.5}
    layers = trtexec.read_layers(tmp_path / "layers")
    assert [(one.kind, one.precision) for one in layers] == [("Reformat", "fp32"), ("Convolution", "i8"), ("gemm", "fp16"), ("Constant", "fp16"), ("ShapeHostToDevice", "?")]
    assert trtexec.precision(layers) == "int8+fp16" and trtexec.operators(layers)["Convolution:i8"] == 1


@pytest.mark.parametrize(("text", "read"), [
    ("", trtexec.read_times), ("[]", trtexec.read_times), ("{}", trtexec.read_times), (PROFILE, trtexec.read_times), ('[{"name": "a"}]', trtexec.read_profile),
    ('{"Layers": []}', trtexec.read_layers), ("[1, 2", trtexec.read_layers)])
def test_what_trtexec_did_not_write_is_refused(tmp_path: Path, text: str, read: Any) -> None:
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(EdgekdError) as e:
        read(tmp_path / "file.json")
    assert e.value.where == tmp_path / "file.json"


def test_an_engine_without_details_says_how_to_get_them() -> None:
    with pytest.raises(EdgekdError) as e:
        trtexec.layers_of({"Layers": ["conv", "relu"], "Bindings": []})
    assert "--profilingVerbosity=detailed" in (e.value.hint or "")


# --- the builder for the device


def test_the_builder_needs_nothing_of_edgekd(written: Any, tmp_path: Path) -> None:
    """It is copied to boards as it is."""
    script = tmp_path / "_tensorrt_build.py"
    script.write_bytes(Path(building.__file__).read_bytes())
    code = "import sys, runpy; sys.modules['edgekd'] = sys.modules['numpy'] = sys.modules['tensorrt'] = None; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run([sys.executable, "-I", "-c", code, str(script), str(written("encoder", "fp16")[1].with_suffix(".build.json"))], capture_output=True,
                          text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == "" and "tensorrt cannot be imported" in done.stderr and "Traceback" not in done.stderr


def test_a_tensorrt_without_strong_types_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="8.6.1"))
    with pytest.raises(building.Refused, match=r"8\.6\.1.*10 or newer"):
        building.load()


def test_what_the_builder_and_the_session_call_exists(rtx: Any) -> None:
    """RTX has TensorRT's API; a name that neither has would only be found on a board."""
    for owner, names in {
        "Builder": "create_network create_builder_config create_optimization_profile build_serialized_network", "IOptimizationProfile": "set_shape",
        "IBuilderConfig": "set_memory_pool_limit clear_flag add_optimization_profile create_timing_cache set_timing_cache get_timing_cache profiling_verbosity",
        "OnnxParser": "parse_from_file num_errors get_error", "ParserError": "node_name node_operator desc", "ITimingCache": "serialize",
        "Runtime": "deserialize_cuda_engine", "EngineInspector": "get_engine_information",
        "ICudaEngine": "create_engine_inspector create_execution_context num_io_tensors get_tensor_name get_tensor_mode get_tensor_dtype get_tensor_shape",
        "IExecutionContext": "set_input_shape get_tensor_shape set_tensor_address execute_async_v3"}.items():
        assert [n for n in names.split() if not hasattr(getattr(rtx, owner), n)] == [], owner
    assert rtx.nptype(rtx.DataType.HALF) == np.float16 and rtx.TensorIOMode.INPUT and rtx.LayerInformationFormat.JSON and rtx.MemoryPoolType.WORKSPACE


def test_writing_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    building.write(tmp_path / "engine", b"first")
    monkeypatch.setattr(building.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        building.write(tmp_path / "engine", b"second")
    assert [f.read_bytes() for f in tmp_path.iterdir()] == [b"first"]


def test_more_prompts_than_the_engine_takes_go_in_several_calls(written: Any) -> None:
    spec = format.read_spec(written("decoder", "fp16")[1])
    inputs = {"image_embeddings": np.zeros((1, 32, 4, 4)), "point_coords": np.arange(150 * 4.0).reshape(150, 2, 2), "has_mask": np.zeros(150)}
    found = pieces(inputs, spec)
    assert [len(one["point_coords"]) for one in found] == [64, 64, 22] and all(one["image_embeddings"].shape == (1, 32, 4, 4) for one in found)
    np.testing.assert_array_equal(np.concatenate([one["point_coords"] for one in found]), inputs["point_coords"])
    with pytest.raises(EdgekdError, match="16 points at most, and is given 17"):
        pieces({"point_coords": np.zeros((1, 17, 2))}, spec)
    assert len(pieces({"images": np.zeros((1, 3, 8, 8))}, format.read_spec(written("encoder", "fp16")[1]))) == 1


# --- an artifact


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """int8 encoder; this seed's masks cover about half of a photo and follow the click."""
    folder, model = tmp_path_factory.mktemp("artifact") / "made", tiny_sam(2)
    export_model(model, folder, format="tensorrt", scheme="w8a8_static", threads=1, calibration={"encoder": samples(components(model)["encoder"], 3)})
    return folder


def test_the_manifest_says_what_was_done(made: Path) -> None:
    found = artifact.verify(made)
    encoder, decoder = found.components["encoder"], found.components["decoder"]
    assert encoder.stand_in == "onnxruntime on the same graph" and encoder.executed_precision == "int8"
    # fp16 where this CPU's rounding of it passes the gate, which it just does on some machines
    assert decoder.scheme in ("fp16", "fp32") and (decoder.note or "").startswith("kept in")
    assert encoder.state == ("built" if package_version(format.RTX) else "checked") and encoder.parity["passed"]
    assert {"encoder.onnx", "encoder.build.json", "encoder.build_engine.sh"} <= {f.name for f in made.iterdir()} and not encoder.fixed


@pytest.mark.parametrize("click", [(50, 40), (400, 800)])
def test_the_consumer_segments_what_edgekd_does(made: Path, photos: Path, tmp_path: Path, click: tuple[int, int]) -> None:
    photo = photos / "dogs_at_door.jpg"
    wanted = predict_file(open_artifact(made, threads=1, stand_in=True), photo, tmp_path / "wanted.png", points=[click]).mask
    done = subprocess.run([sys.executable, "-I", str(CONSUMER), str(made), str(photo), f"{click[0]},{click[1]}", "mask.png"], capture_output=True, text=True,
                          timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "mask.png") as image:
        got = np.asarray(image) > 127
    assert 0.02 < wanted.mean() < 0.98 and (got & wanted).sum() / (got | wanted).sum() >= 0.98
    assert json.loads(done.stdout)["share"] == pytest.approx(wanted.mean(), abs=0.01)
