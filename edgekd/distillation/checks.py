"""What is refused before anything is trained: plug-ins that do not exist or do not fit the task, and data that cannot give what they need."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from edgekd import tasks
from edgekd.distillation import points
from edgekd.distillation.generations import check_generations
from edgekd.distillation.material import TrainingData
from edgekd.distillation.outputs import FROM_DATA
from edgekd.distillation.parts import part_of
from edgekd.errors import UsageError, unknown
from edgekd.recipe import Recipe, Stage

FEWEST_IMAGES = 2


def plugins_of(stages: Sequence[Stage]) -> Iterator[tuple[str, str, Any, str]]:
    """(point, name, plug-in, where) of every plug-in of the stages, built with its options."""
    for stage in stages:
        for point, refs in (("objective", stage.objectives), ("target", stage.targets), ("controller", stage.controllers), ("policy", stage.policies)):
            for ref in refs:
                yield point, ref.name, points.build(point, ref.name, ref.options), f"stage {stage.name}"


def check_recipe(recipe: Recipe) -> list[Stage]:
    """The stages that will be trained, controllers' own included.

    Raises:
        UsageError: an unknown task, plug-in or option, or a plug-in that needs what the task does not give.
    """
    task = tasks.get(recipe.task)
    for point, refs in (("preparation", recipe.preparation), ("proposer", [recipe.proposer] if recipe.proposer else [])):
        for ref in refs:
            points.build(point, ref.name, ref.options)
    for stage in recipe.stages:
        for part in stage.trainable:
            if part_of(part) not in task.parts:
                raise unknown("trainable part", part, task.parts)
        if stage.init_from is not None and not Path(stage.init_from).is_file():
            raise UsageError(f"there is no checkpoint '{stage.init_from}' to start from", where=f"stage {stage.name}", hint="take init_from out, or give a .safetensors file")
    list(plugins_of(recipe.stages))  # names and options, before a controller makes other stages of them
    stages = expand(recipe.stages)
    taught = {f"stage {s.name}" for s in stages if s.teacher_from}  # an assistant and the recipe's teacher are two
    for point, name, plugin, where in plugins_of(stages):
        missing = sorted(plugin.needs - task.outputs)
        if missing:
            fitting = [t.name for t in tasks.registry().values() if plugin.needs <= t.outputs]
            raise UsageError(f"{point} '{name}' needs {' and '.join(missing)}, which the task {task.name} does not give", where=where,
                             hint=f"it is for {', '.join(fitting) or 'another task'}; `edgekd list objectives` says what each needs")
        if "teachers" in plugin.needs and not recipe.more_teachers and where not in taught:
            raise UsageError(f"{point} '{name}' compares with several teachers, and the recipe has one", where=where, hint="add more_teachers: [NAME]")
    check_generations(stages)
    return stages


def expand(stages: Sequence[Stage]) -> list[Stage]:
    """The stages with those in their place that controllers make of them, and again of those."""
    found: list[Stage] = []
    for stage in stages:
        made = next((m for ref in stage.controllers if (m := points.build("controller", ref.name, ref.options).expand(stage)) != [stage]), None)
        found += [stage] if made is None else expand(made)
    return found


def check_data(stages: Sequence[Stage], data: TrainingData) -> None:
    """Raises UsageError: too few photos, or data without the labels that an objective needs."""
    if data.images < FEWEST_IMAGES:
        raise UsageError(f"{data.images} photo is too few to learn from", hint=f"give at least {FEWEST_IMAGES}; a hundred are a start")
    for point, name, plugin, where in plugins_of(stages):
        need = "classes"
        if need in plugin.needs & FROM_DATA and not any(getattr(s.dataset, "has_classes", False) for s in data.sources):
            raise UsageError(f"{point} '{name}' needs labelled photos (classes), and these have none", where=where,
                             hint="give a folder of folders, one a class, or take an objective that learns from the teacher alone (edgekd list objectives)")
        if getattr(plugin, "min_batch", 1) > data.images:
            raise UsageError(f"{point} '{name}' compares {plugin.min_batch} photos with each other, and there are {data.images}", where=where,
                             hint="give more photos, or take another objective")
