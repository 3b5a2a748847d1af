"""A component as a Core ML program: captured by torch.export, converted by coremltools, compressed by its optimisers.

Two of coremltools' translations are mended in the torch program before it sees it: `where` of two plain numbers, which it refuses at axes of varying
length, and GELU's tanh form, which it reads as the exact one without a word when the form is given by name (as torch.export gives it).

What overflows fp16 is found by running the fp32 program in our interpreter (`_mil.py`) on real inputs, by the rules of `_half.py`; so are the ranges
of activations for integer arithmetic, for which coremltools itself would need a Mac.
"""
from __future__ import annotations

import contextlib
import io
import json
import math
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.export import _mil
from edgekd.export._half import KEPT, LARGEST, MARGIN, MAX_ANGLE
from edgekd.export._mil import Interpreter, Op, Program, coremltools
from edgekd.export._program import program, quiet
from edgekd.export.onnx import content_key

from edgekd.errors import CannotTake, EdgekdError, UsageError, first_line
from edgekd.protocols import Component, package_version
from edgekd.tuning import PLAIN, Tuning, layer_name

if TYPE_CHECKING:
    import numpy as np
    import torch

Samples = Iterable[Mapping[str, "np.ndarray"]]

MOST = {"prompts": 64, "points": 16}
"""Largest length of an axis that may vary; Core ML allows none without bounds."""
COMPRESSED = ("conv", "conv_transpose", "linear", "matmul")
"""Operations whose weights are compressed: those that carry the arithmetic"""
INTEGER = ("conv", "linear")
"""Operations that Core ML can carry out on 8-bit integers"""
LEAST_WEIGHTS = 512
"""Tensors of fewer numbers are not compressed: they are biases, norms and tokens"""
PALETTES = {"w6_weight_only": 6, "w4_weight_only": 4}
KEPT_PROGRAMS = 2
GRANULARITY = "edgekd.granularity"
"""metadata key of a file: whether every output channel of an integer weight has a step of its own (`channel`)"""

DESCRIPTIONS = {
    "images": "photo, normalised, its long side fitted to the square, padded right and bottom with zeros",
    "image_embeddings": "what the encoder gives for the photo",
    "point_coords": "x, y of the points of every prompt, in the square that the photo was fitted to",
    "point_labels": "1 in the object, 0 not in it, 2 and 3 the corners of a box, -2 no point",
    "mask_input": "logits of an earlier mask, a quarter of the square wide",
    "has_mask": "1 where mask_input counts, 0 elsewhere",
    "masks": "logits of four masks a prompt; above 0 is the object",
    "iou": "predicted IoU of each mask",
}

_programs: OrderedDict[str, Any] = OrderedDict()


def build(component: Component, path: Path, scheme: str, samples: Samples, tuning: Tuning = PLAIN) -> None:
    """Write the component as a Core ML package at `path`, which must not exist. `samples` are looked at by all schemes but fp32.

    Raises:
        CannotTake: an output's size follows the value of an input.
        EdgekdError: it cannot be captured, converted or compressed, with the toolchain's reason.
    """
    ct = coremltools()
    whole = _convert(ct, component, ct.precision.FLOAT32)
    kept: dict[str, str] = {}
    if scheme != "fp32":
        single = _read(whole, path)
        overflows = overflowing(single, samples) | {value: "asked for" for value in _given_by(single, component, tuning, "fp32")}
        whole = _half(ct, component, overflows)
        half = _read(whole, path)
        if lost := [name for name in overflows if f"{name}_cast_fp16" in half.types]:  # what coremltools calls a value that it made fp16
            raise EdgekdError(f"operations that overflow fp16 cannot be kept in fp32: {', '.join(lost[:3])}", where=component.name, hint="use fp32")
        kept = by_layer(single, overflows, component)
        spared = _given_by(single, component, tuning, "fp16")
        whole = _compress(ct, whole, half, scheme, samples, component, tuning, {name for value in spared for name in (value, f"{value}_cast_fp16")})
    _describe(whole, component, scheme, kept, tuning)
    _save(whole, path)


def _read(model: Any, beside: Path) -> Program:
    """The program of a model that was not yet saved."""
    temporary = beside.with_name(f"{beside.stem}-float.mlpackage")
    _save(model, temporary)
    return Program.read(temporary)


def _save(model: Any, path: Path) -> None:
    import shutil

    shutil.rmtree(path, ignore_errors=True)
    with _silent():
        model.save(str(path))
    for extra in path.glob("*.json"):  # coremltools leaves a map for debuggers, which is no part of the package
        if extra.name != "Manifest.json":
            extra.unlink()


# --- torch -> Core ML ---------------------------------------------------------------------------------------------------


def captured(component: Component) -> torch.export.ExportedProgram:
    """The component's torch program, mended, with axes that vary up to `MOST`. The same content is captured once."""
    inner = {s for axes in component.dynamic.values() for axis, s in axes.items() if axis}
    if missing := inner - set(component.lengths):
        raise CannotTake(f"an output's size follows the value of an input, or its axes ({', '.join(sorted(missing))}) have no bounds", where=component.name,
                         hint="export it with --decoder-signature batched, or to a format that takes them, like onnx")
    key = content_key(component) + repr(sorted(longest(component).items()))
    if key not in _programs:
        _programs[key] = mended(program(component, longest=longest(component) or None))
        while len(_programs) > KEPT_PROGRAMS:
            _programs.popitem(last=False)
    return _programs[key]


def longest(component: Component) -> dict[str, int]:
    """Symbol -> the largest length that its axis may have."""
    symbols = {s for axes in component.dynamic.values() for s in axes.values()}
    return {s: max(MOST.get(s, 64), component.lengths.get(s, 0)) for s in sorted(symbols)}


def mended(found: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program in terms that coremltools translates rightly; changed in place."""
    import torch

    aten = torch.ops.aten
    graph = found.graph_module.graph
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is aten.gelu.default and "tanh" in (*node.args[1:], *node.kwargs.values()):
            x = node.args[0]  # written out as coremltools' own pass recognises it
            steps = [(aten.pow.Tensor_Scalar, x, 3.0), (aten.mul.Tensor, None, 0.044715), (aten.add.Tensor, x, None), (aten.mul.Tensor, None, 0.79788456),
                     (aten.tanh.default, None), (aten.add.Tensor, None, 1.0), (aten.mul.Tensor, None, 0.5), (aten.mul.Tensor, x, None)]
            _replace(found, node, steps, node.meta["val"])
        elif node.target is aten.where.Scalar:
            condition, yes, no = node.args
            scaled = [(aten.mul.Tensor, None, float(yes) - float(no)), (aten.add.Tensor, None, float(no))]
            with graph.inserting_before(node):
                chosen = graph.call_function(aten._to_copy.default, (condition,), {"dtype": torch.float32})
            chosen.meta["val"] = node.meta["val"].float()
            _replace(found, node, scaled, chosen.meta["val"], chosen)
    found.graph_module.recompile()
    return found


def _replace(found: torch.export.ExportedProgram, node: torch.fx.Node, steps: list[tuple[Any, ...]], like: torch.Tensor, last: Any = None) -> None:
    """Put a chain of operations in the place of one; None among their arguments is what the step before gave."""
    graph = found.graph_module.graph
    with graph.inserting_before(node):
        for target, *arguments in steps:
            last = graph.call_function(target, tuple(last if a is None else a for a in arguments))
            last.meta["val"] = like
    node.replace_all_uses_with(last)
    found.graph_signature.replace_all_uses(node.name, last.name)
    graph.erase_node(node)


def _convert(ct: Any, component: Component, precision: Any) -> Any:
    """The component as a Core ML model in memory, inputs and outputs named as the component's."""
    source, most = captured(component), longest(component)
    axes = {symbol: ct.RangeDim(1, length, default=1) for symbol, length in most.items()}
    inputs = [ct.TensorType(name=name, dtype=_interface(t), shape=[axes.get(component.dynamic.get(name, {}).get(i, ""), n) for i, n in enumerate(t.shape)])
              for name, t in component.example.items()]
    outputs = [ct.TensorType(name=name, dtype=_interface(t)) for name, t in results(component).items()]
    try:
        with _silent():
            return ct.convert(source, inputs=inputs, outputs=outputs, convert_to="mlprogram", minimum_deployment_target=ct.target.iOS17,
                              compute_precision=precision, skip_model_load=True)
    except Exception as e:  # coremltools raises ValueError, NotImplementedError, RuntimeError and AssertionError
        raise EdgekdError(f"coremltools cannot convert the component: {first_line(e)}", where=component.name, hint="export it to another format") from e


def results(component: Component) -> dict[str, torch.Tensor]:
    """What the component gives for its example, by name."""
    import torch

    with torch.no_grad():
        given = component.module(*component.example.values())
    return dict(zip(component.outputs, given if isinstance(given, tuple) else (given,), strict=True))


def _interface(tensor: torch.Tensor) -> Any:
    """What Core ML takes and gives in the place of a tensor: fp32, or int32 for whole numbers and truth values."""
    import numpy as np

    return np.float32 if tensor.is_floating_point() else np.int32


def _half(ct: Any, component: Component, kept: Mapping[str, str]) -> Any:
    """The component in fp16 but for the operations that give the values `kept`."""
    return _convert(ct, component, ct.transform.FP16ComputePrecision(op_selector=lambda op: not {v.name for v in op.outputs} & set(kept)))


def overflowing(source: Program, samples: Samples) -> dict[str, str]:
    """Value of the fp32 program -> why what gives it must stay in fp32, from running `samples` (input name -> array).

    Raises:
        EdgekdError: there were no samples, or an operation has no meaning in the interpreter.
    """
    interpreter = Interpreter(source)
    peaks: dict[str, tuple[float, float, Op]] = {}
    for sample in samples:
        for op, peak, squares in _mil.magnitudes(interpreter, sample):
            name = op.outputs[0].name
            before = peaks.get(name, (0.0, 0.0, op))
            peaks[name] = (max(before[0], peak), max(before[1], squares), op)
    if not peaks:
        raise EdgekdError("16-bit arithmetic needs inputs to find what overflows on, and none were given", hint="give a folder of images with --data")
    found = {}
    for name, (peak, squares, op) in peaks.items():
        if source.types[name].dtype != "fp32":
            continue
        if not peak <= LARGEST * MARGIN:
            found[name] = f"{op.kind} reaches {peak:.3g}"
        elif not squares <= LARGEST * MARGIN:
            found[name] = f"{op.kind} sums squares to {squares:.3g}"
    for name in _angles(source, {n for n, (peak, _, op) in peaks.items() if op.kind in ("sin", "cos") and peak > MAX_ANGLE}):
        found.setdefault(name, "angles of a position code")
    return {v.name: why for name, why in found.items() for v in source.made[name].outputs}


def _angles(source: Program, waves: set[str]) -> list[str]:
    """Values of large angles with everything in fp32 that they are computed from."""
    queue, found = list(waves), set()
    while queue:
        name = queue.pop()
        op = source.made.get(name)
        if op is None or name in found or op.kind == "const" or source.types[name].dtype != "fp32":
            continue
        found.add(name)
        queue += [n for names in op.inputs.values() for n in names if isinstance(n, str)]
    return sorted(found)


def _given_by(source: Program, component: Component, tuning: Tuning, kept: str) -> list[str]:
    """The values of a program that the layers give which `tuning` keeps in the float type `kept`.

    Raises:
        UsageError: a layer has no operation of its own in the program.
    """
    found = []
    for path, module in component.module.named_modules():
        if tuning.keep.get(layer_name(path)) != kept or not hasattr(module, "weight"):
            continue
        weight = f"p_{path.replace('.', '_')}_weight"
        values = [v.name for op in source.ops if op.kind in COMPRESSED and weight in (op.reads(key) for key in ("weight", "x", "y")) for v in op.outputs]
        if not values:
            raise UsageError("coremltools joins this layer with others, so that it cannot be kept alone", where=f"{component.name}.{layer_name(path)}",
                             hint=f"leave it out, or keep all of the {component.name}: {{{component.name}: fp16}}")
        found += values
    return found


def by_layer(source: Program, kept: Mapping[str, str], component: Component) -> dict[str, str]:
    """Layer (as the state dict has it; an operation's name where it has no weights) -> why."""
    spelled = {f"p_{name.replace('.', '_')}": name for name, _ in component.module.named_parameters()}
    found: dict[str, str] = {}
    for name, why in sorted(kept.items()):
        weights = [spelled[n] for names in source.made[name].inputs.values() for n in names if isinstance(n, str) and n in spelled]
        found.setdefault(weights[0].rpartition(".")[0].removeprefix("model.") if weights else name, why)
    return found


# --- compression ------------------------------------------------------------------------------------------------------


def _compress(ct: Any, model: Any, half: Program, scheme: str, samples: Samples, component: Component, tuning: Tuning, spared: set[str]) -> Any:
    """The fp16 model, whose program is `half`, with integer weights, and integer activations where the scheme says so; but for what gives the values
    `spared`."""
    if scheme == "fp16":
        return model
    cto, heavy = ct.optimize.coreml, _heavy(half, spared)
    if spared and not heavy:
        raise EdgekdError(f"{scheme} compresses nothing: no layer with {LEAST_WEIGHTS} weights is left to it", where=component.name, hint="use fp16")
    try:
        with _silent():
            if scheme in PALETTES:
                palette = cto.OpPalettizerConfig(mode="kmeans", nbits=PALETTES[scheme], weight_threshold=LEAST_WEIGHTS)
                return cto.palettize_weights(model, cto.OptimizationConfig(op_name_configs=dict.fromkeys(heavy, palette)))
            linear = cto.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8", granularity=f"per_{tuning.granularity}", weight_threshold=LEAST_WEIGHTS)
            if scheme == "w8a8_static":
                model = _quantize_activations(model, half, samples, cto, tuning, spared)
            return cto.linear_quantize_weights(model, cto.OptimizationConfig(op_name_configs=dict.fromkeys(heavy, linear)))
    except EdgekdError:
        raise
    except Exception as e:  # ValueError, AssertionError, ModuleNotFoundError of scikit-learn
        raise EdgekdError(f"coremltools cannot compress the component: {first_line(e)}", where=component.name, hint="use fp16") from e


def _heavy(half: Program, spared: set[str]) -> list[str]:
    """Names of the constants worth compressing: weights of the arithmetic that is done in fp16. By name, because equal constants are kept once, and
    what a layer adds may be what a norm does."""
    halves = [op for op in half.ops if op.kind in COMPRESSED and half.precision(op) == "fp16"]
    read, whole = ({name for op in halves if (op.outputs[0].name in spared) is kept for key in ("weight", "x", "y") if (name := op.reads(key)) in half.made}
                   for kept in (False, True))
    found = [half.made[str(name)] for name in read - whole]
    return sorted({op.name for op in found if op.kind == "const" and math.prod(n or 0 for n in op.outputs[0].shape) >= LEAST_WEIGHTS})


def _quantize_activations(model: Any, half: Program, samples: Samples, cto: Any, tuning: Tuning, spared: set[str]) -> Any:
    """The model with 8-bit integers before every convolution and linear layer whose length does not vary beyond its batch axis: prompt tokens
    break at 8 bits and cost nothing. coremltools inserts them; the ranges, for which it would run the model on a Mac, are our interpreter's."""
    from coremltools.converters.mil.frontend.milproto import load
    from coremltools.converters.mil.mil.passes.graph_pass import PassOption
    from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY
    from coremltools.models import utils

    chosen = [op for op in half.ops if op.kind in INTEGER and half.precision(op) == "fp16" and _weighs(half, op) >= LEAST_WEIGHTS
              and None not in half.types[str(op.reads("x"))].shape[1:] and op.outputs[0].name not in spared]
    if not chosen:
        raise EdgekdError(f"there is nothing to quantize: no operation with {LEAST_WEIGHTS} weights works on fixed lengths", hint="use fp16")
    mode = "linear" if tuning.symmetric is False else "linear_symmetric"
    config = cto.OptimizationConfig(op_name_configs={op.name: cto.OpLinearQuantizerConfig(mode=mode, dtype="int8") for op in chosen})
    step = PASS_REGISTRY["compression::insert_prefix_quantize_dequantize_pair"]
    step.set_options([PassOption("config", config), PassOption("activation_stats", ranges(half, [str(op.reads("x")) for op in chosen], samples))])
    return utils._apply_graph_pass(model, [step, PASS_REGISTRY["common::dequantize_quantize_pair_elimination"]], spec_version=model.get_spec().specificationVersion,
                                   pymil_load_func=load.load, skip_model_load=True)


def _weighs(source: Program, op: Op) -> int:
    """How many numbers the weights of a convolution or linear layer have."""
    return math.prod(n or 0 for n in source.types[str(op.reads("weight"))].shape)


def ranges(source: Program, names: Iterable[str], samples: Samples) -> dict[str, dict[str, float]]:
    """Value name -> its least and largest over all samples, as coremltools takes them."""
    interpreter, wanted = Interpreter(source), set(names)
    found: dict[str, dict[str, float]] = {}

    def note(name: str, tensor: Any) -> None:
        low, high = float(tensor.min()), float(tensor.max())
        before = found.setdefault(name, {"rmin": low, "rmax": high})
        found[name] = {"rmin": min(before["rmin"], low), "rmax": max(before["rmax"], high)}

    def watch(op: Op, read: list[Any], wrote: list[Any]) -> None:
        for value, tensor in zip(op.outputs, wrote, strict=True):
            if value.name in wanted:
                note(value.name, tensor)

    for sample in samples:
        for name in wanted & set(source.inputs):
            note(name, sample[name])
        interpreter.execute(sample, watch)
    if missing := wanted - set(found):
        raise EdgekdError(f"no calibration input reaches {', '.join(sorted(missing)[:3])}", hint="give a folder of images with --data")
    return found


# --- what the file says of itself ---------------------------------------------------------------------------------------


def _describe(model: Any, component: Component, scheme: str, kept: Mapping[str, str], tuning: Tuning) -> None:
    """Metadata that Xcode and a Mac's `mdls` show."""
    version = package_version("edgekd") or "unknown"
    model.author, model.version = f"exported by edgekd {version}", version
    model.license = "that of the weights it was exported from"
    model.short_description = f"{component.name} of a model exported by edgekd, {scheme}"
    facts = {"edgekd.component": component.name, "edgekd.scheme": scheme, "edgekd.lengths": json.dumps(longest(component)),
             "edgekd.padding": json.dumps(dict(component.padding)), GRANULARITY: tuning.granularity}
    for key, value in (facts | ({KEPT: json.dumps(dict(kept))} if kept else {})).items():
        model.user_defined_metadata[key] = value
    for name in component.example:
        model.input_description[name] = DESCRIPTIONS.get(name, name)
    for name in component.outputs:
        model.output_description[name] = DESCRIPTIONS.get(name, name)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """No progress bars and advice; failures still raise."""
    with quiet(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
