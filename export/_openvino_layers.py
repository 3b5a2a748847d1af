"""A component's layers in an OpenVINO model: which operators they are, and the float type that each is executed in.

The model is read from the ONNX graph of `export/onnx.py`, whose nodes say which module they came from. OpenVINO calls an operator as the node, or
`NAME/WithoutBiases` where the node had a bias. A transposed convolution with a bias gets a name that changes from reading to reading: it is called as
the others are.
"""
from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from edgekd.export._half import layers_of

from edgekd.errors import EdgekdError, first_line

OPERATORS = {"Convolution", "GroupConvolution", "MatMul", "ConvolutionBackpropData", "GroupConvolutionBackpropData"}
NODES = {"Conv", "ConvTranspose", "MatMul", "Gemm"}
PRECISE = "precise_0"
"""OpenVINO's mark of what 16-bit execution and compression leave alone"""
FLOATS = {"fp32": "f32", "bf16": "bf16"}
FOLLOWS = {"Add", "Relu", "Multiply", "Clamp"}
"""what the CPU plugin computes inside of the kernel before it"""
FIX = 'pip install "edgekd[openvino]"'


def openvino() -> Any:
    """The package. Raises EdgekdError where it is not installed."""
    try:
        import openvino
    except ImportError as e:
        raise EdgekdError("openvino is not installed", hint=FIX) from e
    return openvino


def said(error: RuntimeError) -> str:
    """The first line that says something: those before it are places in OpenVINO's source."""
    told = [line for line in str(error).splitlines() if line.strip() and not line.startswith("Exception from ")]
    return first_line(RuntimeError(told[0])) if told else first_line(error)


def read(file: Path, where: str, *, folded: bool = False) -> Any:
    """The model in a file. `folded`: what follows from constants is computed: otherwise a group convolution's weights and every bias hang on sums over
    shapes, and NNCF neither quantizes the one nor corrects the other.

    Raises:
        EdgekdError: OpenVINO cannot read it.
    """
    try:
        model = openvino().Core().read_model(str(file))
    except RuntimeError as e:
        raise EdgekdError(f"OpenVINO cannot read the component: {said(e)}", where=where) from e
    for op in model.get_ordered_ops():
        if "Backprop" in op.get_type_name() and op.get_friendly_name().startswith(op.get_type_name()) and (bias := bias_of(op)) is not None:
            op.set_friendly_name(f"{bias.get_friendly_name()}/WithoutBiases")
    if folded:
        from openvino.passes import ConstantFolding, Manager

        manager = Manager()
        manager.register_pass(ConstantFolding())
        manager.run_passes(model)
    return model


def operators(model: Any, source: Path) -> dict[str, list[str]]:
    """Layer -> friendly names of its operators with weights, of a model that was read from the ONNX file `source`."""
    import onnx

    graph = onnx.load(source, load_external_data=False).graph
    layers = {n.name: layers_of(n) for n in graph.node if n.op_type in NODES}
    found: dict[str, list[str]] = {}
    for op in model.get_ordered_ops():
        if op.get_type_name() in OPERATORS:
            for layer in layers.get(_node(op), ()):
                found.setdefault(layer, []).append(op.get_friendly_name())
    return found


def by_name(model: Any) -> dict[str, Any]:
    """Friendly name -> operator."""
    return {op.get_friendly_name(): op for op in model.get_ordered_ops()}


def readers(op: Any) -> list[Any]:
    """What reads an operator's output."""
    return [target.get_node() for output in op.outputs() for target in output.get_target_inputs()]


def bias_of(op: Any) -> Any | None:
    """The sum that adds a layer's bias, or None."""
    for reader in readers(op):
        if reader.get_type_name() == "Add" and any(i.get_source_output().get_node().get_type_name() == "Constant" for i in reader.inputs()):
            return reader
    return None


def marked(model: Any, ops: Iterable[Any], folder: Path) -> Any:
    """The model with operators marked, so that neither their weights nor their execution becomes 16-bit.

    A mark set from Python is text; read back from a file it is the attribute that OpenVINO's own passes look for.
    """
    for op in ops:
        for each in (op, *(i.get_source_output().get_node() for i in op.inputs())):
            if each is op or each.get_type_name() == "Constant":
                each.get_rt_info()[PRECISE] = ""
    file = folder / "marked.xml"
    openvino().save_model(model, str(file), compress_to_fp16=False)
    return openvino().Core().read_model(str(file))


def in_float_types(model: Any, kept: dict[str, str], rest: str, folder: Path) -> Any:
    """The model marked so that, under the bf16 hint, each operator of `kept` (friendly name -> fp32 or bf16) is executed in that type and what is not
    integer in `rest`.

    Raises:
        EdgekdError: OpenVINO does not execute it so.
    """
    other = [name for name, kind in kept.items() if kind != rest]
    if not other:
        return model
    known = by_name(model)
    own = {op.get_friendly_name() for name in other for op in _fused(known[name])}
    ops = [op for name, op in known.items() if (name in own) == (rest == "bf16") and op.get_type_name() not in ("Parameter", "Constant", "Result", "FakeQuantize")
           and not (op.get_type_name() in OPERATORS and _is_quantized(op))]
    model = marked(model, ops, folder)
    _check(model, {name: FLOATS[kept[name]] for name in other})
    return model


def executed(compiled: Any) -> dict[str, tuple[str, str]]:
    """Friendly name -> (kind, precision) of what a compiled model executes; a kernel counts for each operator that was fused into it."""
    found: dict[str, tuple[str, str]] = {}
    for op in compiled.get_runtime_model().get_ordered_ops():
        info = op.get_rt_info()
        kind, precision, names = (str(info[k].astype(str)) if k in info else "" for k in ("layerType", "runtimePrecision", "originalLayersNames"))
        if kind != "Reorder":  # of a layer's input, under the layer's name
            found |= {name: (kind, precision) for name in names.split(",") if name}
    return found


def _check(model: Any, wanted: dict[str, str]) -> None:
    """That a marked model is executed as it is marked. Raises EdgekdError."""
    hint = "keep those layers in the type of the rest"
    try:
        compiled = openvino().Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    except RuntimeError as e:
        raise EdgekdError(f"OpenVINO cannot mix these layers' fp32 and bf16: {said(e)}", hint=hint) from e
    found = executed(compiled)
    wrong = [f"{name} in {found[name][1]}" for name, precision in wanted.items() if name in found and found[name][1] != precision]
    if wrong:
        raise EdgekdError(f"OpenVINO does not execute layers in the float type asked for: {', '.join(wrong[:3])}", hint=hint)


def _fused(op: Any) -> list[Any]:
    """An operator and the sums and activations behind it: a residual sum is computed in the kernel before it, in one type with it."""
    found = [op]
    for each in found:
        if each.get_type_name() == "Add" or each is op:
            found += [r for r in readers(each) if r.get_type_name() in FOLLOWS and r not in found]
    return found


def _is_quantized(op: Any) -> bool:
    return any(i.get_source_output().get_node().get_type_name() == "FakeQuantize" for i in op.inputs())


def _node(op: Any) -> str:
    """The name of the ONNX node an operator was made of."""
    return str(op.get_friendly_name()).split("/")[0]
