"""Learned hard views: a small augmentor is trained to find where student and teacher disagree, while the student learns from what it finds.

Nix, Burg, Sinz, "HARD: Hard Augmentations for Robust Distillation" (arXiv 2305.14890), with its simple augmentation model: a learned
distribution over affine transformations and changes of colour, the same for photo and teacher's photo at whatever sizes.
"""
from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.distillation.batches import Batch
from edgekd.distillation.distributed import current
from edgekd.distillation.losses import aligned
from edgekd.distillation.outputs import Setup
from edgekd.distillation.points import Policy
from edgekd.distillation.policies._shared import refuse_cached
from edgekd.distillation.softmax import soft_kl
from edgekd.distillation.taps import outputs
from edgekd.errors import UsageError

NUMBERS = 12
"""Rotation, zoom x and y, shear, shift x and y, then gain and lift of red, green and blue."""
BETAS, EPS = (0.9, 0.999), 1e-8


class Hard(Policy):
    """Numbers of a view: limit * tanh(m + e^s noise). The augmentor climbs d(student(x'), teacher(x')) - fidelity * d(teacher(x'), teacher(x)'),
    where d is the KL of the logits, or of embeddings 1 - cosine, and (.)' moves the embedding as the photo was moved.

    m and s are the augmentor's weights; they have an Adam of their own and are saved with the stage. `fidelity` and the limits are the
    bound: a view that the teacher itself no longer recognises teaches nothing.

    Args:
        every: steps between two of the augmentor's.
        lr: of the augmentor.
        share: of the photos of a batch that are changed.
        degrees, zoom, shift, colour: limits; zoom, shift and colour as shares of 1.
        fidelity: how much the teacher's own change counts against a view.
    """

    name, family, paper = "hard", "data", "HARD: Hard Augmentations for Robust Distillation (arXiv 2305.14890)"
    live = True

    theta: Tensor
    moments: Tensor
    count: Tensor
    limits: Tensor

    def __init__(self, every: int = 4, lr: float = 0.05, share: float = 0.5, degrees: float = 20.0, zoom: float = 0.2, shift: float = 0.15,
                 colour: float = 0.25, fidelity: float = 1.0) -> None:
        super().__init__()
        if every < 1 or lr <= 0 or not 0 < share <= 1:
            raise UsageError(f"hard takes every >= 1, lr > 0 and 0 < share <= 1, not every={every}, lr={lr:g}, share={share:g}")
        self.every, self.lr, self.share, self.fidelity = every, lr, share, fidelity
        self.register_buffer("limits", torch.tensor([math.radians(degrees), zoom, zoom, zoom / 2, shift, shift] + [colour] * 3 + [colour / 4] * 3), persistent=False)
        self.register_buffer("theta", torch.stack([torch.zeros(NUMBERS), torch.full((NUMBERS,), math.log(0.5))]))
        self.register_buffer("moments", torch.zeros(2, 2, NUMBERS))
        self.register_buffer("count", torch.zeros(2, dtype=torch.long))

    def bind(self, setup: Setup) -> None:
        """Hold the models to ask; raises UsageError when they give nothing that can be compared, or the teacher is a cache."""
        refuse_cached(self, setup)
        ours, theirs = ({n: t for n in ("logits", "embedding") if (t := getattr(o, n)) is not None} for o in (setup.ours, setup.theirs))
        comparable(ours, theirs, setup)
        self._held: tuple[Any, Mapping[str, Any]] = (setup.student, dict(setup.teachers))

    def mix(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The batch with views that the augmentor draws; every so often it learns first."""
        with torch.autocast(batch.images.device.type, enabled=False):
            if int(self.count[0]) % self.every == 0:
                self.learn(batch, generator)
            self.count[0] += 1
            with torch.no_grad():
                return self.changed(batch, self.draw(self.theta, len(batch.images), generator))

    def draw(self, theta: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Numbers (count, 12) of views, 0 (no change) for those that are left as they are."""
        noise = torch.randn(count, NUMBERS, generator=generator).to(theta)
        chosen = torch.zeros(count, 1)
        chosen[torch.randperm(count, generator=generator)[: max(1, round(self.share * count))]] = 1
        return self.limits * torch.tanh(theta[0] + theta[1].exp() * noise) * chosen.to(theta)

    def changed(self, batch: Batch, numbers: Tensor) -> Batch:
        """Photos, teacher's photos and labels moved alike; differentiable in `numbers` (B, 12)."""
        student, teachers = self._held
        affine = matrices(numbers)
        labels = moved(batch.labels.float().unsqueeze(1) + 1, affine, "nearest").squeeze(1).detach() - 1
        inside = (labels >= 0).float().unsqueeze(1)

        def seen(images: Tensor, spec: Any) -> Tensor:
            return recoloured(moved(images, affine), numbers[:, 6:], spec) * F.interpolate(inside, images.shape[-2:])

        assert batch.teacher_images is not None
        return replace(batch, images=seen(batch.images, student.preprocess), labels=labels.to(batch.labels.dtype),
                       valid=(F.avg_pool2d(inside, inside.shape[-1] // batch.valid.shape[-1]) > 0.5).float(),
                       teacher_images={name: seen(images, teachers[name].preprocess) for name, images in batch.teacher_images.items()})

    def gain(self, batch: Batch, numbers: Tensor) -> Tensor:
        """What the augmentor climbs: how much the models disagree about the views, less how much the teacher disagrees with itself."""
        student, teachers = self._held
        name, teacher = next(iter(teachers.items()))
        view = self.changed(batch, numbers)
        assert batch.teacher_images is not None and view.teacher_images is not None
        ours, theirs = outputs(student, view.images), outputs(teacher, view.teacher_images[name])
        with torch.no_grad():
            plain = outputs(teacher, batch.teacher_images[name])
        kind = comparable(ours, theirs)
        before = plain[kind] if kind == "logits" else moved(plain[kind].float(), matrices(numbers))
        return (distance(kind, ours[kind], theirs[kind]) - self.fidelity * distance(kind, theirs[kind], before)).mean()

    def learn(self, batch: Batch, generator: torch.Generator) -> None:
        """One step of Adam up the gain; neither model changes."""
        with torch.enable_grad(), still(self._held[0]):
            theta = self.theta.detach().clone().requires_grad_()
            value = self.gain(batch, self.draw(theta, len(batch.images), generator))
            (gradient,) = torch.autograd.grad(-value, theta)
        gradient = current().mean(gradient)
        if not torch.isfinite(gradient).all():
            return
        self.count[1] += 1
        first, second = self.moments
        first.lerp_(gradient, 1 - BETAS[0])
        second.lerp_(gradient.square(), 1 - BETAS[1])
        k = int(self.count[1])
        self.theta -= self.lr * (first / (1 - BETAS[0] ** k)) / ((second / (1 - BETAS[1] ** k)).sqrt() + EPS)


def comparable(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], setup: Setup | None = None) -> str:
    """The output that both models give and that can be compared: logits, else the embedding."""
    if "logits" in ours and "logits" in theirs and ours["logits"].shape[1] == theirs["logits"].shape[1]:
        return "logits"
    if "embedding" in ours and "embedding" in theirs and theirs["embedding"].shape[1] >= ours["embedding"].shape[1]:
        return "embedding"
    raise UsageError("student and teacher give no outputs alike, so their disagreement cannot be measured", where=setup.where if setup else None,
                     hint="take the policy views instead of hard")


def distance(kind: str, ours: Tensor, theirs: Tensor) -> Tensor:
    """(B,): KL(theirs || ours) of logits (B, C), or the mean of 1 - cosine over the cells of embeddings (B, E, s, s)."""
    if kind == "logits":
        return soft_kl(ours, theirs)
    a, b = aligned(ours, theirs)
    return 1 - F.cosine_similarity(a, b, dim=1).mean((1, 2))


def matrices(numbers: Tensor) -> Tensor:
    """(B, >= 6): rotation, zoom x, zoom y, shear, shift x, shift y -> (B, 2, 3), where each point of the view lies in the photo, in -1..1."""
    turn, zoom_x, zoom_y, shear, shift_x, shift_y = numbers[:, :6].unbind(1)
    cos, sin, x, y = turn.cos(), turn.sin(), zoom_x.exp(), zoom_y.exp()
    return torch.stack([cos * x, cos * x * shear - sin * y, shift_x, sin * x, sin * x * shear + cos * y, shift_y], 1).unflatten(1, (2, 3))


def moved(images: Tensor, affine: Tensor, mode: str = "bilinear") -> Tensor:
    """(B, C, h, w) looked up at where `affine` (B, 2, 3) says; 0 outside."""
    grid = F.affine_grid(affine, [len(images), 1, *images.shape[-2:]], align_corners=False)
    return F.grid_sample(images, grid, mode=mode, padding_mode="zeros", align_corners=False)


def recoloured(images: Tensor, numbers: Tensor, spec: Any) -> Tensor:
    """Normalised photos (B, 3, h, w) as if every colour c in 0..255 were c (1 + gain) + 255 lift: numbers (B, 6), three gains and three lifts."""
    mean, std = (torch.tensor(v).to(images)[:, None, None] for v in (spec.mean, spec.std))
    gain, lift = numbers[:, :3, None, None], numbers[:, 3:, None, None]
    return images * (1 + gain) + (mean * gain + 255 * lift) / std


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """In eval mode within the context: looking at a view must not move the statistics of batch norms."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


policy = Hard
