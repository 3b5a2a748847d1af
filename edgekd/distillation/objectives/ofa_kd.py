"""One for all: the student's stages are led into the space of logits, where networks of any kind speak alike (Hao et al., arXiv 2310.19444)."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.distillation.points import Objective
from edgekd.distillation.projectors import photo_mean
from edgekd.errors import UsageError


def ofa_loss(ours: Tensor, theirs: Tensor, target: Tensor, gamma: float, temperature: float = 1.0) -> Tensor:
    """-sum over classes of ((p_t + 1[target])^gamma - 1[target]) log p_s: logits (B, C), target (B, C) one-hot -> (B,)."""
    weight = (theirs.div(temperature).softmax(1) + target).pow(gamma) - target
    return -(weight * ours.div(temperature).log_softmax(1)).sum(1)


def targets(theirs: Tensor, classes: Tensor | None) -> Tensor:
    """One-hot (B, C): the photo's class (of shares the largest), the teacher's own answer where it has none."""
    chosen = theirs.argmax(1)
    if classes is not None:
        labels = classes.argmax(1) if classes.ndim == 2 else classes
        chosen = torch.where(labels >= 0, labels, chosen)
    return nn.functional.one_hot(chosen, theirs.shape[1]).to(theirs)


class OFAKD(Objective):
    """Mean over stages of the OFA loss -sum ((p_t + 1[y])^gamma - 1[y]) log p_s, each stage's p_s from an exit head, and the same of the student's
    own logits. gamma > 1 lifts the target class the more, the surer the teacher is. Without labels y is the teacher's answer.

    Args:
        gamma: the exponent.
        temperature: of both softmaxes.
        width: of the exit heads.
        final: whether the student's own logits count as a stage.
    """

    name, family, paper = "ofa_kd", "feature", "One-for-All: Bridge the Gap Between Heterogeneous Architectures (arXiv 2310.19444)"
    needs = frozenset({"feats", "logits"})
    default_taps = "student"
    least_at_teacher = False

    def __init__(self, gamma: float = 1.5, temperature: float = 1.0, width: int = 128, final: bool = True) -> None:
        super().__init__()
        self.gamma, self.temperature, self.width, self.final = gamma, temperature, width, final

    def bind(self, setup: Setup) -> None:
        """An exit head a stage: 1x1 convolution, mean over the photo, linear."""
        wrong = next((f for f in setup.ours.feats if f.ndim != 4), None)
        if wrong is not None:
            raise UsageError(f"objective 'ofa_kd' reads maps (B, C, h, w), and a tap of the student gives {tuple(wrong.shape)}", where=setup.where, hint="tap blocks")
        ours, theirs = setup.ours["logits"].shape[1], setup.theirs["logits"].shape[1]
        if ours != theirs:
            raise UsageError(f"the student has {ours} classes and the teacher {theirs}", where=setup.where, hint="give the student the teacher's classes")
        self.inputs = nn.ModuleList(nn.Sequential(nn.Conv2d(f.shape[1], self.width, 1), nn.GELU()) for f in setup.ours.feats)
        self.exits = nn.ModuleList(nn.Linear(self.width, theirs) for _ in setup.ours.feats)

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """feats (B, C, h, w) of the student, logits (B, C) of both -> (B,)."""
        theirs = teacher["logits"].float()
        target = targets(theirs, context.classes)
        answers = [leave(photo_mean(enter(f).float(), context.valid)) for enter, leave, f in zip(self.inputs, self.exits, student.feats, strict=True)]
        answers += [student["logits"]] if self.final else []
        return torch.stack([ofa_loss(a.float(), theirs, target, self.gamma, self.temperature) for a in answers]).mean(0)


objective = OFAKD
