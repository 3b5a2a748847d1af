"""Graphs as they are executed, and operators as numbers."""
from __future__ import annotations

import importlib.util
from pathlib import Path

import latency_samples
import numpy as np
import onnx
import onnxruntime as ort
import pytest

from edgekd.errors import EdgekdError, UsageError
from edgekd.latency import features, graphs
from edgekd.latency.operators import Operator, elements
from edgekd.latency.shapes import Shapes

needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason='pip install "edgekd[openvino]"')


@pytest.fixture(scope="module")
def conv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return latency_samples.convolutions(tmp_path_factory.mktemp("conv") / "conv.onnx")


@pytest.fixture(scope="module")
def attention(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return latency_samples.attention(tmp_path_factory.mktemp("attention") / "attention.onnx")


CONV_MACS = 16 * 16 * (16 * 27 + 16 * 9 + 24 * 16)
ATTENTION_MACS = 3 * 64 * 32 * 32 + 2 * 64 * 64 * 32


@pytest.mark.parametrize("format", ["onnx", pytest.param("openvino", marks=needs_openvino)])
def test_executed__has_all_the_work_and_the_fusions(conv: Path, format: str) -> None:
    found = graphs.executed(conv, format)
    convolutions = [o for o in found if o.family == "conv"]
    # onnxruntime's blocks of 16 channels leave 24 output channels as 32
    assert len(convolutions) == 3 and sum(o.macs for o in found) in (CONV_MACS, CONV_MACS + 16 * 16 * 8 * 16)
    assert not any(o.op in ("Relu", "Eltwise") for o in found) and any("Relu" in f for o in convolutions for f in o.fused)
    assert all(o.outputs and elements(o.outputs[0]) > 1 for o in found)


@pytest.mark.parametrize("format", ["onnx", pytest.param("openvino", marks=needs_openvino)])
def test_executed__has_attention_in_pieces_or_joined(attention: Path, format: str) -> None:
    found = graphs.executed(attention, format)
    assert sum(o.macs for o in found) == ATTENTION_MACS
    assert sum(o.family == "matmul" for o in found) >= 3


def test_executed__shapes_are_those_that_run(conv: Path, attention: Path, tmp_path: Path) -> None:
    for path, shape in ((conv, (1, 3, 32, 32)), (attention, (1, 64, 32))):
        ran = _shapes_of_a_run(path, shape, tmp_path)
        read = {o.name: list(o.outputs) for o in graphs.executed(path, "onnx")}
        assert read.keys() <= ran.keys() and read
        assert all(read[name] == ran[name] for name in read)


def _shapes_of_a_run(path: Path, shape: tuple[int, ...], folder: Path) -> dict[str, list[tuple[int, ...]]]:
    import json

    options = graphs.session_options(1)
    options.enable_profiling, options.profile_file_prefix = True, str(folder / path.stem)
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    session.run(None, {"x": np.zeros(shape, np.float32)})
    events = json.loads(Path(session.end_profiling()).read_text())
    return {e["name"].removesuffix("_kernel_time"): [tuple(*t.values()) for t in e["args"]["output_type_shape"]] for e in events
            if e["cat"] == "Node" and e["name"].endswith("_kernel_time")}


@pytest.mark.parametrize("format", ["onnx", pytest.param("openvino", marks=needs_openvino)])
def test_executed__axes_of_any_length_are_as_long_as_asked(tmp_path: Path, format: str) -> None:
    path = latency_samples.attention(tmp_path / "any.onnx", tokens="N")
    work = {n: sum(o.macs for o in graphs.executed(path, format, lengths={"N": n})) for n in (1, 64)}
    assert work == {1: 3 * 32 * 32 + 2 * 32, 64: ATTENTION_MACS}


def test_plain__is_the_graph_of_the_file(conv: Path, tmp_path: Path) -> None:
    assert [o.op for o in graphs.plain(conv)] == ["Conv", "Relu", "Conv", "Conv"]
    assert sum(o.macs for o in graphs.plain(conv)) == CONV_MACS
    path = latency_samples.attention(tmp_path / "any.onnx", tokens="N")
    assert sum(o.macs for o in graphs.plain(path, {"N": 64})) == ATTENTION_MACS


def test_refusals__say_what_is_wrong(tmp_path: Path, conv: Path) -> None:
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(conv.read_bytes()[:100])
    with pytest.raises(EdgekdError):
        graphs.plain(damaged)
    with pytest.raises(EdgekdError) as e:
        graphs.executed(damaged, "onnx")
    assert e.value.hint
    with pytest.raises(UsageError, match="readable graph"):
        graphs.executed(conv, "coreml")


def test_shapes__of_blocked_channels() -> None:
    def after(op: str, inputs: dict[str, tuple[int, ...]], **attributes: object) -> tuple[int, ...]:
        node = onnx.helper.make_node(op, list(inputs), ["y"], domain="com.microsoft.nchwc", **attributes)
        values = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in inputs.items()]
        model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", values, []))
        return Shapes(model).after(node)[0]

    assert after("ReorderInput", {"x": (1, 20, 7, 9)}) == (1, 32, 7, 9)
    assert after("ReorderInput", {"x": (1, 7, 9, 20)}, channels_last=1) == (1, 32, 7, 9)
    assert after("ReorderOutput", {"x": (1, 32, 7, 9)}, channels=20) == (1, 20, 7, 9)
    assert after("ReorderOutput", {"x": (1, 32, 7, 9)}, channels=20, channels_last=1) == (1, 7, 9, 20)
    assert after("Conv", {"x": (1, 16, 9, 9), "w": (32, 16, 3, 3)}, strides=[2, 2], pads=[1, 1, 1, 1]) == (1, 32, 5, 5)
    assert after("MaxPool", {"x": (1, 16, 8, 8)}, kernel_shape=[2, 2], strides=[2, 2]) == (1, 16, 4, 4)
    assert after("GlobalAveragePool", {"x": (1, 16, 8, 8)}) == (1, 16, 1, 1)
    assert after("Upsample", {"x": (1, 16, 8, 8)}, scales=[1, 1, 2, 2]) == (1, 16, 16, 16)


def test_operator__is_told_and_read_back() -> None:
    for operator in (latency_samples.conv(16, 32, 24), latency_samples.add(8, 12), Operator("Gather", type="i64", inputs=((3, 4),), outputs=((),))):
        assert Operator.read(operator.told()) == operator


@pytest.mark.parametrize(("operator", "macs"), [
    (Operator("Convolution", "", ((1, 8, 4, 4),), ((8, 1, 1, 3, 3),), ((1, 8, 4, 4),)), 8 * 16 * 9),
    (Operator("Convolution", "", ((1, 8, 4, 4),), ((2, 6, 4, 1, 1),), ((1, 12, 4, 4),)), 12 * 16 * 4),
    (Operator("ConvTranspose", "", ((1, 8, 4, 4),), ((8, 6, 2, 2),), ((1, 6, 8, 8),)), 8 * 16 * 24),
    (Operator("FusedMatMul", "", ((2, 5, 7), (2, 5, 3)), (), ((2, 7, 3),), {"transA": 1}), 2 * 5 * 7 * 3),
    (Operator("MatMul", "", ((1, 6, 16, 9),), ((1, 1, 5, 16),), ((1, 6, 5, 9),)), 6 * 5 * 16 * 9),
    (Operator("Gemm", "", ((10, 7),), ((3, 7), (3,)), ((10, 3),), {"transB": 1}), 210),
    (Operator("Subgraph", "", ((4, 1, 64, 32),) * 3, (), ((4, 1, 64, 32),), {}, ("MatMul", "MatMul", "Softmax")), 2 * 4 * 64 * 64 * 32),
    (latency_samples.add(8, 12), 0),
])
def test_macs__whichever_way_the_weights_lie(operator: Operator, macs: int) -> None:
    assert operator.macs == macs


def test_features__tell_what_matters_apart() -> None:
    def at(operator: Operator, name: str) -> float:
        return features.vector(operator)[features.NAMES.index(name)]

    plain, deep = latency_samples.conv(32, 32, 16), Operator("Conv", "nchwc", ((1, 32, 16, 16),), ((32, 1, 3, 3),), ((1, 32, 16, 16),), {"group": 32})
    assert (at(plain, "depthwise"), at(deep, "depthwise")) == (0.0, 1.0)
    assert at(latency_samples.conv(20, 32, 16), "rest_in") > at(plain, "rest_in") == 0.0
    assert at(plain, "macs") > at(deep, "macs") and at(latency_samples.add(8, 8), "macs") == 0.0
    assert at(latency_samples.conv(512, 512, 64), "set_l2") > 0 > at(latency_samples.conv(8, 8, 8), "set_l2")
    window = Operator("Transpose", "", ((2, 8, 8, 64),), (), ((2, 8, 8, 64),), {"perm": [0, 2, 1, 3]})
    whole = Operator("Transpose", "", ((2, 64, 64),), (), ((2, 64, 64),), {"perm": [0, 2, 1]})
    assert at(window, "inner") > at(whole, "inner")
    relu, gelu = (Operator("Convolution", "k", plain.inputs, plain.weights, plain.outputs, {}, (kind,)) for kind in ("Relu", "Gelu"))
    assert (at(relu, "slow"), at(gelu, "slow")) == (0.0, 1.0)
    assert np.isfinite(features.table([plain, deep, window, whole, Operator("Shape", outputs=((),))])).all()


def test_ideal__grows_with_work() -> None:
    times = [features.ideal_ms(latency_samples.conv(c, c, side)) for c, side in ((8, 8), (16, 8), (16, 16), (64, 32), (256, 64))]
    assert times == sorted(times) and times[0] > 0
