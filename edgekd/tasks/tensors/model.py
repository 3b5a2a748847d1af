"""Anybody's torch module as a model of this task: its inputs have names, shapes and types, and whatever it returns is a row of named outputs."""
from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgekd.errors import EdgekdError
from edgekd.protocols import Component
from edgekd.tasks.tensors.inputs import Input, draw

SEEDED = 4
"""Calls on seeded arrays that a model is compared on, where no data is given."""


class Arrays(nn.Module):
    """A module behind inputs by position and outputs in a row.

    Args:
        name: of the model, safe in file names.
        module: in eval mode. It is called by its own names of arguments where all inputs are named so, else by position.
        lengths: of every symbol, in the seeded arrays.
        fixed: the same in files whose axes cannot vary.
        given: the user's own inputs; seeded ones when left out.

    Raises:
        EdgekdError: the module refuses its inputs, or what it returns holds something else than tensors.
    """

    task = "tensors"
    preprocess = None
    embed_dim = None

    def __init__(self, name: str, module: nn.Module, inputs: Sequence[Input], lengths: Mapping[str, int], fixed: Mapping[str, int],
                 given: Sequence[Mapping[str, np.ndarray]] | None = None) -> None:
        super().__init__()
        self.name, self.module = name, module
        self.inputs, self.lengths, self.fixed, self.own_data = list(inputs), dict(lengths), dict(fixed), given is not None
        self.samples = [dict(one) for one in given] if given is not None else [draw(inputs, lengths, seed) for seed in range(SEEDED)]
        self.outputs = self._outputs()

    def forward(self, a: Tensor, b: Tensor | None = None, c: Tensor | None = None, d: Tensor | None = None, e: Tensor | None = None,
                f: Tensor | None = None, g: Tensor | None = None, h: Tensor | None = None) -> Any:
        """The outputs in a row, of one alone the tensor. As many arguments as there are inputs: exporters know nothing of `*arguments`."""
        found = [t for _, t in flatten(self._call([t for t in (a, b, c, d, e, f, g, h) if t is not None]))]
        return found[0] if len(found) == 1 else tuple(found)

    def _call(self, given: Sequence[Tensor]) -> Any:
        if _takes(self.module, [i.name for i in self.inputs]):  # asked anew: what a part folds into may name its arguments otherwise
            return self.module(**{i.name: t for i, t in zip(self.inputs, given, strict=True)})
        return self.module(*given)

    def run(self, sample: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Inputs by name -> outputs by name."""
        with torch.no_grad():
            found = self(*(torch.from_numpy(np.ascontiguousarray(sample[i.name])) for i in self.inputs))
        return {name: t.detach().numpy() for name, t in zip(self.outputs, found if isinstance(found, tuple) else (found,), strict=True)}

    def component(self) -> Component:
        """The whole as one part, on an example in which no axis that may vary is 1 (torch would take it for one that never does)."""
        example = draw(self.inputs, {s: max(2, n) for s, n in self.lengths.items()}, seed=0)
        if self.own_data and not any(i.symbols for i in self.inputs):
            example = self.samples[0]
        return Component("model", self, {n: torch.from_numpy(np.ascontiguousarray(v)) for n, v in example.items()}, tuple(self.outputs),
                         {i.name: {axis: s for axis, s in enumerate(i.shape) if isinstance(s, str)} for i in self.inputs if i.symbols},
                         self.fixed)

    def _outputs(self) -> list[str]:
        """Names of the outputs, found by a call: keys as they are, the others `output`, `output_1`, ..."""
        try:
            with torch.no_grad():
                returned = self._call([torch.from_numpy(np.ascontiguousarray(self.samples[0][i.name])) for i in self.inputs])
        except Exception as e:  # somebody's module may raise anything: what it says is the reason
            raise EdgekdError(f"the model refuses these inputs: {refusal(e)}", where=self.name,
                              hint=f"it was given {', '.join(i.words() for i in self.inputs)}; whole numbers are 0 to 9 unless --data brings others") from e
        taken, found, unnamed = {i.name for i in self.inputs}, list[str](), 0
        for key, value in flatten(returned):
            if not isinstance(value, Tensor):
                raise EdgekdError(f"the model returns a {type(value).__name__}, which no file can hold" + (f" (its output '{key}')" if key else ""),
                                  where=self.name, hint="wrap it in a module that returns tensors only")
            name = re.sub(r"\W", "_", key) if key else f"output_{unnamed}" if unnamed else "output"
            unnamed += not key
            while name in taken:
                name += "_out"
            taken.add(name)
            found.append(name)
        if not found:
            raise EdgekdError("the model returns nothing", where=self.name, hint="wrap it in a module that returns a tensor")
        return found


def refusal(error: BaseException) -> str:
    """The first line in which a module says something: torch begins some of its messages with a line that names the call only."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def flatten(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(key, tensor) of everything in a nest of mappings, tuples, lists and data classes, in order; what has no key has an empty one. None is left out."""
    if value is None:
        return
    if isinstance(value, Mapping):
        pairs: list[tuple[str, Any]] = [(str(k), v) for k, v in value.items()]
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        pairs = list(zip(value._fields, value, strict=True))
    elif isinstance(value, (tuple, list)):
        pairs = [(str(i) if key else "", v) for i, v in enumerate(value)]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    else:
        yield key, value
        return
    for own, inner in pairs:
        yield from flatten(inner, f"{key}_{own}" if key and own else key or own)


def _takes(module: nn.Module, names: Sequence[str]) -> bool:
    """Whether a module's forward() has arguments of all these names."""
    try:
        return set(names) <= set(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):
        return False
