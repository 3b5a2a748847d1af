"""Which modules of a student a stage trains, from the names under its `trainable`.

    encoder                  a part of the student
    encoder.blocks.0         a module inside a part, by its path there
    encoder[stage1:stage2]   what runs after the tap stage1 up to and with the tap stage2; either end may be left out. Taps are those of
                             `edgekd.distillation.taps`, or module paths
"""
from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from edgekd.distillation.taps import discover, outputs, resolve
from edgekd.errors import UsageError, unknown

NAME = re.compile(r"(?P<part>\w+)(?P<path>(?:\.\w+)*)(?:\[(?P<after>[\w.]*):(?P<upto>[\w.]*)\])?")


def part_of(name: str) -> str:
    """The student's part that a name under `trainable` belongs to.

    Raises:
        UsageError: it is not written as such a name is.
    """
    found = NAME.fullmatch(name)
    if found is None or (found["path"] and found["after"] is not None):
        raise UsageError(f"'{name}' under 'trainable' names no part", hint="write encoder, encoder.blocks.0 or encoder[stage1:stage2]")
    return found["part"]


def modules_of(student: Any, names: Sequence[str]) -> list[nn.Module]:
    """The modules that `names` stand for, in their order.

    Raises:
        UsageError: the student has no such part, module or tap, or nothing runs between two taps.
    """
    chosen: list[nn.Module] = []
    for name in names:
        parts, part = student.parts, part_of(name)
        if part not in parts:
            raise unknown("part of the student", part, parts)
        found = NAME.fullmatch(name)
        assert found is not None
        if found["path"]:
            inner = dict(parts[part].named_modules())
            path = found["path"][1:]
            if path not in inner:
                raise unknown(f"module of the student's {part}", path, inner)
            chosen.append(inner[path])
        elif found["after"] is not None:
            chosen += between(student, part, found["after"], found["upto"])
        else:
            chosen.append(parts[part])
    twice = len(all_of := [id(p) for m in chosen for p in m.parameters()]) - len(set(all_of))
    if twice:
        raise UsageError(f"{', '.join(names)} under 'trainable' overlap", hint="name each part once")
    return chosen


def between(student: Any, part: str, after: str, upto: str) -> list[nn.Module]:
    """The modules of a part that run after one tap up to and with another, an empty name being the part's end; parameters that a larger
    module holds itself come as a ParameterList.

    Raises:
        UsageError: no such tap, or nothing with parameters runs between the two.
    """
    module, where = student.parts[part], f"trainable {part}[{after}:{upto}]"
    side = student.preprocess.image_size
    images = torch.zeros(1, 3, side, side, device=next(module.parameters()).device)
    training = {m: m.training for m in student.modules()}
    student.eval()
    known = discover(student, images) if after or upto else {}
    ends = [resolve(student, known, tap, "student", where) if tap else "" for tap in (after, upto)]
    if None in ends:
        raise UsageError("only taps inside the student divide it, and its outputs are all at its end", where=where, hint="leave the second tap out")
    begun, ended = _clock(student, module, images, [str(e) for e in ends if e])
    for m, mode in training.items():
        m.training = mode
    first = ended[str(ends[0])] if ends[0] else -1
    last = ended[str(ends[1] or "")]
    wanted = {id(p) for owner, when in begun.items() if first < when < last for p in owner.parameters(recurse=False)}
    if not wanted:
        raise UsageError("nothing that can be trained runs between these taps", where=where, hint="the first tap comes before the second")
    return list(_largest(module, wanted))


@torch.no_grad()
def _clock(student: Any, module: nn.Module, images: torch.Tensor, ends: Sequence[str]) -> tuple[dict[nn.Module, int], dict[str, int]]:
    """When each module below `module` that holds parameters begins, and when each of the modules at the paths `ends` has ended, "" being the end of
    all. A module that is not called itself begins with the nearest one around it that is."""
    named, time, begun, ended = dict(student.named_modules()), [0], dict[nn.Module, int](), dict[str, int]()

    def tick() -> int:
        time[0] += 1
        return time[0]

    with ExitStack() as stack:
        for inner in module.modules():
            stack.callback(inner.register_forward_pre_hook(lambda m, _: begun.setdefault(m, tick()) and None).remove)
        for path in ends:
            stack.callback(named[path].register_forward_hook(lambda *_, path=path: ended.update({path: tick()})).remove)
        outputs(student, images)
    owners: dict[nn.Module, int] = {}

    def walk(at: nn.Module, since: int) -> None:
        since = begun.get(at, since)
        if any(True for _ in at.parameters(recurse=False)):
            owners[at] = since
        for child in at.children():
            walk(child, since)

    walk(module, 0)
    return owners, {**dict.fromkeys(ends, -1), **ended, "": time[0] + 1}


def _largest(module: nn.Module, wanted: set[int]) -> list[nn.Module]:
    """The largest modules all of whose parameters are wanted, and stray parameters of the others."""
    inside = [id(p) for p in module.parameters()]
    if inside and all(i in wanted for i in inside):
        return [module]
    own = [p for p in module.parameters(recurse=False) if id(p) in wanted]
    found: list[nn.Module] = [nn.ParameterList(own)] if own else []
    for child in module.children():
        found += _largest(child, wanted)
    return found
