"""What students of a run learn from: the teachers as prepared, the photos, and the caches of what the teachers say about them."""
from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekd import console, tasks
from edgekd.data import Subset, open_data
from edgekd.distillation import points
from edgekd.distillation.batches import Batches, Source
from edgekd.distillation.cache import build_cache
from edgekd.distillation.distributed import current, lent
from edgekd.distillation.step import Step, wanted
from edgekd.errors import UsageError
from edgekd.protocols import Dataset
from edgekd.recipe import Recipe, Stage
from edgekd.workspace import fingerprint


@dataclass(frozen=True)
class TrainingData:
    """`sources` for training, `held_out` photos for evaluation (never trained on)."""

    sources: list[Source]
    held_out: Dataset
    skipped: list[str]
    fingerprint: str
    window: int | None = None
    """`data.shuffle_window`."""

    @property
    def images(self) -> int:
        """Of all sources together."""
        return sum(len(s) for s in self.sources)

    def batches(self, step: Step) -> Batches:
        """The stream of batches for one stage."""
        live = {name: teacher.preprocess for name, teacher in step.teachers.items()} if step.live else {}
        return Batches(self.sources, step.student.preprocess, step.stage.batch_size, step.stage.seed, live=live, policies=step.policies,
                       window=self.window)


def load_teachers(recipe: Recipe, data: str, folder: Path) -> dict[str, Any]:
    """Every teacher of a recipe by its name, its own first and prepared as the recipe says."""
    task = tasks.get(recipe.task)
    teacher = task.teacher(recipe.teacher)
    for ref in recipe.preparation:
        one = points.build("preparation", ref.name, ref.options)
        console.log(f"prepare {recipe.teacher}: {ref.name}")
        teacher = one.prepare(teacher, open_data(data, limit=recipe.data.limit), folder)
    found = {recipe.teacher: teacher, **{name: task.teacher(name) for name in recipe.more_teachers}}
    called = {getattr(t, "name", name): t for name, t in found.items()}
    if len(called) < 1 + len(recipe.more_teachers):
        raise UsageError(f"two of the teachers {', '.join([recipe.teacher, *recipe.more_teachers])} have one name", where="more_teachers",
                         hint="name each teacher once; checkpoints of one model cannot teach together")
    return called


def split_photos(dataset: Dataset, fraction: float) -> tuple[Dataset, Dataset]:
    """Training and held-out photos: every n-th is held out. With fewer than 4 photos both are all of them."""
    if len(dataset) < 4 or fraction <= 0:
        return dataset, dataset
    every = max(2, round(1 / fraction))
    held = [i for i in range(len(dataset)) if i % every == every - 1]
    return Subset(dataset, [i for i in range(len(dataset)) if i % every != every - 1]), Subset(dataset, held)


def open_training_data(recipe: Recipe, data: str, teachers: Mapping[str, Any], folder: Path, stages: Sequence[Stage] | None = None) -> TrainingData:
    """The user's photos and the recipe's extra data, each with its caches under `folder` (made or completed here, by all processes together).

    Args:
        teachers: by name, the recipe's own first.
        stages: those that will be trained, when they are not the recipe's.
    """
    task, stages = tasks.get(recipe.task), list(stages or recipe.stages)
    own, group = next(iter(teachers.values())), current()
    photos = open_data(data, limit=recipe.data.limit)
    train, held_out = split_photos(photos, recipe.data.val_fraction)
    outputs = {name: wanted(stages, teacher) if teacher is own else _shared(wanted(stages, own)) for name, teacher in teachers.items()}
    sources = []
    for dataset in (train, *(open_data(spec) for spec in recipe.data.extra)):
        caches = []
        for name, teacher in teachers.items():
            with console.progress(len(dataset), f"cache {name}") as progress, lent([teacher], group.device):
                where = folder / fingerprint([dataset.fingerprint(), name] if teacher is not own else dataset.fingerprint())
                caches.append(build_cache(teacher, dataset, where, outputs=outputs[name], codec=recipe.data.cache, on_images=progress.advance,
                                          rank=group.rank, world=group.world))
        sources.append(Source(task.labelled(dataset, own), *caches))
    group.wait()  # until what the others make is there
    # a cache that belongs to no dataset of this run any more is of an earlier recipe or other photos
    keep = {c.folder for s in sources for c in s.caches}
    for stale in [f for f in folder.iterdir() if f.is_dir() and f not in keep] if group.first else []:
        shutil.rmtree(stale)
    return TrainingData(sources, held_out, photos.skipped, fingerprint([c.index["fingerprint"] for s in sources for c in s.caches]),
                        recipe.data.shuffle_window)


def _shared(outputs: Mapping[str, str | None]) -> dict[str, str | None]:
    """What every teacher has: outputs of its own, no taps."""
    return {name: path for name, path in outputs.items() if path is None} or {"embedding": None}
