"""What onnxruntime's profiler says of a graph, on whichever device it ran: what was executed, where, and how long each operator took."""
from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgekd.profiling.board.runtimes.onnx import INTEGER_OPS, TYPES, precision


@dataclass(frozen=True)
class Node:
    """An operator: its name in the file, its kind, the provider that ran it, the types of its inputs, and the median of its times."""

    name: str
    op: str
    provider: str
    types: tuple[str, ...]
    ms: float


def nodes_of(events: Iterable[Mapping[str, Any]]) -> list[Node]:
    """The operators of a profile (the list in onnxruntime's JSON file), in the order they ran; the first of several runs is not counted."""
    found: dict[tuple[str, str], Mapping[str, Any]] = {}
    times: dict[tuple[str, str], list[float]] = {}
    for event in events:
        name, told = str(event.get("name", "")), event.get("args") or {}
        if event.get("cat") != "Node" or not name.endswith("_kernel_time") or "op_name" not in told:
            continue
        key = (name, str(told.get("node_index", "")))
        found.setdefault(key, event)
        times.setdefault(key, []).append(float(event["dur"]) / 1e3)
    return [Node(name.removesuffix("_kernel_time"), str(e["args"]["op_name"]), str(e["args"].get("provider", "")),
                 tuple(next(iter(t)) for t in e["args"].get("input_type_shape") or [] if t), statistics.median(times[name, index][1:] or times[name, index]))
            for (name, index), e in found.items()]


def facts(nodes: Sequence[Node], provider: str) -> dict[str, Any]:
    """`executed_precision`, `executed_ops` and `fell_back` of a measured component, whose operators `provider` was meant to run."""
    away = [f"{n.name} ({n.op}) on {n.provider}" for n in nodes if n.provider and n.provider != provider]
    return {"executed_precision": precision((n.op, list(n.types)) for n in nodes), "executed_ops": dict(Counter(n.op for n in nodes).most_common()),
            "fell_back": away}


def layers_of(nodes: Sequence[Node]) -> list[dict[str, Any]]:
    """The rows of a measured component's `layers`."""
    return [{"name": n.name, "op": n.op, "ms": n.ms, "precision": "int8" if n.op in INTEGER_OPS else next((TYPES[t] for t in n.types if t in TYPES), None)}
            for n in nodes]
