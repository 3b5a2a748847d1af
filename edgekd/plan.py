"""What a run would do and cost, from the recipe and target alone: no weights, no device, no data but its listing.

The costs are estimates (`predicted`): multiply-adds over a stated speed of this machine for training, stated seconds an artifact for
export and measurement.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgekd import students, teachers
from edgekd.console import duration
from edgekd.data import open_data
from edgekd.distillation.outputs import PER_PROMPT
from edgekd.distillation.points import registry
from edgekd.recipe import Recipe, Stage
from edgekd.search.space import Candidate
from edgekd.target import Target

TRAINING_GMACS_PER_SECOND = 25.0
"""Of a distillation step, forward and backward: repvit_s took 27 s for 40 + 20 steps of the demo on 2 cores with bf16, 2026-11-21."""
DECODE_GMACS = 0.025  # one prompt at 256 px
MEASURED_AT = 256
ARTIFACT_SECONDS = 5.0
TEACHER_FLOPS_SECONDS = 0.08  # one image of a 10 M parameter teacher at 256 px
BASE_MEMORY = 1.2e9
MOST_LISTED = 40
"""Candidates that a plan names."""


@dataclass(frozen=True)
class Plan:
    """A plan; `notes` say what is missing before it can be carried out."""

    recipe: Recipe
    target: Target
    data: str
    images: int | None
    points: list[Candidate]
    seconds: dict[str, float]
    memory_bytes: float
    disk_bytes: float
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The JSON document."""
        return {"plan": {"teacher": self.recipe.teacher, "target": self.target.name, "recipe": self.recipe.name, "data": self.data, "images": self.images,
                         "candidates": [c.id for c in self.points], "trained_at_most": _trained(self.recipe, self.points),
                         "budget": self.recipe.budget.model_dump(exclude_none=True)},
                "estimate": {"provenance": "predicted", "seconds": self.seconds, "total_seconds": sum(self.seconds.values()),
                             "memory_bytes": self.memory_bytes, "disk_bytes": self.disk_bytes}, "notes": self.notes}

    def render(self) -> str:
        """The plan for a person."""
        budget = ", ".join(f"{k} {v:g}" for k, v in self.recipe.budget.model_dump(exclude_none=True).items() if isinstance(v, float)) or "none"
        lines = [f"plan: {self.recipe.teacher} -> {self.target.name} ({self.target.description}), recipe {self.recipe.name}",
                 f"  data        {self.data}: {'not there yet' if self.images is None else f'{self.images} images'}",
                 f"  budget      {budget}", f"  candidates  {len(self.points)}; students trained at most: {_trained(self.recipe, self.points)}"]
        if self.recipe.search.strategy == "explore":
            lines += [f"              of {_students(self.points)} students; {_seen(self.recipe, self.points)} of them are looked at, {self.recipe.search.max_short} "
                      f"trained for {self.recipe.search.share:.1%} of the steps at most"]
        lines += [f"    {c.id}" for c in self.points[:MOST_LISTED]]
        if (more := len(self.points) - MOST_LISTED) > 0:
            lines += [f"    and {more} more"]
        lines += ["  stages      " + ", ".join(f"{s.name} ({s.steps} steps of {s.batch_size * s.accumulate})" for s in self.recipe.stages)]
        lines += ["  estimate    (predicted) " + ", ".join(f"{k} {duration(v)}" for k, v in self.seconds.items()),
                  f"              total {duration(sum(self.seconds.values()))}, memory {self.memory_bytes / 1e9:.1f} GB, disk {self.disk_bytes / 1e6:.0f} MB"]
        return "\n".join([*lines, *(f"  note: {n}" for n in self.notes)])


def make_plan(recipe: Recipe, target: Target, data: str, points: Sequence[Candidate]) -> Plan:
    """Count the work of a run.

    Raises:
        UsageError: the data cannot be used, or a student is not known.
    """
    images = len(open_data(data, limit=recipe.data.limit, masks=False))
    notes: list[str] = []
    about = teachers.describe(recipe.teacher) if recipe.teacher in teachers.names() else {}
    params, size = about.get("params_m", 100.0), about.get("image_size", 1024)
    if recipe.teacher in teachers.names() and teachers.shipped(recipe.teacher) is None:
        notes.append(f"the teacher's weights are not here: {about.get('weights', 'give its folder')}")
    if not target.reachable:
        notes.append(f"the device cannot be measured from here ({target.device.how}); the verdict would be 'unverified'")
    macs = max(_gmacs(c) for c in _largest(points))
    trained, search = _trained(recipe, points), recipe.search
    trainings = trained + (min(search.max_short, _seen(recipe, points)) * search.share if search.strategy == "explore" else 0)
    work = sum(s.steps * s.batch_size * s.accumulate * _image_gmacs(s, macs, size) for s in recipe.stages)
    extra = sum(len(open_data(spec)) for spec in recipe.data.extra)
    per_image = TEACHER_FLOPS_SECONDS * params / 10 * (size / 256) ** 2
    exported = trained * len({(c.format, c.scheme) for c in points}) + min(_students(points), search.max_short if search.strategy == "explore" else _students(points))
    seconds = {"cache": (images + extra) * per_image, "train": trainings * work / TRAINING_GMACS_PER_SECOND, "export": exported * ARTIFACT_SECONDS,
               "measure": exported * ARTIFACT_SECONDS}
    embedding = 2 * (128 if size == 256 else 256) * (size // 16) ** 2
    return Plan(recipe, target, data, images, list(points), {k: round(v, 1) for k, v in seconds.items()},
                BASE_MEMORY + params * 1e6 * 4 * 2 + 60e6 * max(s.batch_size for s in recipe.stages), (images + extra) * embedding + exported * 12e6, notes)


def _trained(recipe: Recipe, points: Sequence[Candidate]) -> int:
    """Students that are trained at most."""
    return min(recipe.search.max_trained, _students(points))


def _seen(recipe: Recipe, points: Sequence[Candidate]) -> int:
    """Students that a search looks at."""
    return min(recipe.search.trials, _students(points))


def _students(points: Sequence[Candidate]) -> int:
    """(student, size) pairs."""
    return len({(c.student, c.image_size) for c in points})


def _largest(points: Sequence[Candidate]) -> list[Candidate]:
    """Of every architecture the student that can cost most: a space may have thousands, and counting one takes a while."""
    largest: dict[str, tuple[float, Candidate]] = {}
    for c in points:
        name = students.parse(c.student)
        size = name.width**2 * name.depth * c.image_size**2
        if name.base not in largest or size > largest[name.base][0]:
            largest[name.base] = (size, c)
    return [c for _, c in largest.values()]


def _gmacs(candidate: Candidate) -> float:
    """Of the encoder, measured at MEASURED_AT and scaled by pixels: exact for convolutions and windows, and a 1024 px model needs no minute."""
    size = min(candidate.image_size, MEASURED_AT)
    return float(students.describe(candidate.student, image_size=size)["gmacs"]) * (candidate.image_size / size) ** 2


def _image_gmacs(stage: Stage, encoder: float, side: int) -> float:
    """What one image of a step costs: backward is twice the forward, and a frozen encoder has none."""
    prompted = any(o.name in registry("objective") and registry("objective")[o.name].needs & PER_PROMPT for o in stage.objectives)
    decodes = (stage.decode_iters + 1) * stage.instances if prompted else 0
    return (3 if any(name.startswith("encoder") for name in stage.trainable) else 1) * encoder + decodes * DECODE_GMACS * (side / 256) ** 2
