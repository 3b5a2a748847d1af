"""What an ONNX file for TensorRT says of itself: operators, types and quantization, held against what TensorRT documents.

The check where NVIDIA's own parser is not installed, and the facts of a file where it is.
"""
from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.export._half import KEPT
from edgekd.export._trtexec import joined

from edgekd.errors import EdgekdError, first_line

if TYPE_CHECKING:
    import numpy as np
    import onnx

HINT = "write the layer with other operators, or use the format onnx"
OPSETS = range(9, 21)
"""that TensorRT 10.3 reads"""

DOCUMENTED = (
    "Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast CastLike Ceil Celu Clip Concat Constant "
    "ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DepthToSpace DequantizeLinear Div Dropout Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor "
    "Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization "
    "HardSigmoid HardSwish Hardmax Identity If InstanceNormalization IsInf IsNaN LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax Loop LRN "
    "LpNormalization LpPool MatMul Max MaxPool Mean MeanVarianceNormalization Min Mish Mod Mul Neg NonZero Not OneHot Or Pad Pow PRelu QuantizeLinear "
    "Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape "
    "Resize Round ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze "
    "Sub Sum Tan Tanh ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Upsample Where Xor")
"""operators that onnx-tensorrt's support matrix has for TensorRT 10, but for recurrent and random ones"""

SUPPORTED = frozenset(DOCUMENTED.split())

ARITHMETIC = ("Conv", "ConvTranspose", "MatMul", "Gemm", "Einsum")
PASSED_THROUGH = ("Transpose", "Reshape", "Unsqueeze", "Squeeze", "Identity")
TYPES = {1: "fp32", 10: "fp16", 16: "bf16", 3: "i8", 17: "fp8"}
"""onnx.TensorProto types that are computed in"""


@dataclass(frozen=True)
class Inside:
    """What a graph computes. `ops` and `arithmetic`: `operator:precision` and precision -> count; `inputs`: name -> shape, symbols included. `kept_fp32`:
    layers of a file in less precision that stay in fp32 -> why, as written into it."""

    inputs: dict[str, list[int | str]]
    outputs: list[str]
    opset: int
    ops: dict[str, int]
    arithmetic: dict[str, int]
    quantize: int
    dequantize: int
    kept_fp32: dict[str, str]

    @property
    def precision(self) -> str:
        """Of the operators that carry the arithmetic."""
        return joined(self.arithmetic)


def inside(file: Path) -> Inside:
    """Read an ONNX file back. Raises EdgekdError when it is none, or breaks ONNX's rules."""
    import onnx

    try:
        onnx.checker.check_model(str(file))
        model = onnx.load(file, load_external_data=False)
        model = onnx.shape_inference.infer_shapes(model)
    except Exception as e:  # protobuf's, onnx's and the file system's
        raise EdgekdError(f"this is no sound ONNX file: {first_line(e)}", where=file, hint="export the model again") from e
    graph, names = model.graph, Counter(n.op_type for n in model.graph.node)
    constants = {t.name for t in graph.initializer}
    found = list(_precisions(graph))
    return Inside(
        inputs={v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.input if v.name not in constants},
        outputs=[v.name for v in graph.output], opset=next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx")),
        ops=dict(Counter(f"{kind}:{precision}" for kind, precision in found).most_common()),
        arithmetic=dict(Counter(precision for kind, precision in found if kind in ARITHMETIC)),
        quantize=names["QuantizeLinear"], dequantize=names["DequantizeLinear"],
        kept_fp32=json.loads(next((p.value for p in model.metadata_props if p.key == KEPT), "{}")))


def unsupported(file: Path) -> list[dict[str, str]]:
    """Nodes whose operators TensorRT 10 does not document: node, operator."""
    import onnx

    graph = onnx.load(file, load_external_data=False).graph
    return [{"node": n.name, "operator": n.op_type} for n in graph.node if n.op_type not in SUPPORTED or n.domain not in ("", "ai.onnx")]


def refuse_unsound(file: Path) -> None:
    """Hold a file's opset and quantization against what TensorRT documents.

    Raises:
        EdgekdError: TensorRT takes one of them in no version, with the node.
    """
    import onnx

    model = onnx.load(file)
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    if opset not in OPSETS:
        raise EdgekdError(f"the file is in opset {opset}, and TensorRT reads {OPSETS.start} to {OPSETS.stop - 1}", where=file)
    constants = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and (reason := _asymmetric(node, constants)):
            raise EdgekdError(f"TensorRT does not take the {node.op_type} of node '{node.name}': {reason}", where=file, hint="use fp16")


def _asymmetric(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> str | None:
    """What TensorRT refuses about a quantizing node."""
    import onnx

    if node.input[1] not in constants:
        return "its scale is computed"
    scale: np.ndarray = onnx.numpy_helper.to_array(constants[node.input[1]])
    if not bool(((scale > 0) & (scale < float("inf"))).all()):
        return "a scale is not positive"
    if node.input[0] in constants and constants[node.input[0]].data_type == onnx.TensorProto.INT32:
        return "a quantized bias"
    zero: Any = constants.get(node.input[2]) if len(node.input) > 2 else None
    if zero is None or zero.data_type not in (onnx.TensorProto.INT8, onnx.TensorProto.FLOAT8E4M3FN):
        return "its type is neither int8 nor fp8 (E4M3)"
    return "a zero point is not 0" if onnx.numpy_helper.to_array(zero).astype("float32").any() else None


def _precisions(graph: onnx.GraphProto) -> Iterator[tuple[str, str]]:
    """(operator, precision) of every node that computes: the type of what it writes, or eight bits for arithmetic whose operands were dequantized."""
    made = {t: n for n in graph.node for t in n.output}
    types = {v.name: v.type.tensor_type.elem_type for v in [*graph.value_info, *graph.input, *graph.output]} | {t.name: t.data_type for t in graph.initializer}
    for node in graph.node:
        kind = types.get(node.output[0], 0)
        if node.op_type in ARITHMETIC:
            operands = [_dequantized(t, made, types) for t in node.input[:2]]
            kind = operands[0] if operands[0] and len(set(operands)) == 1 else kind
        if kind in TYPES and node.op_type != "Constant":
            yield node.op_type, TYPES[kind]


def _dequantized(tensor: str, made: Mapping[str, onnx.NodeProto], types: Mapping[str, int]) -> int | None:
    """The eight-bit type that a tensor was dequantized from."""
    node = made.get(tensor)
    while node is not None and node.op_type in PASSED_THROUGH:
        node = made.get(node.input[0])
    return types.get(node.input[0]) or types.get(node.input[2]) if node is not None and node.op_type == "DequantizeLinear" else None
