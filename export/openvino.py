"""OpenVINO IR (`.xml` + `.bin`): the fastest way to run on x86, read from the ONNX graph of `export/onnx.py`.

    fp32          weights as they are, executed in f32. The hint is set: on CPUs with bf16 units OpenVINO would use bf16 silently
    bf16          the same file, executed in bf16; refused where the CPU has no such arithmetic
    fp16          weights in 16 bits, executed in f16 where the CPU has such arithmetic and in f32 elsewhere; layers that real inputs
                  show to overflow (`_half.py`) keep fp32 in both
    w8a8_static   NNCF post-training quantization, everything else in f32

What was really executed is read back from the compiled model, layer by layer.
"""
from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.export import _foreign
from edgekd.export._half import KEPT, Kept, by_layer, overflowing
from edgekd.export.onnx import float_file

from edgekd.errors import EdgekdError, UsageError, first_line, unknown
from edgekd.protocols import Availability, Component, Facts, Port, package_version

if TYPE_CHECKING:
    import numpy as np

HINTS = {"fp32": "f32", "fp16": "f16", "bf16": "bf16", "w8a8_static": "f32"}
PRECISIONS = {"f32": "fp32", "bf16": "bf16", "f16": "fp16", "i8": "int8", "u8": "int8"}
ARITHMETIC = {"Convolution", "GroupConvolution", "FullyConnected", "MatMul", "Deconvolution", "ScaledDotProductAttention"}
PRECISE = "precise_0"
"""OpenVINO's mark of what 16-bit execution and compression leave alone"""
FIX = 'pip install "edgekd[openvino]"'


class OpenVinoExporter(Facts):
    """See `edgekd.protocols.Exporter`."""

    format = "openvino"
    suffix = ".xml"
    extra: str | None = "openvino"
    schemes: tuple[str, ...] = tuple(HINTS)

    def availability(self) -> Availability:
        """Whether openvino and nncf are installed."""
        missing = [p for p in ("openvino", "nncf") if not package_version(p)]
        if missing:
            return Availability(False, reason=f"not installed: {', '.join(missing)}", fix=FIX, runs="openvino" not in missing)
        return Availability(True, version=f"openvino {package_version('openvino')}")

    def export(self, component: Component, path: Path, *, scheme: str, calibration: Any = None, qdq: str = "u8s8") -> list[Path]:
        """Write `path` and the `.bin` beside it (see `edgekd.protocols.Exporter.export`). OpenVINO picks its own QDQ style."""
        self._check(component.name, scheme, calibration)
        return _write(float_file(component), Path(path), component.name, scheme, calibration, varying=False)

    def rewrite(self, source: Path, path: Path, *, scheme: str, calibration: Any = None, qdq: str = "u8s8") -> list[Path]:
        """Write anybody's float ONNX file in another precision at `path`; `source` is only read. Unlike in our decoders, activations whose length
        varies are quantized too. Raises as `export` does."""
        self._check(source.name, scheme, calibration)
        with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
            return _write(_foreign.ready(source, Path(folder)), Path(path), source.name, scheme, calibration, varying=True)

    def _check(self, where: str, scheme: str, calibration: Any) -> None:
        if scheme not in self.schemes:
            raise unknown("openvino scheme", scheme, self.schemes)
        if scheme in ("w8a8_static", "fp16") and calibration is None:
            raise UsageError(f"{scheme} needs calibration images", where=where, hint="give a folder of images with --data")
        _openvino()
        if scheme == "bf16":
            _require_bf16()

    def open(self, path: Path, *, scheme: str, threads: int | None = None) -> OpenVinoSession:
        """A session on the CPU with `threads` threads (None: OpenVINO's own choice)."""
        if scheme == "bf16":
            _require_bf16()
        hint = HINTS[scheme] if scheme != "fp16" or "FP16" in _capabilities() else "f32"  # elsewhere f16 would become bf16, which is not what was asked
        return OpenVinoSession(Path(path), hint, threads)


class OpenVinoSession:
    """An IR file compiled for the CPU with its precision fixed."""

    def __init__(self, path: Path, hint: str, threads: int | None = None) -> None:
        ov = _openvino()
        config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
        if threads:
            config["INFERENCE_NUM_THREADS"] = threads
        try:
            self._compiled = ov.Core().compile_model(str(path), "CPU", config)
        except RuntimeError as e:
            raise EdgekdError(f"OpenVINO cannot open the file: {_said(e)}", where=path, hint="export the model again") from e
        self._path, self._request = path, self._compiled.create_infer_request()
        self._inputs = [i.any_name for i in self._compiled.inputs]
        self._outputs = [o.any_name for o in self._compiled.outputs]

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs are copies: the runtime reuses its own buffers in the next call."""
        import numpy as np

        self._request.infer({name: inputs[name] for name in self._inputs}, share_inputs=True)
        return {name: np.array(self._request.get_output_tensor(i).data) for i, name in enumerate(self._outputs)}

    @property
    def inputs(self) -> list[Port]:
        """What the model takes."""
        return [Port(i.any_name, tuple(d.get_length() if d.is_static else None for d in i.partial_shape), i.element_type.to_dtype().name)
                for i in self._compiled.inputs]

    @property
    def executed_ops(self) -> dict[str, int]:
        """`layer type:precision` -> count in the compiled graph, most frequent first."""
        return dict(Counter(f"{kind}:{precision}" for kind, precision in self._layers()).most_common())

    @property
    def executed_precision(self) -> str:
        """Of the layers that carry the arithmetic: `fp32`, `bf16`, `int8`, or e.g. `int8+fp32` when both are left."""
        found = Counter(PRECISIONS.get(precision, precision) for kind, precision in self._layers() if kind in ARITHMETIC)
        return "+".join(sorted(found, key=lambda p: (p != "int8", -found[p]))) or "fp32"

    @property
    def kept_fp32(self) -> dict[str, str]:
        """Layers of an fp16 file that stay in fp32 -> why, as written into it."""
        model = _openvino().Core().read_model(str(self._path))
        return dict(json.loads(model.get_rt_info([KEPT]).astype(str))) if model.has_rt_info([KEPT]) else {}

    def _layers(self) -> Iterator[tuple[str, str]]:
        """(layer type, precision) of every layer that is executed."""
        for op in self._compiled.get_runtime_model().get_ordered_ops():
            info = op.get_rt_info()
            kind, precision, primitive = (str(info[k].astype(str)) if k in info else "" for k in ("layerType", "runtimePrecision", "primitiveType"))
            if precision == "f16":  # the plugin reports the weights' type there; its kernel's name ends in what it computes in
                precision = primitive.rsplit("_", 1)[-1]
            if kind and kind not in ("Input", "Output", "Const", "Constant"):
                yield kind, precision


def _write(source: Path, path: Path, where: str, scheme: str, calibration: Any, *, varying: bool) -> list[Path]:
    """Write one scheme of a float ONNX graph at `path` (half the time of reading the torch program)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.stem}.", dir=path.parent) as folder:
        try:
            model = _openvino().Core().read_model(str(source))
        except RuntimeError as e:
            raise EdgekdError(f"OpenVINO cannot read the component: {_said(e)}", where=where) from e
        if scheme == "w8a8_static":
            model = _quantize(model, where, calibration, varying=varying)
        if scheme == "fp16":
            model = _keep(model, overflowing(source, calibration), Path(folder))
        return _save(model, path, Path(folder), half=scheme == "fp16")


def _said(error: RuntimeError) -> str:
    """The first line that says something: those before it are places in OpenVINO's source."""
    told = [line for line in str(error).splitlines() if line.strip() and not line.startswith("Exception from ")]
    return first_line(RuntimeError(told[0])) if told else first_line(error)


def _keep(model: Any, kept: list[Kept], folder: Path) -> Any:
    """The model with the operators of `kept` ONNX nodes marked: neither their weights nor their execution becomes 16-bit.

    A mark set from Python is text; read back from a file it is the attribute that OpenVINO's own passes look for.
    """
    names = {k.node for k in kept}
    for op in model.get_ordered_ops():
        if op.get_friendly_name().split("/")[0] in names:
            for marked in (op, *(i.get_source_output().get_node() for i in op.inputs())):
                if marked is op or marked.get_type_name() == "Constant":
                    marked.get_rt_info()[PRECISE] = ""
    if kept:
        model.set_rt_info(json.dumps(by_layer(kept)), [KEPT])
    marked_file = folder / "marked.xml"
    _openvino().save_model(model, str(marked_file), compress_to_fp16=False)
    return _openvino().Core().read_model(str(marked_file))


def _quantize(model: Any, where: str, calibration: Any, *, varying: bool) -> Any:
    """`varying`: activations whose length varies are quantized too."""
    with _quiet():
        import nncf

        kinds = {op.get_type_name() for op in model.get_ordered_ops()}
        kept = [op.get_friendly_name() for op in model.get_ordered_ops() if op.get_type_name() in ("MatMul", "Convolution") and _varies(op)]
        samples = list_length(calibration)
        try:
            return nncf.quantize(
                model, nncf.Dataset(calibration), subset_size=samples, fast_bias_correction=True,
                preset=nncf.QuantizationPreset.MIXED, target_device=nncf.TargetDevice.CPU,
                model_type=nncf.ModelType.TRANSFORMER if "Softmax" in kinds else None,
                ignored_scope=nncf.IgnoredScope(names=kept) if kept and not varying else None)
        except Exception as e:  # nncf raises its own kinds and openvino's RuntimeError
            raise EdgekdError(f"NNCF cannot quantize the component: {first_line(e)}", where=where, hint="use fp32 or bf16") from e


def _varies(op: Any) -> bool:
    """Whether the length of the activation varies beyond its batch axis: prompt tokens, which break at 8 bits and cost nothing."""
    shape = op.input(0).get_partial_shape()
    return shape.rank.is_static and any(shape[i].is_dynamic for i in range(1, len(shape)))


def list_length(calibration: Any) -> int:
    """How many samples a re-iterable holds, counted without keeping them."""
    return max(1, len(calibration) if hasattr(calibration, "__len__") else sum(1 for _ in calibration))


def _save(model: Any, path: Path, folder: Path, *, half: bool = False) -> list[Path]:
    """Both files appear under their names only when whole; the `.xml`, which makes it a model, last."""
    temp = folder / path.name
    _openvino().save_model(model, str(temp), compress_to_fp16=half)
    written = []
    for file in (temp.with_suffix(".bin"), temp):
        os.replace(file, path.with_name(file.name))
        written.append(path.with_name(file.name))
    return written[::-1]


def _openvino() -> Any:
    try:
        import openvino
    except ImportError as e:
        raise EdgekdError("openvino is not installed", hint=FIX) from e
    return openvino


def _capabilities() -> list[str]:
    return list(_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


def _require_bf16() -> None:
    capabilities = _capabilities()
    if "BF16" not in capabilities:
        raise EdgekdError(f"this CPU has no bf16 arithmetic for OpenVINO (it offers {', '.join(capabilities)})", hint="use fp32 or w8a8_static")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
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


exporter = OpenVinoExporter()
