"""What several teachers give, mixed into one: shared by the targets that choose and weigh teachers."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.distillation.outputs import FEATURES, Outputs, Setup
from edgekd.errors import UsageError


def mixable(outputs: Sequence[Outputs]) -> list[str]:
    """Names of the outputs that all of these have in one shape; embeddings may have different grids."""
    found = []
    for name in sorted(FEATURES):
        tensors = [getattr(o, name) for o in outputs]
        if all(t is not None for t in tensors) and len({t.shape[1] for t in tensors}) == 1:
            found.append(name)
    return found


def check_mixable(setup: Setup, name: str) -> list[str]:
    """`mixable` of the stage's teachers.

    Raises:
        UsageError: there is one teacher only, or nothing that all have in one shape.
    """
    if len(setup.context.teachers) < 2:
        raise UsageError(f"{name} mixes several teachers, and there is one", where=setup.where, hint="add more_teachers: [NAME]")
    found = mixable(list(setup.context.teachers.values()))
    if not found:
        raise UsageError(f"{name}: {' and '.join(setup.context.teachers)} have no output of one shape", where=setup.where,
                         hint="take teachers with the same classes or the same embedding, or the objective unic")
    return found


def mixed(outputs: Sequence[Outputs], weights: Tensor, names: Sequence[str], probabilities: bool = True) -> Outputs:
    """The first of `outputs` with the named ones replaced by their weighted mean; the others, taps among them, stay the first teacher's.

    Args:
        weights: (teachers, B), each column sums to 1.
        probabilities: logits become the logarithm of the mean of the softmaxes; else they are averaged as they are.
    """
    changed: dict[str, Any] = {}
    for name in names:
        tensors = [o[name].float() for o in outputs]
        if name == "embedding":
            side = tensors[0].shape[-2:]
            tensors = [t if t.shape[-2:] == side else F.interpolate(t, side, mode="bilinear", align_corners=False, antialias=True) for t in tensors]
        share = weights.to(tensors[0]).reshape(len(outputs), -1, *[1] * (tensors[0].ndim - 1))
        if name == "logits" and probabilities:
            changed[name] = (torch.stack([t.log_softmax(-1) for t in tensors]) + share.clamp(min=1e-12).log()).logsumexp(0)
        else:
            changed[name] = (torch.stack(tensors) * share).sum(0)
    return replace(outputs[0], **changed, taps={**outputs[0].taps, **changed})
