"""Checkpoints: one safetensors file with the weights and, in its header, all that is needed to build the model again.

Never a pickle: reading a checkpoint runs no code. A digest of the tensors is kept beside them, so that a damaged file is
refused instead of giving a model that is quietly wrong.
"""
from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from edgekd import plugins
from edgekd.errors import EdgekdError
from edgekd.models.pruned import Pruned, shrink
from edgekd.protocols import PROMPTABLE, Preprocess
from edgekd.workspace import atomic_path

if TYPE_CHECKING:
    from torch import Tensor, nn

SCHEMA: Literal["edgekd.checkpoint/1"] = "edgekd.checkpoint/1"
HEADER = "edgekd"
SUFFIX = ".safetensors"


class Quantized(BaseModel):
    """What a student was trained to be rounded to (`fake_quant`)."""

    model_config = ConfigDict(extra="forbid")

    weight_bits: int
    grids: dict[str, tuple[float, float, float, float]]
    """Layer of the model -> least and largest level of what goes into it, and of what comes out of it (`edgekd.tuning.Grid`)."""


class Meta(BaseModel):
    """What the header says."""

    model_config = ConfigDict(extra="forbid")

    schema_: Literal["edgekd.checkpoint/1"] = SCHEMA
    task: str = PROMPTABLE
    kind: Literal["student", "teacher"]
    name: str
    teacher: str | None = None
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fit: Literal["pad", "stretch", "crop"] = "pad"
    prompt_size: int | None = None
    crop: float = Preprocess.crop
    shape: dict[str, int]
    """Sizes of what comes after the encoder: of the prompt encoder and mask decoder (`edgekd.models.sam.DecoderShape`), or of the task's head."""
    proposer: dict[str, int] | None = None
    """Sizes of the box proposer (`edgekd.models.proposer.BoxProposer`) when the model has one."""
    pruned: Pruned | None = None
    """What of the encoder is left, of a pruned model (`edgekd.pruning`)."""
    form: Literal["training", "deploy"] = "training"
    """Whether the weights are those of the folded network (`edgekd.models.fold`), which quantization-aware training trains."""
    quantized: Quantized | None = None
    labels: list[str] = []
    """Names of a classifier's classes in their order; none where they are not known."""
    digest: str
    history: dict[str, Any] = {}
    """How it came about: recipe, stages, losses."""

    @property
    def preprocess(self) -> Preprocess:
        """What a photo goes through before the model sees it."""
        return Preprocess(self.image_size, self.mean, self.std, self.fit, self.prompt_size, self.crop)


def save(model: Any, path: Path, *, kind: Literal["student", "teacher"] = "student", teacher: str | None = None,
         history: dict[str, Any] | None = None) -> Path:
    """Write a model's weights and description, atomically."""
    from safetensors.torch import save_file

    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    spec = model.preprocess
    task = plugins.task_of(model)
    meta = Meta(task=task.name, kind=kind, name=model.name, teacher=teacher, image_size=spec.image_size, mean=spec.mean, std=spec.std, fit=spec.fit,
                prompt_size=spec.prompt_size, crop=spec.crop, digest=digest(tensors), pruned=getattr(model, "pruned", None), history=history or {},
                form=getattr(model, "form", "training"), quantized=_quantized(model), **task.header(model))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temp:
        save_file(tensors, temp, metadata={HEADER: meta.model_dump_json()})
    return path


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a safetensors file of ours, whole or damaged. One with a readable header that does not describe a model of ours
    is somebody else's (`edgekd.zoo.files` reads those)."""
    if not Path(path).is_file() or Path(path).suffix != SUFFIX:
        return False
    try:
        return HEADER in _header(path)
    except EdgekdError:
        return True


def _header(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself."""
    try:
        with open(path, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if not 2 <= length <= 100_000_000:
                raise ValueError("no safetensors header")
            return json.loads(f.read(length)).get("__metadata__") or {}
    except (OSError, ValueError, AttributeError) as e:
        raise EdgekdError(f"the checkpoint cannot be read: {e}", where=path, hint="it is damaged or no safetensors file; distil the student again") from e


def read_meta(path: Path) -> Meta:
    """The description in the header; reads no weights and needs no torch.

    Raises:
        EdgekdError: it is not a checkpoint of ours, or is cut short.
    """
    header = _header(path)
    if HEADER not in header:
        raise EdgekdError("this safetensors file is not a checkpoint of edgekd: its header does not describe a model", where=path,
                          hint="name a file that `edgekd distill` or `edgekd train` wrote")
    try:
        return Meta.model_validate_json(header[HEADER])
    except ValidationError as e:
        raise EdgekdError(f"the checkpoint's description cannot be read: {e.errors()[0]['msg']}", where=path, hint="distil the student again") from e


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Name -> weight, after comparing them with the digest.

    Raises:
        EdgekdError: the file is not a checkpoint, is cut short, or was altered.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    meta = read_meta(path)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as e:
        raise EdgekdError(f"the checkpoint cannot be read: {e}", where=path, hint="it is cut short; distil the student again") from e
    if digest(tensors) != meta.digest:
        raise EdgekdError("the checkpoint is damaged: its weights do not match their digest", where=path, hint="copy it anew, or distil the student again")
    return tensors


def load(path: Path) -> Any:
    """The model of a checkpoint, in eval mode.

    Raises:
        EdgekdError: the file is damaged, or its weights do not fit the model it names.
    """
    return assemble(read_meta(path), load_tensors(path), path)


def assemble(meta: Meta, tensors: dict[str, Tensor], where: Path) -> Any:
    """The model that a header describes, with these weights, in eval mode. Raises EdgekdError when they do not fit."""
    model = build(meta)
    _fill(model, meta, tensors, where)
    return model.eval()


def build(meta: Meta) -> Any:
    """The untrained model that a header describes, in its form. Raises EdgekdError when it describes none."""
    model = _training_form(meta)
    return model if meta.form == "training" else deployed(model)


def deployed(model: Any) -> Any:
    """A folded copy of a model, which says so in its checkpoints."""
    from edgekd.models.fold import fold

    made = fold(model.eval())
    made.form = "deploy"
    return made


def _training_form(meta: Meta) -> Any:
    task, pruned = plugins.task(meta.task), meta.pruned
    if pruned is None:
        return task.build(meta)
    model = task.build(meta.model_copy(update={"name": pruned.base, "kind": pruned.kind}))
    shrink(model.encoder, pruned)
    model.name, model.pruned = meta.name, pruned
    return model


def load_into(model: Any, path: Path) -> None:
    """Fill a model of the same shape from a checkpoint, every key accounted for. A proposer that only the checkpoint has is added.

    Raises:
        EdgekdError: the file is damaged or its keys or shapes differ from the model's; they are named.
    """
    _fill(model, read_meta(path), load_tensors(path), path)


def _fill(model: Any, meta: Meta, tensors: dict[str, Tensor], where: Path) -> None:
    form = getattr(model, "form", "training")
    if form != meta.form:
        raise EdgekdError(f"the checkpoint holds the {meta.form} form of '{meta.name}', and this is its {form} form", where=where,
                          hint="start from it with `edgekd distill CHECKPOINT`" if meta.form == "deploy" else "name the checkpoint of the quantized student")
    _add_proposer(model, meta)
    own = model.state_dict()
    wrong = [f"missing {k}" for k in own if k not in tensors] + [f"unknown {k}" for k in tensors if k not in own]
    wrong += [f"{k} is {tuple(tensors[k].shape)} instead of {tuple(own[k].shape)}" for k in own if k in tensors and tensors[k].shape != own[k].shape]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise EdgekdError(f"the weights do not fit '{model.name}': {'; '.join(wrong[:4])}{more}", where=where,
                          hint="the checkpoint comes from another version of this model")
    if any(p.is_meta for p in model.parameters()):  # a large model, built without memory: it takes the tensors themselves
        model.load_state_dict({k: v.to(own[k].dtype) for k, v in tensors.items()}, assign=True)
    else:
        model.load_state_dict(tensors)
    _set_grids(model, meta, where)


def _quantized(model: Any) -> Quantized | None:
    """The ranges that were trained for the layers of a model."""
    from edgekd.models.rounding import grids_of, layers

    known, found = layers(model), grids_of(model)
    ends = {name: (*grid.input, *grid.output) for name, grid in found.items() if grid.input and grid.output}
    return Quantized(weight_bits=min(getattr(known[name], "weight_bits", 8) for name in found), grids=ends) if ends else None


def _set_grids(model: Any, meta: Meta, where: Path) -> None:
    """Give the layers of a model the ranges of a header, and no others."""
    from edgekd.models.rounding import forget, layers
    from edgekd.tuning import Grid

    forget(model)
    if meta.quantized is None:
        return
    known = layers(model)
    for name, ends in meta.quantized.grids.items():
        if name not in known:
            raise EdgekdError(f"the checkpoint has ranges for a layer '{name}' that '{meta.name}' does not have", where=where, hint="distil the student again")
        layer: Any = known[name]
        layer.grid, layer.weight_bits = Grid((ends[0], ends[1]), (ends[2], ends[3])), meta.quantized.weight_bits


def _add_proposer(model: Any, meta: Meta) -> None:
    """Give the model the proposer that a header describes, where it has none yet."""
    if meta.proposer is not None and model.proposer is None:
        from edgekd.models.proposer import BoxProposer

        model.proposer = BoxProposer(**meta.proposer)


def digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, in the order of names."""
    import torch

    total = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and values (as float32) of a model's state: what a cache or an artifact was made from."""
    total = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        total.update(f"{key}{tuple(tensor.shape)}{tensor.dtype}".encode())
        total.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return total.hexdigest()
