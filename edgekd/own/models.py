"""`module:factory` and its inputs -> a model of the task `tensors`, checked for everything that would make an export of it meaningless."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgekd import plugins
from edgekd.errors import EdgekdError, UsageError, first_line
from edgekd.models.fold import fold
from edgekd.own import data
from edgekd.parity import sound
from edgekd.tasks.tensors.inputs import draw, lengths_of, parse, rows_of
from edgekd.tasks.tensors.model import Arrays, refusal

COMPARED = 8
"""Calls of the user's own data that parity is checked on, at most."""
FORM = "name it as module:factory, and its inputs with --input 1x3x224x224"


def is_factory(reference: str) -> bool:
    """Whether a reference has the form of `module:factory`."""
    module, colon, name = reference.partition(":")
    return bool(colon) and name.isidentifier() and all(part.isidentifier() for part in module.split(".")) and not Path(reference).exists()


def load(reference: str, inputs: Sequence[str], *, lengths: Mapping[str, int] | None = None, shown: str | Path | None = None,
         photos: data.Photos | None = None) -> tuple[Arrays, data.Calls | None]:
    """The model, and the calls of the user's own data where `shown` names some.

    Args:
        inputs: one `--input` each (`edgekd.tasks.tensors.inputs`).
        lengths: of axes of any length.

    Raises:
        UsageError: the reference, an input, a length or the data cannot be used as they are.
        EdgekdError: the factory fails, or what it makes refuses the inputs, gives NaN, or answers otherwise each time.
    """
    if not is_factory(reference):
        raise UsageError(f"--input is for a model of your own, and '{reference}' is none", hint=FORM)
    described = parse(inputs)
    sizes, least = lengths_of(described, lengths or {}), lengths_of(described, lengths or {}, least=True)
    rows = rows_of(described)
    calls = data.read(shown, described, sizes, photos) if shown is not None else None
    module = made(reference).eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    model = Arrays(reference.rpartition(":")[2], module, described, sizes, {s: least[s] if s == rows else n for s, n in sizes.items()},
                   list(calls.spread(COMPARED)) if calls is not None else None).eval()
    _steady(model)
    _any_length(model)
    try:
        fold(model)
    except Exception as e:  # copying and folding run the module's own code
        raise EdgekdError(f"the model cannot be copied and folded: {first_line(e)}", where=reference,
                          hint="fold() of a module takes no arguments and returns the module that is exported in its place") from e
    return model, calls


def made(reference: str) -> nn.Module:
    """The module that `module:factory` makes, or is; random weights are the same every time.

    Raises:
        EdgekdError: it cannot be imported, fails, or gives no module.
    """
    try:
        found = plugins.factory(reference)
        if not isinstance(found, nn.Module):
            if not callable(found):
                raise UsageError(f"'{reference}' is a {type(found).__name__}, neither a torch.nn.Module nor a function that returns one", hint=FORM)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                found = found()
    except EdgekdError:
        raise
    except Exception as e:  # the user's own code: whatever it raises is the reason
        raise EdgekdError(f"'{reference}' fails: {type(e).__name__}: {first_line(e)}", hint="it is called without arguments and returns a torch.nn.Module") from e
    if not isinstance(found, nn.Module):
        raise UsageError(f"'{reference}' returns a {type(found).__name__}, not a torch.nn.Module", hint="it is called without arguments and returns the model")
    return found


def refuse_strangers(source: Any, reference: str) -> None:
    """Raises UsageError for a plain module where one of edgekd's models is needed: its inputs are not known."""
    if not hasattr(source, "preprocess"):
        raise UsageError(f"'{reference}' is a {type(source).__name__} whose inputs are not known", hint="name them: --input 1x3x224x224 (docs/own-models.md)")


def _steady(model: Arrays) -> None:
    """Finite answers, the same each time."""
    first, again = model.run(model.samples[0]), model.run(model.samples[0])
    values = [np.ravel(a).astype(np.float64) for one in (first, *map(model.run, model.samples[1:])) for a in one.values()]
    for name, value in first.items():
        if value.size and not np.isfinite(value.astype(np.float64)).all():
            raise EdgekdError(f"the model's output '{name}' holds NaN or infinity", where=model.name,
                              hint="its weights are damaged, or it does not take such inputs: give real ones with --data")
        if value.shape != again[name].shape or not np.allclose(value.astype(np.float64), again[name].astype(np.float64), rtol=1e-3, atol=1e-6):
            raise EdgekdError(f"the model's output '{name}' is another one each time, though it is in eval mode", where=model.name,
                              hint="take what is random out of its forward(), or keep it to training")
    sound(model.name, "outputs", np.concatenate(values))


def _any_length(model: Arrays) -> None:
    """Axes that may vary do: the model takes another length too."""
    for symbol, length in model.lengths.items():
        try:
            model.run(draw(model.inputs, {**model.lengths, symbol: length + 1}, seed=0))
        except Exception as e:  # the module's own
            raise EdgekdError(f"the model does not take any length of {symbol}, such as {length + 1}: {refusal(e)}", where=model.name,
                              hint=f"write a number in place of {symbol}") from e
