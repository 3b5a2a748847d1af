"""What controllers that weigh objectives share: the objectives' names, the place in the student where they all meet, and gradients there."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from edgekd.distillation.distributed import current
from edgekd.errors import UsageError, unknown
from edgekd.recipe import Stage


def objective_names(stage: Stage) -> list[str]:
    """The objectives of a stage by the names that losses go by: a second one of a name has its number behind it."""
    names: list[str] = []
    for number, ref in enumerate(stage.objectives):
        names.append(ref.name if ref.name not in names else f"{ref.name}.{number}")
    return names


def known_objective(name: str, stage: Stage, who: str) -> str:
    """`name`, which must be one of the stage's objectives.

    Raises:
        UsageError: it is not.
    """
    names = objective_names(stage)
    if name not in names:
        raise UsageError(f"{who}: the stage has no objective '{name}'", where=f"stage {stage.name}", hint=f"its objectives: {', '.join(names)}")
    return name


def several_objectives(stage: Stage, who: str) -> list[str]:
    """`objective_names`, of which there must be two.

    Raises:
        UsageError: there is one.
    """
    names = objective_names(stage)
    if len(names) < 2:
        raise UsageError(f"{who} balances objectives, and the stage has one", where=f"stage {stage.name}", hint="add another objective, or leave the controller out")
    return names


def check_whole(who: str) -> None:
    """Raises UsageError: weights are spread over processes, where no gradient at one of them can be asked for."""
    if current().sharded:
        raise UsageError(f"{who} reads gradients at one weight, and FSDP spreads weights over processes", hint="train on DDP (torchrun), or leave the controller out")


def shared_parameter(student: Any, path: str = "") -> nn.Parameter:
    """The weight at which gradients of objectives are compared: that of `path`, else the last trainable matrix of the encoder, else of the
    student. Every objective on what the encoder gives reaches it.

    Raises:
        UsageError: no such weight, or none that is trained.
    """
    named = {n: p for n, p in student.named_parameters() if p.requires_grad}
    if path:
        if path not in named:
            raise unknown("trained weight of the student", path, named)
        return named[path]
    matrices = {n: p for n, p in named.items() if p.ndim >= 2}
    found = [p for n, p in matrices.items() if n.startswith("encoder.")] or list(matrices.values())
    if not found:
        raise UsageError("no weight of the student is trained, so gradients cannot be compared", hint="name what learns under 'trainable'")
    return found[-1]


def gradient(loss: Tensor, at: nn.Parameter) -> Tensor:
    """d loss / d at, flat and float32, with the graph kept; zeros where the loss does not reach it."""
    if not loss.requires_grad:
        return torch.zeros(at.numel(), device=at.device)
    found = torch.autograd.grad(loss, at, retain_graph=True, allow_unused=True)[0]
    return torch.zeros(at.numel(), device=at.device) if found is None else found.detach().float().flatten()
