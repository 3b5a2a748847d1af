"""8-bit weights and activations for XNNPACK, by torchao's PT2E: observers are set, shown the calibration inputs one by one, and made into QDQ pairs.

    static    per-channel weights, per-tensor activations. A graph with attention has its convolutions and linear layers quantized only: sums and
              products around softmax and normalisation break at 8 bits and cost nothing; any other graph all that XNNPACK has integer kernels for
    dynamic   linear layers only: weights per channel, activations by what they are at run time
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from edgekd.export._program import quiet

from edgekd.errors import EdgekdError, first_line
from edgekd.protocols import Component

if TYPE_CHECKING:
    import numpy as np
    import torch


def quantize(graph: torch.fx.GraphModule, component: Component, calibration: Iterable[Mapping[str, np.ndarray]] | None) -> torch.fx.GraphModule:
    """A captured graph with QDQ pairs; `calibration` None: dynamic.

    Raises:
        EdgekdError: there is nothing to quantize, an input is of integers, or the toolchain refuses, with its reason.
    """
    import torch

    integers = [name for name, t in component.example.items() if not t.is_floating_point()]
    if integers and calibration is not None:
        raise EdgekdError(f"an input of integers cannot be observed: {', '.join(integers)}", where=component.name, hint="let the module take it as float32")
    try:
        with quiet(), torch.no_grad():
            from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

            aten = torch.ops.aten
            linear = [aten.linear.default]
            quantizer = _quantizer(graph, linear if calibration is None else [*linear, aten.conv2d.default, aten.conv_transpose2d.input])
            prepared = prepare_pt2e(graph, quantizer)
            if calibration is None:
                prepared(*component.example.values())  # weights are observed in a call too
            for sample in calibration or ():
                prepared(*(torch.from_numpy(sample[name]).to(t.dtype) for name, t in component.example.items()))
            converted = convert_pt2e(prepared)
    except Exception as e:  # torchao raises torch's errors and its own: all mean that it cannot be quantized
        raise EdgekdError(f"torchao cannot quantize the component: {first_line(e)}", where=component.name, hint="use fp32") from e
    if not any("dequantize" in str(n.target) for n in converted.graph.nodes):
        what = "linear layers" if calibration is None else "convolutions or linear layers"
        raise EdgekdError(f"it has no {what} to quantize", where=component.name, hint="use fp32" if calibration is not None else "use w8a8_static")
    return converted


def _quantizer(graph: torch.fx.GraphModule, arithmetic: list[Any]) -> Any:
    """XNNPACK's quantizer for one graph: of `arithmetic` operators, or of all when the graph is one of convolutions."""
    import torch
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config

    dynamic = len(arithmetic) == 1
    config, quantizer = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=dynamic), XNNPACKQuantizer()
    attention = {torch.ops.aten.scaled_dot_product_attention.default, torch.ops.aten.softmax.int, torch.ops.aten._softmax.default}
    if not dynamic and not any(n.target in attention for n in graph.graph.nodes):
        return quantizer.set_global(config)
    for operator in arithmetic:
        quantizer.set_operator_type(operator, config)
    return quantizer
