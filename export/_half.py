"""fp16 without overflow: which nodes of a float graph leave fp16's range on real inputs, and the conversion that keeps those in fp32.

fp16 ends at 65504. SAM encoders are known to pass it inside normalisation (the sum of squares of a wide layer) and attention;
the result is NaN or empty masks. So every tensor of the fp32 graph is watched while it runs on real inputs, and a node stays in
fp32 when one of the following passes half of the range (photos that were not seen reach further):

    what it reads or writes, weights included
    the sum of squares inside a normalisation
    the angle of a sine or cosine, with all it is computed from: beyond a few turns fp16 no longer resolves it (position codes)
"""
from __future__ import annotations

import json
import re
import tempfile
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgekd.errors import EdgekdError, first_line

if TYPE_CHECKING:
    import numpy as np
    import onnx

LARGEST = 65504.0
MARGIN = 0.5
MAX_ANGLE = 10.0
"""radians; fp16 resolves 10 to 0.008"""

KEPT = "edgekd.kept_fp32"
"""metadata key of a file: JSON of layer -> why it stays in fp32"""

MODULE = "module"
"""metadata key of a node: the torch module it came from, "" for what the model computes outside of its modules"""

NORMS = {"LayerNormalization", "InstanceNormalization", "GroupNormalization", "ReduceL2", "LpNormalization"}

MOVES = {"Transpose", "Reshape", "Slice", "Split", "Concat", "Unsqueeze", "Squeeze", "Flatten", "Identity", "Expand", "Gather", "Pad"}


@dataclass(frozen=True)
class Kept:
    """A node that stays in fp32: the layer it belongs to, and why."""

    node: str
    layer: str
    why: str


def overflowing(file: Path, samples: Iterable[Mapping[str, np.ndarray]]) -> list[Kept]:
    """Nodes of the fp32 graph in `file` that must stay in fp32, by running `samples` (input name -> array) through it.

    Raises:
        EdgekdError: there were no samples, or the graph does not run.
    """
    import onnx

    graph = onnx.load(file, load_external_data=False)
    peaks = _peaks(file, graph, samples) | _weight_peaks(file, graph)
    found: dict[str, Kept] = {}
    for node in graph.graph.node:
        peak = max([peaks.get(t, 0.0) for t in (*node.input, *node.output)], default=0.0)
        squares = peaks.get(_squares(node), 0.0)
        layer = layer_of(node)
        if not peak <= LARGEST * MARGIN:
            found[node.name] = Kept(node.name, layer, f"{node.op_type} reaches {peak:.3g}")
        elif not squares <= LARGEST * MARGIN:
            found[node.name] = Kept(node.name, layer, f"{node.op_type} sums squares to {squares:.3g}")
    for node, layer in _angles(graph.graph, peaks):
        found.setdefault(node.name, Kept(node.name, layer, "angles of a position code"))
    return list(found.values())


def asked(graph: onnx.ModelProto, layers: Iterable[str]) -> list[Kept]:
    """Every node of the layers that are asked for in fp32."""
    wanted = set(layers)
    return [Kept(n.name, name, "asked for") for n in graph.graph.node for name in layers_of(n) if name in wanted]


def by_layer(kept: Iterable[Kept]) -> dict[str, str]:
    """layer -> why; of several reasons the one that tells most: arithmetic before what only moves values."""
    def vague(one: Kept) -> bool:
        return one.why.split()[0] in MOVES

    return {one.layer: one.why for one in sorted(kept, key=vague, reverse=True)}


def convert(file: Path, kept: Iterable[Kept]) -> onnx.ModelProto:
    """The graph in `file` in fp16, except the nodes in `kept`, its inputs and its outputs.

    Raises:
        EdgekdError: the converter refuses the graph.
    """
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    nodes = list(kept)
    try:
        half = convert_float_to_float16(str(file), keep_io_types=True, node_block_list=[k.node for k in nodes])
    except Exception as e:  # it raises ValueError, and whatever onnx's shape inference does
        raise EdgekdError(f"the graph cannot be converted to fp16: {first_line(e)}", hint="use fp32") from e
    _join_casts(half.graph)
    in_order(half.graph)
    onnx.helper.set_model_props(half, {KEPT: json.dumps(by_layer(nodes))} if nodes else {})
    return half


def in_order(graph: onnx.GraphProto) -> None:
    """Put nodes behind those they read from, in place: the fp16 converter appends its casts at the end, which checkers and TensorRT may refuse."""
    made = {t: i for i, n in enumerate(graph.node) for t in n.output}
    waits = [{made[t] for t in n.input if t in made} for n in graph.node]
    readers: dict[int, list[int]] = {}
    for i, sources in enumerate(waits):
        for source in sources:
            readers.setdefault(source, []).append(i)
    ready, order = deque(i for i, sources in enumerate(waits) if not sources), []
    while ready:
        order.append(current := ready.popleft())
        for reader in readers.get(current, []):
            waits[reader].discard(current)
            if not waits[reader]:
                ready.append(reader)
    nodes = [graph.node[i] for i in order]
    assert len(nodes) == len(waits), "a graph without cycles has an order"
    copies = [type(n).FromString(n.SerializeToString()) for n in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def name_layers(graph: onnx.GraphProto, modules: Mapping[str, str]) -> None:
    """Write the torch module of each node into its metadata, where the optimiser dropped it; "" is the whole model."""
    for node in graph.node:
        module = modules.get(node.name)
        if module is not None and not any(p.key == MODULE for p in node.metadata_props):
            entry = node.metadata_props.add()
            entry.key, entry.value = MODULE, module


def module_of(scopes: str) -> str:
    """The innermost module in what torch writes into a node: `"['', 'neck', 'neck.0', 'conv2d']"` -> `neck.0`."""
    names = re.findall(r"'([^']*)'", scopes)
    return names[-2] if len(names) > 1 else ""


def layer_of(node: onnx.NodeProto) -> str:
    """The module's name as the state dict has it, or the node's own where a model computes outside of its modules."""
    module = next((p.value for p in node.metadata_props if p.key == MODULE), "")
    return module.removeprefix("model.") or node.name


def layers_of(node: onnx.NodeProto) -> list[str]:
    """Names that a node's layer may have: by its metadata, and by what its weight is called, which stays when a normalisation is folded into it."""
    weight = node.input[1] if len(node.input) > 1 and node.input[1].endswith(".weight") else ""
    return list(dict.fromkeys([layer_of(node), *([weight.removesuffix(".weight").removeprefix("model.")] if weight else [])]))


def _peaks(file: Path, graph: onnx.ModelProto, samples: Iterable[Mapping[str, np.ndarray]]) -> dict[str, float]:
    """Largest magnitude of every float tensor, and the largest sum of squares of every normalisation, over all samples."""
    import onnx
    import onnxruntime as ort

    watched, names = onnx.ModelProto(), []
    watched.CopyFrom(graph)
    for name, nodes in _watchers(graph.graph):
        watched.graph.node.extend(nodes)
        watched.graph.output.append(onnx.helper.make_tensor_value_info(nodes[-1].output[0], onnx.TensorProto.FLOAT, None))
        names.append(name)
    peaks = dict.fromkeys(names, 0.0)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads, options.inter_op_num_threads = 0, 1
    with tempfile.NamedTemporaryFile(suffix=".onnx", dir=file.parent) as temp:  # beside the weights that it may refer to
        onnx.save(watched, temp.name)
        session = ort.InferenceSession(temp.name, options, providers=["CPUExecutionProvider"])
    inputs = [i.name for i in session.get_inputs()]
    outputs = [o.name for o in session.get_outputs()][-len(names):]
    seen = False
    for sample in samples:
        seen = True
        for name, value in zip(names, session.run(outputs, {i: sample[i] for i in inputs}), strict=True):
            value = float(value) if value.size else 0.0
            peaks[name] = value if value != value else max(peaks[name], value)  # NaN stays
    if not seen:
        raise EdgekdError("fp16 needs inputs to find what overflows on, and none were given", hint="give a folder of images with --data")
    return peaks


def _watchers(graph: onnx.GraphProto) -> Iterable[tuple[str, list[onnx.NodeProto]]]:
    """(what is watched, nodes whose last output is the figure) for every float tensor and normalisation."""
    from onnx import TensorProto, helper

    known = {v.name: v.type.tensor_type for v in [*graph.value_info, *graph.input, *graph.output]}
    constant = {t.name for t in graph.initializer}
    floats = [v.name for v in graph.input if v.name not in constant] + [t for n in graph.node for t in n.output if t]
    for name in floats:
        if name in known and known[name].elem_type == TensorProto.FLOAT:
            yield name, [helper.make_node("Abs", [name], [f"{name}/abs"]),
                         helper.make_node("ReduceMax", [f"{name}/abs"], [f"{name}/peak"], keepdims=0)]
    for node in graph.node:
        if node.op_type in NORMS and node.input[0] in known:
            axes = _axes(node, len(known[node.input[0]].shape.dim))
            mark = _squares(node)
            constants = helper.make_node("Constant", [], [f"{mark}/axes"], value_ints=axes)
            yield mark, [constants, helper.make_node("ReduceSumSquare", [node.input[0], f"{mark}/axes"], [f"{mark}/sums"]),
                         helper.make_node("ReduceMax", [f"{mark}/sums"], [f"{mark}/peak"], keepdims=0)]


def _squares(node: onnx.NodeProto) -> str:
    return f"{node.name}/squares"


def _axes(node: onnx.NodeProto, rank: int) -> list[int]:
    """The axes a normalisation sums over."""
    attributes = {a.name: a for a in node.attribute}
    if node.op_type == "LayerNormalization":
        first = attributes["axis"].i if "axis" in attributes else -1
        return list(range(first % rank, rank))
    if node.op_type in ("InstanceNormalization", "GroupNormalization"):
        return list(range(2, rank))
    if node.op_type == "LpNormalization":
        return [attributes["axis"].i if "axis" in attributes else -1]
    return list(range(1, rank))


def _weight_peaks(file: Path, graph: onnx.ModelProto) -> dict[str, float]:
    import numpy as np
    import onnx

    floats = [t for t in graph.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    return {t.name: float(np.abs(onnx.numpy_helper.to_array(t, str(file.parent))).max(initial=0.0)) for t in floats}


def _angles(graph: onnx.GraphProto, peaks: Mapping[str, float]) -> list[tuple[onnx.NodeProto, str]]:
    """Sines and cosines of large angles with everything that computes the angle, and the layer of the sine."""
    producers = {t: n for n in graph.node for t in n.output}
    queue = [(n, layer_of(n)) for n in graph.node if n.op_type in ("Sin", "Cos") and peaks.get(n.input[0], 0.0) > MAX_ANGLE]
    found: dict[str, tuple[onnx.NodeProto, str]] = {}
    while queue:
        node, layer = queue.pop()
        if node.name not in found:
            found[node.name] = (node, layer)
            queue += [(producers[t], layer) for t in node.input if t in producers and t in peaks]
    return list(found.values())


def _join_casts(graph: onnx.GraphProto) -> None:
    """Between two nodes kept in fp32 nothing may pass through fp16: fp32 -> fp16 -> fp32 becomes nothing. The converter also writes
    a cast once per kept reader of a tensor, under one name, which runtimes refuse."""
    from onnx import TensorProto

    seen: set[str] = set()
    for node in list(graph.node):
        if node.op_type == "Cast" and node.output[0] in seen:
            graph.node.remove(node)
        seen.update(node.output)
    to = {n.output[0]: n.attribute[0].i for n in graph.node if n.op_type == "Cast"}
    sources = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "Cast"}
    for node in graph.node:
        if node.op_type == "Cast" and to[node.output[0]] == TensorProto.FLOAT and to.get(node.input[0]) == TensorProto.FLOAT16:
            node.input[0] = sources[node.input[0]]
    used = {t for n in graph.node for t in n.input} | {o.name for o in graph.output}
    for node in [n for n in graph.node if n.op_type == "Cast" and n.output[0] not in used]:
        graph.node.remove(node)
