"""Float ONNX graph -> int8 by onnxruntime's quantizer: which operators are worth it, and in which style."""
from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.export._half import layer_of

from edgekd.errors import EdgekdError, first_line
from edgekd.tuning import PLAIN, Tuning, stays_float

if TYPE_CHECKING:
    import numpy as np
    import onnx

ARITHMETIC = ("Conv", "MatMul", "Gemm")  # what is worth quantizing
QDQ_STYLES = {
    "u8s8": {},
    "s8s8_symmetric": {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
}


@dataclass(frozen=True)
class Source:
    """A float graph: where it lies, what errors call it, whether its weights lie beside it, and whether activations of any length are quantized."""

    file: Path
    where: str
    large: bool
    varying: bool = False


def quantize(source: Source, target: Path, *, scheme: str, calibration: Any, qdq: str, tuning: Tuning = PLAIN) -> None:
    """Write the int8 form of a float graph to `target`. Raises EdgekdError when there is nothing to quantize or a step fails."""
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    large = source.large
    graph = onnx.load(source.file, load_external_data=False)
    floats = {n.name for n in graph.graph.node if stays_float(layer_of(n), tuning)}
    nodes = [n for n in quantizable(graph, dynamic=scheme == "w8_dynamic", varying=source.varying) if n not in floats]
    if not nodes:
        kinds = "MatMul or Gemm with constant weights" if scheme == "w8_dynamic" else "Conv, MatMul or Gemm with constant weights"
        raise EdgekdError(f"nothing to quantize: {scheme} works on {kinds}, and the graph has none", where=source.where,
                          hint="use w8a8_static for convolutional models" if scheme == "w8_dynamic" else "use fp32")
    try:
        with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
            ready = str(Path(folder) / "ready.onnx")
            # From a file: given a graph in memory, quant_pre_process looks for its weights in a file it removed.
            quant_pre_process(str(source.file), ready, skip_symbolic_shape=True, save_as_external_data=large, all_tensors_to_one_file=large)
            if scheme == "w8_dynamic":  # by kind, not by name: each Gemm is first renamed into a MatMul, and only constant weights are taken
                quantize_dynamic(ready, str(target), op_types_to_quantize=["MatMul", "Gemm"], per_channel=True, weight_type=QuantType.QInt8,
                                 use_external_data_format=large)
            else:
                kept = {n.name for n in onnx.load(ready, load_external_data=False).graph.node}
                nodes = [n for n in nodes if n in kept] or nodes  # an empty list would mean every node
                activation = QuantType.QUInt8 if qdq == "u8s8" else QuantType.QInt8
                quantize_static(ready, str(target), _Reader(calibration), quant_format=QuantFormat.QDQ, op_types_to_quantize=list(ARITHMETIC),
                                nodes_to_quantize=nodes, per_channel=True, activation_type=activation, weight_type=QuantType.QInt8,
                                use_external_data_format=large, calibrate_method=CalibrationMethod.MinMax, extra_options=dict(QDQ_STYLES[qdq]))
    except EdgekdError:
        raise
    except Exception as e:  # the quantizer raises ValueError, RuntimeError, KeyError and onnxruntime's own
        raise EdgekdError(f"onnxruntime cannot quantize the component: {first_line(e)}", where=source.where, hint="use fp32") from e
    written = Counter(n.op_type for n in onnx.load(target, load_external_data=False).graph.node)
    if not (written["QuantizeLinear"] or written["DynamicQuantizeLinear"]):
        raise EdgekdError("the quantizer left every operator in float", where=source.where, hint="use fp32")


def quantizable(graph: onnx.ModelProto, *, dynamic: bool, varying: bool = False) -> list[str]:
    """Names of the nodes worth quantizing: arithmetic with constant weights.

    Static activations are left in float where their length varies beyond the batch axis: in a promptable decoder those are
    the few prompt tokens, which cost nothing and break at 8 bits, while the image side carries the arithmetic. `varying` takes them too.
    """
    constant = {t.name for t in graph.graph.initializer}
    shapes = {v.name: v.type.tensor_type.shape.dim for v in [*graph.graph.value_info, *graph.graph.input, *graph.graph.output]}
    found = []
    for node in graph.graph.node:
        if node.op_type not in (("MatMul", "Gemm") if dynamic else ARITHMETIC) or node.input[1] not in constant:
            continue
        varies = any(not d.HasField("dim_value") for d in list(shapes.get(node.input[0], []))[1:])
        if dynamic or varying or not varies:
            found.append(node.name)
    return found


class _Reader:
    """Feeds calibration inputs one by one: a re-iterable of any length in constant memory."""

    def __init__(self, samples: Iterable[Mapping[str, np.ndarray]]) -> None:
        self._samples = samples
        self.rewind()

    def get_next(self) -> dict[str, np.ndarray] | None:
        sample = next(self._iterator, None)
        return None if sample is None else dict(sample)

    def rewind(self) -> None:
        self._iterator: Iterator[Mapping[str, np.ndarray]] = iter(self._samples)
