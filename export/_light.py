"""8-bit weights for what stays in float: the linear layers of a decoder's few tokens, whose activations break at 8 bits and whose weights are most of its
file.

onnxruntime computes them as MatMulNBits, in float and as fast as before (measured: 2.12 against 2.14 ms for one prompt, the file 0.44 of its size).
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import onnx

WEIGHTED = ("MatMul", "Gemm")
"""not convolutions: onnxruntime prepares their weights once, which it cannot where they are computed (repvit_s, 14 of a single cell: 0.68 of fp32's time
against 0.54)"""
SMALLEST = 1024
"""weights of a layer from which it is worth the two nodes"""


def lighten(file: Path, stays: Callable[[onnx.NodeProto], bool], *, large: bool) -> int:
    """Rewrite a graph in place, with the constant float weights of its linear layers in 8 bits and a step for each output channel; how many there were.

    Args:
        stays: whether a node's weights are to stay as they are.
        large: the weights lie in a file beside it.
    """
    import onnx
    from onnx import numpy_helper

    model = onnx.load(file)
    graph, constants = model.graph, {t.name: t for t in model.graph.initializer}
    readers = Counter(t for n in graph.node for t in n.input)
    made: list[onnx.NodeProto] = []
    for node in graph.node:
        weight = constants.get(node.input[1]) if node.op_type in WEIGHTED else None
        if weight is None or weight.data_type != onnx.TensorProto.FLOAT or readers[weight.name] > 1 or stays(node):
            continue
        values = numpy_helper.to_array(weight)
        if values.size < SMALLEST or values.ndim != 2:
            continue
        axis = 0 if any(a.name == "transB" and a.i for a in node.attribute) else 1
        levels, steps = _rounded(values, axis)
        graph.initializer.remove(weight)
        graph.initializer.extend([numpy_helper.from_array(levels, f"{weight.name}/levels"), numpy_helper.from_array(steps, f"{weight.name}/steps")])
        made.append(onnx.helper.make_node("DequantizeLinear", [f"{weight.name}/levels", f"{weight.name}/steps"], [weight.name], name=f"{weight.name}/weight", axis=axis))
    if made:
        nodes = [*made, *graph.node]
        del graph.node[:]
        graph.node.extend(nodes)
        location = {"save_as_external_data": True, "all_tensors_to_one_file": True, "location": f"{file.name}.data"} if large else {}
        if large:
            file.with_name(f"{file.name}.data").unlink(missing_ok=True)  # onnx would append to it
        onnx.save(model, file, **location)
    return len(made)


def _rounded(values: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """int8 levels of a matrix and the fp32 step of each index of `axis`, symmetric around 0."""
    import numpy as np

    steps = np.maximum(np.abs(values).max(1 - axis) / 127, 1e-12).astype(np.float32)
    along = np.expand_dims(steps, 1 - axis)
    return np.clip(np.rint(values / along), -127, 127).astype(np.int8), steps
