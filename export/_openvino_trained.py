"""int8 with trained ranges: FakeQuantize at the input and the weight of each layer that has a grid. OpenVINO executes such a layer in 8 bits.

The levels are those that training rounded to: 256 between the ends of an activation, 0 being one of them; of a weight 255 around 0, a step for every
output channel. Weights lie on their grid already and stay what they are, also the fifteen levels of w4a8: training has put them on those of 8 bits. A bias
is a whole number of input step x weight step, as in training; left as it is, it moves values across the border of two levels, which adds up.

Outputs are not rounded. Where they are, the plugin (2026.4.1) changes what it computes beside a rounding: before residual sums and behind several
heads that are concatenated. Without, each layer is what the simulator gives for a grid whose `output` is None.
"""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.export._openvino_layers import bias_of, by_name, operators, read

from edgekd.errors import EdgekdError
from edgekd.tuning import Tuning

if TYPE_CHECKING:
    import numpy as np

LEVELS = 256
MOST = 127
CHANNELS = {"Convolution": (0,), "GroupConvolution": (0, 1), "ConvolutionBackpropData": (1,), "GroupConvolutionBackpropData": (0, 2)}
"""operator -> the axes of its weight that are output channels"""


def with_grids(source: Path, where: str, tuning: Tuning) -> tuple[Any, dict[str, list[str]]]:
    """The model of a float ONNX file with every layer of `tuning.grids` quantized, and layer -> friendly names of its operators.

    Raises:
        EdgekdError: OpenVINO cannot read it, or no layer of it has a grid.
    """
    model = read(source, where, folded=True)
    layers = operators(model, source)
    known, done = by_name(model), 0
    for layer, names in layers.items():
        grid = tuning.grids.get(layer)
        if grid is None or grid.input is None or layer in tuning.keep:
            continue
        for name in names:
            _quantize(known[name], grid.input)
            done += 1
    if not done:
        raise EdgekdError("none of its layers has trained ranges", where=where, hint="train it with a quantization-aware recipe first")
    from openvino._offline_transformations import compress_quantize_weights_transformation

    model.validate_nodes_and_infer_types()
    compress_quantize_weights_transformation(model)
    return model, layers


def _quantize(op: Any, ends: tuple[float, float]) -> None:
    """Round an operator's input, weight and bias, in place."""
    weight = op.input_value(1).get_node()
    step = step_of(weight.get_data(), channels(op))
    op.input(0).replace_source_output(_leveled(op.input_value(0), ends))
    op.input(1).replace_source_output(_stepped(weight, step))
    if (bias := bias_of(op)) is not None:
        _round_bias(bias, step.reshape(-1) * _spread(ends)[0])


def _round_bias(bias: Any, step: np.ndarray) -> None:
    """Put the constant that a sum adds on whole multiples of its channels' steps (C,), in place."""
    import numpy as np
    from openvino import opset13 as ops

    for port in bias.inputs():
        value = port.get_source_output().get_node()
        if value.get_type_name() == "Constant" and value.get_data().size == step.size:
            data = value.get_data()
            spread = step.reshape(data.shape)
            port.replace_source_output(ops.constant((np.rint(data / spread) * spread).astype(data.dtype)).output(0))


def channels(op: Any) -> tuple[int, ...]:
    """The axes of an operator's weight that are its output channels."""
    kind = op.get_type_name()
    if kind != "MatMul":
        return CHANNELS[kind]
    last = len(op.input(1).get_partial_shape()) - 1
    return (last - 1 if op.get_attributes()["transpose_b"] else last,)


def step_of(weight: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """The step of each output channel, max|w| / 127, in a shape that broadcasts over the weight."""
    import numpy as np

    other = tuple(i for i in range(weight.ndim) if i not in axes)
    return np.maximum(np.abs(weight).max(other, keepdims=True).astype(np.float64) / MOST, 1e-12)


def _stepped(weight: Any, step: np.ndarray) -> Any:
    """A weight at whole multiples of its steps, at most 127 from 0."""
    from openvino import opset13 as ops

    ends = [ops.constant((sign * MOST * step).astype("float32")) for sign in (-1, 1, -1, 1)]
    return ops.fake_quantize(weight, *ends, levels=2 * MOST + 1).output(0)


def _leveled(value: Any, ends: tuple[float, float]) -> Any:
    """A value at 256 levels between the ends, moved so that 0 is one of them."""
    import numpy as np
    from openvino import opset13 as ops

    step, zero = _spread(ends)
    least, most = (ops.constant(np.float32(level * step)) for level in (-zero, LEVELS - 1 - zero))
    return ops.fake_quantize(value, least, most, least, most, levels=LEVELS).output(0)


def _spread(ends: tuple[float, float]) -> tuple[float, int]:
    """The distance of two levels, and the number of the level that is 0."""
    low, high = min(ends[0], 0.0), max(ends[1], 0.0)
    step = max((high - low) / (LEVELS - 1), 1e-8)
    return step, round(-low / step)


def quantized_layers(model: Any, layers: Mapping[str, list[str]]) -> list[str]:
    """Layers whose operators all compute on quantized inputs."""
    known = by_name(model)
    return [layer for layer, names in layers.items() if all(known[n].input_value(0).get_node().get_type_name() == "FakeQuantize" for n in names if n in known)]
