"""A trained ONNX graph -> QDQ with exactly the ranges and weights that were trained: nothing is observed, and nothing is chosen.

What is rounded is what `edgekd.models.rounding` rounds while it trains, and nothing else:

    the input of a layer    for that layer only: what reads the same tensor in float (a residual sum, a normalisation) still reads floats
    its output              behind its bias, also where a linear layer is a MatMul and an Add
    its weight              a step an output channel: max|w| / 127, or the trained step itself where there are fewer levels than 8 bits hold
    its bias                in steps of input step x weight step, also where it stays in float

A tensor that one layer writes and another reads is rounded once, to what the first writes. So graphs are taken as they were captured: what onnxruntime's
preparation joins would move the places of rounding.
"""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.export._gelu import fuse
from edgekd.export._half import layers_of

from edgekd.errors import EdgekdError
from edgekd.tuning import Grid, Tuning

if TYPE_CHECKING:
    import numpy as np
    import onnx

LAYERS = ("Conv", "ConvTranspose", "MatMul", "Gemm")
LEVELS = 255
"""steps between the ends of an activation"""
Range = tuple[float, float]


@dataclass
class _Plan:
    """What is written: nodes that compute on integers, each with the one that adds its bias; tensor -> its range; the tensors that layers write."""

    nodes: list[tuple[onnx.NodeProto, onnx.NodeProto]] = field(default_factory=list)
    ends: dict[str, Range] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)


def write(file: Path, target: Path, tuning: Tuning, *, where: str, large: bool, signed: bool, style: Mapping[str, Any]) -> None:
    """Write the float graph in `file`, whose weights lie on their grids, with `tuning.grids` in it.

    Args:
        signed: activations are int8, not uint8; zero points are where training put them in both.
        style: the library's options of the target's style, of which those on biases are kept.

    Raises:
        EdgekdError: a layer with trained ranges is not in the graph.
    """
    import numpy as np
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType, TensorData, TensorsData

    model = onnx.load(file)
    if not signed:
        fuse(model)
    plan = _plan(model.graph, {k: g for k, g in tuning.grids.items() if k not in tuning.keep}, where)
    overrides: dict[str, Any] = {t: [_level(ends, signed=signed)] for t, ends in plan.ends.items()}
    constants = {t.name: t for t in model.graph.initializer}
    for node, bias in plan.nodes:
        axis = _channels(node)
        steps = _steps(onnx.numpy_helper.to_array(constants[node.input[1]]), axis, tuning.weight_bits)
        overrides[node.input[1]] = [{"axis": axis, "scale": s, "zero_point": np.array(0, np.int8)} for s in steps]
        _round_bias(model.graph, bias, constants, overrides[node.input[0]][0]["scale"] * steps)
    seen = {t: TensorData(lowest=np.float32(low), highest=np.float32(high)) for t, (low, high) in plan.ends.items()}
    quantizer = QDQQuantizer(
        model, True, False, QuantType.QInt8, QuantType.QInt8 if signed else QuantType.QUInt8, TensorsData(CalibrationMethod.MinMax, seen),
        [node.name for node, _ in plan.nodes], [], list(LAYERS),
        {"TensorQuantOverrides": overrides, "OpTypesToExcludeOutputQuantization": list(LAYERS), "QuantizeBias": style.get("QuantizeBias", True)})
    for tensor in plan.outputs:
        quantizer.quantize_activation_tensor(tensor)
    quantizer.quantize_model()
    quantizer.model.save_model_to_file(str(target), large)


def _plan(graph: onnx.GraphProto, grids: Mapping[str, Grid], where: str) -> _Plan:
    """Where the trained ranges stand in a graph, into which copies are put (in place) of tensors that are rounded for some of their readers only."""
    found = list(_gridded(graph, grids))
    if missing := set(grids) - {layer for _, layer in found}:
        raise EdgekdError(f"{len(missing)} of {len(grids)} layers with trained ranges are not in the exported graph, for instance '{min(missing)}'",
                          where=where, hint="train without it, or keep it in float: w8a8_qat + {\"" + min(missing) + "\": fp32}")
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.node:
        for tensor in dict.fromkeys(node.input):
            readers[tensor].append(node)
    plan, constant = _Plan(), {t.name for t in graph.initializer}
    last = {node.name: _last(node, layer, readers, constant) for node, layer in found}
    for node, layer in found:
        if (output := grids[layer].output) is not None:
            plan.outputs.append(written := last[node.name].output[0])
            plan.ends[written] = output
    wanted: dict[str, dict[Range, list[onnx.NodeProto]]] = defaultdict(lambda: defaultdict(list))
    for node, layer in found:
        if (ends := grids[layer].input) is not None:
            plan.nodes.append((node, last[node.name]))
            wanted[node.input[0]][ends].append(node)
    given = {v.name for v in graph.output}
    for tensor, groups in wanted.items():
        if tensor in plan.ends:
            continue
        rounded = [n for group in groups.values() for n in group]
        if len(groups) == 1 and len(rounded) == len(readers[tensor]) and tensor not in given:
            plan.ends[tensor] = next(iter(groups))
            continue
        for i, (ends, nodes) in enumerate(groups.items()):
            _copied(graph, tensor, f"{tensor}/rounded{i}", nodes)
            plan.ends[f"{tensor}/rounded{i}"] = ends
    return plan


def _gridded(graph: onnx.GraphProto, grids: Mapping[str, Grid]) -> Iterator[tuple[onnx.NodeProto, str]]:
    """Nodes of arithmetic with constant weights whose layer has a grid, and that layer."""
    constant = {t.name for t in graph.initializer}
    for node in graph.node:
        if node.op_type in LAYERS and node.input[1] in constant and node.input[0] not in constant:
            layer = next((name for name in layers_of(node) if name in grids), None)
            if layer is not None:
                yield node, layer


def _last(node: onnx.NodeProto, layer: str, readers: Mapping[str, list[onnx.NodeProto]], constant: set[str]) -> onnx.NodeProto:
    """The node that writes what a layer gives: a MatMul has its bias in a node of its own."""
    after = readers[node.output[0]]
    separate = node.op_type == "MatMul" and len(after) == 1 and after[0].op_type == "Add" and layer in layers_of(after[0])
    return after[0] if separate and constant & set(after[0].input) else node


def _copied(graph: onnx.GraphProto, tensor: str, name: str, nodes: list[onnx.NodeProto]) -> None:
    """Let these nodes read a copy. The runtime removes it; until then it is what quantizing does not confuse with the tensor of the others."""
    import onnx

    graph.node.append(onnx.helper.make_node("Identity", [tensor], [name], name=name))
    for node in nodes:
        node.input[0] = name


def _level(ends: Range, *, signed: bool) -> dict[str, Any]:
    """Scale and zero point, in fp32 as in training."""
    import numpy as np

    low, high = np.float32(min(ends[0], 0.0)), np.float32(max(ends[1], 0.0))
    step = np.maximum((high - low) / np.float32(LEVELS), np.float32(1e-8))
    zero = int(np.rint(-low / step)) - (128 if signed else 0)
    return {"scale": np.array(step, np.float32), "zero_point": np.array(zero, np.int8 if signed else np.uint8)}


def _channels(node: onnx.NodeProto) -> int:
    """The axis of a node's weight that is its output channels."""
    transposed = any(a.name == "transB" and a.i for a in node.attribute)
    return 0 if node.op_type == "Conv" or (node.op_type == "Gemm" and transposed) else 1


def _round_bias(graph: onnx.GraphProto, node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto], steps: np.ndarray) -> None:
    """Give the node that adds a layer's bias one in these steps, its own: biases that are equal may be one tensor."""
    import numpy as np
    import onnx

    place = next((i for i, t in enumerate(node.input) if t in constants and (node.op_type == "Add" or i == 2)), None)
    if place is not None:
        bias = onnx.numpy_helper.to_array(constants[node.input[place]])
        levels = np.rint(bias / steps.astype(np.float32))
        graph.initializer.append(onnx.numpy_helper.from_array((levels * steps).astype(np.float32), f"{node.name}/bias"))
        node.input[place] = f"{node.name}/bias"


def _steps(weight: np.ndarray, axis: int, bits: int) -> np.ndarray:
    """The step of each channel: below 8 bits the largest that all its values are multiples of, where they lie on a grid; else max|w| / 127. fp32."""
    import numpy as np

    rows = np.abs(np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1))
    most = np.where(rows.max(1) > 0, rows.max(1), 127).astype(np.float32)
    levels = np.array([_levels(row, 2 ** (bits - 1) - 1) if bits < 8 else None for row in rows], object)
    return np.array([m / np.float32(n or 127) for m, n in zip(most, levels, strict=True)], np.float32)


def _levels(sizes: np.ndarray, most: int) -> int | None:
    """How many steps the largest is away from 0, at least, when all sizes are multiples of one step up to rounding in fp32; None where that takes more
    than `most`."""
    import numpy as np

    parts = sizes / (sizes.max() or 1.0)
    return next((n for n in range(1, most + 1) if np.abs(parts * n - np.rint(parts * n)).max() < 1e-3), None)
