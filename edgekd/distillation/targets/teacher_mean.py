"""Several teachers speak with one voice: the student copies the mean of what they give (arXiv 1503.02531, sec. 5; by confidence, arXiv 2201.00007).

With a final weight it is also the anchor of recursive distillation (seed "Recursive meta-distillation"): a share of the base teacher that
stays beside the last generation keeps repeated distillation from drifting away.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.distillation.ensembles import check_mixable, mixed
from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.distillation.points import Target
from edgekd.errors import UsageError


class TeacherMean(Target):
    """sum_t w_t x teacher_t, of the logits' softmaxes, embeddings and pooled vectors that all teachers have in one shape. The weights are the
    recipe's, or by confidence: photo by photo w_t = (1 - softmax_t(CE_t)) / (T - 1) with CE_t of teacher t's logits and the label, the
    entropy of its softmax where a photo has no label.

    Args:
        weights: of the teachers in the recipe's order, brought to sum 1; none: all alike.
        final_weights: those at the end of the stage; the weights go there in a straight line.
        confidence: weigh by confidence instead; needs logits.
        probabilities: average softmaxes rather than logits.
    """

    name, family, paper = "teacher_mean", "multi_teacher", "Distilling the Knowledge in a Neural Network (arXiv 1503.02531), CA-MKD (arXiv 2201.00007)"
    needs = frozenset({"teachers"})

    def __init__(self, weights: Sequence[float] = (), final_weights: Sequence[float] = (), confidence: bool = False, probabilities: bool = True) -> None:
        super().__init__()
        if any(w < 0 for w in (*weights, *final_weights)) or any(ws and not sum(ws) > 0 for ws in (weights, final_weights)):
            raise UsageError("teacher_mean: weights are 0 or more, and not all 0", hint="leave them out to count all teachers alike")
        self.weights, self.final, self.confidence, self.probabilities = list(weights), list(final_weights), confidence, probabilities

    def bind(self, setup: Setup) -> None:
        """Settle what is averaged."""
        self.names = check_mixable(setup, "teacher_mean")
        count = len(setup.context.teachers)
        for given in (self.weights, self.final):
            if given and len(given) != count:
                raise UsageError(f"teacher_mean has {len(given)} weights for {count} teachers ({', '.join(setup.context.teachers)})", where=setup.where,
                                 hint="give one weight a teacher, in the recipe's order")
        if self.confidence and "logits" not in self.names:
            raise UsageError("teacher_mean: confidence is read from logits, and these teachers have none in common", where=setup.where,
                             hint="give weights instead")

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Outputs:
        """-> the teacher's outputs with the means in their place."""
        each = list(context.teachers.values())
        return mixed(each, self.shares(each, context), self.names, self.probabilities)

    def shares(self, each: Sequence[Outputs], context: Context) -> Tensor:
        """(teachers, B), columns of sum 1."""
        batch = len(each[0][self.names[0]])
        if self.confidence:
            losses = torch.stack([doubt(o["logits"], context.classes) for o in each])
            return (1 - losses.softmax(0)) / (len(each) - 1)
        start = torch.tensor(self.weights or [1.0] * len(each))
        end = torch.tensor(self.final) if self.final else start
        found = torch.lerp(start / start.sum(), end / end.sum(), context.progress)
        return found.unsqueeze(1).expand(-1, batch)


def doubt(logits: Tensor, classes: Tensor | None) -> Tensor:
    """How unsure (B,) logits (B, C) are: cross-entropy with the label, the entropy where there is none (classes -1)."""
    log = logits.float().log_softmax(-1)
    entropy = -(log.exp() * log).sum(-1)
    if classes is None:
        return entropy
    if classes.ndim == 2:
        return -(classes.float() * log).sum(-1)
    return torch.where(classes >= 0, F.nll_loss(log, classes.clamp(min=0), reduction="none"), entropy)


target = TeacherMean
