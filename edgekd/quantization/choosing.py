"""Which photos ranges are found on: those that between them are near to all others, by k-centre greedy over embeddings (arXiv 1708.00489).

Photos in a folder are often of one afternoon: of forty frames of one scene an even pick takes most. Here each next photo is the one farthest from all
that are taken already. Measured for 8 of 48 photos (`benchmarks/calibration_choice.py`, min-max ranges): the error of the embedding is on average that
of an even pick (0.96 and 0.99 of it for data of one scene mostly, 1.05 for photos that all differ), that of the worst photo 0.73 to 0.85 of it.
"""
from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np

from edgekd.data.images import preprocess
from edgekd.errors import EdgekdError
from edgekd.protocols import Dataset
from edgekd.runtime import as_array
from edgekd.workspace import fingerprint

CANDIDATES = 256
"""Photos, at most, that are looked at: of more, so many evenly spread."""
REMEMBERED = 8

_chosen: OrderedDict[str, list[int]] = OrderedDict()


def representative(model: Any, dataset: Dataset, limit: int) -> list[int]:
    """Indices of `limit` photos that stand for the dataset, ascending; all, and without looking, where it has no more. Deterministic. A photo of one
    colour, which is far from all others and shows nothing, is never one of them.

    A pass over the same photos with the same model is made once a process. Of every photo only the pooled embedding is kept, E numbers.

    Args:
        model: a torch model or an artifact with `embed` and `preprocess`.

    Raises:
        EdgekdError: an embedding is not finite, or every photo is of one colour.
    """
    count = len(dataset)
    if count <= limit:
        return list(range(count))
    key = fingerprint([dataset.fingerprint(), digest(model), limit])
    if key not in _chosen:
        vectors = {index: found for index in spread(count, max(CANDIDATES, limit)) if (found := pooled(model, dataset, index)) is not None}
        if not vectors:
            raise EdgekdError("every photo looked at is of one colour", where=dataset.name, hint="give photos like those that the model will see")
        seen = list(vectors)
        _chosen[key] = sorted(seen[i] for i in k_centres(np.stack(list(vectors.values())), limit))
        while len(_chosen) > REMEMBERED:
            _chosen.popitem(last=False)
    return list(_chosen[key])


def spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` indices, at even distances."""
    taken = min(count, most)
    return [i * count // taken for i in range(taken)]


def k_centres(vectors: np.ndarray, count: int) -> list[int]:
    """Rows of (N, E) in the order in which they are taken: the one nearest the mean, then always the one farthest from all taken. Of equals the first."""
    vectors = np.asarray(vectors, np.float64)
    taken = [int(np.linalg.norm(vectors - vectors.mean(axis=0), axis=1).argmin())]
    gap = np.linalg.norm(vectors - vectors[taken[0]], axis=1)
    while len(taken) < min(count, len(vectors)):
        gap[taken] = -1.0  # of photos that are all the same, none twice
        taken.append(int(gap.argmax()))
        gap = np.minimum(gap, np.linalg.norm(vectors - vectors[taken[-1]], axis=1))
    return taken


def pooled(model: Any, dataset: Dataset, index: int) -> np.ndarray | None:
    """(E,): the mean over a photo's embedding, of length 1; None for a photo of one colour."""
    sample = dataset[index]
    if blank(sample.image):
        return None
    found = embed(model, preprocess(sample.image, model.preprocess)[0][None], sample.id)
    mean = found.reshape(found.shape[1], -1).mean(axis=1, dtype=np.float64)
    return mean / max(float(np.linalg.norm(mean)), 1e-12)


def blank(image: np.ndarray) -> bool:
    """Whether an image (H, W, 3) is of one colour."""
    return bool((image == image[:1, :1]).all())


def embed(model: Any, images: np.ndarray, photo: str) -> np.ndarray:
    """(1, 3, S, S) -> (1, E, s, s), by a torch model or an artifact.

    Raises:
        EdgekdError: it holds NaN or infinity.
    """
    if hasattr(model, "parameters"):
        import torch

        with torch.no_grad():
            found = as_array(model.embed(torch.from_numpy(images)))
    else:
        found = as_array(model.embed(images))
    if not np.isfinite(found).all():
        raise EdgekdError(f"the embedding of the photo '{photo}' holds NaN or infinity", where=model.name,
                          hint="the model's weights are damaged or training diverged")
    return found


def digest(model: Any) -> str:
    """Changes with what a torch model or an artifact computes."""
    if hasattr(model, "state_dict"):
        from edgekd.checkpoint import weights_sha256

        return weights_sha256(model)
    return fingerprint([file.model_dump() for file in model.manifest.files])
