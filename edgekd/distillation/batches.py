"""What a distillation step eats: photos in the student's frame, the teachers' cached outputs, and masks that prompts are drawn from.

Photos come in one endless stream, every image once an epoch in an order seeded by the epoch; a batch is a piece of the stream, so that a
step depends on nothing but how many images came before it. A photo is decoded once and kept as bytes in memory (up to KEEP_BYTES).
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.data.images import preprocess
from edgekd.data.order import windowed
from edgekd.distillation.cache import TeacherCache
from edgekd.distillation.draws import Draws
from edgekd.distillation.labelled import draw_masks, to_frame
from edgekd.protocols import Dataset, Preprocess, Sample

if TYPE_CHECKING:
    from edgekd.distillation.points import Policy

KEEP_BYTES = 4_000_000_000
Named = Mapping[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """images (B, 3, S, S) normalised; labels (B, F, F) of instances (0 none, -1 padding); valid (B, 1, F/4, F/4) 0/1; cached: what each
    teacher gave, by its name; teacher_images (B, 3, T, T) of each teacher that is asked live; classes (B,) long, -1 for none, or shares
    (B, C) after mixing; domains (B,) the data set and places (B,) the position of each photo among all."""

    images: Tensor
    labels: Tensor
    valid: Tensor
    cached: Mapping[str, Named]
    domains: Tensor
    places: Tensor
    classes: Tensor | None = None
    teacher_images: Named | None = None

    def masks(self, prompts: int, generator: Draws | torch.Generator) -> Tensor:
        """(B * prompts, F, F) bool: instances drawn with replacement."""
        return draw_masks(self.labels, prompts, generator)


class Source:
    """One dataset with the caches of its teachers, the recipe's own first; the dataset has instances (its own labels, or the teacher's)."""

    def __init__(self, dataset: Dataset, *caches: TeacherCache) -> None:
        self.dataset, self.caches = dataset, caches

    @property
    def cache(self) -> TeacherCache:
        """That of the recipe's own teacher."""
        return self.caches[0]

    def __len__(self) -> int:
        return len(self.dataset)


class Batches:
    """Batches drawn over several sources. `batches.at(seen)` is the batch after `seen` images; `batches[k]` the k-th of equal ones.

    Args:
        spec: the student's preprocessing.
        live: preprocessing of every teacher that is asked live, by its name; nothing is read from its cache then.
        policies: of the stage; their views are drawn per image and epoch.
        window: photos that are shuffled together (`data.order`); None: all of an epoch.
    """

    def __init__(self, sources: Sequence[Source], spec: Preprocess, batch_size: int, seed: int, *, live: Mapping[str, Preprocess] | None = None,
                 policies: Sequence[Policy] = (), window: int | None = None) -> None:
        self.sources, self.spec, self.seed, self.live, self.policies = list(sources), spec, seed, dict(live or {}), list(policies)
        self.window = window
        self.places = [(s, i) for s in range(len(self.sources)) for i in range(len(self.sources[s]))]
        self.domains = np.array([s for s, _ in self.places])
        self.batch_size = min(batch_size, len(self.places))
        self._kept: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
        self._bytes = 0
        self._orders: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        """Images of an epoch."""
        return len(self.places)

    def __getitem__(self, step: int) -> Batch:
        return self.at(step * self.batch_size)

    def at(self, seen: int) -> Batch:
        """The batch after `seen` images of the stream."""
        return self.batch(range(seen, seen + self.batch_size))

    def batch(self, numbers: Sequence[int]) -> Batch:
        """The images of these numbers in the stream."""
        chosen = [self.place(n) for n in numbers]
        frames = [self._frame(place, n) for place, n in zip(chosen, numbers, strict=True)]
        images = torch.stack([self._normalise(f[0]) for f in frames])
        labels = torch.stack([torch.from_numpy(f[1]) for f in frames])
        inside = (labels >= 0).float().unsqueeze(1)
        images = images * F.interpolate(inside, images.shape[-2:])  # padding is 0 after normalising
        valid = (F.avg_pool2d(inside, 4) > 0.5).float()
        at = [self.places[p] for p in chosen]
        cached: dict[str, dict[str, Tensor]] = {}
        if not self.live:
            for t, cache in enumerate(self.sources[0].caches):
                rows = [self.sources[s].caches[t].outputs(i) for s, i in at]
                cached[cache.teacher] = {name: torch.stack([row[name].float() for row in rows]) for name in rows[0]}
        classes = [self._class(place) for place in at]
        return Batch(images.contiguous(memory_format=torch.channels_last), labels, valid, cached, torch.from_numpy(self.domains[chosen]), torch.tensor(chosen),
                     torch.tensor(classes) if any(c >= 0 for c in classes) else None,
                     {name: torch.stack([f[2][name] for f in frames]) for name in self.live} if self.live else None)

    def place(self, number: int) -> int:
        """The position among all images of the stream's `number`-th."""
        epoch, at = divmod(number, len(self.places))
        return int(self._order(epoch)[at])

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            rng, n = np.random.default_rng([self.seed, epoch]), len(self.places)
            found = [w for p in self.policies if (w := p.weights(n, self.domains, epoch)) is not None]
            share = np.prod(found, axis=0) if found else None
            drawn = windowed(n, self.window, rng) if self.window else rng.permutation(n)
            self._orders = {epoch: drawn if share is None else rng.choice(n, n, p=share / share.sum())}
        return self._orders[epoch]

    def _class(self, place: tuple[int, int]) -> int:
        classes = getattr(self.sources[place[0]].dataset, "classes_of", None)
        found = classes(place[1]) if classes is not None else None
        return -1 if found is None else found

    def _normalise(self, frame: np.ndarray) -> Tensor:
        mean, std = torch.tensor(self.spec.mean)[:, None, None], torch.tensor(self.spec.std)[:, None, None]
        return (torch.from_numpy(frame).float() - mean) / std

    def _frame(self, place: int, number: int) -> tuple[np.ndarray, np.ndarray, dict[str, Tensor]]:
        """(3, S, S) uint8 and (F, F) int16 of one image, and its input for every live teacher."""
        key = self.places[place]
        if key in self._kept:
            return *self._kept[key], {}
        sample = self.sources[key[0]].dataset[key[1]]
        if self.live:
            rng = np.random.default_rng([self.seed, 1, number])
            for policy in self.policies:
                sample = policy.view(sample, rng)
            return *self._shrunk(sample), {name: torch.from_numpy(preprocess(sample.image, spec)[0]) for name, spec in self.live.items()}
        found = self._shrunk(sample)
        self._bytes += found[0].nbytes + found[1].nbytes
        if self._bytes < KEEP_BYTES:
            self._kept[key] = found
        return *found, {}

    def _shrunk(self, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        pixels, target = to_frame(sample.image, label_map(sample), replace(self.spec, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)))
        return pixels.numpy().round().clip(0, 255).astype(np.uint8), target.numpy()


def label_map(sample: Sample) -> np.ndarray:
    """(H, W) int16: instances numbered from 1, small ones on top of large ones; all 1 without any, so that prompts fall anywhere."""
    if sample.masks is None or not len(sample.masks):
        return np.ones(sample.image.shape[:2], np.int16)
    labels = np.zeros(sample.image.shape[:2], np.int16)
    for i in np.argsort(-sample.masks.sum((1, 2)), kind="stable"):
        labels[sample.masks[i]] = i + 1
    return labels


