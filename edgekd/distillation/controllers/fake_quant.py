"""Quantization-aware distillation: the student trains with the rounding of low precision in its forward pass, and ends with weights on the grid.

Polino, Pascanu, Alistarh, "Model compression via distillation and quantization" (arXiv 1802.05668): distil a student whose weights are
quantized in every forward pass while the gradient reaches the float ones straight through. Activations are clipped to learned ranges, as in
PACT (arXiv 1805.06085).
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from edgekd.distillation.distributed import current
from edgekd.distillation.outputs import Setup
from edgekd.distillation.points import Controller
from edgekd.errors import UsageError, unknown
from edgekd.models.rounding import leveled, rounded

FROM, TO = "parametrizations.weight.original", "weight"


class FakeQuant(Controller):
    """w -> s_c round(w / s_c) for every output channel c of each Conv2d and Linear that the stage trains, x -> the nearest of 2^activations
    levels between two learned ends for what comes into it. Gradients pass as if nothing was rounded.

    s_c = max|w| / (2^(bits-1) - 1) at 8 bits, which is what exporters write; below, where one large weight would cost all others their
    levels, at most LSQ's 2 mean|w| / sqrt(2^(bits-1) - 1) (arXiv 1902.08153).

    While the stage trains, its state and averages hold the float weights under their plain names. At its end the rounded weights take their
    place, so that checkpoint and every export hold plain tensors, and exporting them in `w8` rounds nothing again. A later stage that trains the
    same part without it moves them off the grid: this one comes last. Where an export folds
    parallel branches into one weight (RepViT's), the sum is a new weight, which that export rounds on its own.

    Args:
        bits: of the weights, 2 to 8.
        activations: bits of the activations; 0 leaves them in float (weight-only schemes).
        skip: paths of modules of the student that stay in float, with all below them.
    """

    name, family = "fake_quant", "quantization_aware"
    paper = "Model compression via distillation and quantization (arXiv 1802.05668)"

    settled: Tensor

    def __init__(self, bits: int = 8, activations: int = 8, skip: list[str] | None = None) -> None:
        super().__init__()
        if not 2 <= bits <= 8 or not (activations == 0 or 2 <= activations <= 8):
            raise UsageError(f"fake_quant takes 2 to 8 bits, and 0 or 2 to 8 for activations, not bits={bits}, activations={activations}")
        self.bits, self.activations, self.skip = bits, activations, skip or []
        self.ranges = nn.ModuleList()
        self.register_buffer("settled", torch.tensor(False))
        self._undo: list[Any] = []

    def begin(self, setup: Setup) -> None:
        """Put the rounding into the student.

        Raises:
            UsageError: nothing that the stage trains has weights to round, or `skip` names no module.
        """
        chosen = layers(setup.student, self.skip)
        if not chosen:
            raise UsageError("fake_quant finds no Conv2d or Linear in what the stage trains", where=setup.where, hint="name the encoder under 'trainable'")
        self._held: tuple[list[nn.Module]] = (chosen,)
        for module in chosen:
            assert isinstance(module.weight, Tensor)
            parametrize.register_parametrization(module, "weight", Rounded(self.bits))
            self._undo += [module.register_state_dict_post_hook(plainly), module.register_load_state_dict_pre_hook(back)]
            if self.activations:
                self.ranges.append(Range(self.activations))
                self._undo.append(module.register_forward_pre_hook(self.ranges[-1]))

    def finish(self) -> None:
        """Take the rounding out again. The rounded weights stay; of a stage that was finished before, those that it left."""
        (chosen,) = self._held
        for undo in self._undo:
            undo.remove()
        for module in chosen:
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=not bool(self.settled))
        self._undo, self._held = [], ([],)
        self.settled.fill_(True)


class Rounded(nn.Module):
    """A weight as it is after rounding; it has no state of its own."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, weight: Tensor) -> Tensor:
        """weight (O, ...) -> the same shape, each of the O rows on a grid of its own."""
        return weight + (rounded(weight.detach(), self.bits) - weight).detach()


class Range(nn.Module):
    """Rounds the first input of a module to levels between two ends, which start at the least and most of the first batch and then learn."""

    known: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.steps = 2**bits - 1
        self.ends = nn.Parameter(torch.tensor([-1.0, 1.0]))
        self.register_buffer("known", torch.tensor(False))

    def forward(self, module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        """A forward pre-hook."""
        x = given[0]
        if not self.known:
            with torch.no_grad():
                self.ends.copy_(current().mean(torch.stack([x.min(), x.max()]).float().to(self.ends.device)))
                self.known.fill_(True)
        return (leveled(x, self.ends, self.steps), *given[1:])


def layers(student: nn.Module, skip: list[str]) -> list[nn.Module]:
    """Conv2d and Linear modules with a weight that learns, outside of `skip`.

    Raises:
        UsageError: `skip` names no module of the student.
    """
    known = {path for path, _ in student.named_modules() if path}
    for path in skip:
        if path not in known:
            raise unknown("module of the student", path, known)
    return [m for path, m in student.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and m.weight.requires_grad
            and not any(path == s or path.startswith(f"{s}.") for s in skip)]


def plainly(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
    """Hook: the float weight is saved under its plain name."""
    state[f"{prefix}{TO}"] = state.pop(f"{prefix}{FROM}")


def back(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
    """Hook: and found there again."""
    if f"{prefix}{TO}" in state:
        state[f"{prefix}{FROM}"] = state.pop(f"{prefix}{TO}")


controller = FakeQuant
