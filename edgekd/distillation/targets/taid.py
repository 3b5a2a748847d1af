"""A teacher that starts near the student and moves away as it learns (TAID, arXiv 2501.16937): interpolated logits, or an interpolated embedding."""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.distillation import points
from edgekd.distillation.distributed import current
from edgekd.distillation.losses import aligned
from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.distillation.points import Target
from edgekd.distillation.softmax import soft_kl
from edgekd.errors import UsageError

INTERPOLATED = ("logits", "pooled", "embedding")


class TAID(Target):
    """The teacher's outputs interpolated with the student's, nearer to the teacher as the student learns.

    teacher <- (1 - t) x student (no gradient) + t x teacher. t never falls: at every step it is the larger of start + (end - start) x progress and
    t + rate x sigmoid(m) x (1 - t), with m the running mean of the relative fall of the loss, so it moves faster while the student keeps up.

    It needs nothing itself: it changes `logits` where an objective of the stage learns from them, else `pooled`, else `embedding` (the first
    channels of the teacher's, on its own grid), whichever comes first. The loss it watches is its own: KL of the logits, else the mean squared
    error. Taps of the same name change with it. Prompts of a promptable task are then answered from the interpolated embedding too.

    Args:
        start, end, rate, momentum: 0.4, 1, 5e-4 and 0.99 in the paper.
    """

    name, family, paper = "taid", "interpolated_teacher", "TAID: Temporally Adaptive Interpolated Distillation (arXiv 2501.16937)"

    t: Tensor
    last: Tensor
    trend: Tensor

    def __init__(self, start: float = 0.4, end: float = 1.0, rate: float = 5e-4, momentum: float = 0.99) -> None:
        super().__init__()
        if not 0 <= start < end <= 1:
            raise UsageError(f"taid goes from {start} to {end}", where="options of taid", hint="0 <= start < end <= 1")
        self.start, self.end, self.rate, self.momentum = start, end, rate, momentum
        for name, value in (("t", start), ("last", torch.inf), ("trend", 0.0)):
            self.register_buffer(name, torch.tensor(value))

    def bind(self, setup: Setup) -> None:
        """Settles what is interpolated, and refuses shapes that cannot be."""
        needs = {n for ref in setup.stage.objectives for n in points.registry("objective")[ref.name].needs}
        there = [n for n in INTERPOLATED if getattr(setup.ours, n) is not None and getattr(setup.theirs, n) is not None]
        if not there:
            raise UsageError("taid finds no output that student and teacher both give", where=setup.where, hint="add an objective on logits or embedding")
        self.output = next((n for n in there if n in needs), there[-1])
        ours, theirs = setup.ours[self.output], setup.theirs[self.output]
        width = theirs.shape[1] if self.output != "embedding" else min(theirs.shape[1], getattr(setup.teacher, "embed_dim", theirs.shape[1]))
        if ours.shape[1] != width:
            raise UsageError(f"taid mixes the {self.output} of student and teacher, and they have {ours.shape[1]} and {width} channels", where=setup.where,
                             hint="give the student the teacher's width, or leave taid out")

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Outputs:
        """The teacher's outputs with one of them interpolated."""
        ours, theirs = student[self.output].detach().float(), teacher[self.output].float()
        goal = self.mixed(ours, theirs)
        if self.training:
            self.move(self.loss(ours, goal), context)
        changed: dict[str, Any] = {self.output: goal, "taps": {name: goal if name == self.output else tap for name, tap in teacher.taps.items()}}
        return replace(teacher, **changed)

    def mixed(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """The interpolation, in the teacher's shape."""
        if ours.shape[2:] != theirs.shape[2:]:
            ours = F.interpolate(ours, theirs.shape[2:], mode="bilinear", align_corners=False, antialias=True)
        first = ours.shape[1]
        return torch.cat([(1 - self.t) * ours + self.t * theirs[:, :first], theirs[:, first:]], dim=1)

    def loss(self, ours: Tensor, goal: Tensor) -> Tensor:
        """How far the student is from the goal, over the batch."""
        if self.output == "logits":
            return soft_kl(ours, goal).mean()
        return F.mse_loss(*(aligned(ours, goal) if self.output == "embedding" else (ours, goal)))

    @torch.no_grad()
    def move(self, loss: Tensor, context: Context) -> None:
        """Advance t for the next batch, alike in all processes; a loss that is not finite tells nothing."""
        loss = current().mean(loss)
        if not torch.isfinite(loss):
            return
        if torch.isfinite(self.last):
            fall = (self.last - loss) / (self.last + 1e-15)
            self.trend.mul_(self.momentum).add_((1 - self.momentum) * fall)
            planned = self.start + (self.end - self.start) * context.step / context.steps
            self.t.copy_((self.t + self.rate * self.trend.sigmoid() * (1 - self.t)).clamp(min=planned, max=self.end))
        self.last.copy_(loss)


target = TAID
