"""Instances for photos without labels, made by the teacher itself (`edgekd.tasks.promptable.everything` on a small grid).

An evaluation against these measures agreement with the teacher, never truth; the dataset's name and `labels` say so.
"""
from __future__ import annotations

from collections.abc import Iterator

from edgekd import workspace
from edgekd.protocols import Dataset, Promptable, Sample
from edgekd.tasks.promptable import rle
from edgekd.tasks.promptable.everything import Settings, everything
from edgekd.tasks.promptable.predictor import ModelPredictor


class PseudoLabelled:
    """A dataset whose masks are the teacher's; each photo is labelled when first asked for, then kept as run lengths."""

    has_masks = True

    asks_model = True
    """Looking at a photo runs the teacher, which may be in use: not for another thread."""

    def __init__(self, model: Promptable, dataset: Dataset, *, points_per_side: int, max_instances: int, iou_thresh: float,
                 stability_thresh: float, nms_thresh: float, area: tuple[float, float]) -> None:
        self.dataset, self._predictor = dataset, ModelPredictor(model)
        self.name, self.skipped = f"{dataset.name} (masks by {model.name})", dataset.skipped
        self.labels = f"pseudo-labels: masks made by {model.name} itself, not ground truth"
        self.settings = {"points_per_side": points_per_side, "max_instances": max_instances, "iou_thresh": iou_thresh,
                         "stability_thresh": stability_thresh, "nms_thresh": nms_thresh, "area": list(area)}
        self._ask = Settings(points_per_side=points_per_side, pred_iou=iou_thresh, stability=stability_thresh, nms=nms_thresh,
                             max_masks=max_instances, area=area)
        self._cache: dict[int, list[dict[str, object]]] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        sample = self.dataset[index]
        if index not in self._cache:
            self._cache[index] = [s.rle for s in everything(self._predictor, sample.image, mode="grid", settings=self._ask)]
        return Sample(sample.id, sample.image, rle.decode(self._cache[index], *sample.image.shape[:2]))

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def fingerprint(self) -> str:
        """Of the photos, the teacher's name and the settings. A teacher with other weights under the same name goes unseen."""
        return workspace.fingerprint(["pseudo", self.dataset.fingerprint(), self._predictor.name, self.settings])


def pseudo_label(model: Promptable, dataset: Dataset, *, points_per_side: int = 8, max_instances: int = 12, iou_thresh: float = 0.7,
                 stability_thresh: float = 0.8, nms_thresh: float = 0.7, area: tuple[float, float] = (0.005, 0.9)) -> PseudoLabelled:
    """Label photos with the teacher's own masks: grid clicks, all three alternatives, filters, suppression of duplicates.

    SAM's thresholds (predicted IoU 0.88, stability 0.95) suit a ViT-H; these are for small teachers. Deterministic.

    Args:
        points_per_side: clicks along each side of the grid.
        max_instances: at most so many masks a photo, the best by predicted IoU x stability.
        area: smallest and largest share of the photo.
    """
    return PseudoLabelled(model, dataset, points_per_side=points_per_side, max_instances=max_instances, iou_thresh=iou_thresh,
                          stability_thresh=stability_thresh, nms_thresh=nms_thresh, area=area)
