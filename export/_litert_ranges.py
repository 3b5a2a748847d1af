"""Ranges of activations for the quantizer of `.tflite` files: from calibration inputs, or trained ones, operator by operator.

Calibration keeps the extremes it sees. The quantizer's own default, a moving average, makes 0.2 of an input that is 0 or 1, and of every prompt that is
rare. What was found is a file, by which further variants of the same graph are written without looking at the inputs again.

The quantizer knows one range a tensor. Trained ranges are those of a layer, and one tensor may be rounded by the layer that writes it and again, to other
levels, by each that reads it; it has the operators for that, and is given each operator's own ranges by `each_its_own`. Left alone, it writes a tensor
with one reader in that reader's levels. And what is rounded twice goes through float: XNNPACK goes from levels straight to levels with 8 bits of their
ratio, by which a fifth of the values end one level off (`through_float`).
"""
from __future__ import annotations

import copy
import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgekd.export._litert_graph import WEIGHTED, Graph

from edgekd.errors import EdgekdError

SIGNATURE = "serving_default"
MOST = 2.0**30
"""Steps that a bias may take of its 32 bits."""

Ranges = dict[str, list[float]]
"""tensor name -> [least, largest]"""


def found(graph: Graph, source: str, samples: Path, kept: Path) -> Ranges:
    """The least and largest value of every tensor on the samples; from the file `kept` when there is one, which is written otherwise.

    Raises:
        EdgekdError: NaN or infinity, with the layer that computes it first.
    """
    if kept.is_file():
        return dict(json.loads(kept.read_text(encoding="utf-8")))
    ranges = _seen(source, samples)
    if (layer := graph.broken(ranges)) is not None:
        raise EdgekdError(f"activations are NaN or infinite on the calibration inputs, first in {layer}", hint="the fp32 model is broken there: train it again")
    temporary = kept.with_suffix(".part")
    temporary.write_text(json.dumps(ranges), encoding="utf-8")
    os.replace(temporary, kept)
    return ranges


def _seen(source: str, samples: Path) -> Ranges:
    """By LiteRT's profiler, which gives the same as keeping every tensor does, in a tenth of the time."""
    from ai_edge_quantizer import calibrator, recipe, recipe_manager
    from ai_edge_quantizer.utils import qsv_utils

    everything = recipe_manager.RecipeManager()
    everything.load_quantization_recipe(recipe.static_wi8_ai8())
    made = calibrator.Calibrator(source, num_threads=os.cpu_count() or 1, mode=calibrator.CalibrationMode.CALIBRATION_PROFILER_BASED,
                                 qsv_update_func=qsv_utils.min_max_update)
    made.calibrate({SIGNATURE: Samples(samples)}, everything)
    return {name: [float(seen[end].min()) for end in ("min", "max")] for name, seen in made.get_model_qsvs().items() if seen}


def as_statistics(graph: Graph, ranges: Mapping[str, Any]) -> dict[str, Any]:
    """Ranges as the quantizer takes them: with the axes of the tensor, each of length 1."""
    import numpy as np

    ranks = graph.ranks()
    return {name: {end: np.full((1,) * ranks[name], value, np.float32) for end, value in zip(("min", "max"), ends, strict=True)}
            for name, ends in ranges.items() if name in ranks}


def trained(graph: Graph, grids: Mapping[str, Any], peaks: Mapping[str, list[float]]) -> dict[str, Ranges]:
    """The trained ranges of operators: scope -> the ranges of what it reads and writes.

    Args:
        grids: layer -> [low, high] of its input and of its output.
        peaks: layer -> largest absolute weight of each output channel. Where the converter multiplied a number into a layer's weight (1/sqrt(d) into
            a projection), its output is that much larger or smaller, and so is the range; where it did so channel by channel, no range fits, and
            the layer stays in float.
    """
    import numpy as np

    own: dict[str, Ranges] = {}
    for operator, layer in graph.of(grids).items():
        ratio = graph.peaks(operator) / np.maximum(np.asarray(peaks[layer], np.float32), 1e-30)
        ratio = ratio[np.asarray(peaks[layer]) > 0]
        if ratio.size and float(ratio.max()) > 1.0001 * float(ratio.min()):
            continue
        factor = float(np.median(ratio)) if ratio.size else 1.0
        (least, most), written = grids[layer][0], [end * factor for end in grids[layer][1]]
        reads, writes = graph.ends(operator)
        own[graph.scope(operator)] = {reads: [min(least, 0.0), max(most, 0.0)], writes: [min(written[0], 0.0), max(written[1], 0.0)]}
    return own


def each_its_own(graph: Graph, own: Mapping[str, Ranges]) -> None:
    """From now on this process quantizes operators with weights by their `own` ranges where they have some (by their scope).

    And with steps that their bias fits in: it is counted in steps of input times weight, in 32 bits, and a channel whose weights are all but zero
    (a pruned one) leaves none; its bias would be written as the nearest that there is, which is 0, without a word.
    """
    from ai_edge_quantizer import algorithm_manager, qtyping
    from ai_edge_quantizer.algorithms.uniform_quantize import naive_min_max_quantize
    from ai_edge_quantizer.utils.tfl_flatbuffer_utils import get_op_scope

    twice = _told_apart(own)

    def materialize(plain: Any, *, op_info: Any, graph_info: Any, tensor_name_to_qsv: Mapping[str, Any], tensor_quant_params_cache: Any) -> Any:
        ranges = own.get(get_op_scope(op_info.op, graph_info.subgraph_tensors), {})
        statistics = {**tensor_name_to_qsv, **as_statistics(graph, ranges)}
        statistics.update(_roomy(op_info, graph_info, statistics))
        made = plain(op_info=op_info, graph_info=graph_info, tensor_name_to_qsv=statistics, tensor_quant_params_cache=tensor_quant_params_cache)
        for one in made:
            if one.producer is not None and one.tensor_name in twice:  # anything that readers do not have keeps the two apart
                marked = dataclasses.replace(one.producer.parameters, custom_algorithm_param={"written": True})
                one.producer = dataclasses.replace(one.producer, parameters=marked)
        return made

    key = algorithm_manager.AlgorithmName.MIN_MAX_UNIFORM_QUANT
    for kind in WEIGHTED.values():
        plain = algorithm_manager.get_quantization_func(key, qtyping.TFLOperationName(kind), qtyping.QuantizeMode.MATERIALIZE)
        algorithm_manager.register_quantized_op(key, qtyping.TFLOperationName(kind), naive_min_max_quantize.init_qsvs,
                                                calibration_func=naive_min_max_quantize.min_max_calibrate,
                                                materialize_func=functools.partial(materialize, plain))


def through_float(made: bytes) -> bytes:
    """A quantized file in which what goes from integers to other integers does it by way of float."""
    from ai_edge_litert.tools import flatbuffer_utils as tools

    model = tools.read_model_from_bytearray(bytearray(made))
    graph, codes = model.subgraphs[0], [tools.opcode_to_name(model, i) for i in range(len(model.operatorCodes))]
    integers, found = (tools.TensorType.INT8, tools.TensorType.INT16), []
    for operator in graph.operators:
        kind, ends = codes[operator.opcodeIndex], [graph.tensors[int(t[0])] for t in (operator.inputs, operator.outputs) if len(t)]
        if kind == "QUANTIZE" and all(end.type in integers for end in ends):
            between, back = copy.copy(ends[1]), copy.copy(operator)
            between.name, between.type, between.quantization, between.buffer = ends[1].name + b"_float", tools.TensorType.FLOAT32, None, 0
            graph.tensors.append(between)
            back.opcodeIndex, back.outputs = codes.index("DEQUANTIZE"), [len(graph.tensors) - 1]
            operator.inputs = back.outputs
            found.append(back)
        found.append(operator)
    graph.operators = found
    return bytes(tools.convert_object_to_bytearray(model))


def _told_apart(own: Mapping[str, Ranges]) -> set[str]:
    """Tensors that operators have different ranges for."""
    told: dict[str, set[tuple[float, ...]]] = {}
    for ranges in own.values():
        for name, ends in ranges.items():
            told.setdefault(name, set()).add(tuple(ends))
    return {name for name, different in told.items() if len(different) > 1}


def _roomy(op_info: Any, graph_info: Any, statistics: Mapping[str, Any]) -> dict[str, Any]:
    """Statistics of an operator's weight with larger ends where its bias would not fit; nothing where it does."""
    import numpy as np
    from ai_edge_quantizer.utils.tfl_flatbuffer_utils import get_tensor_data, get_tensor_name

    transposed = op_info.op_name == "CONV_2D_TRANSPOSE"
    config, places = op_info.op_quant_config, list(op_info.op.inputs)
    data, at = (2, 3) if transposed else (0, 2)
    if config.activation_tensor_config is None or len(places) <= at or places[at] < 0:
        return {}
    tensors = graph_info.subgraph_tensors
    weight, bias = (get_tensor_data(tensors[places[i]], graph_info.buffers) for i in (1, at))
    seen = statistics.get(get_tensor_name(tensors[places[data]]))
    if weight is None or bias is None or seen is None:
        return {}
    least, most = min(float(seen["min"].min()), 0.0), max(float(seen["max"].max()), 0.0)
    step = max((most - least) / (2**config.activation_tensor_config.num_bits - 1), 1e-12)
    axis = 3 if op_info.op_name == "DEPTHWISE_CONV_2D" else 0
    other = tuple(i for i in range(weight.ndim) if i != axis)
    low, high = weight.min(axis=other, keepdims=True), weight.max(axis=other, keepdims=True)
    room = (np.abs(bias) / (step * MOST) * 2.0 ** (config.weight_tensor_config.num_bits - 1)).reshape(low.shape)
    if not bool((room > np.maximum(-low, high)).any()):
        return {}
    ends = {"min": np.minimum(low, -room), "max": np.maximum(high, room)}
    if config.weight_tensor_config.granularity == "TENSORWISE":
        ends = {"min": ends["min"].min(keepdims=True), "max": ends["max"].max(keepdims=True)}
    return {get_tensor_name(tensors[places[1]]): {end: value.astype(np.float32) for end, value in ends.items()}}


class Samples:
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
