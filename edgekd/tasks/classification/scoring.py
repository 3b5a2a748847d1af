"""Evaluation of classification: accuracy where the photos are labelled, and agreement with the teacher where there is one.

    top1, top5                        share of the labelled photos whose class is the likeliest, or among the five likeliest
    teacher_agreement.top1            share of the photos for which model and teacher find the same class likeliest
    teacher_agreement.kl              Kullback-Leibler divergence of the model's probabilities from the teacher's, KL(teacher || model), in nats: 0 is best

Each photo is looked at once, its middle crop only. Means over photos, 95 % intervals by bootstrap over photos.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from edgekd import console
from edgekd.data.images import preprocess
from edgekd.errors import UsageError
from edgekd.protocols import Dataset
from edgekd.runtime import as_array
from edgekd.tasks.classification.labels import numbering
from edgekd.tasks.evaluation import AGREEMENT, Evaluation, Progress, over_photos

METRICS = {
    "top1": "share of the photos whose class is the likeliest", "top5": "share of the photos whose class is among the five likeliest",
    "teacher_agreement.top1": "share of the photos for which model and teacher find the same class likeliest",
    "teacher_agreement.kl": "KL(teacher || model) of the probabilities, in nats; 0 is best",
}
"""The one place where they are written down: the protocol of a result quotes it."""


def logits_of(model: Any, images: np.ndarray) -> np.ndarray:
    """(B, 3, S, S) normalised -> (B, K) float32, by a torch model or an artifact."""
    if not hasattr(model, "parameters"):
        return model.logits(images)
    import torch

    with torch.inference_mode():
        return as_array(model.outputs(torch.from_numpy(as_array(images)))["logits"])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """(..., K) -> log probabilities, float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def divergence(teacher: np.ndarray, model: np.ndarray) -> np.ndarray:
    """KL(teacher || model) of logits (..., K) -> (...), in nats."""
    log_p, log_q = log_softmax(teacher), log_softmax(model)
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


def evaluate(model: Any, dataset: Dataset, *, teacher: Any = None, progress: Progress | None = None, seed: int = 0) -> Evaluation:
    """Ask a classifier about every photo of a dataset.

    Raises:
        UsageError: photos without classes and no teacher, so that there is nothing to compare with; or a teacher of other classes.
    """
    numbers = numbering(dataset, model.classes, model.labels)
    if getattr(dataset, "has_classes", False) and numbers is None:
        console.warn(f"{dataset.name}: its classes are not among the {model.classes} of '{model.name}', so no accuracy is measured")
    if numbers is None and teacher is None:
        raise UsageError(f"'{dataset.name}' has no classes that '{model.name}' could be held against", where=dataset.name,
                         hint="give a folder of folders called like the model's classes or a data pack with labels, or compare it with its teacher: --teacher NAME")
    if teacher is not None and teacher.classes != model.classes:
        raise UsageError(f"'{model.name}' tells {model.classes} classes apart and the teacher '{teacher.name}' {teacher.classes}",
                         hint="name the teacher that it was distilled from")
    rows: list[dict[str, Any]] = []
    for index in range(len(dataset)):
        sample = dataset[index]
        given = logits_of(model, preprocess(sample.image, model.preprocess)[0][None])[0]
        own = dataset.classes_of(index) if numbers is not None else None  # type: ignore[attr-defined]
        row: dict[str, Any] = {"id": sample.id} | (ranks(given, numbers[own]) if numbers is not None and own is not None else {})
        if teacher is not None:
            row |= agreement(logits_of(teacher, preprocess(sample.image, teacher.preprocess)[0][None])[0], given)
        rows.append(row)
        if progress is not None:
            progress.advance()
    measured = {key for row in rows for key in row}
    return over_photos(model.name, rows, protocol(model, teacher, dataset, {k: v for k, v in METRICS.items() if k in measured}, seed), seed=seed)


def ranks(logits: np.ndarray, label: int) -> dict[str, float]:
    """logits (K,) of a photo of class `label` -> top1 and top5, 0 or 1; of equal logits the lower number comes first."""
    place = int(np.flatnonzero(np.argsort(-logits, kind="stable") == label)[0])
    return {"top1": float(place < 1), "top5": float(place < 5)}


def agreement(teacher: np.ndarray, given: np.ndarray) -> dict[str, float]:
    """Logits (K,) of both for a photo."""
    return {f"{AGREEMENT}top1": float(teacher.argmax() == given.argmax()), f"{AGREEMENT}kl": float(divergence(teacher, given))}


def protocol(model: Any, teacher: Any, dataset: Dataset, metrics: Mapping[str, str], seed: int) -> dict[str, Any]:
    """What somebody else needs to get the same numbers."""
    spec = model.preprocess
    return {
        "task": "classification", "dataset": dataset.name, "data_fingerprint": dataset.fingerprint(), "metrics": dict(metrics), "classes": model.classes,
        "view": f"middle square of {spec.crop:.4g} of the short side at {spec.image_size} px" if spec.fit == "crop" else f"{spec.fit} to {spec.image_size} px",
        "metric": "mean over photos; 95 % intervals by bootstrap over photos", "image_size": spec.image_size,
        "teacher": teacher.name if teacher is not None else None, "seed": seed,
    }
