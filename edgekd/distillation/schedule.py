"""Learning rate, weight decay and optimizer of a stage."""
from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from edgekd.recipe import Stage


def rate(stage: Stage, step: int) -> float:
    """The stage's learning rate at a step."""
    return cosine(step, stage.steps, stage.lr, stage.lr if stage.schedule == "constant" else stage.min_lr, stage.warmup)


def optimizer(stage: Stage, modules: Iterable[nn.Module]) -> torch.optim.Optimizer:
    """The stage's optimizer over the parameters that are to be trained."""
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[stage.optimizer]
    return kind(decay_groups(modules, stage.weight_decay), lr=stage.lr, betas=stage.betas, fused=True)


def cosine(step: int, steps: int, peak: float, least: float, warmup: int) -> float:
    """Linear warm-up to `peak`, then half a cosine down to `least` at the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - 1 - warmup)
    return least + (peak - least) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def decay_groups(modules: Iterable[nn.Module], weight_decay: float) -> list[dict]:
    """Parameter groups: no weight decay on biases, norms and other vectors."""
    parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
    return [{"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]
