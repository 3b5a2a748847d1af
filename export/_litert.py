"""LiteRT's converter and quantizer, as `_child.call` runs them: files in, files out. Nothing here is imported by the process that asks.

Integer arithmetic is not put everywhere. What follows stays in float, found in the graph and in what calibration saw:

    angles       everything a sine or cosine is computed from: 8 bits of a pixel coordinate are another place
    choices      everything that is compared: an integer near 1 is not 1
    wide         what passes 1000 in calibration: the bias that masks a point out leaves no steps for the scores it is added to
    small        convolutions and layers below 1/200 of all arithmetic: nothing is won, and the first depthwise convolutions of a folded network lose
                 more than all others together. Linear layers among them (prompt tokens, IoU head) keep 8-bit weights, of which a decoder's file is made
    the rest     softmax, normalisation and products of two activations

A file that is integer throughout (`whole`) keeps angles, choices and what is wide before a softmax, and nothing else.

The path of every torch layer is in the names of the file's tensors (`_litert_graph.LAYER`), by which layers are kept in float, or given ranges of their own.
"""
from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("LITERT_TORCH_SHOW_PROGRESS", "n")

from edgekd.export import _litert_ranges
from edgekd.export._litert_graph import LAYER, PLACE, WEIGHTED, Graph

from edgekd.errors import EdgekdError
from edgekd.tuning import layer_name

CHOICES = {"EQUAL", "NOT_EQUAL", "GREATER", "GREATER_EQUAL", "LESS", "LESS_EQUAL", "REDUCE_ANY", "REDUCE_ALL", "LOGICAL_AND", "LOGICAL_OR", "LOGICAL_NOT"}
ANGLES = {"SIN", "COS"}
WEIGHTED_IN_TORCH = {"aten.conv2d.default", "aten.conv_transpose2d.input", "aten.linear.default"}
AT_ONCE = 50
"""Operators named in one regular expression of a recipe."""


def convert(program: str, output: str, inputs: list[str], outputs: list[str]) -> dict[str, Any]:
    """A saved torch program -> fp32 `.tflite`, whose signature has these names of inputs and outputs."""
    import litert_torch
    import torch

    class Named(torch.nn.Module):
        """Names reach the file as keyword arguments and the keys of a dict; anything else is called args_0 and output_0."""

        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, **given: Any) -> dict[str, Any]:
            with torch.fx.traceback.preserve_node_meta():  # or the places of operators are forgotten when this is captured again
                found = torch.fx.Interpreter(self.module).run(*(given[name] for name in inputs))
            return dict(zip(outputs, found if isinstance(found, (tuple, list)) else (found,), strict=True))

    loaded = torch.export.load(program)
    graph = loaded.module(check_guards=False)
    for node in graph.graph.nodes:
        # a view holds for the memory order of the kernel that was traced; the converter's attention has another
        if node.op == "call_function" and node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
            node.target = torch.ops.aten.reshape.default
        if stack := node.meta.get("nn_module_stack"):
            path = layer_name(next(reversed(stack.values()))[0])
            node.meta["nn_module_stack"] = {"place": ("", f"{LAYER if str(node.target) in WEIGHTED_IN_TORCH else PLACE}{path}")}
    graph.recompile()
    module = Named(graph)
    module.training = False  # a loaded program refuses eval(), which it is in already
    litert_torch.convert(module, sample_kwargs=dict(zip(inputs, loaded.example_inputs[0], strict=True))).export(output)
    return {}


def quantize(source: str, output: str, scheme: str, samples: str = "", ranges: str = "", whole: bool = False, tuning: dict[str, Any] | None = None,
             ) -> dict[str, Any]:
    """Write the fp32 file `source` in a scheme.

    Args:
        samples: folder of `.npz` files, one for every calibration input.
        ranges: file of what calibration saw: read where it is there, else written.
        whole: integers wherever an operator has them, for accelerators that know nothing else.
        tuning: `keep` (layers), `granularity`, `symmetric`, `naive`, `grids` (layer -> [low, high] of its input and of its output) and `peaks` (layer ->
            largest absolute weight of every output channel), as `edgekd.tuning.Tuning` says.

    Raises:
        EdgekdError: there is nothing to quantize, or an activation is NaN or infinite.
    """
    from ai_edge_quantizer import quantizer

    graph, told = Graph(source), tuning or {}
    if not graph.arithmetic:
        raise EdgekdError(f"nothing to quantize: {scheme} works on convolutions and linear layers, and the graph has none", hint="use fp32")
    if told.get("naive"):
        made = quantizer.Quantizer(source, _naive(scheme))
        seen = made.calibrate({_litert_ranges.SIGNATURE: _litert_ranges.Samples(Path(samples))}) if samples else None
    else:
        own = _litert_ranges.trained(graph, told.get("grids", {}), told.get("peaks", {}))
        limits = _litert_ranges.found(graph, source, Path(samples), Path(ranges)) if scheme.endswith("_static") else {}
        _litert_ranges.each_its_own(graph, own)
        seen = _litert_ranges.as_statistics(graph, {**limits, **{name: ends for one in own.values() for name, ends in one.items()}})
        made = quantizer.Quantizer(source, _of_scopes(own) if scheme.endswith("_qat") else _recipe(graph, scheme, limits, whole, told))
    result = made.quantize(seen or None, enable_progress_report=False)
    if result.quantized_model is None:
        raise EdgekdError("the quantizer returned no file")
    file = bytes(result.quantized_model)
    Path(output).write_bytes(_litert_ranges.through_float(file) if scheme.endswith("_qat") else file)
    return {"operators": len(graph.arithmetic)}


def _naive(scheme: str) -> list[dict[str, Any]]:
    """The library's recipe of this name for every operator that it takes. Only the file's inputs and outputs stay in float, as its callers expect."""
    from ai_edge_quantizer import recipe

    base = {"w8a8_static": recipe.static_wi8_ai8, "w8a16_static": recipe.static_wi8_ai16, "w8_dynamic": recipe.dynamic_wi8_afp32,
            "w8_weight_only": recipe.weight_only_wi8_afp32}[scheme]()
    return [*base, *(_entry(".*", operation=kind) for kind in ("INPUT", "OUTPUT"))]


def _of_scopes(own: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Integers for these operators and nothing else.

    Raises:
        EdgekdError: there are none.
    """
    from ai_edge_quantizer import recipe

    if not own:
        raise EdgekdError("nothing to quantize: no layer of the graph has trained ranges of its input and its output", hint="use w8a8_static")
    named = _regexes(own)
    return [entry | {"regex": regex} for entry in _only(recipe.static_wi8_ai8()) for regex in named]


def _recipe(graph: Graph, scheme: str, ranges: Mapping[str, Any], whole: bool, told: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the quantizer is told, later entries before earlier ones. Inputs and outputs of the file stay in float.

    Raises:
        EdgekdError: every layer is to stay in float.
    """
    from ai_edge_quantizer import recipe

    float_io = [_entry(".*", operation=kind) for kind in ("INPUT", "OUTPUT")]
    exact, small, kept = graph.before(ANGLES), graph.small(), set(graph.of(told.get("keep", ())))
    if kept >= set(graph.arithmetic) - exact:
        raise EdgekdError(f"nothing to quantize: every layer that {scheme} works on is kept in float", hint="keep fewer layers, or use fp32")
    linear = {i for i in small if graph.kinds[i] == "FULLY_CONNECTED"}
    if scheme == "fp16":
        halved = {"algorithm_key": "float_casting", "op_config": {"weight_tensor_config": {"num_bits": 16, "dtype": "FLOAT"},
                                                                 "compute_precision": "FLOAT", "explicit_dequantize": True}}
        return [_entry(".*") | halved, *float_io, *_named(graph, exact | kept)]
    dynamic = _only(_tuned(recipe.dynamic_wi8_afp32(), told))
    if scheme in ("w8_dynamic", "w8_weight_only"):
        base = dynamic if scheme == "w8_dynamic" else _only(_tuned(recipe.weight_only_wi8_afp32(), told))
        return [*base, *float_io, *_named(graph, exact | kept | small - linear)]
    static = _tuned(recipe.static_wi8_ai8() if scheme == "w8a8_static" else recipe.static_wi8_ai16(), told)
    exact |= graph.before(CHOICES)
    if whole:
        return [*static, *float_io, *_named(graph, exact | graph.masked(ranges))]
    light = [each | {"regex": named["regex"]} for named in _named(graph, linear) for each in dynamic]
    return [*_only(static), *float_io, *_named(graph, small), *light, *_named(graph, exact | kept | graph.wide(ranges))]


def _tuned(base: list[dict[str, Any]], told: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A recipe with one step for all of a weight, or 0 in the middle of the activations' levels or not, where that is asked for."""
    for config in (entry["op_config"] for entry in base):
        if told.get("granularity") == "tensor":
            config["weight_tensor_config"]["granularity"] = "TENSORWISE"
        if told.get("symmetric") is not None and "activation_tensor_config" in config:
            config["activation_tensor_config"]["symmetric"] = told["symmetric"]
    return base


def _only(base: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A recipe for all operators, for those with weights."""
    return [entry | {"operation": kind} for entry in base for kind in WEIGHTED.values()]


def _entry(regex: str, operation: str = "*") -> dict[str, Any]:
    """Leave it in float."""
    return {"regex": regex, "operation": operation, "algorithm_key": "no_quantize", "op_config": {}}


def _named(graph: Graph, operators: Iterable[int]) -> list[dict[str, Any]]:
    """Leave these in float."""
    return [_entry(regex) for regex in _regexes(graph.scope(i) for i in sorted(operators))]


def _regexes(scopes: Iterable[str]) -> list[str]:
    """Expressions that match these scopes and no others."""
    names = [re.escape(scope) for scope in scopes]
    return [f"^(?:{'|'.join(names[i:i + AT_ONCE])})$" for i in range(0, len(names), AT_ONCE)]
