"""QDQ pairs written into a torch program around the layers that have trained ranges, as convert_pt2e leaves them for XNNPACK.

torchao has quantization-aware training of its own (`prepare_qat_pt2e`). It trains a captured graph, for this one format; edgekd trains the module
(`fake_quant`), whose batch norms are folded first, and every format is written from the same weights and ranges.
"""
from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from edgekd.tuning import Grid, layer_name

if TYPE_CHECKING:
    import torch

MOST = 2.0**29
"""Steps that a bias may take of its 32 bits."""


def layer_of(node: torch.fx.Node) -> str:
    """Path of the module that a node of a captured graph comes from, as layers are named; empty when none is known."""
    stack = node.meta.get("nn_module_stack")
    return layer_name(next(reversed(stack.values()))[0]) if stack else ""


def write_pairs(graph: torch.fx.GraphModule, grids: Mapping[str, Grid]) -> torch.fx.GraphModule:
    """Pairs at the input, weight and output of every convolution and linear layer that has both of its ends in `grids`; in place.

    The pair of an output stands behind a ReLU that is all that follows: to levels of which one is 0 that makes no difference, and XNNPACK computes both
    at once. Everything that reads an output has the second half of its pair for itself: one that is shared counts as part of an integer operator for all
    when it is for one, and the file does not open. A layer without a range for its output would run in float all the same, and is left as it is.
    """
    import torch
    from torchao.quantization.pt2e import quantize_pt2e  # noqa: F401  registers the operators of quantized programs

    ops = torch.ops.quantized_decomposed
    for node in [n for n in graph.graph.nodes if n.target in _axes()]:
        grid = grids.get(layer_of(node))
        if grid is None or grid.input is None or grid.output is None:
            continue
        how = _how(grid.input)
        with graph.graph.inserting_before(node):
            levels = graph.graph.call_function(ops.quantize_per_tensor.default, (node.args[0], *how))
            data = graph.graph.call_function(ops.dequantize_per_tensor.default, (levels, *how))
            node.args = (data, _weight(graph, node, how[0]), *node.args[2:])
        users = list(node.users)
        last = users[0] if len(users) == 1 and users[0].target in (torch.ops.aten.relu.default, torch.ops.aten.relu_.default) else node
        readers, how = list(last.users), _how(grid.output)
        with graph.graph.inserting_after(last):
            levels = graph.graph.call_function(ops.quantize_per_tensor.default, (last, *how))
        for reader in readers:
            with graph.graph.inserting_before(reader):
                reader.replace_input_with(last, graph.graph.call_function(ops.dequantize_per_tensor.default, (levels, *how)))
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _axes() -> dict[Any, int]:
    """Operator with weights -> the axis of these that is its output channels."""
    import torch

    aten = torch.ops.aten
    return {aten.conv2d.default: 0, aten.linear.default: 0, aten.conv_transpose2d.input: 1}


def _how(ends: tuple[float, float]) -> tuple[float, int, int, int, Any]:
    """The 256 levels between two ends, as the operators of a pair are told: step, which level is 0, the first and last level, type."""
    import torch

    low, high = min(ends[0], 0.0), max(ends[1], 0.0)
    step = max((high - low) / 255, 1e-8)
    return step, round(-low / step) - 128, -128, 127, torch.int8


def _weight(graph: torch.fx.GraphModule, node: torch.fx.Node, step: float) -> torch.fx.Node:
    """The layer's weight in 8 bits, a step for every output channel. It lies on that grid already."""
    import torch

    axis, named = _axes()[node.target], node.args[1]
    weight: torch.Tensor = attrgetter(str(named.target))(graph).detach().float()  # type: ignore[union-attr]
    bias = node.args[2] if len(node.args) > 2 else None
    other = tuple(i for i in range(weight.ndim) if i != axis)
    most = _room(weight.abs().amax(other), None if bias is None else attrgetter(str(bias.target))(graph).detach(), step)  # type: ignore[union-attr]
    scale = (most / 127).clamp(min=torch.finfo(torch.float32).eps)
    shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
    made = {"levels": (weight / scale.reshape(shape)).round().clamp(-127, 127).to(torch.int8), "scale": scale, "zero": torch.zeros_like(scale, dtype=torch.int64)}
    for name, value in made.items():
        graph.register_buffer(f"{node.name}_{name}", value)
    found = [graph.graph.get_attr(f"{node.name}_{name}") for name in made]
    return graph.graph.call_function(torch.ops.quantized_decomposed.dequantize_per_channel.default, (*found, axis, -127, 127, torch.int8))


def _room(most: torch.Tensor, bias: torch.Tensor | None, step: float) -> torch.Tensor:
    """Largest weights (O,), raised where the bias, which is counted in steps of input times weight in 32 bits, would not fit otherwise."""
    import torch

    return most if bias is None else torch.maximum(most, bias.abs().float() / (step * MOST) * 127)


def roomy(prepared: torch.fx.GraphModule) -> None:
    """The same for the observers of a prepared graph, once they have seen activations and weights: a channel whose weights are all but zero (a pruned
    one) has a bias as well."""
    def observer(node: Any) -> Any:
        return getattr(prepared, str(node.target)) if getattr(node, "op", "") == "call_module" else None

    for node in (n for n in prepared.graph.nodes if n.target in _axes() and len(n.args) > 2 and n.args[2] is not None):
        data, weight = observer(node.args[0]), observer(node.args[1])
        if data is None or weight is None:
            continue
        bias = attrgetter(str(node.args[2].target))(prepared).detach()
        step = float(data.calculate_qparams()[0])
        most = _room(weight.max_val.clamp(min=0), bias if weight.max_val.ndim else bias.abs().amax(), step)
        weight.max_val = most.reshape(weight.max_val.shape)
