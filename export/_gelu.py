"""GELU in the order of factors that runtimes know.

torch's exporter writes x * (0.5 * (1 + erf(x / sqrt 2))), and onnxruntime has a kernel for (x * 0.5) * (1 + erf(x / sqrt 2)) only; the
other order stays five operators, each between two changes of layout. The tanh form is the same matter. Moving the 0.5 changes no result
by more than a rounding.
"""
from __future__ import annotations

from collections import defaultdict
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
