"""Evaluation of promptable segmentation: what a model does with boxes and clicks, in numbers that name their protocol.

Names: `box_miou` (the ground-truth box), `center_miou` (one click at the mask's innermost pixel), `center_plus1_miou` and
`center_plus2_miou` (one and two more clicks, each drawn uniformly from the pixels the model got wrong),
`teacher_agreement` (IoU with the teacher's mask on the same box, the same centre click). IoU at the photo's own
resolution, mean over instances. Prompts and choice of mask are EdgeSAM's (arXiv 2312.06660, sec. 4: always the first mask); further
clicks carry the last answer as a mask prompt, as SAM's do (arXiv 2304.02643, App. A).
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from edgekd.data.prompts import Prompts, boxes_from_masks, center_clicks, error_clicks, sample_rng
from edgekd.errors import UsageError
from edgekd.protocols import Dataset, Promptable, Sample
from edgekd.tasks.metrics import bootstrap_interval, iou
from edgekd.tasks.predictor import DEFAULT_RULE, Masks, Predictor, Rule, predictor

MIN_AREA = 0.0005
"""Share of the photo below which an instance is left out: about 33 pixels of 256 x 256, two cells of the mask grid there."""
MAX_INSTANCES = 12
METRICS = ("box_miou", "center_miou", "center_plus1_miou", "center_plus2_miou")
AGREEMENTS = ("box", "center")


class Progress(Protocol):
    """What `edgekd.console.progress` yields."""

    def advance(self, n: int = 1, **fields: object) -> None: ...


@dataclass
class Evaluation:
    """Means over instances (0..1), their 95 % intervals, how they were made, and the values of each photo."""

    model: str
    metrics: dict[str, float]
    teacher_agreement: dict[str, float] | None
    interval95: dict[str, tuple[float, float]]
    """Metric (`teacher_agreement.box` for agreements) -> (low, high), bootstrapped over photos."""
    images: int
    instances: int
    protocol: dict[str, Any]
    per_image: list[dict[str, Any]] = field(default_factory=list)
    """One row a photo: `id`, `instances`, and the mean of each metric over its instances."""

    @property
    def accuracy(self) -> dict[str, Any]:
        """The numbers alone, as a report's `accuracy` holds them."""
        agreement = {"teacher_agreement": self.teacher_agreement} if self.teacher_agreement else {}
        return {**self.metrics, **agreement}

    def to_dict(self, *, per_image: bool = True) -> dict[str, Any]:
        """A JSON document, the metrics at the top."""
        document = {"model": self.model, **self.accuracy, "images": self.images, "instances": self.instances,
                    "interval95": {k: list(v) for k, v in self.interval95.items()}, "protocol": self.protocol}
        return {**document, "per_image": self.per_image} if per_image else document


def evaluate(model: Promptable | Predictor, dataset: Dataset, *, teacher: Promptable | Predictor | None = None,
             max_instances: int | None = MAX_INSTANCES, min_area: float = MIN_AREA, seed: int = 0, single_click_rule: Rule = DEFAULT_RULE,
             feed_mask: bool = True, progress: Progress | None = None) -> Evaluation:
    """Ask a model every prompt of the protocol on every labelled photo of a dataset.

    Each photo is encoded once and each step decodes all its instances in one call.

    Args:
        teacher: asked the same boxes and centre clicks. Wrap it in `Remembered` when several candidates are evaluated.
        max_instances: at most so many an image, drawn at random by `seed` and the sample's id, so that a subset of the
            dataset asks the same questions (None: all).
        min_area: leave out instances below this share of the photo.
        single_click_rule: see `edgekd.tasks.predictor.select`.
        feed_mask: give the logits of the last answer along with the next click, as SAM does (arXiv 2304.02643, App. A); EdgeSAM's
            evaluation does not.

    Raises:
        UsageError: the dataset has no masks.
    """
    if not dataset.has_masks:
        raise UsageError(f"'{dataset.name}' has no masks to evaluate against",
                         hint="give labelled data (a COCO json, a pack, scenes:seed=1,count=100), or pseudo-label the photos with a teacher")
    student = predictor(model, rule=single_click_rule)
    reference = predictor(teacher, rule=single_click_rule) if teacher is not None else None
    rows: list[tuple[str, dict[str, np.ndarray]]] = []
    for index in range(len(dataset)):
        sample = dataset[index]
        truth = choose_instances(sample, max_instances, min_area, seed)
        if len(truth):
            rows.append((sample.id, _ask(student, reference, sample, truth, seed, feed_mask)))
        if progress is not None:
            progress.advance()
    if not rows:
        raise UsageError(f"'{dataset.name}' has no instance as large as {min_area:.2%} of its photo", hint="lower the smallest area")
    protocol = _protocol(student, reference, dataset, max_instances=max_instances, min_area=min_area, seed=seed,
                         single_click_rule=single_click_rule, feed_mask=feed_mask)
    return _summarise(student.name, rows, protocol, seed)


def choose_instances(sample: Sample, most: int | None, min_area: float, seed: int) -> np.ndarray:
    """The masks (K, H, W) bool of a sample that are asked for, in their own order; empty when there are none."""
    height, width = sample.image.shape[:2]
    if sample.masks is None:
        return np.zeros((0, height, width), dtype=bool)
    masks = sample.masks.astype(bool, copy=False)
    large = np.flatnonzero(masks.sum(axis=(1, 2)) >= max(1.0, min_area * height * width))
    if most is not None and len(large) > most:
        large = np.sort(sample_rng(seed, sample.id, 0).choice(large, most, replace=False))
    return masks[large]


def _ask(student: Predictor, teacher: Predictor | None, sample: Sample, truth: np.ndarray, seed: int, feed_mask: bool) -> dict[str, np.ndarray]:
    """All steps of the protocol on one photo: metric -> (K,) IoU of its instances."""
    boxes, clicks = Prompts.boxes(boxes_from_masks(truth)), Prompts.clicks(center_clicks(truth))
    state = student.start(sample.image)
    box, center = student.masks(state, boxes), student.masks(state, clicks)
    found = {"box_miou": iou(box.masks, truth), "center_miou": iou(center.masks, truth)}
    if teacher is not None:
        its = teacher.start(sample.image)
        found["teacher_agreement.box"] = iou(box.masks, teacher.masks(its, boxes).masks)
        found["teacher_agreement.center"] = iou(center.masks, teacher.masks(its, clicks).masks)
    answer: Masks = center
    for step in (1, 2):
        clicks = clicks.join(error_clicks(answer.masks, truth, sample_rng(seed, sample.id, step)))
        answer = student.masks(state, clicks, answer.logits if feed_mask else None)
        found[f"center_plus{step}_miou"] = iou(answer.masks, truth)
    return found


def _protocol(student: Predictor, teacher: Predictor | None, dataset: Dataset, **settings: Any) -> dict[str, Any]:
    """What somebody else needs to get the same numbers."""
    by_iou = settings["single_click_rule"] == "iou"
    mask = "one click: of masks 1..3 the best by predicted IoU; otherwise mask 0" if by_iou else "always mask 0"
    return {
        "task": "promptable_segmentation",
        "dataset": dataset.name,
        "data_fingerprint": dataset.fingerprint(),
        "labels": getattr(dataset, "labels", "ground truth"),
        "prompts": ["box: bounding box of the mask, on pixel edges", "center: one click at the maximum of the mask's distance transform",
                    "center_plus1, center_plus2: clicks added one by one, uniform over the wrong pixels"
                    + (", with the last answer as a mask prompt" if settings["feed_mask"] else "")],
        "mask": f"{mask}; logits > 0",
        "metric": "IoU at the photo's own resolution, mean over instances; 95 % intervals by bootstrap over photos",
        "image_size": getattr(student, "image_size", None),
        "teacher": teacher.name if teacher is not None else None,
        **settings,
    }


def _summarise(name: str, rows: list[tuple[str, dict[str, np.ndarray]]], protocol: dict[str, Any], seed: int) -> Evaluation:
    """Means, intervals and per-photo rows of the IoU of every instance."""
    counts = np.array([len(values["box_miou"]) for _, values in rows])
    means: dict[str, float] = {}
    intervals: dict[str, tuple[float, float]] = {}
    for metric in rows[0][1]:
        sums = np.array([values[metric].sum() for _, values in rows])
        means[metric] = float(sums.sum() / counts.sum())
        intervals[metric] = bootstrap_interval(sums, counts, seed=seed)
    agreement = {a: means[f"teacher_agreement.{a}"] for a in AGREEMENTS if f"teacher_agreement.{a}" in means}
    per_image = [{"id": i, "instances": len(v["box_miou"]), **{m: round(float(x.mean()), 6) for m, x in v.items()}} for i, v in rows]
    return Evaluation(name, {m: means[m] for m in METRICS}, agreement or None, intervals, len(rows), int(counts.sum()), protocol, per_image)
