"""A Core ML program read back from a `.mlpackage`, and an interpreter of it in torch.

Core ML runs on Apple's systems only. What a file says can be computed anywhere: a program is a list of typed operations (MIL), and `_mil_ops.py`
knows what each means. The interpreter computes in fp32 and rounds every result to the type that the program declares for it, so that what
overflows fp16 there becomes infinite here too. It is not Apple's runtime: how that accumulates, and on which unit, it does not know.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.errors import EdgekdError, first_line
from edgekd.protocols import Port

if TYPE_CHECKING:
    import numpy as np
    import torch

FIX = 'pip install "edgekd[coreml]"'
ARITHMETIC = {"conv", "conv_transpose", "linear", "matmul", "einsum", "scaled_dot_product_attention"}
WORDS = {"FLOAT16": "fp16", "FLOAT32": "fp32", "INT8": "i8", "UINT8": "u8", "INT16": "i16", "UINT16": "u16", "INT32": "i32", "BOOL": "bool", "STRING": "str"}
"""Types as the file names them -> as edgekd does."""


@dataclass(frozen=True)
class Value:
    """What an operation gives, or the program is given: its type (`fp16`, `i32`, ...) and shape, None where any length will do."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Op:
    """An operation. `inputs` names values, or holds what the file has in their place; `attributes` are constants."""

    kind: str
    name: str
    inputs: Mapping[str, list[Any]]
    attributes: Mapping[str, Any]
    outputs: tuple[Value, ...]

    def reads(self, key: str) -> str | None:
        """The name of the value that it takes as `key`, if that is one."""
        found = self.inputs.get(key, [None])[0]
        return found if isinstance(found, str) else None


@dataclass
class Program:
    """The one function of a Core ML program, as it is on disk."""

    path: Path
    version: int
    opset: str
    inputs: dict[str, Value]
    outputs: tuple[str, ...]
    ops: list[Op]
    metadata: dict[str, str] = field(default_factory=dict)
    ranges: dict[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    """input name -> least and largest length of every axis"""

    @classmethod
    def read(cls, path: Path) -> Program:
        """The program in a `.mlpackage`.

        Raises:
            EdgekdError: it is none, is damaged, or is not one function.
        """
        ct = coremltools()
        path = Path(path)
        try:
            spec = ct.utils.load_spec(str(path))
            (function,) = spec.mlProgram.functions.values()
            reader = _Reader(path / "Data" / "com.apple.CoreML" / "weights")
            block = function.block_specializations[function.opset]
            ops = [reader.op(o) for o in block.operations]
        except Exception as e:  # protobuf's, the blob reader's and KeyError: all mean a file that is not what we write
            raise EdgekdError(f"the Core ML package cannot be read: {first_line(e)}", where=path, hint="export the model again") from e
        return cls(path, spec.specificationVersion, function.opset, {i.name: reader.value(i) for i in function.inputs}, tuple(block.outputs), ops,
                   dict(spec.description.metadata.userDefined), {i.name: _ranges(i.type.multiArrayType) for i in spec.description.input})

    @cached_property
    def types(self) -> dict[str, Value]:
        """Every value by name."""
        return self.inputs | {v.name: v for op in self.ops for v in op.outputs}

    @cached_property
    def made(self) -> dict[str, Op]:
        """Value name -> the operation that gives it."""
        return {v.name: op for op in self.ops for v in op.outputs}

    def computed(self) -> list[Op]:
        """Operations that are carried out in every call: all but constants."""
        return [op for op in self.ops if op.kind != "const" and not op.kind.startswith("constexpr_")]

    def precision(self, op: Op) -> str:
        """What an operation computes in, by the types of the program: `i8` where both its sides come from 8-bit integers."""
        sides = [name for key in ("x", "y", "weight") for name in op.inputs.get(key, []) if isinstance(name, str)]
        whole = [self._is_integer(name) for name in sides]
        return "i8" if op.kind in ARITHMETIC and len(whole) > 1 and all(whole) else self.types[op.outputs[0].name].dtype

    def _is_integer(self, name: str) -> bool:
        op = self.made.get(name)
        return op is not None and op.kind in ("dequantize", "constexpr_affine_dequantize")

    def ops_by_precision(self) -> dict[str, int]:
        """`operation:precision` -> count, most frequent first."""
        return dict(Counter(f"{op.kind}:{self.precision(op)}" for op in self.computed()).most_common())

    def arithmetic_precision(self) -> str:
        """Of the operations that carry the arithmetic: `fp16`, `fp32`, `int8+fp16`, ..."""
        found = Counter(self.precision(op) for op in self.computed() if op.kind in ARITHMETIC)
        words = {"i8": "int8"}
        return "+".join(words.get(p, p) for p in sorted(found, key=lambda p: (p != "i8", -found[p]))) or "fp32"


class _Reader:
    """Messages of the file -> our classes, constants read from the weight file."""

    def __init__(self, weights: Path) -> None:
        from coremltools.converters.mil.frontend.milproto import load

        self._load, self._context = load, load.TranscriptionContext(str(weights))

    def op(self, message: Any) -> Op:
        attributes = {k: self._constant(v) for k, v in message.attributes.items()}
        return Op(message.type, str(attributes.pop("name", "")), {k: [self._argument(b) for b in v.arguments] for k, v in message.inputs.items()},
                  attributes, tuple(self.value(o) for o in message.outputs))

    def value(self, message: Any) -> Value:
        from coremltools.proto import MIL_pb2

        kind = message.type.tensorType
        name = MIL_pb2.DataType.Name(kind.dataType)
        shape = tuple(d.constant.size if d.WhichOneof("dimension") == "constant" else None for d in kind.dimensions)
        return Value(message.name, WORDS.get(name, name.lower()), shape)

    def _argument(self, binding: Any) -> Any:
        return binding.name if binding.WhichOneof("binding") == "name" else _Constant(self._constant(binding.value))

    def _constant(self, message: Any) -> Any:
        return self._load._load_value(self._context, message)


@dataclass(frozen=True)
class _Constant:
    """A value that stands where a name is expected."""

    value: Any


def _ranges(array: Any) -> tuple[tuple[int, int], ...]:
    if array.WhichOneof("ShapeFlexibility") == "shapeRange":
        return tuple((r.lowerBound, r.upperBound) for r in array.shapeRange.sizeRanges)
    return tuple((n, n) for n in array.shape)


Watch = Callable[[Op, "list[Any]", "list[torch.Tensor]"], None]
"""Called with an operation, its tensors and what it gave, after every operation."""


class Interpreter:
    """A session that computes a Core ML program (`edgekd.protocols.Session`). Inputs and outputs in numpy."""

    stand_in_for = "an interpreter of the Core ML program in torch, not Apple's runtime"

    def __init__(self, program: Program, threads: int | None = None) -> None:
        from edgekd.export._mil_ops import MEANING

        if strange := unknown(program):
            raise EdgekdError(f"not interpreted: {', '.join(strange)}", where=program.path, hint="edgekd does not know what these operations of Core ML mean")
        self.program, self._threads, self._meaning = program, threads, MEANING
        self._constants: dict[str, Any] = {}
        for op in program.ops:
            if op.kind == "const":
                self._constants[op.outputs[0].name] = as_tensor(op.attributes["val"])
            elif op.kind.startswith("constexpr_"):
                self._constants |= zip([v.name for v in op.outputs], self._compute(op, {}), strict=True)
        self._last = {name: i for i, op in enumerate(program.ops) for names in op.inputs.values() for name in names if isinstance(name, str)}

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `edgekd.protocols.Session`. More rows than the program takes in one call go through in several.

        Raises:
            EdgekdError: an axis is longer than the program takes, or the program contradicts itself.
        """
        return in_pieces(self._run, self.program, inputs)

    def _run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: t.numpy().copy() for name, t in self.execute(inputs).items()}

    def execute(self, inputs: Mapping[str, np.ndarray], watch: Watch | None = None) -> dict[str, torch.Tensor]:
        """The outputs as tensors; `watch` sees every operation."""
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(self._threads or before)
        try:
            with torch.no_grad():
                return self._execute(inputs, watch)
        finally:
            torch.set_num_threads(before)

    def _execute(self, inputs: Mapping[str, np.ndarray], watch: Watch | None) -> dict[str, torch.Tensor]:
        alive: dict[str, Any] = {n: settle(as_tensor(inputs[n]), v.dtype) for n, v in self.program.inputs.items()}
        for i, op in enumerate(self.program.ops):
            if op.kind == "const" or op.kind.startswith("constexpr_"):
                continue
            given = self._compute(op, alive, watch)
            alive |= zip([v.name for v in op.outputs], given, strict=True)
            for name in {n for names in op.inputs.values() for n in names if isinstance(n, str)}:
                if self._last[name] == i and name not in self.program.outputs:
                    alive.pop(name, None)
        return {name: alive[name] if name in alive else self._constants[name] for name in self.program.outputs}

    def _compute(self, op: Op, alive: Mapping[str, Any], watch: Watch | None = None) -> list[torch.Tensor]:
        arguments: dict[str, Any] = {k: as_tensor(v) for k, v in op.attributes.items()}
        for key, names in op.inputs.items():
            found = [n.value if isinstance(n, _Constant) else alive[n] if n in alive else self._constants[n] for n in names]
            arguments[key] = found if key == "values" else found[0]
        try:
            given = self._meaning[op.kind](arguments)
        except (RuntimeError, IndexError, KeyError, TypeError, ValueError) as e:
            raise EdgekdError(f"{op.kind} of the Core ML program cannot be computed: {first_line(e)}", where=f"{self.program.path.name}: {op.outputs[0].name}") from e
        results = [settle(t, v.dtype) for t, v in zip(given if isinstance(given, (list, tuple)) else [given], op.outputs, strict=True)]
        for tensor, value in zip(results, op.outputs, strict=True):
            if len(tensor.shape) != len(value.shape) or any(n is not None and n != m for n, m in zip(value.shape, tensor.shape, strict=True)):
                raise EdgekdError(f"{op.kind} gives {tuple(tensor.shape)} where the Core ML program says {value.shape}", where=value.name)
        if watch is not None:
            watch(op, [t for v in arguments.values() for t in (v if isinstance(v, list) else [v])], results)
        return results

    @property
    def inputs(self) -> list[Port]:
        """What the program takes."""
        return [port(self.program, name) for name in self.program.inputs]

    @property
    def executed_precision(self) -> str:
        """What the program computes in by its own types."""
        return self.program.arithmetic_precision()

    @property
    def executed_ops(self) -> dict[str, int]:
        """`operation:precision` -> count."""
        return self.program.ops_by_precision()

    @property
    def kept_fp32(self) -> dict[str, str]:
        """Operations of an fp16 program that stay in fp32 -> why, as written into it."""
        return kept(self.program)


def unknown(program: Program) -> list[str]:
    """Operations that the interpreter does not know."""
    from edgekd.export._mil_ops import MEANING

    return sorted({op.kind for op in program.ops} - set(MEANING) - {"const"})


def kept(program: Program) -> dict[str, str]:
    """Operations of a 16-bit program that stay in fp32 -> why, as written into its metadata."""
    import json

    from edgekd.export._half import KEPT

    return dict(json.loads(program.metadata.get(KEPT, "{}")))


def port(program: Program, name: str) -> Port:
    """An input as a session tells it."""
    value = program.inputs[name]
    return Port(name, value.shape, {"fp32": "float32", "fp16": "float16", "i32": "int32"}.get(value.dtype, value.dtype))


def in_pieces(run: Callable[[Mapping[str, Any]], dict[str, Any]], program: Program, inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """`run` on inputs of which more rows may be given than the program takes at once: those go through in several calls.

    Raises:
        EdgekdError: another axis is longer or shorter than the program takes.
    """
    import numpy as np

    taken = {name: np.ascontiguousarray(inputs[name]) for name in program.inputs}
    for name, value in taken.items():
        for axis, (least, most) in enumerate(program.ranges.get(name, ())):
            free = axis == 0 and least < most
            if value.shape[axis] < least or (value.shape[axis] > most and not free):
                raise EdgekdError(f"axis {axis} of '{name}' is {value.shape[axis]}, and the file takes {least} to {most}", where=program.path,
                                  hint="export it again with a larger --length" if least < most else None)
    rows = {name for name, axes in program.ranges.items() if axes and axes[0][0] < axes[0][1]}
    most = min((program.ranges[name][0][1] for name in rows), default=0)
    count = max((len(taken[name]) for name in rows), default=0)
    if count <= most:
        return run(taken)
    pieces = [run({n: v[first:first + most] if n in rows else v for n, v in taken.items()}) for first in range(0, count, most)]
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def as_tensor(value: Any) -> Any:
    """A constant of the file as the operations take it: floats in fp32, whole numbers in int64, words and truth values as they are."""
    import numpy as np
    import torch

    if isinstance(value, (str, torch.Tensor)):
        return value
    array = np.asarray(value)
    if array.dtype.kind == "f":
        return torch.from_numpy(np.array(array, dtype=np.float32))
    if array.dtype.kind in "iu":
        return torch.from_numpy(np.array(array, dtype=np.int64))
    if array.dtype.kind == "b":
        return torch.from_numpy(np.array(array, dtype=bool))
    return [str(v) for v in array.ravel()]


def settle(tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    """A result in the type that the program declares: rounded to fp16 and kept in fp32, or whole."""
    import torch

    if dtype == "fp16":
        return tensor.to(torch.float16).to(torch.float32)
    if dtype == "fp32":
        return tensor.to(torch.float32)
    return tensor.to(torch.bool) if dtype == "bool" else tensor.to(torch.int64)


def magnitudes(interpreter: Interpreter, inputs: Mapping[str, np.ndarray]) -> Iterator[tuple[Op, float, float]]:
    """(operation, largest magnitude that it reads or writes, largest sum of squares of a normalisation) of one call. NaN counts as infinite."""
    import torch

    found: list[tuple[Op, float, float]] = []

    def largest(tensors: list[Any]) -> float:
        peaks = [float(t.abs().max()) for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point() and t.numel()]
        return max((p if p == p else float("inf") for p in peaks), default=0.0)

    def watch(op: Op, read: list[Any], wrote: list[torch.Tensor]) -> None:
        squares = float((wrote[0].numel() and _squares(op, read)) or 0.0)
        found.append((op, largest([*read, *wrote]), squares))

    interpreter.execute(inputs, watch)
    yield from found


def _squares(op: Op, read: list[Any]) -> float:
    """The largest sum of squares inside a layer normalisation."""
    if op.kind != "layer_norm":
        return 0.0
    arguments = dict(zip(op.inputs, read, strict=False))
    axes = tuple(int(a) for a in arguments["axes"].ravel()) if "axes" in arguments else tuple(range(arguments["x"].ndim))
    return float(arguments["x"].square().sum(axes).max())


def coremltools() -> Any:
    """The module, imported without what it says of the packages around it.

    Raises:
        EdgekdError: it is not installed.
    """
    import contextlib
    import io
    import logging

    from edgekd.export._program import quiet

    try:
        with quiet(), contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            import coremltools as ct
            import coremltools.optimize
    except ImportError as e:
        raise EdgekdError(f"coremltools cannot be imported: {first_line(e)}", hint=FIX) from e
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    return ct
