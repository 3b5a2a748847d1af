"""The child's side of `export/tensorrt.py`'s check: TensorRT-RTX parses a file and compiles it for GPUs that are not here.

RTX is TensorRT's sibling for desktop GPUs: the same parser and the same API, and a compiler that needs no GPU. What it builds runs on none of the
Jetsons; what it refuses, and what types it gives the layers of a strongly typed network, is about the file.
"""
from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgekd.export._tensorrt_build import Refused, configure, load, logger, parse, serialized

TYPES = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16", "INT8": "i8", "FP8": "fp8", "INT32": "int32", "INT64": "int64", "BOOL": "bool", "UINT8": "u8"}
ARITHMETIC = ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY", "EINSUM", "ATTENTION")
FLOATS = ("fp32", "fp16", "bf16", "i8", "fp8")
PASSED_THROUGH = ("SHUFFLE", "IDENTITY", "SQUEEZE", "UNSQUEEZE")
"""what may lie between a DEQUANTIZE and the arithmetic that it belongs to"""

MUST = (80, 86, 89, 120, 121)
"""GPU generations that a file must compile for; older and newer ones that RTX knows are tried and told"""

FP8_FROM = 89


def compile(file: str, spec: dict[str, Any]) -> dict[str, Any]:
    """Compile an ONNX file for every GPU generation that this RTX knows.

    Args:
        spec: what `build.json` says.

    Returns:
        JSON: `version`; `refused`, nodes that TensorRT does not take, which is then all; else `layers` and `arithmetic` (`kind:precision` and
        precision -> count), `count` of layers, `quantize` and `dequantize` layers, `engines`: [{sm, bytes}] and `without`: [{sm, reason}].
    """
    trt = load("tensorrt_rtx")
    log = logger(trt)
    told: dict[str, Any] = {"version": trt.__version__}
    try:
        builder, network = parse(trt, log, Path(file))
    except Refused as e:
        return told | {"refused": e.found, "reason": e.what}
    told |= describe(network) | {"engines": [], "without": []}
    known = sorted(int(name[2:]) for name in trt.ComputeCapability.__members__ if re.fullmatch(r"SM\d+", name))
    least = FP8_FROM if spec["scheme"] == "fp8_static" else MUST[0]
    must = [sm for sm in known if sm in MUST and sm >= least]
    for group in (must, *([sm] for sm in known if sm not in must and sm >= (least if least == FP8_FROM else 0))):
        config = configure(trt, builder, network, spec)
        config.num_compute_capabilities = len(group)
        for index, sm in enumerate(group):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), index)
        try:
            told["engines"].append({"sm": group, "bytes": len(serialized(trt, log, builder, network, config))})
        except Refused as e:
            if group is must:
                return told | {"refused": e.found, "reason": f"{e.what} (for SM {', '.join(map(str, must))})"}
            told["without"].append({"sm": group, "reason": e.what})
    return told


def describe(network: Any) -> dict[str, Any]:
    """The layers of a parsed network, by kind and by the type they compute in."""
    made = {layer.get_output(i).name: layer for layer in _layers(network) for i in range(layer.num_outputs)}
    kinds: Counter[str] = Counter()
    arithmetic: Counter[str] = Counter()
    for layer in _layers(network):
        kind, precision = layer.type.name, precision_of(layer, made)
        if precision in FLOATS and kind != "CONSTANT":
            kinds[f"{kind.lower()}:{precision}"] += 1
        if kind in ARITHMETIC and precision in FLOATS:
            arithmetic[precision] += 1
    names = Counter(layer.type.name for layer in _layers(network))
    return {"layers": dict(kinds.most_common()), "arithmetic": dict(arithmetic), "count": network.num_layers,
            "quantize": names["QUANTIZE"], "dequantize": names["DEQUANTIZE"]}


def precision_of(layer: Any, made: Mapping[str, Any]) -> str:
    """What a layer of a strongly typed network computes in: the type of its output, or eight bits for arithmetic whose every operand was dequantized."""
    if layer.type.name in ARITHMETIC:
        operands = [_quantized(layer.get_input(i), made) for i in range(min(2, layer.num_inputs))]
        if len(operands) == 2 and operands[0] is not None and operands[0] == operands[1]:
            return operands[0]
    return TYPES.get(layer.get_output(0).dtype.name, layer.get_output(0).dtype.name.lower()) if layer.num_outputs else "?"


def _quantized(tensor: Any, made: Mapping[str, Any]) -> str | None:
    """The eight-bit type that a tensor was dequantized from."""
    layer = made.get(tensor.name) if tensor is not None else None
    while layer is not None and layer.type.name in PASSED_THROUGH:
        layer = made.get(layer.get_input(0).name)
    if layer is None or layer.type.name != "DEQUANTIZE":
        return None
    return TYPES.get(layer.get_input(0).dtype.name)


def _layers(network: Any) -> list[Any]:
    return [network.get_layer(i) for i in range(network.num_layers)]
