"""What every operator of an ONNX file takes in onnxruntime, from its own trace; and which nodes of the file a kernel stands for.

onnxruntime rewrites the graph before it runs it: kernels have names like `conv2d_3_nchwc`, `Gelu_token_12`, `ReorderOutput`. The rewritten graph is read
beside the trace, and each kernel traced back along its tensors to the nodes of the file.
"""
from __future__ import annotations

import json
import math
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.export._half import MODULE, name_layers
from edgekd.export._layers import WARMUP, Rows, stripped, together

if TYPE_CHECKING:
    import numpy as np
    import onnx

TYPES = {"float": "fp32", "float16": "fp16", "bfloat16": "bf16", "double": "fp64", "uint8": "int8", "int8": "int8"}
GRIDS = {"QuantizeLinear", "DequantizeLinear"}
LAYOUT = {"ReorderInput", "ReorderOutput"}
WEIGHT = re.compile(r"(.+)\.weight(?:_quantized|_DequantizeLinear_Output)?$")
AROUND = {"If", "Loop", "Scan"}
"""what runs other kernels, which have rows of their own"""
def layers(start: Callable[[Path, Path], Any], file: Path, inputs: Mapping[str, np.ndarray], repeats: int) -> Rows:
    """See `edgekd.protocols.Facts.layers`. `start(trace, optimised)` opens a session that writes its trace and its rewritten graph there."""
    import onnx

    with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
        session = start(Path(folder) / "trace", Path(folder) / "optimised.onnx")
        given = {i.name: inputs[i.name] for i in session.get_inputs()}
        for _ in range(WARMUP + repeats):
            session.run(None, given)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        optimised = onnx.load(Path(folder) / "optimised.onnx", load_external_data=False)
    graph = onnx.load(file, load_external_data=False).graph
    found, grouped = covers(graph, optimised.graph), {n.name for n in graph.node if any(a.name == "group" and a.i > 1 for a in n.attribute)}
    return [row | {"covers": own, "op": f"{row['op']} (depthwise)" if grouped & set(own) and row["op"].endswith("Conv") else row["op"]}
            for row in rows(events) for own in [found.get(row["name"], [])]]


def rows(events: Iterable[Mapping[str, Any]]) -> Rows:
    """The kernels of a trace in their order, over all runs but the first `WARMUP`. What runs several times in one run counts its sum."""
    runs, now, about = list[dict[str, float]](), defaultdict[str, float](float), dict[str, dict[str, Any]]()
    for event in events:
        if event.get("name") == "model_run":
            runs.append(dict(now))
            now.clear()
        elif event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and event["args"]["op_name"] not in AROUND:
            name = event["name"].removesuffix("_kernel_time")
            now[name] += event["dur"] / 1e3  # microseconds
            about.setdefault(name, {"name": name, "op": _kind(event["args"]), "precision": _precision(event["args"])})
    times = together(runs[WARMUP:] or runs)
    return [row | {"ms": times.get(name, 0.0)} for name, row in about.items()]


def _kind(told: Mapping[str, Any]) -> str:
    """The operator; of a convolution also whether it sees a single cell, in either layout."""
    shape = next((next(iter(one.values())) for one in told.get("input_type_shape", []) if one), [])
    single = "Conv" in told["op_name"] and len(shape) > 3 and math.prod(shape[1:]) == max(shape[1:])
    return f"{told['op_name']} (one cell)" if single else str(told["op_name"])


def _precision(told: Mapping[str, Any]) -> str | None:
    """Eight bits where any of what it reads has them, else the type of the first."""
    types = [TYPES.get(kind) for shape in told.get("input_type_shape", []) for kind in shape]
    return "int8" if "int8" in types else next((t for t in types if t), None)


def renamed(source: Path, target: Path) -> None:
    """Write which module each node came from, as `source` says it, into the graph `target`, whose writer dropped it."""
    import onnx

    modules = {n.name: p.value for n in onnx.load(source, load_external_data=False).graph.node for p in n.metadata_props if p.key == MODULE}
    model = onnx.load(target, load_external_data=False)
    name_layers(model.graph, modules)
    onnx.save(model, target)


def modules(file: Path) -> dict[str, str]:
    """Name of a node, and of a tensor it writes -> the module it came from, "" where that is the whole model. What no module is written into was added by
    optimisers and quantizers: it belongs to the node it is named after, a quantizer to what it reads, anything else to what reads it."""
    import onnx

    nodes = list(onnx.load(file, load_external_data=False).graph.node)
    found: dict[str, str] = {}

    def say(node: onnx.NodeProto, module: str | None) -> None:
        for name in (node.name, *node.output):
            if name and module is not None:
                found.setdefault(name, module.removeprefix("model."))

    for node in nodes:
        say(node, next((p.value for p in node.metadata_props if p.key == MODULE), None))
    if not found:  # somebody else's file, or an old one: its weights may have kept their names
        for node in nodes:
            say(node, next((named[1] for t in node.input[1:] if (named := WEIGHT.match(t))), None))
        return found
    for node in nodes:
        known = stripped(node.name, found) if node.op_type not in GRIDS else None
        say(node, found[known] if known else found.get(node.input[0]) if node.op_type in GRIDS else None)
    reader: dict[str, onnx.NodeProto] = {}
    for node in reversed(nodes):
        say(node, next((found[reader[t].name] for t in node.output if t in reader and reader[t].name in found), None))
        reader |= dict.fromkeys(node.input, node)
    for node in nodes:
        say(node, next((found[t] for t in node.input if t in found), None))
    return found


class _File:
    """The graph of a file: who writes and who reads a tensor."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.nodes = {n.name: n for n in graph.node if n.name}
        self.maker = {t: n for n in graph.node for t in n.output if t}
        self.tensors = {**{t: t for t in self.maker}, **{n.name: n.output[0] for n in graph.node if n.name and n.output}}

    def tensor(self, name: str) -> str | None:
        """The file's tensor that a tensor or node of the rewritten graph is called after."""
        known = stripped(name, self.tensors)
        return None if known is None else self.tensors[known]

    def before(self, tensor: str, stop: set[str]) -> list[onnx.NodeProto]:
        """Nodes that compute a tensor from those in `stop`."""
        found: dict[str, onnx.NodeProto] = {}
        waiting = [tensor]
        while waiting:
            node = self.maker.get(waiting.pop())
            if node is not None and node.name not in found:
                found[node.name] = node
                waiting += [t for t in node.input if t not in stop]
        return list(found.values())


def covers(file: onnx.GraphProto, optimised: onnx.GraphProto) -> dict[str, list[str]]:
    """Kernel -> the nodes of the file that it computes. One that only changes the layout stands for what it serves."""
    known, same = _File(file), dict[str, str]()
    makers = {t: n for n in optimised.node for t in n.output if t}
    for node in optimised.node:
        for tensor in node.output:
            if (name := known.tensor(tensor)) is not None:
                same[tensor] = name
        if node.output and node.output[0] not in same and node.op_type not in LAYOUT and (name := known.tensor(node.name)) is not None:
            same[node.output[0]] = name
    _through(known, optimised, same)
    stop = set(same.values())
    found: dict[str, list[str]] = {}
    for node in optimised.node:
        ends = [same[t] for t in node.output if t in same]
        nodes = [] if node.op_type in LAYOUT else [n for end in ends for n in known.before(end, stop - {end})]
        found[node.name] = [n.name for n in nodes if n.op_type not in GRIDS] or [n.name for n in nodes]
    return _served(optimised, makers, found)


def _through(known: _File, optimised: onnx.GraphProto, same: dict[str, str]) -> None:
    """Tensors without a name of the file's that can only be one: what a known kernel reads, on either side of a change of layout."""
    for node in reversed(optimised.node):
        if not node.input or not node.output or node.output[0] not in same:
            continue
        if node.op_type in LAYOUT:
            same.setdefault(node.input[0], same[node.output[0]])
            continue
        was = known.maker.get(same[node.output[0]])
        while was is not None and was.op_type != node.op_type and was.op_type not in GRIDS and len(was.input) and node.op_type == "Conv":
            was = known.maker.get(was.input[0])  # an activation that the convolution computes too
        if was is not None and was.op_type == node.op_type and len(was.input) >= 1 and was.input[0] in known.maker:
            same.setdefault(node.input[0], was.input[0])
    for node in optimised.node:
        if node.op_type in LAYOUT and node.input[0] in same:
            same.setdefault(node.output[0], same[node.input[0]])


def _served(optimised: onnx.GraphProto, makers: Mapping[str, onnx.NodeProto], found: dict[str, list[str]]) -> dict[str, list[str]]:
    """Kernels that compute none of the file's nodes: a change of layout before a kernel is that one's; of anything else, what it reads from counts."""
    readers = defaultdict(list)
    for node in optimised.node:
        for tensor in node.input:
            readers[tensor].append(node)
    for node in reversed(optimised.node):
        if not found[node.name] and node.op_type != "ReorderOutput":
            found[node.name] = next((found[r.name] for t in node.output for r in readers[t] if found[r.name]), [])
    for node in optimised.node:
        if not found[node.name]:
            found[node.name] = next((found[makers[t].name] for t in node.input if t in makers and found[makers[t].name]), [])
    return found
