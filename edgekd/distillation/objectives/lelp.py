"""Pseudo-subclasses for tasks of few classes: where in its class's cloud of teacher features a photo lies (LELP, arXiv 2409.20449)."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.distillation.distributed import current
from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.distillation.points import Objective
from edgekd.distillation.softmax import exact, same_classes, soft_kl, target_class
from edgekd.distillation.vectors import teacher_vectors


class LELP(Objective):
    """KL over classes and pseudo-subclasses, which are directions in the teacher's features of each class.

    T^2 KL between teacher's and student's distribution over C x S subclasses: T^2 (KL over the classes + sum_c p_c KL over the subclasses of c).

    The teacher's subclasses of c are a softmax over S directions: the first S principal components of its `pooled` among the photos of
    class c, without what its own classifier reads, turned at random so that none is stronger. They are found once, from the first photos of
    the stage; until then only the classes are learned. The student's own head gives the classes and a second one on `pooled` the
    subclasses within each, where the paper has one wide head: so the head that is exported is trained, and nothing has to be summed.

    Args:
        subclasses: S.
        photos: how many are looked at for the directions, at most those of the first quarter of the stage.
        labels: a photo counts for the data's class where it has one; false (or a photo without): for the teacher's best.
    """

    name, family, paper = "lelp", "logit", "Linear Projections of Teacher Embeddings for Few-Class Distillation (arXiv 2409.20449)"
    needs = frozenset({"logits", "pooled"})
    least_at_teacher = False

    seen: Tensor
    classes: Tensor
    filled: Tensor
    ready: Tensor
    read: Tensor
    centres: Tensor
    directions: Tensor

    def __init__(self, subclasses: int = 4, photos: int = 512, temperature: float = 1.0, labels: bool = True) -> None:
        super().__init__()
        self.subclasses, self.photos, self.temperature, self.labels = subclasses, photos, temperature, labels

    def bind(self, setup: Setup) -> None:
        """Makes the second head, and room for features and directions."""
        count, width = same_classes(setup, self.name), setup.theirs["pooled"].shape[1]
        room = max(2, min(self.photos, setup.stage.steps * setup.stage.accumulate * setup.stage.batch_size // 4))
        self.head = nn.Linear(setup.ours["pooled"].shape[1], count * self.subclasses)
        weights = teacher_vectors(setup.teacher, width, count)
        self.register_buffer("read", torch.zeros(width, 0) if weights is None or count >= width else span(weights.float()))
        for name, value in (("seen", torch.zeros(room, width)), ("classes", torch.zeros(room, dtype=torch.long)), ("filled", torch.tensor(0)),
                            ("ready", torch.tensor(False)), ("centres", torch.zeros(count, width)),
                            ("directions", torch.zeros(count, self.subclasses, width))):
            self.register_buffer(name, value)

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """logits (B, C), pooled (B, D) -> (B,)."""
        t, theirs = self.temperature, teacher["logits"].float()
        loss = soft_kl(student["logits"], theirs, t)
        within = self.head(student["pooled"]).float().unflatten(1, (-1, self.subclasses))
        if self.training and not self.ready:
            self.remember(teacher["pooled"], target_class(context, theirs, self.labels))
            if self.filled == len(self.seen) or context.step >= context.steps / 4:
                self.find()
        if not self.ready:
            return loss + 0 * within.sum((1, 2))
        share = (theirs / t).softmax(1)
        return loss + t**2 * (share * soft_kl(within, self.subclass_logits(teacher["pooled"]))).sum(1)

    def subclass_logits(self, features: Tensor) -> Tensor:
        """The teacher's features (B, D) along the directions of every class -> (B, C, S)."""
        with exact(features):
            return torch.einsum("bcd,csd->bcs", features.float().unsqueeze(1) - self.centres, self.directions)

    @torch.no_grad()
    def remember(self, features: Tensor, classes: Tensor) -> None:
        """Keep what there is room for of features (B, D) and their classes (B,), of all processes."""
        features, classes = current().cat(features), current().cat(classes)
        at = int(self.filled)
        end = min(at + len(features), len(self.seen))
        self.seen[at:end], self.classes[at:end] = features[: end - at].float(), classes[: end - at]
        self.filled.fill_(end)

    @torch.no_grad()
    def find(self) -> None:
        """Centres and directions of every class; a class with too few photos takes the directions of all classes together."""
        features, classes = self.seen[: int(self.filled)], self.classes[: int(self.filled)]
        with exact(features):
            unread = features - features @ self.read @ self.read.T
            counts = F.one_hot(classes, len(self.centres)).float()
            self.centres.copy_(counts.T @ features / counts.sum(0).clamp(min=1).unsqueeze(1))
            middle = counts.T @ unread / counts.sum(0).clamp(min=1).unsqueeze(1)
            apart = unread - middle[classes]
            together = spread(apart, self.subclasses)
            for c in range(len(self.centres)):
                own = apart[classes == c]
                self.directions[c] = spread(own, self.subclasses) if len(own) > 2 * self.subclasses else together
        self.ready.fill_(True)


def spread(apart: Tensor, count: int) -> Tensor:
    """Directions (S, D) along which centred vectors (n, D) vary most, turned at random and scaled so that projections have variance 1 on average."""
    _, sizes, axes = torch.linalg.svd(apart, full_matrices=False)
    sizes, axes = sizes[:count], axes[:count]
    turn = torch.linalg.qr(torch.randn(count, count, generator=torch.Generator().manual_seed(0)))[0].to(apart)[:, : len(axes)]
    size = float((sizes.square().sum() / (max(len(apart), 1) * count)).sqrt())
    return turn @ axes / size if size > 1e-6 else torch.zeros(count, apart.shape[1]).to(apart)


def span(rows: Tensor) -> Tensor:
    """An orthonormal basis (D, R) of what the rows (R, D) span, as columns; 0 in the place of those that depend on others."""
    _, sizes, axes = torch.linalg.svd(rows, full_matrices=False)
    return axes.T * (sizes > 1e-5 * sizes.max())


objective = LELP
