"""Float ONNX graph -> int8 by onnxruntime's quantizer: which operators are worth it, in which style, with which ranges.

    w8a8_static           ranges from calibration (`_ranges.py`); what is not worth integer arithmetic keeps 8-bit weights (`_light.py`, u8s8 only)
    w8a8_qat, w4a8_qat    trained ranges (`_grids.py`)
    w8_dynamic            8-bit weights of linear layers only
"""
from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.export import _grids, _ranges
from edgekd.export._gelu import fuse
from edgekd.export._half import layer_of, layers_of
from edgekd.export._light import lighten, save

from edgekd.errors import EdgekdError, first_line
from edgekd.tuning import PLAIN, Tuning, stays_float

if TYPE_CHECKING:
    import onnx

ARITHMETIC = ("Conv", "MatMul", "Gemm")  # what is worth quantizing
CUTS = ("Relu", "Clip")
"""activations that do nothing but cut: what they cut off needs no levels (sam_nano's encoder in int8: a relative error of 0.26 with ranges taken before them,
0.16 behind)"""
MUCH = 0.05
"""share of a graph's weights"""
QDQ_STYLES: Mapping[str, Mapping[str, Any]] = {
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
    """Write the int8 form of a float graph to `target`.

    Raises:
        UsageError: calibration samples from which no ranges can be found.
        EdgekdError: there is nothing to quantize, activations are not finite, or a step fails.
    """
    import onnx

    graph, dynamic = onnx.load(source.file, load_external_data=False), scheme == "w8_dynamic"
    worth = quantizable(graph, dynamic=dynamic, varying=source.varying, cells=qdq != "u8s8")
    floats = {n.name for n in graph.graph.node if any(stays_float(layer, tuning) for layer in layers_of(n))}
    nodes = [n for n in worth if n not in floats]
    if not worth and not tuning.grids:
        kinds = "MatMul or Gemm with constant weights" if dynamic else "Conv, MatMul or Gemm with constant weights"
        raise EdgekdError(f"nothing to quantize: {scheme} works on {kinds}, and the graph has none", where=source.where,
                          hint="use w8a8_static for convolutional models" if dynamic else "use fp32")
    if not nodes and not tuning.grids:
        raise EdgekdError(f"nothing to quantize: all that {scheme} works on is kept in float", where=source.where, hint="keep fewer layers, or use fp32")
    try:
        if tuning.grids:
            _grids.write(source.file, target, tuning, where=source.where, large=source.large, signed=qdq != "u8s8", style=QDQ_STYLES[qdq])
        else:
            _quantize(source, target, nodes, sorted(floats), worth, dynamic=dynamic, calibration=calibration, qdq=qdq, tuning=tuning)
    except EdgekdError:
        raise
    except Exception as e:  # the quantizer raises ValueError, RuntimeError, KeyError and onnxruntime's own
        raise EdgekdError(f"onnxruntime cannot quantize the component: {first_line(e)}", where=source.where, hint="use fp32") from e
    written = Counter(n.op_type for n in onnx.load(target, load_external_data=False).graph.node)
    if not (written["QuantizeLinear"] or written["DynamicQuantizeLinear"]):
        raise EdgekdError("the quantizer left every operator in float", where=source.where, hint="use fp32")


def _quantize(source: Source, target: Path, nodes: list[str], floats: list[str], worth: list[str], *, dynamic: bool, calibration: Any, qdq: str,
              tuning: Tuning) -> None:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    large, channels = source.large, tuning.granularity == "channel"
    with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
        ready, found = Path(folder) / "ready.onnx", Path(folder) / "ranges.json"
        # From a file: given a graph in memory, quant_pre_process looks for its weights in a file it removed.
        quant_pre_process(str(source.file), str(ready), skip_symbolic_shape=True, save_as_external_data=large, all_tensors_to_one_file=large)
        if tuning.naive:
            quantize_static(str(ready), str(target), _ranges.Checked(calibration, source.where), nodes_to_exclude=floats, use_external_data_format=large)
        elif dynamic:  # by kind, not by name: only constant weights are taken, and each Gemm is first renamed into a MatMul
            quantize_dynamic(str(ready), str(target), op_types_to_quantize=["MatMul", "Gemm"], per_channel=channels, weight_type=QuantType.QInt8,
                             nodes_to_exclude=[*floats, *(f"{n}_MatMul" for n in floats)], use_external_data_format=large)
        else:
            if qdq == "u8s8":  # an operator of onnxruntime's own
                _join_gelus(ready, large)
            style = {**QDQ_STYLES[qdq], **({} if tuning.symmetric is None else {"ActivationSymmetric": tuning.symmetric})}
            nodes = _write_ranges(source, ready, found, nodes, worth, calibration, tuning.method, symmetric=bool(style.get("ActivationSymmetric")))
            quantize_static(str(ready), str(target), calibration_cache_path=str(found), quant_format=QuantFormat.QDQ, per_channel=channels,
                            op_types_to_quantize=[*ARITHMETIC, *CUTS], nodes_to_quantize=nodes, weight_type=QuantType.QInt8,
                            activation_type=QuantType.QUInt8 if qdq == "u8s8" else QuantType.QInt8, use_external_data_format=large, extra_options=style)
            if qdq == "u8s8":  # TensorRT's parser takes no weights that nothing quantizes the input of
                lighten(target, lambda node: any(stays_float(layer, tuning) for layer in layers_of(node)), large=large)


def _join_gelus(file: Path, large: bool) -> None:
    import onnx

    model = onnx.load(file)
    if fuse(model):
        save(model, file, large=large)


def _write_ranges(source: Source, ready: Path, file: Path, nodes: list[str], worth: list[str], calibration: Any, method: str, *,
                  symmetric: bool) -> list[str]:
    """Ranges of the tensors around `nodes`, as the library's file of them; of all that are `worth` it where they are kept for the next export.
    What is left of the nodes in the prepared graph."""
    import numpy as np
    import onnx
    from onnxruntime.quantization import CalibrationMethod, TensorData, TensorsData, save_tensors_data

    graph = onnx.load(ready, load_external_data=False).graph
    kept = {n.name for n in graph.node}
    left = [n for n in nodes if n in kept] or nodes  # an empty list would mean every node
    left += _cutting(graph, set(left))
    worth = [*worth, *_cutting(graph, set(worth))]
    layers = {n.name: layer_of(n) for n in onnx.load(source.file, load_external_data=False).graph.node}
    key = _ranges.key_of(source.file, calibration)
    wanted = _around(graph, set(left), layers)
    seen = _ranges.ranges(_ranges.Watched(ready, source.where, source.large, _around(graph, {*worth, *left}, layers) if key else wanted), calibration,
                          method=method, symmetric=symmetric, key=key)
    data = {t: TensorData(lowest=np.asarray(seen[t][0]), highest=np.asarray(seen[t][1])) for t in wanted}
    save_tensors_data(TensorsData(CalibrationMethod.MinMax, data), file)
    return left


def _cutting(graph: onnx.GraphProto, names: set[str]) -> list[str]:
    """Names of the activations that cut what one of the named nodes writes and nothing else reads."""
    readers = Counter(t for n in graph.node for t in n.input) + Counter(v.name for v in graph.output)
    written = {n.output[0] for n in graph.node if n.name in names and readers[n.output[0]] == 1}
    return [n.name for n in graph.node if n.op_type in CUTS and n.input[0] in written]


def _around(graph: onnx.GraphProto, names: set[str], layers: Mapping[str, str]) -> dict[str, str]:
    """Activations that the named nodes read and write -> where that is, in the graph's order."""
    constant, given = {t.name for t in graph.initializer}, {v.name for v in graph.input}
    found: dict[str, str] = {}
    for node in graph.node:
        if node.name in names:
            layer = f"layer '{layers.get(node.name, node.name)}'"
            for tensor in node.input[:2]:
                if tensor not in constant:
                    found.setdefault(tensor, f"the input '{tensor}'" if tensor in given else f"what {layer} reads")
            found.setdefault(node.output[0], f"what {layer} writes")
    return found


def quantizable(graph: onnx.ModelProto, *, dynamic: bool, varying: bool = False, cells: bool = False) -> list[str]:
    """Names of the nodes worth quantizing: arithmetic with constant weights.

    Static activations are left in float where their length varies beyond the batch axis: in a promptable decoder those are
    the few prompt tokens, which cost nothing and break at 8 bits, while the image side carries the arithmetic. `varying` takes them too.
    So are convolutions of a single cell (squeeze and excitation): going to integers and back costs more than they do (repvit_s: 0.68 of fp32's time
    with them, 0.53 without); on CPUs, that is: with `cells` they are taken, and where they hold much of the weights.
    """
    constant = {t.name: math.prod(t.dims) for t in graph.graph.initializer}
    shapes = {v.name: v.type.tensor_type.shape.dim for v in [*graph.graph.value_info, *graph.graph.input, *graph.graph.output]}
    found, single = list[str](), dict[str, int]()
    for node in graph.graph.node:
        if node.op_type not in (("MatMul", "Gemm") if dynamic else ARITHMETIC) or node.input[1] not in constant:
            continue
        dims = list(shapes.get(node.input[0], []))
        if dynamic or varying or not any(not d.HasField("dim_value") for d in dims[1:]):
            found.append(node.name)
        if node.op_type == "Conv" and len(dims) > 2 and all(d.dim_value == 1 for d in dims[2:]):
            single[node.name] = constant[node.input[1]]
    few = not (cells or dynamic or varying) and sum(single.values()) < MUCH * sum(constant.values())
    return [name for name in found if not (few and name in single)]
