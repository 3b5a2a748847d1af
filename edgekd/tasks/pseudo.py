"""Instances for photos without labels, made by the teacher itself (SAM's automatic mask generation on a small grid).

An evaluation against these measures agreement with the teacher, never truth; the dataset's name and `labels` say so.
"""
from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from edgekd import workspace
from edgekd.data.prompts import Prompts, grid_points
from edgekd.protocols import Dataset, Promptable, Sample
from edgekd.tasks.metrics import iou
from edgekd.tasks.predictor import THRESHOLD, ModelPredictor

CHUNK = 64
"""Prompts a decoder call."""


class PseudoLabelled:
    """A dataset whose masks are the teacher's; each photo is labelled when first asked for, then kept (one bit a pixel)."""

    has_masks = True

    def __init__(self, model: Promptable, dataset: Dataset, *, points_per_side: int, max_instances: int, iou_thresh: float,
                 stability_thresh: float, nms_thresh: float, area: tuple[float, float]) -> None:
        self.dataset, self._predictor = dataset, ModelPredictor(model)
        self.name, self.skipped = f"{dataset.name} (masks by {model.name})", dataset.skipped
        self.labels = f"pseudo-labels: masks made by {model.name} itself, not ground truth"
        self.settings = {"points_per_side": points_per_side, "max_instances": max_instances, "iou_thresh": iou_thresh,
                         "stability_thresh": stability_thresh, "nms_thresh": nms_thresh, "area": list(area)}
        self._points_per_side, self._most, self._nms, self._area = points_per_side, max_instances, nms_thresh, area
        self._least = np.array([iou_thresh, stability_thresh])
        self._cache: dict[int, tuple[np.ndarray, tuple[int, ...]]] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        sample = self.dataset[index]
        if index not in self._cache:
            masks = self._label(sample.image)
            self._cache[index] = (np.packbits(masks), masks.shape)
        bits, shape = self._cache[index]
        return Sample(sample.id, sample.image, np.unpackbits(bits, count=int(np.prod(shape))).reshape(shape).astype(bool))

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def fingerprint(self) -> str:
        """Of the photos, the teacher's name and the settings. A teacher with other weights under the same name goes unseen."""
        return workspace.fingerprint(["pseudo", self.dataset.fingerprint(), self._predictor.name, self.settings])

    def _label(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 -> (K, H, W) bool, best first."""
        state = self._predictor.start(image)
        points = Prompts.clicks(grid_points(self._points_per_side, *image.shape[:2]))
        answers = [self._predictor.decode(state, points[i:i + CHUNK]) for i in range(0, len(points), CHUNK)]
        # all three alternatives of every click; filtered on the mask grid, where they are small
        logits = np.concatenate([a[0][:, 1:].reshape(-1, *a[0].shape[2:]) for a in answers])
        predicted = np.concatenate([a[1][:, 1:].ravel() for a in answers])
        frame = state[1]
        cell = frame.side / logits.shape[-1]
        rows, columns = (max(1, round(side / cell)) for side in frame.resized)
        inside = logits[:, :rows, :columns]
        masks = inside > THRESHOLD
        quality = np.stack([predicted, stability(inside)], axis=1)
        share = masks.mean(axis=(1, 2))
        usable = np.flatnonzero((share >= self._area[0]) & (share <= self._area[1]))
        good = usable[(quality[usable] >= self._least).all(axis=1)]
        if not len(good):  # a photo where the teacher is sure of nothing still has a best guess
            good, most = usable, 1
        else:
            most = self._most
        ranked = good[np.argsort(-quality[good].prod(axis=1), kind="stable")]
        kept = ranked[suppress(masks[ranked], self._nms, most)]
        full = frame.mask_to_image(logits[kept]) > THRESHOLD
        return full[full.any(axis=(1, 2))]


def stability(logits: np.ndarray, offset: float = 1.0) -> np.ndarray:
    """(N, h, w) logits -> (N,) IoU of the masks thresholded `offset` above and below 0: how sharp the borders are."""
    return iou(logits > THRESHOLD + offset, logits > THRESHOLD - offset)


def suppress(masks: np.ndarray, threshold: float, most: int) -> list[int]:
    """(N, h, w) bool masks, best first -> the indices of at most `most` that overlap no better one by IoU > `threshold`."""
    kept: list[int] = []
    for i in range(len(masks)):
        if len(kept) == most:
            break
        if not kept or iou(masks[i][None], masks[kept]).max() <= threshold:
            kept.append(i)
    return kept


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
