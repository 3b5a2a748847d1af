"""`edgekd prune`: a smaller student out of a trained one, or out of the teacher itself, as fast as a device is to run it.

Channels go by their importance and, if wanted, whole blocks by what the embedding misses without them, until the exported encoder meets a
latency on the target. What is left keeps its weights: distillation recovers the rest (`edgekd distill CHECKPOINT`, docs/pruning.md).
"""
from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from edgekd import checkpoint, console, plugins, resolve
from edgekd.comparing import check_runs
from edgekd.data import open_data
from edgekd.distillation.losses import aligned
from edgekd.errors import EdgekdError, UsageError, unknown
from edgekd.models.fold import fold
from edgekd.models.pruned import Pruned, describe, widths
from edgekd.pruning import surgery
from edgekd.pruning.meter import Meter
from edgekd.pruning.searching import MOST, Found, Search, Step
from edgekd.quantization.calibration import EncoderCalibration
from edgekd.schemes import Precision
from edgekd.target import Target
from edgekd.workspace import usable_folder, write_json

IMPORTANCES = ("auto", "taylor", "magnitude")
MULTIPLE = 8
"""Channels that kernels take at a time."""
DEEPEST = 6
"""Blocks that a search leaves out, at most."""
PHOTOS = 32


@dataclass(frozen=True)
class Request:
    """What is asked for: a latency or a ratio, and from which model.

    Attributes:
        target_ms: milliseconds of the encoder on the target; or
        ratio: the share of the channels that goes, the same in every set.
        depth: leave whole blocks out too. True: as many as keep the embedding nearest; with a ratio, one; a number: so many (with a ratio) or at most so many.
        importance: `taylor` (of the distance to the teacher's embedding), `magnitude` (L2), `auto`: Taylor's where there is a teacher.
        measure: milliseconds of an encoder, in place of the target's clock.
    """

    model: str
    target: Target
    data: str
    output: Path
    target_ms: float | None = None
    ratio: float | None = None
    depth: bool | int = False
    importance: str = "auto"
    multiple: int = MULTIPLE
    teacher: str | None = None
    format: str = "onnx"
    scheme: str = "fp32"
    threads: int | None = None
    limit: int = PHOTOS
    measure: Callable[[nn.Module], float] | None = None

    def checked(self) -> Precision:
        """The precision to measure in. Raises UsageError for anything that cannot be meant, before any work."""
        if (self.target_ms is None) == (self.ratio is None):
            raise UsageError("prune takes a latency or a ratio, one of the two", hint="--target-ms 4, or --ratio 0.5")
        if self.target_ms is not None and not self.target_ms > 0:
            raise UsageError(f"the latency to reach is a number above 0, not {self.target_ms:g}")
        if self.ratio is not None and not (0 <= self.ratio <= MOST and (self.ratio or self.depth)):
            raise UsageError(f"the share of channels to leave out is a number above 0 and at most {MOST:g}, not {self.ratio:g}", hint="--ratio 0.5")
        if self.importance not in IMPORTANCES:
            raise unknown("importance", self.importance, IMPORTANCES)
        if self.multiple < 1 or self.limit < 1 or self.depth < 0:
            raise UsageError("--multiple and --limit are at least 1, and --depth is not below 0")
        surgery.library()
        precision = check_runs(self.scheme, self.format, self.target)
        if not self.target.reachable and self.measure is None and self.target_ms is not None:
            raise UsageError(f"the target '{self.target.name}' cannot be reached from here, so no latency can be met on it",
                             hint="prune by --ratio, or for a target that can be measured here")
        return precision


@dataclass
class Pruner:
    """A model being pruned. All cuts start from its own encoder, so that a search may try them in any order."""

    request: Request
    model: Any
    photos: list[Tensor]
    teacher: Any = None
    _cuts: dict[tuple[float, int], Candidate] = field(default_factory=dict)
    _channels: dict[int, list[surgery.Channels]] = field(default_factory=dict)

    @cached_property
    def wanted(self) -> list[Tensor]:
        """The whole encoder's embeddings."""
        with torch.no_grad():
            return [self.model.encoder(photo) for photo in self.photos]

    @cached_property
    def order(self) -> list[str]:
        """Blocks in the order in which they are left out."""
        few, depth = len(self.photos[:8]), self.request.depth
        most = DEEPEST if depth is True and self.request.ratio is None else int(depth)
        return surgery.least_missed(self.model.encoder, self.photos[:few], self.wanted[:few], most) if most else []

    def channels(self, removed: int) -> list[surgery.Channels]:
        """The sets that can be cut once so many blocks are gone."""
        if removed not in self._channels:
            encoder = surgery.without(self.model.encoder, self.order[:removed])
            found = surgery.coupled(encoder, self.photos[0], self._losses())
            if not any(len(c.scores) > self.request.multiple for c in found):
                raise EdgekdError(f"no channels of '{self.model.name}' can be left out: all of them meet in attention, in norms over channels or in the embedding",
                                  hint="choose a student of convolutions (repvit_s), or leave blocks out with --depth")
            self._channels[removed] = found
        return self._channels[removed]

    def make(self, ratio: float, removed: int) -> Candidate:
        """The encoder with a share of its channels and some blocks less."""
        if (ratio, removed) not in self._cuts:
            encoder = surgery.without(self.model.encoder, self.order[:removed])
            if ratio:
                going = {c.layer: c.going(ratio, self.request.multiple) for c in self.channels(removed)}
                encoder = surgery.cut(encoder, self.photos[0], going)
            self._cuts[ratio, removed] = self._better(encoder)
        return self._cuts[ratio, removed]

    def near(self, cut: Candidate) -> float:
        """How near the embedding of a cut is to the whole one's, before any training."""
        return cut.cosine

    def _better(self, encoder: nn.Module) -> Candidate:
        """The encoder with its batch norms as they were, or with the statistics of what reaches them now: whichever stays nearer."""
        both = [encoder, surgery.settled(encoder, self.photos)]
        return max((Candidate(e, surgery.cosine(e, self.photos, self.wanted)) for e in both), key=lambda c: c.cosine)

    def _losses(self) -> list[surgery.Loss]:
        if self.teacher is None:
            return []
        with torch.no_grad():
            theirs = [self.teacher.embed(photo) for photo in self.photos]

        def distance(photo: Tensor, target: Tensor) -> surgery.Loss:
            def loss(encoder: nn.Module) -> Tensor:
                ours, other = aligned(encoder(photo), target)
                return (ours - other).square().mean() / len(self.photos)
            return loss

        return [distance(photo, target) for photo, target in zip(self.photos, theirs, strict=True)]


@dataclass(frozen=True)
class Candidate:
    """A cut encoder and how near its embedding is to the whole one's."""

    encoder: nn.Module
    cosine: float

    @property
    def widths(self) -> dict[str, tuple[int, ...]]:
        """The widths of its layers."""
        return widths(self.encoder)


def prune(request: Request) -> dict[str, Any]:
    """Prune a model and write its checkpoint below `request.output`; `met` is False where the target is out of reach, and the checkpoint is then the
    fastest that was found.

    Raises:
        UsageError: something asked for cannot be, or torch-pruning is not installed.
        EdgekdError: the model is fast enough already, or its encoder cannot be cut.
    """
    precision = request.checked()
    model = _source(request.model)
    folder = usable_folder(request.output)
    photos = EncoderCalibration(open_data(request.data, masks=False), model.preprocess, limit=request.limit)
    pruner = Pruner(request, model, [torch.from_numpy(one["images"]) for one in photos], _teacher(request, model))
    if request.depth and not surgery.blocks(model.encoder, pruner.photos[0]):
        raise UsageError(f"'{model.name}' has no block that could be left out", hint="leave out --depth")
    measure = request.measure
    if measure is None and request.target.reachable:
        task = plugins.task_of(model)
        measure = Meter(task.components(model)[task.photo_component], request.target, request.format, precision, threads=request.threads, calibration=photos)
    before = measure(model.encoder) if measure else None
    if before is not None and request.target_ms is not None and before <= request.target_ms:
        raise EdgekdError(f"'{model.name}' meets the target as it is: its encoder takes {before:.2f} ms, and {request.target_ms:g} are allowed",
                          hint="ask for less, or prune by --ratio")
    found = _search(pruner, measure)
    return _write(pruner, found, before, folder)


def _search(pruner: Pruner, measure: Callable[[nn.Module], float] | None) -> Found:
    request = pruner.request
    if request.ratio is not None:
        cut = pruner.make(request.ratio, min(int(request.depth), len(pruner.order)))
        step = Step(request.ratio, min(int(request.depth), len(pruner.order)), measure(cut.encoder) if measure else float("nan"), pruner.near(cut))
        return Found(step, True, (step,))
    assert measure is not None and request.target_ms is not None

    def timed(cut: Candidate) -> float:
        taken = measure(cut.encoder)
        console.log(f"{sum(p.numel() for p in cut.encoder.parameters()) / 1e6:.3f} M parameters: {taken:.2f} ms")
        return taken

    return Search(pruner.make, timed, pruner.near).within(request.target_ms, depth=len(pruner.order))


def _source(reference: str) -> Any:
    """The model to prune. Raises UsageError for one without an encoder that a checkpoint can hold."""
    model = resolve.load_torch(reference)
    if not hasattr(model, "encoder") or getattr(model, "preprocess", None) is None or not hasattr(model, "embed"):
        raise UsageError(f"'{reference}' is a {type(model).__name__}, and prune takes a student or teacher with an encoder of photos",
                         hint="edgekd list students, or a checkpoint that edgekd distill wrote")
    if getattr(model, "form", "training") != "training":
        raise UsageError(f"'{model.name}' was trained for integers, and its layers are folded", where=reference,
                         hint="prune the student it came from, then train that for integers")
    return model.float().eval()


def _teacher(request: Request, model: Any) -> Any:
    """Who Taylor's scores look at; None for magnitudes.

    Raises:
        UsageError: Taylor's are asked for and there is no teacher.
    """
    name = request.teacher or resolve.teacher_of(request.model) or _shipped(request.model)
    if request.importance == "magnitude" or (name is None and request.importance == "auto"):
        return None
    if name is None:
        raise UsageError(f"taylor scores the distance to a teacher, and '{request.model}' names none", hint="name one with --teacher, or --importance magnitude")
    return plugins.task_of(model).teacher(name)


def _shipped(reference: str) -> str | None:
    """The teacher of a student that comes with weights."""
    from edgekd import students

    try:
        path = students.weights_path(reference, 256)
    except UsageError:
        return None
    return None if path is None else resolve.teacher_of(path)


def _write(pruner: Pruner, found: Found, before: float | None, folder: Path) -> dict[str, Any]:
    """Save the chosen cut and say what it is."""
    request, parent, step = pruner.request, pruner.model, found.step
    encoder = pruner.make(step.ratio, step.removed).encoder
    gone = pruner.order[: step.removed]
    size = parent.preprocess.image_size
    model = copy.deepcopy(parent)
    model.encoder = encoder
    model.pruned = _described(request.model, parent, encoder, gone)
    model.name = f"{parent.name}-pruned{step.ratio:.3g}" + (f"-less{step.removed}" if step.removed else "")
    teacher = request.teacher or resolve.teacher_of(request.model) or _shipped(request.model) or parent.name
    history = {"pruned_from": parent.name, "of": str(request.model), "ratio": step.ratio, "blocks": gone, "embedding_cosine": step.cosine, "importance": "magnitude" if pruner.teacher is None else "taylor"}
    path = checkpoint.save(model, folder / f"{model.name}-{size}{checkpoint.SUFFIX}", teacher=teacher, history=history)
    again = checkpoint.load(path)
    with torch.no_grad():
        if not torch.equal(again.encoder(pruner.photos[0]), model.eval().encoder(pruner.photos[0])):
            raise EdgekdError("the checkpoint does not give the pruned model again", where=path, hint="this is a fault of edgekd")
    sizes = [count(e, size) for e in (encoder, parent.encoder)]
    ms = None if before is None else step.ms
    document = {"checkpoint": str(path), "student": model.name, "met": found.met, "target": request.target.name, "format": request.format, "scheme": request.scheme,
                "target_ms": request.target_ms, "latency_ms": ms, "parent_latency_ms": before, "params": sizes[0][0], "parent_params": sizes[1][0],
                "macs": sizes[0][1], "parent_macs": sizes[1][1], "embedding_cosine": step.cosine, "importance": history["importance"],
                "kept": _kept(pruner, step), "history": [s.told() for s in found.history] if before is not None else [],
                "recover": f"edgekd distill {path} --recipe pruned_recover --data {request.data} --output {folder / 'recovered'}"}
    write_json(folder / "prune.json", document)
    return document


def _described(reference: str, parent: Any, encoder: nn.Module, gone: Sequence[str]) -> Pruned:
    """What the header says: against the network of a known name, also where the parent was pruned already."""
    before = getattr(parent, "pruned", None)
    now = describe(encoder, parent.encoder, parent.name, _kind(reference), gone)
    if before is None:
        return now
    left = widths(encoder)
    return Pruned(base=before.base, kind=before.kind, removed=(*before.removed, *now.removed),
                  widths={**{path: width for path, width in before.widths.items() if path in left}, **now.widths})


def _kind(reference: str) -> Literal["student", "teacher"]:
    path = Path(reference).expanduser()
    if checkpoint.is_checkpoint(path):
        return checkpoint.read_meta(path).kind
    return "student" if _shipped(reference) is not None else "teacher"


def _kept(pruner: Pruner, step: Step) -> dict[str, Any]:
    """What is left: of every set of channels by the layer that makes it, and which blocks went."""
    sets = pruner.channels(step.removed) if step.ratio else []
    channels = {c.layer: [len(c.scores) - len(c.going(step.ratio, pruner.request.multiple)), len(c.scores)] for c in sets}
    return {"channels": channels, "blocks_removed": pruner.order[: step.removed]}


def count(encoder: nn.Module, size: int) -> tuple[int, int]:
    """(parameters, multiply-adds) of the folded encoder at batch 1, the form that ships."""
    deploy = fold(encoder).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        deploy(torch.zeros(1, 3, size, size))
    return sum(p.numel() for p in deploy.parameters()), cast(int, counter.get_total_flops() // 2)
