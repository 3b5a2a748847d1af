"""Average precision of masks that boxes prompt: a detector's boxes in, COCO's AP out, as the tables of EfficientSAM and TinySAM have it.

Published figures differ by detector (ViTDet-H, Detic, YOLOv8) and by the choice of mask, so both are parameters and stand in the protocol.
"""
from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.data import Coco, Subset
from edgekd.data.prompts import Prompts, boxes_from_masks
from edgekd.errors import UsageError, unknown
from edgekd.protocols import Dataset, Promptable, Sample
from edgekd.tasks.promptable import rle
from edgekd.tasks.promptable.matching import CATEGORY, match
from edgekd.tasks.promptable.metrics import DETECTION
from edgekd.tasks.promptable.precision import Precision, intervals
from edgekd.tasks.promptable.predictor import THRESHOLD, ModelPredictor, Predictor, Rule, predictor, select
from edgekd.tasks.promptable.recall import instances
from edgekd.tasks.promptable.scoring import Evaluation, Progress

MOST_BOXES, MOST_BOXES_FEDERATED = 100, 300
"""Boxes a photo, the best by score: COCO's and LVIS's convention."""
CHUNK = 16
"""Boxes a decoder call: their masks at the photo's resolution are in memory together."""


@dataclass(frozen=True)
class Boxes:
    """Prompts of one photo: (P, 4) xyxy, (P,) scores (NaN: the predicted IoU counts), P categories (None: the detector names none)."""

    xyxy: np.ndarray
    scores: np.ndarray
    categories: list[int | None]


@dataclass
class Detection(Evaluation):
    """An evaluation whose metrics are `edgekd.tasks.promptable.metrics.DETECTION`. `precision` holds what `precision.paired_interval` needs."""

    precision: Precision | None = None


def detection_ap(model: Promptable | Predictor, dataset: Dataset, *, boxes: str | Path | None = None, mask_rule: Rule = "first", seed: int = 0,
                 progress: Progress | None = None) -> Detection:
    """AP, AP50, AP75 and AP of small, medium and large instances, with 95 % intervals.

    On an LVIS json categories count in the photos where they were looked for only (federated, 300 boxes a photo).

    Args:
        dataset: a COCO or LVIS json; with the ground truth's own boxes any data with masks.
        boxes: a COCO results json of a detector (`image_id`, `bbox` xywh, `score`, `category_id`; without categories all count as one).
            None: the bounding boxes of the ground truth's masks, scored by predicted IoU.
        mask_rule: `first`: mask 0; `iou`: the best of masks 1..3 by predicted IoU.

    Raises:
        UsageError: data without masks, or boxes that are no such json or of other images or categories.
    """
    if not dataset.has_masks:
        raise UsageError(f"'{dataset.name}' has no masks to evaluate against", hint="give a COCO json")
    if mask_rule not in ("first", "iou"):
        raise unknown("mask rule", mask_rule, ("first", "iou"))
    coco, indices = _coco_below(dataset)
    if boxes is not None and coco is None:
        raise UsageError(f"'{dataset.name}' is not a COCO json, so a detector's boxes cannot be matched to its photos",
                         hint="give the json that the detector ran on, or leave --boxes out")
    detected = read_boxes(boxes, coco) if boxes is not None and coco is not None else None
    asked = predictor(model)
    if mask_rule == "iou" and not isinstance(asked, ModelPredictor):
        raise UsageError(f"'{asked.name}' predicts no IoU to choose a mask by", hint="use the mask rule 'first'")
    truth: list[list[dict[str, Any]]] = []
    found: list[list[dict[str, Any]]] = []
    rows: list[dict[str, Any]] = []
    for index in range(len(dataset)):
        sample = dataset[index]
        own = instances(dataset, index, sample)
        record = coco.record(indices[index]) if coco is not None else {}
        given = _ground_truth_boxes(own) if detected is None else _limited(detected[record["id"]], sample, record, own)
        truth.append(own)
        found.append(_segment(asked, sample, given, mask_rule))
        rows.append({"id": sample.id, "instances": sum(not t["iscrowd"] for t in own), "boxes": len(given.categories)})
        if progress is not None:
            progress.advance()
    return _summarise(asked, dataset, coco, indices, truth, found, rows, boxes=boxes, detected=detected, mask_rule=mask_rule, seed=seed)


def _summarise(asked: Predictor, dataset: Dataset, coco: Coco | None, indices: Sequence[int], truth: list[list[dict[str, Any]]],
               found: list[list[dict[str, Any]]], rows: list[dict[str, Any]], *, boxes: str | Path | None, detected: dict[Any, Boxes] | None,
               mask_rule: Rule, seed: int) -> Detection:
    total = sum(r["instances"] for r in rows)
    if not total:
        raise UsageError(f"'{dataset.name}' has no instance to find")
    records = [coco.record(i) if coco is not None else {} for i in indices]
    federated = any("neg_category_ids" in r for r in records)
    agnostic = coco is None or not coco.categories or (detected is not None and any(None in b.categories for b in detected.values()))
    if agnostic:
        truth, found = ([[{**row, "category_id": CATEGORY} for row in photo] for photo in side] for side in (truth, found))
    unchecked = {n: frozenset(r.get("not_exhaustive_category_ids", ())) for n, r in enumerate(records)} if federated and not agnostic else {}
    precision = Precision(match(truth, found, categories=not agnostic, most=MOST_BOXES_FEDERATED if federated else MOST_BOXES), unchecked)
    metrics = precision.metrics()
    protocol = {
        "task": "promptable_segmentation", "dataset": dataset.name, "data_fingerprint": dataset.fingerprint(),
        "labels": getattr(dataset, "labels", "ground truth"),
        "prompts": [f"the boxes of {Path(boxes).name}" if boxes is not None else "the bounding boxes of the ground truth's masks"],
        "scores": "the detector's" if boxes is not None else "predicted IoU (1 for models without)",
        "mask": ("masks 1..3, the best by predicted IoU" if mask_rule == "iou" else "always mask 0") + "; logits > 0",
        "metric": "pycocotools COCOeval's AP of masks" + (", category by category" if not agnostic else ", all categories as one")
                  + (", LVIS's federated rule: only categories looked for in a photo count there" if unchecked else ""),
        "metrics": {name: text for name, text in DETECTION.items() if name in metrics},
        "max_boxes": MOST_BOXES_FEDERATED if federated else MOST_BOXES, "image_size": getattr(asked, "image_size", None), "seed": seed,
    }
    return Detection(asked.name, {m: metrics[m] for m in DETECTION if m in metrics}, None, intervals(precision, seed=seed), len(rows), total, protocol,
                     rows, precision)


def read_boxes(path: str | Path, coco: Coco) -> dict[Any, Boxes]:
    """A COCO results json -> image id -> boxes, best first. Images without any have none.

    Raises:
        UsageError: another json, or boxes of images or categories that the ground truth does not have.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError("there is no such file of boxes", where=path)
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        rows = [(e["image_id"], [float(v) for v in e["bbox"]], float(e["score"]), e.get("category_id")) for e in entries]
        if not all(len(box) == 4 and all(map(math.isfinite, (*box, score))) for _, box, score, _ in rows):
            raise ValueError("a bbox should be four numbers and a score one")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UsageError(f"this is not a json of detections: {type(e).__name__} {e}", where=path,
                         hint='it should be a list of {"image_id", "category_id", "bbox": [x, y, width, height], "score"}') from e
    strange = sorted({str(i) for i, *_ in rows if i not in coco.image_ids})
    if strange:
        raise UsageError(f"{len(strange)} of the images with boxes are not in {coco.path.name}: {', '.join(strange[:5])}", where=path,
                         hint="give the boxes and the ground truth of the same data set")
    categories = {c for *_, c in rows}
    if None in categories and len(categories) > 1:
        raise UsageError("some of the boxes have a category_id and some have none", where=path)
    odd = sorted(str(c) for c in categories - coco.categories.keys() - {None})
    if coco.categories and odd:
        raise UsageError(f"{coco.path.name} does not list the categories {', '.join(odd[:5])}", where=path,
                         hint="COCO's category ids are not consecutive (1 to 90): were they renumbered?")
    by_image: dict[Any, list[tuple[list[float], float, int | None]]] = defaultdict(list)
    for image, box, score, category in sorted(rows, key=lambda r: -r[2]):
        by_image[image].append((box, score, category))
    found: dict[Any, Boxes] = defaultdict(lambda: Boxes(np.zeros((0, 4)), np.zeros(0), []))
    for image, own in by_image.items():
        xywh = np.array([o[0] for o in own])
        found[image] = Boxes(np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1), np.array([o[1] for o in own]), [o[2] for o in own])
    return found


def _coco_below(dataset: Dataset) -> tuple[Coco | None, list[int]]:
    """The COCO json that a dataset is or is a part of, and where its items are there."""
    indices, below = list(range(len(dataset))), dataset
    while isinstance(below, Subset):
        indices = [below.indices[i] for i in indices]
        below = below.dataset
    return (below if isinstance(below, Coco) else None), indices


def _ground_truth_boxes(truth: list[dict[str, Any]]) -> Boxes:
    own = [t for t in truth if not t["iscrowd"] and rle.area(t["segmentation"])]
    boxes = boxes_from_masks(rle.decode([t["segmentation"] for t in own], *own[0]["segmentation"]["size"])) if own else np.zeros((0, 4))
    return Boxes(boxes, np.full(len(own), np.nan), [t["category_id"] for t in own])


def _limited(boxes: Boxes, sample: Sample, record: dict[str, Any], truth: list[dict[str, Any]]) -> Boxes:
    """Clipped to the photo; those without area, and on LVIS those of categories that nobody looked for there, left out; then the best."""
    height, width = sample.image.shape[:2]
    xyxy = boxes.xyxy.clip(0, [width, height, width, height])
    keep = (xyxy[:, 2:] > xyxy[:, :2]).all(axis=1)
    most = MOST_BOXES
    if "neg_category_ids" in record:
        looked_for = {*record["neg_category_ids"], *(t["category_id"] for t in truth)}
        keep &= np.array([c in looked_for for c in boxes.categories], dtype=bool)
        most = MOST_BOXES_FEDERATED
    chosen = np.flatnonzero(keep)[:most]
    return Boxes(xyxy[chosen], boxes.scores[chosen], [boxes.categories[i] for i in chosen])


def _segment(asked: Predictor, sample: Sample, boxes: Boxes, rule: Rule) -> list[dict[str, Any]]:
    """Each box's mask as a row for `match`."""
    rows: list[dict[str, Any]] = []
    state: Any = asked.start(sample.image) if boxes.categories else None
    for first in range(0, len(boxes.categories), CHUNK):
        part = slice(first, first + CHUNK)
        prompts = Prompts.boxes(boxes.xyxy[part])
        if rule == "iou" and isinstance(asked, ModelPredictor):
            logits, predicted = asked.decode(state, prompts)
            best = select(predicted, np.ones(len(predicted), dtype=bool), rule)
            every = np.arange(len(best))
            masks, sure = state[1].mask_to_image(logits[every, best]) > THRESHOLD, predicted[every, best]
        else:
            answer = asked.masks(state, prompts)
            masks, sure = answer.masks, answer.scores
        scores = np.where(np.isnan(boxes.scores[part]), np.nan_to_num(sure, nan=1.0), boxes.scores[part])
        rows += [{"segmentation": run, "area": rle.area(run), "score": float(score), "category_id": category}
                 for run, score, category in zip(rle.encode(masks), scores, boxes.categories[part], strict=True)]
    return rows
