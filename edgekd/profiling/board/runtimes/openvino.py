"""OpenVINO IR on the CPU, in the precision that its scheme names: left to itself OpenVINO takes bf16 where the CPU has it."""
from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from ..job import Trouble
from . import Array, Facts, Session, first_line, module, of_numpy, typical

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ..job import Part

PRECISIONS = {"f32": "fp32", "bf16": "bf16", "f16": "fp16", "i8": "int8", "u8": "int8"}
ARITHMETIC = {"Convolution", "GroupConvolution", "FullyConnected", "MatMul", "Deconvolution", "ScaledDotProductAttention"}
SILENT = ("", "Input", "Output", "Const", "Constant")
HINT = "edgekd.hint"
"""rt_info key of a file of integers: what executes the rest, where it is not f32"""
PROFILED, PROFILED_S = 30, 10.0
"""runs with counters, the first of which is not counted, and seconds after which there are no more"""


def opened(part: Part, threads: int | None, tools: Mapping[str, str]) -> OpenVinoSession:
    """See `edgekd.profiling.board.runtimes`."""
    return OpenVinoSession(part, threads)


class OpenVinoSession(Session):
    """One request on one stream, for latency."""

    def __init__(self, part: Part, threads: int | None) -> None:
        self._ov, self._part = module("openvino"), part
        self._core = self._ov.Core()
        self.config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": self._hint(), "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
        if threads:
            self.config["INFERENCE_NUM_THREADS"] = threads
        self._compiled = self._compile(self.config)
        self._request = self._compiled.create_infer_request()
        takes = {name for i in self._compiled.inputs for name in i.names}
        self._feed = {name: value for name, value in part.arrays().items() if name in takes}

    def run(self) -> None:
        """One call."""
        self._request.infer(self._feed, share_inputs=True)

    def outputs(self) -> dict[str, Array]:
        """Of the last call."""
        return {o.any_name: of_numpy(self._request.get_output_tensor(i).data) for i, o in enumerate(self._compiled.outputs)}

    def facts(self) -> Facts:
        """From the compiled graph."""
        layers = [(kind, precision) for _, kind, precision in self._executed()]
        counted = Counter(PRECISIONS.get(precision, precision) for kind, precision in layers if kind in ARITHMETIC)
        told = "+".join(sorted(counted, key=lambda p: (p != "int8", -counted[p]))) or "fp32"
        asked = {"f32": "fp32", "f16": "fp16", "bf16": "bf16"}[self.config["INFERENCE_PRECISION_HINT"]]
        wanted = {"fp16": "fp16", "bf16": "bf16"}.get(self._part.scheme)
        away = [f"everything in {asked}: this CPU has no {wanted} arithmetic"] if wanted and wanted != asked else []
        return Facts(told, dict(Counter(f"{kind}:{precision}" for kind, precision in layers).most_common()), away)

    def layers(self) -> list[dict[str, Any]] | None:
        """From a second compilation with counters, which cost time."""
        compiled = self._compile({**self.config, "PERF_COUNT": True})
        request = compiled.create_infer_request()
        times: dict[str, list[float]] = {}
        last = []
        until = time.monotonic() + PROFILED_S
        for i in range(PROFILED):
            if i > 1 and time.monotonic() > until:
                break
            request.infer(self._feed, share_inputs=True)
            last = [info for info in request.get_profiling_info() if info.real_time.total_seconds() > 0]
            for info in last if i else []:
                times.setdefault(info.node_name, []).append(info.real_time.total_seconds() * 1e3)
        precisions = {name: PRECISIONS.get(precision, precision) for name, _, precision in self._executed()}
        return [{"name": i.node_name, "op": i.node_type, "ms": typical(times.get(i.node_name) or []), "precision": precisions.get(i.node_name)}
                for i in last]

    def _hint(self) -> str:
        scheme = self._part.scheme
        can = self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if scheme == "bf16" or self._written() == "bf16":
            if "BF16" not in can:
                raise Trouble(f"this CPU has no bf16 arithmetic for OpenVINO (it offers {', '.join(can)})", "use fp32 or w8a8_static")
            return "bf16"
        return "f16" if scheme == "fp16" and "FP16" in can else "f32"  # elsewhere f16 would become bf16, which is not what was asked

    def _written(self) -> str | None:
        """What a file of integers says that the rest is executed in."""
        if not self._part.scheme.startswith("w"):
            return None
        model = self._read()
        return str(model.get_rt_info([HINT]).astype(str)) if model.has_rt_info([HINT]) else None

    def _read(self) -> Any:
        try:
            return self._core.read_model(self._part.file)
        except RuntimeError as e:
            raise Trouble(f"OpenVINO cannot read the file: {_said(e)}", "export the model again, or update openvino on the board") from e

    def _compile(self, config: dict[str, Any]) -> Any:
        try:
            return self._core.compile_model(self._part.file, "CPU", config)
        except RuntimeError as e:
            raise Trouble(f"OpenVINO cannot open the file: {_said(e)}", "export the model again, or update openvino on the board") from e

    def _executed(self) -> Iterator[tuple[str, str, str]]:
        """(name, layer type, precision) of every layer that is executed."""
        for op in self._compiled.get_runtime_model().get_ordered_ops():
            info = op.get_rt_info()
            kind, precision, primitive = (str(info[k].astype(str)) if k in info else "" for k in ("layerType", "runtimePrecision", "primitiveType"))
            if precision == "f16":  # the plugin reports the weights' type there; its kernel's name ends in what it computes in
                precision = primitive.rsplit("_", 1)[-1]
            if kind not in SILENT:
                yield str(op.get_friendly_name()), kind, precision


def _said(error: RuntimeError) -> str:
    """The last line: those before say where in OpenVINO's own source."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else first_line(error)
