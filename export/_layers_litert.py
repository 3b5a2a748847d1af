"""What every operator of a `.tflite` file takes in LiteRT on the CPU, with XNNPACK.

The Python interpreter tells no times; the C library beside it does, when a model is compiled with profiling. It is called through ctypes, in a process of its
own: another version may lay out an event differently. XNNPACK calls its kernels by kind and number, in the order of the file's operators: `_layers.aligned`.
"""
from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.export._child import call
from edgekd.export._layers import HAS_WEIGHTS, WARMUP, Rows, aligned, together
from edgekd.export._litert_graph import LAYER, PLACE, PRECISIONS, TYPES, tag

from edgekd.errors import EdgekdError, first_line

if TYPE_CHECKING:
    import numpy as np

RUNTIME, CPU = b"runtime_options_string", b"xnnpack"
"""names of option groups, each a line of TOML"""
ON_CPU = 1
OPERATOR, INSIDE = 2, 8
"""kinds of events: an operator of the file, and one that a delegate computes"""
NEEDS = "ai-edge-litert 2.3 tells them"
Pointer = ctypes.c_void_p


class _Event(ctypes.Structure):
    _fields_ = [("tag", ctypes.c_char_p), ("kind", ctypes.c_int), ("start_us", ctypes.c_uint64), ("us", ctypes.c_uint64), ("memory", ctypes.c_int64 * 6),
                ("place", ctypes.c_uint64), ("more", ctypes.c_uint64), ("source", ctypes.c_int)]


class _Library:
    """LiteRT's C functions. Each returns 0 or fails."""

    def __init__(self) -> None:
        import ai_edge_litert

        try:
            self._library = ctypes.CDLL(str(Path(str(ai_edge_litert.__file__)).parent / "libLiteRt.so"))
            self._library.LiteRtGetProfilerEvents  # noqa: B018  older versions have none
        except (OSError, AttributeError) as e:
            raise EdgekdError(f"this version of LiteRT tells no times of single operators: {first_line(e)}", hint=NEEDS) from e

    def __call__(self, name: str, *arguments: Any) -> None:
        if status := getattr(self._library, name)(*arguments):
            raise EdgekdError(f"LiteRT's {name} fails with status {status}", hint=NEEDS)

    def made(self, name: str, *arguments: Any) -> ctypes.c_void_p:
        """The last argument is what is written to."""
        found = Pointer()
        self(name, *arguments, ctypes.byref(found))
        return found


def trace(path: str, inputs: str, threads: int | None, repeats: int) -> dict[str, Any]:
    """In a process of its own: `{"runs": [[[kernel, place, whether a delegate computes it, ms], ...], ...]}`. `inputs`: an `.npz` of the file's inputs."""
    import numpy as np

    lite, given = _Library(), np.load(inputs)
    environment = lite.made("LiteRtCreateEnvironment", 0, None)
    model = lite.made("LiteRtCreateModelFromFile", environment, path.encode())
    options = lite.made("LiteRtCreateOptions")
    lite("LiteRtSetOptionsHardwareAccelerators", options, ON_CPU)
    keep = [_add(lite, options, RUNTIME, b"enable_profiling = true\n"), *([_add(lite, options, CPU, b"num_threads = %d\n" % threads)] if threads else [])]
    compiled = lite.made("LiteRtCreateCompiledModel", environment, model, options)
    profiler = lite.made("LiteRtCompiledModelGetProfiler", compiled)
    signature = lite.made("LiteRtGetModelSignature", model, ctypes.c_size_t(0))
    buffers = [_buffers(lite, environment, compiled, signature, kind) for kind in ("Input", "Output")]
    for name, buffer in buffers[0].items():
        address, value = lite.made("LiteRtGetTensorBufferHostMemory", Pointer(buffer)), np.ascontiguousarray(given[name])
        ctypes.memmove(address, value.ctypes.data, value.nbytes)
    arrays = [(Pointer * len(b))(*b.values()) for b in buffers]
    runs = []
    for i in range(WARMUP + repeats):
        if i >= WARMUP:
            lite("LiteRtStartProfiler", profiler)
        lite("LiteRtRunCompiledModel", compiled, ctypes.c_size_t(0), ctypes.c_size_t(len(arrays[0])), arrays[0], ctypes.c_size_t(len(arrays[1])), arrays[1])
        if i >= WARMUP:
            lite("LiteRtStopProfiler", profiler)
            runs.append(_events(lite, profiler))
            lite("LiteRtResetProfiler", profiler)
    del keep
    return {"runs": runs}


def _add(lite: _Library, options: Any, group: bytes, text: bytes) -> Any:
    """Set options; what is returned must live as long as they do."""
    held, free = ctypes.create_string_buffer(text), ctypes.CFUNCTYPE(None, Pointer)(lambda _: None)
    lite("LiteRtAddOpaqueOptions", options, lite.made("LiteRtCreateOpaqueOptions", group, held, free))
    return held, free


def _buffers(lite: _Library, environment: Any, compiled: Any, signature: Any, kind: str) -> dict[str, Any]:
    """Name -> a buffer as the compiled model wants it, for all inputs or outputs."""
    count, found = ctypes.c_size_t(), dict[str, Any]()
    lite(f"LiteRtGetNumSignature{kind}s", signature, ctypes.byref(count))
    for i in map(ctypes.c_size_t, range(count.value)):
        tensor_type, name = (ctypes.c_byte * 1024)(), ctypes.c_char_p()
        lite("LiteRtGetRankedTensorType", lite.made(f"LiteRtGetSignature{kind}TensorByIndex", signature, i), tensor_type)
        lite(f"LiteRtGetSignature{kind}Name", signature, i, ctypes.byref(name))
        needs = lite.made(f"LiteRtGetCompiledModel{kind}BufferRequirements", compiled, ctypes.c_size_t(0), i)
        found[(name.value or b"").decode()] = lite.made("LiteRtCreateManagedTensorBufferFromRequirements", environment, tensor_type, needs).value
    return found


def _events(lite: _Library, profiler: Any) -> list[tuple[str, int, bool, float]]:
    count = ctypes.c_int()
    lite("LiteRtGetNumProfilerEvents", profiler, ctypes.byref(count))
    events = (_Event * count.value)()
    lite("LiteRtGetProfilerEvents", profiler, count, events)
    return [((e.tag or b"").decode(), int(e.place), e.kind == INSIDE, e.us / 1e3) for e in events if e.kind in (OPERATOR, INSIDE)]


def rows(runs: list[list[tuple[str, int, bool, float]]], operators: list[dict[str, Any]]) -> Rows:
    """Of what `trace` found, and `{"name", "kind", "tag", "inside"}` of the file's operators in their order."""
    times = together({f"{place} {name} {inside}": ms for name, place, inside, ms in run} for run in runs)
    kernels = [(name, place, inside) for name, place, inside, _ in runs[-1]] if runs else []
    taken = [i for i, o in enumerate(operators) if o["inside"]]
    match = aligned([name for name, _, inside in kernels if inside], [operators[i]["kind"] for i in taken])
    found, number = [], 0
    for name, place, inside in kernels:
        operator = operators[taken[match[number]]] if inside and number in match else operators[place] if not inside and place < len(operators) else None
        number += inside
        precision = PRECISIONS.get(operator["tag"], operator["tag"]) if operator else _typed(name)
        found.append({"name": f"{name}:{place}", "op": operator["kind"] if operator else name.split(" (")[0], "ms": times[f"{place} {name} {inside}"], "precision": precision,
                      "covers": [operator["name"]] if operator else []})
    return found


def _typed(kernel: str) -> str | None:
    """Of `Convolution (NHWC, F32) IGEMM`."""
    return next((ours for theirs, ours in (("F32", "fp32"), ("F16", "fp16"), ("QC8", "int8"), ("QS8", "int8"), ("QU8", "int8"), ("QD8", "int8")) if theirs in kernel), None)


def operators(interpreter: Any, inside: set[int]) -> list[dict[str, Any]]:
    """The operators of the graph in their order; a name is that of what it writes, behind its number."""
    about = {int(t["index"]): t for t in interpreter.get_tensor_details()}

    def types(tensors: Any) -> list[str]:
        return [TYPES.get(kind := about[int(t)]["dtype"].__name__.rstrip("_"), kind) for t in tensors if int(t) in about]

    plain = [n for n in interpreter._get_ops_details() if n["op_name"] != "DELEGATE"]
    return [{"name": f"{n['index']}:{about[int(n['outputs'][0])]['name']}", "kind": str(n["op_name"]), "inside": int(n["index"]) in inside,
             "tag": tag(str(n["op_name"]), types(n["inputs"]), types(n["outputs"])),
             "weight": about[int(n["inputs"][1])]["name"] if n["op_name"] in HAS_WEIGHTS else ""} for n in plain]


def modules(found: list[dict[str, Any]]) -> dict[str, str]:
    """Name of an operator -> its module: that of its weight, else what the name of its output says; "" is the whole model."""
    named = {}
    for one in found:
        paths = [p for text in (one["weight"], one["name"].partition(":")[2]) for p in _paths(text)]
        if paths or PLACE in one["name"]:
            named[one["name"]] = paths[0].removeprefix("model.") if paths else ""
    return named


def _paths(text: str) -> list[str]:
    """Modules in the name of a tensor, layers with weights first."""
    parts = text.split(";")
    return [p.removeprefix(prefix) for prefix in (LAYER, PLACE) for p in parts if p.startswith(prefix) and p != prefix]


def layers(path: Path, inputs: Mapping[str, np.ndarray], threads: int | None, repeats: int, found: list[dict[str, Any]]) -> Rows:
    """See `edgekd.protocols.Facts.layers`; `found` are the file's operators."""
    import numpy as np

    with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
        given: dict[str, Any] = dict(inputs)
        np.savez(Path(folder) / "inputs.npz", **given)
        request = {"path": str(path), "inputs": str(Path(folder) / "inputs.npz"), "threads": threads, "repeats": repeats}
        answer = call("edgekd.export._layers_litert:trace", request, minutes=10, what="LiteRT")
    return rows(answer["runs"], found)
