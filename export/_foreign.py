"""ONNX files of anybody's, made ready for the quantizers: slimmed as ours are, every node named, shapes inferred, in a folder of its own.

Whatever wrote them: local functions are inlined, opsets before 13 (no per-channel quantization) converted, weights beside the graph followed.
"""
from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from edgekd.errors import EdgekdError, first_line

if TYPE_CHECKING:
    import onnx

OLDEST, CONVERTED = 13, 18
"""The opset from which weights can be quantized per channel, and the one that older graphs are brought to."""
QUANTIZED = {"QuantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "MatMulNBits"}
LARGE = 1_800_000_000
"""bytes from which weights are kept outside of the graph: a protobuf message holds 2 GiB"""


def files_of(path: Path) -> list[Path]:
    """The graph and the files its weights lie in, whatever their names. Raises EdgekdError when it is no ONNX file."""
    graph = skeleton(path).graph
    tensors = [*graph.initializer, *(a.t for n in graph.node for a in n.attribute if a.HasField("t"))]
    names = dict.fromkeys(e.value for t in tensors for e in t.external_data if e.key == "location")
    return [path, *(path.parent / name for name in names)]


def skeleton(path: Path) -> onnx.ModelProto:
    """The graph without weights that lie beside it.

    Raises:
        EdgekdError: it is no ONNX file.
    """
    import onnx

    try:
        model = onnx.load(path, load_external_data=False)
        if not model.graph.output:
            raise ValueError("it has no graph")
    except Exception as e:  # protobuf's DecodeError, OSError, UnicodeDecodeError
        raise EdgekdError(f"the file is no ONNX model: {first_line(e)}", where=path, hint="it is damaged, or of another format") from e
    return model


def is_large(path: Path) -> bool:
    """Whether the weights must stay outside of the graph."""
    return sum(f.stat().st_size for f in files_of(path)) > LARGE


def ready(path: Path, folder: Path) -> Path:
    """A copy of a float graph in `folder` that can be quantized; `path` and its weights are only read.

    Raises:
        EdgekdError: it is no ONNX file, its weights are missing, it is quantized already, or it is not valid.
    """
    import onnx

    model = skeleton(path)
    if found := sorted({n.op_type for n in model.graph.node} & QUANTIZED):
        raise EdgekdError(f"the model is quantized already (it holds {found[0]})", where=path, hint="name the float model")
    if missing := [f for f in files_of(path) if not f.is_file()]:
        raise EdgekdError(f"the weights of the graph are missing: {missing[0].name}", where=path, hint="put the file beside the graph")
    file, large = folder / "float.onnx", is_large(path)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # stdout is for our data
            _slim(_modern(path, folder, large=large), file, large=large)
        model = onnx.load(file, load_external_data=False)
        _name(model.graph)
        onnx.save(model, file)
        onnx.shape_inference.infer_shapes_path(str(file), str(file))
        onnx.checker.check_model(str(file))
    except Exception as e:  # onnx's checker, converter and inference raise kinds of their own
        raise EdgekdError(f"the ONNX model is not valid: {first_line(e)}", where=path, hint="onnx.checker.check_model(FILE) says more") from e
    return file


def _modern(path: Path, folder: Path, *, large: bool) -> Path:
    """The file, or a copy with its functions inlined and its opset converted. Graphs above 2 GiB are taken as they are."""
    import onnx
    from onnx import inliner, version_converter

    model = skeleton(path)
    opset = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=CONVERTED)
    if large or (opset >= OLDEST and not model.functions):
        return path
    model = onnx.load(path)
    if model.functions:
        model = inliner.inline_local_functions(model)
    if opset < OLDEST:
        model = version_converter.convert_version(model, CONVERTED)
    copy = folder / "modern.onnx"
    onnx.save(model, copy)
    return copy


def _slim(source: Path, file: Path, *, large: bool) -> None:
    """Slimmed; as it is where the optimiser does not take it."""
    import onnx
    import onnxslim

    try:
        with _silent():
            onnxslim.slim(str(source), str(file), save_as_external_data=large)
        onnx.checker.check_model(str(file))
    except Exception:  # it raises anything on graphs it does not know, and the graph is as good without
        for leftover in file.parent.glob(f"{file.name}*"):
            leftover.unlink()
        model = onnx.load(source)
        onnx.save(model, file, save_as_external_data=large, location=f"{file.name}.data" if large else None)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    import logging

    logger = logging.getLogger("onnxslim")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _name(graph: onnx.GraphProto) -> None:
    """Every node has a name of its own: quantizers are told what to take by names."""
    taken: set[str] = set()
    for i, node in enumerate(graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.name or node.op_type}_{i}"
        taken.add(node.name)
