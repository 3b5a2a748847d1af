"""Copies of the student that learning from oneself or from a peer needs, and how far two models' outputs are apart.

A copy lives in the plug-in that made it: it is saved with the stage, and never reaches an artifact.
"""
from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from edgekd.distillation import taps
from edgekd.distillation.losses import aligned, over_photo
from edgekd.distillation.outputs import Outputs
from edgekd.distillation.softmax import soft_kl


class Frozen(nn.Module):
    """A copy of a model that is never trained and always in eval mode; its weights change by `follow` alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Frozen:
        """Stays in eval mode, whatever becomes of the plug-in that holds it."""
        super().train(False)
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> Outputs:
        """What the copy gives for photos (B, 3, S, S)."""
        return Outputs.of(taps.outputs(self.model, images))

    @torch.no_grad()
    def follow(self, model: nn.Module, keep: float) -> None:
        """weights <- keep x weights + (1 - keep) x those of `model`; counters are taken over."""
        state = model.state_dict()
        for name, mine in self.model.state_dict().items():
            mine.lerp_(state[name].to(mine), 1 - keep) if mine.is_floating_point() else mine.copy_(state[name])


class Peer(nn.Module):
    """A copy of a model that trains on its own: what was trainable in the model is trainable in it, from other random weights.

    Args:
        reset: draw the trainable weights of layers that know how again; without it peer and student start from the same weights.
    """

    def __init__(self, model: Any, *, reset: bool = True) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        if reset:
            for module in self.model.modules():
                if _learns(module) and hasattr(module, "reset_parameters"):
                    module.reset_parameters()

    def train(self, mode: bool = True) -> Peer:
        """Only modules with trainable parameters are in training mode: batch norms of frozen parts keep their statistics."""
        super().train(False)
        for module in self.model.modules():
            module.training = mode and _learns(module)
        self.training = mode
        return self

    def forward(self, images: Tensor) -> Outputs:
        """What the peer gives for photos (B, 3, S, S), with its graph."""
        return Outputs.of(taps.outputs(self.model, images))


def _learns(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters(recurse=False))


def towards(ours: Tensor, theirs: Tensor, temperature: float) -> Tensor:
    """`soft_kl` of logits (B, C) -> (B,), by which only `ours` learns."""
    return soft_kl(ours, theirs.detach(), temperature)


def map_error(ours: Tensor, theirs: Tensor, valid: Tensor) -> Tensor:
    """Mean squared error over the photo: maps (B, E, s, s), (B, E, t, t), valid (B, 1, h, w) -> (B,). `theirs` gets no gradient."""
    a, b = aligned(ours, theirs.detach())
    return over_photo((a - b).square(), valid)


def apart(ours: Outputs, theirs: Outputs, valid: Tensor, temperature: float) -> Tensor:
    """How far `ours` is from `theirs`, which gets no gradient: `towards` of logits where both have them, `map_error` of embeddings else."""
    if ours.logits is not None and theirs.logits is not None:
        return towards(ours.logits, theirs.logits, temperature)
    return map_error(ours["embedding"], theirs["embedding"], valid)
