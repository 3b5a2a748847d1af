"""The recipe: YAML of one complete run. `resolve("default", ["budget.latency_ms=30"])` gives the typed whole.

Everything that changes a result is here; what belongs to the device is in `edgekd.target`. `auto` in `formats` and
`quantization.schemes` stands for all that both the target runs and an exporter here writes, and is filled in by `with_auto`.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator
from typing_extensions import Self

from edgekd import config, plugins
from edgekd.config import Settings
from edgekd.errors import UsageError
from edgekd.search_section import SearchSection, check_sizes

Fraction = float
REFERENCE_SCHEME = "fp32"
CacheCodec = Literal["packed", "int8", "fp16"]
CACHE_CODECS: tuple[CacheCodec, ...] = ("packed", "int8", "fp16")


def _names_or_auto(value: Any) -> Any:
    if value == "auto" or (isinstance(value, list) and value and all(isinstance(v, str) for v in value)):
        return value
    raise ValueError(f"it should be auto or a list of names, not {value!r}")


NamesOrAuto = Annotated[list[str] | Literal["auto"], BeforeValidator(_names_or_auto)]


class StudentSpace(Settings):
    """A student and the input sizes to try it at."""

    name: str
    image_sizes: list[int] = Field(default=[256], min_length=1)

    @field_validator("image_sizes")
    @classmethod
    def _stride(cls, sizes: list[int]) -> list[int]:
        return check_sizes(sizes)


class DataSection(Settings):
    """What joins the user's photos, and how they are split."""

    extra: list[str] = []
    """More training data, by specification: `scenes:seed=500,count=48`."""
    limit: int | None = Field(default=None, ge=1)
    """The first so many photos only."""
    val_fraction: Fraction = Field(default=0.25, ge=0, lt=1)
    """Share of the photos that is kept out of training and used to evaluate."""
    shuffle_window: int | None = Field(default=None, ge=64)
    """Photos that are shuffled together, for shards on disks that are slow at random: runs of 64 neighbours are drawn in a shuffled order, and
    all photos of so many runs are mixed. None: every photo of an epoch with every other."""
    cache: CacheCodec = "packed"
    """How the teacher's maps are kept on disk: `packed` takes a quarter of fp16, `int8` half."""


class PluginRef(Settings):
    """A plug-in by name and its own options."""

    name: str
    options: dict[str, Any] = {}


class ObjectiveRef(PluginRef):
    """A distillation loss, what it counts, and the taps that it compares."""

    weight: float = Field(default=1.0, ge=0)
    final_weight: float | None = Field(default=None, ge=0)
    """What it counts at the last step; the weight goes there in a straight line."""
    taps: list[tuple[str, str]] = []
    """[student's, teacher's] pairs, for objectives that compare features or attention; none: the objective's own choice."""

    def weight_at(self, progress: float) -> float:
        """The weight when `progress` (0..1) of the stage is done."""
        return self.weight if self.final_weight is None else self.weight + (self.final_weight - self.weight) * progress


class Prompting(Settings):
    """How an instance is prompted while training: the first prompt, and the clicks that correct the answer."""

    box_share: Fraction = Field(default=0.5, ge=0, le=1)
    """Boxes among the first prompts; the others are clicks."""
    coin: Literal["prompt", "batch"] = "prompt"
    """What box or click is drawn for: every prompt alone, or all of a batch together (EdgeSAM, EfficientViT-SAM)."""
    jitter: float = Field(default=0.1, ge=0)
    """Noise of a box's corners as a share of its side, at most 20 px of a 1024 px frame (SAM)."""
    clicks: tuple[int, int] = (1, 1)
    """Fewest and most positive points of a click prompt."""
    central: Fraction = Field(default=0.5, ge=0, le=1)
    """Share of the click prompts whose first point is far inside the mask; the other points fall anywhere in it."""
    corrected_by: Literal["teacher", "data"] = "teacher"
    """Whose mask the answer is compared with to find the next click: the teacher's answer, or the mask that the prompt was drawn from."""
    fewest_errors: int = Field(default=1, ge=1)
    """With fewer wrong cells of the mask logits than this there is no click (EdgeSAM: 10)."""

    @field_validator("clicks")
    @classmethod
    def _from_to(cls, value: tuple[int, int]) -> tuple[int, int]:
        if not 1 <= value[0] <= value[1]:
            raise ValueError(f"it should be [fewest, most] with 1 <= fewest <= most, not {list(value)}")
        return value


class Stage(Settings):
    """One training phase."""

    name: str
    objectives: list[ObjectiveRef] = Field(min_length=1)
    targets: list[PluginRef] = []
    """What is done to the teacher's outputs before the objectives see them, in this order."""
    controllers: list[PluginRef] = []
    """What decides on stages and weights, in this order."""
    policies: list[PluginRef] = []
    """Which photos are drawn, in which view, mixed how."""
    teacher: Literal["auto", "cached", "live"] = "auto"
    """Where the teacher's outputs come from: its cache, or the teacher itself at every step. auto: the cache, unless a policy changes pixels."""
    student: str | None = None
    """An assistant, a student by name, that this stage trains instead of the student itself; a later stage learns from it."""
    teacher_from: list[str] = []
    """Assistants of earlier stages: the one that does best for its size teaches this stage, live, in place of the recipe's teacher."""
    init_from: str | None = None
    """A checkpoint of the student's shape to start this stage from; None: where the stage before it ended."""
    trainable: list[str] = Field(default=["encoder"], min_length=1)
    """What learns: parts of the student (encoder, decoder, prompt_encoder, proposer; of a classifier encoder, head), modules inside one
    (encoder.blocks.0), or what runs between two taps (encoder[stage1:stage2], either end may be left out). The rest is frozen, its batch
    norms too. A student without a box proposer gets one where it is to be trained."""
    steps: int = Field(ge=1)
    """Optimizer steps. From epochs: epochs x images / (batch_size x accumulate)."""
    batch_size: int = Field(default=8, ge=1)
    """Of each process: under `torchrun --nproc-per-node 8` a step sees eight times as many photos (docs/scale.md)."""
    accumulate: int = Field(default=1, ge=1)
    """Batches whose gradients are added up for one step, where a paper's batch does not fit into memory."""
    optimizer: Literal["adamw", "adam"] = "adamw"
    """Both spare biases and norms the weight decay; Adam adds it to the gradient, AdamW to the weights."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    lr: float = Field(default=1e-3, gt=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: down to `min_lr` at the last step, or `lr` to the end."""
    min_lr: float = Field(default=1e-5, ge=0)
    warmup: int = Field(default=20, ge=0)
    weight_decay: float = Field(default=0.05, ge=0)
    clip: float = Field(default=1.0, gt=0)
    instances: int = Field(default=16, ge=1)
    """Prompted masks per image, drawn with replacement."""
    prompts: Prompting = Prompting()
    decode_iters: int = Field(default=1, ge=0)
    """Corrective clicks after the first prompt."""
    random_iters: bool = False
    """Draw the number of corrective clicks from 0 to `decode_iters` at every step (TinySAM)."""
    mask_feedback: Fraction = Field(default=0.5, ge=0, le=1)
    """Share of the prompts that carry the last answer as a mask prompt along with the next click, as SAM's do (EdgeSAM's never do)."""
    precision: Literal["bf16", "fp32", "auto"] = "auto"
    seed: int = 0
    ema: float = Field(default=0.0, ge=0, lt=1)
    frozen_norm: bool = False
    """Keep the statistics of batch norms: a dozen photos in small batches would replace what thousands of images taught them."""
    sync_norm: bool = True
    """On several GPUs: batch norms that learn take their statistics over the photos of all of them."""


class Quantization(Settings):
    """The precisions to try, and what calibrates the static ones."""

    schemes: NamesOrAuto = "auto"
    where_possible: list[str] = []
    """Tried too, where the target runs them in one of the formats: for recipes of every target."""
    calibration_images: int = Field(default=32, ge=1)


class EvaluationSection(Settings):
    """What accuracy is measured on. Without `data` it is the part of the user's photos that was kept out of training."""

    data: str | None = None
    max_images: int = Field(default=16, ge=1)
    max_instances: int = Field(default=8, ge=1)


class ProfileSection(Settings):
    """How latency is measured."""

    warmup: int = Field(default=5, ge=0)
    repeats: int = Field(default=30, ge=10)
    threads: int | None = Field(default=None, ge=1)
    """None: as many as the target has."""
    prompts: int = Field(default=1, ge=1)
    """Prompts per image in one decoder call."""


class Budget(Settings):
    """Ceilings and a floor; None is no limit. MB is 10^6 bytes, accuracies are fractions."""

    latency_ms: float | None = Field(default=None, gt=0)
    """Of one use of the model: the encoder and `prompts` prompts."""
    fps: float | None = Field(default=None, gt=0)
    """Photos a second, one after the other: the same limit in other words."""
    percentile: Literal["p50", "p90"] = "p50"
    """Which quantile of the latencies is held to their limits."""
    components: dict[str, float] = {}
    """Component -> milliseconds of it alone: `{encoder: 20, decoder: 5}`."""
    prompts: int | None = Field(default=None, ge=1)
    """Prompts of a photo that `latency_ms` is for, in one call of the decoder; the recipe's `profile.prompts` when left out."""
    everything_ms: float | None = Field(default=None, gt=0)
    """Of segmenting everything on a photo, from its pixels to all masks."""
    size_mb: float | None = Field(default=None, gt=0)
    memory_mb: float | None = Field(default=None, gt=0)
    energy_mj: float | None = Field(default=None, gt=0)
    """Of one use, where the device tells its power."""
    min_accuracy: Fraction | None = Field(default=None, ge=0, le=1)
    max_drop: Fraction | None = Field(default=None, ge=0, le=1)
    metric: str = "teacher_agreement.box"
    objective: Literal["auto", "fastest", "most-accurate", "balanced"] = "auto"
    """What is chosen of all that keeps to the limits. auto: the most accurate where latency is limited, else balanced, the fastest that is nearly as
    accurate as the best."""

    @field_validator("components")
    @classmethod
    def _positive(cls, value: dict[str, float]) -> dict[str, float]:
        if wrong := [name for name, most in value.items() if most <= 0]:
            raise ValueError(f"milliseconds are positive: {', '.join(wrong)}")
        return value


class TrainSection(Settings):
    """Training a teacher from labelled masks (`edgekd train`)."""

    data: list[str] = Field(min_length=1)
    weights: list[float] | None = None
    """How often each of `data` is drawn, in the same order; None is evenly."""
    steps: int = Field(ge=1)
    batch_size: int = Field(default=8, ge=1)
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    warmup: int = Field(default=200, ge=1)
    decay: Fraction = Field(default=0.4, gt=0, le=1)
    clip: float = Field(default=1.0, gt=0)
    ema: float = Field(default=0.999, ge=0, lt=1)
    instances: int = Field(default=8, ge=1)
    max_clicks: int = Field(default=2, ge=0)
    affinity: float = Field(default=0.5, ge=0)
    trunk_lr: float = Field(default=0.1, ge=0)
    bf16: bool = True
    seed: int = 0
    workers: int = Field(default=1, ge=0)
    checkpoint_every: int = Field(default=200, ge=1)

    @model_validator(mode="after")
    def _one_weight_each(self) -> Self:
        if self.weights is not None and len(self.weights) != len(self.data):
            raise ValueError(f"train.weights has {len(self.weights)} numbers for {len(self.data)} sets in train.data")
        return self


class Recipe(Settings):
    """One complete run: either students distilled from a teacher, or (`train:`) a teacher trained from labels."""

    name: str
    description: str = ""
    task: str = "promptable_segmentation"
    teacher: str = "sam_nano"
    more_teachers: list[str] = []
    """Further teachers, for what compares with several."""
    preparation: list[PluginRef] = []
    """What is done to the teacher before anything is asked of it, in this order."""
    proposer: PluginRef | None = None
    """What ranks the students before any is trained; `distill` takes the best, without one the first."""
    students: list[StudentSpace] = []
    data: DataSection = DataSection()
    stages: list[Stage] = []
    quantization: Quantization = Quantization()
    formats: NamesOrAuto = "auto"
    evaluation: EvaluationSection = EvaluationSection()
    profile: ProfileSection = ProfileSection()
    budget: Budget = Budget()
    search: SearchSection = SearchSection()
    train: TrainSection | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.train is None and not ((self.students or self.search.space) and self.stages):
            raise ValueError("a recipe needs 'students' and 'stages' (to distil) or 'train' (to train a teacher)")
        for what, given in (("student", [s.name for s in self.students]), ("stage", [s.name for s in self.stages])):
            twice = sorted({n for n in given if given.count(n) > 1})
            if twice:
                raise ValueError(f"{what} '{twice[0]}' is given twice" + ("; list all its sizes in one image_sizes" if what == "student" else ""))
        return self


def shipped() -> dict[str, Traversable]:
    """name -> file of the recipes that come with edgekd."""
    return plugins.yaml_files("edgekd.recipes")


def names() -> list[str]:
    """Names that `resolve` knows, in order."""
    return sorted(shipped())


def resolve(name_or_path: str | Path, sets: Sequence[str] = ()) -> Recipe:
    """The recipe of a shipped name or a YAML file, with `--set` assignments applied.

    Raises:
        UsageError: no such recipe, or anything wrong in it; every problem is in the one message.
    """
    raw, where = config.load(name_or_path, "recipe", shipped())
    raw.setdefault("name", Path(where).stem)
    return config.validate(Recipe, raw, what=f"recipe '{where}'", sets=sets)


def with_auto(recipe: Recipe, *, runs: Mapping[str, Sequence[str]], exports: Mapping[str, Sequence[str]]) -> Recipe:
    """The recipe with `auto` formats and schemes filled in.

    Args:
        runs: format -> schemes that the target runs, best format first.
        exports: format -> schemes that an exporter here writes.

    Raises:
        UsageError: there is no format that the target runs and an exporter here writes.
    """
    if recipe.formats == "auto":
        both = [f for f in runs if f in exports and set(runs[f]) & set(exports[f])]
        if not both:
            raise UsageError(f"no exporter here writes a format that the target runs ({', '.join(runs)})",
                             hint=f"formats that can be written: {', '.join(exports)}; `edgekd doctor` says how to add more")
        recipe = recipe.model_copy(update={"formats": both})
    if recipe.quantization.schemes == "auto":
        possible = [s for f in recipe.formats if f in runs and f in exports for s in exports[f] if s in runs[f]]
        schemes = sorted(dict.fromkeys(possible), key=lambda s: s != REFERENCE_SCHEME)  # an integer-only NPU has none
        recipe = recipe.model_copy(update={"quantization": recipe.quantization.model_copy(update={"schemes": schemes})})
    return _with_possible(recipe, runs, exports)


def _with_possible(recipe: Recipe, runs: Mapping[str, Sequence[str]], exports: Mapping[str, Sequence[str]]) -> Recipe:
    """With the schemes of `where_possible` that some format has."""
    asked = recipe.quantization
    more = [s for s in asked.where_possible if any(s in runs.get(f, ()) and s in exports.get(f, ()) for f in recipe.formats)]
    return recipe.model_copy(update={"quantization": asked.model_copy(update={"schemes": list(dict.fromkeys([*asked.schemes, *more])), "where_possible": []})})


def dump(recipe: Recipe) -> str:
    """The recipe as YAML, every default spelled out."""
    return config.dump(recipe)
