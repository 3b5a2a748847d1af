"""The operators of a `.tflite` file, read from its flatbuffer: what an exporter asks of a graph before and after it is quantized or compiled."""
from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

WEIGHTED = {"CONV_2D": "CONV_2D", "DEPTHWISE_CONV_2D": "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV": "CONV_2D_TRANSPOSE", "FULLY_CONNECTED": "FULLY_CONNECTED"}
"""Operators with constant weights: the file's name -> the quantizer's."""

ARITHMETIC = {*WEIGHTED, "BATCH_MATMUL"}
TYPES = {"float32": "f32", "float16": "f16", "float64": "f64", "int8": "i8", "uint8": "u8", "int16": "i16", "int32": "i32", "int64": "i64", "bool": "bool"}
PRECISIONS = {"i8": "int8", "i16": "int16", "f32": "fp32", "f16": "fp16"}
WIDE = 1000.0
SMALL = 1 / 200

LAYER, PLACE = "layer=", "at="
"""What `_litert.convert` puts before a module's path in the names of tensors: of a torch operator with weights, and of any other. The converter joins
the names of what it merges with `;` and numbers what would be called the same."""


def tag(kind: str, inputs: list[str], outputs: list[str]) -> str:
    """The type that an operator computes in: that of its output; and of arithmetic on floats with 8-bit weights, which quantizes the floats on the
    way, theirs."""
    result = TYPES.get(outputs[0], outputs[0]) if outputs else "none"
    return "i8" if kind in ARITHMETIC and result == "f32" and "int8" in inputs else result


def precision(tags: list[str]) -> str:
    """What arithmetic of these types is called together: `int8`, or `int8+fp32` when both are left."""
    found = {PRECISIONS.get(t, t): tags.count(t) for t in tags}
    return "+".join(sorted(found, key=lambda p: (not p.startswith("int"), -found[p]))) or "fp32"


class Graph:
    """The operators of a `.tflite` file, by their number."""

    def __init__(self, file: str) -> None:
        from ai_edge_litert.tools import flatbuffer_utils

        model = flatbuffer_utils.read_model(file)
        self._graph, self._buffers = model.subgraphs[0], model.buffers
        self._operators = self._graph.operators
        self.kinds = [str(flatbuffer_utils.opcode_to_name(model, o.opcodeIndex)) for o in self._operators]
        self._from = {int(t): i for i, o in enumerate(self._operators) for t in o.outputs}

        self._types = {v: k.lower() for k, v in vars(flatbuffer_utils.TensorType).items() if isinstance(v, int)}

    def ranks(self) -> dict[str, int]:
        """Tensor name -> number of its axes."""
        return {t.name.decode(): 0 if t.shape is None else len(t.shape) for t in self._graph.tensors}

    def types(self, operator: int) -> tuple[list[str], list[str]]:
        """Types of its inputs and of its outputs: `float32`, `int8`."""
        o = self._operators[operator]
        return tuple([self._types[self._graph.tensors[int(t)].type] for t in found if int(t) >= 0] for found in (o.inputs, o.outputs))  # type: ignore[return-value]

    @property
    def arithmetic(self) -> list[int]:
        """Operators with weights."""
        return [i for i, kind in enumerate(self.kinds) if kind in WEIGHTED]

    def scope(self, operator: int) -> str:
        """What the quantizer's regular expressions see of an operator."""
        from ai_edge_quantizer.utils.tfl_flatbuffer_utils import get_op_scope

        return str(get_op_scope(self._operators[operator], self._graph.tensors))

    def layer(self, operator: int) -> str | None:
        """The torch layer that an operator with weights is. Its weight's own name says it; that of its output where something was multiplied into the
        weight."""
        weight = self._graph.tensors[int(self._operators[operator].inputs[1])].name.decode()
        return next(iter(_named(weight, LAYER) + _named(self.scope(operator), LAYER)), None)

    def of(self, layers: Collection[str]) -> dict[int, str]:
        """Operators with weights that are one of these layers -> which."""
        found = {i: self.layer(i) for i in self.arithmetic}
        return {i: name for i, name in found.items() if name is not None and name in layers}

    def ends(self, operator: int) -> tuple[str, str]:
        """Names of the tensors that an operator with weights reads and writes."""
        o = self._operators[operator]
        data = int(o.inputs[2] if self.kinds[operator] == "TRANSPOSE_CONV" else o.inputs[0])
        return self._graph.tensors[data].name.decode(), self._graph.tensors[int(o.outputs[0])].name.decode()

    def peaks(self, operator: int) -> Any:
        """(O,) largest absolute weight of every output channel."""
        import numpy as np

        tensor = self._graph.tensors[int(self._operators[operator].inputs[1])]
        weight = np.frombuffer(bytes(self._buffers[tensor.buffer].data), np.float32).reshape([int(n) for n in tensor.shape])
        axis = 3 if self.kinds[operator] == "DEPTHWISE_CONV_2D" else 0
        return np.abs(weight).max(axis=tuple(i for i in range(weight.ndim) if i != axis))

    def broken(self, ranges: Mapping[str, Any]) -> str | None:
        """Where the graph first computes NaN or infinity, by these ranges: the path of a module, or the name of a tensor."""
        for o in self._operators:
            for name in (self._graph.tensors[int(t)].name.decode() for t in o.outputs):
                if name in ranges and not all(math.isfinite(end) for end in ranges[name]):
                    return next(iter(_named(name, LAYER) + _named(name, PLACE)), "what belongs to no layer")
        return None

    def before(self, kinds: set[str]) -> set[int]:
        """Operators of these kinds and all that they depend on."""
        found: set[int] = set()
        waiting = [i for i, kind in enumerate(self.kinds) if kind in kinds]
        while waiting:
            operator = waiting.pop()
            if operator not in found:
                found.add(operator)
                waiting.extend(self._sources(operator))
        return found

    def _sources(self, operator: int) -> list[int]:
        return [self._from[int(t)] for t in self._operators[operator].inputs if int(t) in self._from]

    def wide(self, ranges: Mapping[str, Any]) -> set[int]:
        """Operators that read or write what passed `WIDE`."""
        def largest(tensor: int) -> float:
            seen = ranges.get(self._graph.tensors[tensor].name.decode()) if tensor >= 0 else None
            return max(abs(end) for end in seen) if seen else 0.0

        return {i for i, o in enumerate(self._operators) if any(largest(int(t)) > WIDE for t in [*o.inputs, *o.outputs])}

    def masked(self, ranges: Mapping[str, Any]) -> set[int]:
        """A softmax of what passed `WIDE`, and the wide operators that it comes from."""
        wide = self.wide(ranges)
        found: set[int] = set()
        waiting = [i for i in wide if self.kinds[i] == "SOFTMAX"]
        while waiting:
            operator = waiting.pop()
            if operator in wide and operator not in found:
                found.add(operator)
                waiting.extend(self._sources(operator))
        return found

    def small(self) -> set[int]:
        """Operators with weights that do less than `SMALL` of all their multiplications."""
        work = {i: self._multiplications(i) for i in self.arithmetic}
        return {i for i, n in work.items() if n < SMALL * sum(work.values())}

    def _multiplications(self, operator: int) -> int:
        o, kind = self._operators[operator], self.kinds[operator]
        weights = self._shape(o.inputs[1])
        if kind == "TRANSPOSE_CONV":  # weights (out, h, w, in), the third input is the image
            return math.prod(self._shape(o.inputs[2])) * math.prod(weights[:3])
        each = {"CONV_2D": weights[1:], "DEPTHWISE_CONV_2D": weights[1:3], "FULLY_CONNECTED": weights[1:]}[kind]
        return math.prod(self._shape(o.outputs[0])) * math.prod(each)

    def _shape(self, tensor: int) -> list[int]:
        shape = self._graph.tensors[tensor].shape
        return [] if shape is None else [int(n) for n in shape]


def _named(text: str, prefix: str) -> list[str]:
    """The paths in a tensor's name that stand behind `prefix`."""
    return [part.removeprefix(prefix) for part in text.split(";") if part.startswith(prefix) and part != prefix]
