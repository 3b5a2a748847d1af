"""8 bits for constants of what stays in float: the linear layers of a decoder's few tokens, whose activations break at 8 bits and whose weights are most of
its file; convolutions of a single cell; tables of position and attention biases, which can outweigh all weights of a small transformer.

    MatMul, Gemm         DequantizeLinear: onnxruntime computes them as MatMulNBits, in float and as fast as before (measured: 2.12 against 2.14 ms for one
                         prompt, the file 0.44 of its size)
    everything else      Cast and Mul, which onnxruntime computes once when it opens the file: it runs as if they were not there. (It leaves a
                         DequantizeLinear where it is, and so a convolution could not prepare its weights: repvit_s, 0.68 of fp32's time against 0.54.)
"""
from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import onnx

LINEAR = ("MatMul", "Gemm")
CONVOLUTIONS = ("Conv", "ConvTranspose")
TABLES = ("Add", "Sub")
"""what adds a table to activations"""
SMALLEST = 1024
"""numbers of a constant from which it is worth the nodes"""


def lighten(file: Path, stays: Callable[[onnx.NodeProto], bool], *, large: bool) -> int:
    """Rewrite a graph in place, with float constants of its layers and its tables in 8 bits: a step for each output channel of weights, one for each row
    of a table. How many there were.

    Args:
        stays: whether a node's constants are to stay as they are.
        large: the weights lie in a file beside it.
    """
    import onnx
    from onnx import numpy_helper

    model = onnx.load(file)
    graph, readers = model.graph, defaultdict[str, list[onnx.NodeProto]](list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)
    made, found = list[onnx.NodeProto](), 0
    for constant in [t for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT and math.prod(t.dims) >= SMALLEST]:
        used = readers[constant.name]
        kept = _axes(constant.name, used, constant.dims)
        if kept is None or any(stays(node) for node in used):
            continue
        found += 1
        levels, steps = rounded(numpy_helper.to_array(constant), kept)
        whole, step = f"{constant.name}/levels", f"{constant.name}/steps"
        graph.initializer.remove(constant)
        if used[0].op_type in LINEAR:
            steps = steps.reshape(-1)
            made.append(onnx.helper.make_node("DequantizeLinear", [whole, step], [constant.name], name=f"{constant.name}/weight", axis=kept[0]))
        else:
            made += [onnx.helper.make_node("Cast", [whole], [f"{whole}/float"], name=f"{constant.name}/cast", to=onnx.TensorProto.FLOAT),
                     onnx.helper.make_node("Mul", [f"{whole}/float", step], [constant.name], name=f"{constant.name}/weight")]
        graph.initializer.extend([numpy_helper.from_array(levels, whole), numpy_helper.from_array(steps, step)])
    if made:
        nodes = [*made, *graph.node]
        del graph.node[:]
        graph.node.extend(nodes)
        save(model, file, large=large)
    return found


def save(model: onnx.ModelProto, file: Path, *, large: bool) -> None:
    """Write a whole graph in the place of the one in `file`; when `large`, its weights beside it."""
    import onnx

    beside = file.with_name(f"{file.name}.data")
    if large:
        beside.unlink(missing_ok=True)  # onnx would append to it
    onnx.save(model, file, **({"save_as_external_data": True, "all_tensors_to_one_file": True, "location": beside.name} if large else {}))


def _axes(name: str, used: list[onnx.NodeProto], shape: Sequence[int]) -> tuple[int, ...] | None:
    """The axes of a constant along which every index has a step of its own; None for one that is no weight of a layer and no table."""
    kinds = {node.op_type for node in used}
    if kinds and kinds <= set(TABLES):
        return rows(shape)
    if len(used) != 1 or list(used[0].input).index(name) != 1:
        return None
    (node,) = used
    if node.op_type in LINEAR and len(shape) == 2:
        return (0,) if any(a.name == "transB" and a.i for a in node.attribute) else (1,)
    if node.op_type in CONVOLUTIONS:
        return (0,) if node.op_type == "Conv" else (1,)
    return None


def rows(shape: Sequence[int]) -> tuple[int, ...] | None:
    """The axes of a table that number its rows; None for a single row, which is a bias."""
    return tuple(range(len(shape) - 1)) if len(shape) > 1 and shape[-2] > 1 else None


def rounded(values: np.ndarray, kept: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """int8 levels and their fp32 steps, which are symmetric around 0 and have length 1 along all axes but those kept."""
    import numpy as np

    others = tuple(i for i in range(values.ndim) if i not in kept)
    steps = np.maximum(np.abs(values).max(others, keepdims=True) / 127, 1e-12).astype(np.float32)
    return np.clip(np.rint(values / steps), -127, 127).astype(np.int8), steps
