"""Recall of segment-everything: of the annotated instances, how many its masks find. COCO's AR@K, class-agnostic."""
from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from edgekd.data import Coco, Subset
from edgekd.data.coco import decode_segmentation
from edgekd.data.joined import Joined
from edgekd.errors import UsageError
from edgekd.protocols import Dataset, Promptable, Sample
from edgekd.tasks.promptable import rle
from edgekd.tasks.promptable.everything import Mode, Settings, everything, resolve_mode
from edgekd.tasks.promptable.matching import AREAS, CATEGORY, match
from edgekd.tasks.promptable.predictor import ModelPredictor, Predictor

AT = (10, 100, 1000)
SETTINGS = Settings(max_masks=max(AT))
"""Of segment-everything: its defaults, with as many masks as AR@1000 may look at. So a small model's few sure masks give the same AR at all K."""
UNFILTERED = Settings(pred_iou=0.0, stability=0.0, nms=0.9, max_masks=max(AT))
"""Masks as object proposals, which are ranked and not filtered (arXiv 2304.02643, App. D.3); for the mode `grid`: in `hierarchical` unsure
masks would cover what a click has yet to find."""


class EverythingRecall:
    """Segments everything on photo after photo and counts what was found.

    Raises:
        UsageError: a baseline, which has no masks without a prompt, or a mode that the model does not have.
    """

    def __init__(self, model: Promptable | Predictor, *, mode: Mode = "auto", settings: Settings = SETTINGS) -> None:
        if isinstance(model, Predictor) and not isinstance(model, ModelPredictor):
            raise UsageError(f"'{model.name}' cannot segment everything", hint="leave out the metrics 'everything', or give a model")
        self._model = model if isinstance(model, ModelPredictor) else ModelPredictor(model)
        self.mode, self.settings = resolve_mode(self._model.model, mode), settings
        self.photos = self.instances = self.masks = 0

    def add(self, dataset: Dataset, index: int, sample: Sample) -> dict[str, tuple[float, int]]:
        """One photo's numbers: name -> (sum over its instances of the share of IoU thresholds at which they are found, instances)."""
        truth = instances(dataset, index, sample)
        if not any(not t["iscrowd"] for t in truth):
            return {}
        found = everything(self._model, sample.image, mode=self.mode, settings=self.settings)  # type: ignore[arg-type]
        masks = [{"segmentation": s.rle, "area": s.area, "score": s.predicted_iou * s.stability_score} for s in found]
        values = recall(truth, masks)
        self.photos, self.masks, self.instances = self.photos + 1, self.masks + len(masks), self.instances + values[f"everything_ar{AT[0]}"][1]
        return values

    def protocol(self) -> dict[str, Any]:
        """What an evaluation says about it."""
        return {"mode": self.mode, "settings": asdict(self.settings), "photos": self.photos, "instances": self.instances,
                "masks_per_photo": round(self.masks / max(1, self.photos), 2),
                "truth": "every annotated instance, whatever its size; crowds count neither way",
                "order": "predicted IoU x stability", "matching": "pycocotools COCOeval, useCats=0, IoU 0.50:0.05:0.95"}


def recall(truth: list[dict[str, Any]], found: list[dict[str, Any]]) -> dict[str, tuple[float, int]]:
    """AR@10, @100 and @1000 of one photo (and of small, medium and large instances @1000), as sums and counts: over several photos AR is
    the sum of the sums by the sum of the counts.

    Args:
        truth: `segmentation` (run lengths), `area`, `iscrowd`.
        found: `segmentation` (run lengths), `area`, `score`.
    """
    matches = match([[{**t, "category_id": CATEGORY} for t in truth]], [[{**f, "category_id": CATEGORY} for f in found]],
                    categories=False, most=max(AT))
    values: dict[str, tuple[float, int]] = {}
    for name, area, most in [*((f"everything_ar{k}", "all", k) for k in AT),
                             *((f"everything_ar{AT[-1]}_{a}", a, AT[-1]) for a in AREAS if a != "all")]:
        for photo in next(iter(matches.by_area[area].values()), []):
            if photo.instances:
                right = photo.hit[:, :most] & ~photo.ignored[:, :most]
                values[name] = (float(right.sum()) / len(matches.thresholds), photo.instances)
    return values


def instances(dataset: Dataset, index: int, sample: Sample) -> list[dict[str, Any]]:
    """What is annotated on a photo, for COCO's metrics: `segmentation` (run lengths), `area`, `iscrowd` and `category_id`.

    Of a COCO json its own annotations, with their areas and crowds; of other data the sample's masks.
    """
    while isinstance(dataset, Subset | Joined):
        dataset, index = (dataset.dataset, dataset.indices[index]) if isinstance(dataset, Subset) else _part(dataset, index)
    if not isinstance(dataset, Coco):
        masks = np.zeros((0, 1, 1), dtype=bool) if sample.masks is None else sample.masks
        return [{"segmentation": r, "area": rle.area(r), "iscrowd": 0, "category_id": CATEGORY} for r in rle.encode(masks)]
    rows = []
    for annotation in dataset.annotations(index):
        mask = decode_segmentation(annotation["segmentation"], *sample.image.shape[:2], where=f"{dataset.path}, annotation {annotation.get('id')}")
        run = rle.encode(mask[None])[0]
        rows.append({"segmentation": run, "area": float(annotation.get("area", rle.area(run))), "iscrowd": int(annotation.get("iscrowd", 0)),
                     "category_id": annotation.get("category_id", CATEGORY)})
    return rows


def _part(dataset: Joined, index: int) -> tuple[Dataset, int]:
    part, within = dataset.places[index]
    return dataset.parts[part], within
