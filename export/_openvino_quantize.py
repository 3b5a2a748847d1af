"""Post-training int8 of an OpenVINO model by NNCF: its settings from a `Tuning`, and one quantization for many choices of layers to keep in float.

    activations   ranges a tensor, asymmetric where they have both signs; `symmetric` for NNCF's PERFORMANCE preset
    minmax        the mean over calibration inputs of their extremes, NNCF's own rule: outliers of single photos weigh little
    percentile    the widest over calibration inputs of their middle 99.99 %
    mse           the cut of the histogram over all inputs with the least squared error (NNCF's HISTOGRAM)
    equalized     SmoothQuant on convolutions too; NNCF always uses it on matrix products of transformers
    corrected     bias correction layer after layer on quantized inputs; NNCF's fast form, each layer on its own, is the default

Only arithmetic is quantized (NNCF's TRANSFORMER scheme, for every model): at 8 bits the sums and normalisations in between cost accuracy and bring no
time. Depthwise convolutions stay in float: one range for all channels of what they read ruins them, and they are a few percent of the arithmetic.
"""
from __future__ import annotations

import contextlib
import io
import logging
import os
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgekd.export._openvino_layers import bias_of, by_name, openvino, operators, read
from edgekd.export._openvino_light import lighten
from edgekd.export._ranges import Checked, key_of

from edgekd.errors import EdgekdError, first_line
from edgekd.tuning import PLAIN, Tuning

OUTSIDE = 5e-5
"""share of an activation's values beyond each end of its range, by `percentile`"""
SMOOTHING = 0.95
TOKENS = 64
"""rows below which a matrix of a graph with fixed lengths is taken for prompt tokens; the image has 256 and more"""
MOVES = {"Reshape", "Transpose", "Squeeze", "Unsqueeze"}
KEPT_MODELS = 4

_quantized: OrderedDict[tuple[str, str], Any] = OrderedDict()


@dataclass(frozen=True)
class Job:
    """What is quantized: an ONNX file, what errors call it, what it is shown, how, whether activations whose length varies are quantized too, and
    whether lengths that would vary are fixed in it."""

    source: Path
    where: str
    calibration: Any
    tuning: Tuning = PLAIN
    varying: bool = False
    fixed: bool = False


def quantize(job: Job) -> tuple[Any, dict[str, list[str]]]:
    """The quantized model, and layer -> friendly names of its operators.

    Variants that differ in `tuning.keep` alone share one quantization where calibration inputs say what they are (`fingerprint()`), and are what a
    quantization of their own gives, but for one thing: where the first layer is kept, NNCF would halve the levels of the one behind it instead (its way
    not to overflow on CPUs without VNNI), and a variant does not.

    Raises:
        UsageError: calibration inputs are none, not finite or constant.
        EdgekdError: NNCF cannot quantize it, or its activations are not finite.
    """
    model = read(job.source, job.where, folded=not job.tuning.naive)
    layers = {} if job.varying else operators(model, job.source)
    kept = {name for layer, names in layers.items() if layer in job.tuning.keep for name in names}
    plain = replace(job, tuning=replace(job.tuning, keep={}, rest="fp32"))
    content = key_of(job.source, job.calibration)
    if content is None or job.tuning.corrected or job.tuning.naive:  # accurate bias correction of a layer looks at all before it
        return _compressed(_by_nncf(model, job, kept), kept, job), layers
    key = (f"{content}{job.varying}", repr(plain.tuning))
    if key not in _quantized:
        _quantized[key] = _by_nncf(read(job.source, job.where, folded=True), plain, set())
        while len(_quantized) > KEPT_MODELS:
            _quantized.popitem(last=False)
    _quantized.move_to_end(key)
    found = reverted(_quantized[key], model, kept)
    return _compressed(_by_nncf(model, job, kept) if found is None else found, kept, job), layers


def _by_nncf(model: Any, job: Job, kept: set[str]) -> Any:
    """The model with quantizers, its weights still float."""
    count = sum(1 for _ in Checked(job.calibration, job.where))
    _finite(model, job)
    with quiet():
        import nncf

        try:
            found = nncf.quantize(model, nncf.Dataset(job.calibration), **settings(model, job, kept, count))
        except EdgekdError:
            raise
        except Exception as e:  # nncf raises its own kinds and openvino's RuntimeError
            raise EdgekdError(f"NNCF cannot quantize the component: {first_line(e)}", where=job.where, hint="use fp32 or bf16") from e
    _finite_ranges(found, job.where)
    return found


def settings(model: Any, job: Job, kept: set[str], count: int) -> dict[str, Any]:
    """NNCF's arguments, beside the model and the data: `kept` are friendly names, `count` the calibration inputs."""
    import nncf
    from nncf.quantization import advanced_parameters as advanced

    tuning = job.tuning
    unpacked = {"compress_weights": False}
    if tuning.naive:
        return {"advanced_parameters": advanced.AdvancedQuantizationParameters(backend_params=unpacked)}
    ignored = sorted(kept | {op.get_friendly_name() for op in model.get_ordered_ops() if _is_depthwise(op) or (not job.varying and _is_of_tokens(op, job.fixed))})
    parameters: dict[str, Any] = {"backend_params": unpacked, "disable_bias_correction": tuning.corrected is False}
    if tuning.granularity == "tensor":
        parameters["weights_quantization_params"] = advanced.QuantizationParameters(per_channel=False)
    if tuning.equalized:
        parameters["smooth_quant_alphas"] = advanced.AdvancedSmoothQuantParameters(convolution=SMOOTHING, matmul=SMOOTHING)
    if tuning.method != "minmax":
        parameters["activations_range_estimator_params"] = _ranges(tuning.method)
    preset = nncf.QuantizationPreset.PERFORMANCE if tuning.symmetric else nncf.QuantizationPreset.MIXED
    return {"subset_size": count, "fast_bias_correction": not tuning.corrected, "preset": preset, "target_device": nncf.TargetDevice.CPU,
            "model_type": nncf.ModelType.TRANSFORMER, "ignored_scope": nncf.IgnoredScope(names=ignored) if ignored else None,
            "advanced_parameters": advanced.AdvancedQuantizationParameters(**parameters)}


def _ranges(method: str) -> Any:
    """NNCF's way to a range of activations."""
    from nncf.quantization import range_estimator as nncf_ranges

    if method == "mse":
        return nncf_ranges.RangeEstimatorParametersSet.HISTOGRAM
    low, high = (nncf_ranges.StatisticsCollectorParameters(nncf_ranges.StatisticsType.QUANTILE, kind, quantile_outlier_prob=OUTSIDE)
                 for kind in (nncf_ranges.AggregatorType.MIN, nncf_ranges.AggregatorType.MAX))
    return nncf_ranges.RangeEstimatorParameters(min=low, max=high)


def _is_depthwise(op: Any) -> bool:
    return op.get_type_name() == "GroupConvolution" and op.input(1).get_partial_shape()[2] == 1


def _is_of_tokens(op: Any, fixed: bool) -> bool:
    """Whether an operator works on prompt tokens, which break at 8 bits and cost nothing: their number varies, or is fixed and small."""
    if op.get_type_name() not in ("MatMul", "Convolution"):
        return False
    shape = op.input(0).get_partial_shape()
    if fixed and shape.is_static:
        return op.get_type_name() == "MatMul" and shape[len(shape) - 2].get_length() < TOKENS
    return shape.rank.is_static and any(shape[i].is_dynamic for i in range(1, len(shape)))


def reverted(quantized: Any, original: Any, names: set[str]) -> Any | None:
    """A copy of a quantized model in which the named operators compute on float inputs and weights, with the bias of the original; None where an
    operator's quantizer cannot be told from its neighbours'."""
    model, before = quantized.clone(), by_name(original)
    known = by_name(model)
    for name in names:
        op = known[name]
        for port in op.inputs():
            through = _behind_quantizer(port.get_source_output())
            if through is None:
                return None
            port.replace_source_output(through)
        bias, old = bias_of(op), bias_of(before[name])
        if bias is not None and old is not None:
            for port, was in zip(bias.inputs(), old.inputs(), strict=True):
                if was.get_source_output().get_node().get_type_name() == "Constant":
                    port.replace_source_output(was.get_source_output())
    model.validate_nodes_and_infer_types()
    return model


def _behind_quantizer(output: Any) -> Any | None:
    """The same value before it was quantized: the quantizer that made it is passed by, also when its result was only moved. None: it has several sources."""
    node, moves = output.get_node(), []
    while node.get_type_name() in MOVES:
        moves.append(node)
        node = node.input_value(0).get_node()
    if node.get_type_name() != "FakeQuantize":
        return None if node.get_type_name() in ("Concat", "Split", "VariadicSplit", "Slice", "Gather", "StridedSlice", "Pad", "MaxPool") else output
    from openvino.utils.node_factory import NodeFactory

    value = node.input_value(0)
    for move in reversed(moves):
        rest = [move.input_value(i) for i in range(1, move.get_input_size())]
        value = NodeFactory("opset1").create(move.get_type_name(), [value, *rest], move.get_attributes()).output(0)
    return value


def _compressed(model: Any, kept: set[str], job: Job) -> Any:
    """The model with its weights in 8 bits: those that are quantized, and those of what stays in float unasked."""
    from openvino._offline_transformations import compress_quantize_weights_transformation

    compress_quantize_weights_transformation(model)
    if not job.tuning.naive:
        lighten(model, kept)
    return model


def _finite(model: Any, job: Job) -> None:
    """Run the float model on the first input. Raises EdgekdError when what it gives is not finite."""
    import numpy as np

    compiled = openvino().Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    sample = next(iter(job.calibration))
    for name, value in compiled({i.any_name: sample[i.any_name] for i in compiled.inputs}).to_dict().items():
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise EdgekdError(f"the float model gives NaN or infinity for the first calibration input, in '{name.any_name}'", where=job.where,
                              hint="look at its weights and at that input; there is nothing to quantize yet")


def _finite_ranges(model: Any, where: str) -> None:
    """Raises EdgekdError when a quantizer's range is not finite."""
    import numpy as np

    for op in model.get_ordered_ops():
        if op.get_type_name() == "FakeQuantize":
            ends = [op.input_value(i).get_node() for i in range(1, 5)]
            if not all(np.isfinite(e.get_data()).all() for e in ends if e.get_type_name() == "Constant"):
                raise EdgekdError(f"activations are not finite on calibration inputs, at {op.get_friendly_name()}", where=where,
                                  hint="the float model computes NaN or infinity already; look at its weights and at the inputs")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence NNCF: its advice, its progress bars (they go to stdout, which is ours for data) and its telemetry. Failures still raise."""
    os.environ.setdefault("NNCF_CI", "1")  # read when nncf is imported: no telemetry
    logger = logging.getLogger("nncf")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(before)
