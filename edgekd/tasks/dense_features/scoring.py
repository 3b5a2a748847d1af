"""Evaluation of dense features against the teacher they copy, photo by photo, padding left out.

    cosine           mean cosine of a cell's features with the teacher's
    cka              linear centred kernel alignment of the cells' features (Kornblith et al., arXiv 1905.00414, eq. 5): 1 when one is a rotation and
                     scaling of the other
    nearest_patch    share of the cells whose nearest other cell of the photo, by cosine, is the teacher's: what matching and clustering see

All are 1 for the teacher itself. The teacher's map is brought to the model's grid (bilinear, antialiased). Means over photos, 95 % intervals by
bootstrap over photos.
"""
from __future__ import annotations

from typing import Any

import numpy as np

from edgekd.data.images import Frame, preprocess
from edgekd.errors import UsageError
from edgekd.protocols import Dataset, Preprocess
from edgekd.runtime import as_array
from edgekd.tasks.evaluation import Evaluation, Progress, over_photos

METRICS = {
    "cosine": "mean over cells of the cosine of the model's features with the teacher's",
    "cka": "linear centred kernel alignment of the features of a photo's cells with the teacher's",
    "nearest_patch": "share of the cells whose nearest other cell, by cosine, is the teacher's",
}
"""The one place where they are written down: the protocol of a result quotes it."""


def embed(model: Any, images: np.ndarray) -> np.ndarray:
    """(B, 3, S, S) normalised -> (B, E, s, s) float32, by a torch model or an artifact; channels for a foreign decoder are left out."""
    if not hasattr(model, "parameters"):
        return model.embed(images)
    import torch

    with torch.inference_mode():
        pixels = torch.from_numpy(as_array(images))
        found = model.outputs(pixels)["embedding"] if hasattr(model, "outputs") else model.embed(pixels)
        return as_array(found[:, : model.embed_dim])


def evaluate(model: Any, dataset: Dataset, *, teacher: Any = None, progress: Progress | None = None, seed: int = 0) -> Evaluation:
    """Hold a model's features against its teacher's on every photo of a dataset.

    Raises:
        UsageError: there is no teacher, or its features are of another width.
    """
    if teacher is None:
        raise UsageError(f"'{model.name}' gives features, which only its teacher can judge", hint="name it: --teacher NAME")
    if teacher.embed_dim != model.embed_dim:
        raise UsageError(f"'{model.name}' gives {model.embed_dim} features a cell and the teacher '{teacher.name}' {teacher.embed_dim}",
                         hint="name the teacher that it was distilled from")
    rows: list[dict[str, Any]] = []
    for index in range(len(dataset)):
        sample = dataset[index]
        pixels, frame = preprocess(sample.image, model.preprocess)
        ours = embed(model, pixels[None])[0]
        theirs = on_grid(embed(teacher, preprocess(sample.image, teacher.preprocess)[0][None])[0], ours.shape[-1])
        inside = valid_cells(frame, model.preprocess, ours.shape[-1])
        rows.append({"id": sample.id, **compare(ours[:, inside].T, theirs[:, inside].T)})
        if progress is not None:
            progress.advance()
    protocol = {
        "task": "dense_features", "dataset": dataset.name, "data_fingerprint": dataset.fingerprint(), "metrics": METRICS,
        "metric": "mean over photos of the mean over their cells, padding left out; 95 % intervals by bootstrap over photos",
        "image_size": model.preprocess.image_size, "teacher": teacher.name, "seed": seed,
    }
    return over_photos(model.name, rows, protocol, seed=seed)


def on_grid(theirs: np.ndarray, side: int) -> np.ndarray:
    """(E, t, t) -> (E, side, side)."""
    if theirs.shape[-1] == side:
        return theirs
    import torch
    import torch.nn.functional as F

    resized = F.interpolate(torch.from_numpy(theirs[None]), (side, side), mode="bilinear", align_corners=False, antialias=True)
    return as_array(resized)[0]


def valid_cells(frame: Frame, spec: Preprocess, side: int) -> np.ndarray:
    """(side, side) bool: cells whose centre is in the photo; at least the first."""
    height, width = frame.resized
    centres = (np.arange(side) + 0.5) * (spec.side / side)
    inside = (centres < height)[:, None] & (centres < width)[None]
    inside[0, 0] = True
    return inside


def compare(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """Features of N cells, (N, E) each -> the metrics."""
    return {"cosine": float(cosines(ours, theirs).mean()), "cka": linear_cka(ours, theirs), "nearest_patch": nearest_agreement(ours, theirs)}


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N, E), (N, E) -> (N,)."""
    return (unit(a) * unit(b)).sum(-1)


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of length 1, in float64; a row of zeros stays."""
    x = x.astype(np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def linear_cka(a: np.ndarray, b: np.ndarray) -> float:
    """(N, E), (N, D) -> ||b'a||^2 / (||a'a|| ||b'b||) of centred features; of Gram matrices, which are smaller here. 1 for a single cell."""
    if len(a) < 2:
        return 1.0
    a, b = (x.astype(np.float64) - x.astype(np.float64).mean(0) for x in (a, b))
    first, second = a @ a.T, b @ b.T
    return float((first * second).sum() / max(np.linalg.norm(first) * np.linalg.norm(second), 1e-12))


def nearest_agreement(a: np.ndarray, b: np.ndarray) -> float:
    """(N, E), (N, D) -> share of the rows whose nearest other row, by cosine, is the same in both. 1 with fewer than three rows."""
    if len(a) < 3:
        return 1.0
    nearest = []
    for x in (a, b):
        alike = unit(x) @ unit(x).T
        np.fill_diagonal(alike, -np.inf)
        nearest.append(alike.argmax(1))
    return float((nearest[0] == nearest[1]).mean())
