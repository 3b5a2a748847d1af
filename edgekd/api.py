"""One keyword-only function per verb. Importing this loads no torch; each verb loads what it needs.

    from edgekd import api
    report = api.compress(teacher="sam_nano", target="host", data="photos", budget_ms=30)

Results are typed reports or plain JSON-like dictionaries; files go under `output`. Every error that a user can act on is an
`EdgekdError`.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd import console
from edgekd import recipe as recipes
from edgekd import target as targets
from edgekd.errors import UsageError, unknown
from edgekd.protocols import PROMPTABLE
from edgekd.workspace import write_atomic

if TYPE_CHECKING:
    from edgekd.artifact import DecoderSignature
    from edgekd.recipe import CacheCodec, Recipe
    from edgekd.report.schema import Report
    from edgekd.target import Target
    from edgekd.tasks.classification.predict import Classes
    from edgekd.tasks.evaluation import Evaluation
    from edgekd.tasks.promptable.everything import Everything
    from edgekd.tasks.promptable.predict import Box, Point, Prediction


def load_recipe(name: str | Path = "default", *, sets: Sequence[str] = (), teacher: str | None = None, budget: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe with what the command line says on top of it: `--set`, then `--teacher` and the limits of the budget.

    Raises:
        UsageError: anything wrong in it, all at once.
    """
    flags = [f"budget.{key}={value}" for key, value in (budget or {}).items() if value is not None]
    found = recipes.resolve(name, [*sets, *flags])
    return found.model_copy(update={"teacher": teacher}) if teacher is not None else found


def resolve_target(target: str | Path, device: Mapping[str, Any] | None = None) -> Target:
    """A target by name or file, at the address that `device` tells: `url` (`ssh://user@host:port`, `adb://SERIAL`, `browser`, `local`), `ssh_key`,
    `known_hosts`, `python`, `folder`, `tools`.

    Raises:
        UsageError: no such target, or no way to such an address.
    """
    return targets.resolve(target).at(**(device or {}))


def compress(*, target: str, data: str | Path, teacher: str | None = None, recipe: str | Path = "default", sets: Sequence[str] = (),
             output: Path | None = None, budget_ms: float | None = None, budget_mb: float | None = None, budget: Mapping[str, Any] | None = None,
             device: Mapping[str, Any] | None = None, resume: bool = True, command: str | None = None) -> Report:
    """The loop: distil, quantize, export, profile, decide, report. The same call again continues where it stopped.

    Args:
        budget: further limits by the names of `edgekd.recipe.Budget`: `{"fps": 30, "percentile": "p90", "objective": "fastest"}`.
        device: where it is (`resolve_target`).
    """
    from edgekd import pipeline

    limits = {"latency_ms": budget_ms, "size_mb": budget_mb, **(budget or {})}
    return pipeline.compress(_options(resolve_target(target, device), data, teacher, recipe, sets, output, limits, resume, command))


def plan(*, target: str, data: str | Path, teacher: str | None = None, recipe: str | Path = "default", sets: Sequence[str] = (),
         output: Path | None = None, budget_ms: float | None = None, budget_mb: float | None = None, budget: Mapping[str, Any] | None = None,
         device: Mapping[str, Any] | None = None) -> Any:
    """What `compress` would do, with its costs; starts nothing, and needs neither weights nor the device."""
    from edgekd import pipeline

    limits = {"latency_ms": budget_ms, "size_mb": budget_mb, **(budget or {})}
    return pipeline.plan(_options(resolve_target(target, device), data, teacher, recipe, sets, output, limits, True, None))


def run_folder(*, target: str, recipe: str | Path = "default", teacher: str | None = None) -> Path:
    """Where `compress` writes when it is not told: `runs/TEACHER-TARGET-RECIPE`."""
    found = load_recipe(recipe, teacher=teacher)
    return Path("runs") / f"{Path(found.teacher).name}-{targets.resolve(target).name}-{found.name}"


def _options(device: Target, data: str | Path, teacher: str | None, recipe: str | Path, sets: Sequence[str], output: Path | None,
             budget: Mapping[str, Any], resume: bool, command: str | None) -> Any:
    from edgekd import pipeline

    found = load_recipe(recipe, sets=sets, teacher=teacher, budget=budget)
    if found.task != PROMPTABLE:
        raise UsageError(f"the loop is for {PROMPTABLE}, and recipe '{found.name}' is of the task {found.task}",
                         hint=f"edgekd distill --recipe {recipe} --data {data} --output DIR, then edgekd export, profile and evaluate")
    if found.budget.everything_ms is not None and device.device.transport != "local":
        raise UsageError("segment everything is measured on this machine only, and the budget limits it", where=f"target '{device.name}'",
                         hint="leave budget.everything_ms out, or run edgekd on the device itself with --device local")
    folder = Path(output) if output is not None else Path("runs") / f"{Path(found.teacher).name}-{device.name}-{found.name}"
    return pipeline.CompressOptions(recipe=found, target=device, data=str(data), output=folder, resume=resume,
                                    command=command or f"edgekd compress --teacher {found.teacher} --target {device.name} --data {data}")


def cache(*, teacher: str, data: str | Path, output: Path, split: str | None = None, limit: int | None = None, codec: CacheCodec = "packed",
          dry_run: bool = False) -> dict[str, Any]:
    """Write a teacher's outputs on data to disk, sharded and resumable; says how large they are. `dry_run` only estimates size and time."""
    if codec not in recipes.CACHE_CODECS:
        raise unknown("codec", codec, recipes.CACHE_CODECS)
    from edgekd.distillation import verbs

    return verbs.cache(teacher=teacher, data=str(data), output=Path(output), split=split, limit=limit, codec=codec, dry_run=dry_run)


def verify_cache(*, folder: Path) -> dict[str, Any]:
    """Compare a cache with its checksums.

    Raises:
        EdgekdError: a shard is damaged; it is named.
    """
    from edgekd.distillation import verbs

    return verbs.verify_cache(Path(folder))


def distill(*, data: str | Path, output: Path, recipe: str | Path = "default", teacher: str | None = None, student: str | None = None,
            checkpoint: str | Path | None = None, sets: Sequence[str] = (), tensorboard: bool = False) -> dict[str, Any]:
    """Train a recipe's first student (or `student`, or the one of `checkpoint`) from the teacher; says where the checkpoint is and how the loss went.

    The log is written as `log.jsonl` and `log.csv`, and drawn as `curve.svg`; `tensorboard` adds event files (extra `tracking`). A recipe that trains for
    integers (`smoke_qat`, `qat`) exports the student too and says how far the file is what was trained (`artifact`, `artifact_parity`)."""
    from edgekd import qat
    from edgekd.distillation import verbs
    from edgekd.report import learning

    chosen, begin = load_recipe(recipe, sets=sets, teacher=teacher), None if checkpoint is None else Path(checkpoint).expanduser()
    found = verbs.distill(recipe=chosen, data=str(data), output=Path(output), student=student, start_from=begin, tensorboard=tensorboard)
    found["curve"] = learning.draw(Path(found["log"]))
    if "scheme" in found and console.place().rank == 0:
        found |= qat.export(Path(found["checkpoint"]), Path(output), recipe=chosen, scheme=found["scheme"], data=str(data))
    return found


def train(*, recipe: str | Path, output: Path, sets: Sequence[str] = ()) -> dict[str, Any]:
    """Train a teacher from labelled masks by a recipe's `train:` section; continues where it stopped."""
    from edgekd.distillation import verbs

    found = load_recipe(recipe, sets=sets)
    if found.train is None:
        with_train = [name for name in recipes.names() if recipes.resolve(name).train is not None]
        raise UsageError(f"recipe '{found.name}' has no 'train' section", hint=f"recipes that train a teacher: {', '.join(with_train)}")
    return verbs.train(recipe=found, output=Path(output))


def export(*, model: str | Path, to: Sequence[str], output: Path, scheme: str | None = None, data: str | Path | None = None,
           target: str | None = None, threads: int | None = None, decoder_signature: DecoderSignature = "batched",
           lengths: Mapping[str, int] | None = None, inputs: Sequence[str] = (), mean: Sequence[float] | None = None,
           std: Sequence[float] | None = None) -> dict[str, Any]:
    """Export a model in every format of `to`; one that fails is a row with its reason and does not stop the others.

    Args:
        inputs: of a model of your own, `module:factory`: one `1x3x224x224` or `tokens=Nx77:int64` each (docs/own-models.md). `data` is then photos or arrays.
        mean: with `std`, how photos become the input of such a model: (pixel - mean) / std of RGB in 0..255; 0..1 when left out.
        scheme: a precision; each format's own first one when left out.
        decoder_signature: `batched` takes many prompts a call; `sam` is the six-input decoder of segment-anything's own export, for
            applications that expect it; `embedded` takes points that the caller has embedded, for NPUs (docs/decoder-signatures.md).
        lengths: `prompts` and `points` of a call, for formats whose shapes cannot vary; axes of any length of a model of your own.
    """
    from edgekd import exports

    device = targets.resolve(target) if target is not None else None
    return exports.export(exports.Request(
        model=str(model), formats=tuple(to), output=Path(output), scheme=scheme, data=data, qdq=device.qdq if device else lambda format: "u8s8", threads=threads,
        decoder_signature=decoder_signature, lengths=dict(lengths or {}), inputs=tuple(inputs), mean=mean, std=std))


def quantize(*, model: str | Path, scheme: str, format: str = "onnx", target: str = "host", data: str | Path | None = None,
             output: Path, limit: int = 32, lengths: Mapping[str, int] | None = None, mean: Sequence[float] | None = None,
             std: Sequence[float] | None = None, size: tuple[int, int] | None = None, max_drop: float = 0.5, target_ms: float | None = None) -> dict[str, Any]:
    """Export a model in a precision and in fp32, and compare the two: size, latency where it can be measured, agreement of masks.

    `scheme` is a text of the grammar in `edgekd.schemes`; `auto` finds the fastest mix of precisions that loses at most `max_drop` points to fp32 (and
    takes at most `target_ms`), and returns all that was tried and their Pareto set.

    A float `.onnx` file of anybody's is quantized itself and compared with itself by its outputs (docs/own-models.md); what follows is for such.

    Args:
        lengths: of axes of any length, in seeded arrays and pictures.
        mean: with `std`, how photos of `data` become the input: (pixel - mean) / std of RGB in 0..255; 0..1 when left out.
        size: (height, width) of pictures, where the model takes any.
    """
    from edgekd import comparing

    device = targets.resolve(target)
    if Path(model).suffix.lower() == ".onnx":
        from edgekd.own import data as own_data
        from edgekd.own import files

        photos = own_data.Photos.of(mean, std, size)
        return files.quantize(files.Request(Path(model).expanduser(), scheme, format, device, Path(output), data, lengths, photos))
    if lengths or mean or std or size:
        raise UsageError("--length, --mean, --std and --size of `quantize` are for an .onnx file", where=str(model), hint="leave them out: the model says itself")
    if scheme == "auto":
        from edgekd import mixing

        return mixing.auto(model=model, format=format, target=device, data=data, output=Path(output), limit=limit, budget=mixing.Budget(max_drop, target_ms))
    return comparing.quantize(model, scheme=scheme, format=format, target=device, data=data, output=Path(output), limit=limit)


def sensitivity(*, model: str | Path, format: str = "onnx", target: str = "host", data: str | Path | None = None, output: Path, limit: int = 32) -> dict[str, Any]:
    """What 8 bits cost each layer, in mask IoU: a ranking, a walk that returns the worst to float, and a plot."""
    from edgekd import mixing

    return mixing.rank(model=model, format=format, target=targets.resolve(target), data=data, output=Path(output), limit=limit)


def prune(*, model: str | Path, data: str | Path, output: Path, target: str = "host", target_ms: float | None = None, ratio: float | None = None,
          depth: bool | int = False, importance: str = "auto", multiple: int = 8, teacher: str | None = None, format: str = "onnx", scheme: str = "fp32",
          limit: int = 32, threads: int | None = None) -> dict[str, Any]:
    """Leave channels, and with `depth` blocks, out of a trained model until its exported encoder takes `target_ms` on the target, or by a `ratio`;
    writes a checkpoint to distil further (docs/pruning.md). `met` is False where the target is out of reach."""
    from edgekd import pruning

    return pruning.prune(pruning.Request(
        str(model), targets.resolve(target), str(data), Path(output), target_ms=target_ms, ratio=ratio, depth=depth, importance=importance, multiple=multiple,
        teacher=teacher, format=format, scheme=scheme, threads=threads, limit=limit))


def profile(*, artifact: str | Path, target: str = "host", threads: int | None = None, warmup: int = 3, repeats: int = 30, prompts: int = 1,
            format: str | None = None, scheme: str | None = None, lengths: Mapping[str, int] | None = None, layers: bool = False, save: bool = False,
            device: Mapping[str, Any] | None = None, output: Path | None = None) -> dict[str, Any]:
    """Latency, memory and size of an artifact on a device, with the circumstances; or of a model file of any format alone.

    Args:
        format: of a file, where its suffix does not say it.
        scheme: the precision that a file is to be run in, where its runtime has a choice.
        lengths: of a file's axes of any length, which are 1 otherwise.
        layers: also what every operator takes, with advice; `output` is a folder for a page of it, `layers.html`.
        save: add it to the user's database of latencies, from which others are predicted.
        device: where it is (`resolve_target`).
    """
    from edgekd import measuring

    return measuring.profile(measuring.Request(str(artifact), resolve_target(target, device), threads, warmup, repeats, prompts, format, scheme, lengths or {},
                                               layers, save, output))


def profile_everything(*, artifact: str | Path, target: str = "host", threads: int | None = None, repeats: int = 10, modes: Sequence[str] = (),
                       image: str | Path | None = None) -> list[dict[str, Any]]:
    """What segmenting everything on a photo costs on a device, way by way: all decoder calls and the work on the host included."""
    from edgekd.profiling.everything import profile_everything as measure

    rows = measure([_artifact(artifact)], targets.resolve(target), modes=modes, photo=Path(image) if image else None, threads=threads, repeats=repeats)
    return [row.model_dump(mode="json", by_alias=True, exclude_none=True) for row in rows]


def _artifact(artifact: str | Path) -> Path:
    from edgekd import resolve

    folder = resolve.artifact_folder(Path(artifact).expanduser())
    if folder is None:
        raise UsageError(f"there is no artifact at {artifact}", hint="name a folder that `edgekd export` or `edgekd compress` wrote")
    return folder


def evaluate(*, model: str | Path, data: str | Path, split: str | None = None, teacher: str | None = None, limit: int | None = None,
             max_instances: int | None = None, threads: int | None = None, metrics: Sequence[str] | None = None,
             boxes: str | Path | None = None, everything_mode: str = "auto", images: str | Path | None = None) -> Evaluation:
    """Accuracy of any model by protocol. The teacher that an artifact or checkpoint names is asked the same prompts.

    Args:
        metrics: groups of `edgekd.tasks.promptable.metrics.GROUPS` (box, center and clicks when left out).
        boxes: instead of those, COCO's AP of the masks that boxes prompt: a detector's results json, or `truth` for the ground truth's boxes.
        everything_mode: of the group `everything` (see `everything`).
        images: where the photos of a COCO or LVIS json are, when not beside it.
    """
    from edgekd import plugins, resolve
    from edgekd.data import open_data
    from edgekd.tasks.promptable.metrics import check_groups

    if metrics is not None:
        check_groups(metrics)  # before anything is loaded
    given: dict[str, Any] = {"metrics": metrics, "boxes": boxes, "max_instances": max_instances,
                             "everything_mode": everything_mode if everything_mode != "auto" else None}
    asked = resolve.load_model(model, threads=threads)
    task, name = plugins.task_of(asked), teacher or resolve.teacher_of(model)
    reference = resolve.load_model(name, task=task.name) if name is not None else None
    dataset = open_data(data, split=split, limit=limit, images=images)
    with console.progress(len(dataset), f"evaluate {asked.name}") as progress:
        return task.evaluate(asked, dataset, teacher=reference, progress=progress, **{k: v for k, v in given.items() if v is not None})


def predict(*, model: str | Path, image: str | Path, output: Path | None = None, points: Sequence[Point] = (), labels: Sequence[int] | None = None,
            box: Box | None = None, threads: int | None = None) -> Prediction | Classes:
    """Segment what a prompt means on one photo and write the mask as a PNG of the photo's size; of a classifier, the classes it finds likeliest
    (written as JSON where there is an `output`).

    Raises:
        UsageError: a wrong prompt, or one for a model that takes none.
    """
    from edgekd import plugins, resolve

    found = resolve.load_model(model, threads=threads)
    prompt: dict[str, Any] = {"points": points, "labels": labels, "box": box}
    return plugins.task_of(found).predict(found, Path(image), output, **{k: v for k, v in prompt.items() if v is not None and len(v)})


def everything(*, model: str | Path, image: str | Path, output: Path, mode: str = "auto", points_per_side: int | None = None,
               threads: int | None = None) -> Everything:
    """Segment everything on one photo: COCO run lengths as JSON at `output`, and a picture of the masks beside it.

    Args:
        mode: `grid`, `hierarchical`, `proposals` (models with a box proposer), or `auto`: the cheapest that the model has.
        points_per_side: of the grid; 32 when left out.
    """
    from edgekd import resolve
    from edgekd.tasks.promptable.everything import Settings
    from edgekd.tasks.promptable.saving import everything_file

    settings = Settings() if points_per_side is None else Settings(points_per_side=points_per_side)
    return everything_file(resolve.load_model(model, threads=threads), image, output, mode=mode, settings=settings)  # type: ignore[arg-type]


def inspect(*, model: str | Path, strict: bool = False) -> dict[str, Any]:
    """What a name or a file of weights is: family, variant, layout, sizes, preprocessing, licence, and what is wrong with it."""
    from edgekd import inspecting

    return inspecting.inspect(model, strict=strict)


def convert(*, source: str | Path, to: str, output: str | Path, decoder: str | Path | None = None) -> dict[str, Any]:
    """Rewrite weights in another layout (`meta`, `hf`, `edgekd`), bit by bit the same."""
    from edgekd import converting

    return converting.convert(source, to=to, output=output, decoder=decoder)


def report(*, run: Path) -> Path:
    """Make `report.html` and the model card of a run again from its files; the path of the page."""
    from edgekd import report as reports

    return reports.rebuild(Path(run))


def merge(*, run: Path, measured: Path) -> Report:
    """The report of a run for a device out of reach, with what the board's owner measured there (`measured.json`)."""
    from edgekd import handover

    return handover.merge(Path(run), Path(measured))


def doctor(*, install: str | None = None) -> dict[str, Any]:
    """What works on this machine, and the exact command that mends what does not.

    Args:
        install: the name of an environment to make first, for a toolchain that cannot share this one (`rknn`).

    Raises:
        UsageError: no environment of that name.
        EdgekdError: it cannot be made, with pip's last words.
    """
    from edgekd import doctor as examination

    if install is not None:
        examination.install(install)
    return examination.examine()


def init(*, kind: str, name: str, path: Path, force: bool = False) -> Path:
    """Copy a shipped recipe or target to edit.

    Raises:
        UsageError: no such kind or name, or the file exists and `force` is not given.
    """
    shelves = {"recipe": recipes.shipped, "target": targets.shipped}
    if kind not in shelves:
        raise unknown("kind", kind, shelves)
    shelf, path = shelves[kind](), Path(path)
    known = targets.aliases() if kind == "target" else {}
    chosen = known.get(name, name)
    if chosen not in shelf:
        raise unknown(kind, name, [*shelf, *known])
    if path.exists() and not force:
        raise UsageError("the file exists already", where=path, hint="name another one, or replace it with --force")
    if path.parent != Path() and not path.parent.is_dir():
        raise UsageError("the folder does not exist", where=path.parent)
    source = shelf[chosen]
    text = targets.dump(targets.resolve(chosen)) if isinstance(source, Mapping) else source.read_text(encoding="utf-8")
    return write_atomic(path, text)
