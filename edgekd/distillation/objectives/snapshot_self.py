"""The student learns from what it was a while ago (PS-KD, arXiv 2006.12000: the teacher is the student of the last epoch).

PS-KD mixes the last epoch's answer into the label, by more and more. Here the label's part is whatever other objective the stage has;
this one is the part of the past, and its weight grows in the same straight line.
"""
from __future__ import annotations

import torch
from torch import Tensor

from edgekd.distillation.copies import Frozen, apart
from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.distillation.points import Objective


class SnapshotSelf(Objective):
    """(alpha x progress) T^2 KL(snapshot || student) of the logits, or the squared error of the embedding where there are no logits; the
    snapshot is taken again every `every` steps.

    Args:
        every: steps between snapshots; the paper's epoch is images / (batch_size x accumulate).
        alpha: the weight at the end of the stage (PS-KD: 0.8); it grows from 0.
        temperature: of both softmaxes.
    """

    name, family, paper = "snapshot_self", "self_distillation", "Self-Knowledge Distillation with Progressive Refinement of Targets (arXiv 2006.12000)"
    needs = frozenset({"images"})
    asks_teacher = False
    least_at_teacher = False
    taken: Tensor

    def __init__(self, every: int = 100, alpha: float = 0.8, temperature: float = 1.0) -> None:
        super().__init__()
        self.every, self.alpha, self.temperature = every, alpha, temperature
        self.register_buffer("taken", torch.tensor(0))

    def bind(self, setup: Setup) -> None:
        """The first snapshot; the student itself is held, not registered."""
        self.snapshot = Frozen(setup.student)
        self._held = (setup.student,)

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """logits (B, C) or embeddings (B, E, s, s) -> (B,)."""
        if context.step // self.every > int(self.taken):
            self.snapshot.follow(self._held[0], 0.0)
            self.taken.fill_(context.step // self.every)
        assert context.images is not None
        return self.alpha * context.progress * apart(student, self.snapshot(context.images), context.valid, self.temperature)


objective = SnapshotSelf
