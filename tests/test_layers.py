"""Times of single operators: measured by each runtime, named after the network's modules, explained by advice and a page."""
from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from edgekd.export import _layers, _layers_executorch, _layers_litert, _layers_onnx, _layers_openvino, _layers_tensorrt
from edgekd.export import onnx as export_onnx
from edgekd.export._trtexec import build_spec
from onnx import TensorProto, helper
from tiny import conv_component, linear_component, tiny_sam
from typer.testing import CliRunner

from edgekd import api, plugins
from edgekd.cli import app
from edgekd.errors import EdgekdError, UsageError
from edgekd.exporting import export_model
from edgekd.measurement import Circumstances, Latency
from edgekd.models.blocks import LayerNorm2d
from edgekd.profiling import profile_artifact, runner
from edgekd.profiling.advice import RULES, Rule, advise, matching
from edgekd.profiling.layers import common, inputs_of, joined, named, names_of, sums
from edgekd.profiling.profile import ComponentProfile, Layer, Profile
from edgekd.protocols import Component, package_version
from edgekd.report import layers as pages
from edgekd.runtime import Fitted, open_artifact

HAS = {name: all(package_version(p) for p in packages) for name, packages in
       {"openvino": ["openvino", "nncf"], "litert": ["litert-torch", "ai-edge-quantizer", "ai-edge-litert"], "executorch": ["executorch"]}.items()}


def needs(extra: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not HAS[extra], reason=f'{extra} is not installed here: pip install "edgekd[{extra}]"')


class Block(torch.nn.Module):
    """Convolutions, GELUs that runtimes join, attention's products and a norm, under names of two levels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, 2, 1), torch.nn.GELU(), torch.nn.Conv2d(16, 16, 3, 1, 1, groups=16), torch.nn.ReLU())
        self.body = torch.nn.ModuleDict({"up": torch.nn.Conv2d(16, 32, 1), "act": torch.nn.GELU(), "down": torch.nn.Conv2d(32, 16, 1)})
        self.squeeze, self.norm = torch.nn.Conv2d(16, 16, 1), LayerNorm2d(16)
        self.attention = torch.nn.ModuleDict({"qkv": torch.nn.Linear(16, 48), "out": torch.nn.Linear(16, 16)})

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.stem(images)
        x = x + self.body["down"](self.body["act"](self.body["up"](x)))
        x = self.norm(x * torch.sigmoid(self.squeeze(x.mean((2, 3), keepdim=True))))
        b, c, h, w = x.shape
        q, k, v = self.attention["qkv"](x.flatten(2).transpose(1, 2)).chunk(3, -1)
        mixed = (q @ k.transpose(1, 2) * 0.25).softmax(-1) @ v
        return x + self.attention["out"](mixed).transpose(1, 2).reshape(b, c, h, w)


@pytest.fixture(scope="module")
def block() -> Component:
    torch.manual_seed(0)
    return Component("encoder", Block().eval(), {"images": torch.randn(1, 3, 64, 64)}, ("image_embeddings",))


MODULES = {"stem.0", "stem.1", "stem.2", "body.up", "body.act", "body.down", "squeeze", "norm", "attention.qkv", "attention.out"}


def inputs(seed: int = 0) -> dict[str, np.ndarray]:
    return {"images": np.random.default_rng(seed).standard_normal((1, 3, 64, 64)).astype(np.float32)}


def profiled(component: Component, format: str, scheme: str, folder: Path) -> list[Layer]:
    """A component exported, measured and named."""
    exporter = plugins.exporter(format)
    file = folder / f"encoder{exporter.suffix}"
    exporter.export(component, file, scheme=scheme, calibration=[inputs(i) for i in range(3)] if scheme != "fp32" else None)
    rows = exporter.layers(file, scheme=scheme, inputs=inputs(), threads=1, repeats=4)  # type: ignore[attr-defined]
    return named("encoder", rows, names_of(format, file))


def within(layers: list[Layer]) -> set[str]:
    """The modules that are named at all: a name with braces stands for each in them."""
    found = set()
    for layer in layers:
        base, _, tails = layer.name.partition("{")
        found |= {f"{base}{t}" for t in tails.rstrip("}").split(",")} if tails else {base}
    return found


# --- onnxruntime

def test_onnx__every_kernel_has_its_module_also_those_that_onnxruntime_made(block: Component, tmp_path: Path) -> None:
    found = profiled(block, "onnx", "fp32", tmp_path)
    assert within(found) >= MODULES and len(found) >= 15
    assert {one.name for one in found if one.op == "Gelu"} == {"stem.1", "body.act"}  # `Gelu`, `Gelu_token_1` in the trace
    assert [one.name for one in found if one.op.endswith(("(depthwise)", "(one cell)"))] == ["stem.{2,3}", "squeeze"]  # the ReLU is computed with it
    assert [one.name for one in found if one.op in ("ReduceMean", "Softmax")] == ["node_mean", "node_softmax"]  # of no module: the model computes them itself
    assert all(one.name.split(".")[0].strip("{") in {"stem", "body", "squeeze", "norm", "attention"} for one in found if one.op.startswith(("Conv", "Reorder", "Gelu")))
    assert sum(one.share for one in found) == pytest.approx(1) and all(one.ms >= 0 for one in found) and sum(one.ms for one in found) > 0
    assert {one.precision for one in found if one.op.startswith("Conv")} == {"fp32"}


def test_onnx__integer_kernels_and_quantizers_have_modules_too(block: Component, tmp_path: Path) -> None:
    found = profiled(block, "onnx", "w8a8_static", tmp_path)
    integer = [one for one in found if one.op.startswith("QLinearConv")]
    assert {one.name for one in integer} >= {"stem.0", "stem.2", "body.up", "body.down"} and {one.precision for one in integer} == {"int8"}
    assert "QLinearConv (depthwise)" in {one.op for one in integer}
    grids = [one for one in found if one.op in ("QuantizeLinear", "DequantizeLinear")]
    assert grids and {one.name for one in grids} >= {"stem.1", "stem.2", "body.act"}  # those of a map belong to what wrote it


def test_onnx__the_module_of_every_node_stays_in_a_quantized_file(block: Component, tmp_path: Path) -> None:
    plain, quantized = (tmp_path / f"{s}.onnx" for s in ("fp32", "w8a8_static"))
    for file in (plain, quantized):
        export_onnx.exporter.export(block, file, scheme=file.stem, calibration=[inputs(i) for i in range(2)])
    told = {n.name: p.value for n in onnx.load(quantized).graph.node for p in n.metadata_props if p.key == "module"}
    assert {"stem.0", "body.up", "attention.qkv"} <= set(told.values())
    known = _layers_onnx.modules(quantized)
    assert all(n.name in known for n in onnx.load(quantized).graph.node if n.name)
    assert quantized.stat().st_size - sum(len(n.SerializeToString()) for n in onnx.load(quantized).graph.node) > 0
    assert sum(len(v) + 12 for v in told.values()) < 0.25 * plain.stat().st_size  # names are a small part even of a tiny file


def test_onnx__a_file_of_somebody_else_is_named_by_its_weights_alone(tmp_path: Path) -> None:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4]) for n in ("x", "y"))
    weight = helper.make_tensor("head.fc.weight", TensorProto.FLOAT, [4, 4], [0.5] * 16)
    nodes = [helper.make_node("MatMul", ["x", "head.fc.weight"], ["m"], name="MatMul_7"), helper.make_node("Erf", ["m"], ["y"], name="Erf_8")]
    graph = helper.make_model(helper.make_graph(nodes, "g", [x], [y], [weight]), opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(graph, tmp_path / "a.onnx")
    rows = export_onnx.exporter.layers(tmp_path / "a.onnx", scheme="fp32", inputs={"x": np.ones((1, 4), np.float32)}, threads=1, repeats=2)
    assert [(one.name, one.op) for one in named("model", rows, names_of("onnx", tmp_path / "a.onnx"))] == [("head.fc", "MatMul"), ("Erf_8", "Erf")]


def event(name: str, us: int, op: str = "Conv", kind: str = "float") -> dict[str, Any]:
    return {"cat": "Node", "name": f"{name}_kernel_time", "dur": us, "args": {"op_name": op, "input_type_shape": [{kind: [1, 3, 8, 8]}]}}


def run_of(*events: dict[str, Any]) -> list[dict[str, Any]]:
    return [*events, {"cat": "Session", "name": "model_run", "dur": 1}]


def test_onnx_trace__warm_up_does_not_count_nor_what_runs_others() -> None:
    cold = [e for _ in range(_layers.WARMUP) for e in run_of(event("a", 9000))]
    warm = [e for us in (10, 20, 20, 900) for e in run_of(event("a", us), event("loop", 500, "Loop"), event("b", 2, "Add", "uint8"), event("b", 3, "Add", "uint8"))]
    rows = _layers_onnx.rows([{"cat": "Session", "name": "session_initialization", "dur": 1}, *cold, *warm])
    assert [(r["name"], r["op"], r["precision"]) for r in rows] == [("a", "Conv", "fp32"), ("b", "Add", "int8")]
    assert rows[0]["ms"] == pytest.approx(0.020) and rows[1]["ms"] == pytest.approx(0.005)  # of 10, 20, 20, 900 the middle half; twice in a run adds up


def test_onnx__what_a_kernel_covers_is_found_along_its_tensors() -> None:
    """A convolution with an activation in it, and a GELU between two blocked convolutions, whose tensors have no name of the file's."""
    def graph(nodes: list[onnx.NodeProto]) -> onnx.GraphProto:
        return helper.make_graph(nodes, "g", [], [])

    file = graph([helper.make_node("Conv", ["x", "w"], ["c1"], name="n_conv1"), helper.make_node("Relu", ["c1"], ["r1"], name="n_relu"),
                  helper.make_node("Conv", ["r1", "w"], ["c2"], name="n_conv2"), helper.make_node("Div", ["c2", "s"], ["d"], name="n_div"),
                  helper.make_node("Erf", ["d"], ["e"], name="n_erf"), helper.make_node("Mul", ["e", "c2"], ["g"], name="n_gelu"),
                  helper.make_node("Conv", ["g", "w"], ["c3"], name="n_conv3")])
    made = graph([helper.make_node("ReorderInput", ["x"], ["t0"], name="ReorderInput"), helper.make_node("Conv", ["t0"], ["t1"], name="r1_nchwc"),
                  helper.make_node("Conv", ["t1"], ["t2"], name="c2_nchwc"), helper.make_node("Gelu", ["t2"], ["t3"], name="Gelu_token_5"),
                  helper.make_node("Conv", ["t3"], ["t4"], name="c3_nchwc"), helper.make_node("ReorderOutput", ["t4"], ["c3"], name="ReorderOutput_token_9")])
    found = _layers_onnx.covers(file, made)
    assert set(found["r1_nchwc"]) == {"n_conv1", "n_relu"} and found["c2_nchwc"] == ["n_conv2"] and found["c3_nchwc"] == ["n_conv3"]
    assert set(found["Gelu_token_5"]) == {"n_div", "n_erf", "n_gelu"}
    assert set(found["ReorderInput"]) == {"n_conv1", "n_relu"} and found["ReorderOutput_token_9"] == ["n_conv3"]


# --- OpenVINO

@needs("openvino")
@pytest.mark.parametrize("scheme", ["fp32", "w8a8_static"])
def test_openvino__every_kernel_has_its_modules(block: Component, tmp_path: Path, scheme: str) -> None:
    found = profiled(block, "openvino", scheme, tmp_path)
    assert within(found) >= {"stem.0", "stem.2", "body.up", "body.down", "norm", "attention.qkv", "attention.out"}
    assert not [one for one in found if one.name.startswith(("MVN_", "Subtract_", "ReduceMean_"))]  # what OpenVINO made of the norm
    (first,) = (one for one in found if one.op == "Convolution" and "stem.0" in within([one]))
    assert first.precision == ("int8" if scheme == "w8a8_static" else "fp32")
    assert "stem.{0,1}" in {one.name for one in found} and {one.op for one in found} >= {"GroupConvolution (depthwise)"} and sum(one.share for one in found) == pytest.approx(1)


@needs("openvino")
def test_openvino__names_are_in_the_file_and_cost_little(block: Component, tmp_path: Path) -> None:
    plugins.exporter("openvino").export(block, tmp_path / "a.xml", scheme="fp32")
    known = _layers_openvino.modules(tmp_path / "a.xml")
    assert {"stem.0", "norm", "attention.qkv"} <= set(known.values())
    text = (tmp_path / "a.xml").read_text()
    told = text[text.index(_layers_openvino.MODULES):].split("/>")[0]
    assert len(told) < 0.08 * len(text)
    (tmp_path / "old.xml").write_text(text.replace(_layers_openvino.MODULES, "edgekd.other"))
    assert _layers_openvino.modules(tmp_path / "old.xml") == {}


# --- LiteRT and ExecuTorch

@needs("litert")
@pytest.mark.parametrize("scheme", ["fp32", "w8a8_static"])
def test_litert__kernels_of_xnnpack_have_their_modules(block: Component, tmp_path: Path, scheme: str) -> None:
    found = profiled(block, "litert", scheme, tmp_path)
    weighted = [one.name for one in found if one.op in _layers.HAS_WEIGHTS and not one.name.startswith("FULLY_CONNECTED")]  # a product of two activations
    assert weighted == ["stem.0", "stem.2", "body.up", "body.down", "squeeze", "attention.qkv", "attention.out"]
    assert within(found) >= {"norm", "stem.1" if scheme == "fp32" else "stem"} and sum(one.share for one in found) == pytest.approx(1)
    assert ("int8" in {one.precision for one in found if one.op == "CONV_2D"}) == (scheme == "w8a8_static")


@needs("litert")
def test_litert__an_input_of_another_size_or_a_damaged_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.tflite").write_bytes(b"no model")
    with pytest.raises(EdgekdError, match="LiteRT"):
        plugins.exporter("litert").layers(tmp_path / "a.tflite", scheme="fp32", inputs=inputs(), threads=1, repeats=2)  # type: ignore[attr-defined]


def test_litert_rows__kernels_are_told_by_their_order_and_others_by_their_number() -> None:
    operators = [{"name": "0:layer=a;", "kind": "CONV_2D", "inside": True, "tag": "f32", "weight": "layer=a;"},
                 {"name": "1:at=b;", "kind": "GELU", "inside": True, "tag": "f32", "weight": ""},
                 {"name": "2:at=c;", "kind": "TOPK_V2", "inside": False, "tag": "i32", "weight": ""},
                 {"name": "3:layer=d;", "kind": "FULLY_CONNECTED", "inside": True, "tag": "i8", "weight": "layer=d;"}]
    one_run = [("Convolution (NHWC, F32) IGEMM", 0, True, 0.004), ("GELU (NC)", 1, True, 0.002), ("TOPK_V2", 2, False, 0.5), ("Fully Connected (NC, QS8, QC8) GEMM", 0, True, 0.003)]
    rows = _layers_litert.rows([one_run] * 3, operators)
    assert [(r["op"], r["precision"], r["covers"]) for r in rows] == [("CONV_2D", "fp32", ["0:layer=a;"]), ("GELU", "fp32", ["1:at=b;"]), ("TOPK_V2", "i32", ["2:at=c;"]),
                                                                     ("FULLY_CONNECTED", "int8", ["3:layer=d;"])]
    fewer = _layers_litert.rows([one_run[1:]] * 3, operators)  # one convolution less than the file has: nothing can be told apart
    assert [r["covers"] for r in fewer] == [[], ["2:at=c;"], []] and fewer[0]["op"] == "GELU" and fewer[2]["precision"] == "int8"


def test_aligned__operators_that_xnnpack_leaves_out_or_adds_do_not_shift_the_others() -> None:
    kernels = ["Transpose (ND, X32)", "Convolution (NHWC, F32)", "GELU (NC)", "Copy (NC)", "Fully Connected (NC, F32)", "Add (ND)"]
    assert _layers.aligned(kernels, ["TRANSPOSE", "PAD", "CONV_2D", "GELU", "RESHAPE", "CONV_2D", "MUL", "ADD"]) == {0: 0, 1: 2, 2: 3, 4: 5, 5: 7}
    assert _layers.aligned(kernels, ["CONV_2D", "ADD"]) == {}


@needs("executorch")
def test_executorch__kernels_are_told_by_kind_and_have_no_modules(tmp_path: Path) -> None:
    exporter = plugins.exporter("executorch")
    component = conv_component()
    exporter.export(component, tmp_path / "a.pte", scheme="fp32")
    rows = exporter.layers(tmp_path / "a.pte", scheme="fp32", inputs={"images": np.ones((1, 3, 16, 16), np.float32)}, threads=1, repeats=3)  # type: ignore[attr-defined]
    found = named("encoder", rows, names_of("executorch", tmp_path / "a.pte"))
    assert {"Convolution", "Transpose"} <= {one.op for one in found} and all(" @" in one.name for one in found)


def test_executorch_rows__own_kernels_count_beside_the_delegates_and_loading_does_not() -> None:
    def told(name: str | None, inside: str | None, ns: int, chain: int = 0) -> SimpleNamespace:
        return SimpleNamespace(profile_event=SimpleNamespace(name=name, chain_index=chain, instruction_id=3, delegate_debug_id_str=inside, start_time=1000, end_time=1000 + ns))

    loading = [told("Program::load_method", None, 9_000_000, chain=-1)]
    one_run = [SimpleNamespace(profile_event=None), told(None, "Convolution (NHWC, F32) IGEMM #1", 4000), told("DELEGATE_CALL", None, 5000),
               told("native_call_aten::cat.out", None, 2000), told("native_call_aten::cat.out", None, 6000)]
    rows = _layers_executorch.rows([loading, *[one_run] * (_layers.WARMUP + 2)])
    assert [(r["op"], r["ms"], r["precision"]) for r in rows] == [("Convolution", 0.004, "fp32"), ("aten::cat.out", 0.002, None), ("aten::cat.out", 0.006, None)]


# --- TensorRT, as recorded

PROFILE = """[
  { "count" : 2134 }
, { "name" : "Reformatting CopyNode for Input Tensor 0 to node_Conv_1", "timeMs" : 20, "averageMs" : 0.2, "medianMs" : 0.19, "percentage" : 10 }
, { "name" : "node_Conv_1 + PWN(node_gelu)", "timeMs" : 180, "averageMs" : 1.8, "medianMs" : 1.75, "percentage" : 70 }
, { "name" : "{ForeignNode[node_matmul...node_add_3]}", "timeMs" : 60, "averageMs" : 0.6, "percentage" : 20 }
]"""
INFO = json.dumps({"Layers": [
    {"Name": "Reformatting CopyNode for Input Tensor 0 to node_Conv_1", "LayerType": "Reformat", "Inputs": [{"Name": "x", "Format/Datatype": "Row major linear FP32"}]},
    {"Name": "node_Conv_1 + PWN(node_gelu)", "LayerType": "CaskConvolution", "ParameterType": "Convolution", "Metadata": "[ONNX Layer: node_Conv_1]\x1f[ONNX Layer: node_gelu]",
     "Inputs": [{"Name": "q", "Format/Datatype": "Four wide channel vectorized row major Int8 format"}]},
    {"Name": "{ForeignNode[node_matmul...node_add_3]}", "LayerType": "kgen", "Inputs": [{"Name": "t", "Format/Datatype": "Half"}]}], "Bindings": ["x", "y"]})
NODES = {"node_Conv_1": "stem.0", "node_gelu": "stem.1", "node_matmul": "attn", "node_add_3": "attn.out"}


def test_tensorrt__layers_are_named_by_their_metadata_or_their_own_name(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(PROFILE)
    (tmp_path / "l.json").write_text(INFO)
    found = named("encoder", _layers_tensorrt.rows(tmp_path / "p.json", tmp_path / "l.json"), NODES)
    assert [(one.name, one.op, one.ms, one.precision) for one in found] == [
        ("stem.0", "Reformat", 0.19, "fp32"), ("stem.{0,1}", "Convolution", 1.75, "int8"), ("attn.out", "kgen", 0.6, "fp16")]
    (tmp_path / "l.json").write_text("{}")
    with pytest.raises(EdgekdError):
        _layers_tensorrt.rows(tmp_path / "p.json", tmp_path / "l.json")


def test_tensorrt__trtexec_is_asked_for_the_lengths_of_the_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tmp_path / "cache" / "engine"
    engine.parent.mkdir()
    engine.write_bytes(b"engine")
    engine.with_name("layers.json").write_text(INFO)
    tool = tmp_path / "bin" / "trtexec"
    tool.parent.mkdir()
    tool.write_text(f"""#!/bin/sh
echo "$@" > {tmp_path}/asked
for a in "$@"; do case "$a" in --exportProfile=*) cat > "${{a#--exportProfile=}}" <<'EOF'
{PROFILE}
EOF
;; esac; done
""")
    tool.chmod(0o755)
    spec = build_spec({"x": ["prompts", 2]}, "decoder.onnx", scheme="fp16")
    monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")
    rows = _layers_tensorrt.layers(tmp_path / "decoder.onnx", spec, engine, {"prompts": 7})
    assert len(rows) == 3 and "--shapes=x:7x2" in (tmp_path / "asked").read_text()
    tool.write_text("#!/bin/sh\necho engine mismatch >&2\nexit 1\n")
    with pytest.raises(EdgekdError, match="engine mismatch"):
        _layers_tensorrt.layers(tmp_path / "decoder.onnx", spec, engine, {})
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="trtexec"):
        _layers_tensorrt.layers(tmp_path / "decoder.onnx", spec, engine, {})


# --- names

def row(name: str, ms: float = 1.0, op: str = "Conv", **more: Any) -> dict[str, Any]:
    return {"name": name, "op": op, "ms": ms, **more}


def test_named__a_row_of_a_board_is_named_by_what_its_name_is_made_of() -> None:
    names = {"node_Conv_1": "stem.0", "conv2d": "stem.0", "node_gelu": "stem.1", "node_Conv_2": "stem.2", "val_58": "blocks.0.attn.qkv"}
    rows = [row("conv2d_nchwc"), row("Gelu_token_12", op="Gelu"), row("node_Conv_2_token_7"), row("val_58_pre_reshape"), row("node_gelu/fq_output_0"),
            row("node_Conv_1 + PWN(node_gelu)"), row("something_else")]
    found = named("encoder", rows, names)
    assert [one.name for one in found] == ["stem.0", "stem", "stem.2", "blocks.0.attn.qkv", "stem.1", "stem.{0,1}", "something_else"]
    outside = named("encoder", [row("node_Conv_1"), row("node_mean", op="Mean"), row("k", covers=["node_mean", "node_Conv_2"]), row("node_Conv_2")], names | {"node_mean": ""})
    assert [one.name for one in outside] == ["stem.0", "node_mean", "stem.2", "stem.2"]  # what is known to be in no module takes none from its neighbours
    assert all(one.share == pytest.approx(1 / 7) for one in found) and {one.component for one in found} == {"encoder"}


def test_named__without_names_or_times_nothing_is_made_up() -> None:
    assert [(one.name, one.share, one.precision) for one in named("decoder", [row("k1", 0.0), row("k2", 0.0, precision="fp16")], {})] == [("k1", 0.0, None), ("k2", 0.0, "fp16")]
    assert named("decoder", [], {"a": "b"}) == []


@pytest.mark.parametrize(("modules", "name"), [
    ([], ""), (["a.b"], "a.b"), (["a.b", "a.b"], "a.b"), (["a.conv1", "a.act"], "a.{conv1,act}"), (["a", "a.conv3"], "a.conv3"), (["a", "a.c", "a.act"], "a.{c,act}"),
    (["stem", "blocks.0"], "{stem,blocks.0}"), (["a.b.1", "a.b.2", "a.c", "a.d.e"], "a"), (["p", "q", "r", "s"], ""), (["", "a"], "a"), (["a.norm", "a.normal"], "a.{norm,normal}")])
def test_joined__one_name_for_several_modules(modules: list[str], name: str) -> None:
    assert joined(modules) == name


def test_common__paths_share_whole_parts_only() -> None:
    assert common(["layers.10.a", "layers.1.a"]) == "layers" and common(["x", "y"]) == "" and common(["a.b", "a.b.c"]) == "a.b"


# --- advice

def layer(name: str, op: str, share: float, component: str = "encoder") -> Layer:
    return Layer(component=component, name=name, op=op, ms=10 * share, share=share)


@pytest.mark.parametrize(("rule", "hits", "others"), [
    ("normalisation", [("neck.norm", "Transpose"), ("x", "LayerNormalization"), ("MVN_1", "MVN"), ("a.norm4", "Add")], [("normal", "Conv"), ("n", "BatchNormalization")]),
    ("gelu_in_pieces", [("act", "Erf"), ("act", "Mul"), ("act", "Div")], [("other", "Mul")]),
    ("activation", [("act", "Gelu"), ("a", "GELU"), ("s", "LOGISTIC")], [("c", "Conv")]),
    ("layout", [("a", "Transpose"), ("b", "ReorderInput"), ("c", "Static Reshape"), ("d", "RESHAPE")], [("c", "Conv")]),
    ("resize", [("up", "Upsample"), ("up", "Resize"), ("up", "RESIZE_BILINEAR"), ("up", "Interpolate")], [("c", "Reshape")]),
    ("softmax", [("a", "Softmax"), ("a", "SOFTMAX")], [("a", "MatMul")]),
    ("to_and_fro", [("a", "QuantizeLinear"), ("a", "DequantizeLinear"), ("a", "QUANTIZE")], [("a", "QLinearConv")]),
    ("casts", [("a", "Cast")], [("a", "Concat")]),
    ("depthwise", [("a", "Conv (depthwise)"), ("a", "DEPTHWISE_CONV_2D"), ("a", "GroupConvolution (depthwise)")], [("a", "Conv")]),
    ("one_cell", [("a", "QLinearConv (one cell)")], [("a", "QLinearConv")])])
def test_rules__mean_what_they_say(rule: str, hits: list[tuple[str, str]], others: list[tuple[str, str]]) -> None:
    known = {r.name: r for r in RULES}
    layers = [layer(*one, 0.1) for one in [*hits, *others]]
    assert [(one.name, one.op) for one in matching(known[rule], layers)] == hits


def test_rules__are_explained_in_the_docs() -> None:
    text = (Path(__file__).parents[1] / "docs" / "layers.md").read_text()
    headings = {line.lstrip("# ").strip().lower().replace(",", "").replace(" ", "-") for line in text.splitlines() if line.startswith("#")}
    assert {r.see for r in RULES} | {"one-layer", "decoder"} <= headings


def test_advise__speaks_from_a_rules_share_on_and_gives_its_evidence() -> None:
    rule = Rule("norms", "Norms", "fold them", 0.3, "normalisation", kinds="LayerNormalization")
    rest = layer("conv", "Conv", 0.2)
    quiet = [layer("a.norm", "LayerNormalization", 0.15), layer("b.norm", "LayerNormalization", 0.14), rest]
    assert advise(quiet, rules=[rule]) == []
    (said,) = advise([layer("a.norm", "LayerNormalization", 0.11), layer("b.norm", "LayerNormalization", 0.2), rest], rules=[rule])
    assert (said.share, said.ms) == pytest.approx((0.31, 3.1)) and said.layers == ["b.norm", "a.norm"] and said.see == "docs/layers.md#normalisation"


def test_advise__one_large_layer_and_a_decoder_that_weighs_as_much_as_the_encoder() -> None:
    layers = [layer("neck", "Conv", 0.6), layer("stem", "Conv", 0.4), layer("d", "MatMul", 0.2, "decoder"), layer("e", "MatMul", 0.2, "decoder")]
    found = {a.rule: a for a in advise(layers, {"encoder": 6.0, "decoder": 5.0}, prompts=4)}
    assert found["one_layer"].layers == ["neck"] and found["decoder"].share == pytest.approx(5 / 11) and "4 in this call" in found["decoder"].what
    assert "decoder" not in {a.rule for a in advise(layers, {"encoder": 9.0, "decoder": 1.0})}


# --- the page

def shown(names: list[str], advice: bool = True) -> tuple[Profile, list[Any]]:
    layers = [layer(name, "LayerNormalization", 1 / len(names)) for name in names]
    latency = Latency.from_samples([1.0, 2.0, 3.0])
    part = ComponentProfile(latency_ms=latency, load_ms=1, size_bytes=1, executed_precision="fp32", executed_ops={})
    found = Profile(id="<b>id</b>", target="host", prompts=1, components={"encoder": part}, latency_ms=latency, load_ms=1, peak_memory_bytes=None, size_bytes=1,
                    executed_precision="fp32", circumstances=Circumstances(device="a & b", os="x", python="3", date="2026-01-01T00:00:00+00:00"), layers=layers)
    return found, advise(layers) if advice else []


def test_page__stands_alone_and_escapes_names(tmp_path: Path) -> None:
    found, advice = shown(["blocks.0.<script>alert(1)</script>", "blocks.1.norm", 'stem."x"'])
    text = pages.page(tmp_path / "new" / "layers.html", found, advice).read_text()
    assert "<script" not in text and "&lt;script&gt;" in text and "&lt;b&gt;id" in text and "a &amp; b" in text
    assert not any(s in text for s in ("http:", "https:", "src=", "<link", "@import", "url(", "<iframe", "href="))
    assert "Normalisations that are computed at run time" in text and "docs/layers.md#normalisation" in text
    quiet, _ = shown(["a.b"], advice=False)
    assert "Nothing stands out" in pages.page(tmp_path / "quiet.html", quiet, []).read_text()


def test_tree__a_module_holds_all_that_is_below_it() -> None:
    root = pages.tree([layer("blocks.0.conv1", "Conv", 0.3), layer("blocks.0.{conv2,act}", "Conv", 0.2), layer("blocks.1", "Add", 0.1), layer("stem", "Conv", 0.4)])
    assert root.ms == pytest.approx(10) and root.children["blocks"].ms == pytest.approx(6) and root.children["blocks"].children["0"].ms == pytest.approx(5)
    assert set(root.children["blocks"].children["0"].children) == {"conv1"}


# --- the whole way

@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layers") / "art"
    export_model(tiny_sam(), folder, format="onnx", scheme="fp32")
    return folder


def test_profile__with_layers_in_a_process_of_their_own(artifact: Path) -> None:
    found = profile_artifact(artifact, repeats=3, warmup=1, threads=1, memory=False, max_seconds=0.5, layers=True)
    assert found.layers and {one.component for one in found.layers} == {"encoder", "decoder"}
    assert {"stem.0", "squeeze", "neck", "norm"} <= within([one for one in found.layers if one.component == "encoder"])
    for component, total in sums(found.layers).items():
        assert total > 0 and sum(one.share for one in found.layers if one.component == component) == pytest.approx(1)
    assert Profile.model_validate_json(found.model_dump_json(by_alias=True)) == found
    assert profile_artifact(artifact, repeats=2, warmup=1, threads=1, memory=False, max_seconds=0.2).layers is None


def test_inputs_of__are_those_of_the_files_themselves(artifact: Path) -> None:
    model = open_artifact(artifact, threads=1)
    given = inputs_of(model, prompts=3)
    assert given["encoder"]["images"].shape == (1, 3, 64, 64) and given["decoder"]["point_coords"].shape[0] == 3
    assert type(model.session("encoder")).__name__ == "OnnxSession"  # nothing stays behind

    class Inner:
        def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {"y": inputs["x"]}

    from edgekd.artifact import Tensor
    described = [Tensor(name="x", dtype="float32", shape=["P", 2])]
    fitted = Fitted(Inner(), described, [Tensor(name="y", dtype="float32", shape=["P", 2])], {"P": 4})  # type: ignore[arg-type]
    padded = SimpleNamespace(session=lambda part: fitted)
    padded.calls = lambda prompts: {"d": lambda: padded.session("d").run({"x": np.ones((3, 2))})}
    assert inputs_of(padded, 1)["d"]["x"].shape == (4, 2)  # type: ignore[arg-type]


def test_cli__the_document_and_the_page(artifact: Path, tmp_path: Path) -> None:
    told = ["profile", str(artifact), "--target", "host", "--threads", "1", "--repeats", "3", "--layers", "--output", str(tmp_path)]
    done = CliRunner().invoke(app, [*told, "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert len(document["layers"]) >= 10 and all({"component", "name", "op", "ms", "share", "precision"} >= set(r) >= {"component", "name", "op", "ms", "share"} for r in document["layers"])
    assert set(document["layers_sum_ms"]) == {"encoder", "decoder"}
    p50 = document["components"]["encoder"]["latency_ms"]["p50"]
    assert document["layers_overhead"]["encoder"] == pytest.approx(document["layers_sum_ms"]["encoder"] / p50 - 1)
    assert Path(document["page"]).read_text().startswith("<!doctype html>")
    plain = CliRunner().invoke(app, told[:-2])
    assert plain.exit_code == 0 and "layers" in plain.stdout and plain.stdout.count("\n") > 15


def test_a_model_file_alone_has_layers_too(tmp_path: Path) -> None:
    export_onnx.exporter.export(linear_component(), tmp_path / "head.onnx", scheme="fp32")
    found = api.profile(artifact=tmp_path / "head.onnx", threads=1, repeats=2, lengths={"rows": 3}, layers=True)
    assert {r["component"] for r in found["layers"]} == {"model"} and "2" in {r["name"] for r in found["layers"]}


# --- refusals

def test_a_format_without_layers_is_refused_before_anything_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgekd.profiling.bare import ModelFile

    (tmp_path / "a.rknn").write_bytes(b"x")
    monkeypatch.setattr(runner, "latency", lambda *a, **k: pytest.fail("measured"))
    with pytest.raises(UsageError, match=r"'rknn' does not tell") as refused:
        profile_artifact(ModelFile(tmp_path / "a.rknn", "rknn", "fp16"), layers=True)
    assert "onnx" in str(refused.value.hint) and "openvino" in str(refused.value.hint)
    with pytest.raises(UsageError, match="tells no times"):
        plugins.exporter("rknn").layers(tmp_path / "a.rknn", scheme="fp16", inputs={})  # type: ignore[attr-defined]


def test_output_without_layers_is_a_wrong_usage(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--output"):
        api.profile(artifact=artifact, output=tmp_path)


def test_runner__layers_of_a_broken_artifact_are_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main([str(tmp_path / "none"), "--layers"]) == 1
    assert "error" in json.loads(capsys.readouterr().out)
