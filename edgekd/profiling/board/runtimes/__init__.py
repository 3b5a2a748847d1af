"""The runtimes a board may have, each behind one contract: `opened(part, threads, tools) -> Session`, in a file named after its format.

Nothing is imported before a file of its format is opened. Times are those of one call with inputs and outputs in the CPU's memory; where a runtime
copies them to another device and back, that is part of the time, and its `notes` say so.
"""
from __future__ import annotations

import importlib
import os
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..job import Trouble

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ..job import Part
    from ..loop import Samples

MODULES = {
    "onnx": ("onnxruntime",), "openvino": ("openvino",), "litert": ("ai_edge_litert.interpreter", "tflite_runtime.interpreter", "tensorflow.lite"),
    "executorch": ("executorch.runtime",), "ncnn": ("ncnn",), "tensorrt": ()}
"""format -> the Python modules that run it, the first that is there"""
PROGRAMS = {"tensorrt": "trtexec", "executorch": "executor_runner"}
"""format -> the program that runs it where no module does"""
PLACES = {"trtexec": ("/usr/src/tensorrt/bin/trtexec", "/usr/local/tensorrt/bin/trtexec", "/opt/tensorrt/bin/trtexec")}
"""program -> where it is besides on the PATH; JetPack has it on none"""
PACKAGES = {"onnx": ("onnxruntime", "onnxruntime-gpu"), "openvino": ("openvino",), "litert": ("ai-edge-litert", "tflite-runtime", "tensorflow"),
            "executorch": ("executorch",), "ncnn": ("ncnn",), "tensorrt": ("tensorrt",)}
"""format -> packages whose versions are told"""


@dataclass
class Array:
    """An output: numpy's name of its type, its shape, and its numbers, little-endian in C order."""

    dtype: str
    shape: list[int]
    data: bytes


@dataclass
class Facts:
    """What the runtime says that it executes; None and nothing where it does not say and the file decides.

    Args:
        precision: of the operators that carry the arithmetic: `fp32`, `int8+fp32`.
        ops: operator -> how many.
        fell_back: operators that did not run where they were meant to, with what they ran on.
    """

    precision: str | None = None
    ops: dict[str, int] = field(default_factory=dict)
    fell_back: list[str] = field(default_factory=list)


class Session:
    """A component, opened with its inputs in memory. What a runtime does not tell it leaves as it is here."""

    notes: Sequence[str] = ()
    versions: Mapping[str, str] = {}
    """Of what is no Python package."""
    synchronise: Callable[[], object] | None = None
    times_itself = False
    """Whether `samples` is asked instead of `run` being timed."""
    load_ms: float | None = None
    """Where opening is more than loading."""

    def run(self) -> None:
        """One call."""
        raise NotImplementedError

    def outputs(self) -> dict[str, Array]:
        """What the last call gave, by name."""
        raise NotImplementedError

    def facts(self) -> Facts:
        """What is executed."""
        return Facts()

    def layers(self) -> list[dict[str, Any]] | None:
        """`{"name", "op", "ms", "precision"}` of every operator in its order, `typical` of several runs; None where the runtime does not tell."""
        return None

    def samples(self, *, warmup: int, repeats: int, max_seconds: float, mode: str) -> Samples:
        """Of a session that times itself."""
        raise NotImplementedError

    def window(self, seconds: float) -> tuple[float, float, int] | None:
        """Of a session that times itself: it runs for `seconds`; `time.monotonic()` when that began and ended, and how many calls it was."""
        return None

    def close(self) -> None:
        """Give back what it holds."""


def open_part(part: Part, threads: int | None, tools: Mapping[str, str]) -> Session:
    """The session of a component.

    Raises:
        Trouble: its runtime is not here, or refuses the file.
    """
    if part.format not in MODULES:
        raise Trouble(f"no runtime for files of the format '{part.format}' is known to this runner", f"known are {', '.join(MODULES)}")
    found: Session = importlib.import_module(f".{part.format}", __name__).opened(part, threads, tools)
    return found


def module(format: str) -> Any:
    """The runtime's module. Raises Trouble, with what to install, where none is here."""
    said = ""
    for name in MODULES[format]:
        try:
            return importlib.import_module(name)
        except Exception as e:  # a broken installation raises anything
            said = said or f"{type(e).__name__}: {e}".splitlines()[0]
    names = " or ".join(n.partition(".")[0] for n in MODULES[format])
    raise Trouble(f"the runtime of '{format}' is missing on the board: {said or f'no {names}'}", f"pip install {PACKAGES[format][0]} numpy there, or name the "
                  "Python that has it with --board-python")


def program(format: str, tools: Mapping[str, str]) -> str:
    """The path of the program that runs a format. Raises Trouble where it is not here."""
    name = PROGRAMS[format]
    for path in (tools.get(name, ""), shutil.which(name) or "", *PLACES.get(name, ())):
        if path and os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    told = f", nor at {tools[name]}, which the target names" if name in tools else ""
    raise Trouble(f"{name} is not on the board{told}", f"install it, or name its place in the target: device: {{tools: {{{name}: /path/on/the/board}}}}")


def missing(format: str, tools: Mapping[str, str]) -> str | None:
    """Why files of a format do not run here; None where they do."""
    if format not in MODULES:
        return f"no runtime for '{format}' is known to this runner"
    reasons = []
    for found in ([lambda: module(format)] if MODULES[format] else []) + ([lambda: program(format, tools)] if format in PROGRAMS else []):
        try:
            found()
            return None
        except Trouble as e:
            reasons.append(e.what)
    return "; ".join(reasons)


def first_line(error: BaseException) -> str:
    """What a library's error says, cut to what fits in a reason."""
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


def typical(times: Sequence[float]) -> float:
    """The mean of the middle half: runtimes count in whole microseconds, in which a median of short operators is all steps."""
    ordered = sorted(times)
    quarter = len(ordered) // 4
    middle = ordered[quarter:len(ordered) - quarter]
    return sum(middle) / len(middle) if middle else 0.0


def of_numpy(value: Any) -> Array:
    """A numpy array as `Array`."""
    import numpy as np

    value = np.ascontiguousarray(value)
    return Array(value.dtype.name, [int(n) for n in value.shape], value.astype(value.dtype.newbyteorder("<"), copy=False).tobytes())
