"""The teacher whose features fit the task best, or all of them by how well they fit (DistillNearest and DistillWeighted, arXiv 2304.12314)."""
from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.distillation.ensembles import check_mixable, mixed
from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.distillation.points import Target
from edgekd.errors import UsageError


class TeacherChoice(Target):
    """Similarity e_t of a teacher to the task = linear CKA between its pooled features and the labels, on photos of the first steps; `weighted`
    mixes the teachers by w_t = e_t^power / sum e^power, `nearest` takes the one with the largest e_t. Until `photos` are collected
    all count alike.

    Args:
        by: nearest or weighted.
        power: sharpness of the weights (the paper's p; larger is nearer to nearest).
        photos: labelled photos to judge by.
        probabilities: average softmaxes rather than logits.
    """

    name, family, paper = "teacher_choice", "multi_teacher", "Distilling from Similar Tasks (arXiv 2304.12314)"
    needs = frozenset({"teachers", "classes"})
    labels: Tensor
    count: Tensor

    def __init__(self, by: Literal["nearest", "weighted"] = "weighted", power: float = 12.0, photos: int = 256, probabilities: bool = True) -> None:
        super().__init__()
        if by not in ("nearest", "weighted"):
            raise UsageError(f"teacher_choice: by is nearest or weighted, not '{by}'")
        self.by, self.power, self.photos, self.probabilities = by, power, photos, probabilities

    def bind(self, setup: Setup) -> None:
        """Room for the features of the photos to judge by; of fixed size, so that it is saved with the stage."""
        self.names = check_mixable(setup, "teacher_choice")
        for number, outputs in enumerate(setup.context.teachers.values()):
            self.register_buffer(f"features{number}", torch.zeros(self.photos, pooled(outputs).shape[1]))
        self.register_buffer("labels", torch.zeros(self.photos, dtype=torch.long))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Outputs:
        """-> the teacher's outputs with the mean, or the nearest teacher's, in their place."""
        each = list(context.teachers.values())
        if self.training:
            self.collect(each, context.classes)
        weights = self.weights(len(each))
        return mixed(each, weights.unsqueeze(1).expand(-1, len(each[0][self.names[0]])), self.names, self.probabilities)

    @torch.no_grad()
    def collect(self, each: list[Outputs], classes: Tensor | None) -> None:
        """Keep the labelled photos of a batch until there are enough."""
        start = int(self.count)
        if start == self.photos or classes is None:
            return
        hard = classes.argmax(1) if classes.ndim == 2 else classes
        chosen = (hard >= 0).nonzero().flatten()[: self.photos - start]
        end = start + len(chosen)
        for number, outputs in enumerate(each):
            getattr(self, f"features{number}")[start:end] = pooled(outputs)[chosen]
        self.labels[start:end] = hard[chosen]
        self.count.fill_(end)

    def similarities(self, teachers: int) -> Tensor:
        """(teachers,), each 0..1."""
        return torch.stack([cka(getattr(self, f"features{t}"), F.one_hot(self.labels).float()) for t in range(teachers)])

    def weights(self, teachers: int) -> Tensor:
        """(teachers,) of sum 1."""
        if int(self.count) < self.photos:
            return torch.full((teachers,), 1 / teachers)
        found = self.similarities(teachers)
        if self.by == "nearest":
            return F.one_hot(found.argmax(), teachers).float()
        # by logarithms: e^12 of small similarities would be 0 for all
        return (self.power * found.clamp(min=1e-6).log()).softmax(0)


def pooled(outputs: Outputs) -> Tensor:
    """A teacher's features of photos as vectors (B, D): pooled, else the mean of the embedding, else the logits."""
    if outputs.pooled is not None:
        return outputs.pooled.float()
    return outputs["embedding"].float().mean((2, 3)) if outputs.embedding is not None else outputs["logits"].float()


def cka(x: Tensor, y: Tensor) -> Tensor:
    """Linear centred kernel alignment of x (n, a) and y (n, b), 0..1 (arXiv 1905.00414)."""
    x, y = x - x.mean(0), y - y.mean(0)
    return (y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()).clamp(min=1e-12)


target = TeacherChoice
