"""Stages that train another student than the one that ships, and stages whose teacher is such an assistant.

A stage with `student: NAME` trains an assistant; a later one with `teacher_from: [NAME, ...]` learns from the one of these that does best for
its size. Assistants are built once, trained in place, and asked live: no cache knows them.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edgekd.distillation import points
from edgekd.errors import UsageError
from edgekd.recipe import Stage

Losses = Mapping[str, float]


def check_generations(stages: Sequence[Stage]) -> None:
    """Raises UsageError: a stage learns from an assistant that no earlier stage trains, or from a cache of one; or the student itself is never
    trained."""
    trained: list[str] = []
    for stage in stages:
        where = f"stage {stage.name}"
        missing = next((name for name in stage.teacher_from if name not in trained), None)
        if missing is not None:
            raise UsageError(f"no earlier stage trains the assistant '{missing}'", where=where,
                             hint=f"put a stage with student: {missing} before it" + (f"; those before it train {', '.join(trained)}" if trained else ""))
        if stage.teacher_from and stage.teacher == "cached":
            raise UsageError("an assistant has no cache", where=where, hint="leave 'teacher' out: it is asked live")
        if stage.student is not None:
            trained.append(stage.student)
    if trained and all(stage.student is not None for stage in stages):
        raise UsageError("no stage trains the student itself", hint="leave 'student' out of the last stage")


def build_assistants(stages: Sequence[Stage], build: Callable[[str], Any] | None) -> dict[str, Any]:
    """Every assistant of the stages by the name that the stages know it by, untrained."""
    names = list(dict.fromkeys(s.student for s in stages if s.student is not None))
    if names and build is None:
        raise UsageError(f"there is nothing that builds the assistant '{names[0]}'", hint="train these stages with edgekd distill or edgekd compress")
    return {name: build(name) for name in names} if build is not None else {}


def teachers_of(stage: Stage, teachers: Any, assistants: Mapping[str, Any], losses: Losses) -> Any:
    """Whom a stage learns from, by name: the recipe's teachers; or the best of its assistants, and after it the recipe's teachers where something in
    the stage compares several.

    Args:
        teachers: the recipe's, by name with its own first; or one.
        losses: of each assistant at the end of its last stage.
    """
    if not stage.teacher_from:
        return teachers
    teachers = dict(teachers) if isinstance(teachers, Mapping) else {teachers.name: teachers}
    base = next(iter(teachers.values()))
    best = assistants[max(stage.teacher_from, key=lambda name: score(size(base), size(assistants[name]), losses[name]))]
    return {best.name: best, **(teachers if several(stage) else {})}


def end_loss(curve: Sequence[Mapping[str, float | None]]) -> float:
    """The mean over the last tenth of a stage's steps that had a finite loss."""
    found = [row["loss"] for row in curve if row["loss"] is not None]
    last = found[-max(1, len(found) // 10) :]
    return sum(last) / len(last) if last else float("inf")


def score(teacher_size: int, size: int, loss: float) -> tuple[float, float]:
    """What an assistant is chosen by, larger is better: - loss / (parameters that it saves), AMD's negative performance-scale derivative (arXiv
    2407.04208) with the distillation loss as the drop in performance. One that saves none comes after all that do."""
    saved = teacher_size - size
    return (-loss / saved, -loss) if saved > 0 else (float("-inf"), -loss)


def size(model: Any) -> int:
    """Parameters of the encoder, which is what students differ in."""
    return sum(p.numel() for p in getattr(model, "encoder", model).parameters())


def several(stage: Stage) -> bool:
    """Whether something in a stage compares several teachers."""
    kinds = (("objective", stage.objectives), ("target", stage.targets), ("controller", stage.controllers), ("policy", stage.policies))
    return any("teachers" in points.registry(point)[ref.name].needs for point, refs in kinds for ref in refs if ref.name in points.registry(point))
