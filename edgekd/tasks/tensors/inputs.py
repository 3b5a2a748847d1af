"""What a model of arrays takes, as a user writes it and as a file says it: names, shapes, types; and seeded arrays of them. Numpy only.

    1x3x224x224                      float32, named `input` (the next such one `input_1`)
    tokens=Nx77:int64                named, of a type, with an axis N of any length
"""
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgekd.errors import UsageError, unknown
from edgekd.protocols import Port

DTYPES = ("float32", "float16", "float64", "int64", "int32", "uint8", "int8", "bool")
MOST = 8
"""inputs of one model"""
FORM = "NAME=1x3x224x224:float32; name and type may be left out, and a letter in place of a number is an axis of any length: Nx3x224x224"
WHOLE = 10
"""Seeded whole numbers are below this: few enough to be indices of most tables."""
PICTURE = 64
"""The length of an axis of any length beyond the first, where none is given."""
ROWS = 2
"""The same of the first axis, the batch: torch takes an axis of 1 for one that never varies."""


@dataclass(frozen=True)
class Input:
    """An input. An axis of any length is a symbol; inputs that share one share its length."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str = "float32"

    @property
    def symbols(self) -> list[str]:
        """Of its axes of any length, in order."""
        return [n for n in self.shape if isinstance(n, str)]

    def sized(self, lengths: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with a length in place of every symbol."""
        return tuple(lengths[n] if isinstance(n, str) else n for n in self.shape)

    def words(self) -> str:
        """As a user writes it."""
        return f"{self.name}={'x'.join(map(str, self.shape))}:{self.dtype}"


def parse(texts: Sequence[str]) -> list[Input]:
    """The inputs of every `--input`.

    Raises:
        UsageError: one that is not of the form, an axis of length 0, an unknown type, two of one name.
    """
    found: list[Input] = []
    bare = 0
    for text in texts:
        name, equals, rest = text.rpartition("=")
        if not equals:
            name, bare = f"input_{bare}" if bare else "input", bare + 1
        shape, _, dtype = rest.partition(":")
        if not re.fullmatch(r"\w+", name):
            raise UsageError(f"'{name}' is no name of an input", where=f"--input {text}", hint=f"write {FORM}")
        if name in {i.name for i in found}:
            raise UsageError(f"two inputs are named '{name}'", where=f"--input {text}", hint="give each a name of its own: --input a=1x3 --input b=1x3")
        if (dtype or "float32") not in DTYPES:
            raise unknown("type of an input", dtype, DTYPES)
        found.append(Input(name, _shape(shape, text), dtype or "float32"))
    if len(found) > MOST:
        raise UsageError(f"{len(found)} inputs are more than the {MOST} that are supported", hint="wrap the model in one that takes fewer")
    return found


def _shape(text: str, whole: str) -> tuple[int | str, ...]:
    found: list[int | str] = []
    for part in text.split("x"):
        if not re.fullmatch(r"\d+|[A-Za-z]\w*", part):
            raise UsageError(f"'{text}' is no shape", where=f"--input {whole}", hint=f"write {FORM}")
        if part.isdigit() and int(part) == 0:
            raise UsageError("an axis of length 0 leaves nothing to compute", where=f"--input {whole}", hint=f"write {FORM}")
        found.append(int(part) if part.isdigit() else part)
    return tuple(found)


def of_ports(ports: Sequence[Port]) -> list[Input]:
    """What an opened file takes. An axis of any length has the file's own name for it, or is called after its place: `images.0`."""
    def axis(port: Port, i: int) -> int | str:
        length = port.shape[i]
        return length if length is not None else (port.axes[i] if i < len(port.axes) else None) or f"{port.name}.{i}"

    return [Input(p.name, tuple(axis(p, i) for i in range(len(p.shape))), p.dtype) for p in ports]


def lengths_of(inputs: Sequence[Input], given: Mapping[str, int], *, least: bool = False) -> dict[str, int]:
    """A length of every symbol: the one given (a symbol, or `NAME.AXIS`), else `ROWS` of a first axis and `PICTURE` of any other; with `least` 1.

    Raises:
        UsageError: a length is given of an axis that is not there, or that is fixed.
    """
    places = {f"{i.name}.{axis}": n for i in inputs for axis, n in enumerate(i.shape) if isinstance(n, str)}
    rows = {i.shape[0] for i in inputs if i.shape}
    known = {s: 1 if least else ROWS if s in rows else PICTURE for i in inputs for s in i.symbols}
    for name, length in given.items():
        if name not in known and name not in places:
            there = ", ".join(dict.fromkeys([*known, *places])) or "none"
            raise UsageError(f"there is no axis '{name}' of any length", where=f"--length {name}={length}", hint=f"there are: {there}")
        known[places.get(name, name)] = length
    return known


def rows_of(inputs: Sequence[Input]) -> str | None:
    """The symbol whose rows a file with fixed axes serves in several calls: the first that is a first axis, where it is no other one too."""
    first = next((i.shape[0] for i in inputs if i.shape and isinstance(i.shape[0], str)), None)
    return None if any(first in i.shape[1:] for i in inputs) else str(first) if first is not None else None


def draw(inputs: Sequence[Input], lengths: Mapping[str, int], seed: int) -> dict[str, np.ndarray]:
    """One call's seeded arrays: normal numbers, whole numbers below `WHOLE`, or booleans."""
    rng = np.random.default_rng(seed)
    found: dict[str, np.ndarray] = {}
    for one in inputs:
        size, dtype = one.sized(lengths), np.dtype(one.dtype)
        values = rng.standard_normal(size) if dtype.kind == "f" else rng.integers(0, 2 if dtype.kind == "b" else WHOLE, size)
        found[one.name] = np.asarray(values).astype(dtype)
    return found
