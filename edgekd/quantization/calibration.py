"""Inputs that static quantization finds activation ranges with. They stream: one photo in memory at a time, as often as asked.

The decoder sees every kind of prompt, since ranges found on clicks alone do not fit boxes or mask prompts.
"""
from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from edgekd.data.images import preprocess
from edgekd.errors import UsageError
from edgekd.probes import KINDS, probe
from edgekd.protocols import Dataset, Preprocess, Promptable
from edgekd.runtime import as_array

DEFAULT_LIMIT = 32


class EncoderCalibration:
    """`{"images": (1, 3, S, S)}` of up to `limit` photos, spread over the dataset. Re-iterable; nothing is kept."""

    def __init__(self, dataset: Dataset, spec: Preprocess, *, limit: int = DEFAULT_LIMIT) -> None:
        count = len(dataset)
        if count == 0:
            raise UsageError("calibration needs at least one image, and the data holds none", where=dataset.name, hint="give a folder of images with --data")
        self.dataset, self.spec = dataset, spec
        self.indices = [i * count // min(count, limit) for i in range(min(count, limit))]

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for index in self.indices:
            image, _ = preprocess(self.dataset[index].image, self.spec)
            yield {"images": image[None]}


class DecoderCalibration:
    """The decoder's inputs on embeddings of `model` for the same photos: every kind of prompt in turn, `prompts` at once."""

    def __init__(self, photos: EncoderCalibration, model: Promptable, *, prompts: int = 4, seed: int = 0) -> None:
        self.photos, self.model, self.prompts, self.seed = photos, model, prompts, seed

    def __len__(self) -> int:
        return len(self.photos) * len(KINDS)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        rng = np.random.default_rng(self.seed)  # anew for each pass, so that every pass gives the same inputs
        for photo in self.photos:
            embedding = _embed(self.model, photo["images"])
            for kind in KINDS:
                yield probe(kind, self.prompts, self.model.preprocess.side, rng).inputs(embedding)


def _embed(model: Promptable, images: np.ndarray) -> np.ndarray:
    """(1, 3, S, S) -> (1, E, s, s), by a torch model or an artifact."""
    if not hasattr(model, "parameters"):
        return as_array(model.embed(images))
    import torch

    with torch.no_grad():
        return as_array(model.embed(torch.from_numpy(images)))
