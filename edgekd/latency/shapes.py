"""Shapes of every tensor of a graph that onnxruntime optimised. It writes those of standard operators into the file but not those of its own layouts,
and ONNX knows nothing of either: the latter are computed here, the rest is asked of the file, then of ONNX's own rules."""
from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from edgekd.latency.operators import Shape

if TYPE_CHECKING:
    import onnx

BLOCK = 16
"""Channels in one block of onnxruntime's NCHWc layout on CPUs with AVX-512; 8 on others. It only rounds channel counts up."""
TYPES = {1: "f32", 2: "u8", 3: "i8", 6: "i32", 7: "i64", 9: "bool", 10: "f16", 11: "f64", 16: "bf16"}
"""onnx.TensorProto's numbers of types"""


class Shapes:
    """Fed with nodes in order by `after`; `of` answers for every tensor met so far."""

    def __init__(self, model: onnx.ModelProto) -> None:
        import onnx

        self._onnx, graph = onnx, model.graph
        self._opsets = {o.domain: o.version for o in model.opset_import}
        self._types: dict[str, Any] = {}
        for value in [*graph.input, *graph.value_info, *graph.output]:
            if value.type.tensor_type.HasField("shape"):
                self._types[value.name] = value.type
        self._data = {t.name: t for t in graph.initializer if not t.external_data}
        for tensor in graph.initializer:
            self._types[tensor.name] = self._typed(tensor.data_type, tuple(tensor.dims))

    def of(self, name: str) -> Shape:
        """Axes of unknown length count as 1."""
        found = self._types.get(name)
        return () if found is None else tuple(d.dim_value or 1 for d in found.tensor_type.shape.dim)

    def type_of(self, node: onnx.NodeProto) -> str:
        """Of the node's first input."""
        found = self._types.get(node.input[0] if node.input else node.output[0])
        return "f32" if found is None else TYPES.get(found.tensor_type.elem_type, "f32")

    def after(self, node: onnx.NodeProto) -> list[Shape]:
        """Shapes of the outputs of the next node."""
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                self._data[node.output[0]] = attribute.t
                self._types[node.output[0]] = self._typed(attribute.t.data_type, tuple(attribute.t.dims))
        if any(name and not self._known(name) for name in node.output):
            self._infer(node)
        return [self.of(name) for name in node.output if name]

    def _known(self, name: str) -> bool:
        found = self._types.get(name)
        return found is not None and all(d.HasField("dim_value") for d in found.tensor_type.shape.dim)

    def _infer(self, node: onnx.NodeProto) -> None:
        own = self._own(node)
        if own is None:
            try:
                schema = self._onnx.defs.get_schema(node.op_type, self._opsets.get(node.domain, 1), node.domain)
                given = {n: self._types[n] for n in node.input if n in self._types}
                data = {n: self._data[n] for n in node.input if n in self._data}
                opsets = [self._onnx.helper.make_opsetid(d, v) for d, v in self._opsets.items()]
                found = self._onnx.shape_inference.infer_node_outputs(schema, node, given, data, opset_imports=opsets)
                self._types |= {name: kind for name, kind in found.items() if kind.tensor_type.HasField("shape")}
            except Exception:  # an operator that ONNX has never heard of: most of those keep their input's shape
                pass
        first = self._types.get(node.input[0]) if node.input else None
        kind = first.tensor_type.elem_type if first is not None else 1
        for position, name in enumerate(node.output):
            if name and (own is not None or name not in self._types):
                self._types[name] = self._typed(kind, own if own is not None and position == 0 else self.of(node.input[0]) if node.input else ())

    def _typed(self, kind: int, shape: Shape) -> Any:
        return self._onnx.helper.make_tensor_type_proto(kind, shape)

    def _own(self, node: onnx.NodeProto) -> Shape | None:
        """The first output of one of onnxruntime's own operators, or None for all others."""
        facts = {a.name: self._onnx.helper.get_attribute_value(a) for a in node.attribute}
        shapes = [self.of(n) for n in node.input]
        if node.domain.endswith("nchwc"):
            return _nchwc(node.op_type, shapes, facts)
        if node.op_type in ("FusedConv", "NhwcFusedConv"):
            return _windowed(shapes[0], shapes[1][0], shapes[1][2:], facts)
        if node.op_type == "QLinearConv":
            return _windowed(shapes[0], shapes[3][0], shapes[3][2:], facts)
        if node.op_type in ("FusedMatMul", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"):
            a, b = shapes[0], shapes[1]
            rows, columns = a[-1] if facts.get("transA") else a[-2], b[-2] if facts.get("transB") else b[-1]
            return (*(max(a[:-2], b[:-2], key=math.prod)), rows, columns)
        if node.op_type == "QGemm":
            return (shapes[0][0], shapes[3][0] if facts.get("transB") else shapes[3][1])
        return None


def _nchwc(op: str, shapes: list[Shape], facts: dict[str, Any]) -> Shape:
    """The output of an operator on blocked channels."""
    x = shapes[0]
    if op == "Conv":
        return _windowed(x, shapes[1][0], shapes[1][2:], facts)
    if op in ("MaxPool", "AveragePool"):
        return _windowed(x, x[1], tuple(facts["kernel_shape"]), facts)
    if op.startswith("Global"):
        return (*x[:2], 1, 1)
    if op == "Upsample":
        return tuple(int(n * s) for n, s in zip(x, facts["scales"], strict=True))
    if op == "ReorderInput":
        n, c, *sides = (x[0], x[-1], *x[1:-1]) if facts.get("channels_last") else x
        return (n, math.ceil(c / BLOCK) * BLOCK, *sides)
    if op == "ReorderOutput":
        c = int(facts["channels"])
        return (x[0], *x[2:], c) if facts.get("channels_last") else (x[0], c, *x[2:])
    return x


def _windowed(x: Shape, channels: int, window: Shape, facts: dict[str, Any]) -> Shape:
    """The output of a convolution or pooling with kernel `window`."""
    axes = len(window)
    strides, pads, dilations = facts.get("strides", [1] * axes), list(facts.get("pads", [0] * 2 * axes)), facts.get("dilations", [1] * axes)
    same = str(facts.get("auto_pad", b"NOTSET")).find("SAME") >= 0
    sides = [math.ceil(n / s) if same else (n + pads[i] + pads[i + axes] - (k - 1) * d - 1) // s + 1
             for i, (n, k, s, d) in enumerate(zip(x[2:], window, strides, dilations, strict=True))]
    return (x[0], channels, *sides)
