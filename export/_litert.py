"""LiteRT's converter and quantizer, as `_child.call` runs them: files in, files out. Nothing here is imported by the process that asks.

Integer arithmetic is not put everywhere. What follows stays in float, found in the graph and in what calibration saw:

    angles       everything a sine or cosine is computed from: 8 bits of a pixel coordinate are another place
    choices      everything that is compared: an integer near 1 is not 1
    wide         what passes 1000 in calibration: the bias that masks a point out leaves no steps for the scores it is added to
    small        convolutions and layers below 1/200 of all arithmetic: nothing is won, and the first depthwise convolutions of a folded network lose
                 more than all others together. Linear layers among them (prompt tokens, IoU head) keep 8-bit weights, of which a decoder's file is made
    the rest     softmax, normalisation and products of two activations

A file that is integer throughout (`whole`) keeps angles, choices and what is wide before a softmax, and nothing else.

Calibration keeps the extremes it sees. The quantizer's own default, a moving average, makes 0.2 of an input that is 0 or 1, and of every prompt that is
rare.
"""
from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("LITERT_TORCH_SHOW_PROGRESS", "n")

from edgekd.export._litert_graph import WEIGHTED, Graph

from edgekd.errors import EdgekdError

SIGNATURE = "serving_default"
CHOICES = {"EQUAL", "NOT_EQUAL", "GREATER", "GREATER_EQUAL", "LESS", "LESS_EQUAL", "REDUCE_ANY", "REDUCE_ALL", "LOGICAL_AND", "LOGICAL_OR", "LOGICAL_NOT"}
ANGLES = {"SIN", "COS"}
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
            found = self.module(*(given[name] for name in inputs))
            return dict(zip(outputs, found if isinstance(found, (tuple, list)) else (found,), strict=True))

    loaded = torch.export.load(program)
    graph = loaded.module(check_guards=False)
    for node in graph.graph.nodes:
        # a view holds for the memory order of the kernel that was traced; the converter's attention has another
        if node.op == "call_function" and node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
            node.target = torch.ops.aten.reshape.default
    graph.recompile()
    module = Named(graph)
    module.training = False  # a loaded program refuses eval(), which it is in already
    litert_torch.convert(module, sample_kwargs=dict(zip(inputs, loaded.example_inputs[0], strict=True))).export(output)
    return {}


def quantize(source: str, output: str, scheme: str, samples: str | None = None, whole: bool = False) -> dict[str, Any]:
    """Write the fp32 file `source` in a scheme.

    Args:
        samples: folder of `.npz` files, one for every calibration input.
        whole: integers wherever an operator has them, for accelerators that know nothing else.

    Raises:
        EdgekdError: there is nothing to quantize.
    """
    from ai_edge_quantizer import quantizer

    graph = Graph(source)
    if not graph.arithmetic:
        raise EdgekdError(f"nothing to quantize: {scheme} works on convolutions and linear layers, and the graph has none", hint="use fp32")
    ranges = _ranges(graph, source, Path(samples)) if samples is not None else {}
    recipe = _recipe(graph, scheme, ranges, whole)
    result = quantizer.Quantizer(source, recipe).quantize(ranges or None, enable_progress_report=False)
    if result.quantized_model is None:
        raise EdgekdError("the quantizer returned no file")
    Path(output).write_bytes(result.quantized_model)
    return {"operators": len(graph.arithmetic)}


def _recipe(graph: Graph, scheme: str, ranges: Mapping[str, Any], whole: bool) -> list[dict[str, Any]]:
    """What the quantizer is told, later entries before earlier ones. Inputs and outputs of the file stay in float."""
    from ai_edge_quantizer import recipe

    float_io = [_entry(".*", operation=kind) for kind in ("INPUT", "OUTPUT")]
    exact, small = graph.before(ANGLES), graph.small()
    linear = {i for i in small if graph.kinds[i] == "FULLY_CONNECTED"}
    if scheme == "fp16":
        halved = {"algorithm_key": "float_casting", "op_config": {"weight_tensor_config": {"num_bits": 16, "dtype": "FLOAT"},
                                                                 "compute_precision": "FLOAT", "explicit_dequantize": True}}
        return [_entry(".*") | halved, *float_io, *_named(graph, exact)]
    dynamic = _only(recipe.dynamic_wi8_afp32())
    if scheme in ("w8_dynamic", "w8_weight_only"):
        base = dynamic if scheme == "w8_dynamic" else _only(recipe.weight_only_wi8_afp32())
        return [*base, *float_io, *_named(graph, exact | small - linear)]
    static = recipe.static_wi8_ai8() if scheme == "w8a8_static" else recipe.static_wi8_ai16()
    exact |= graph.before(CHOICES)
    if whole:
        return [*static, *float_io, *_named(graph, exact | graph.masked(ranges))]
    light = [each | {"regex": named["regex"]} for named in _named(graph, linear) for each in dynamic]
    return [*_only(static), *float_io, *_named(graph, small), *light, *_named(graph, exact | graph.wide(ranges))]


def _only(base: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A recipe for all operators, for those with weights."""
    return [entry | {"operation": kind} for entry in base for kind in WEIGHTED.values()]


def _entry(regex: str, operation: str = "*") -> dict[str, Any]:
    """Leave it in float."""
    return {"regex": regex, "operation": operation, "algorithm_key": "no_quantize", "op_config": {}}


def _named(graph: Graph, operators: Iterable[int]) -> list[dict[str, Any]]:
    """Leave these in float."""
    names = [re.escape(graph.scope(i)) for i in sorted(operators)]
    return [_entry(f"^(?:{'|'.join(names[i:i + AT_ONCE])})$") for i in range(0, len(names), AT_ONCE)]


def _ranges(graph: Graph, source: str, folder: Path) -> dict[str, Any]:
    """Tensor name -> least and largest value that it takes on the samples. LiteRT's profiler gives the same as keeping every tensor does, in a tenth
    of the time; but without the axes that the quantizer wants, each of length 1."""
    import numpy as np
    from ai_edge_quantizer import calibrator, recipe, recipe_manager
    from ai_edge_quantizer.utils import qsv_utils

    everything = recipe_manager.RecipeManager()
    everything.load_quantization_recipe(recipe.static_wi8_ai8())
    found = calibrator.Calibrator(source, num_threads=os.cpu_count() or 1, mode=calibrator.CalibrationMode.CALIBRATION_PROFILER_BASED,
                                  qsv_update_func=qsv_utils.min_max_update)
    found.calibrate({SIGNATURE: _Samples(folder)}, everything)
    ranks = graph.ranks()
    return {name: {end: np.asarray(seen[end], np.float32).reshape((1,) * ranks[name]) for end in ("min", "max")}
            for name, seen in found.get_model_qsvs().items() if seen}


class _Samples:
    """Calibration inputs, read one by one."""

    def __init__(self, folder: Path) -> None:
        self._files = sorted(folder.glob("*.npz"))

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        import numpy as np

        for file in self._files:
            with np.load(file) as arrays:
                yield dict(arrays)
