"""Softened logits: divergences between student and teacher, the class that a photo counts as, and the logits of all other classes.

What the objectives on logits share. Everything is float32, whatever precision the step runs in, and a loss is one number a photo.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.distillation.outputs import Context, Setup
from edgekd.errors import UsageError

ABSENT_LOGIT = -1e4
"""Of what must have no share: infinity would make 0 * inf of it."""


def exact(like: Tensor) -> torch.autocast:
    """A context in which products of float32 matrices are float32: autocast would round similarities and distances to bfloat16."""
    return torch.autocast(like.device.type, enabled=False)


def same_classes(setup: Setup, name: str) -> int:
    """The number of classes that student and teacher both tell apart.

    Raises:
        UsageError: they give different numbers of logits, or fewer than two.
    """
    ours, theirs = setup.ours["logits"].shape[1], setup.theirs["logits"].shape[1]
    if ours != theirs:
        raise UsageError(f"objective '{name}' compares logits, and the student has {ours} of them, the teacher {theirs}", where=setup.where,
                         hint="give the student a head of the teacher's classes, or take an objective on 'pooled' or 'embedding'")
    return enough_classes(setup, name)


def enough_classes(setup: Setup, name: str) -> int:
    """The student's number of classes; raises UsageError for fewer than two."""
    count = setup.ours["logits"].shape[1]
    if count < 2:
        raise UsageError(f"objective '{name}' compares classes, and the student tells {count} apart", where=setup.where,
                         hint="a yes-or-no classifier needs two logits")
    return count


def soft_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0, there: Tensor | None = None) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) over the last axis: logits (..., C), (..., C) -> (...); of those alone that are `there`
    (..., C) bool."""
    logits = [x.float() / temperature for x in (student, teacher)]
    ours, theirs = ((x if there is None else x.masked_fill(~there, ABSENT_LOGIT)).log_softmax(-1) for x in logits)
    return temperature**2 * F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Of softmax(logits / T), in nats: (..., C) -> (...)."""
    log_p = (logits.float() / temperature).log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def labels_of(context: Context, classes: int) -> tuple[Tensor, Tensor] | None:
    """The data's own class of each photo, (B,) long, and which photos have one, (B,) bool; None where no photo of the batch has.

    Of shares (B, C) the largest counts.

    Raises:
        UsageError: the data has classes that the model does not tell apart.
    """
    given = context.classes
    if given is None:
        return None
    known = (given >= 0).all(1) & (given.sum(1) > 0) if given.ndim == 2 else given >= 0
    hard = given.argmax(1) if given.ndim == 2 else given
    if (given.ndim == 2 and given.shape[1] != classes) or int(hard.max()) >= classes:
        most = given.shape[1] if given.ndim == 2 else int(hard.max()) + 1
        raise UsageError(f"the data has classes up to number {most - 1}, and the model tells {classes} apart", where="classes of the photos",
                         hint="give folders of the model's own classes, or learn from the teacher alone (kd; or the option labels: false)")
    return hard.clamp(min=0), known


def target_class(context: Context, logits: Tensor, labels: bool = True) -> Tensor:
    """The class that each photo counts as, (B,) long: the data's where it says one and `labels` lets it, else the teacher's best of `logits` (B, C)."""
    best, given = logits.argmax(1), labels_of(context, logits.shape[1]) if labels else None
    return best if given is None else torch.where(given[1], given[0], best)


def without(logits: Tensor, classes: Tensor) -> Tensor:
    """The logits of all classes but one: (B, C), (B,) long -> (B, C - 1), in their order."""
    kept = torch.ones_like(logits, dtype=torch.bool).scatter_(1, classes.unsqueeze(1), False)
    return logits[kept].unflatten(0, (len(logits), -1))


def one_against_rest(logits: Tensor, classes: Tensor) -> Tensor:
    """Log-probabilities of the class and of all others together: logits (B, C), classes (B,) long -> (B, 2)."""
    log_p = logits.log_softmax(1)
    return torch.stack([log_p.gather(1, classes.unsqueeze(1)).squeeze(1), without(log_p, classes).logsumexp(1)], dim=1)


def label_loss(logits: Tensor, context: Context, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with the data's classes or shares of classes, 0 where a photo has none: logits (B, C) -> (B,).

    `smoothing` of each label is spread over all classes alike.
    """
    logits = logits.float()
    given, classes = labels_of(context, logits.shape[1]), context.classes
    if given is None or classes is None:
        return logits.sum(1) * 0
    y = classes.float() if classes.ndim == 2 else F.one_hot(given[0], logits.shape[1]).float()
    y = (1 - smoothing) * y + smoothing / logits.shape[1]
    return torch.where(given[1], -(y * logits.log_softmax(1)).sum(1), 0.0)
