"""TED: filters choose what of a layer the task needs before layers are compared (Liang et al., arXiv 2210.01351).

A layer holds more than the task asks for, and a small student has no room for the rest. First the filters of both networks are trained alone,
so that the task's output can be read off what they let through; then the student learns to let through what the teacher does.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from edgekd.distillation.losses import over_photo
from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.distillation.points import Objective
from edgekd.distillation.projectors import maps, pairs_of, photo_mean, resampled
from edgekd.distillation.softmax import soft_kl
from edgekd.errors import UsageError


def task_filter(channels: int, width: int) -> nn.Module:
    """(B, channels, h, w) -> (B, width, h, w)."""
    return nn.Sequential(nn.Conv2d(channels, width, 1), nn.GELU(), nn.Conv2d(width, width, 1))


class TED(Objective):
    """While `progress` < `alone`: the loss with which filters, through a linear head each, predict the teacher's output; networks untouched. After
    that: mean of (student's filter - teacher's filter)^2 at every stage, the teacher's filters fixed.

    Args:
        alone: share of the stage in which only the filters learn.
        output: what they must keep: embedding or logits.
        width: channels that a filter lets through.
    """

    name, family, paper = "ted", "feature", "Less is More: Task-aware Layer-wise Distillation (arXiv 2210.01351)"
    needs = frozenset({"feats", "embedding"})
    default_taps = "stages"
    least_at_teacher = False

    def __init__(self, alone: float = 0.2, output: str = "embedding", width: int = 64) -> None:
        super().__init__()
        if output not in ("embedding", "logits"):
            raise UsageError(f"objective 'ted' knows no output '{output}'", where="options", hint="outputs: embedding, logits")
        self.alone, self.output, self.width = alone, output, width
        self.needs = frozenset({"feats", output})  # type: ignore[misc]

    def bind(self, setup: Setup) -> None:
        """A filter and a head for each side of each pair."""
        self.pairs = pairs_of(setup, self.name)
        self.wanted = getattr(setup.teacher, "embed_dim", None) if self.output == "embedding" else None
        out = self.wanted or setup.theirs[self.output].shape[1]
        self.ours, self.theirs = (nn.ModuleList(task_filter(side[0], self.width) for side in sides)
                                  for sides in ([p.ours for p in self.pairs], [p.theirs for p in self.pairs]))
        self.our_heads, self.their_heads = (nn.ModuleList(nn.Conv2d(self.width, out, 1) for _ in self.pairs) for _ in range(2))

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """feats (B, C, h, w) of both and the teacher's output -> (B,)."""
        found = []
        for i, (ours, theirs) in enumerate(maps(student, teacher, self.pairs)):
            if context.progress < self.alone:
                kept = [(self.our_heads[i], self.ours[i](ours.detach())), (self.their_heads[i], self.theirs[i](theirs))]
                found.append(torch.stack([self.task_loss(head(x).float(), teacher, context) for head, x in kept]).mean(0))
            else:
                with torch.no_grad():
                    goal = self.theirs[i](theirs).float()
                found.append(over_photo((self.ours[i](ours).float() - goal).square(), context.valid))
        return torch.stack(found).mean(0)

    def task_loss(self, answer: Tensor, teacher: Outputs, context: Context) -> Tensor:
        """How far `answer` (B, out, h, w) is from the teacher's output -> (B,): squared error of maps, KL divergence of classes."""
        if self.output == "logits":
            return soft_kl(photo_mean(answer, context.valid), teacher["logits"])
        wanted = teacher["embedding"][:, : answer.shape[1]].float()
        return over_photo((resampled(answer, wanted.shape[-2:]) - wanted).square(), context.valid)


objective = TED
