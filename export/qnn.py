"""Qualcomm's HTP, the NPU of Snapdragon chips, through onnxruntime's QNN provider: a graph, and the same compiled ahead of time for one chip.

    fp16           the ONNX graph in fp16, which is all that the HTP computes floats in; refused where tensors leave its range on real inputs
    w8a8_static    QDQ, 8-bit weights and activations; softmax and normalisation of layers stay in fp16
    w8a16_static   QDQ, 8-bit weights, 16-bit activations

    encoder.qnn.onnx         the graph, for any HTP: the provider compiles it on the device, which takes long
    encoder.htp75.onnx       an ONNX file around the binary beside it, for `htp_arch` 75, `soc_model` 57 (Snapdragon 8 Gen 3); opens at once
    encoder.htp75_qnn.bin

Both run with `onnxruntime` and `onnxruntime-qnn` on the device. Here the compiled file runs in the vendor's simulator, which is exact and slow.
What the HTP left to the CPU is told of every file: quantizing a graph's inputs and outputs is by default, anything else is worth a look.
"""
from __future__ import annotations

import json
import os
import platform
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from edgekd.export import _child
from edgekd.export._half import convert, overflowing
from edgekd.export._qnn_quantize import multiplications, quantize
from edgekd.export._qnn_simulator import Simulator
from edgekd.export.onnx import OnnxSession, float_file, is_large

from edgekd.errors import CannotTake, EdgekdError, UsageError, unknown
from edgekd.protocols import Availability, Check, Component, Facts, Session, package_version

BITS = {"w8a8_static": 8, "w8a16_static": 16}
FIX = 'pip install "edgekd[qnn]"'
BUILD_MINUTES, LOAD_MINUTES = 30.0, 5.0
REPORT = "edgekd.qnn"
"""metadata key of a compiled file: what its compiler told, as JSON"""
SIMULATED = 30_000_000
"""Multiply-adds a call up to which the simulator stands in for the chip: it takes a second or two for that many, on one core"""
ARITHMETIC = {"Conv2d", "DepthWiseConv2d", "TransposeConv2d", "FullyConnected", "MatMul"}
PRECISIONS = {"u8": "int8", "i8": "int8", "u16": "int16", "i16": "int16", "f16": "fp16"}
WHEELS = {("Linux", "x86_64"), ("Windows", "AMD64"), ("Windows", "ARM64")}


class QnnExporter(Facts):
    """See `edgekd.protocols.Exporter`.

    Args:
        htp_arch: the version of the HTP that is compiled for (68, 69, 73, 75, 81): a binary of it runs there only.
        soc_model: Qualcomm's number of the chip; it decides the memory on it that the compiler counts on. 57 is SM8650, Snapdragon 8 Gen 3.
    """

    format = "qnn"
    suffix = ".qnn.onnx"
    extra: str | None = "qnn"
    schemes: tuple[str, ...] = ("fp16", *BITS)
    fixed_shapes = True

    def __init__(self, htp_arch: int = 75, soc_model: int = 57) -> None:
        self.htp_arch, self.soc_model = htp_arch, soc_model

    def availability(self) -> Availability:
        """Whether onnxruntime-qnn is installed. What it writes runs on a Snapdragon."""
        if (platform.system(), platform.machine()) not in WHEELS:
            return Availability(False, reason=f"onnxruntime-qnn has no wheel for {platform.system()} on {platform.machine()}",
                                fix=f"on Linux x86-64 or Windows: {FIX}", runs=False)
        missing = [p for p in ("onnx", "onnxruntime", "onnxscript", "onnxslim", "onnxruntime-qnn") if not package_version(p)]
        if missing:
            return Availability(False, reason=f"not installed: {', '.join(missing)}", fix=FIX, runs=False)
        return Availability(True, version=f"onnxruntime-qnn {package_version('onnxruntime-qnn')}", runs=False,
                            reason="it runs on the HTP of a Snapdragon chip", fix="on the device: pip install onnxruntime-qnn")

    def export(self, component: Component, path: Path, *, scheme: str, calibration: Any = None, qdq: str = "u8s8") -> list[Path]:
        """Write the graph at `path` and its compiled form beside it (see `edgekd.protocols.Exporter.export`). The style of QDQ is QNN's own.

        Raises:
            CannotTake: the component's axes vary.
            EdgekdError: the HTP takes no node of it, or its values leave fp16's range.
        """
        if scheme not in self.schemes:
            raise unknown("qnn scheme", scheme, self.schemes)
        if calibration is None:
            raise UsageError(f"{scheme} needs calibration images", where=component.name, hint="give a folder of images with --data")
        if component.dynamic:
            raise CannotTake("the HTP takes no axes of varying length", where=component.name, hint="export component.fixed()")
        if is_large(component):
            raise EdgekdError("its weights do not fit into one ONNX file of 2 GB", where=component.name, hint="a smaller model, or the format onnx")
        source, path = float_file(component), Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.stem}.", dir=path.parent) as folder:
            graph, compiled = Path(folder) / path.name, Path(folder) / self._compiled(path).name
            if scheme == "fp16":
                _half(source, graph, calibration, component.name)
            else:
                quantize(source, graph, calibration, bits=BITS[scheme], where=component.name)
            self._compile(graph, compiled, source, component.name)
            files = self.files(graph)
            for file in files[::-1]:  # the graph, which makes it a model, last
                os.replace(file, path.with_name(file.name))
        return [path.with_name(f.name) for f in files]

    def open(self, path: Path, *, scheme: str, threads: int | None = None) -> Session:
        """Raises EdgekdError: this machine has no HTP."""
        raise EdgekdError("a file of 'qnn' runs on the HTP of a Snapdragon chip, and this machine has none", where=path,
                          hint="on the device: pip install onnxruntime-qnn, and open it as examples/consumers/qnn_click.py does")

    def files(self, path: Path) -> list[Path]:
        """The graph, its compiled form and the binaries of that."""
        compiled = self._compiled(path)
        return [Path(path), *([compiled] if compiled.is_file() else []), *sorted(compiled.parent.glob(f"{compiled.stem}*.bin"))]

    def check(self, component: Component, path: Path, *, scheme: str) -> Check:
        """What the compiler told of the file, after opening what it wrote; how many nodes it left on the CPU, and which."""
        compiled = self._compiled(path)
        report, graph = _report(compiled), _skeleton(compiled).graph
        found = {"inputs": [i.name for i in graph.input], "outputs": [o.name for o in graph.output]}
        if not set(found["inputs"]) <= set(component.example) or found["outputs"] != list(component.outputs):
            raise EdgekdError(f"the compiled file has inputs {found['inputs']} and outputs {found['outputs']}", where=compiled, hint="export the model again")
        _child.call("edgekd.export._qnn:load", {"context": str(compiled)}, minutes=LOAD_MINUTES, what="the QNN provider")
        kinds = Counter(node.op_type for node in graph.node if node.op_type != "EPContext")
        left = f"{sum(kinds.values())} of {report['htp'] + sum(kinds.values())} nodes left on the CPU"
        if kinds:
            left += ": " + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        sdk = next((a.s.decode().removeprefix("v") for n in graph.node for a in n.attribute if a.name == "ep_sdk_version"), "unknown")
        how = f"compiled for HTP v{report['htp_arch']}, SoC {report['soc_model']} by QAIRT {sdk} of onnxruntime-qnn {package_version('onnxruntime-qnn')}; {left}"
        return Check("built", how, precision(report["ops"]), report["ops"], details={
            "nodes_on_htp": report["htp"], "nodes_on_cpu": dict(kinds), "names_on_cpu": [name for _, name in report["cpu"]],
            "partitions": report["partitions"], "multiply_adds": report["multiply_adds"], "htp_arch": report["htp_arch"], "soc_model": report["soc_model"]})

    def stand_in(self, path: Path, *, scheme: str, threads: int | None = None) -> Session:
        """The simulator on the compiled file up to `SIMULATED` multiply-adds a call, beyond that onnxruntime's CPU on the graph."""
        report = _report(self._compiled(path))
        if report["multiply_adds"] <= SIMULATED:
            return Simulator(self._compiled(path), precision(report["ops"]), report["ops"])
        return OnCpu(Path(path), threads)

    def _compiled(self, path: Path) -> Path:
        """The compiled form of the graph at `path`."""
        path = Path(path)
        return path.with_name(f"{path.name.removesuffix(self.suffix).removesuffix('.onnx')}.htp{self.htp_arch}.onnx")

    def _compile(self, graph: Path, compiled: Path, source: Path, where: str) -> None:
        import onnx

        report = _child.call("edgekd.export._qnn:build", {"graph": str(graph), "context": str(compiled), "htp_arch": self.htp_arch, "soc_model": self.soc_model},
                             minutes=BUILD_MINUTES, what="the QNN compiler")
        if not report["htp"] or not compiled.is_file():
            kinds = ", ".join(f"{n} {kind}" for kind, n in Counter(kind for kind, _ in report["cpu"]).most_common(6))
            raise EdgekdError(f"the HTP takes none of its {len(report['cpu'])} nodes: {kinds}", where=where, hint="another scheme, or the format onnx")
        model = onnx.load(compiled, load_external_data=False)
        float_graph = onnx.shape_inference.infer_shapes(onnx.load(source)).graph
        told = report | {"multiply_adds": multiplications(float_graph), "htp_arch": self.htp_arch, "soc_model": self.soc_model}
        onnx.helper.set_model_props(model, {p.key: p.value for p in model.metadata_props} | {REPORT: json.dumps(told)})
        onnx.save(model, compiled)


class OnCpu(OnnxSession):
    """The graph that the device compiles, for what is too large to simulate."""

    stand_in_for = "onnxruntime's CPU on the graph that the HTP was compiled from"


def precision(ops: dict[str, int]) -> str:
    """Of the operators that carry the arithmetic: `int8`, `fp16`, or e.g. `int8+fp16`."""
    found: Counter[str] = Counter()
    for op, count in ops.items():
        kind, _, type = op.partition(":")
        if kind in ARITHMETIC:
            found[PRECISIONS.get(type, type)] += count
    return "+".join(sorted(found, key=lambda p: (not p.startswith("int"), -found[p]))) or "fp16"


def _half(source: Path, target: Path, samples: Iterable[Any], where: str) -> None:
    """Write the graph in fp16. Raises EdgekdError when `samples` leave its range somewhere: there is nothing wider on the HTP to keep it in.

    Sums of squares inside of a normalisation do not count (the simulator gets them right), nor do angles: they lose digits, which parity judges.
    """
    import onnx

    too_large = [k for k in overflowing(source, samples) if " reaches " in k.why]
    if too_large:
        raise EdgekdError(f"its values leave fp16's range, and the HTP has no wider float: {too_large[0].layer} ({too_large[0].why})"
                          + (f" and {len(too_large) - 1} more" if len(too_large) > 1 else ""), where=where, hint="use w8a16_static")
    onnx.save(convert(source, []), target)


def _skeleton(file: Path) -> Any:
    """A graph without its weights."""
    import onnx

    try:
        return onnx.load(file, load_external_data=False)
    except Exception as e:  # a missing file and a damaged one raise different kinds
        raise EdgekdError("the compiled file is missing or damaged", where=file, hint="export the model again") from e


def _report(compiled: Path) -> dict[str, Any]:
    """What its compiler told of a file."""
    found = next((p.value for p in _skeleton(compiled).metadata_props if p.key == REPORT), None)
    if found is None:
        raise EdgekdError("the compiled file does not say what its compiler told", where=compiled, hint="export the model again")
    return dict(json.loads(found))


exporter = QnnExporter()
