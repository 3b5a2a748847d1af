"""What every operator of an OpenVINO model takes, from the runtime's own counters; and which module each operator came from, which the file says."""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from edgekd.export import _layers_onnx
from edgekd.export._layers import WARMUP, Rows, mentioned, together

MODULES = "edgekd.modules"
"""rt_info key of a file: `module=operator,operator;...`. Quotes would cost six bytes each in an XML attribute, so it is not JSON"""
IDLE = {"Constant", "Parameter", "Result"}


def tell(model: Any, source: Path) -> None:
    """Write into a model that was read from the ONNX file `source` which module each of its operators came from, for `modules`.

    OpenVINO makes several operators of some nodes and gives the last the node's name: the others belong to what reads them."""
    known = _layers_onnx.modules(source)
    found: dict[str, str] = {}
    for op in reversed(model.get_ordered_ops()):
        if op.get_type_name() in IDLE:
            continue
        name = op.get_friendly_name()
        own = mentioned(name, known)
        module = known[own[0]] if own else next((found[r] for r in _readers(op) if r in found), None)
        if module is not None and not set(name) & set("=,;"):
            found[name] = module
    together = defaultdict(list)
    for name, module in found.items():
        together[module].append(name)
    if together:
        model.set_rt_info(";".join(f"{module}={','.join(names)}" for module, names in reversed(together.items())), [MODULES])


def modules(file: Path) -> dict[str, str]:
    """Name of an operator -> the module it came from, as the `.xml` says it. Needs no OpenVINO."""
    told = ""
    for _, element in ElementTree.iterparse(file):
        if element.tag == MODULES:
            told = element.get("value") or ""
        elif element.tag in ("layer", "edge"):
            element.clear()
    groups = (group.partition("=") for group in told.split(";") if group)
    return {name: module for module, _, names in groups for name in names.split(",")}


def layers(compiled: Any, run: Callable[[], Any], counters: Callable[[], Iterable[Any]], known: Mapping[str, str], precision: Callable[[Any], str],
           repeats: int) -> Rows:
    """See `edgekd.protocols.Facts.layers`.

    Args:
        compiled: the model, compiled with PERF_COUNT.
        counters: what its request says of the last run.
        known: `modules` of its file.
        precision: of an operator of the runtime's own graph.
    """
    runs, kinds = list[dict[str, float]](), dict[str, str]()
    for i in range(WARMUP + repeats):
        run()
        if i >= WARMUP:
            done = [one for one in counters() if one.status.name == "EXECUTED"]
            runs.append({one.node_name: one.real_time.total_seconds() * 1e3 for one in done})
            kinds |= {one.node_name: one.node_type for one in done}
    times = together(runs)
    graph = list(compiled.get_runtime_model().get_ordered_ops())
    covers = _covers(graph, known)
    about = {op.get_friendly_name(): op for op in graph}
    ordered = sorted(times, key=lambda name: _order(about.get(name)))
    return [{"name": name, "op": _kind(kinds[name], about.get(name)), "ms": times[name], "precision": precision(about[name]) if name in about else None,
             "covers": covers.get(name, [])} for name in ordered]


def _covers(graph: list[Any], known: Mapping[str, str]) -> dict[str, list[str]]:
    """Kernel -> the operators of the file that it computes; what the runtime added stands for what it serves."""
    found: dict[str, list[str]] = {}
    for op in graph:
        own = [n for name in _told(op, "originalLayersNames").split(",") for n in mentioned(name, known)]
        found[op.get_friendly_name()] = own or mentioned(op.get_friendly_name(), known)
    for op in reversed(graph):
        name = op.get_friendly_name()
        if not found[name]:
            found[name] = next((found[r] for r in _readers(op) if found.get(r)), [])
    return found


def _kind(kind: str, op: Any) -> str:
    """The operator; of a convolution also whether it has a filter a channel, or writes a single cell."""
    if op is None or "Convolution" not in kind:
        return kind
    shape = op.get_output_partial_shape(0)
    if shape.is_static and len(shape) == 4 and shape[2].get_length() * shape[3].get_length() == 1:
        return f"{kind} (one cell)"
    return f"{kind} (depthwise)" if kind == "GroupConvolution" else kind


def _order(op: Any) -> int:
    told = _told(op, "execOrder") if op is not None else ""
    return int(told) if told.lstrip("-").isdigit() else 0


def _told(op: Any, key: str) -> str:
    info = op.get_rt_info()
    return str(info[key].astype(str)) if key in info else ""


def _readers(op: Any) -> list[str]:
    return [target.get_node().get_friendly_name() for output in op.outputs() for target in output.get_target_inputs()]
