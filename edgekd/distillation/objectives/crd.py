"""Contrast: the student's vector of a photo is nearer to the teacher's of the same photo than to those of others (CRD, arXiv 1910.10699)."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.distillation.distributed import current
from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.distillation.points import Objective
from edgekd.distillation.relations import check_batch, own_channels, photo_vector
from edgekd.distillation.softmax import exact


class CRD(Objective):
    """InfoNCE between student's and teacher's vector of a photo, other photos (and a queue) as negatives.

    InfoNCE in both directions, averaged: -log of the softmax, over the photos of the batch (and of the queue), of cos / temperature at the photo
    itself, between linear projections of student and teacher.

    CRD itself samples thousands of negatives from a memory of all photos and estimates the same bound by NCE; a `queue` of the teacher's latest
    vectors comes near to that for small batches. Another copy of the same photo is never a negative.

    Args:
        dim: of the projections.
        queue: vectors of the teacher's that are kept as further negatives.
    """

    name, family, paper = "crd", "contrastive", "Contrastive Representation Distillation (arXiv 1910.10699)"
    needs = frozenset({"feats"})
    default_taps = "embedding"
    least_at_teacher = False
    min_batch = 2

    kept: Tensor
    kept_places: Tensor
    at: Tensor

    def __init__(self, dim: int = 128, temperature: float = 0.07, queue: int = 0) -> None:
        super().__init__()
        self.dim, self.temperature, self.queue = dim, temperature, queue

    def bind(self, setup: Setup) -> None:
        """Makes both projections and the queue, for the first tap."""
        check_batch(setup, self.name, self.min_batch)
        self.channels = own_channels(setup)[0]
        self.ours, self.theirs = nn.Linear(setup.ours.feats[0].shape[1], self.dim), nn.Linear(self.channels, self.dim)
        self.register_buffer("kept", torch.zeros(self.queue, self.channels))
        self.register_buffer("kept_places", torch.full((self.queue,), -1))
        self.register_buffer("at", torch.tensor(0))

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """feats (B, C, h, w) or (B, D), of the first tap -> (B,)."""
        s, t = photo_vector(student.feats[0], context), photo_vector(teacher.feats[0][:, : self.channels], context)
        places = torch.arange(len(s), device=s.device) if context.places is None else context.places
        known = self.kept_places >= 0 if context.places is not None else torch.zeros_like(self.kept_places, dtype=torch.bool)
        a = F.normalize(self.ours(s).float(), dim=1)
        b = F.normalize(self.theirs(torch.cat([t, self.kept[known]])).float(), dim=1)
        with exact(a):
            near = a @ b.T / self.temperature
        same = places.unsqueeze(1) == torch.cat([places, self.kept_places[known]])
        same &= ~torch.eye(*same.shape, dtype=torch.bool, device=same.device)
        near = near.masked_fill(same, -1e4)
        target, back = torch.arange(len(s), device=s.device), near[:, : len(s)].T
        if self.training and self.queue and context.places is not None:
            self.keep(t, places)
        return (F.cross_entropy(near, target, reduction="none") + F.cross_entropy(back, target, reduction="none")) / 2

    @torch.no_grad()
    def keep(self, vectors: Tensor, places: Tensor) -> None:
        """Put the teacher's vectors (B, D) of these photos into the queue in place of the oldest, those of all processes."""
        vectors, places = current().cat(vectors), current().cat(places)
        count = min(len(vectors), self.queue)
        where = (self.at + torch.arange(count, device=vectors.device)) % self.queue
        self.kept[where], self.kept_places[where] = vectors[:count], places[:count]
        self.at.copy_((self.at + count) % self.queue)


objective = CRD
