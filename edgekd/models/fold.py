"""Re-parameterisation: the training form of a model -> the form that is exported."""
from __future__ import annotations

import copy
from typing import TypeVar, cast

from torch import nn

M = TypeVar("M", bound=nn.Module)


def fold(module: M) -> M:
    """A deep copy of `module` in which everything that has `.fold()` is replaced by what it returns.

    The outermost such module wins: a block that folds as a whole never sees its parts folded before, while the parts of what it
    returned are folded next. A module used at two places is replaced by one. Only eval-mode outputs are equal, so fold before
    export, never before training. `module` itself is left as it is.
    """
    return cast(M, _replace(copy.deepcopy(module), {}))


def _replace(module: nn.Module, done: dict[nn.Module, nn.Module]) -> nn.Module:
    """`module` or its replacement, its children treated likewise; `done` maps an original to what took its place (and keeps it alive:
    by its mere id, a new module in freed memory would be taken for it)."""
    if module in done:
        return done[module]
    method = getattr(module, "fold", None)
    new = cast(nn.Module, method()) if callable(method) else module
    done[module] = new
    for name, child in list(new._modules.items()):
        if child is not None:
            new._modules[name] = _replace(child, done)
    return new
