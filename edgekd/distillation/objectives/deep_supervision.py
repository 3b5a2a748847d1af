"""The student's earlier stages learn from its last one, through heads that are thrown away (Be Your Own Teacher, arXiv 1905.08094)."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.distillation.copies import map_error, towards
from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.distillation.points import Objective
from edgekd.distillation.softmax import label_loss
from edgekd.errors import UsageError


class Bottleneck(nn.Module):
    """A map (B, C, h, w) to the shape of the embedding (B, E, s, s); where the student has logits, those too."""

    def __init__(self, channels: int, out: int, side: tuple[int, int], classes: int) -> None:
        super().__init__()
        self.side = side
        self.body = nn.Sequential(nn.Conv2d(channels, out, 1, bias=False), nn.GroupNorm(1, out), nn.GELU(), nn.Conv2d(out, out, 3, padding=1))
        self.classes = nn.Linear(out, classes) if classes else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """-> embedding, logits (B, classes)."""
        x = self.body(F.adaptive_avg_pool2d(x, self.side))
        return x, None if self.classes is None else self.classes(x.mean((2, 3)))


class DeepSupervision(Objective):
    """Mean over the earlier stages of  feature x MSE(head(stage), embedding) + soft x T^2 KL(logits || head's logits) + hard x CE(label, head's
    logits); the last stage's embedding and logits get no gradient. The logit terms are there where the student has logits, the last one
    where the batch has labels.

    Args:
        feature: weight of the embedding's error.
        soft: weight of the divergence from the student's own logits.
        hard: weight of the labels.
        temperature: of both softmaxes (the paper: 3).
    """

    name, family, paper = "deep_supervision", "self_distillation", "Be Your Own Teacher (arXiv 1905.08094)"
    needs = frozenset({"feats", "embedding"})
    default_taps = "student"
    asks_teacher = False
    least_at_teacher = False

    def __init__(self, feature: float = 1.0, soft: float = 1.0, hard: float = 0.0, temperature: float = 3.0) -> None:
        super().__init__()
        self.feature, self.soft, self.hard, self.temperature = feature, soft, hard, temperature

    def bind(self, setup: Setup) -> None:
        """A head for each stage before the last."""
        if len(setup.ours.feats) < 2:
            raise UsageError("deep_supervision needs an earlier stage to teach, and the student has one stage only", where=setup.where,
                             hint="name further taps under 'taps', the last of them the deepest")
        deepest = setup.ours["embedding"]
        classes = 0 if setup.ours.logits is None else setup.ours.logits.shape[1]
        side = (deepest.shape[-2], deepest.shape[-1])
        self.heads = nn.ModuleList(Bottleneck(f.shape[1], deepest.shape[1], side, classes) for f in setup.ours.feats[:-1])

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """feats: maps (B, C, h, w) of the student's stages, the deepest last -> (B,)."""
        losses = []
        for head, early in zip(self.heads, student.feats[:-1], strict=True):
            embedding, logits = head(early.float())
            loss = self.feature * map_error(embedding, student["embedding"], context.valid)
            if logits is not None:
                loss = loss + self.soft * towards(logits, student["logits"], self.temperature)
                if self.hard:
                    loss = loss + self.hard * label_loss(logits, context)
            losses.append(loss)
        return torch.stack(losses).mean(0)


objective = DeepSupervision
