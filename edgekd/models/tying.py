"""Which ranges of a network are one: a tensor that leaves a layer and enters the next is rounded to one grid, not to two.

A tensor has one pair of quantizers in an exported graph, whoever reads it. A ReLU behind a layer is no place of its own either: where nothing else
reads what the layer gives, the range of the layer's output starts at 0, the ReLU changes nothing more, and runtimes compute it with the layer.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from edgekd.models.rounding import layers

RELUS = (F.relu, torch.relu, Tensor.relu)
Place = tuple[str, Literal["input", "output"]]
"""A layer's name and its end."""
Value = tuple[int, int]
"""A tensor and its version: an operation in place makes another value of it."""


@dataclass
class Group:
    """Places that share a range."""

    places: list[Place] = field(default_factory=list)
    rectified: bool = False
    """Only a ReLU reads it: it starts at 0."""


@torch.no_grad()
def ranges(module: nn.Module, run: Callable[[], Any]) -> list[Group]:
    """The ranges of all layers below `module` that `run()`, which calls it, really calls; in the order in which they are computed."""
    seen, hooks = _Trace(), []
    for name, layer in layers(module).items():
        def before(_: nn.Module, given: tuple[Any, ...], name: str = name) -> None:
            seen.at((name, "input"), given[0])

        def after(_: nn.Module, __: tuple[Any, ...], found: Tensor, name: str = name) -> None:
            seen.at((name, "output"), found)

        hooks += [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
    try:
        with seen:
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return seen.groups()


@torch.no_grad()
def cells(module: nn.Module, run: Callable[[], Any]) -> set[str]:
    """Convolutions that `run()` calls on maps of a single cell (squeeze and excitation), which exporters leave in float too: going to integers and back
    costs more than they do."""
    found: set[str] = set()
    hooks = [layer.register_forward_pre_hook(lambda _, given, name=name: found.add(name) if given[0].ndim == 4 and given[0].shape[-2:] == (1, 1) else None)
             for name, layer in layers(module).items()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return found


class _Trace(TorchFunctionMode):
    """Who reads which tensor while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[Value, list[Place]] = {}
        self.readers: dict[Value, set[Any]] = {}
        self.relus: dict[Value, list[Value]] = {}
        self.kept: list[Any] = []
        """Tensors of which an id is known: while they live no other tensor has it."""

    def at(self, place: Place, tensor: Tensor) -> None:
        """A layer takes or gives this tensor."""
        self.kept.append(tensor)
        self.places.setdefault(_value(tensor), []).append(place)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = [(a, _value(a)) for a in _tensors((args, kwargs))]
        out = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") != "__get__":  # of an attribute: reading a shape is not reading the values
            for tensor, value in given:
                self.kept.append(tensor)
                self.readers.setdefault(value, set()).add(func)
            if func in RELUS and isinstance(out, Tensor) and out is not given[0][0]:
                self.kept.append(out)
                self.relus.setdefault(given[0][1], []).append(_value(out))
        return out

    def groups(self) -> list[Group]:
        """Places by range."""
        root, rectified = {v: v for v in self.places}, set[Value]()
        for value, outs in self.relus.items():
            ends = {end for _, end in self.places.get(value, ())}
            if ends == {"output"} and self.readers[value] <= set(RELUS):
                rectified.add(value)
                root.update({out: value for out in outs if out in root})
        by_place: dict[Place, Group] = {}
        made: dict[Value, Group] = {}
        for value, places in self.places.items():
            group = made.setdefault(root[value], Group())
            group.rectified |= root[value] in rectified
            for place in places:  # a layer that is called twice joins what both calls see
                other = by_place.get(place, group)
                if other is not group:
                    group.places += other.places
                    group.rectified &= other.rectified
                    made.update({v: group for v, g in made.items() if g is other})
                    by_place.update(dict.fromkeys(other.places, group))
                elif place not in group.places:
                    group.places.append(place)
                by_place[place] = group
        return list({id(g): g for g in by_place.values()}.values())


def _value(tensor: Tensor) -> Value:
    return id(tensor), tensor._version


def _tensors(given: Any) -> list[Tensor]:
    """All tensors in nested arguments."""
    if isinstance(given, Tensor):
        return [given]
    if isinstance(given, dict):
        given = tuple(given.values())
    return [t for one in given for t in _tensors(one)] if isinstance(given, (tuple, list)) else []
