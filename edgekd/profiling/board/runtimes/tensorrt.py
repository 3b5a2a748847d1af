"""TensorRT by its own program, trtexec: an engine is built from the ONNX file once, kept beside it, and timed with the job's inputs.

What is timed is the latency that trtexec tells: copies to the GPU, computing and copies back, one call after the other, no CUDA graph. Where a
`.build.json` of edgekd lies beside the file it says how the engine is built (strongly typed); other files are built with the flags of their scheme.
"""
from __future__ import annotations

import json
import os
import re
import struct
from collections import Counter
from typing import TYPE_CHECKING, Any

from ..job import Trouble
from ..loop import MIN_SAMPLES, Samples
from . import Array, Facts, Session, missing, module, program
from .onnx import CPU, OnnxSession
from .programs import execute

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ..job import Part

FLAGS = {"fp32": ["--noTF32"], "fp16": ["--fp16"], "bf16": ["--bf16"], "fp8_static": ["--fp8", "--fp16"]}
INTEGER = ["--int8", "--fp16"]
"""of schemes with 8-bit integers, whose ranges are in the file"""
WARM_UP_MS = 500
BUILD_S, TIME_S = 3600.0, 600.0
VERSION = re.compile(r"\[TensorRT v(\d+)\]")
"""of its first line: 8601, 100300"""
LOADED = re.compile(r"Engine (?:loaded|deserialized) in ([\d.]+) sec")
WARMED = re.compile(r"Warmup completed (\d+) queries")
TRACED = re.compile(r"Timing trace has (\d+) queries over ([\d.]+) s")
TYPES = (("BF16", "bf16"), ("BFLOAT16", "bf16"), ("FP8", "fp8"), ("FP16", "fp16"), ("HALF", "fp16"), ("INT8", "i8"), ("FP32", "fp32"), ("FLOAT", "fp32"))
"""words in an engine's "Format/Datatype" -> ours; the first that is found counts"""
ARITHMETIC = re.compile(r"conv|gemm|matrix|matmul|fully|attention|mha|einsum", re.IGNORECASE)
MOVES = re.compile(r"reformat|noop|constant|shuffle|slice|shape|gather|concat|cast|copy|quantize|signal|wait", re.IGNORECASE)
PROVIDER = "TensorrtExecutionProvider"


def opened(part: Part, threads: int | None, tools: Mapping[str, str]) -> Session:
    """By trtexec; without it by onnxruntime where that is built with TensorRT."""
    if missing("tensorrt", tools) and not missing("onnx", tools) and PROVIDER in module("onnx").get_available_providers():
        return OnnxSession(part, threads, [PROVIDER, "CUDAExecutionProvider", CPU])
    return TrtexecSession(part, program("tensorrt", tools))


class TrtexecSession(Session):
    """An engine of its own file, `<component>.engine` beside it; `load_ms` is what trtexec says that loading it took."""

    times_itself = True
    notes = ("trtexec: times are of copies to the GPU, computing and copies back, without a CUDA graph; components are timed apart, and together is their sum",)
    load_ms: float | None = None

    def __init__(self, part: Part, trtexec: str) -> None:
        self._part, self._trtexec, self._folder = part, trtexec, os.path.dirname(part.file)
        self._engine = f"{os.path.basename(part.file)}.engine"
        self._spec = self._read_spec()
        self._shapes = self._dynamic()
        self._outputs: dict[str, Array] = {}
        self.versions: dict[str, str] = {}
        if not os.path.isfile(os.path.join(self._folder, self._engine)) or not os.path.isfile(self._at("layers.json")):
            self._build()

    def run(self) -> None:
        """One short process, whose outputs are kept."""
        self._time(["--iterations=1", "--duration=0", "--warmUp=0", f"--exportOutput={os.path.basename(self._at('outputs.json'))}"])
        self._outputs = {row["name"]: _array(row) for row in _load(self._at("outputs.json"))}

    def outputs(self) -> dict[str, Array]:
        """Of the last call; trtexec tells them as text, so that they are float32 here."""
        return self._outputs

    def samples(self, *, warmup: int, repeats: int, max_seconds: float, mode: str) -> Samples:
        """The latency of every call that trtexec timed."""
        told = [f"--iterations={repeats if mode == 'count' else MIN_SAMPLES}", f"--duration={0 if mode == 'count' else max_seconds:g}"]
        said = self._time([*told, f"--warmUp={WARM_UP_MS}", f"--exportTimes={os.path.basename(self._at('times.json'))}"]).text
        warmed = WARMED.search(said)
        try:
            values = [float(call["latencyMs"]) for call in _load(self._at("times.json"))]
        except (KeyError, TypeError, ValueError) as e:
            raise Trouble(f"these are not the times of trtexec: {e!r}", "use TensorRT 8.6 or newer") from e
        return Samples(values, int(warmed.group(1)) if warmed else 0, steady=True)

    def window(self, seconds: float) -> tuple[float, float, int] | None:
        """By the line that trtexec writes when its timed calls are done."""
        said = self._time([f"--duration={seconds:g}", f"--warmUp={WARM_UP_MS}"])
        for line, when in zip(said.lines, said.times):  # noqa: B905  Python 3.8
            traced = TRACED.search(line)
            if traced and int(traced.group(1)):
                return when - float(traced.group(2)), when, int(traced.group(1))
        return None

    def facts(self) -> Facts:
        """From the layers of the engine, which says the type each reads."""
        layers = self._layers()
        return Facts(precision(layers), dict(Counter(f"{kind}:{kept}" for _, kind, kept, _ in layers).most_common()))

    def layers(self) -> list[dict[str, Any]] | None:
        """Mean times from a run of their own: timing every layer slows the whole."""
        self._time([f"--exportProfile={os.path.basename(self._at('profile.json'))}", "--separateProfileRun", f"--warmUp={WARM_UP_MS}"])
        about = {name: (kind, kept) for name, kind, kept, _ in self._layers()}
        rows = [row for row in _load(self._at("profile.json")) if "name" in row]
        return [{"name": r["name"], "op": about.get(r["name"], ("?", ""))[0], "ms": float(r.get("medianMs", r["averageMs"])),
                 "precision": _ours(about.get(r["name"], ("?", "?"))[1])} for r in rows]

    def _build(self) -> None:
        part, spec = self._part, self._spec
        if spec:
            how = ["--stronglyTyped", "--noTF32", f"--memPoolSize=workspace:{int(spec.get('workspace_mib', 2048))}"]
            ranges = {kind: {n: s[kind] for n, s in spec.get("shapes", {}).items()} for kind in ("min", "opt", "max")}
        else:
            how = FLAGS.get(part.scheme, INTEGER if part.scheme.startswith("w8") else [])
            ranges = {kind: self._shapes for kind in ("min", "opt", "max")}
        shapes = [f"--{kind}Shapes={_spelled(named)}" for kind, named in ranges.items() if named]
        partly = f"{self._engine}.part"
        execute([self._trtexec, f"--onnx={os.path.basename(part.file)}", f"--saveEngine={partly}", *how, *shapes, "--profilingVerbosity=detailed",
                 f"--exportLayerInfo={os.path.basename(self._at('layers.json'))}", "--skipInference"], self._folder, timeout=BUILD_S)
        try:
            os.replace(os.path.join(self._folder, partly), os.path.join(self._folder, self._engine))
        except OSError as e:
            raise Trouble(f"trtexec ended well and wrote no engine: {e.strerror}", "is the disk full?") from e

    def _time(self, more: list[str]) -> Any:
        loads = ",".join(f"{i.name}:{os.path.relpath(i.file, self._folder)}" for i in self._part.inputs)
        shapes = [f"--shapes={_spelled(self._shapes)}"] if self._shapes else []
        said = execute([self._trtexec, f"--loadEngine={self._engine}", *shapes, f"--loadInputs={loads}", "--useSpinWait", *more], self._folder, timeout=TIME_S)
        took = [float(seconds) for seconds in LOADED.findall(said.text)]
        if took and self.load_ms is None:
            self.load_ms = sum(took) * 1e3
        version = VERSION.search(said.text)
        if version:
            self.versions["tensorrt"] = _version(version.group(1))
        return said

    def _dynamic(self) -> dict[str, list[int]]:
        """The shapes of the inputs that have an axis of any length, which trtexec has to be told. Raises Trouble for one beyond the engine's."""
        given = {i.name: i.shape for i in self._part.inputs}
        if not self._spec:
            return {i.name: i.shape for i in self._part.inputs if i.dynamic}
        for name, shape in self._spec.get("shapes", {}).items():
            for axis, n in enumerate(given.get(name, [])):
                if not shape["min"][axis] <= n <= shape["max"][axis]:
                    raise Trouble(f"the engine takes {shape['min'][axis]} to {shape['max'][axis]} along axis {axis} of {name}, and is given {n}", "ask for fewer")
        return {name: given[name] for name in self._spec.get("shapes", {}) if name in given}

    def _read_spec(self) -> dict[str, Any]:
        """What lies beside a file of ours; nothing for others."""
        path = os.path.splitext(self._part.file)[0] + ".build.json"
        return dict(_load(path)) if os.path.isfile(path) else {}

    def _layers(self) -> list[tuple[str, str, str, str]]:
        """(name, kind, type of what it reads, tactic) of the engine's layers."""
        rows = _load(self._at("layers.json")).get("Layers") or []
        if not rows or not all(isinstance(row, dict) for row in rows):
            raise Trouble("the engine does not say what its layers compute in", "remove it: it is built again")
        return [(str(r.get("Name", "")), str(r.get("ParameterType") or r.get("LayerType") or "?"), _type(r), str(r.get("TacticName") or "")) for r in rows]

    def _at(self, name: str) -> str:
        return os.path.join(self._folder, f"{self._engine}.{name}")


def precision(layers: Iterable[tuple[str, str, str, str]]) -> str:
    """Of the layers that carry the arithmetic: `fp16`, `int8+fp16`; of an engine whose layers are all fused under other names, of all that compute."""
    found = list(layers)
    carrying = [one for one in found if ARITHMETIC.search(one[1]) or ARITHMETIC.search(one[3])]
    counted = Counter(kept for _, _, kept, _ in carrying or [one for one in found if not MOVES.search(one[1])] if kept != "?")
    ordered = sorted(counted, key=lambda kind: (kind not in ("i8", "fp8"), -counted[kind]))
    return "+".join(str(_ours(kind)) for kind in ordered) or "fp32"


def _ours(kind: str) -> str | None:
    return None if kind == "?" else "int8" if kind == "i8" else kind


def _type(row: Mapping[str, Any]) -> str:
    """The type of the first tensor a layer reads, or writes where it reads none."""
    for tensor in [*(row.get("Inputs") or []), *(row.get("Outputs") or [])]:
        said = str(tensor.get("Format/Datatype", "")).upper()
        found = next((ours for word, ours in TYPES if word in said), None)
        if found:
            return found
    return "?"


def _version(digits: str) -> str:
    """`100300` -> 10.3.0, `8601` -> 8.6.1: two digits each for what comes after the first number; up to 8 it is one, one and two."""
    if len(digits) <= 4:
        return f"{digits[0]}.{digits[1]}.{int(digits[2:] or 0)}"
    return f"{digits[:-4]}.{int(digits[-4:-2])}.{int(digits[-2:])}"


def _array(row: Mapping[str, Any]) -> Array:
    values = [float(v) for v in row["values"]]
    return Array("float32", [int(n) for n in str(row["dimensions"]).split("x") if n], struct.pack(f"<{len(values)}f", *values))


def _spelled(shapes: Mapping[str, Iterable[int]]) -> str:
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())


def _load(path: str) -> Any:
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except (OSError, ValueError) as e:
        raise Trouble(f"trtexec's output cannot be read: {e}", "use TensorRT 8.6 or newer") from e
