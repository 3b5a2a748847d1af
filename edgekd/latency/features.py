"""An operator as numbers, for a regression of its time: work, traffic, shapes, and how they sit on vector registers and caches.

Logarithms of base 2 throughout, since what matters is ratios. `ideal_ms` is the roofline of a nominal core: regressions learn by how much an
operator misses it, which varies by a small factor where times vary by a million.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edgekd.latency.operators import TRANSPOSED, Operator, Shape, elements

if TYPE_CHECKING:
    import numpy as np

GFLOPS, GB_PER_S, LEAST_MS = 60.0, 12.0, 0.001
"""Of the nominal core. Being wrong by a factor shifts everything alike, which the regression takes back."""
CACHES = (32 << 10, 1 << 20, 16 << 20)
"""bytes of a core's L1 and L2 and of a shared L3, about: whether a working set is far below or above is what counts"""
VECTOR = 16
SLOW = ("Gelu", "Erf", "Tanh", "Sigmoid", "HardSigmoid", "Swish", "Exp", "Softmax", "SoftMax", "Mish", "Softplus")
"""Fused kinds that take more than a comparison."""
NAMES = ("macs", "in", "weights", "out", "intensity", "set_l1", "set_l2", "set_l3", "weights_l2", "c_in", "c_out", "groups", "depthwise", "window", "stride",
         "side_in", "side_out", "batch", "rows", "columns", "depth", "rest_in", "rest_out", "last_in", "last_out", "inner", "fused", "slow", "sums", "products",
         "operands", "broadcast", "from_layout", "to_layout", "transposed", "rank", "constant")


def ideal_ms(operator: Operator) -> float:
    """Its time on the nominal core: arithmetic or traffic, whichever takes longer, and a microsecond to begin with."""
    moved = operator.bytes_in + operator.bytes_weights + operator.bytes_out
    return LEAST_MS + max(2 * operator.macs / GFLOPS, moved / GB_PER_S) / 1e6


def footprint(operators: Sequence[Operator]) -> int:
    """Bytes that a network goes through in one run: its weights, and everything that is written."""
    return sum(o.bytes_weights + o.bytes_out for o in operators)


def vector(operator: Operator) -> list[float]:
    """Numbers in the order of `NAMES`."""
    o, inputs = operator, operator.inputs or operator.weights or ((1,),)
    first, out = inputs[0] or (1,), (operator.outputs or ((1,),))[0] or (1,)
    moved, conv = o.bytes_in + o.bytes_weights + o.bytes_out, _convolution(o, first, out)
    batch, rows, columns, depth = _product(o, out)
    largest = max(elements(s) for s in inputs)
    row = {
        "macs": _log(o.macs), "in": _log(o.bytes_in), "weights": _log(o.bytes_weights), "out": _log(o.bytes_out), "intensity": _log(o.macs / max(1, moved) * 16),
        "set_l1": _log2(moved / CACHES[0]), "set_l2": _log2(moved / CACHES[1]), "set_l3": _log2(moved / CACHES[2]), "weights_l2": _log2((o.bytes_weights + 1) / CACHES[1]),
        **conv, "side_in": _log(_side(first)), "side_out": _log(_side(out)), "batch": _log(batch), "rows": _log(rows), "columns": _log(columns), "depth": _log(depth),
        "rest_in": _rest((conv["c_in"] and 2 ** conv["c_in"] - 1) or depth), "rest_out": _rest((conv["c_out"] and 2 ** conv["c_out"] - 1) or columns),
        "last_in": _log(first[-1]), "last_out": _log(out[-1]), "inner": _log(_inner(o, first)), "fused": float(len(o.fused)),
        "slow": float(sum(f.startswith(SLOW) for f in o.fused)), "sums": float(sum(f in ("Sum", "Add") for f in o.fused)),
        "products": float(sum(f in ("MatMul", "Multiply", "Divide") for f in o.fused)), "operands": float(len(o.inputs) + len(o.weights)),
        "broadcast": _log(largest / max(1, min(elements(s) for s in inputs))), "from_layout": _order(o.facts.get("from", "")), "to_layout": _order(o.facts.get("to", "")),
        "transposed": float(bool(o.facts.get("transA"))) + 2 * float(bool(o.facts.get("transB"))) + 4 * float(bool(o.facts.get("channels_last"))),
        "rank": float(len(out)), "constant": float(not o.inputs),
    }
    return [float(row[name]) for name in NAMES]


def table(operators: Sequence[Operator]) -> np.ndarray:
    """(n, len(NAMES)) of several."""
    import numpy as np

    return np.array([vector(o) for o in operators], dtype=np.float64).reshape(-1, len(NAMES))


def _convolution(o: Operator, first: Shape, out: Shape) -> dict[str, float]:
    """Channels per group, groups, window and stride; zeros for what is none."""
    if o.family != "conv" or not o.weights or len(first) < 3:
        return dict.fromkeys(("c_in", "c_out", "groups", "depthwise", "window", "stride"), 0.0)
    w = o.weights[0]
    groups = w[0] if o.grouped else int(o.facts.get("group", 1)) or 1
    channels = out[1]
    stride = max(1, round((out[2] / first[2]) if o.op in TRANSPOSED else (first[2] / max(1, out[2]))))
    return {"c_in": _log(first[1] / groups), "c_out": _log(channels / groups), "groups": _log(groups), "depthwise": float(groups == channels > 1),
            "window": _log(elements(w[3:] if o.grouped else w[2:])), "stride": _log(stride)}


def _product(o: Operator, out: Shape) -> tuple[int, int, int, int]:
    """Batch, M, N and K of a matrix product, or of any other tensor its leading axes, rows and columns."""
    if len(out) < 2:
        return 1, 1, out[-1], 0
    return elements(out[:-2]), out[-2], out[-1], o.depth if o.family == "matmul" and o.op != "Subgraph" else 0


def _inner(o: Operator, first: Shape) -> int:
    """How many numbers stay neighbours when axes are exchanged: what a copy moves at once."""
    perm: Any = o.facts.get("perm")
    if not perm or len(perm) != len(first):
        return first[-1]
    run = 1
    for at in range(len(perm) - 1, -1, -1):
        if perm[at] != at:
            break
        run *= first[at]
    return run


def _side(shape: Shape) -> float:
    """The geometric mean of height and width."""
    return math.sqrt(elements(shape[2:4])) if len(shape) >= 4 else float(shape[-2]) if len(shape) >= 2 else 1.0


def _order(layout: str) -> float:
    """0 plain, 1 channels last, 2 blocked, 3 anything else."""
    return 0.0 if not layout else 1.0 if layout in ("acdb", "acb", "acdeb") else 2.0 if any(c.isupper() or c.isdigit() for c in layout) else 3.0


def _rest(value: float) -> float:
    """The share of vector lanes that are idle in the last register of so many numbers, weighted by how many registers there are."""
    whole = round(value)
    return 0.0 if whole <= 0 else (math.ceil(whole / VECTOR) * VECTOR - whole) / (math.ceil(whole / VECTOR) * VECTOR)


def _log(value: float) -> float:
    return math.log2(1 + max(0.0, value))


def _log2(value: float) -> float:
    return math.log2(max(value, 2.0**-24))
