"""GELU in the order of factors that runtimes know.

torch's exporter writes x * (0.5 * (1 + erf(x / sqrt 2))), and onnxruntime has a kernel for (x * 0.5) * (1 + erf(x / sqrt 2)) only; the
other order stays five operators, each between two changes of layout. The tanh form is the same matter. Moving the 0.5 changes no result
by more than a rounding.

Its kernel is found too late where values around it are quantized: x is read twice, and every reader gets a DequantizeLinear of its own, behind which
nothing is the same x any more. There the five operators become one before they are quantized.
"""
from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx


def reorder(graph: onnx.GraphProto) -> int:
    """Move the constant factor of every GELU to its x, in place; how many there were."""
    made = {output: node for node in graph.node for output in node.output}
    users = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            users[name].append(node)
    scalars = {t.name for t in graph.initializer if list(t.dims) in ([], [1])}
    found = 0
    for half in graph.node:
        constant, one_plus = [i for i in half.input if i in scalars], [i for i in half.input if i not in scalars]
        if half.op_type != "Mul" or len(constant) != 1 or not _is_gate(made.get(one_plus[0]), made):
            continue
        outer = users[half.output[0]]
        if len(outer) == 1 and outer[0].op_type == "Mul":
            (x,) = [i for i in outer[0].input if i != half.output[0]]
            half.input[:], outer[0].input[:] = [x, constant[0]], [half.output[0], one_plus[0]]
            found += 1
    return found


def _is_gate(node: onnx.NodeProto | None, made: dict[str, onnx.NodeProto]) -> bool:
    """Whether a node is 1 + erf(...) or 1 + tanh(...)."""
    return node is not None and node.op_type == "Add" and any(i in made and made[i].op_type in ("Erf", "Tanh") for i in node.input)


def fuse(model: onnx.ModelProto) -> int:
    """Put onnxruntime's own operator, `com.microsoft.Gelu`, in place of every GELU by erf in the order that `reorder` gives, in place; how many
    there were. It keeps the name and the layer of the operator that wrote its result."""
    import onnx

    graph = model.graph
    made = {output: node for node in graph.node for output in node.output}
    users = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            users[name].append(node)
    scalars = {t.name: float(onnx.numpy_helper.to_array(t).item()) for t in graph.initializer if list(t.dims) in ([], [1]) and t.data_type == onnx.TensorProto.FLOAT}
    given, gone, found = {v.name for v in graph.output}, set[str](), 0
    for last in graph.node:
        chain = _chain(last, made, scalars)
        if chain is None or any(len(users[n.output[0]]) != 1 or n.output[0] in given for n in chain[1:]):
            continue
        x = next(i for i in chain[-1].input if i not in scalars)
        last.op_type, last.domain, last.input[:] = "Gelu", "com.microsoft", [x]
        gone.update(n.output[0] for n in chain[1:])
        found += 1
    if not found:
        return 0
    kept = [n for n in graph.node if n.output[0] not in gone]
    del graph.node[:]
    graph.node.extend(kept)
    if not any(o.domain == "com.microsoft" for o in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    return found


def _chain(last: onnx.NodeProto, made: Mapping[str, onnx.NodeProto], scalars: Mapping[str, float]) -> list[onnx.NodeProto] | None:
    """The operators of (x * 0.5) * (1 + erf(x / sqrt 2)) from the last to the one that scales x for erf, or None."""
    def step(name: str, kind: str, constant: float | None) -> tuple[onnx.NodeProto, str] | None:
        """The operator of this kind that writes `name`, and what it reads beside the constant."""
        node = made.get(name)
        if node is None or node.op_type != kind or (kind == "Div" and node.input[0] in scalars):
            return None
        values, rest = [scalars[i] for i in node.input if i in scalars], [i for i in node.input if i not in scalars]
        right = not values if constant is None else len(values) == 1 and math.isclose(values[0], constant, rel_tol=1e-4)
        return (node, rest[0]) if right and len(rest) == 1 else None

    if last.op_type != "Mul" or len(last.input) != 2:
        return None
    for left, right in (last.input, reversed(last.input)):
        half, gate = step(left, "Mul", 0.5), step(right, "Add", 1.0)
        erf = gate and step(gate[1], "Erf", None)
        scaled = erf and (step(erf[1], "Div", math.sqrt(2)) or step(erf[1], "Mul", math.sqrt(0.5)))
        if half and gate and erf and scaled and half[1] == scaled[1]:
            return [last, half[0], gate[0], erf[0], scaled[0]]
    return None
