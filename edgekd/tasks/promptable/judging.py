"""What precisions of one promptable model are judged by: its masks on a few photos, against labels and against its own masks in full precision.

    score       mIoU of boxes and of centre clicks, their mean, at the photo's resolution (`scoring`), against the data's own masks where it has
                some, else against the source's masks of everything
    agreement   overlap of the low-resolution masks with those that the source itself answers to the same prompts, mean over prompts

Two precisions may make different mistakes of the same number: the first then sees no drop and the second does.
"""
from __future__ import annotations

from typing import Any

import numpy as np

from edgekd.data import Subset
from edgekd.data.images import Frame, preprocess
from edgekd.data.prompts import Prompts, boxes_from_masks, center_clicks
from edgekd.errors import UsageError
from edgekd.protocols import Dataset
from edgekd.tasks.evaluation import Judge
from edgekd.tasks.promptable import scoring
from edgekd.tasks.promptable.predictor import THRESHOLD, ModelPredictor, select
from edgekd.tasks.promptable.pseudo import pseudo_label

PHOTOS = 16
CERTAIN, STABLE = 0.5, 0.6
"""Of the source's masks that become instances, least predicted IoU and stability: what SAM keeps would be one mask a photo of a small student."""


def judge(source: Any, dataset: Dataset, *, most: int = PHOTOS) -> Judge:
    """The judge of a torch model's precisions, on `most` photos spread over the data.

    Raises:
        UsageError: there is no instance to ask for on any photo.
    """
    photos: Any = dataset if len(dataset) <= most else Subset(dataset, [i * len(dataset) // most for i in range(most)])
    if not dataset.has_masks:
        photos = pseudo_label(source, photos, iou_thresh=CERTAIN, stability_thresh=STABLE)
    asked = _Questions(source, photos)

    def score(model: Any) -> float:
        found = scoring.evaluate(model, photos, metrics=("box", "center")).metrics
        return (found["box_miou"] + found["center_miou"]) / 2

    return Judge(score, asked.agreement, len(photos), asked.instances,
                 "mask IoU with the source model's own masks, boxes and centre clicks, in the model's mask resolution")


class _Questions:
    """Boxes and clicks on every photo, ready for models with the source's preprocessing, and the source's own answers, one bit a cell."""

    def __init__(self, source: Any, photos: Dataset) -> None:
        self._asked: list[tuple[tuple[np.ndarray, Frame], tuple[Prompts, Prompts]]] = []
        self.instances = 0
        for i in range(len(photos)):
            sample = photos[i]
            truth = scoring.choose_instances(sample, scoring.MAX_INSTANCES, scoring.MIN_AREA, 0)
            if len(truth):
                self.instances += len(truth)
                self._asked.append((preprocess(sample.image, source.preprocess), (Prompts.boxes(boxes_from_masks(truth)), Prompts.clicks(center_clicks(truth)))))
        if not self.instances:
            raise UsageError(f"nothing to ask for: '{photos.name}' has no instance that is large enough", hint="give photos with something in them")
        self._own = self._answers(source)

    def agreement(self, model: Any) -> float:
        """Mean IoU with the source's masks; two empty masks agree."""
        overlaps = []
        for (bits, shape), (theirs, _) in zip(self._own, self._answers(model), strict=True):
            own, other = (np.unpackbits(x, count=int(np.prod(shape))).reshape(shape).astype(bool) for x in (bits, theirs))
            both, either = (own & other).sum((1, 2)), (own | other).sum((1, 2))
            overlaps.append(np.where(either > 0, both / np.maximum(either, 1), 1.0))
        return float(np.concatenate(overlaps).mean())

    def _answers(self, model: Any) -> list[tuple[np.ndarray, tuple[int, ...]]]:
        predictor = ModelPredictor(model)
        found = []
        for photo, questions in self._asked:
            state = predictor.embed(*photo)
            for prompts in questions:
                logits, iou = predictor.decode(state, prompts)
                masks = logits[np.arange(len(prompts)), select(iou, prompts.single_click, predictor.rule)] > THRESHOLD
                found.append((np.packbits(masks), masks.shape))
        return found
