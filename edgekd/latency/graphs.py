"""A model file as its runtime executes it: the operators that are left after fusion and layout changes, with every shape.

Nothing is run. onnxruntime is asked for the graph it optimised for this CPU, OpenVINO for its runtime model: what is predicted is what will run,
not what was exported. A file for a runtime that is not here is read as it was exported, constants folded (`plain`), which is good enough for a roofline.
"""
from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.errors import EdgekdError, first_line, unknown
from edgekd.latency.operators import Operator
from edgekd.latency.shapes import Shapes

if TYPE_CHECKING:
    import onnx

RUNTIMES = {"onnx": "onnxruntime", "openvino": "openvino"}
"""format -> the runtime whose executed graph can be read"""
KEPT = ("group", "strides", "kernel_shape", "perm", "transA", "transB", "axis", "axes", "keepdims", "channels_last", "dilations", "mode")
HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
CONSTANT = ("Const", "Constant")


def executed(path: Path, format: str, *, scheme: str = "fp32", lengths: Mapping[str, int] | None = None,
             shapes: Mapping[str, Sequence[int]] | None = None) -> list[Operator]:
    """The operators of a model file, in an order in which they can be executed.

    Args:
        lengths: symbol of an axis of any length -> the length it is predicted at; 1 where it is not said.
        shapes: input -> its whole shape, for files that keep no symbols (OpenVINO's).

    Raises:
        UsageError: the executed graph of this format cannot be read.
        EdgekdError: the runtime is missing, or refuses the file.
    """
    if format not in RUNTIMES:
        raise unknown("format with a readable graph", format, RUNTIMES)
    try:
        return onnx_operators(optimised(path, lengths or {})) if format == "onnx" else openvino_operators(compiled(path, scheme, lengths or {}, shapes or {}))
    except ImportError as e:
        raise EdgekdError(f"the runtime of '{format}' is missing here: {first_line(e)}", where=path,
                          hint="pip install edgekd" if format == "onnx" else 'pip install "edgekd[openvino]"') from e
    except Exception as e:  # runtimes and protobuf share no kind of error
        raise EdgekdError(f"{RUNTIMES[format]} cannot open the file: {first_line(e)}", where=path, hint="export the model again") from e


def plain(path: Path, lengths: Mapping[str, int] | None = None) -> list[Operator]:
    """The operators of an ONNX file with nothing but its constants folded, for devices whose own graph cannot be read here.

    Raises:
        EdgekdError: onnxruntime cannot open the file.
    """
    try:
        return onnx_operators(optimised(path, lengths or {}, plainly=True))
    except Exception as e:  # runtimes and protobuf share no kind of error
        raise EdgekdError(f"the file cannot be read as ONNX: {first_line(e)}", where=path, hint="export the model again") from e


# --- onnxruntime


def session_options(threads: int | None = None, lengths: Mapping[str, int] | None = None) -> Any:
    """Those of `edgekd.export.onnx`'s session; axes of any length are fixed at `lengths`."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads, options.inter_op_num_threads = threads or 0, 1
    for symbol, length in (lengths or {}).items():
        options.add_free_dimension_override_by_name(symbol, length)
    return options


def optimised(path: Path, lengths: Mapping[str, int], *, plainly: bool = False) -> onnx.ModelProto:
    """The graph that onnxruntime executes on this CPU, or `plainly` one that any device could, without its large weights."""
    import onnx
    import onnxruntime as ort

    skeleton = onnx.load(path, load_external_data=False)
    symbols = {d.dim_param for v in skeleton.graph.input for d in v.type.tensor_type.shape.dim if d.dim_param}
    options = session_options(1, {s: lengths.get(s, 1) for s in symbols})
    if plainly:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
        file = Path(folder) / "optimised.onnx"
        options.optimized_model_filepath = str(file)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{file.name}.data")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return onnx.load(file, load_external_data=False)


def onnx_operators(model: onnx.ModelProto) -> list[Operator]:
    """Of any ONNX graph whose input shapes are fixed."""
    shapes, graph = Shapes(model), model.graph
    constant = {t.name for t in graph.initializer}
    found = []
    for node in graph.node:
        written = shapes.after(node)
        read = [name for name in node.input if name]
        if node.op_type == "Constant" or (read and all(name in constant for name in read)):
            constant |= set(node.output)
            continue
        attributes = {a.name: a for a in node.attribute}
        facts = {name: _value(attributes[name]) for name in KEPT if name in attributes}
        activation = attributes["activation"].s.decode() if "activation" in attributes else ""
        inputs, sums = [n for n in read if n not in constant], len(read) - 3 if node.op_type in ("Conv", "FusedConv") else 0
        found.append(Operator(
            op=node.op_type, kernel="nchwc" if node.domain.endswith("nchwc") else "", name=node.name, type=shapes.type_of(node),
            inputs=tuple(shapes.of(n) for n in inputs), weights=tuple(shapes.of(n) for n in read if n in constant and node.op_type != "Reshape"),
            outputs=tuple(written), facts=facts, fused=tuple([*([activation] if activation else []), *(["Sum"] if sums > 0 else [])])))
    return found


def _value(attribute: Any) -> Any:
    import onnx

    value = onnx.helper.get_attribute_value(attribute)
    return value.decode() if isinstance(value, bytes) else list(value) if isinstance(value, (list, tuple)) or hasattr(value, "__len__") else value


# --- OpenVINO


def compiled(path: Path, scheme: str, lengths: Mapping[str, int], shapes: Mapping[str, Sequence[int]] | None = None, threads: int = 1, **config: Any) -> Any:
    """A file compiled as `edgekd.export.openvino` compiles it, with its axes of any length fixed, and the kinds of its operators by name.
    -> (compiled model, kinds)"""
    import openvino

    core = openvino.Core()
    model = core.read_model(str(path))
    if any(port.get_partial_shape().is_dynamic for port in model.inputs):
        named = {**(_shapes_of(path, lengths) if path.suffix == ".onnx" else {}), **(shapes or {})}
        model.reshape({port.any_name: list(named.get(port.any_name) or [d.get_length() if d.is_static else 1 for d in port.get_partial_shape()])
                       for port in model.inputs})
    kinds = {op.get_friendly_name(): op.get_type_name() for op in model.get_ordered_ops()}
    settings = {"INFERENCE_PRECISION_HINT": HINTS.get(scheme, "f32"), "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads}
    return core.compile_model(model, "CPU", settings | config), kinds


def _shapes_of(path: Path, lengths: Mapping[str, int]) -> dict[str, list[int]]:
    """Input -> shape of an ONNX file, whose symbols OpenVINO forgets."""
    import onnx

    return {v.name: [lengths.get(d.dim_param, 1) if d.dim_param else d.dim_value for d in v.type.tensor_type.shape.dim]
            for v in onnx.load(path, load_external_data=False).graph.input}


def openvino_operators(found: tuple[Any, Mapping[str, str]]) -> list[Operator]:
    """Of the compiled model's runtime model."""
    model, kinds = found
    runtime = model.get_runtime_model()
    constant: set[str] = set()
    operators = []
    for op in runtime.get_ordered_ops():
        name, info = op.get_friendly_name(), {k: str(v.astype(str)) for k, v in op.get_rt_info().items()}
        kind, sources = info.get("layerType", ""), [i.get_source_output() for i in op.inputs()]
        shapes = [(tuple(s.get_shape()), s.get_node().get_friendly_name()) for s in sources]
        if kind in CONSTANT or (sources and kind != "Reorder" and all(source in constant for _, source in shapes)):
            constant.add(name)
            continue
        if kind in ("", "Input", "Parameter", "Output", "Result"):
            continue
        layouts = [_info(s.get_node(), "outputLayouts").split(",")[0] for s in sources if s.get_node().get_friendly_name() not in constant]
        joined = [kinds.get(n, "") for n in info.get("originalLayersNames", "").split(",") if n]
        operators.append(Operator(
            op=kind, kernel=info.get("primitiveType", ""), name=name, type=info.get("runtimePrecision", "f32"),
            inputs=tuple(s for s, source in shapes if source not in constant), weights=tuple(s for s, source in shapes if source in constant and s and 0 not in s),
            outputs=tuple(tuple(o.get_shape()) for o in op.outputs()), facts=_layouts(layouts, info.get("outputLayouts", "").split(",")[0]),
            fused=tuple(sorted(k for k in joined[1 if kind != "Subgraph" else 0:] if k and k != "Constant"))))
    return operators


def _info(node: Any, key: str) -> str:
    info = node.get_rt_info()
    return str(info[key].astype(str)) if key in info else ""


def _layouts(before: list[str], after: str) -> dict[str, Any]:
    """The order of axes in memory, where it is not the plain one."""
    told = {"from": before[0] if before else "", "to": after}
    return {k: v for k, v in told.items() if v and v != "".join(sorted(v))}

