"""OpenVINO IR (`.xml` + `.bin`): the fastest way to run on x86, read from the ONNX graph of `export/onnx.py`.

    fp32          weights as they are, executed in f32. The hint is set: on CPUs with bf16 units OpenVINO would use bf16 silently
    bf16          the same file, executed in bf16; refused where the CPU has no such arithmetic
    fp16          weights in 16 bits, executed in f16 where the CPU has such arithmetic and in f32 elsewhere; layers that real inputs
                  show to overflow (`_half.py`) keep fp32 in both
    w8a8_static   NNCF post-training quantization (`_openvino_quantize.py`)
    w8a8_qat      trained ranges and weights (`_openvino_trained.py`); w4a8_qat stores its 15 levels in 8 bits: the CPU has no 4-bit kernels
                  with 8-bit activations

Next to integers everything is computed in f32, or, with `rest: bf16`, in bf16, which the file itself says. Layers that are kept in the other of
the two are marked in it, and it is checked that OpenVINO executes them so.

What was really executed is read back from the compiled model, layer by layer.
"""
from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.export import _foreign, _layers_openvino
from edgekd.export._half import KEPT, Kept, by_layer, overflowing
from edgekd.export._openvino_layers import FIX, in_float_types, marked, openvino, read, said
from edgekd.export._openvino_quantize import Job, quantize
from edgekd.export._openvino_trained import with_grids
from edgekd.export.onnx import float_file

from edgekd.errors import EdgekdError, UsageError, unknown
from edgekd.protocols import Availability, Component, Facts, Port, package_version
from edgekd.tuning import PLAIN, Tuning

if TYPE_CHECKING:
    import numpy as np

INTEGER = ("w8a8_static", "w8a8_qat", "w4a8_qat")
HINTS = {"fp32": "f32", "fp16": "f16", "bf16": "bf16", **dict.fromkeys(INTEGER, "f32")}
PRECISIONS = {"f32": "fp32", "bf16": "bf16", "f16": "fp16", "i8": "int8", "u8": "int8"}
ARITHMETIC = {"Convolution", "GroupConvolution", "FullyConnected", "MatMul", "Deconvolution", "ScaledDotProductAttention"}
HINT = "edgekd.hint"
"""rt_info key of a file of integers: what executes the rest, where it is not f32"""


class OpenVinoExporter(Facts):
    """See `edgekd.protocols.Exporter`."""

    format = "openvino"
    suffix = ".xml"
    extra: str | None = "openvino"
    schemes: tuple[str, ...] = tuple(HINTS)
    tunes: Mapping[str, frozenset[Any]] = {
        "keep": frozenset({"fp32", "bf16"}), "rest": frozenset({"bf16"}), "method": frozenset({"percentile", "mse"}), "granularity": frozenset({"tensor"}),
        "symmetric": frozenset({True, False}), "equalized": frozenset({True}), "corrected": frozenset({True, False}), "naive": frozenset({True}),
        "grids": frozenset({True})}

    def availability(self) -> Availability:
        """Whether openvino and nncf are installed."""
        missing = [p for p in ("openvino", "nncf") if not package_version(p)]
        if missing:
            return Availability(False, reason=f"not installed: {', '.join(missing)}", fix=FIX, runs="openvino" not in missing)
        return Availability(True, version=f"openvino {package_version('openvino')}")

    def export(self, component: Component, path: Path, *, scheme: str, calibration: Any = None, qdq: str = "u8s8", tuning: Tuning = PLAIN) -> list[Path]:
        """Write `path` and the `.bin` beside it (see `edgekd.protocols.Exporter.export`). OpenVINO picks its own QDQ style."""
        self._check(component.name, scheme, calibration, tuning)
        fixed = bool(component.lengths) and not component.dynamic
        return _write(Job(float_file(component), component.name, calibration, tuning, fixed=fixed), Path(path), scheme)

    def rewrite(self, source: Path, path: Path, *, scheme: str, calibration: Any = None, qdq: str = "u8s8") -> list[Path]:
        """Write anybody's float ONNX file in another precision at `path`; `source` is only read. Unlike in our decoders, activations whose length
        varies are quantized too. Raises as `export` does."""
        self._check(source.name, scheme, calibration, PLAIN)
        with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
            return _write(Job(_foreign.ready(source, Path(folder)), source.name, calibration, varying=True), Path(path), scheme)

    def _check(self, where: str, scheme: str, calibration: Any, tuning: Tuning) -> None:
        if scheme not in self.schemes:
            raise unknown("openvino scheme", scheme, self.schemes)
        if scheme in ("w8a8_static", "fp16") and calibration is None:
            raise UsageError(f"{scheme} needs calibration images", where=where, hint="give a folder of images with --data")
        if scheme.endswith("_qat") and not tuning.grids:
            raise UsageError(f"{scheme} needs trained ranges", where=where, hint="distil the checkpoint with a quantization-aware recipe first")
        openvino()
        if scheme == "bf16" or _hint(tuning) == "bf16":
            _require_bf16()

    def open(self, path: Path, *, scheme: str, threads: int | None = None, traced: bool = False) -> OpenVinoSession:
        """A session on the CPU with `threads` threads (None: OpenVINO's own choice); `traced`: with the times of its operators."""
        if scheme == "bf16":
            _require_bf16()
        if scheme in INTEGER:
            return OpenVinoSession(Path(path), _hint_of(Path(path)), threads, traced)
        hint = HINTS[scheme] if scheme != "fp16" or "FP16" in _capabilities() else "f32"  # elsewhere f16 would become bf16, which is not what was asked
        return OpenVinoSession(Path(path), hint, threads, traced)

    def layers(self, path: Path, *, scheme: str, inputs: Mapping[str, np.ndarray], threads: int | None = None, repeats: int = 30) -> list[dict[str, Any]]:
        """See `edgekd.protocols.Facts.layers`."""
        return self.open(path, scheme=scheme, threads=threads, traced=True).layers(inputs, self.modules(path), repeats)

    def modules(self, path: Path) -> Mapping[str, str]:
        """Operators -> modules."""
        return _layers_openvino.modules(Path(path))


class OpenVinoSession:
    """An IR file compiled for the CPU with its precision fixed."""

    def __init__(self, path: Path, hint: str, threads: int | None = None, traced: bool = False) -> None:
        config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "PERF_COUNT": traced}
        if threads:
            config["INFERENCE_NUM_THREADS"] = threads
        try:
            compiled = openvino().Core().compile_model(str(path), "CPU", config)
        except RuntimeError as e:
            raise EdgekdError(f"OpenVINO cannot open the file: {said(e)}", where=path, hint="export the model again") from e
        self._path: Path | None = path
        self._take(compiled)

    @classmethod
    def of(cls, compiled: Any) -> OpenVinoSession:
        """A session on what is compiled already."""
        session = cls.__new__(cls)
        session._path = None
        session._take(compiled)
        return session

    def _take(self, compiled: Any) -> None:
        self._compiled, self._request = compiled, compiled.create_infer_request()
        self._inputs = [i.any_name for i in compiled.inputs]
        self._outputs = [o.any_name for o in compiled.outputs]

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
        if self._path is None:
            return {}
        model = openvino().Core().read_model(str(self._path))
        return dict(json.loads(model.get_rt_info([KEPT]).astype(str))) if model.has_rt_info([KEPT]) else {}

    def layers(self, inputs: Mapping[str, np.ndarray], known: Mapping[str, str], repeats: int) -> list[dict[str, Any]]:
        """See `edgekd.export._layers_openvino.layers`; of a session that is traced."""
        return _layers_openvino.layers(self._compiled, lambda: self.run(inputs), self._request.get_profiling_info, known,
                                       lambda op: PRECISIONS.get(found := _kind_of(op)[1], found), repeats)

    def _layers(self) -> Iterator[tuple[str, str]]:
        """(layer type, precision) of every layer that is executed."""
        for op in self._compiled.get_runtime_model().get_ordered_ops():
            kind, precision = _kind_of(op)
            if kind and kind not in ("Input", "Output", "Const", "Constant"):
                yield kind, precision


def _kind_of(op: Any) -> tuple[str, str]:
    """(layer type, precision) of an operator of the runtime's graph."""
    info = op.get_rt_info()
    kind, precision, primitive = (str(info[k].astype(str)) if k in info else "" for k in ("layerType", "runtimePrecision", "primitiveType"))
    # of f16 the plugin reports the weights' type; its kernel's name ends in what it computes in
    return kind, primitive.rsplit("_", 1)[-1] if precision == "f16" else precision


def _write(job: Job, path: Path, scheme: str) -> list[Path]:
    """Write one scheme of a float ONNX graph at `path` (half the time of reading the torch program)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.stem}.", dir=path.parent) as folder:
        if scheme in INTEGER:
            model, layers = quantize(job) if scheme == "w8a8_static" else with_grids(job.source, job.where, job.tuning)
            kept = {name: kind for layer, kind in job.tuning.keep.items() for name in layers.get(layer, ())}
            model = in_float_types(model, kept, job.tuning.rest, Path(folder))
            if (hint := _hint(job.tuning)) != "f32":
                model.set_rt_info(hint, [HINT])
        else:
            model = read(job.source, job.where)
        if scheme == "fp16":
            model = _keep(model, overflowing(job.source, job.calibration), Path(folder))
        _layers_openvino.tell(model, job.source)
        return save(model, path, Path(folder), half=scheme == "fp16")


def _keep(model: Any, kept: list[Kept], folder: Path) -> Any:
    """The model with the operators of `kept` ONNX nodes marked: neither their weights nor their execution becomes 16-bit."""
    names = {k.node for k in kept}
    ops = [op for op in model.get_ordered_ops() if op.get_friendly_name().split("/")[0] in names]
    if kept:
        model.set_rt_info(json.dumps(by_layer(kept)), [KEPT])
    return marked(model, ops, folder)


def _hint(tuning: Tuning) -> str:
    """What executes everything that is not integer."""
    return "bf16" if "bf16" in (tuning.rest, *tuning.keep.values()) else "f32"


def _hint_of(path: Path) -> str:
    """The same of a written file. Raises EdgekdError when this CPU cannot execute it so."""
    try:
        model = openvino().Core().read_model(str(path))
    except RuntimeError as e:
        raise EdgekdError(f"OpenVINO cannot open the file: {said(e)}", where=path, hint="export the model again") from e
    hint = str(model.get_rt_info([HINT]).astype(str)) if model.has_rt_info([HINT]) else "f32"
    if hint == "bf16":
        _require_bf16()
    return hint


def save(model: Any, path: Path, folder: Path, *, half: bool = False) -> list[Path]:
    """Both files appear under their names only when whole; the `.xml`, which makes it a model, last."""
    temp = folder / path.name
    openvino().save_model(model, str(temp), compress_to_fp16=half)
    written = []
    for file in (temp.with_suffix(".bin"), temp):
        os.replace(file, path.with_name(file.name))
        written.append(path.with_name(file.name))
    return written[::-1]


def _capabilities() -> list[str]:
    return list(openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


def _require_bf16() -> None:
    capabilities = _capabilities()
    if "BF16" not in capabilities:
        raise EdgekdError(f"this CPU has no bf16 arithmetic for OpenVINO (it offers {', '.join(capabilities)})", hint="use fp32 or w8a8_static")


exporter = OpenVinoExporter()
