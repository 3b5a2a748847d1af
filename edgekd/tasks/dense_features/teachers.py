"""Teachers of dense features: frozen models with a map of features for a photo.

    sam_nano, sam_vit_h, ...     the image encoder of every promptable teacher, with its files, folders and hub ids
    FOLDER, OWNER/NAME           a vision transformer or network of transformers (AutoModel: DINOv2 and its like), with its own preprocessing
    timm/NAME, timm/NAME=FILE    what timm's network gives before it pools
    efficientnet_lite0, FILE     the map before a classifier pools, our own checkpoints included
    module:factory               anybody's module that gives a map (B, C, h, w), or tokens of a square
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgekd import checkpoint, teachers
from edgekd.errors import EdgekdError, UsageError, first_line
from edgekd.models.classifier import grid, tensor_of
from edgekd.protocols import Preprocess
from edgekd.students import backbones
from edgekd.tasks.classification import teachers as classifiers
from edgekd.tasks.classification.students import timm_model, untrained
from edgekd.teachers import foreign, huggingface

PROMPTABLE_TYPES = ("sam", *foreign.MODEL_TYPES)
"""Types of a Hugging Face config.json that are promptable teachers."""


class Seen(nn.Module):
    """A frozen network whose output, or the last map of it, is the embedding.

    Raises:
        UsageError: it does not run on an image of its size, or gives no square map.
    """

    task = "dense_features"

    def __init__(self, name: str, model: nn.Module, preprocess: Preprocess, *, patch: int | None = None) -> None:
        super().__init__()
        self.name, self.model, self.preprocess, self.patch = name, model.eval(), preprocess, patch
        side = preprocess.image_size
        try:
            with torch.no_grad():
                found = self.embed(torch.zeros(1, 3, side, side))
        except UsageError:
            raise
        except Exception as e:  # somebody else's network may raise anything
            raise UsageError(f"the model does not run on an image (1, 3, {side}, {side}): {type(e).__name__}: {first_line(e)}", where=name) from e
        self.embed_dim, self.grid = int(found.shape[1]), int(found.shape[-1])

    @property
    def encoder(self) -> nn.Module:
        """All of it; taps are looked for here."""
        return self.model

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) normalised -> (B, E, s, s)."""
        features = getattr(self.model, "forward_features", self.model)
        out = tensor_of(features(images))
        if self.patch is not None and isinstance(out, Tensor) and out.ndim == 3:
            out = out[:, -((images.shape[-1] // self.patch) ** 2):]  # class and register tokens come first
        found = grid(out)
        if found is None:
            raise UsageError("the model gives no square map of features", where=self.name, hint="it returns (B, C, h, w), (B, h, w, C) or tokens (B, N, C) of a square")
        return found

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, S, S) normalised -> what a photo gives, by name."""
        return {"embedding": self.embed(images)}


def knows(reference: str) -> bool:
    """Whether this is a folder of a network of photos without a head, of a type that is no promptable model."""
    told, architecture = classifiers.description(reference), classifiers.architecture(reference)
    return architecture.endswith("Model") and "num_channels" in told and told.get("model_type") not in PROMPTABLE_TYPES


def load(name: str) -> Any:
    """A frozen teacher in eval mode.

    Raises:
        UsageError: nothing is known by that name, or it gives no map.
        EdgekdError: its weights are not here, or damaged.
    """
    found = _find(name)
    return found.eval().requires_grad_(False)


def _find(name: str) -> Any:
    known, _, file = name.partition("=")
    path = Path(name).expanduser()
    if checkpoint.is_checkpoint(path):
        return checkpoint.load(path)
    if known.startswith("timm/"):
        return from_timm(known, Path(file).expanduser() if file else None)
    if classifiers.FACTORY.fullmatch(name):
        model: Any = untrained(backbones.BackboneConfig(factory=name), 0)
        if not (hasattr(model, "outputs") and hasattr(model, "preprocess")):
            return Seen(name, model, Preprocess(224, fit="crop"))
        model.name = name  # by which its students find it again
        return model
    if classifiers.knows(name):
        return classifiers.load(name)
    if knows(name):
        return from_huggingface(name, path)
    if name not in teachers.names() and not path.exists() and huggingface.is_hub(name):
        folder = huggingface.locate(name, offline=huggingface.forbidden())
        if folder.is_dir() and (knows(str(folder)) or classifiers.knows(str(folder))):
            return classifiers.from_huggingface(name) if classifiers.knows(str(folder)) else from_huggingface(name, folder)
    return teachers.load(name)


def from_timm(name: str, file: Path | None = None, *, pretrained: bool = True) -> Seen:
    """A network of timm's with its weights. Errors as `edgekd.tasks.classification.teachers.from_timm`."""
    short, timm = name.removeprefix("timm/"), backbones.import_timm()
    try:
        model = timm_model(short, pretrained=pretrained, num_classes=0, **({"pretrained_cfg_overlay": {"file": str(file)}} if file else {}))
    except UsageError:
        raise
    except Exception as e:  # the hub's and torch's errors are of many kinds
        raise EdgekdError(f"the weights of '{name}' cannot be had: {first_line(e)}", hint=f"give a file instead: {name}=FILE.safetensors") from e
    patches = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    patch = patches[0] if patches is not None and hasattr(model, "cls_token") else None
    return Seen(name, model, classifiers.timm_preprocess(timm, model, short), patch=patch)


def from_huggingface(name: str, folder: Path) -> Seen:
    """A network of transformers without a head.

    Raises:
        EdgekdError: the folder cannot be read, or its weights do not fit.
    """
    backbones.mend_torchvision()
    from transformers import AutoModel

    try:
        model, info = AutoModel.from_pretrained(str(folder), local_files_only=True, use_safetensors=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as e:
        raise EdgekdError(f"no model can be read from '{name}': {first_line(e)}", hint="a folder holds config.json and model.safetensors") from e
    missing = [k for k in info["missing_keys"] if "pooler" not in k]  # no map is made by a pooler
    if missing:
        raise EdgekdError(f"the weights do not fit: missing {', '.join(sorted(missing)[:4])}", where=name, hint="download them again")
    spec = classifiers.described_preprocess(folder, model.config)
    patch = getattr(model.config, "patch_size", None)
    if isinstance(patch, int) and spec.image_size % patch:
        raise UsageError(f"its patches of {patch} px do not divide photos of {spec.image_size} px", where=name,
                         hint="set crop_size in the folder's preprocessor_config.json to a multiple")
    return Seen(name, model, spec, patch=patch if isinstance(patch, int) else None)


def shape_of(teacher: Any) -> tuple[int, int]:
    """Width and side of a teacher's embedding; of a teacher with further channels for its own decoder, the first ones count."""
    if hasattr(teacher, "grid"):
        return teacher.embed_dim, teacher.grid
    side = teacher.preprocess.image_size
    with torch.no_grad():
        found = teacher.outputs(torch.zeros(1, 3, side, side)) if hasattr(teacher, "outputs") else {"embedding": teacher.embed(torch.zeros(1, 3, side, side))}
    return teacher.embed_dim, int(found["embedding"].shape[-1])
