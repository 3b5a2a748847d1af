"""The six plug-in points of distillation, each a folder of small files and an entry-point group, and the 22 families they come from.

    point          folder           question it answers                                        entry points
    objective      objectives/      how far is the student from the teacher on this batch?     edgekd.objectives
    target         targets/         what should the student copy instead of the plain output?  edgekd.targets_of_teachers
    controller     controllers/     what counts how much, and which stages are there?          edgekd.controllers
    policy         policies/        which photos, in which view, mixed how?                    edgekd.policies
    preparation    preparations/    what is done to the teacher first?                         edgekd.preparations
    proposer       proposers/       which student is worth training?                           edgekd.proposers

A plug-in is a class with `name`, `family` (of FAMILIES), `paper` and `needs` (of `outputs.NEEDS`), named by a module-level variable that is
called like its point: `objective = FeatureMSE`. Options are the constructor's arguments. Modules and parameters that a plug-in makes for
itself live in it, train with the student, are saved with the stage's state, and never reach an artifact: only the student is exported.
"""
from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from edgekd import plugins
from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.errors import UsageError, unknown

if TYPE_CHECKING:
    from pathlib import Path

    from edgekd.distillation.batches import Batch
    from edgekd.protocols import Dataset, Sample
    from edgekd.recipe import Stage

FAMILIES: dict[str, str] = {
    "logit": "logits and soft labels", "divergence": "choice of divergence", "optimal_transport": "optimal transport",
    "feature": "features and projectors", "norm_direction": "norm and direction", "relation": "relations and graphs",
    "contrastive": "contrast and correspondence", "masked_feature": "masked features", "attention": "attention maps",
    "multi_step": "several steps, assistants, blocks", "interpolated_teacher": "interpolated teacher", "adaptive_weighting": "adaptive weights",
    "mutual": "online and mutual", "self_distillation": "self-distillation and deep supervision", "multi_teacher": "several teachers",
    "vlm_teacher": "vision-language teacher", "data": "data: choice, views, mixing", "dense_prediction": "dense prediction",
    "teacher_preparation": "preparing the teacher", "student_search": "search for a student", "quantization_aware": "quantization-aware",
    "recipe_choice": "choice of recipe", "prompt_in_the_loop": "prompts in the loop",
}


class Plugin:
    """The facts that every plug-in states."""

    name: ClassVar[str]
    family: ClassVar[str]
    paper: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()


class Objective(nn.Module, Plugin):
    """A loss per sample. What it needs of the data is "truth" or "boxes" (the data's masks, or the teacher's own of the whole photo) or
    "classes"; the rest is asked of student and teacher."""

    default_taps: ClassVar[str] = ""
    """With "feats" or "attention" in `needs`, the pairs compared when the recipe names none: "embedding", "stages" (the last map of every
    resolution, deepest with deepest), "attention" (the last of each), or of the student alone "student" (its stages) and "student_attention" (the
    probabilities of every attention, and its output)."""
    asks_teacher: ClassVar[bool] = True
    """False: it compares the student with the data alone, and the teacher need not answer."""
    least_at_teacher: ClassVar[bool] = True
    """Whether the loss is least where the student gives what the teacher gives; not so with random projectors, or labels of its own."""
    min_batch: ClassVar[int] = 1
    """Photos that a batch must have at least for the loss to mean something."""

    def bind(self, setup: Setup) -> None:
        """Called once before training: make modules that fit the shapes in `setup.ours` and `setup.theirs`, or raise UsageError."""

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """-> losses (B,), or (P,) for what is asked once a decode."""
        raise NotImplementedError


class Target(nn.Module, Plugin):
    """Replaces what the teacher gave by what the student is to learn instead."""

    def bind(self, setup: Setup) -> None:
        """As `Objective.bind`."""

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Outputs:
        """-> the teacher's outputs as the objectives will see them. Called before the objectives, once a batch."""
        raise NotImplementedError


class Controller(nn.Module, Plugin):
    """Decides over time: which stages there are, and what counts how much. Has parameters only if they are to be trained with the student's."""

    def expand(self, stage: Stage) -> list[Stage]:
        """The stages to train in place of this one, without this controller where that would go on for ever."""
        return [stage]

    def begin(self, setup: Setup) -> None:
        """As `Objective.bind`; the stage starts after this."""

    def weigh(self, losses: Mapping[str, Tensor], context: Context) -> dict[str, Tensor]:
        """Losses (B,) of every objective, its weight of the recipe already in -> the losses that are added up."""
        return dict(losses)

    def after(self, context: Context) -> None:
        """Called after every optimizer step."""

    def finish(self) -> None:
        """Called once when the stage's weights are final, before they are written: what `begin` did to the student is undone here."""


class Policy(nn.Module, Plugin):
    """Decides about data: the order of photos, a view of each, and what becomes of a batch.

    `live`: it changes pixels, so cached teacher outputs do not fit any more and the teacher is asked for every batch.
    """

    live: ClassVar[bool] = False

    def bind(self, setup: Setup) -> None:
        """As `Objective.bind`; `setup.theirs` and `setup.ours` are those of the batch to try."""

    def weights(self, images: int, domains: np.ndarray, epoch: int) -> np.ndarray | None:
        """How often each of the training photos is drawn relative to the others (0: never), asked before the first photo of every epoch;
        None: all alike. domains (images,) int is the data set of each. An epoch is asked about again when a killed run goes on, and
        batches are made ahead: what is answered should hang on what was known an epoch earlier."""
        return None

    def view(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Another view of a photo with its masks, before it is brought to a model's frame. Runs outside the training thread."""
        return sample

    def mix(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Change a batch as a whole; the teacher is asked about its `images` afterwards when `live`."""
        return batch

    def observe(self, losses: Tensor, context: Context) -> None:
        """Total loss (B,) of each photo of the batch, after the step."""


class Preparation(Plugin):
    """Changes the teacher before anything is asked of it. The cache is keyed by the prepared weights."""

    def prepare(self, teacher: Any, data: Dataset, folder: Path) -> Any:
        """A frozen teacher in eval mode: the same, fine-tuned or wrapped. `folder` may keep what took long to make."""
        raise NotImplementedError


@dataclass(frozen=True)
class Suggestion:
    """A student (name, image size) with its score, larger is better, and why."""

    student: str
    image_size: int
    score: float
    reason: str


class Proposer(Plugin):
    """Ranks students before any of them is trained."""

    def propose(self, candidates: Sequence[tuple[str, int]], build: Any, teacher: Any, data: Dataset) -> list[Suggestion]:
        """Best first. `build(name, image_size)` gives the untrained student; `data` has photos to look at."""
        raise NotImplementedError


FOLDERS = {"objective": "objectives", "target": "targets", "controller": "controllers", "policy": "policies", "preparation": "preparations",
           "proposer": "proposers"}
GROUPS = {point: f"edgekd.{folder}" for point, folder in FOLDERS.items()} | {"target": "edgekd.targets_of_teachers"}


@cache
def registry(point: str) -> dict[str, Any]:
    """name -> class of one point, from its folder and its entry points."""
    package = f"edgekd.distillation.{FOLDERS[point]}"
    modules = (importlib.import_module(f"{package}.{name}") for name in plugins.submodules(package))
    found = {getattr(m, point).name: getattr(m, point) for m in modules if hasattr(m, point)}
    return {**plugins.entry_points(GROUPS[point]), **found}


def names(point: str) -> list[str]:
    """Names that recipes can use at a point."""
    return sorted(registry(point))


def build(point: str, name: str, options: Mapping[str, Any]) -> Any:
    """A plug-in with its options.

    Raises:
        UsageError: unknown name (with the nearest) or option.
    """
    if name not in registry(point):
        elsewhere = next((p for p in FOLDERS if name in registry(p)), None)
        if elsewhere:
            raise UsageError(f"'{name}' is no {point}, it is a {elsewhere}", hint=f"name it under '{RECIPE_KEYS[elsewhere]}'")
        raise unknown(point, name, registry(point))
    try:
        return registry(point)[name](**options)
    except TypeError as e:
        known = [p for p in inspect.signature(registry(point)[name]).parameters if p not in ("args", "kwargs")]
        raise UsageError(f"{point} '{name}' does not take these options: {e}", where=f"options {sorted(options)}",
                         hint=f"its options: {', '.join(known) or 'none'}") from e


RECIPE_KEYS = {"objective": "stages.N.objectives", "target": "stages.N.targets", "controller": "stages.N.controllers", "policy": "stages.N.policies",
               "preparation": "preparation", "proposer": "proposer"}


def describe(point: str, name: str) -> dict[str, Any]:
    """What `edgekd list objectives` shows of a plug-in."""
    found = registry(point)[name]
    doc = (inspect.getdoc(found) or "").strip().split("\n")[0]
    return {"name": name, "point": point, "family": found.family, "paper": found.paper, "needs": sorted(found.needs), "summary": doc}


def everything() -> list[dict[str, Any]]:
    """Every plug-in of every point."""
    return [describe(point, name) for point in FOLDERS for name in names(point)]
