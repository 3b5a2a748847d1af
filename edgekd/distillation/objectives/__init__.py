"""Objectives by name: one file each, a module-level class that `objective` names.

An objective is a module called with what student and teacher gave for one batch; it returns one loss per image or per prompt.
Modules of its own (projectors) live in it, train with the student and never reach an artifact, since only the student is exported.
"""
from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor, nn

from edgekd import plugins
from edgekd.errors import UsageError, unknown


@dataclass(frozen=True)
class Outputs:
    """What a model gave: `embedding` (B, E, s, s); after a decode `masks` (P, 4, h, w) logits and `iou` (P, 4)."""

    embedding: Tensor
    masks: Tensor | None = None
    iou: Tensor | None = None


@dataclass(frozen=True)
class Context:
    """What an objective may know of the batch: `valid` (B, 1, h, w) is 1 where the photo is and 0 in the padding; per prompt
    `valid_prompts` (P, h, w) and `single` (P,), true for one click, whose three alternatives mean something."""

    valid: Tensor
    valid_prompts: Tensor | None = None
    single: Tensor | None = None


class Objective(nn.Module):
    """Base for type checkers only; `needs` is a subset of {"embedding", "masks", "iou"}."""

    name: str
    family: str
    paper: str
    needs: frozenset[str]

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """-> (B,) or (P,) losses."""
        raise NotImplementedError


@cache
def registry() -> dict[str, type[Objective]]:
    """name -> class, from the files of this folder and the entry points `edgekd.objectives`."""
    modules = (importlib.import_module(f"{__name__}.{name}") for name in plugins.submodules(__name__))
    found = {m.objective.name: m.objective for m in modules if hasattr(m, "objective")}
    return {**plugins.entry_points("edgekd.objectives"), **found}


def names() -> list[str]:
    """Names that recipes can use."""
    return sorted(registry())


def build(name: str, options: dict[str, Any]) -> Objective:
    """An objective with its options.

    Raises:
        UsageError: unknown name (with the nearest) or option.
    """
    if name not in registry():
        raise unknown("objective", name, registry())
    try:
        return registry()[name](**options)
    except TypeError as e:
        raise UsageError(f"objective '{name}' does not take these options: {e}", where=f"options {sorted(options)}") from e


def describe(name: str) -> dict[str, Any]:
    """What `edgekd list objectives` shows: family, paper and what it needs of student and teacher."""
    found = registry()[name]
    return {"family": found.family, "paper": found.paper, "needs": sorted(found.needs)}
