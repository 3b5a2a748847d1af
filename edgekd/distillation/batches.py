"""What a distillation step eats: photos in the student's frame, the teacher's cached embedding, and masks that prompts are drawn from.

A photo is decoded once and kept as bytes in memory (up to KEEP_BYTES), so that epochs after the first cost no decoding.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.distillation.cache import TeacherCache
from edgekd.distillation.labelled import draw_masks, to_frame
from edgekd.protocols import Dataset, Preprocess, Sample

KEEP_BYTES = 4_000_000_000


@dataclass(frozen=True)
class Batch:
    """images (B, 3, S, S) normalised, embedding (B, E, t, t) of the teacher, labels (B, F, F) of instances (0 none, -1 padding),
    valid (B, 1, F/4, F/4) 0/1."""

    images: Tensor
    embedding: Tensor
    labels: Tensor
    valid: Tensor

    def masks(self, prompts: int, generator: torch.Generator) -> Tensor:
        """(B * prompts, F, F) bool: instances drawn with replacement."""
        return draw_masks(self.labels, prompts, generator)


class Source:
    """One dataset with its cache; `masks` is the same dataset with instances (its own labels, or the teacher's)."""

    def __init__(self, dataset: Dataset, cache: TeacherCache) -> None:
        self.dataset, self.cache = dataset, cache

    def __len__(self) -> int:
        return len(self.dataset)


class Batches:
    """Batches drawn over several sources: every image once an epoch, in an order seeded by the epoch, so that step k is always the same."""

    def __init__(self, sources: Sequence[Source], spec: Preprocess, batch_size: int, seed: int) -> None:
        self.sources, self.spec, self.seed = list(sources), spec, seed
        self.places = [(s, i) for s in range(len(self.sources)) for i in range(len(self.sources[s]))]
        self.batch_size = min(batch_size, len(self.places))
        self._kept: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
        self._bytes = 0

    def __getitem__(self, step: int) -> Batch:
        per_epoch = len(self.places) // self.batch_size
        epoch, number = divmod(step, per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.places))
        chosen = [self.places[k] for k in order[number * self.batch_size : (number + 1) * self.batch_size]]
        frames = [self._frame(*place) for place in chosen]
        images = torch.stack([self._normalise(f) for f, _ in frames])
        labels = torch.stack([torch.from_numpy(target) for _, target in frames])
        embedding = torch.stack([self.sources[s].cache.embedding(i).float() for s, i in chosen])
        valid = (F.avg_pool2d((labels >= 0).float().unsqueeze(1), 4) > 0.5).float()
        images = images * F.interpolate((labels >= 0).float().unsqueeze(1), images.shape[-2:])  # padding is 0 after normalising
        return Batch(images.contiguous(memory_format=torch.channels_last), embedding, labels, valid)

    def _normalise(self, frame: np.ndarray) -> Tensor:
        mean, std = torch.tensor(self.spec.mean)[:, None, None], torch.tensor(self.spec.std)[:, None, None]
        return (torch.from_numpy(frame).float() - mean) / std

    def _frame(self, source: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(3, S, S) uint8 and (F, F) int16 of one image."""
        key = (source, index)
        if key in self._kept:
            return self._kept[key]
        sample = self.sources[source].dataset[index]
        pixels, target = to_frame(sample.image, label_map(sample), replace(self.spec, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)))
        found = (pixels.numpy().round().clip(0, 255).astype(np.uint8), target.numpy())
        self._bytes += found[0].nbytes + found[1].nbytes
        if self._bytes < KEEP_BYTES:
            self._kept[key] = found
        return found


def label_map(sample: Sample) -> np.ndarray:
    """(H, W) int16: instances numbered from 1, small ones on top of large ones; all 1 without any, so that prompts fall anywhere."""
    if sample.masks is None or not len(sample.masks):
        return np.ones(sample.image.shape[:2], np.int16)
    labels = np.zeros(sample.image.shape[:2], np.int16)
    for i in np.argsort(-sample.masks.sum((1, 2)), kind="stable"):
        labels[sample.masks[i]] = i + 1
    return labels
