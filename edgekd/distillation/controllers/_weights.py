"""What controllers that train through rounded weights share: which layers, and parametrizations that no state dictionary shows."""
from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from edgekd.errors import UsageError, unknown
from edgekd.models.rounding import LAYERS

FLOAT_PARTS = ("prompt_encoder", "mask_decoder", "proposer")
"""Parts of a promptable student that stay in float: they are cheap, and break at 8 bits."""


def chosen_layers(student: nn.Module, skip: Sequence[str], where: str, who: str) -> dict[str, nn.Module]:
    """Path -> convolution or linear layer whose weight learns, outside of `skip` (paths, with all below them, or patterns) and `FLOAT_PARTS`.

    Raises:
        UsageError: `skip` names no module of the student, or nothing is left.
    """
    known = {path for path, _ in student.named_modules() if path}
    for pattern in skip:
        if not any(_within(path, pattern) for path in known):
            raise unknown("module of the student", pattern, known)
    found: dict[str, nn.Module] = {path: m for path, m in student.named_modules() if isinstance(m, LAYERS) and m.weight.requires_grad
             and not any(_within(path, pattern) for pattern in (*FLOAT_PARTS, *skip))}
    if not found:
        raise UsageError(f"{who} finds no Conv2d or Linear in what the stage trains", where=where, hint="name the encoder under 'trainable'")
    return found


def _within(path: str, pattern: str) -> bool:
    return path == pattern or path.startswith(f"{pattern}.") or fnmatch.fnmatchcase(path, pattern)


def put(module: nn.Module, name: str, how: nn.Module) -> list[Any]:
    """Compute a parameter of `module` as how(parameter) from now on; its state keeps the parameter's plain name. What undoes the latter."""
    parametrize.register_parametrization(module, name, how)
    return [module.register_state_dict_post_hook(partial(_plainly, name=name)), module.register_load_state_dict_pre_hook(partial(_back, name=name))]


def take(module: nn.Module, name: str, *, keep: bool) -> None:
    """End that; `keep` what was computed in place of the parameter."""
    parametrize.remove_parametrizations(module, name, leave_parametrized=keep)


def _plainly(_: nn.Module, state: dict[str, Any], prefix: str, __: Any, *, name: str) -> None:
    state[f"{prefix}{name}"] = state.pop(f"{prefix}parametrizations.{name}.original")


def _back(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any, name: str) -> None:
    if f"{prefix}{name}" in state:
        state[f"{prefix}parametrizations.{name}.original"] = state.pop(f"{prefix}{name}")
