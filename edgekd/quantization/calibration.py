"""Inputs that static quantization finds activation ranges with. They stream: one photo in memory at a time, as often as asked.

The decoder sees every kind of prompt, since ranges found on clicks alone do not fit boxes or mask prompts.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from edgekd import plugins
from edgekd.data.images import preprocess
from edgekd.errors import EdgekdError, UsageError
from edgekd.probes import KINDS, probe
from edgekd.protocols import Dataset, Preprocess, Promptable
from edgekd.quantization.choosing import CANDIDATES, blank, digest, embed, representative, spread
from edgekd.workspace import fingerprint

DEFAULT_LIMIT = 32


def calibrate(model: Any, dataset: Dataset, *, limit: int = DEFAULT_LIMIT, choose: bool = True) -> dict[str, Iterable[Mapping[str, np.ndarray]]]:
    """Calibration inputs of every component of a model with `embed`, streamed from at most `limit` photos.

    Args:
        choose: take photos that stand for the data (`choosing.representative`); False: at even distances, for a model whose embeddings say nothing.

    Raises:
        UsageError: there is no photo, or none that shows anything.
    """
    refuse_blank(dataset)
    photos = EncoderCalibration(dataset, model.preprocess, limit=limit, indices=representative(model, dataset, limit) if choose else None)
    found: dict[str, Iterable[Mapping[str, np.ndarray]]] = {plugins.task_of(model).photo_component: photos}
    if hasattr(model, "decode"):
        found["decoder"] = DecoderCalibration(photos, model)
    if getattr(model, "proposer", None) is not None:
        found["proposer"] = ProposerCalibration(photos, model)
    return found


def refuse_blank(dataset: Dataset) -> None:
    """Reads photos up to the first that is not of one colour.

    Raises:
        UsageError: there is none among those that would be looked at, or no photo at all.
    """
    if not len(dataset):
        raise _none(dataset)
    looked = spread(len(dataset), CANDIDATES)
    if all(blank(dataset[index].image) for index in looked):
        raise UsageError(f"every photo ({len(looked)} looked at) is of one colour: activation ranges found on them would fit no other",
                         where=dataset.name, hint="give photos like those that the model will see with --data")


def _none(dataset: Dataset) -> UsageError:
    return UsageError("calibration needs at least one image, and the data holds none", where=dataset.name, hint="give a folder of images with --data")


class EncoderCalibration:
    """`{"images": (1, 3, S, S)}` of the photos `indices`, or of up to `limit` at even distances. Re-iterable; nothing is kept."""

    def __init__(self, dataset: Dataset, spec: Preprocess, *, limit: int = DEFAULT_LIMIT, indices: Sequence[int] | None = None) -> None:
        if len(dataset) == 0:
            raise _none(dataset)
        if limit < 1:
            raise UsageError(f"calibration needs at least one image, and the limit is {limit}", where=dataset.name, hint="give a limit of 1 or more")
        self.dataset, self.spec = dataset, spec
        self.indices = spread(len(dataset), limit) if indices is None else list(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return ({"images": images} for _, images in self.named())

    def named(self) -> Iterator[tuple[str, np.ndarray]]:
        """(id, (1, 3, S, S)) of every photo."""
        for index in self.indices:
            sample = self.dataset[index]
            image, _ = preprocess(sample.image, self.spec)
            if not np.isfinite(image).all():
                raise EdgekdError(f"the photo '{sample.id}' holds NaN or infinity", where=self.dataset.name, hint="remove it, or mend the model's mean and std")
            yield sample.id, image[None]

    def fingerprint(self) -> str:
        """Changes with what is yielded."""
        return fingerprint(["photos", self.dataset.fingerprint(), self.indices, asdict(self.spec)])


class _OfEmbeddings:
    """Inputs made of the embeddings of `model` for the photos. Re-iterable."""

    def __init__(self, photos: EncoderCalibration, model: Promptable) -> None:
        self.photos, self.model = photos, model

    def embeddings(self) -> Iterator[np.ndarray]:
        """(1, E, s, s) of each photo."""
        return (embed(self.model, images, photo) for photo, images in self.photos.named())

    def fingerprint(self) -> str:
        """Changes with what is yielded."""
        settings = {k: v for k, v in vars(self).items() if k not in ("photos", "model")}
        return fingerprint([type(self).__name__, settings, KINDS, self.photos.fingerprint(), digest(self.model)])


class DecoderCalibration(_OfEmbeddings):
    """The decoder's inputs on embeddings of `model` for the same photos: every kind of prompt in turn, `prompts` at once."""

    def __init__(self, photos: EncoderCalibration, model: Promptable, *, prompts: int = 4, seed: int = 0) -> None:
        super().__init__(photos, model)
        self.prompts, self.seed = prompts, seed

    def __len__(self) -> int:
        return len(self.photos) * len(KINDS)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        rng = np.random.default_rng(self.seed)  # anew for each pass, so that every pass gives the same inputs
        for embedding in self.embeddings():
            for kind in KINDS:
                yield probe(kind, self.prompts, self.model.preprocess.side, rng).inputs(embedding)


class ProposerCalibration(_OfEmbeddings):
    """The box proposer's input: `{"image_embeddings": (1, E, s, s)}` of each photo."""

    def __len__(self) -> int:
        return len(self.photos)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return ({"image_embeddings": embedding} for embedding in self.embeddings())
