"""Students from any backbone: a timm model, or a factory of your own.

    timm/resnet18          timm's feature extractor of that name, without weights (pip install "edgekd[timm]")
    my.models:tiny         what `tiny()` of the importable module `my.models` returns: a torch module that maps (B, 3, S, S) to
                           feature maps (B, C, h, w) or (B, h, w, C): one, or a list, tuple or dict of them

Models, files and ids carry the safe spellings `timm-resnet18` and `factory-my.models-tiny`; both are accepted everywhere. A
checkpoint holds the weights, not the code: opening one needs timm or the module again.

The strides of the maps are found by a dry run. The deepest map of stride 16 is projected to the embedding's width, one of stride 32
is projected, doubled (bilinear) and added, and SAM's neck follows, as EdgeSAM does with RepViT (arXiv 2312.06660, sec. 3.2). Without
a map of stride 16, one of stride 8 is averaged down, or else one of stride 32 doubled.
"""
from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd import plugins
from edgekd.errors import EdgekdError, UsageError, closest, first_line
from edgekd.models.blocks import initialise, sam_neck
from edgekd.protocols import package_version
from edgekd.students import Family

INSTALL = 'pip install "edgekd[timm]"'
DRY_RUNS = (224, 256)
"""Sides of the dry runs' images, multiples of 32: the first is what timm's transformers expect, two show that the size is free."""
STRIDES = (16, 8, 32)
"""What can become an embedding at stride 16, the best first."""
_TIMM = re.compile(r"timm[/-](\w[\w.]*)")
_FACTORY = re.compile(r"(?:factory-(?P<a>[^\W\d][\w.]*)-(?P<b>[^\W\d]\w*)|(?P<c>[^\W\d][\w.]*):(?P<d>[^\W\d]\w*))")


@dataclass(frozen=True)
class BackboneConfig:
    """Which backbone: a timm model, or `module:factory`."""

    timm: str | None = None
    factory: str | None = None
    act: str = "its own"

    def scaled(self, *, width: float = 1.0, depth: float = 1.0, act: str | None = None) -> BackboneConfig:
        """Itself. Raises UsageError when anything is to be changed: only its own code could."""
        if (width, depth, act) != (1.0, 1.0, None):
            raise UsageError("a backbone of somebody else's takes no width, depth or activation", where=self.timm or self.factory,
                             hint="name a smaller model, or let your factory make it")
        return self

    def __str__(self) -> str:
        return f"timm/{self.timm}" if self.timm else str(self.factory)


def canonical(name: str) -> str | None:
    """The safe spelling of a backbone's name in either spelling; None for what cannot be one. Imports nothing."""
    config = parse(name)
    if config is None:
        return None
    return f"timm-{config.timm}" if config.timm else "factory-" + str(config.factory).replace(":", "-")


def parse(name: str) -> BackboneConfig | None:
    """The backbone that a name in either spelling means; None for what cannot be one. Imports nothing."""
    if found := _TIMM.fullmatch(name):
        return BackboneConfig(timm=found[1])
    if found := _FACTORY.fullmatch(name):
        return BackboneConfig(factory=f"{found['a'] or found['c']}:{found['b'] or found['d']}")
    return None


def mend_torchvision() -> None:
    """Let torchvision be imported beside a CPU build of torch; call it before libraries that import torchvision when they find it.

    Its wheels are linked against CUDA: without it their operators do not register and the import fails. Declaring the two that it
    looks for lets it pass; they raise if called, and no backbone calls them. Nothing is done where the import works or torch has CUDA.
    """
    if torch.version.cuda is not None or package_version("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        _declare_operators()


def import_timm() -> Any:
    """The package timm, which imports torchvision.

    Raises:
        UsageError: timm is not installed, with the command.
        EdgekdError: it is installed and does not import.
    """
    if package_version("timm") is None:
        raise UsageError("timm is not installed", hint=f"install it: {INSTALL}")
    mend_torchvision()
    try:
        import timm
    except (ImportError, RuntimeError) as e:
        raise EdgekdError(f"timm does not import here: {first_line(e)}", hint="install the torchvision that fits your torch") from e
    return timm


def _declare_operators() -> None:
    """What torchvision 0.2x looks up while it is imported; a declaration that exists stays."""
    for name in ("nms", "qnms"):
        try:
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        except RuntimeError:
            continue


def _timm_body(name: str) -> nn.Module:
    timm = import_timm()
    if name.split(".")[0] not in timm.list_models():
        near = closest(name, timm.list_models())
        raise UsageError(f"timm {timm.__version__} has no model '{name}'",
                         hint=f"did you mean timm/{near}?" if near else "timm.list_models() lists them")
    options: dict[str, Any] = {"pretrained": False, "features_only": True}
    reason: Exception | None = None
    for more in ({"dynamic_img_size": True}, {"strict_img_size": False}, {}):  # transformers made for one image size adapt if they can
        try:
            return timm.create_model(name, **options, **more)
        except (TypeError, RuntimeError, ValueError, AttributeError, AssertionError) as e:
            reason = e
    raise UsageError(f"timm makes no feature maps of '{name}': {first_line(reason or ValueError(name))}",
                     hint="choose a model with feature maps of stride 16")


def _factory_body(reference: str) -> nn.Module:
    try:
        body = plugins.factory(reference)()
    except EdgekdError as e:
        raise UsageError(e.what, where=reference,
                         hint="NAME is a student, timm/MODEL, or module:factory importable from here (see PYTHONPATH)") from e
    except Exception as e:  # the user's own code may raise anything
        raise UsageError(f"the factory failed: {type(e).__name__}: {first_line(e)}", where=reference,
                         hint="it is called without arguments") from e
    if not isinstance(body, nn.Module):
        raise UsageError(f"the factory returned a {type(body).__name__} instead of a torch.nn.Module", where=reference)
    return body


@dataclass(frozen=True)
class FeatureMap:
    """One of a backbone's maps: its place among them, its width, and whether channels come last."""

    index: int
    channels: int
    last: bool

    def of(self, maps: list[Tensor]) -> Tensor:
        """(B, C, h, w)."""
        found = maps[self.index]
        return found.permute(0, 3, 1, 2) if self.last else found


def feature_maps(output: Any) -> list[Tensor]:
    """The 4-D maps among whatever a backbone returns, in its order."""
    found = list(output.values()) if isinstance(output, Mapping) else list(output) if isinstance(output, (list, tuple)) else [output]
    return [m for m in found if isinstance(m, Tensor) and m.ndim == 4 and m.is_floating_point()]


def dry_run(body: nn.Module, name: str) -> dict[int, FeatureMap]:
    """Stride -> the deepest map of that stride.

    Raises:
        UsageError: the backbone does not run on images of several sizes, or returns no feature maps.
    """
    found: list[dict[int, FeatureMap]] = []
    training = body.training
    for side in DRY_RUNS:
        try:
            with torch.no_grad():
                maps = feature_maps(body.eval()(torch.zeros(1, 3, side, side)))
        except Exception as e:  # somebody else's network may raise anything
            before = f", but does on {DRY_RUNS[0]} px: it takes one size only" if found else ""
            raise UsageError(f"the backbone does not run on an image (1, 3, {side}, {side}){before}: {type(e).__name__}: {first_line(e)}",
                             where=name) from e
        finally:
            body.train(training)
        found.append({})
        for index, one in enumerate(maps):
            last = one.shape[2] != one.shape[3] and one.shape[1] == one.shape[2]
            if (last or one.shape[2] == one.shape[3]) and side % one.shape[2] == 0:
                found[-1][side // one.shape[2]] = FeatureMap(index, one.shape[3 if last else 1], last)
    both = {stride: one for stride, one in found[0].items() if found[1].get(stride) == one}
    if not both:
        raise UsageError("the backbone returns no square feature map (B, C, h, w) at a whole stride", where=name,
                         hint="return one map, or a list, tuple or dict of maps, without pooling or classifying")
    return both


class Backbone(nn.Module):
    """Images (B, 3, S, S) -> embedding (B, embed_dim, S/16, S/16): a backbone, projections of its maps, SAM's neck.

    Raises:
        UsageError: the backbone cannot be made or run, or none of its maps can become the embedding.
    """

    def __init__(self, config: BackboneConfig, embed_dim: int = 256) -> None:
        super().__init__()
        name = str(config)
        self.body = _timm_body(config.timm) if config.timm else _factory_body(name)
        strides = dry_run(self.body, name)
        self.stride = next((s for s in STRIDES if s in strides), 0)
        if not self.stride:
            raise UsageError(f"no feature map of the backbone has stride 16 (nor 8 or 32), only {sorted(strides)}", where=name,
                             hint="return a map (B, C, S/16, S/16)")
        self.main, self.deep = strides[self.stride], strides.get(32) if self.stride != 32 else None
        self.project = nn.Conv2d(self.main.channels, embed_dim, 1, bias=False)
        self.project_deep = nn.Conv2d(self.deep.channels, embed_dim, 1, bias=False) if self.deep else None
        self.neck = sam_neck(embed_dim, embed_dim)
        for part in (self.project, self.project_deep, self.neck):  # the backbone may have come with weights
            if part is not None:
                initialise(part)

    def extra_repr(self) -> str:
        return f"stride={self.stride}, main={self.main}, deep={self.deep}"

    def forward(self, images: Tensor) -> Tensor:
        maps = feature_maps(self.body(images))
        x = self.main.of(maps)
        x = self.project(F.avg_pool2d(x, 2) if self.stride == 8 else x)
        if self.stride == 32:
            x = _doubled(x)
        if self.deep is not None and self.project_deep is not None:
            x = x + _doubled(self.project_deep(self.deep.of(maps)))
        return self.neck(x)


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


def family_of(name: str) -> Family:
    """The family of one backbone, whose only configuration it is. Raises KeyError for what cannot name a backbone."""
    config, safe = parse(name), canonical(name)
    if config is None or safe is None:
        raise KeyError(name)
    return Family("timm" if config.timm else "factory", "its authors'" if config.timm else "your own", {safe: config}, Backbone)
