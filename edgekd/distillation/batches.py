"""What a distillation step eats: photos in the student's frame, the teachers' cached outputs, and masks that prompts are drawn from.

Photos come in one endless stream, every image once an epoch in an order seeded by the epoch; a batch is a piece of the stream, so that a
step depends on nothing but how many images came before it. A photo and what the teachers gave for it are decoded once and kept in memory
(up to KEEP_BYTES); `Ahead` makes the next batch while a step runs.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from edgekd.data.images import preprocess
from edgekd.data.order import windowed
from edgekd.distillation.cache import TeacherCache
from edgekd.distillation.clicks import cells
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


@dataclass(frozen=True)
class Frame:
    """A photo in the student's frame, as it is kept: pixels (S, S, 3) and labels (F, F), `inside` (F/4, F/4) float 0/1 where the photo is, its
    height and width in the S frame; inputs of live teachers, outputs of cached ones by their names."""

    pixels: Tensor
    labels: Tensor
    inside: Tensor
    size: tuple[int, int]
    live: Named
    cached: Mapping[str, Named]

    @property
    def nbytes(self) -> int:
        """In memory."""
        tensors = [self.pixels, self.labels, self.inside, *(t for named in self.cached.values() for t in named.values())]
        return sum(t.nbytes for t in tensors)


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
        self._kept: dict[int, Frame] = {}
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
        frames = [self._kept.get(place) or self._frame(place, n) for place, n in zip(chosen, numbers, strict=True)]
        classes = [self._class(self.places[p]) for p in chosen]
        cached = {teacher: {name: torch.stack([f.cached[teacher][name].float() for f in frames]) for name in named}
                  for teacher, named in frames[0].cached.items()}
        return Batch(self._images(frames), torch.stack([f.labels for f in frames]), torch.stack([f.inside for f in frames]).unsqueeze(1), cached,
                     torch.from_numpy(self.domains[chosen]), torch.tensor(chosen), torch.tensor(classes) if any(c >= 0 for c in classes) else None,
                     {name: torch.stack([f.live[name] for f in frames]) for name in self.live} if self.live else None)

    def settled(self, numbers: Sequence[int]) -> bool:
        """Whether a batch of these can be made before it is needed: there are some; their order is known whatever is learned until then
        (policies choose at the start of an epoch); and no model has to be asked for their masks that may be in use."""
        if not numbers or (self.policies and any(n // len(self.places) not in self._orders for n in (numbers[0], numbers[-1]))):
            return False
        asking = [getattr(s.dataset, "asks_model", False) for s in self.sources]
        return not any(asking) or all(p in self._kept or not asking[self.places[p][0]] for p in map(self.place, numbers))

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

    def _images(self, frames: Sequence[Frame]) -> Tensor:
        """(B, 3, S, S) in channels-last memory, normalised; padding is 0 after that."""
        images = torch.stack([f.pixels for f in frames]).float().sub_(torch.tensor(self.spec.mean)).div_(torch.tensor(self.spec.std))
        for image, frame in zip(images, frames, strict=True):
            image[frame.size[0] :] = 0
            image[:, frame.size[1] :] = 0
        return images.permute(0, 3, 1, 2)

    def _frame(self, place: int, number: int) -> Frame:
        """One image of the stream, kept for the next epoch where it will be the same."""
        source, index = self.places[place]
        dataset = self.sources[source].dataset
        if self.live:
            sample, rng = dataset[index], np.random.default_rng([self.seed, 1, number])
            for policy in self.policies:
                sample = policy.view(sample, rng)
            live = {name: torch.from_numpy(preprocess(sample.image, spec)[0]) for name, spec in self.live.items()}
            return self._shrunk(sample.image, label_map(sample), live, {})
        cached = {c.teacher: c.outputs(index) for c in self.sources[source].caches}
        found = self._shrunk(*labelled(dataset, index), {}, cached)
        if self._bytes + found.nbytes <= KEEP_BYTES:
            self._kept[place] = found
            self._bytes += found.nbytes
        return found

    def _shrunk(self, image: np.ndarray, labels: np.ndarray, live: Named, cached: Mapping[str, Named]) -> Frame:
        pixels, target = to_frame(image, labels, replace(self.spec, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)))
        whole = pixels.round().clip(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous()
        photo = target >= 0
        places = torch.arange(len(whole)) * len(target) // len(whole)
        size = int(photo[places, 0].sum()), int(photo[0, places].sum())
        return Frame(whole, target, (cells(photo[None])[0] > 0.5).float(), size, live, cached)


class Ahead:
    """Makes the next batch in a thread while a step runs on the last one: the same batches in the same order, and an error is raised where
    the batch is asked for. No thread is left behind the `with`."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches
        # one thread of torch: a second team of threads would only stand in the way of the step's. Threads to come inherit the number set last
        self._pool = ThreadPoolExecutor(1, "batches", initializer=partial(torch.set_num_threads, 1))
        self._threads = torch.get_num_threads()
        self._next: tuple[Sequence[int], Future[Batch] | None] = (range(0), None)

    def batch(self, numbers: Sequence[int], then: Sequence[int]) -> Batch:
        """`batches.batch(numbers)`, and begin with that of `then`."""
        (expected, made), self._next = self._next, (range(0), None)
        if made is not None and expected == numbers:
            found = made.result()
        else:
            wait([made] if made is not None else [])  # the order of an epoch is drawn by one thread at a time
            found = self.batches.batch(numbers)
        if self.batches.settled(then):
            self._next = then, self._pool.submit(self.batches.batch, then)
        return found

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.submit(torch.set_num_threads, self._threads)
        self._pool.shutdown()


def labelled(dataset: Dataset, index: int) -> tuple[np.ndarray, np.ndarray]:
    """A photo (H, W, 3) uint8 and one map (H, W) int16 of its instances, by the dataset's own short way where it has one."""
    direct = getattr(dataset, "label_map", None)
    if direct is not None and dataset.has_masks:
        return direct(index)
    sample = dataset[index]
    return sample.image, label_map(sample)


def label_map(sample: Sample) -> np.ndarray:
    """(H, W) int16: instances numbered from 1, small ones on top of large ones; all 1 without any, so that prompts fall anywhere."""
    if sample.masks is None or not len(sample.masks):
        return np.ones(sample.image.shape[:2], np.int16)
    labels = np.zeros(sample.image.shape[:2], np.int16)
    for i in np.argsort(-sample.masks.sum((1, 2)), kind="stable"):
        labels[sample.masks[i]] = i + 1
    return labels


