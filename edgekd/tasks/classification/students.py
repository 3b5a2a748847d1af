"""Students of classification by name: an encoder and a pooled head.

    mobilenet_v3_large              also with :width=0.5 (or -width0.5)
    resnet50_d                      also with :width=0.5,depth=0.5
    repvit_s, tinyvit_xs, ...       every encoder of `edgekd list students`, its settings included, under a pooled head
    timm/NAME, module:factory       anybody's classifier that ends with a linear layer (`edgekd.models.classifier.Taken`)
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from edgekd import plugins, students
from edgekd.errors import UsageError, first_line, unknown
from edgekd.models.classifier import Classifier, PooledHead, Taken
from edgekd.models.mobilenet_v3 import MobileNetV3, MobileNetV3Config
from edgekd.models.resnet_d import ResNetD, ResNetDConfig
from edgekd.protocols import Preprocess
from edgekd.students import backbones

CONFIGS: dict[str, MobileNetV3Config | ResNetDConfig] = {"mobilenet_v3_large": MobileNetV3Config(), "resnet50_d": ResNetDConfig()}
NECK = 256
"""Width of the embedding of an encoder that was made for promptable students."""


def names() -> list[str]:
    """The students as they are, without their settings and without what others' code makes."""
    return [*CONFIGS, *students.names()]


def describe(name: str, image_size: int = 224, classes: int = 1000) -> dict[str, Any]:
    """Facts of a student of ours for lists: parameters and GMACs with the classifier."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counted:
        model = build(name, image_size=image_size, classes=classes).eval()
        model(torch.zeros(1, 3, image_size, image_size))
    return {"family": type(model.encoder).__name__, "params": sum(p.numel() for p in model.parameters()), "gmacs": round(counted.get_total_flops() / 2e9, 4),
            "embed_dim": model.embed_dim, "image_size": image_size}


def canonical(name: str) -> str:
    """A student's name, safe in file names and ids.

    Raises:
        UsageError: no such student or setting, with the nearest one.
    """
    base = students.base_of(name, CONFIGS)
    if base in CONFIGS:
        return str(students.with_settings(name, base, CONFIGS[base].act))
    try:
        return str(students.parse(name))
    except UsageError as e:
        if e.what.startswith("unknown student"):
            raise unknown("student", base, names()) from None
        raise


def trunk(name: str) -> tuple[nn.Module, int, int]:
    """The untrained encoder (B, 3, S, S) -> (B, C, h, w) of a student of ours, C, and the width of its classifier's hidden layer (0: none)."""
    base = students.base_of(name, CONFIGS)
    if base not in CONFIGS:
        return students.encoder(name, NECK), NECK, 0
    parsed = students.with_settings(name, base, CONFIGS[base].act)
    config = CONFIGS[base].scaled(width=parsed.width, depth=parsed.depth, act=parsed.act)
    if isinstance(config, MobileNetV3Config):
        return MobileNetV3(config), config.pooled, config.hidden
    return ResNetD(config), config.pooled, 0


def build(name: str, *, image_size: int, classes: int, preprocess: Preprocess | None = None, labels: Sequence[str] = (), seed: int = 0) -> Any:
    """An untrained student, the same for the same seed whatever ran before.

    Args:
        image_size: S in pixels, a multiple of 32.
        preprocess: the teacher's, so that both see the same pixels; its size is replaced.

    Raises:
        UsageError: unknown name, a size that cannot be built, or a factory's model with other classes.
    """
    if image_size < 32 or image_size % 32:
        raise UsageError(f"the image size of a student is a multiple of 32, not {image_size}", where=name, hint=f"nearest: {max(32, round(image_size / 32) * 32)}")
    safe = canonical(name)
    spec = replace(preprocess or Preprocess(image_size, fit="crop"), image_size=image_size, prompt_size=None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if (theirs := backbones.parse(name)) is not None and students.base_of(name, CONFIGS) not in CONFIGS:
            model = Taken(safe, untrained(theirs, classes), spec, labels=labels)
            if model.classes != classes:
                raise UsageError(f"the student tells {model.classes} classes apart and its teacher {classes}", where=name, hint="let the factory make a model of as many")
            return model
        encoder, channels, hidden = trunk(name)
        return Classifier(safe, encoder, PooledHead(channels, classes, hidden), spec, classes=classes, embed_dim=channels, labels=labels)


def untrained(config: backbones.BackboneConfig, classes: int) -> nn.Module:
    """A classifier of timm's without weights, or what a factory gives.

    Raises:
        UsageError: no such model, or the factory failed.
    """
    if config.factory is not None:
        try:
            model = plugins.factory(config.factory)()
        except Exception as e:  # the user's own code may raise anything
            raise UsageError(f"the factory failed: {first_line(e)}", where=config.factory, hint="write it as module:name, importable from here") from e
        if not isinstance(model, nn.Module):
            raise UsageError(f"the factory returned a {type(model).__name__} instead of a torch.nn.Module", where=config.factory)
        return model
    return timm_model(str(config.timm), num_classes=classes)


def timm_model(name: str, **options: Any) -> nn.Module:
    """`timm.create_model`.

    Raises:
        UsageError: timm is missing or has no such model.
    """
    timm = backbones.import_timm()
    if name.split(".")[0] not in timm.list_models():
        raise unknown("timm model", name, timm.list_models(f"{name[:4]}*") or timm.list_models("resnet*"))
    return timm.create_model(name, **options)
