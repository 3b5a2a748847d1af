"""Pseudo-labels are what segment-everything finds on a small grid, kept as run lengths."""
from __future__ import annotations

import numpy as np
from oracles import Oracle, Painted

from edgekd.tasks.promptable.everything import Settings, everything
from edgekd.tasks.promptable.pseudo import pseudo_label


def test_they_are_segment_everythings_masks() -> None:
    photos = Painted()
    labelled = pseudo_label(Oracle(), photos, points_per_side=12, max_instances=5)
    asked = Settings(points_per_side=12, pred_iou=0.7, stability=0.8, max_masks=5, area=(0.005, 0.9))
    for sample, label in zip(photos, labelled, strict=True):
        assert label.masks is not None and np.array_equal(label.masks, everything(Oracle(), sample.image, mode="grid", settings=asked).masks)
        assert label.id == sample.id and label.masks.dtype == bool and len(label.masks) == 3


def test_each_photo_is_labelled_once() -> None:
    model = Oracle()
    labelled = pseudo_label(model, Painted())
    first, again = labelled[1], labelled[1]
    assert model.embeds == 1 and first.masks is not None and again.masks is not None and np.array_equal(first.masks, again.masks)
