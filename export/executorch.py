"""ExecuTorch for CPUs (`.pte`): XNNPACK's kernels, and ExecuTorch's portable ones for the little that XNNPACK lacks.

    fp32          weights as they are
    w8a8_static   torchao's PT2E with XNNPACK's quantizer: per-channel weights, activations of fixed range (`_executorch_quantize.py`)
    w8_dynamic    8-bit weights of linear layers, activations quantized at run time; a graph without them is refused
    w8a8_qat      8-bit layers with the ranges that were trained for them, all else in fp32
    w4a8_qat      the same: 15 levels a weight, stored in 8 bits

Axes are fixed. Files whose prompts vary up to a bound run as well and answer bit for bit the same, but a decoder then falls into forty delegated
pieces in place of four, since XNNPACK cannot reshape along two such axes, and plans its memory for the longest.

What XNNPACK was given, operator by operator with its precision, is read back from the file.
"""
from __future__ import annotations

import io
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.export import _layers_executorch
from edgekd.export._executorch import FIX, PteExporter, recaptured
from edgekd.export._executorch_file import NAMES, Contents, read
from edgekd.export._executorch_graph import rewrite
from edgekd.export._executorch_quantize import Program, quantize
from edgekd.export._program import program, quiet
from edgekd.export.onnx import content_key

from edgekd.errors import EdgekdError, UsageError, first_line
from edgekd.protocols import Component, Port
from edgekd.tuning import PLAIN, Tuning

if TYPE_CHECKING:
    import numpy as np
    import torch

DTYPES = {0: "uint8", 1: "int8", 2: "int16", 3: "int32", 4: "int64", 5: "float16", 6: "float32", 7: "float64", 11: "bool"}
"""ExecuTorch's numbers of types -> numpy's"""

KEPT_PROGRAMS = 2
_programs: OrderedDict[str, Program] = OrderedDict()


class ExecuTorchExporter(PteExporter):
    """See `edgekd.protocols.Exporter`."""

    format = "executorch"
    schemes: tuple[str, ...] = ("fp32", "w8a8_static", "w8_dynamic", "w8a8_qat", "w4a8_qat")
    tunes: Mapping[str, frozenset[Any]] = {"keep": frozenset({"fp32"}), "granularity": frozenset({"tensor"}), "symmetric": frozenset({True, False}),
                                           "method": frozenset({"mse"}), "naive": frozenset({True})}
    backend, delegate = "xnnpack", "XnnpackBackend"

    def captured(self, component: Component, scheme: str, calibration: Any, tuning: Tuning = PLAIN) -> torch.export.ExportedProgram:
        """Quantized first, and then written as XNNPACK takes it: what stands in for layer norms must not be quantized."""
        if scheme == "w8_dynamic" and (tuning.symmetric is not None or tuning.method != "minmax"):
            raise UsageError(f"{scheme} finds activation ranges at run time and takes no option for them", where=component.name, hint="w8a8_static does")
        made = _program(component)
        graph = made.graph() if scheme == "fp32" else quantize(made, scheme, calibration, tuning)
        rewrite(graph)
        return recaptured(graph, component)

    def options(self, scheme: str) -> dict[str, Any]:
        """Whether linear layers quantize at run time."""
        return {"dynamic": scheme == "w8_dynamic"}

    def open(self, path: Path, *, scheme: str, threads: int | None = None) -> ExecuTorchSession:
        """A session on the CPU; `threads` counts for all sessions of the process, of which the runtime has one pool."""
        return ExecuTorchSession(Path(path), threads)

    def layers(self, path: Path, *, scheme: str, inputs: Mapping[str, np.ndarray], threads: int | None = None, repeats: int = 30) -> list[dict[str, Any]]:
        """See `edgekd.protocols.Facts.layers`."""
        given = ExecuTorchSession(Path(path), threads).tensors(inputs)
        return _layers_executorch.layers(_runtime(), Path(path), given, repeats, _said)


def _program(component: Component) -> Program:
    """The component, captured once while it is exported again and again."""
    key = content_key(component)
    if key not in _programs:
        _programs[key] = Program(component, key, program(component))
        while len(_programs) > KEPT_PROGRAMS:
            _programs.popitem(last=False)
    _programs.move_to_end(key)
    return _programs[key]


class ExecuTorchSession:
    """A `.pte` file opened by ExecuTorch's runtime."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        runtime = _runtime()
        with _said() as said:
            try:
                if threads:
                    from executorch.extension.pybindings import portable_lib

                    portable_lib._unsafe_reset_threadpool(threads)
                self._program = runtime.load_program(path)
                self._forward = self._program.load_method("forward")
            except (RuntimeError, KeyError) as e:
                raise EdgekdError(f"ExecuTorch cannot open the file: {said() or first_line(e)}", where=path, hint="export the model again") from e
        self._path, self._contents = path, None
        about = self._forward.metadata
        names = json.loads(self._program.load_method(NAMES).execute([])[0]) if NAMES in self._program.method_names else {}
        inputs = names.get("inputs") or [f"input{i}" for i in range(about.num_inputs())]
        self._outputs = names.get("outputs") or [f"output{i}" for i in range(about.num_outputs())]
        described = [about.input_tensor_meta(i) for i in range(about.num_inputs())]
        self._inputs = [Port(n, tuple(t.sizes()), DTYPES.get(t.dtype(), str(t.dtype()))) for n, t in zip(inputs, described, strict=True)]

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs are copies. Raises EdgekdError for an array of another shape or type than the file's."""
        given = self.tensors(inputs)
        try:
            found = self._forward.execute(given)
        except RuntimeError as e:
            raise EdgekdError(f"ExecuTorch cannot run the file: {first_line(e)}", where=self._path, hint="its reason is on stderr") from e
        return {n: o.numpy() for n, o in zip(self._outputs, found, strict=True)}

    def tensors(self, inputs: Mapping[str, np.ndarray]) -> list[torch.Tensor]:
        """The inputs as the runtime takes them, in the file's order. Raises as `run` does."""
        import torch

        return [torch.from_numpy(_fitting(port, inputs[port.name])) for port in self._inputs]

    @property
    def inputs(self) -> list[Port]:
        """What the file takes, in its order."""
        return list(self._inputs)

    @property
    def executed_ops(self) -> dict[str, int]:
        """`operator:precision` -> count of what XNNPACK was given, and `portable NAME` of what ExecuTorch's own kernels compute, from the file."""
        return self._read().ops

    @property
    def executed_precision(self) -> str:
        """Of the operators that carry the arithmetic: `fp32`, `int8`, or `int8+fp32` when both are left."""
        return self._read().precision

    def _read(self) -> Contents:
        self._contents = self._contents or read(self._path)
        return self._contents


def _fitting(port: Port, value: np.ndarray) -> np.ndarray:
    """An array that the runtime can take as it lies in memory: it looks at nothing but the address."""
    import numpy as np

    value = np.ascontiguousarray(value)
    if value.dtype != port.dtype or value.shape != port.shape:
        raise EdgekdError(f"the file takes {port.dtype} {port.shape} and is given {value.dtype} {value.shape}", where=port.name,
                          hint="its axes are fixed: pad, or export it again with --length" if value.dtype == port.dtype else f"cast it to {port.dtype}")
    return value if value.flags.writeable else value.copy()  # torch warns of memory that it may not write to


def _runtime() -> Any:
    try:
        import torch  # noqa: F401  sets up its own logging when it is imported, which `quiet` is to end

        with quiet():
            from executorch.runtime import Runtime
    except ImportError as e:
        raise EdgekdError("executorch is not installed", hint=FIX) from e
    return Runtime.get()


@contextmanager
def _said() -> Iterator[Callable[[], str]]:
    """What the runtime says, kept from stderr: its exceptions hold a number only. Gives a function for the last line of it."""
    said = io.StringIO()

    def last() -> str:
        lines = [line for line in said.getvalue().splitlines() if "cpuinfo" not in line]
        return lines[-1].partition("] ")[2] if lines else ""

    with redirect_stderr(said):
        yield last


exporter = ExecuTorchExporter()
