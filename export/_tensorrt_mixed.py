"""Eight bits where the arithmetic is, fp16 in between: what TensorRT runs fast and can be told in types alone.

In a strongly typed network a layer computes in the types it is given. A graph quantized by onnxruntime is fp32 between its integer layers, and
TensorRT would keep to that. So everything that fits (`_half.py`) becomes fp16, the scales included, which opset 19 allows. Weights are rounded anew from
floats, by scales that fp16 holds exactly; an activation whose scale fp16 would round by more than the integers are rounded keeps its layer in fp32.

fp8 (E4M3) is the same graph with other grids: a scale is the greatest magnitude by 448 instead of by 127.
"""
from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.export._half import KEPT, MODULE, Kept, asked, by_layer, convert, name_layers, overflowing
from edgekd.export._int8 import CUTS

from edgekd.errors import EdgekdError, first_line

if TYPE_CHECKING:
    import numpy as np
    import onnx

OPSET = 19
"""the first whose scales may be fp16, and whose quantized type fp8; JetPack 6 reads up to 20"""

LEAST_SCALE = 2.0**-17
"""below this fp16 is off by more than 0.4 % (its last place is 2^-24), as much as an eight-bit integer is"""

INT8_LARGEST, FP8_LARGEST = 127.0, 448.0
QDQ = ("QuantizeLinear", "DequantizeLinear")
QUANTIZED = "_quantized"
"""how onnxruntime ends the names of integer weights"""


def convert_quantized(file: Path, source: Path, calibration: Iterable[Mapping[str, np.ndarray]], *, fp8: bool = False,
                      floats: Iterable[str] = ()) -> onnx.ModelProto:
    """The fp32 QDQ graph in `file` with fp16 between its quantized layers; float32 in and out.

    Args:
        source: the float graph it was made from.
        calibration: inputs that are searched for what overflows fp16.
        fp8: eight bits are fp8 instead of integers.
        floats: layers that stay in fp32 because they are asked for.

    Raises:
        EdgekdError: a step refuses the graph.
    """
    import onnx

    with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
        ready = Path(folder) / "ready.onnx"
        try:
            model = onnx.load(file)
            _cut_before_rounding(model.graph)
            model = onnx.shape_inference.infer_shapes(_modern(model), data_prop=True)
            name_layers(model.graph, _modules(model.graph, source))
            large = sum(len(t.raw_data) for t in model.graph.initializer) > 1 << 30
            onnx.save(model, ready, save_as_external_data=large, location="ready.data")
        except Exception as e:  # onnx raises its own kinds and ValueError
            raise EdgekdError(f"the quantized graph cannot be prepared: {first_line(e)}", hint="use fp16") from e
        kept = {k.node: k for k in (*overflowing(ready, calibration), *_small_scales(model), *asked(model, floats))}
        _round_again(model.graph, float_weights(source), fp8=fp8)
        onnx.save(model, ready, save_as_external_data=large, location="ready.data")
        half = convert(ready, kept.values())
    arithmetic = {n.name for n in half.graph.node if n.op_type not in QDQ}
    told = by_layer([k for k in kept.values() if k.node in arithmetic] or list(kept.values()))
    onnx.helper.set_model_props(half, {KEPT: json.dumps(told)} if told else {})
    try:
        onnx.checker.check_model(half, full_check=True) if half.ByteSize() < 1 << 30 else None  # a message above 2 GiB cannot be checked
    except Exception as e:
        raise EdgekdError(f"the graph in eight and sixteen bits is not sound: {first_line(e)}", hint="use fp16") from e
    return half


def _cut_before_rounding(graph: onnx.GraphProto) -> None:
    """Remove in place what rounds between arithmetic and the activation that cuts it: where 0 is in the middle of the levels onnxruntime's quantizer leaves
    it there, half of the levels are for what is cut off, and TensorRT cannot join the two."""
    made = {t: n for n in graph.node for t in n.output}
    readers = Counter(t for n in graph.node for t in n.input) + Counter(v.name for v in graph.output)
    gone = set[str]()
    for node in graph.node:
        back = made.get(node.input[0]) if node.op_type in CUTS else None
        there = made.get(back.input[0]) if back is not None and back.op_type == QDQ[1] else None
        if back and there and there.op_type == QDQ[0] and readers[back.output[0]] == readers[there.output[0]] == readers[there.input[0]] == 1:
            node.input[0] = there.input[0]
            gone |= {back.output[0], there.output[0]}
    kept = [n for n in graph.node if n.output[0] not in gone]
    del graph.node[:]
    graph.node.extend(kept)


def _modern(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph in opset 19. Nothing in it changed its meaning since 18: types were added."""
    import onnx

    used = {n.domain for n in model.graph.node} - {"", "ai.onnx"}
    kept = [o for o in model.opset_import if o.domain in used]
    del model.opset_import[:]
    model.opset_import.extend([onnx.helper.make_opsetid("", OPSET), *kept])
    return model


def _modules(graph: onnx.GraphProto, source: Path) -> dict[str, str]:
    """Node -> its torch module, which quantizing forgets: known again by the node's name, or by what it writes where operators were joined."""
    import onnx

    found: dict[str, str] = {}
    for node in onnx.load(source, load_external_data=False).graph.node:
        if module := next((p.value for p in node.metadata_props if p.key == MODULE), ""):
            found |= dict.fromkeys([node.name, *node.output], module)
    return {n.name: next((found[key] for key in (n.name, *n.output) if key in found), "") for n in graph.node}


def _small_scales(model: onnx.ModelProto) -> Iterator[Kept]:
    """Nodes around activations with a scale that fp16 does not hold: arithmetic, and what quantizes its operands."""
    import onnx

    scales = {t.name: float(onnx.numpy_helper.to_array(t).min(initial=1.0)) for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT}
    made = {t: n for n in model.graph.node for t in n.output}
    small = {n.name for n in model.graph.node if n.op_type == QDQ[0] and scales.get(n.input[1], 1.0) < LEAST_SCALE}
    for node in model.graph.node:
        around = [made[t] for t in node.input if t in made and made[t].op_type == QDQ[1]]
        around += [made[n.input[0]] for n in around if n.input[0] in made]
        if any(n.name in small for n in around):
            layer = next((p.value for p in node.metadata_props if p.key == MODULE), node.name).removeprefix("model.")
            yield from (Kept(n.name, layer, f"a scale of its 8-bit values is below {LEAST_SCALE:.1g}") for n in (node, *around))


def float_weights(file: Path) -> dict[str, np.ndarray]:
    """Float weights of a graph by name, after the preparation that onnxruntime quantizes from (it joins operators and makes weights of them)."""
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
        ready, large = Path(folder) / "ready.onnx", Path(f"{file}.data").exists()
        quant_pre_process(str(file), str(ready), skip_symbolic_shape=True, save_as_external_data=large, all_tensors_to_one_file=large)
        return {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(ready).graph.initializer if t.data_type == onnx.TensorProto.FLOAT}


def _round_again(graph: onnx.GraphProto, weights: Mapping[str, np.ndarray], *, fp8: bool) -> None:
    """In place: weights from floats by scales of fp16; for fp8 also the scales of activations, zero points and the types of values."""
    import numpy as np
    from onnx import TensorProto, numpy_helper

    tensors = {t.name: t for t in graph.initializer}
    constants: dict[str, Any] = {name: numpy_helper.to_array(t) for name, t in tensors.items() if t.data_type in (TensorProto.INT8, TensorProto.FLOAT)}
    nodes, largest = [n for n in graph.node if n.op_type in QDQ], FP8_LARGEST if fp8 else INT8_LARGEST
    scales = {n.input[1]: constants[n.input[1]] * np.float32(INT8_LARGEST / largest) for n in nodes}
    for node in nodes:
        if (name := node.input[0]) in constants:
            axis, levels = next((a.i for a in node.attribute if a.name == "axis"), 1), constants[name]
            shape = [-1 if i == axis % levels.ndim else 1 for i in range(levels.ndim)] if constants[node.input[1]].size > 1 else []
            old, new = constants[node.input[1]].reshape(shape), _up_to_fp16(scales[node.input[1]])
            values = _original(weights.get(name.removesuffix(QUANTIZED)), levels * old, old) / new.reshape(shape)
            tensors[name].CopyFrom(numpy_helper.from_array(_fp8(values) if fp8 else np.clip(np.rint(values), -largest, largest).astype(np.int8), name))
            scales[node.input[1]] = new
    for name, scale in scales.items():
        tensors[name].CopyFrom(numpy_helper.from_array(np.asarray(scale, np.float32), name))
    for name in {n.input[2] for n in nodes} if fp8 else ():
        tensors[name].CopyFrom(numpy_helper.from_array(_fp8(np.zeros(constants[name].shape, np.float32)), name))
    for value in graph.value_info if fp8 else ():
        if value.type.tensor_type.elem_type == TensorProto.INT8:
            value.type.tensor_type.elem_type = TensorProto.FLOAT8E4M3FN


def _up_to_fp16(scale: Any) -> Any:
    """The least numbers of fp16 that are not below: a channel next to nothing gets the least there is. fp32 array."""
    import numpy as np

    near = np.asarray(scale).astype(np.float16)
    return np.where(near.astype(np.float32) < scale, np.nextafter(near, np.float16(np.inf)), near).astype(np.float32)


def _fp8(values: Any) -> Any:
    import ml_dtypes
    import numpy as np

    return np.clip(values, -FP8_LARGEST, FP8_LARGEST).astype(ml_dtypes.float8_e4m3fn)


def _original(known: Any, rounded: Any, scale: Any) -> Any:
    """The float weights if they are those that were rounded, else what they were rounded to."""
    return known if known is not None and known.shape == rounded.shape and bool((abs(known - rounded) <= scale).all()) else rounded
