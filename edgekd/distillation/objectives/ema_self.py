"""The student learns from a slow average of itself (Mean Teacher, arXiv 1703.01780; as further pre-training, arXiv 2210.02871).

The average changes less than the student from step to step, so it damps what single batches do. It has nothing to say about what is right:
put it beside an objective that compares with the teacher or with labels.
"""
from __future__ import annotations

import torch
from torch import Tensor

from edgekd.distillation.copies import Frozen, apart
from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.distillation.points import Objective


class EmaSelf(Objective):
    """T^2 KL(average || student) of the logits, or the squared error of the embedding where there are no logits; the average's weights
    follow the student's by w <- k w + (1 - k) student once a step, k = min(decay, (step + 1) / (step + 10)).

    Args:
        decay: share of itself that the average keeps in a step.
        temperature: of both softmaxes.
    """

    name, family, paper = "ema_self", "self_distillation", "Mean teachers are better role models (arXiv 1703.01780)"
    needs = frozenset({"images"})
    asks_teacher = False
    least_at_teacher = False
    seen: Tensor

    def __init__(self, decay: float = 0.999, temperature: float = 1.0) -> None:
        super().__init__()
        self.decay, self.temperature = decay, temperature
        self.register_buffer("seen", torch.tensor(0))

    def bind(self, setup: Setup) -> None:
        """Copy the student; the student itself is held, not registered."""
        self.average = Frozen(setup.student)
        self._held = (setup.student,)

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """logits (B, C) or embeddings (B, E, s, s) -> (B,)."""
        if context.step > int(self.seen):  # the first forward of a step, so that accumulated batches see one average
            self.average.follow(self._held[0], min(self.decay, (context.step + 1) / (context.step + 10)))
            self.seen.fill_(context.step)
        assert context.images is not None
        return apart(student, self.average(context.images), context.valid, self.temperature)


objective = EmaSelf
