"""8-bit weights and activations for XNNPACK, by torchao's PT2E: observers are set, shown the calibration inputs one by one, and made into QDQ pairs.

    static    convolutions and linear layers: per-channel weights, per-tensor activations. Sums and products between them stay in float, and so do
              convolutions below 1/200 of all arithmetic: nothing is won, and the depthwise convolutions of a folded network lose more than all others
              together (RepViT-S's encoder at 256 px: cosine 0.9996, all in integers 0.9986, torchao's defaults 0.9990)
    dynamic   linear layers only: weights per channel, activations by what they are at run time
    trained   layers with ranges of their own have their pairs written around them (`_executorch_pairs.py`)

Activations keep the extremes that were seen; `mse` takes torchao's HistogramObserver, which cuts where the squared error of rounding is least. That is
the library's own default (`naive`), as are steps of at least 2^-12, which leave a channel of small weights few levels.

What the observers saw of a program is kept in this process for samples that have a `fingerprint()`: variants that keep other layers in float are written
from it without looking again.
"""
from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgekd.export._executorch_pairs import layer_of, roomy, write_pairs
from edgekd.export._inputs import looked_at
from edgekd.export._program import quiet

from edgekd.errors import EdgekdError, UsageError, first_line
from edgekd.protocols import Component
from edgekd.tuning import PLAIN, Tuning

if TYPE_CHECKING:
    import numpy as np
    import torch

Samples = Iterable[Mapping[str, "np.ndarray"]]
Seen = dict[str, dict[str, Any]]
"""node -> the buffers of its observer"""

SMALL = 1 / 200
KEPT = 8
_seen: OrderedDict[str, Seen] = OrderedDict()


@dataclass(frozen=True)
class Program:
    """A captured component: how to get its graph anew, and what tells it from others."""

    component: Component
    key: str
    captured: torch.export.ExportedProgram

    def graph(self) -> torch.fx.GraphModule:
        """A graph of the caller's own."""
        return self.captured.module(check_guards=False)  # type: ignore[return-value]


def quantize(program: Program, scheme: str, calibration: Samples | None, tuning: Tuning = PLAIN) -> torch.fx.GraphModule:
    """The program's graph with QDQ pairs.

    Raises:
        UsageError: the inputs are no calibration.
        EdgekdError: there is nothing to quantize, an input is of integers, an activation is NaN or infinite, or the toolchain refuses, with its reason.
    """
    component, dynamic = program.component, scheme == "w8_dynamic"
    integers = [name for name, t in component.example.items() if not t.is_floating_point()]
    if integers and scheme.endswith("_static"):
        raise EdgekdError(f"an input of integers cannot be observed: {', '.join(integers)}", where=component.name, hint="let the module take it as float32")
    try:
        import torch

        with quiet(), torch.no_grad():
            if scheme.endswith("_qat"):
                converted = write_pairs(program.graph(), tuning.grids)
            else:
                converted = _converted(program, None if dynamic else calibration, tuning)
    except EdgekdError as e:
        raise type(e)(e.what, where=component.name, hint=e.hint) from e
    except Exception as e:  # torchao raises torch's errors and its own: all mean that it cannot be quantized
        raise EdgekdError(f"torchao cannot quantize the component: {first_line(e)}", where=component.name, hint="use fp32") from e
    if not any("dequantize" in str(n.target) for n in converted.graph.nodes):
        what = "linear layers" if dynamic else "layers with trained ranges" if scheme.endswith("_qat") else "convolutions or linear layers"
        raise EdgekdError(f"it has no {what} to quantize", where=component.name, hint="use w8a8_static" if dynamic else "use fp32")
    return converted


def _converted(program: Program, calibration: Samples | None, tuning: Tuning) -> torch.fx.GraphModule:
    """By prepare_pt2e and convert_pt2e; `calibration` None: dynamic."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    graph = program.graph()
    prepared = prepare_pt2e(graph, _quantizer(graph, calibration is None, tuning))
    if calibration is None:
        prepared(*program.component.example.values())  # weights are observed in a call too
    else:
        known = fingerprint() if callable(fingerprint := getattr(calibration, "fingerprint", None)) else None
        key = f"{program.key} {known} {tuning.method} {tuning.naive}" if known else None
        if key is None:
            _show(prepared, program, calibration)
        else:
            if key not in _seen:
                whole = program.graph()
                everything = prepare_pt2e(whole, _quantizer(whole, False, Tuning(method=tuning.method, naive=tuning.naive)))
                _show(everything, program, calibration)
                _seen[key] = {name: dict(observer.named_buffers()) for name, observer in _observers(everything).items()}
                while len(_seen) > KEPT:
                    _seen.popitem(last=False)
            _seen.move_to_end(key)
            _remember(prepared, _seen[key])
        if not tuning.naive:
            roomy(prepared)
    return convert_pt2e(prepared)  # type: ignore[no-any-return]


def _show(prepared: torch.fx.GraphModule, program: Program, calibration: Samples) -> None:
    """The calibration inputs, one by one."""
    import torch

    example = program.component.example
    for sample in looked_at(program.component, calibration):
        given = [torch.from_numpy(sample[name]).to(t.dtype) for name, t in example.items()]
        try:
            found = torch.utils._pytree.tree_leaves(prepared(*given))
        except RuntimeError as e:  # a histogram of NaN
            if (place := _broken(program.graph(), given)) is None:
                raise
            raise _not_finite(place) from e
        if not all(bool(torch.isfinite(t).all()) for t in found):
            raise _not_finite(_broken(program.graph(), given) or "its outputs")
    for name, observer in _observers(prepared).items():
        if not all(math.isfinite(float(b)) for k, b in observer.named_buffers() if k in ("min_val", "max_val")):
            raise _not_finite(_broken(program.graph(), given) or name)


def _not_finite(place: str) -> EdgekdError:
    return EdgekdError(f"activations are NaN or infinite on the calibration inputs, first in {place}", hint="the fp32 model is broken there: train it again")


def _broken(graph: torch.fx.GraphModule, given: list[torch.Tensor]) -> str | None:
    """The path of the module that computes NaN or infinity first, or the name of its operation."""
    import torch

    class Looking(torch.fx.Interpreter):
        place: str | None = None

        def run_node(self, n: torch.fx.Node) -> Any:
            found = super().run_node(n)
            if self.place is None and n.op == "call_function" and isinstance(found, torch.Tensor) and not bool(torch.isfinite(found).all()):
                self.place = layer_of(n) or n.name
            return found

    looking = Looking(graph)
    looking.run(*given)
    return looking.place


def _observers(prepared: torch.fx.GraphModule) -> dict[str, Any]:
    """Node -> what observes it, of activations."""
    return {n.args[0].name: getattr(prepared, str(n.target)) for n in prepared.graph.nodes  # type: ignore[union-attr]
            if n.op == "call_module" and n.args and n.args[0].op != "get_attr"}  # type: ignore[union-attr]


def _remember(prepared: torch.fx.GraphModule, seen: Seen) -> None:
    """Give the observers what was seen before. Those of weights look at them now."""
    from operator import attrgetter

    for name, observer in _observers(prepared).items():
        for key, value in seen[name].items():
            setattr(observer, key, value.clone())
    for n in prepared.graph.nodes:
        if n.op == "call_module" and n.args and n.args[0].op == "get_attr":  # type: ignore[union-attr]
            getattr(prepared, str(n.target))(attrgetter(str(n.args[0].target))(prepared))  # type: ignore[union-attr]


def _quantizer(graph: torch.fx.GraphModule, dynamic: bool, tuning: Tuning) -> Any:
    """XNNPACK's quantizer for one graph: of convolutions and linear layers, or of linear layers alone."""
    import torch
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config

    quantizer, aten = XNNPACKQuantizer(), torch.ops.aten
    config = get_symmetric_quantization_config(is_per_channel=tuning.granularity == "channel", is_dynamic=dynamic)
    if tuning.naive:
        return quantizer.set_global(config)
    if not dynamic:
        config = _config(tuning)
    floats = {n for n in graph.graph.nodes if layer_of(n) in tuning.keep} | (set() if dynamic else _small(graph))
    quantizer.set_filter_function(lambda node: node not in floats)
    for operator in [aten.linear.default] if dynamic else [aten.linear.default, aten.conv2d.default, aten.conv_transpose2d.input]:
        quantizer.set_operator_type(operator, config)
    return quantizer


def _small(graph: torch.fx.GraphModule) -> set[torch.fx.Node]:
    """Convolutions that do less than `SMALL` of all multiplications of the graph."""
    import torch

    aten, work = torch.ops.aten, {}
    for n in graph.graph.nodes:
        if n.target in (aten.conv2d.default, aten.linear.default, aten.conv_transpose2d.input):
            weight: Any = n.args[1]
            counted: Any = n.args[0] if n.target is aten.conv_transpose2d.input else n
            work[n] = counted.meta["val"].numel() * math.prod(weight.meta["val"].shape[1:])
    return {n for n, amount in work.items() if n.target is not aten.linear.default and amount < SMALL * sum(work.values())}


def _config(tuning: Tuning) -> Any:
    """Static int8 with steps as small as they need be.

    Raises:
        UsageError: torchao has no such observer.
    """
    import torch
    from torchao.quantization.pt2e.observer import HistogramObserver, MinMaxObserver, PerChannelMinMaxObserver
    from torchao.quantization.pt2e.quantizer import QuantizationConfig, QuantizationSpec

    observers = {"minmax": MinMaxObserver, "mse": HistogramObserver}
    if tuning.method not in observers:
        raise UsageError(f"torchao finds ranges by {' or '.join(observers)}, not by {tuning.method}")
    channel, least = tuning.granularity == "channel", -127 if tuning.symmetric else -128
    activation = QuantizationSpec(dtype=torch.int8, quant_min=least, quant_max=127, observer_or_fake_quant_ctr=observers[tuning.method],
                                  qscheme=torch.per_tensor_symmetric if tuning.symmetric else torch.per_tensor_affine)
    weight = QuantizationSpec(dtype=torch.int8, quant_min=-127, quant_max=127, ch_axis=0,
                              observer_or_fake_quant_ctr=PerChannelMinMaxObserver if channel else MinMaxObserver,
                              qscheme=torch.per_channel_symmetric if channel else torch.per_tensor_symmetric)
    return QuantizationConfig(activation, activation, weight, None, False)
