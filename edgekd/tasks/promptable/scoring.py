"""Evaluation of promptable segmentation: what a model does with boxes and clicks, in numbers that name their protocol.

What there is to measure, and every number's name, stands in `edgekd.tasks.promptable.metrics.GROUPS`. Today's defaults are boxes and clicks: prompts
and choice of mask are EdgeSAM's (arXiv 2312.06660, sec. 4: always the first mask); further clicks carry the last answer as a mask prompt,
as SAM's do (arXiv 2304.02643, App. A). IoU at the photo's own resolution, mean over instances.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.data.prompts import Prompts, boxes_from_masks, center_clicks, error_clicks, sample_rng
from edgekd.errors import UsageError
from edgekd.protocols import Dataset, Promptable, Sample
from edgekd.tasks.evaluation import Evaluation, Progress
from edgekd.tasks.promptable.alternatives import oracle
from edgekd.tasks.promptable.interactive import MOST_CLICKS, number_of_clicks
from edgekd.tasks.promptable.metrics import AGREEMENTS, DEFAULT_GROUPS, GROUPS, bootstrap_interval, check_groups, iou
from edgekd.tasks.promptable.predictor import DEFAULT_RULE, Masks, Predictor, Rule, max_points, predictor

if TYPE_CHECKING:
    from edgekd.tasks.promptable.everything import Mode, Settings
    from edgekd.tasks.promptable.recall import EverythingRecall

MIN_AREA = 0.0005
"""Share of the photo below which an instance is left out: about 33 pixels of 256 x 256, two cells of the mask grid there."""
MAX_INSTANCES = 12
METRICS = tuple(name for group in DEFAULT_GROUPS for name in GROUPS[group])
"""The names of the default metrics."""


@dataclass(frozen=True)
class Row:
    """One photo: metric -> (sum over its instances, their number)."""

    id: str
    instances: int
    values: Mapping[str, tuple[float, int]]

    def to_dict(self) -> dict[str, Any]:
        """As in `Evaluation.per_image`."""
        means = {m: round(total / count, 6) for m, (total, count) in self.values.items()}
        others = {m: count for m, (_, count) in self.values.items() if count != self.instances}
        return {"id": self.id, "instances": self.instances, **means, **({"counts": others} if others else {})}


def evaluate(model: Promptable | Predictor, dataset: Dataset, *, metrics: Sequence[str] = DEFAULT_GROUPS, teacher: Promptable | Predictor | None = None,
             max_instances: int | None = MAX_INSTANCES, min_area: float = MIN_AREA, seed: int = 0, single_click_rule: Rule = DEFAULT_RULE,
             feed_mask: bool = True, everything_mode: Mode = "auto", everything_settings: Settings | None = None,
             progress: Progress | None = None) -> Evaluation:
    """Ask a model every prompt of the protocol on every labelled photo of a dataset.

    Each photo is encoded once (segment-everything encodes it again) and each step decodes all its instances in one call.

    Args:
        metrics: groups of `edgekd.tasks.promptable.metrics.GROUPS`: box, center, clicks, oracle, noc, everything.
        teacher: asked the same boxes and centre clicks. Wrap it in `Remembered` when several candidates are evaluated.
        max_instances: at most so many an image, drawn at random by `seed` and the sample's id, so that a subset of the
            dataset asks the same questions (None: all). Segment-everything is measured against all.
        min_area: leave out instances below this share of the photo.
        single_click_rule: see `edgekd.tasks.promptable.predictor.select`.
        feed_mask: give the logits of the last answer along with the next click, as SAM does (arXiv 2304.02643, App. A); EdgeSAM's
            evaluation does not.
        everything_mode, everything_settings: see `edgekd.tasks.promptable.everything.everything`; without settings `edgekd.tasks.promptable.recall.SETTINGS`.

    Raises:
        UsageError: the dataset has no masks, no instance is large enough, or the model cannot do what is asked for.
    """
    groups = check_groups(metrics)
    if not dataset.has_masks:
        raise UsageError(f"'{dataset.name}' has no masks to evaluate against",
                         hint="give labelled data (a COCO json, a pack, scenes:seed=1,count=100), or pseudo-label the photos with a teacher")
    student = predictor(model, rule=single_click_rule)
    reference = predictor(teacher, rule=single_click_rule) if teacher is not None else None
    asker = _Asker(student, reference, groups, seed, feed_mask)
    segmenter = _segmenter(student, everything_mode, everything_settings) if "everything" in groups else None
    rows: list[Row] = []
    for index in range(len(dataset)):
        sample = dataset[index]
        truth = choose_instances(sample, max_instances, min_area, seed) if groups != ("everything",) else np.zeros((0, 1, 1), dtype=bool)
        values = {m: (float(v.sum()), len(v)) for m, v in asker.ask(sample, truth).items()} if len(truth) else {}
        if segmenter is not None:
            values.update(segmenter.add(dataset, index, sample))
        if values:
            rows.append(Row(sample.id, len(truth), values))
        if progress is not None:
            progress.advance()
    if not any(r.instances for r in rows) and (groups != ("everything",) or not rows):
        raise UsageError(f"'{dataset.name}' has no instance as large as {min_area:.2%} of its photo", hint="lower the smallest area")
    settings = {"max_instances": max_instances, "min_area": min_area, "seed": seed, "single_click_rule": single_click_rule, "feed_mask": feed_mask}
    protocol = _protocol(student, reference, dataset, groups, settings)
    if segmenter is not None:
        protocol["everything"] = segmenter.protocol()
    return _summarise(student.name, rows, groups, protocol, seed)


def _segmenter(student: Predictor, mode: Mode, settings: Settings | None) -> EverythingRecall:
    from edgekd.tasks.promptable.recall import SETTINGS, EverythingRecall

    return EverythingRecall(student, mode=mode, settings=settings or SETTINGS)


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


@dataclass(frozen=True)
class _Asker:
    """The prompts of the groups that are asked for."""

    student: Predictor
    teacher: Predictor | None
    groups: tuple[str, ...]
    seed: int
    feed_mask: bool

    def ask(self, sample: Sample, truth: np.ndarray) -> dict[str, np.ndarray]:
        """All steps of the protocol on one photo: metric -> (K,) values of its instances."""
        boxes, clicks = Prompts.boxes(boxes_from_masks(truth)), Prompts.clicks(center_clicks(truth))
        state = self.student.start(sample.image)
        found: dict[str, np.ndarray] = {}
        answers: dict[str, Masks] = {}
        if "box" in self.groups:
            answers["box"] = self.student.masks(state, boxes)
        if {"center", "clicks", "noc"} & set(self.groups):
            answers["center"] = self.student.masks(state, clicks)
        for kind in ("box", "center"):
            if kind in self.groups:
                found[f"{kind}_miou"] = iou(answers[kind].masks, truth)
        if self.teacher is not None:
            its = self.teacher.start(sample.image)
            for kind, prompts in (("box", boxes), ("center", clicks)):
                if kind in self.groups:
                    found[f"teacher_agreement.{kind}"] = iou(answers[kind].masks, self.teacher.masks(its, prompts).masks)
        if "clicks" in self.groups:
            found.update(self._more_clicks(state, sample, truth, clicks, answers["center"]))
        if "oracle" in self.groups:
            found.update(oracle(self.student, state, boxes, truth, "box") | oracle(self.student, state, clicks, truth, "center"))
        if "noc" in self.groups:
            found.update(number_of_clicks(self.student, state, truth, first=answers["center"], feed_mask=self.feed_mask))
        return found

    def _more_clicks(self, state: Any, sample: Sample, truth: np.ndarray, clicks: Prompts, answer: Masks) -> dict[str, np.ndarray]:
        found = {}
        for step in (1, 2):
            clicks = clicks.join(error_clicks(answer.masks, truth, sample_rng(self.seed, sample.id, step)))
            answer = self.student.masks(state, clicks, answer.logits if self.feed_mask else None)
            found[f"center_plus{step}_miou"] = iou(answer.masks, truth)
        return found


def _protocol(student: Predictor, teacher: Predictor | None, dataset: Dataset, groups: tuple[str, ...], settings: dict[str, Any]) -> dict[str, Any]:
    """What somebody else needs to get the same numbers."""
    by_iou = settings["single_click_rule"] == "iou"
    mask = "one click: of masks 1..3 the best by predicted IoU; otherwise mask 0" if by_iou else "always mask 0"
    fed = ", with the last answer as a mask prompt" if settings["feed_mask"] else ""
    limit = max_points(student)
    prompts = {
        "box": "box: bounding box of the mask, on pixel edges",
        "center": "center: one click at the maximum of the mask's distance transform",
        "clicks": f"center_plus1, center_plus2: clicks added one by one, uniform over the wrong pixels{fed}",
        "oracle": "oracle, iou_head: the same boxes and centre clicks, all four masks",
        "noc": f"noc: the centre click, then up to {MOST_CLICKS} in all, each at the maximum of the wrong pixels' distance transforms (missed and "
               f"superfluous apart){fed}; an instance not reached counts {MOST_CLICKS}"
               + (f"; the model takes {limit} points, what it has not reached by then counts as not reached" if limit and limit < MOST_CLICKS else ""),
    }
    return {
        "task": "promptable_segmentation",
        "dataset": dataset.name,
        "data_fingerprint": dataset.fingerprint(),
        "labels": getattr(dataset, "labels", "ground truth"),
        "prompts": [text for group, text in prompts.items() if group in groups],
        "mask": f"{mask}; logits > 0",
        "metric": "IoU at the photo's own resolution, mean over instances; 95 % intervals by bootstrap over photos",
        "metrics": {name: text for group in groups for name, text in GROUPS[group].items()},
        "image_size": getattr(student, "image_size", None),
        "teacher": teacher.name if teacher is not None else None,
        **settings,
    }


def _summarise(name: str, rows: list[Row], groups: tuple[str, ...], protocol: dict[str, Any], seed: int) -> Evaluation:
    """Means, intervals and per-photo rows."""
    means: dict[str, float] = {}
    intervals: dict[str, tuple[float, float]] = {}
    names = [m for group in groups for m in GROUPS[group]]
    agreements = {f"teacher_agreement.{a}": a for a in AGREEMENTS}
    for metric in [*names, *agreements]:
        values = np.array([row.values[metric] for row in rows if metric in row.values]).reshape(-1, 2)
        if len(values):
            means[metric] = float(values[:, 0].sum() / values[:, 1].sum())
            intervals[metric] = bootstrap_interval(values[:, 0], values[:, 1], seed=seed)
    agreement = {a: means[m] for m, a in agreements.items() if m in means}
    return Evaluation(name, {m: means[m] for m in names if m in means}, agreement or None, intervals, len(rows), sum(r.instances for r in rows),
                      protocol, [r.to_dict() for r in rows])
