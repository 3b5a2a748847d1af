"""ONNX files in onnxruntime: on CUDA where it is built with it, else on the CPU. What was executed is read from onnxruntime's own profile of a run."""
from __future__ import annotations

import json
import os
import tempfile
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from ..job import Trouble
from . import Array, Facts, Session, first_line, module, of_numpy, typical

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..job import Part

INTEGER_OPS = {"QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QGemm",
               "DynamicQuantizeLSTM", "QAttention"}
FLOAT_OPS = {"Conv", "FusedConv", "ConvTranspose", "MatMul", "Gemm", "FusedMatMul", "FusedGemm", "Attention", "MultiHeadAttention"}
TYPES = {"float": "fp32", "float16": "fp16", "bfloat16": "bf16", "int8": "int8", "uint8": "int8"}
CPU = "CPUExecutionProvider"
PREFERRED = ("CUDAExecutionProvider", CPU)
"""The TensorRT provider is taken for files of the format `tensorrt` only: it builds engines when it opens a file."""
PROFILED, PROFILED_S = 30, 10.0
"""runs under the profiler, of which the first is not counted, and seconds after which there are no more"""


def opened(part: Part, threads: int | None, tools: Mapping[str, str]) -> OnnxSession:
    """See `edgekd.profiling.board.runtimes`."""
    return OnnxSession(part, threads)


class OnnxSession(Session):
    """`run` returns when the outputs are in the CPU's memory, so that there is nothing to wait for on a GPU either."""

    def __init__(self, part: Part, threads: int | None, providers: Sequence[str] | None = None) -> None:
        self._ort, self._part, self._threads = module("onnx"), part, threads
        offered = self._ort.get_available_providers()
        asked = list(providers or part.providers or PREFERRED)
        self.providers = [p for p in asked if p in offered]
        if not self.providers:
            raise Trouble(f"onnxruntime has none of {', '.join(asked)} here; it has {', '.join(offered)}", "install onnxruntime-gpu, or ask for one it has")
        self._session = self._start()
        used = self._session.get_providers()
        if self.providers[0] not in used:  # onnxruntime prints a line and goes on with the CPU
            raise Trouble(f"onnxruntime took {used[0]} where {self.providers[0]} was asked for", "look at what it says on the board: a library of CUDA is missing")
        takes = {i.name for i in self._session.get_inputs()}
        self._feed = {name: value for name, value in part.arrays().items() if name in takes}
        self._names = [o.name for o in self._session.get_outputs()]
        self._last: list[Any] = []
        self._events: list[dict[str, Any]] | None = None
        gpu = self.providers[0] != CPU
        self.notes = [f"onnxruntime by {self.providers[0]}" + (": times include the copies to the GPU and back" if gpu else "")] if gpu else []

    def run(self) -> None:
        """One call."""
        self._last = self._session.run(self._names, self._feed)

    def outputs(self) -> dict[str, Array]:
        """Of the last call."""
        return {name: of_numpy(value) for name, value in zip(self._names, self._last)}  # noqa: B905  Python 3.8

    def facts(self) -> Facts:
        """From one profiled run: which operator ran where, on what types."""
        nodes = self._nodes()
        main = self.providers[0]
        away = [f"{name} ({kind}) on {provider}" for name, kind, provider, _ in nodes if provider != main] if main != CPU else []
        return Facts(precision((kind, types) for _, kind, _, types in nodes), dict(Counter(kind for _, kind, _, _ in nodes).most_common()), away)

    def layers(self) -> list[dict[str, Any]] | None:
        """Over the profiled runs but the first."""
        runs = self._runs()
        times: dict[tuple[str, str], list[float]] = {}
        for run in runs[1:] or runs:
            for event in run:
                times.setdefault(_key(event), []).append(event["dur"] / 1e3)
        return [{"name": _name(e), "op": e["args"]["op_name"], "ms": typical(times[_key(e)]), "precision": _computed(e)} for e in runs[-1]]

    def model_run_ms(self) -> list[float]:
        """onnxruntime's own figure of whole runs, from its profile."""
        self._runs()
        return [e["dur"] / 1e3 for e in self._events or [] if e.get("name") == "model_run"]

    def _nodes(self) -> list[tuple[str, str, str, list[str]]]:
        """(name, operator, provider, types of its inputs) of everything in one run."""
        return [(_name(e), e["args"]["op_name"], e["args"].get("provider", CPU), _types(e)) for e in self._runs()[-1]]

    def _runs(self) -> list[list[dict[str, Any]]]:
        """The operators of every profiled run, in their order."""
        if self._events is None:
            with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
                session = self._start(os.path.join(folder, "profile"))
                until = time.monotonic() + PROFILED_S
                for i in range(PROFILED):
                    if i < 2 or time.monotonic() < until:
                        session.run(self._names, self._feed)
                with open(session.end_profiling(), encoding="utf-8") as f:
                    self._events = json.load(f)
        runs: list[list[dict[str, Any]]] = [[]]
        for event in self._events or []:
            if event.get("cat") == "Node" and str(event.get("name", "")).endswith("_kernel_time") and "op_name" in event.get("args", {}):
                runs[-1].append(event)
            elif event.get("name") == "model_run":
                runs.append([])
        found = [run for run in runs if run]
        if not found:
            raise Trouble("onnxruntime's profile names no operator", "another version of onnxruntime may")
        return found

    def _start(self, profile: str | None = None) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads, options.inter_op_num_threads = self._threads or 0, 1
        if profile:
            options.enable_profiling, options.profile_file_prefix = True, profile
        try:
            return self._ort.InferenceSession(self._part.file, options, providers=self.providers)
        except Exception as e:  # onnxruntime's exceptions share no base class
            raise Trouble(f"onnxruntime cannot open the file: {first_line(e)}", "the version on the board may be older than the file: export it again, or "
                          "update onnxruntime there") from e


def precision(nodes: Any) -> str:
    """`fp32`, `fp16`, `int8`, or e.g. `int8+fp32` when arithmetic of both kinds is left; of (operator, types of its inputs)."""
    told = list(nodes)
    floats = [TYPES.get(types[1], types[1]) for kind, types in told if kind in FLOAT_OPS and len(types) > 1]
    found = [("int8", any(kind in INTEGER_OPS for kind, _ in told)), ("fp16", "fp16" in floats), ("bf16", "bf16" in floats)]
    rest = any(f not in ("fp16", "bf16") for f in floats) or not any(there for _, there in found)
    return "+".join([name for name, there in found if there] + (["fp32"] if rest else []))


def _types(event: Mapping[str, Any]) -> list[str]:
    return [next(iter(t)) for t in event["args"].get("input_type_shape") or [] if t]


def _computed(event: Mapping[str, Any]) -> str | None:
    types = _types(event)
    if event["args"]["op_name"] in INTEGER_OPS:
        return "int8"
    return next((TYPES[t] for t in types if t in TYPES), None)


def _name(event: Mapping[str, Any]) -> str:
    name = str(event["name"])
    return name[:-len("_kernel_time")]


def _key(event: Mapping[str, Any]) -> tuple[str, str]:
    return _name(event), str(event["args"].get("node_index", ""))
