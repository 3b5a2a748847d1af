"""What plug-ins see of a batch: what a model gave (`Outputs`), what else is known (`Context`), and the models themselves (`Setup`)."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgekd.distillation.draws import Draws
from edgekd.errors import EdgekdError

if TYPE_CHECKING:
    from edgekd.recipe import Stage

FEATURES = frozenset({"embedding", "logits", "pooled"})
"""Outputs that a model gives for a photo alone, by the names that caches and taps know them by."""
PER_PROMPT = frozenset({"masks", "iou", "tokens"})
"""What only a decode gives: an objective that needs one of these is asked once a decode, any other once a batch."""
FROM_DATA = frozenset({"truth", "boxes", "classes", "instances"})
"""What the data gives: `classes` labels of photos; `truth`, `boxes` and `instances` come from masks, the data's own or the teacher's."""
NEEDS = FEATURES | PER_PROMPT | FROM_DATA | {"feats", "attention", "images", "teachers"}
"""Everything that a plug-in may say it needs. `feats` and `attention` are taps on student and teacher (`edgekd.distillation.taps`),
`images` the photos as the student sees them, `teachers` more than one teacher."""


@dataclass(frozen=True)
class Outputs:
    """What a model gave for a batch of B photos.

    `embedding` (B, E, s, s), of a foreign teacher with further channels after the first E; `logits` (B, C); `pooled` (B, D);
    `feats`: the taps that the objective at hand asked for, in the order of its pairs: maps (B, C, h, w), or attention probabilities
    (B, heads, N, N). After a decode `masks` (P, 4, h, w) logits, `iou` (P, 4) and `tokens` (P, 5, E), the decoder's IoU and mask tokens;
    `proposals` of the student's box proposer, boxes (B, Q, 4) xyxy in the F frame with scores (B, Q).
    """

    embedding: Tensor | None = None
    masks: Tensor | None = None
    iou: Tensor | None = None
    tokens: Tensor | None = None
    proposals: tuple[Tensor, Tensor] | None = None
    logits: Tensor | None = None
    pooled: Tensor | None = None
    feats: tuple[Tensor, ...] = ()
    taps: Mapping[str, Tensor] = field(default_factory=dict)
    """Everything that was tapped, by name; `feats` is the part of it that one objective asked for."""

    def __getitem__(self, name: str) -> Tensor:
        """The output of this name, which must be there: `student["logits"]`."""
        found = getattr(self, name)
        assert found is not None, f"there are no {name}; the plug-in must name them in 'needs'"
        return found

    @classmethod
    def of(cls, named: Mapping[str, Tensor]) -> Outputs:
        """From tensors by name, as `model.outputs()`, caches and taps give them."""
        own: dict[str, Any] = {k: v for k, v in named.items() if k in FEATURES}
        return cls(**own, taps=dict(named))

    def detached(self) -> Outputs:
        """The outputs for photos alone, without their graph."""
        found: dict[str, Any] = {n: None if (t := getattr(self, n)) is None else t.detach() for n in sorted(FEATURES)}
        return Outputs(**found)

    def paired(self, names: Sequence[str]) -> Outputs:
        """The same with `feats` filled from taps of these names."""
        missing = [n for n in names if n not in self.taps]
        if missing:
            raise EdgekdError(f"there is no tap '{missing[0]}' in what was given ({', '.join(self.taps)})", hint="was the cache made for other stages?")
        return replace(self, feats=tuple(self.taps[n] for n in names)) if names else self


@dataclass(frozen=True)
class Context:
    """What a plug-in may know of the batch, in the student's frame of side F: `valid` (B, 1, F/4, F/4) is 1 where the photo is and 0
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
    draws: Draws | None = None
    """The same for numbers that should not depend on how many processes share the batch: `draws.rand(B)` gives this process's rows."""
    images: Tensor | None = None
    """(B, 3, S, S), as the student sees them."""
    classes: Tensor | None = None
    """(B,) long, or (B, C) shares of classes after mixing; -1 where a photo has none."""
    instances: Tensor | None = None
    """(B, F, F) int: 0 nothing, 1.. instances, -1 padding."""
    domains: Tensor | None = None
    """(B,) long: which of the recipe's data sets a photo comes from."""
    places: Tensor | None = None
    """(B,) long: the position of each photo among all training photos, 0..images-1, the same in every epoch."""
    images_total: int = 0
    step: int = 0
    steps: int = 1
    teachers: Mapping[str, Outputs] = field(default_factory=dict)
    """Every teacher's outputs by its name, the recipe's own first."""
    student: Outputs | None = None
    """What the student gave, without its graph: told to controllers and policies, which see no outputs otherwise."""
    teacher: Outputs | None = None
    """What the objectives compared it with, after the targets: told to controllers and policies."""

    @property
    def progress(self) -> float:
        """Share of the stage that is done, 0..1."""
        return self.step / max(1, self.steps - 1)


@dataclass(frozen=True)
class Setup:
    """What a plug-in is told once, before the first step: the models, and what they gave for a batch to try (B = 2, in eval mode).

    A plug-in makes its own modules here, from the shapes it sees, and raises UsageError for shapes that cannot be matched.
    """

    student: nn.Module
    teacher: Any
    """The teacher; None where only its cache is here."""
    stage: Stage
    ours: Outputs
    theirs: Outputs
    context: Context
    teachers: Mapping[str, Any] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """For messages."""
        return f"stage {self.stage.name}"
