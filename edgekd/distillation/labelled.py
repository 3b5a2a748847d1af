"""Labelled scenes as training batches: padded images, instance label maps and the masks drawn from them."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from edgekd.data.images import preprocess
from edgekd.distillation.draws import Draws, Source, pick
from edgekd.protocols import Dataset, Preprocess

FEWEST_PIXELS = 48
"""Fewer make no instance that a prompt is drawn from."""


@dataclass(frozen=True)
class LabelledBatch:
    """images (B, 3, S, S), labels (B, S, S) int (0 nothing, -1 padding), masks (B*P, S, S) bool, valid (B, 1, S/4, S/4) 0/1."""

    images: Tensor
    labels: Tensor
    masks: Tensor
    valid: Tensor


class StepImages(TorchDataset):
    """Image k of a run, for any k: dataset k mod n, a random crop of it, all seeded by (seed, k), so that resuming is exact."""

    def __init__(self, sources: list[Dataset], weights: list[float], spec: Preprocess, seed: int, length: int) -> None:
        self.sources, self.weights, self.spec, self.seed, self.length = sources, np.cumsum(weights) / np.sum(weights), spec, seed, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng([self.seed, k])
        source = self.sources[int(np.searchsorted(self.weights, rng.random(), side="right"))]
        sample = source[int(rng.integers(len(source)))]
        assert sample.masks is not None
        labels = np.zeros(sample.image.shape[:2], np.int16)
        for i, mask in enumerate(sample.masks):
            labels[mask] = i + 1
        return to_frame(*augment(rng, sample.image, labels), self.spec)


def augment(rng: np.random.Generator, image: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mirror, and in half of the cases zoom into 55-100 % of the image: (H, W, 3) uint8 and (H, W) int together."""
    if rng.random() < 0.5:
        image, labels = image[:, ::-1], labels[:, ::-1]
    if rng.random() < 0.5:
        height, width = labels.shape
        h, w = (max(32, int(n * rng.uniform(0.55, 1.0))) for n in (height, width))
        h, w = min(h, height), min(w, width)
        y, x = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
        if labels[y : y + h, x : x + w].any():
            image, labels = image[y : y + h, x : x + w], labels[y : y + h, x : x + w]
    return image, labels


def to_frame(image: np.ndarray, labels: np.ndarray, spec: Preprocess) -> tuple[Tensor, Tensor]:
    """The model's input (3, S, S) and the labels in the prompts' square, (F, F) int16 with -1 in the padding."""
    pixels, frame = preprocess(np.ascontiguousarray(image), spec)
    (height, width), (top, left, seen_height, seen_width) = frame.resized, frame.window
    labels = labels[top:top + seen_height, left:left + seen_width]
    index = Image.fromarray(np.ascontiguousarray(labels).astype(np.int32), mode="I").resize((width, height), Image.Resampling.NEAREST)
    target = np.full((frame.side, frame.side), -1, np.int16)
    target[:height, :width] = np.asarray(index)
    return torch.from_numpy(pixels), torch.from_numpy(target)


def draw_masks(labels: Tensor, prompts: int, generator: Source) -> Tensor:
    """labels (B, S, S) -> masks (B * prompts, S, S) bool: instances drawn with replacement, each instance alike likely."""
    batch, device = len(labels), labels.device
    top = max(int(labels.max()), 1)
    slots = labels.clamp(min=0).flatten(1).long() + torch.arange(batch, device=device)[:, None] * (top + 1)
    present = (torch.bincount(slots.flatten(), minlength=batch * (top + 1)).view(batch, -1)[:, 1:] >= FEWEST_PIXELS).float()
    present[:, 0] += present.sum(1) == 0
    chosen = pick(present, Draws.of(generator).rand(batch, prompts)) + 1
    return (labels[:, None] == chosen[:, :, None, None].to(labels)).reshape(batch * prompts, *labels.shape[1:])


def batches(sources: list[Dataset], weights: list[float], spec: Preprocess, *, batch_size: int, prompts: int, seed: int, first: int,
            last: int, workers: int) -> Iterator[tuple[int, LabelledBatch]]:
    """(step, batch) for steps first..last-1; step k is the same whatever was done before it."""
    images = StepImages(sources, weights, spec, seed, last * batch_size)
    loader = DataLoader(images, batch_size, sampler=range(first * batch_size, last * batch_size), num_workers=workers,
                        prefetch_factor=4 if workers else None, persistent_workers=False)
    for step, (frames, labels) in enumerate(loader, first):
        masks = draw_masks(labels, prompts, torch.Generator().manual_seed(seed * 1_000_003 + step))
        valid = (F.avg_pool2d((labels >= 0).float().unsqueeze(1), 4) > 0.5).float()
        yield step, LabelledBatch(frames, labels, masks, valid)
