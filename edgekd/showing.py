"""Mask overlays for the report: teacher and chosen candidate on the user's photos, asked the same prompts."""
from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgekd.data.prompts import Prompts, boxes_from_masks, center_clicks
from edgekd.protocols import Dataset
from edgekd.runtime import open_artifact
from edgekd.tasks.promptable.predictor import predictor
from edgekd.tasks.promptable.pseudo import pseudo_label
from edgekd.tasks.promptable.scoring import choose_instances

if TYPE_CHECKING:
    from edgekd.report.figures import Overlay
    from edgekd.trial import Bench

PHOTOS, INSTANCES = 6, 3


def overlays(bench: Bench, chosen: str | None, photos: Dataset) -> list[Overlay]:
    """One row of pictures a photo: up to three instances, the first asked by a box, the others by a click. Nothing without a choice."""
    if chosen is None:
        return []
    from edgekd.report.overlays import compare

    student, teacher = predictor(open_artifact(bench.artifact(chosen), threads=bench.threads, stand_in=True)), predictor(bench.teacher)
    labelled = photos if photos.has_masks else pseudo_label(bench.teacher, photos)
    drawn = []
    for index in range(min(PHOTOS, len(labelled))):
        sample = labelled[index]
        truth = choose_instances(sample, INSTANCES, 0.01, seed=0)
        if not len(truth):
            continue
        prompts = [Prompts.boxes(boxes_from_masks(truth[:1])), *([Prompts.clicks(center_clicks(truth[1:]))] if len(truth) > 1 else [])]
        answers = []
        for model in (teacher, student):
            state = model.start(sample.image)
            answers.append(np.concatenate([model.masks(state, p).masks for p in prompts]))
        points, labels = padded(prompts)
        drawn.append(compare(sample.image, answers[0], answers[1], points, labels, title=sample.id, names=(bench.teacher.name, chosen)))
    return drawn


def padded(prompts: list[Prompts]) -> tuple[np.ndarray, np.ndarray]:
    """Points (P, N, 2) and labels (P, N) of prompts of different length; what is missing is absent (label -2)."""
    longest = max(p.points.shape[1] for p in prompts)
    points = [np.pad(p.points, ((0, 0), (0, longest - p.points.shape[1]), (0, 0))) for p in prompts]
    labels = [np.pad(p.labels.astype(np.float32), ((0, 0), (0, longest - p.labels.shape[1])), constant_values=-2) for p in prompts]
    return np.concatenate(points).astype(np.float32), np.concatenate(labels)
