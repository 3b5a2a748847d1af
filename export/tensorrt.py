"""TensorRT, NVIDIA's runtime. Engines are built on the device that runs them, so what is written is everything that this takes:

    <component>.onnx               a strongly typed network: every layer computes in the types the file gives it
    <component>.build.json         the least, usual and greatest shapes, scratch memory, names (`_trtexec.py`)
    <component>.build_engine.sh    the same for somebody at the device; `_tensorrt_build.py` does it through TensorRT's Python API

    fp16           typed fp16; what real inputs show to overflow stays in fp32 and is named (`_half.py`); float32 in and out
    fp32           without TF32, which has fp16's precision
    w8a8_static    QDQ, signed and symmetric, weights per channel, no quantized bias (TensorRT takes no other); fp16 in between
    fp8_static     the same in fp8 (E4M3), for GPUs of compute capability 8.9 and newer; no Jetson Orin has it

With a GPU and TensorRT an engine is built and run. Elsewhere TensorRT-RTX, where it is installed, parses the file and compiles it for desktop GPUs,
without a GPU and in a process of its own; its engines are not a Jetson's. onnxruntime computes the same graph meanwhile.
"""
from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.export import _layers_onnx, _modelopt
from edgekd.export._child import call
from edgekd.export._half import asked, convert, overflowing
from edgekd.export._tensorrt_graph import HINT, Inside, inside, refuse_unsound, unsupported
from edgekd.export._tensorrt_mixed import convert_quantized
from edgekd.export._trtexec import build_spec, joined, script
from edgekd.export.onnx import LARGE, OnnxExporter, OnnxSession, _write, float_file

from edgekd.errors import EdgekdError, UsageError, unknown
from edgekd.protocols import Availability, Check, Component, Facts, package_version
from edgekd.tuning import PLAIN, Tuning
from edgekd.workspace import write_json

if TYPE_CHECKING:
    import numpy as np
    from edgekd.export._tensorrt_run import EngineSession

SCHEMES = ("fp16", "fp32", "w8a8_static", "fp8_static")
QDQ = "s8s8_symmetric"
RUNTIMES = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")
RTX = "tensorrt-rtx"
MINUTES = 20
DEVICES = ("/dev/nvidiactl", "/dev/nvgpu", "/dev/nvhost-gpu", "/dev/nvhost-ctrl-gpu")
"""of NVIDIA's driver: on a desktop or server, and on a Jetson"""

SAID = {"fp16": "fp16", "fp32": "fp32", "w8a8_static": "int8", "fp8_static": "fp8"}


class TensorRtExporter(Facts):
    """See `edgekd.protocols.Exporter`."""

    format = "tensorrt"
    suffix = ".onnx"
    extra: str | None = "tensorrt"
    schemes: tuple[str, ...] = SCHEMES
    tunes: Mapping[str, frozenset[Any]] = {
        "keep": frozenset({"fp16", "fp32"}), "method": frozenset({"percentile", "entropy", "mse"}), "granularity": frozenset({"tensor"}),
        "symmetric": frozenset({True}), "quantizer": frozenset({"modelopt"})}

    def availability(self) -> Availability:
        """Files are ONNX and can be written wherever onnxruntime is; they run where TensorRT and a GPU are."""
        written = OnnxExporter().availability()
        if not written.ok:
            return written
        runtime = next((f"tensorrt {v}" for p in RUNTIMES if (v := package_version(p))), None)
        rtx = f"{RTX} {v}" if (v := package_version(RTX)) else None
        if runtime and gpu():
            return Availability(True, version=runtime)
        missing = "no CUDA GPU" if runtime else "no TensorRT" if gpu() else "no CUDA GPU and no TensorRT"
        fix = "on the device: sh <component>.build_engine.sh" + ("" if rtx else '; to compile files here as a check: pip install "edgekd[tensorrt]"')
        return Availability(True, version=rtx or f"{written.version}, no {RTX}", runs=False, fix=fix,
                            reason=f"engines are built and run on the device, and here is {missing}")

    def export(self, component: Component, path: Path, *, scheme: str, calibration: Any = None, qdq: str = QDQ, tuning: Tuning = PLAIN) -> list[Path]:
        """Write `path`, and beside it `.build.json`, `.build_engine.sh` and, above 2 GB, `.onnx.data` (see `edgekd.protocols.Exporter.export`).

        `qdq` is always `s8s8_symmetric`: TensorRT takes no other. All but `fp32` take `calibration`, `fp16` to see what overflows. A layer kept in fp16
        is what everything that is not in eight bits is; one kept in fp32 is typed so.
        """
        if scheme not in self.schemes:
            raise unknown("tensorrt scheme", scheme, self.schemes)
        if scheme != "fp32" and calibration is None:
            raise UsageError(f"{scheme} needs calibration images", where=component.name, hint="give a folder of images with --data")
        if not scheme.endswith("_static") and (other := sorted(set(tuning.changed()) - {"keep"})):
            raise UsageError(f"{scheme} takes no {other[0]}", where=component.name, hint="it takes layers in fp32")
        if scheme == "fp32" and "fp16" in tuning.keep.values():
            raise UsageError("fp32 has no layers in fp16", where=component.name, hint="the other way round: fp16 with layers in fp32")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.stem}.", dir=path.parent) as folder:
            files = _write_scheme(component, Path(folder) / path.name, scheme, calibration, tuning)
            files += _beside(component, files[0], scheme)
            for file in files[::-1]:  # the graph, which makes it a model, last
                os.replace(file, path.with_name(file.name))
        return [path.with_name(f.name) for f in files]

    def files(self, path: Path) -> list[Path]:
        """The graph, its weights where they lie outside, and what an engine is built with."""
        beside = (path.with_name(f"{path.name}.data"), path.with_suffix(".build.json"), path.with_suffix(".build_engine.sh"))
        return [path, *(f for f in beside if f.is_file())]

    def open(self, path: Path, *, scheme: str, threads: int | None = None) -> EngineSession:
        """A session on the GPU. The engine is built when first asked for, which takes minutes, and kept by content, GPU and version of TensorRT."""
        from edgekd.export._tensorrt_run import EngineSession, engine

        spec = read_spec(path)
        return EngineSession(engine(Path(path), spec), spec, inside(path).kept_fp32)

    def layers(self, path: Path, *, scheme: str, inputs: Mapping[str, np.ndarray], threads: int | None = None, repeats: int = 30) -> list[dict[str, Any]]:
        """See `edgekd.protocols.Facts.layers`: trtexec times the layers on inputs of these lengths, for as long as it thinks right."""
        from edgekd.export._layers_tensorrt import layers
        from edgekd.export._tensorrt_run import engine

        spec = read_spec(path)
        lengths = {symbol: inputs[name].shape[int(axis)] for name, axes in spec["axes"].items() if name in inputs for axis, symbol in axes.items()}
        return layers(Path(path), spec, engine(Path(path), spec), lengths)

    def modules(self, path: Path) -> Mapping[str, str]:
        """Nodes and the tensors they write -> modules."""
        return _layers_onnx.modules(Path(path))

    def check(self, component: Component, path: Path, *, scheme: str) -> Check:
        """Hold the file against TensorRT's rules and, where TensorRT-RTX is installed, have it parsed and compiled.

        Raises:
            EdgekdError: TensorRT refuses a node, which is named, or the file does not compute in what `scheme` asks for.
        """
        found, spec = inside(path), read_spec(path)
        refuse_unsound(path)
        if SAID[scheme] not in found.precision.split("+"):
            raise EdgekdError(f"the file computes in {found.precision}, and {scheme} was asked for", where=component.name)
        unknown_there = unsupported(path)
        details = {"opset": found.opset, "quantize": found.quantize, "dequantize": found.dequantize, "shapes": spec["shapes"], "needs": spec["needs"],
                   "not_documented": unknown_there}
        if package_version(RTX) is None and unknown_there:
            first, more = unknown_there[0], f", and {len(unknown_there) - 1} more" if len(unknown_there) > 1 else ""
            raise EdgekdError(f"TensorRT 10 has no operator {first['operator']} (node '{first['node']}'){more}", where=component.name, hint=HINT)
        if package_version(RTX) is None:
            return Check("checked", f"held against the operators and the quantization that TensorRT documents ({RTX} would compile it)",
                         found.precision, found.ops, details)
        return _compiled(component, path, spec, found, details)

    def stand_in(self, path: Path, *, scheme: str, threads: int | None = None) -> OnnxGraphSession:
        """The same file in onnxruntime."""
        return OnnxGraphSession(Path(path), threads, eight_bits=scheme.endswith("_static"))


class OnnxGraphSession(OnnxSession):
    """The file in onnxruntime on the CPU, as it is written: what is in eight bits is computed in floats between roundings, and rearranged little.

    onnxruntime's own ways with such a graph have wrong answers, without a word: its integer kernels for fp16 scales, its blocked layout for fp8 beside fp32.
    """

    stand_in_for = "onnxruntime on the same graph"

    def __init__(self, path: Path, threads: int | None = None, *, eight_bits: bool = False) -> None:
        self._eight_bits = eight_bits
        super().__init__(path, threads)

    def _settle(self, options: Any) -> None:
        import onnxruntime as ort

        if self._eight_bits:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC

    @property
    def executed_precision(self) -> str:
        """What the file says."""
        return inside(self._path).precision

    @property
    def executed_ops(self) -> dict[str, int]:
        """What the file says."""
        return inside(self._path).ops


def gpu() -> bool:
    """Whether NVIDIA's driver is on this machine, by its devices; loads nothing."""
    return any(Path(device).exists() for device in DEVICES) or (os.name == "nt" and shutil.which("nvidia-smi") is not None)


def read_spec(path: Path) -> dict[str, Any]:
    """`build.json` of a file. Raises EdgekdError when it is missing or no such thing."""
    file = Path(path).with_suffix(".build.json")
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as e:
        raise EdgekdError(f"the description of how its engine is built cannot be read: {e}", where=file, hint="export the model again") from e


def _write_scheme(component: Component, target: Path, scheme: str, calibration: Any, tuning: Tuning) -> list[Path]:
    """The ONNX file of one scheme, and the file of its weights when they do not fit into one."""
    import onnx

    if scheme == "fp32":
        return OnnxExporter().export(component, target, scheme=scheme)
    source, floats = float_file(component), [layer for layer, kind in tuning.keep.items() if kind == "fp32"]
    if scheme == "fp16":
        made = convert(source, [*overflowing(source, calibration), *asked(onnx.load(source, load_external_data=False), floats)])
    else:
        with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
            file = Path(folder) / "int8.onnx"
            if tuning.quantizer:
                quantized = _modelopt.quantize(source, file, calibration, tuning, where=component.name)
            else:
                quantized = OnnxExporter().export(component, file, scheme="w8a8_static", calibration=calibration, qdq=QDQ, tuning=tuning)[0]
            made = convert_quantized(quantized, source, calibration, fp8=scheme == "fp8_static", floats=floats)
    return _write(made, target, large=sum(len(t.raw_data) for t in made.graph.initializer) > LARGE)


def _beside(component: Component, file: Path, scheme: str) -> list[Path]:
    """`build.json` and the script, from what the written file takes: an export may drop an input."""
    usual = {symbol: int(component.example[name].shape[axis]) for name, axes in component.dynamic.items() for axis, symbol in axes.items()}
    spec = build_spec(inside(file).inputs, file.name, scheme=scheme, usual=usual)
    described, shell = file.with_suffix(".build.json"), file.with_suffix(".build_engine.sh")
    write_json(described, spec)
    shell.write_text(script(spec), encoding="utf-8")
    shell.chmod(0o755)
    return [described, shell]


def _compiled(component: Component, path: Path, spec: Mapping[str, Any], found: Inside, details: Mapping[str, Any]) -> Check:
    """What TensorRT-RTX makes of the file."""
    told = call("edgekd.export._tensorrt_rtx:compile", {"file": str(path), "spec": dict(spec)}, minutes=MINUTES, what="TensorRT-RTX")
    if told.get("refused"):
        hint = "export it with --decoder-signature batched" if "shape tensor" in told["reason"] else HINT
        raise EdgekdError(told["reason"], where=component.name, hint=hint)
    generations = sorted(sm for engine in told["engines"] for sm in engine["sm"])
    how = (f"compiled by TensorRT-RTX {told['version']} for SM {', '.join(map(str, generations))}, which is not a Jetson engine (Orin is SM 87); "
           f"types are those of the parsed network")
    if told["quantize"] != found.quantize:
        raise EdgekdError(f"the file has {found.quantize} quantizing nodes, and TensorRT made {told['quantize']} layers of them", where=component.name)
    return Check("built", how, joined(told["arithmetic"]), told["layers"], {
        **details, "compiler": f"{RTX} {told['version']}", "engines": told["engines"], "layers": told["count"], "not_for": told["without"]})


exporter = TensorRtExporter()
