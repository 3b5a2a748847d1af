"""Times of single operators, what all runtimes have in common: rows, and the names that runtimes make of a file's.

A row is `{"name", "op", "ms", "precision", "covers"}`: the runtime's name of a kernel, its kind, milliseconds of one run, the type it computes in (None where
it is not told) and, where the runtime tells it, the operators of the file that the kernel computes.
"""
from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

Rows = list[dict[str, Any]]

WARMUP = 3
"""runs that are not counted"""

APPENDED = re.compile(
    r"(_token_\d+|/duplicated|_nchwc|_quant(ized)?|_(pre|post)_(reshape|transpose)|_(De)?[Qq]uantizeLinear(_Output)?|_q_to_dq|_(pre|post)_d?q\d*|_d?q\d*"
    r"|/[^/]*)$")
"""What onnxruntime, its quantizer and OpenVINO put behind the name of an operator or tensor: `conv2d_3_nchwc`, `linear_2_dq1`, `node_gelu/fq_output_0`."""

JOINED = re.compile(r"\s\+\s|[\s,;()\[\]{}\x1e]+|\.\.\.")
"""What stands between the names that TensorRT, OpenVINO and LiteRT join: `node_Conv_1 + PWN(node_gelu)`, `{ForeignNode[a...b]}`."""


def stripped(name: str, known: Collection[str]) -> str | None:
    """`name`, or what is left of it without what runtimes append, as soon as that is in `known`; None where it never is."""
    while name not in known:
        shorter = APPENDED.sub("", name)
        if not shorter or shorter == name:
            return None
        name = shorter
    return name


def mentioned(name: str, known: Mapping[str, str]) -> list[str]:
    """The names in `known` that a kernel's name is made of."""
    whole = stripped(name, known)
    parts = [name] if whole else [p for p in JOINED.split(name) if p]
    return list(dict.fromkeys(found for p in parts if (found := stripped(p, known)) is not None))


def middle(values: Sequence[float]) -> float:
    """The mean of the middle half. Runtimes count whole microseconds, so that a median of a small operator would be 0, 1 or 2 of them."""
    ordered, cut = sorted(values), len(values) // 4
    return statistics.fmean(ordered[cut:len(ordered) - cut])


def together(runs: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Kernel -> its middle over all runs, in the order of the first that has it; what is absent from a run took nothing in it."""
    found, counted = defaultdict[str, list[float]](list), list(runs)
    for run in counted:
        for name, ms in run.items():
            found[name].append(ms)
    return {name: middle([*values, *[0.0] * (len(counted) - len(values))]) for name, values in found.items()}


WEIGHTED = "weights"
XNNPACK: tuple[tuple[str, str], ...] = (
    ("Convolution", WEIGHTED), ("Deconvolution", WEIGHTED), ("Fully Connected", WEIGHTED), ("Dynamic Fully Connected", WEIGHTED), ("Static Reshape", "RESHAPE"),
    ("Squared Difference", "SQUARED_DIFFERENCE"), ("Reciprocal Square Root", "RSQRT"), ("Square Root", "SQRT"), ("Batch Matrix Multiply", "BATCH_MATMUL"),
    ("Multiply", "MUL"), ("Subtract", "SUB"), ("Divide", "DIV"), ("Sigmoid", "LOGISTIC"), ("Hardswish", "HARD_SWISH"), ("HardSwish", "HARD_SWISH"), ("Add", "ADD"),
    ("Mean", "MEAN"), ("GELU", "GELU"), ("Softmax", "SOFTMAX"), ("Transpose", "TRANSPOSE"), ("Concatenate", "CONCATENATION"), ("Resize Bilinear", "RESIZE_BILINEAR"),
    ("Static Slice", "STRIDED_SLICE"), ("Static Constant Pad", "PAD"), ("Clamp", "RELU"), ("Convert", "QUANTIZE"))
"""How the name of an XNNPACK operator begins -> the operator of a `.tflite` file"""
HAS_WEIGHTS = {"CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV", "FULLY_CONNECTED"}


def aligned(kernels: Sequence[str], operators: Sequence[str]) -> dict[int, int]:
    """Kernels of XNNPACK -> operators of a `.tflite` graph, both in their order: XNNPACK keeps it, leaves some out and joins others. Nothing where the
    number of those with weights differs, for then it cannot be told which is which."""
    ours = [next((kind for begin, kind in XNNPACK if name.startswith(begin)), name) for name in kernels]
    theirs = [WEIGHTED if kind in HAS_WEIGHTS else kind for kind in operators]
    marks, places = ([i for i, kind in enumerate(kinds) if kind == WEIGHTED] for kinds in (ours, theirs))
    if len(marks) != len(places):
        return {}
    found = dict(zip(marks, places, strict=True))
    for (a, b), (c, d) in zip(zip([-1, *marks], [*marks, len(ours)], strict=True), zip([-1, *places], [*places, len(theirs)], strict=True), strict=True):
        for block in SequenceMatcher(None, ours[a + 1:b], theirs[c + 1:d], autojunk=False).get_matching_blocks():
            found |= {a + 1 + block.a + i: c + 1 + block.b + i for i in range(block.size)}
    return found
