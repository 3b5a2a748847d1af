"""For tests of latency: small ONNX files, and made-up rows whose times follow a rule that a regression can find."""
from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgekd.latency import features
from edgekd.latency.database import NO_FAMILY, Key, Writer
from edgekd.latency.operators import Operator
from edgekd.measurement import Circumstances

KEY = Key("x86_64+test", "onnx", "onnxruntime 0.0", "fp32", 1)


def _save(path: Path, nodes: list[onnx.NodeProto], shape: tuple[int | str, ...], out: tuple[int | str, ...], weights: dict[str, tuple[int, ...]]) -> Path:
    rng = np.random.default_rng(0)
    tensors = [numpy_helper.from_array((rng.standard_normal(s) / math.sqrt(math.prod(s[1:]) or 1)).astype(np.float32), n) for n, s in weights.items()]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
                              [helper.make_tensor_value_info("y", TensorProto.FLOAT, out)], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def convolutions(path: Path) -> Path:
    """(1, 3, 32, 32) -> 3x3 convolution of stride 2 and relu -> depthwise 3x3 -> 1x1 convolution to (1, 24, 16, 16)."""
    nodes = [helper.make_node("Conv", ["x", "a"], ["1"], "first", strides=[2, 2], pads=[1, 1, 1, 1]), helper.make_node("Relu", ["1"], ["2"], "relu"),
             helper.make_node("Conv", ["2", "b"], ["3"], "depthwise", group=16, pads=[1, 1, 1, 1]), helper.make_node("Conv", ["3", "c"], ["y"], "last")]
    return _save(path, nodes, (1, 3, 32, 32), (1, 24, 16, 16), {"a": (16, 3, 3, 3), "b": (16, 1, 3, 3), "c": (24, 16, 1, 1)})


def attention(path: Path, tokens: int | str = 64) -> Path:
    """Norm and self-attention over (1, tokens, 32)."""
    nodes = [helper.make_node("LayerNormalization", ["x", "scale", "shift"], ["n"], "norm"), helper.make_node("MatMul", ["n", "wq"], ["q"], "to_q"),
             helper.make_node("MatMul", ["n", "wk"], ["k"], "to_k"), helper.make_node("MatMul", ["n", "wv"], ["v"], "to_v"),
             helper.make_node("Transpose", ["k"], ["kt"], "turn", perm=[0, 2, 1]), helper.make_node("MatMul", ["q", "kt"], ["s"], "scores"),
             helper.make_node("Softmax", ["s"], ["p"], "softmax"), helper.make_node("MatMul", ["p", "v"], ["y"], "mix")]
    return _save(path, nodes, (1, tokens, 32), (1, tokens, 32), {"scale": (32,), "shift": (32,), "wq": (32, 32), "wk": (32, 32), "wv": (32, 32)})


# --- rows


def conv(channels: int, out: int, side: int, kernel: int = 3) -> Operator:
    """A convolution of stride 1."""
    return Operator("Conv", "nchwc", ((1, channels, side, side),), ((out, channels, kernel, kernel),), ((1, out, side, side),), {"group": 1})


def add(channels: int, side: int) -> Operator:
    """Of two tensors."""
    return Operator("Add", "", ((1, channels, side, side),) * 2, (), ((1, channels, side, side),))


def product(rows: int, depth: int, columns: int) -> Operator:
    """Of activations with weights."""
    return Operator("Gemm", "", ((rows, depth),), ((columns, depth),), ((rows, columns),), {"transB": 1})


def truth(operator: Operator) -> float:
    """What the made-up device takes, in milliseconds: slow with few channels, and with 1x1 windows."""
    slow = 1 + 24 / max(8, operator.outputs[0][1]) + (0.4 if operator.weights and operator.weights[0][-1] == 1 else 0)
    return 0.004 + 1.7 * slow * features.ideal_ms(operator)


def network(rng: random.Random) -> list[Operator]:
    """A dozen operators of drawn sizes."""
    found: list[Operator] = []
    for _ in range(rng.randrange(6, 14)):
        c, o, side = rng.choice((8, 16, 24, 32, 48, 64, 96, 128)), rng.choice((8, 16, 24, 32, 48, 64, 96, 128)), rng.choice((8, 12, 16, 24, 32, 48))
        found.append(rng.choice((conv(c, o, side), conv(c, o, side, 1), add(c, side), product(side * side, c, o))))
    return found


def writer(families: tuple[str, ...] = ("a", "b", "c", "d"), each: int = 10, drawn: int = 50, noise: float = 0.03, key: Key = KEY, seed: int = 0) -> Writer:
    """Rows of networks of several families, whose wholes are 1.1 times the sum of their operators and 0.02 ms, with noise."""
    rng, made = random.Random(seed), Writer(key, Circumstances(device="made up (2 cores)", os="", python="", date="2026-11-01T00:00:00+00:00"))
    for family in (*families, *[NO_FAMILY] * drawn):
        for n in range(each if family != NO_FAMILY else 1):
            operators = network(rng)
            times = [truth(o) * math.exp(rng.gauss(0, noise)) for o in operators]
            if family == NO_FAMILY:
                made.parts(family, operators, times)
            else:
                made.model(f"{family}{n}", family, operators, times, 1.1 * sum(map(truth, operators)) * math.exp(rng.gauss(0, noise)) + 0.02)
    return made
