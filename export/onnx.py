"""ONNX files, run by onnxruntime: the format of the core install, and the way into the other runtimes.

    float graph    torch.export -> ONNX opset 18 (dynamo) -> onnxslim -> checked; kept by content, so that the schemes and
                   formats of one component capture it once; weights above 2 GB lie beside the graph
    fp16           everything that real inputs show to fit; the rest stays in fp32 and is named (`_half.py`); float32 in and out
    w8a8_static    QDQ, 8-bit activations and per-channel weights, on the operators that carry the arithmetic only
                   (quantizing softmax and normalisation wrecks attention models); `naive` takes the library's defaults instead
    w8a8_qat       the same with trained ranges and weights, exactly as they were trained (`_grids.py`); w4a8_qat has them in bytes,
                   for onnxruntime has no kernels for 4-bit weights of convolutions
    w8_dynamic     8-bit weights of MatMul and Gemm, activations quantized at run time; a graph without them is refused

Activations follow the target: `u8s8` for x86 (signed activations are slower than fp32 there), `s8s8_symmetric` for
TensorRT and mobile delegates, which also refuse quantized biases.
"""
from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.export import _foreign, _layers_onnx
from edgekd.export._gelu import reorder
from edgekd.export._half import KEPT, asked, convert, module_of, name_layers, overflowing
from edgekd.export._int8 import QDQ_STYLES, Source, quantizable, quantize

from edgekd.errors import EdgekdError, UsageError, first_line, unknown
from edgekd.protocols import Availability, Component, Facts, Port, package_version
from edgekd.tuning import PLAIN, Tuning

if TYPE_CHECKING:
    import numpy as np
    import onnx

__all__ = ["OnnxExporter", "OnnxSession", "content_key", "exporter", "float_file", "float_graph", "is_large", "quantizable"]

OPSET = 18
KEPT_GRAPHS = 8
TUNED = {"fp32": {"keep"}, "fp16": {"keep"}, "w8a8_static": {"keep", "method", "granularity", "symmetric", "naive"}, "w8_dynamic": {"keep", "granularity"},
         "w8a8_qat": {"keep", "grids", "weight_bits"}, "w4a8_qat": {"keep", "grids", "weight_bits"}}
"""scheme -> what can be told about how it is done"""
FLOAT16 = 10  # onnx.TensorProto.FLOAT16, without importing it
INTEGER_OPS = {"QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QGemm",
               "DynamicQuantizeLSTM", "QAttention"}
FLOAT_OPS = {"Conv", "FusedConv", "ConvTranspose", "MatMul", "Gemm", "FusedMatMul", "FusedGemm", "Attention", "MultiHeadAttention"}

DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64", "tensor(int64)": "int64", "tensor(int32)": "int32",
          "tensor(uint8)": "uint8", "tensor(int8)": "int8", "tensor(bool)": "bool"}
"""onnxruntime's names of types -> numpy's"""

LARGE = _foreign.LARGE
"""bytes of weights from which they are kept outside of the graph (ViT-H: 2.5e9)"""

_graphs: OrderedDict[str, tempfile.TemporaryDirectory[str]] = OrderedDict()


def float_file(component: Component) -> Path:
    """The component as a slimmed, checked fp32 ONNX file, its weights beside it when they do not fit into one; not to be changed.
    The same content is captured only once per process.

    Raises:
        EdgekdError: the component cannot be captured, with the toolchain's reason.
    """
    key = content_key(component)
    if key not in _graphs:
        _graphs[key] = _capture(component)
        while len(_graphs) > KEPT_GRAPHS:
            _graphs.popitem(last=False)[1].cleanup()
    _graphs.move_to_end(key)
    return Path(_graphs[key].name) / "float.onnx"


def float_graph(component: Component) -> onnx.ModelProto:
    """`float_file` read into memory: the caller's own."""
    import onnx

    return onnx.load(float_file(component))


def content_key(component: Component) -> str:
    """Changes with the component's weights, structure, attributes, example shapes and names.

    Attributes count by their `repr`: one that shows an address makes the graph be captured anew, which costs time and nothing else.
    """
    digest = hashlib.sha256()
    for name, module in component.module.named_modules():
        own = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in vars(module).items() if not k.startswith("_")}
        digest.update(repr((name, type(module).__module__, type(module).__qualname__, module.extra_repr(), sorted(own.items(), key=str))).encode())
    for name, tensor in [*component.module.named_parameters(), *component.module.named_buffers()]:
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().data)  # fp32 is hashed in place, without a copy
    example = {k: (tuple(v.shape), str(v.dtype)) for k, v in component.example.items()}
    digest.update(repr((example, component.outputs, {k: dict(v) for k, v in component.dynamic.items()})).encode())
    return digest.hexdigest()


def is_large(component: Component) -> bool:
    """Whether the weights must lie beside the graph: one protobuf message holds 2 GiB, and the graph needs room too."""
    return sum(t.numel() * t.element_size() for t in [*component.module.parameters(), *component.module.buffers()]) > LARGE


def _capture(component: Component) -> tempfile.TemporaryDirectory[str]:
    """A temporary folder with `float.onnx` (and `float.onnx.data`)."""
    import onnx
    import torch

    if component.module.training:
        raise EdgekdError("the module is in training mode and would be exported with its training behaviour", where=component.name,
                          hint="call .eval() first")
    # By position: the names of a component's inputs need not be those of its forward().
    shapes = tuple(dict(component.dynamic[k]) if component.dynamic.get(k) else None for k in component.example)
    folder = tempfile.TemporaryDirectory(prefix="edgekd-")
    file = Path(folder.name) / "float.onnx"
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                component.module, tuple(component.example.values()), dynamo=True, opset_version=OPSET, external_data=False, verbose=False,
                input_names=list(component.example), output_names=list(component.outputs), dynamic_shapes=shapes if component.dynamic else None)
            assert program is not None  # dynamo=True without a file always returns the program
            modules = {key: module_of(scopes) for n in program.model.graph if (scopes := n.metadata_props.get("pkg.torch.onnx.name_scopes", ""))
                       for key in (n.name or "", *(str(o.name) for o in n.outputs))}  # an operator that joins others is named after what one of them wrote
            _slim(program, file, large=is_large(component))
        skeleton = onnx.load(file, load_external_data=False)
        reorder(skeleton.graph)
        name_layers(skeleton.graph, modules)
        _name_axes(skeleton.graph)
        onnx.save(skeleton, file)
        onnx.checker.check_model(str(file))  # by path: it reads weights that lie beside the graph
    except Exception as e:  # torch, onnxscript and onnxslim raise dozens of kinds: all mean that it cannot be captured
        folder.cleanup()
        raise EdgekdError(f"the component cannot be captured as ONNX: {first_line(e.__cause__ or e)}", where=component.name,
                          hint="run with a module that torch.export accepts; `TORCH_LOGS=export` shows where it stopped") from e
    return folder


def _slim(program: Any, file: Path, *, large: bool) -> None:
    """Write the optimised graph of a torch program; a large one goes through files only, never through one message."""
    import onnx
    import onnxslim

    if not large:
        onnx.save(onnxslim.slim(program.model_proto), file)
        return
    raw = file.with_name("raw.onnx")
    program.save(str(raw), external_data=True)
    with redirect_stdout(io.StringIO()):  # given a file to write it prints a table; stdout is for our data
        onnxslim.slim(str(raw), str(file), save_as_external_data=True)
    for leftover in file.parent.glob("raw.onnx*"):
        leftover.unlink()


def _name_axes(graph: onnx.GraphProto) -> None:
    """Axes whose length depends on an input's values come out as `u0`, `u1`: they are named after their output."""
    for value in graph.output:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_param.startswith("u") and dim.dim_param[1:].isdigit():
                dim.dim_param = f"{value.name}_{axis}"


def _write(model: onnx.ModelProto, target: Path, *, large: bool) -> list[Path]:
    """Save a graph, its weights in a second file when it is large; what was written."""
    import onnx

    if not large:
        onnx.save(model, target)
        return [target]
    onnx.save(model, target, save_as_external_data=True, all_tensors_to_one_file=True, location=f"{target.name}.data")
    return _written(target)


def _written(target: Path) -> list[Path]:
    """The graph and, unless all its tensors are so small that they stay in it, the file of its weights."""
    data = target.with_name(f"{target.name}.data")
    return [target, data] if data.exists() else [target]


class OnnxExporter(Facts):
    """See `edgekd.protocols.Exporter`."""

    format = "onnx"
    suffix = ".onnx"
    extra: str | None = None
    schemes: tuple[str, ...] = tuple(TUNED)
    tunes: Mapping[str, frozenset[Any]] = {
        "keep": frozenset({"fp32"}), "method": frozenset({"percentile", "entropy", "mse"}), "granularity": frozenset({"tensor"}),
        "symmetric": frozenset({True, False}), "naive": frozenset({True})}

    def availability(self) -> Availability:
        """Whether onnx, onnxruntime, onnxscript and onnxslim are installed."""
        missing = [p for p in ("onnx", "onnxruntime", "onnxscript", "onnxslim") if not package_version(p)]
        if missing:
            return Availability(False, reason=f"not installed: {', '.join(missing)}", fix="pip install edgekd", runs=not {"onnxruntime", "onnx"} & set(missing))
        return Availability(True, version=f"onnxruntime {package_version('onnxruntime')}")

    def export(self, component: Component, path: Path, *, scheme: str, calibration: Any = None, qdq: str = "u8s8", tuning: Tuning = PLAIN) -> list[Path]:
        """Write the component as `.onnx`, with `.onnx.data` beside it above 2 GB (see `edgekd.protocols.Exporter.export`).

        `fp16` takes `calibration` too: the inputs that are searched for what overflows.
        """
        self._check(component.name, scheme, calibration, qdq, tuning)
        return _place(Source(float_file(component), component.name, is_large(component)), Path(path), scheme, calibration, qdq, tuning)

    def rewrite(self, source: Path, path: Path, *, scheme: str, calibration: Any = None, qdq: str = "u8s8") -> list[Path]:
        """Write anybody's float ONNX file in another precision at `path`; `source` is only read. Unlike in our decoders, activations whose length
        varies are quantized too. Raises as `export` does."""
        self._check(source.name, scheme, calibration, qdq)
        with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
            return _place(Source(_foreign.ready(source, Path(folder)), source.name, _foreign.is_large(source), varying=True), Path(path), scheme, calibration, qdq)

    def files(self, path: Path) -> list[Path]:
        """The graph and the files its weights lie in."""
        return _foreign.files_of(path)

    def _check(self, where: str, scheme: str, calibration: Any, qdq: str, tuning: Tuning = PLAIN) -> None:
        if scheme not in self.schemes:
            raise unknown("onnx scheme", scheme, self.schemes)
        if qdq not in QDQ_STYLES:
            raise unknown("QDQ style", qdq, QDQ_STYLES)
        if scheme in ("w8a8_static", "fp16") and calibration is None:
            raise UsageError(f"{scheme} needs calibration images", where=where, hint="give a folder of images with --data")
        if other := sorted(set(tuning.changed()) - TUNED[scheme]):
            raise UsageError(f"{scheme} takes no {other[0]}", where=where, hint=f"it takes {', '.join(sorted(TUNED[scheme] - {'grids', 'weight_bits'}))}")
        if scheme.endswith("_qat") and not tuning.grids:
            raise UsageError(f"no ranges were trained for the {where}, and {scheme} writes no others", where=where, hint="w8a8_static finds them by calibration")

    def open(self, path: Path, *, scheme: str, threads: int | None = None) -> OnnxSession:
        """A session on the CPU with `threads` threads (None: onnxruntime's own choice)."""
        return OnnxSession(Path(path), threads)

    def layers(self, path: Path, *, scheme: str, inputs: Mapping[str, np.ndarray], threads: int | None = None, repeats: int = 30) -> list[dict[str, Any]]:
        """See `edgekd.protocols.Facts.layers`."""
        return _layers_onnx.layers(OnnxSession(Path(path), threads).start, Path(path), inputs, repeats)

    def modules(self, path: Path) -> Mapping[str, str]:
        """Nodes and the tensors they write -> modules."""
        return _layers_onnx.modules(Path(path))


class OnnxSession:
    """An ONNX file opened by onnxruntime on the CPU."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        self._path, self._threads = path, threads
        self._session = self.start()
        self._inputs = [i.name for i in self._session.get_inputs()]
        self._outputs = [o.name for o in self._session.get_outputs()]
        self._graph: onnx.ModelProto | None = None

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Inputs the graph does not use (an export may drop one) are left out."""
        outputs = self._session.run(self._outputs, {name: inputs[name] for name in self._inputs})
        return dict(zip(self._outputs, outputs, strict=True))

    @property
    def inputs(self) -> list[Port]:
        """What the graph takes."""
        return [Port(i.name, tuple(n if isinstance(n, int) else None for n in i.shape), DTYPES.get(i.type, i.type),
                     tuple(n if isinstance(n, str) else None for n in i.shape)) for i in self._session.get_inputs()]

    @property
    def executed_ops(self) -> dict[str, int]:
        """Operators of the graph as onnxruntime optimised it for this CPU, most frequent first."""
        return dict(Counter(n.op_type for n in self._optimised().graph.node).most_common())

    @property
    def executed_precision(self) -> str:
        """`fp32`, `fp16`, `int8`, or e.g. `int8+fp32` when arithmetic of both kinds is left."""
        graph = self._optimised().graph
        types = {v.name: v.type.tensor_type.elem_type for v in [*graph.value_info, *graph.input]} | {t.name: t.data_type for t in graph.initializer}
        floats = [types.get(n.input[1]) for n in graph.node if n.op_type in FLOAT_OPS and len(n.input) > 1]
        found = {"int8": any(n.op_type in INTEGER_OPS for n in graph.node), "fp16": any(t == FLOAT16 for t in floats)}
        found["fp32"] = any(t != FLOAT16 for t in floats) or not any(found.values())
        return "+".join(name for name, there in found.items() if there)

    @property
    def kept_fp32(self) -> dict[str, str]:
        """Layers of an fp16 file that stay in fp32 -> why, as written into it."""
        return dict(json.loads(self._session.get_modelmeta().custom_metadata_map.get(KEPT, "{}")))

    def _optimised(self) -> onnx.ModelProto:
        """The graph that is executed, without its weights."""
        if self._graph is None:
            import onnx

            with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
                file = Path(folder) / "optimised.onnx"
                self.start(optimised=file)
                self._graph = onnx.load(file, load_external_data=False)
        return self._graph

    def _settle(self, options: Any) -> None:
        """Further settings of onnxruntime's session: none."""

    def start(self, trace: Path | None = None, optimised: Path | None = None) -> Any:
        """onnxruntime's own session on the file, which writes the times of its operators and the graph that it executes, where that is wanted.

        Raises:
            EdgekdError: onnxruntime refuses the file.
        """
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3  # it warns that an optimised graph fits this CPU only, which is the point
        options.intra_op_num_threads, options.inter_op_num_threads = self._threads or 0, 1
        self._settle(options)
        if trace:
            options.enable_profiling, options.profile_file_prefix = True, str(trace)
        if optimised:
            options.optimized_model_filepath = str(optimised)
            options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{optimised.name}.data")
            options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        try:
            return ort.InferenceSession(str(self._path), options, providers=["CPUExecutionProvider"])
        except Exception as e:  # onnxruntime's exceptions share no base class
            raise EdgekdError(f"onnxruntime cannot open the file: {first_line(e)}", where=self._path, hint="export the model again") from e


def _place(source: Source, path: Path, scheme: str, calibration: Any, qdq: str, tuning: Tuning = PLAIN) -> list[Path]:
    """Write one scheme of a float graph at `path`, whole or not at all; what was written, the graph first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.stem}.", dir=path.parent) as folder:
        files = _export(source, Path(folder) / path.name, scheme, calibration, qdq, tuning)
        for file in files[::-1]:  # the graph, which makes it a model, last
            os.replace(file, path.with_name(file.name))
    return [path.with_name(f.name) for f in files]


def _export(source: Source, target: Path, scheme: str, calibration: Any, qdq: str, tuning: Tuning) -> list[Path]:
    import onnx

    if scheme == "fp32" and not source.large:
        shutil.copyfile(source.file, target)
        return [target]
    if scheme == "fp32":
        return _write(onnx.load(source.file), target, large=True)
    if scheme == "fp16":
        graph = onnx.load(source.file, load_external_data=False)
        half = convert(source.file, [*overflowing(source.file, calibration), *asked(graph, tuning.keep)])
        return _write(half, target, large=sum(len(t.raw_data) for t in half.graph.initializer) > LARGE)
    with _quiet():
        quantize(source, target, scheme=scheme, calibration=calibration, qdq=qdq, tuning=tuning)
    _layers_onnx.renamed(source.file, target)
    return _written(target)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters' advice to developers; failures still raise."""
    root, names = logging.getLogger(), ("torch.onnx", "torch", "onnxscript", "onnx_ir", "onnxslim")
    before = [(logging.getLogger(n), logging.getLogger(n).level) for n in names] + [(root, root.level)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger, _ in before:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in before:
                logger.setLevel(level)


exporter = OnnxExporter()
