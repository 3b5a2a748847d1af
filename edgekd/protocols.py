"""The contracts between parts: what a dataset, a promptable model, an exporter and a session must offer.

Everything here is structural (`typing.Protocol`): a plug-in needs no base class of ours.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from edgekd.errors import CannotTake, UsageError

if TYPE_CHECKING:
    import numpy as np
    import torch

# Point labels, as in SAM (arXiv 2304.02643, App. A) plus ABSENT, which lets prompts of different length share a batch:
# an ABSENT point is masked out of every attention, so the result equals the one without it.
NEGATIVE, POSITIVE, BOX_TOP_LEFT, BOX_BOTTOM_RIGHT, NOT_A_POINT, ABSENT = 0, 1, 2, 3, -1, -2


@dataclass(frozen=True)
class Preprocess:
    """Photo -> model input: long side to `image_size` (bilinear), normalise, pad right and bottom with zeros.

    `mean` and `std` are for RGB in 0..255. `fit` "stretch" fills the square instead of padding (EfficientSAM), "crop" fills it with the
    middle of the photo, `crop` of its short side (classifiers).
    """

    image_size: int
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    fit: Literal["pad", "stretch", "crop"] = "pad"
    prompt_size: int | None = None
    """Side of the square that prompts are given in; None: `image_size`. EfficientViT-SAM sees 512 px and is prompted in 1024."""
    crop: float = 0.875
    """Share of the short side that is seen with `fit` "crop"."""

    @property
    def side(self) -> int:
        """F, the side of the prompts' square: the embedding is F/16 wide and mask logits F/4."""
        return self.prompt_size or self.image_size


@dataclass(frozen=True)
class Sample:
    """One image of a dataset. `image` (H, W, 3) uint8 RGB; `masks` (K, H, W) bool or None when unlabelled; `label`, the number of its class, or None."""

    id: str
    image: np.ndarray
    masks: np.ndarray | None = None
    label: int | None = None


@runtime_checkable
class Dataset(Protocol):
    """Images with or without instance masks, in a fixed order. Data with classes of whole photos also has `has_classes`,
    `classes_of(index) -> int | None`, which reads no pixels, and `class_names`."""

    name: str
    skipped: list[str]

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Sample: ...
    def __iter__(self) -> Iterator[Sample]: ...

    @property
    def has_masks(self) -> bool: ...

    def fingerprint(self) -> str:
        """Changes when any image, mask or their order changes; cheap (paths, sizes, times or the generator's seed)."""
        ...


@runtime_checkable
class Promptable(Protocol):
    """Teacher, student or exported artifact of the task `promptable_segmentation`.

    S is `preprocess.image_size`, F is `preprocess.side` (the same unless a model says otherwise). E is `embed_dim`; a teacher may
    append further channels that only its own `decode` reads.
    """

    name: str
    preprocess: Preprocess
    embed_dim: int

    def embed(self, images: Any) -> Any:
        """(B, 3, S, S) normalised float -> (B, E, F/16, F/16)."""
        ...

    def decode(self, embedding: Any, points: Any, labels: Any, mask_input: Any = None, has_mask: Any = None) -> tuple[Any, Any]:
        """Prompts of ONE image: embedding (1, E, s, s), points (P, N, 2) xy in the F frame, labels (P, N),
        mask_input (P, 1, F/4, F/4) logits with has_mask (P,) -> mask logits (P, 4, F/4, F/4), IoU (P, 4).

        Mask 0 is the single mask for unambiguous prompts, 1..3 the alternatives for one click.
        """
        ...


PROMPTABLE = "promptable_segmentation"
"""The task of models and files that name none."""


@runtime_checkable
class Task(Protocol):
    """What a model is made to do: one folder `edgekd/tasks/<task>/` with a module-level `task`.

    Its models are modules with `task` (this one's name), `name`, `preprocess`, `embed_dim`, `encoder`, `parts` (name -> module that a stage can
    train) and `outputs(images) -> {name: tensor}`, of the names in `edgekd.distillation.outputs.FEATURES`. Everything that differs from task to
    task is asked here: the verbs know none of them by name.
    """

    name: str
    summary: str
    outputs: frozenset[str]
    """Everything that objectives of this task can be given (`edgekd.distillation.outputs.NEEDS`)."""

    parts: tuple[str, ...]
    """Parts of a student that a stage can train."""

    photo_component: str
    """The exported part that takes photos as its only input, `images` (1, 3, S, S)."""

    compared_by: str
    """The accuracy that a precision is judged by: `miou`."""

    # --- models

    def listed(self, kind: Literal["teachers", "students"]) -> list[dict[str, Any]]:
        """The rows of `edgekd list`: what this task alone knows by name, with its facts. Loads no weights."""
        ...

    def knows(self, reference: str) -> bool:
        """Whether a name, folder or id is a model of this task before it is one of any other, told from its form and, of a folder, its
        description. Loads nothing."""
        ...

    def teacher(self, name: str) -> Any:
        """A frozen teacher in eval mode, by name, file, folder or hub id."""
        ...

    def student(self, name: str, image_size: int, teacher: Any) -> tuple[Any, str]:
        """An untrained or pretrained student for this teacher, and where its weights come from."""
        ...

    def student_name(self, name: str) -> str:
        """The canonical spelling of a student's name. Raises UsageError when there is none such."""
        ...

    def labelled(self, dataset: Dataset, teacher: Any) -> Dataset:
        """The data with what this task's objectives learn from: its own labels, or the teacher's."""
        ...

    # --- checkpoints

    def header(self, model: Any) -> dict[str, Any]:
        """What the header of a checkpoint says of a model beside its name and preprocessing (fields of `edgekd.checkpoint.Meta`)."""
        ...

    def build(self, meta: Any) -> Any:
        """The untrained model that such a header describes."""
        ...

    # --- artifacts

    def components(self, model: Any, signature: str = "batched") -> dict[str, Component]:
        """The parts of a model in eval mode that are exported and profiled on their own. `signature`: see `edgekd.artifact.DecoderSignature`."""
        ...

    def answers(self, model: Any, images: Any) -> dict[str, Any]:
        """What a torch model gives for images (B, 3, S, S), by name: its training form and its deployed form must give the same."""
        ...

    def reference(self, model: Any, images: np.ndarray, signature: str = "batched") -> Reference:
        """What exported parts are compared with: the model's own answers on images (n, 3, S, S)."""
        ...

    def open(self, folder: Path, manifest: Any, *, threads: int | None = None, stand_in: bool = False) -> Any:
        """An artifact of this task on its runtime, with `calls(prompts)` for the clock. Imports no torch."""
        ...

    # --- use

    def evaluate(self, model: Any, dataset: Dataset, *, teacher: Any = None, progress: Any = None, **options: Any) -> Any:
        """Accuracy of a torch model or an artifact, with protocol and intervals (`edgekd.tasks.evaluation.Evaluation`)."""
        ...

    def predict(self, model: Any, image: Path, output: Path | None, **prompt: Any) -> Any:
        """What a model says of one photo: an object with `document()`, its JSON form."""
        ...

    def judge(self, source: Any, dataset: Dataset) -> Any:
        """What precisions of one torch model are judged by, on as many photos as it takes to tell them apart (`edgekd.tasks.evaluation.Judge`)."""
        ...


class Reference(Protocol):
    """A model's own answers, computed once an export, that exported parts are held against."""

    def samples(self, part: Component) -> list[dict[str, np.ndarray]]:
        """Inputs of a component for what must be seen at work before it is exported."""
        ...

    def adapt(self, part: Component, samples: Any) -> Any:
        """Calibration inputs as the component's signature takes them."""
        ...

    def compare(self, part: Component, session: Session, scheme: str) -> tuple[dict[str, Any], str | None]:
        """The parity report of a component (`finite` and `limits` are always in it), and why it is not the model any more, or None."""
        ...

    def checked(self) -> str:
        """What was compared, in words for the manifest."""
        ...


@dataclass
class Component:
    """A part that is exported and profiled on its own: a module in eval mode, its example inputs and its I/O."""

    name: str
    module: torch.nn.Module
    example: Mapping[str, torch.Tensor]
    outputs: tuple[str, ...]
    dynamic: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    """input name -> {axis: symbol}"""

    lengths: Mapping[str, int] = field(default_factory=dict)
    """symbol -> its length in a file whose axes cannot vary. Axis 0 of what such a file takes is then served in several calls, any other padded."""

    padding: Mapping[str, float] = field(default_factory=dict)
    """input name -> what its rows are filled up with along such an axis, without changing the answer; 0 where it is not said"""

    host: Mapping[str, bytes] = field(default_factory=dict)
    """file name -> contents of what the caller needs to compute inputs of this part itself; written beside it"""

    def fixed(self) -> Component:
        """The same with every axis of the length in `lengths`, for formats that take no others.

        Raises:
            CannotTake: an output's size follows the value of an input, or a symbol has no length.
        """
        symbols = {s for axes in self.dynamic.values() for s in axes.values()}
        if missing := symbols - set(self.lengths):
            raise CannotTake(f"its axes of varying length ({', '.join(sorted(missing))}) have no length to be fixed at", where=self.name,
                             hint="export it with --decoder-signature batched, or to a format that takes them, like onnx")
        example = dict(self.example)
        for name, axes in self.dynamic.items():
            for axis, symbol in axes.items():
                tensor, length = example[name], self.lengths[symbol]
                picked = [i % tensor.shape[axis] for i in range(length)]
                example[name] = tensor[(slice(None),) * axis + (picked,)].contiguous()
        return replace(self, example=example, dynamic={})


@dataclass(frozen=True)
class Port:
    """An input of an opened file. `shape` has None where any length will do; `axes` what the file calls such an axis, where it does."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str
    axes: tuple[str | None, ...] = ()


class Session(Protocol):
    """An opened component of an artifact on its runtime."""

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by the names of the component's outputs. What the file does not use of `inputs` is left out."""
        ...

    @property
    def inputs(self) -> list[Port]:
        """What the file takes, in its order."""
        ...

    @property
    def executed_precision(self) -> str:
        """The precision really executed, read back from the runtime (`fp32`, `bf16`, `int8`, ...)."""
        ...

    @property
    def executed_ops(self) -> dict[str, int]:
        """Operator (or precision) name -> count in the graph the runtime executes."""
        ...


@dataclass(frozen=True)
class Availability:
    """Whether a toolchain works here; `fix` is the exact command that mends it."""

    ok: bool
    version: str | None = None
    reason: str | None = None
    fix: str | None = None
    runs: bool = True
    """Whether this machine can also run what is written; `reason` says why not."""


State = Literal["ran", "built", "checked"]
"""What became of an exported file here: it ran on its runtime; its vendor's compiler or simulator took it; or its contents were read back and held
against the model."""


@dataclass(frozen=True)
class Check:
    """What was found out about a file that cannot run here: `how`, one clause for the manifest, of what was done with what version; `precision`, what the
    file says it computes in, and `ops`, its operators, as a session's `executed_precision` and `executed_ops`; `details`, further findings, as JSON."""

    state: State
    how: str
    precision: str
    ops: Mapping[str, int]
    details: Mapping[str, Any] = field(default_factory=dict)


def package_version(package: str) -> str | None:
    """The installed version of a toolchain's package, or None; imports nothing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


class Exporter(Protocol):
    """One file format with its runtime: a module-level object named `exporter` in `export/<format>.py`. What else one may have is in `Facts`."""

    format: str
    suffix: str
    extra: str | None
    schemes: tuple[str, ...]
    """The first is what a user gets who names none."""

    def availability(self) -> Availability: ...

    def export(self, component: Component, path: Path, *, scheme: str, calibration: Any = None, qdq: str = "u8s8") -> list[Path]:
        """Write the component at `path` (all files written are returned). `calibration` is a re-iterable of input dicts
        (name -> array), needed by static schemes. One that `tunes` takes `tuning: Tuning` too. Raises EdgekdError with the reason when the
        format cannot take it, and CannotTake when no version of it could."""
        ...

    def open(self, path: Path, *, scheme: str, threads: int | None = None) -> Session:
        """The file on its runtime. Raises EdgekdError where `availability().runs` is False."""
        ...


class Facts:
    """What an exporter need not say: a format that runs everywhere it is written, and takes axes of any length."""

    fixed_shapes: bool = False
    """Whether the file's axes cannot vary: `export` is then given `component.fixed()`."""

    beside: str | None = None
    """The format of the components that this one can never take (`CannotTake`), other than the one that takes photos."""

    tunes: Mapping[str, frozenset[Any]] = {}
    """Field of `edgekd.tuning.Tuning` -> the values of it that `export` honours beside the default; of `keep` the float types, of `grids` {True}."""

    def files(self, path: Path) -> list[Path]:
        """All files that make one of this format: `path`, or what is in it, and weights of the same name beside it."""
        weights = path.with_suffix(".bin")
        return [p for p in sorted(path.rglob("*")) if p.is_file()] if path.is_dir() else [path, *([weights] if weights.is_file() else [])]

    def check(self, component: Component, path: Path, *, scheme: str) -> Check:
        """What can be found out about a written file where it cannot run. `component` is what was exported. Raises EdgekdError when it is wrong."""
        raise NotImplementedError

    def stand_in(self, path: Path, *, scheme: str, threads: int | None = None) -> Session | None:
        """What computes the file's own contents where its runtime is not: a vendor's simulator, an interpreter of the format. None: nothing does.
        Numbers of it are never the device's; its class says in one clause, `stand_in_for`, what it is."""
        return None

    def layers(self, path: Path, *, scheme: str, inputs: Mapping[str, np.ndarray], threads: int | None = None, repeats: int = 30) -> list[dict[str, Any]]:
        """What every operator takes in one run, in their order: `{"name", "op", "ms", "precision"}` as the runtime tells them, median of `repeats` runs, and
        `covers`, the operators of the file that a kernel computes, where that is known. Raises UsageError where the runtime does not tell times."""
        raise UsageError(f"the runtime of '{self.format}' tells no times of single operators", where=path,  # type: ignore[attr-defined]
                         hint="profile the same model as onnx, openvino or litert")

    def modules(self, path: Path) -> Mapping[str, str]:
        """Name of an operator in the file -> the module of the network that it came from, "" for what is in none; {} where the file says nothing."""
        return {}


def facts(exporter: Exporter) -> Any:
    """An exporter with the attributes of `Facts` whether or not it has them (a plug-in needs no base class of ours)."""
    return exporter if hasattr(exporter, "fixed_shapes") else _With(exporter)


class _With(Facts):
    def __init__(self, exporter: Exporter) -> None:
        self._exporter = exporter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._exporter, name)
