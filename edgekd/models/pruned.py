"""Encoders with channels and blocks left out: what is left of a network that is known by name, so that a checkpoint can be built again.

A pruned network is described against its base: the layers whose widths changed, and the blocks that are the identity now (they keep
their place, so that no other layer is renamed). `edgekd.pruning` decides what goes; this only rebuilds, and needs no other package.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from edgekd.errors import EdgekdError

if TYPE_CHECKING:
    from torch import nn


class Pruned(BaseModel):
    """What a checkpoint's header says of a pruned model. Paths are below the model's encoder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: str
    """The name that the whole network is built by."""
    kind: Literal["student", "teacher"] = "student"
    removed: tuple[str, ...] = ()
    """Blocks that are the identity now."""
    widths: dict[str, tuple[int, ...]] = {}
    """Layer -> (outputs, inputs) of a convolution or linear layer, (channels,) of a batch norm. Layers that are whole are not named."""


def shrink(encoder: nn.Module, pruned: Pruned) -> nn.Module:
    """`encoder` itself, cut to the widths: the first channels of every layer stay, for weights to be filled in.

    Raises:
        EdgekdError: a layer or block is not there, or is narrower than the widths say.
    """
    from torch import nn

    for path in pruned.removed:
        replace(encoder, path, nn.Identity())
    for path, width in pruned.widths.items():
        _resize(_find(encoder, path), width, path)
    return encoder


def widths(encoder: nn.Module) -> dict[str, tuple[int, ...]]:
    """The widths of every layer that can be cut."""
    from torch import nn

    found: dict[str, tuple[int, ...]] = {}
    for path, layer in encoder.named_modules():
        if isinstance(layer, nn.Conv2d):
            found[path] = (layer.out_channels, layer.in_channels)
        elif isinstance(layer, nn.Linear):
            found[path] = (layer.out_features, layer.in_features)
        elif isinstance(layer, nn.BatchNorm2d):
            found[path] = (layer.num_features,)
    return found


def describe(encoder: nn.Module, base: nn.Module, name: str, kind: Literal["student", "teacher"], removed: Sequence[str]) -> Pruned:
    """What `encoder` is, against the whole encoder `base` of the model `name`."""
    whole, left = widths(base), widths(encoder)
    return Pruned(base=name, kind=kind, removed=tuple(removed), widths={path: width for path, width in left.items() if whole[path] != width})


def replace(encoder: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` in a place of the encoder. Raises EdgekdError when there is no such place."""
    parent, _, name = path.rpartition(".")
    _find(encoder, path)
    setattr(_find(encoder, parent), name, module)


def _find(encoder: nn.Module, path: str) -> nn.Module:
    try:
        return encoder.get_submodule(path)
    except AttributeError as e:
        raise EdgekdError(f"the encoder has no layer '{path}', and the checkpoint says how wide it is",
                          hint="the checkpoint comes from another version of this model") from e


def _resize(layer: Any, width: tuple[int, ...], path: str) -> None:
    """Cut one layer. A depthwise convolution stays one."""
    from torch import nn

    if isinstance(layer, nn.Conv2d):
        own: tuple[int, ...] = (layer.out_channels, layer.in_channels)
        depthwise = layer.groups == layer.in_channels == layer.out_channels
        fits = (layer.groups == 1 or depthwise) and (not depthwise or len(set(width)) == 1)
    elif isinstance(layer, nn.Linear):
        own, fits = (layer.out_features, layer.in_features), True
    elif isinstance(layer, nn.BatchNorm2d):
        own, fits = (layer.num_features,), True
    else:
        own, fits = (), False
    if not fits or len(width) != len(own) or not all(0 < new <= old for new, old in zip(width, own, strict=True)):
        raise EdgekdError(f"the layer '{path}' cannot be cut to {width}: it is a {type(layer).__name__} of {own}",
                          hint="the checkpoint comes from another version of this model")
    if isinstance(layer, nn.Conv2d):
        layer.groups = width[0] if depthwise else 1
        layer.out_channels, layer.in_channels = width
        _cut(layer, "weight", (width[0], 1 if depthwise else width[1]))
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = width
        _cut(layer, "weight", width)
    else:
        layer.num_features = width[0]
        for name in ("weight", "running_mean", "running_var"):
            _cut(layer, name, width)
    _cut(layer, "bias", width[:1])


def _cut(layer: nn.Module, name: str, to: tuple[int, ...]) -> None:
    """Keep the first values of a parameter or buffer along its first axes."""
    from torch import nn

    value = getattr(layer, name, None)
    if value is None:
        return
    left = value.detach()[tuple(slice(n) for n in to)].clone()
    setattr(layer, name, nn.Parameter(left, requires_grad=value.requires_grad) if isinstance(value, nn.Parameter) else left)
