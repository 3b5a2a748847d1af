"""Objectives by name: one file each, a module-level class that `objective` names.

An objective is a module called with what student and teacher gave for one batch; it returns one loss per image or per prompt.
Modules of its own (projectors) live in it, train with the student and never reach an artifact, since only the student is exported.
"""
from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from edgekd import plugins
from edgekd.errors import UsageError, unknown

NEEDS = frozenset({"embedding", "masks", "iou", "tokens", "truth", "boxes"})
PER_PROMPT = frozenset({"masks", "iou", "tokens"})
"""What only a decode gives: an objective that needs one of these is asked once a decode, any other once a batch."""


@dataclass(frozen=True)
class Outputs:
    """What a model gave. `embedding` (B, E, s, s), of a foreign teacher with further channels after the first E; after a decode `masks`
    (P, 4, h, w) logits, `iou` (P, 4) and `tokens` (P, 5, E), the decoder's IoU and mask tokens; `proposals` of the student's box
    proposer, boxes (B, Q, 4) xyxy in the F frame with scores (B, Q)."""

    embedding: Tensor
    masks: Tensor | None = None
    iou: Tensor | None = None
    tokens: Tensor | None = None
    proposals: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Context:
    """What an objective may know of the batch, in the student's frame of side F: `valid` (B, 1, F/4, F/4) is 1 where the photo is and 0
    in the padding; `boxes` has (K, 4) xyxy of the instances of each image. Per prompt: `valid_prompts` (P, F/4, F/4); `single` (P,),
    true for one click, whose three alternatives mean something; `truth` (P, F, F) bool, the mask that the prompt was drawn from."""

    valid: Tensor
    valid_prompts: Tensor | None = None
    single: Tensor | None = None
    truth: Tensor | None = None
    boxes: Sequence[Tensor] | None = None
    side: int | None = None
    generator: torch.Generator | None = None
    """The step's own: what an objective draws from it is drawn again when a killed run goes on."""


class Objective(nn.Module):
    """Base for type checkers only; `needs` is a subset of NEEDS. Of these "truth" comes from the data's masks (or the teacher's own
    masks of the whole photo), "boxes" from the same; the rest is asked of student and teacher."""

    name: str
    family: str
    paper: str
    needs: frozenset[str]
    asks_teacher: bool = True
    """False: it compares the student with "truth" or "boxes" alone, and the teacher need not answer."""

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
