"""One operator as a runtime executes it: what it is, what it reads and writes, and the work that follows from that.

`edgekd.latency.graphs` reads them out of a file; `edgekd.latency.features` turns them into numbers; the database keeps them by `told`.
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Shape = tuple[int, ...]

CONVOLUTIONS = {"Conv", "FusedConv", "QLinearConv", "ConvInteger", "NhwcFusedConv", "Convolution", "GroupConvolution"}
TRANSPOSED = {"ConvTranspose", "Deconvolution", "GroupDeconvolution"}
PRODUCTS = {"MatMul", "Gemm", "FusedMatMul", "FusedGemm", "FullyConnected", "QLinearMatMul", "MatMulInteger", "DynamicQuantizeMatMul", "QGemm", "MatMulIntegerToFloat"}
ATTENTIONS = {"ScaledDotProductAttention", "MultiHeadAttention", "Attention"}
BYTES = {"f32": 4, "f16": 2, "bf16": 2, "i8": 1, "u8": 1, "i32": 4, "i64": 8, "f64": 8, "bool": 1}


def elements(shape: Shape) -> int:
    """How many numbers a tensor of this shape holds; 1 for a scalar."""
    return math.prod(shape)


@dataclass(frozen=True)
class Operator:
    """An operator of the executed graph.

    Args:
        op: its type in the runtime's own words (`Conv`, `FullyConnected`).
        kernel: what the runtime runs it by, where it says so (`brgconv_avx512_1x1_f32`; of onnxruntime the domain `nchwc`).
        inputs: shapes of what is computed by others.
        weights: shapes of what is constant.
        outputs: shapes of what it writes.
        facts: `kernel`, `strides`, `group`, `perm`, ... as the graph says.
        fused: kinds of the operators that were joined into it (`Relu`).
        type: of its activations, `f32`.
    """

    op: str
    kernel: str = ""
    inputs: tuple[Shape, ...] = ()
    weights: tuple[Shape, ...] = ()
    outputs: tuple[Shape, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    fused: tuple[str, ...] = ()
    type: str = "f32"
    name: str = field(default="", compare=False)

    @property
    def kind(self) -> str:
        """Operators of one kind run the same code: `Conv/nchwc`."""
        return f"{self.op}/{self.kernel}" if self.kernel else self.op

    @property
    def family(self) -> str:
        """`conv`, `matmul` or `memory`: what bounds it."""
        if self.op in CONVOLUTIONS | TRANSPOSED:
            return "conv"
        return "matmul" if self.op in PRODUCTS | ATTENTIONS or (self.op == "Subgraph" and "MatMul" in self.fused) else "memory"

    @property
    def macs(self) -> int:
        """Multiply-adds; 0 for what only moves or maps numbers."""
        out = elements(self.outputs[0]) if self.outputs else 0
        if self.op in CONVOLUTIONS and self.weights:
            return out * elements(self.weights[0][2 if self.grouped else 1:])
        if self.op in TRANSPOSED and self.weights:
            return elements(self.inputs[0]) * elements(self.weights[0][1:])
        if self.op in PRODUCTS:
            return out * self.depth
        if self.family == "matmul" and len(self.inputs) >= 3 and len(self.inputs[0]) >= 2:  # attention: q k^T, then the weights times v
            q, other = self.inputs[0], max(elements(s) for s in self.inputs[1:3])
            length = other // max(1, elements(q[:-2]) * q[-1])
            return 2 * elements(q) * max(1, length)
        return 0

    @property
    def grouped(self) -> bool:
        """Whether the weights of a convolution have their groups as an axis of their own, (G, O/G, I/G, ...), as OpenVINO's have."""
        return bool(self.weights and self.outputs) and len(self.weights[0]) == len(self.outputs[0]) + 1

    @property
    def depth(self) -> int:
        """K of a product (..., M, K) x (..., K, N), whichever side is transposed or constant."""
        out, sides = self.outputs[0], [s for s in (*self.inputs, *self.weights) if len(s) >= 2]
        if len(out) < 2 or not sides:
            return 1
        size, other = elements(sides[0][-2:]), elements(sides[1][-2:]) if len(sides) > 1 else 0
        left = size // out[-2]  # if the first is the left side
        return max(1, left if left * out[-1] == other or (not size % out[-2] and other == 0) else size // out[-1])

    @property
    def bytes_in(self) -> int:
        """Read of what others computed."""
        return self._bytes(self.inputs)

    @property
    def bytes_weights(self) -> int:
        """Read of constants."""
        return self._bytes(self.weights)

    @property
    def bytes_out(self) -> int:
        """Written."""
        return self._bytes(self.outputs)

    def _bytes(self, shapes: Sequence[Shape]) -> int:
        return BYTES.get(self.type, 4) * sum(map(elements, shapes))

    def told(self) -> dict[str, Any]:
        """For a row of the database; what is empty is left out. `Operator.read` is the way back."""
        row: dict[str, Any] = {"op": self.op, "kernel": self.kernel, "in": [_short(s) for s in self.inputs], "w": [_short(s) for s in self.weights],
                               "out": [_short(s) for s in self.outputs], "facts": dict(self.facts), "fused": list(self.fused),
                               "type": "" if self.type == "f32" else self.type}
        return {k: v for k, v in row.items() if v}

    @classmethod
    def read(cls, row: Mapping[str, Any]) -> Operator:
        """What `told` wrote.

        Raises:
            ValueError, KeyError, TypeError: it is not of an operator.
        """
        shapes = {key: tuple(tuple(int(n) for n in s.split("x")) if s else () for s in row.get(key, ())) for key in ("in", "w", "out")}
        return cls(str(row["op"]), str(row.get("kernel", "")), shapes["in"], shapes["w"], shapes["out"], dict(row.get("facts", {})),
                   tuple(row.get("fused", ())), str(row.get("type", "f32")))


def _short(shape: Shape) -> str:
    return "x".join(map(str, shape))
