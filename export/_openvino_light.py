"""8 bits for constants of what stays in float in a quantized OpenVINO model, as `_light.py` has them in ONNX.

OpenVINO computes linear layers from such weights as fast as before, and everything else once when it compiles the model (measured: a decoder of 1.57 in
place of 2.96 MB in 3.0 ms both ways).
"""
from __future__ import annotations

import math
from typing import Any

from edgekd.export._light import SMALLEST, rounded, rows
from edgekd.export._openvino_layers import openvino, readers

CHANNELS = {"Convolution": (0,), "GroupConvolution": (0, 1), "ConvolutionBackpropData": (1,)}
"""axes of a convolution's weights along which every index has a step of its own"""
TABLES = {"Add", "Subtract"}


def lighten(model: Any, kept: set[str]) -> int:
    """Give float constants of layers and tables 8 bits in place, but for what operators with these friendly names read. How many there were."""
    found = 0
    for op in model.get_ordered_ops():
        if op.get_type_name() == "Constant" and op.output(0).get_element_type() == openvino().Type.f32 and math.prod(op.output(0).get_shape()) >= SMALLEST:
            axes = None if kept & {r.get_friendly_name() for r in readers(op)} else _axes(op)
            if axes is not None:
                _lighten(op, axes)
                found += 1
    return found


def _axes(op: Any) -> tuple[int, ...] | None:
    """The axes of a constant along which every index has a step of its own; None for one that is no weight of a layer and no table."""
    used, shape = readers(op), list(op.output(0).get_shape())
    kinds = {r.get_type_name() for r in used}
    if kinds and kinds <= TABLES:
        return rows(shape)
    if len(used) != 1 or [t.get_index() for t in op.output(0).get_target_inputs()] != [1]:
        return None
    if kinds == {"MatMul"} and len(shape) == 2:
        return (0,) if used[0].get_attributes()["transpose_b"] else (1,)
    return CHANNELS.get(kinds.pop())


def _lighten(op: Any, axes: tuple[int, ...]) -> None:
    """Let what reads a constant read it from int8 levels and float steps."""
    from openvino import opset13 as ops

    targets = list(op.output(0).get_target_inputs())
    levels, steps = rounded(op.get_data(), axes)
    whole = ops.multiply(ops.convert(ops.constant(levels), "f32"), ops.constant(steps))
    for target in targets:
        target.replace_source_output(whole.output(0))
