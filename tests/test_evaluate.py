"""The evaluation protocol, on models whose answers are known."""
from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from oracles import Empty, Oracle, Painted, TorchOracle, answer, painted

from edgekd.data import Subset, open_data
from edgekd.data.images import Frame
from edgekd.data.prompts import Prompts
from edgekd.errors import UsageError
from edgekd.protocols import ABSENT, Preprocess, Promptable, Sample
from edgekd.tasks import names
from edgekd.tasks.promptable.everything import stability, suppress
from edgekd.tasks.promptable.metrics import GROUPS, bootstrap_interval, iou
from edgekd.tasks.promptable.predictor import Masks, ModelPredictor, Predictor, Remembered, predictor, select
from edgekd.tasks.promptable.pseudo import pseudo_label
from edgekd.tasks.promptable.scoring import METRICS, choose_instances, evaluate

ONE = pytest.approx(1.0, abs=0.02)
"""Right on the mask grid: the photo's mask loses only the pixels at its corners, which bilinear enlargement rounds off."""


def test_the_task_is_named() -> None:
    assert "promptable_segmentation" in names()


def test_the_right_mask_scores_one() -> None:
    found = evaluate(Oracle(), Painted())
    assert set(found.metrics) == set(METRICS) and all(v == ONE for v in found.metrics.values())
    assert (found.images, found.instances) == (3, 9) and found.teacher_agreement is None


def test_the_empty_mask_scores_zero() -> None:
    found = evaluate(Empty(), Painted())
    assert all(v == 0 for v in found.metrics.values()) and found.interval95["box_miou"] == (0, 0)


def test_agreement_with_itself_is_one_and_with_another_is_not() -> None:
    same = evaluate(Oracle(), Painted(), teacher=Oracle("teacher"))
    assert same.teacher_agreement == {"box": 1.0, "center": 1.0} and same.protocol["teacher"] == "teacher"
    other = evaluate(Empty(), Painted(), teacher=Oracle("teacher"))
    assert other.teacher_agreement == {"box": 0.0, "center": 0.0} and "teacher_agreement.box" in other.interval95


def test_a_torch_model_runs_without_gradients_and_keeps_its_mode() -> None:
    model = TorchOracle()
    assert isinstance(model, Promptable)
    for training in (True, False):
        model.train(training)
        assert evaluate(model, Painted(count=1)).metrics["box_miou"] == ONE
        assert model.training is training


def test_torch_and_numpy_models_give_the_same_document() -> None:
    first, second = evaluate(TorchOracle(), Painted()).to_dict(), evaluate(Oracle("torch-oracle"), Painted()).to_dict()
    assert first == second


def test_one_embedding_a_photo_and_one_decode_a_step() -> None:
    model, teacher = Oracle(), Oracle("teacher")
    evaluate(model, Painted(count=2, instances=3), teacher=teacher)
    assert (model.embeds, model.decodes) == (2, 2 * 4)
    assert (teacher.embeds, teacher.decodes) == (2, 2 * 2)
    assert not any(teacher.fed)


@pytest.mark.parametrize(("more", "fed"), [({}, [False, False, True, True]), ({"feed_mask": False}, [False] * 4)], ids=["SAM's", "EdgeSAM's"])
def test_the_last_answer_goes_with_further_clicks(more: dict[str, bool], fed: list[bool]) -> None:
    model = Oracle()
    document = evaluate(model, Painted(count=1), **more).to_dict()  # type: ignore[arg-type]
    assert model.fed == fed
    assert any("mask prompt" in p for p in document["protocol"]["prompts"]) == any(fed)


class _Noisy(Oracle):
    """The right mask with a strip of errors, so that clicks have something to correct."""

    def decode(self, *args: object, **more: object) -> tuple[np.ndarray, np.ndarray]:
        masks, score = super().decode(*args, **more)  # type: ignore[arg-type]
        masks[:, :, 3:5] *= -1
        return masks, score


def test_batched_equals_one_by_one() -> None:
    model, sample = _Noisy(), Painted()[0]
    asked = predictor(model)
    assert sample.masks is not None
    boxes = Prompts.boxes(np.array([[0, 0, 16, 12], [0, 20, 20, 32], [0, 40, 24, 52]]))
    clicks = Prompts.clicks(np.array([[6, 6], [6, 26], [6, 46]])).join(Prompts.clicks(np.array([[9, 9], [1, 1], [3, 3]]), np.array([0, ABSENT, 1])))
    for prompts in (boxes, clicks):
        state = asked.start(sample.image)
        together = asked.masks(state, prompts)
        for i in range(3):
            alone = asked.masks(asked.start(sample.image), prompts[i:i + 1])
            assert np.array_equal(alone.masks[0], together.masks[i]) and alone.scores[0] == together.scores[i]


def test_a_subset_asks_the_same_questions() -> None:
    data = Painted(count=3, instances=3)
    whole = evaluate(_Noisy(), data, max_instances=2)
    part = evaluate(_Noisy(), Subset(data, [2]), max_instances=2)
    assert part.per_image[0] == whole.per_image[2] and whole.instances == 6
    assert evaluate(_Noisy(), data, max_instances=2).to_dict() == whole.to_dict()


def test_every_instance_counts_the_same() -> None:
    data = Painted(count=2, instances=3)
    first = data.samples[0]
    data.samples[0] = Sample(first.id, first.image, first.masks[:1] if first.masks is not None else None)
    found = evaluate(_Noisy(), data)
    weights = [row["instances"] for row in found.per_image]
    assert weights == [1, 3] and found.instances == 4
    assert found.metrics["box_miou"] == pytest.approx(np.average([r["box_miou"] for r in found.per_image], weights=weights), abs=1e-5)


def test_instances_are_chosen_by_area_and_seed() -> None:
    masks = np.zeros((5, 100, 100), bool)
    for k in range(5):
        masks[k, :20, 20 * k:20 * k + 20] = True
    masks[2] = False
    masks[2, 0, 0] = True  # 1 of 10,000 pixels
    sample = Sample("x", np.zeros((100, 100, 3), np.uint8), masks)
    assert len(choose_instances(sample, None, 0.0005, 0)) == 4 and len(choose_instances(sample, None, 0, 0)) == 5
    drawn = choose_instances(sample, 2, 0.0005, 0)
    assert len(drawn) == 2 and np.array_equal(drawn, choose_instances(sample, 2, 0.0005, 0))
    assert any(not np.array_equal(drawn, choose_instances(sample, 2, 0.0005, s)) for s in range(1, 9))
    assert choose_instances(Sample("y", sample.image), 2, 0, 0).shape == (0, 100, 100)
    assert len(choose_instances(Sample("z", sample.image, np.zeros((3, 100, 100), bool)), None, 0, 0)) == 0


def test_photos_without_instances_do_not_count() -> None:
    data = Painted(count=2)
    data.samples.append(Sample("none", np.zeros((64, 64, 3), np.uint8), None))
    assert evaluate(Oracle(), data).images == 2
    with pytest.raises(UsageError, match="no instance"):
        evaluate(Oracle(), data, min_area=0.9)


def test_unlabelled_data_is_refused_with_a_way_out() -> None:
    data = Painted()
    data.has_masks = False
    with pytest.raises(UsageError, match=r"no masks[\s\S]*hint:.*pseudo"):
        evaluate(Oracle(), data)


def test_the_document_states_its_protocol_and_is_json() -> None:
    document = evaluate(Oracle(), Painted(), teacher=Oracle("t"), max_instances=2, seed=5, single_click_rule="iou").to_dict()
    again = json.loads(json.dumps(document))
    assert again["teacher_agreement"] == {"box": 1.0, "center": 1.0} and again["images"] == 3 and len(again["per_image"]) == 3
    protocol = again["protocol"]
    assert protocol["max_instances"] == 2 and protocol["seed"] == 5 and protocol["image_size"] == 64 and protocol["dataset"] == "painted"
    assert protocol["labels"] == "ground truth" and "predicted IoU" in protocol["mask"] and "original" not in protocol["data_fingerprint"]
    plain = evaluate(Oracle(), Painted()).to_dict(per_image=False)
    assert "per_image" not in plain and plain["protocol"]["mask"].startswith("always mask 0")


def test_names_of_the_default_are_what_reports_hold() -> None:
    assert METRICS == ("box_miou", "center_miou", "center_plus1_miou", "center_plus2_miou")
    found = evaluate(Oracle(), Painted(count=1))
    assert set(found.protocol["metrics"]) == set(METRICS) and "everything" not in found.protocol
    assert set(found.per_image[0]) == {"id", "instances", *METRICS}


@pytest.mark.parametrize("group", list(GROUPS))
def test_each_group_alone_gives_its_numbers_and_says_how(group: str) -> None:
    document = evaluate(Oracle(), Painted(count=2), metrics=(group,)).to_dict()
    wanted = {n for n in GROUPS[group] if not n.endswith(("_medium", "_large"))}  # the painted instances are small
    assert wanted == set(GROUPS[group]) & set(document) == set(document["interval95"]) == set(document["protocol"]["metrics"]) & set(document)
    assert document["images"] == 2 and (group == "everything" or document["instances"] == 6) and json.dumps(document)
    assert group == "everything" or any(group in p or "oracle" in p for p in document["protocol"]["prompts"])


def test_groups_do_not_disturb_each_other() -> None:
    every = evaluate(_Noisy(), Painted(), metrics=tuple(GROUPS), teacher=Oracle("t"))
    plain = evaluate(_Noisy(), Painted(), teacher=Oracle("t"))
    assert {m: every.metrics[m] for m in METRICS} == plain.metrics and every.teacher_agreement == plain.teacher_agreement
    assert {m: every.interval95[m] for m in plain.interval95} == plain.interval95
    only = evaluate(_Noisy(), Painted(), metrics=("center",), teacher=Oracle("t"))
    assert set(only.metrics) == {"center_miou"} and set(only.teacher_agreement or {}) == {"center"}
    assert evaluate(_Noisy(), Painted(), metrics=("clicks", "box", "center", "box")).to_dict() == evaluate(_Noisy(), Painted()).to_dict()


def test_unknown_groups_and_none() -> None:
    with pytest.raises(UsageError, match=r"metric group 'clics'[\s\S]*did you mean 'clicks'"):
        evaluate(Oracle(), Painted(), metrics=("clics",))
    with pytest.raises(UsageError, match="nothing to measure"):
        evaluate(Oracle(), Painted(), metrics=())


class _Head(Oracle):
    """Right in slot 2 only; its IoU head knows it or not."""

    def __init__(self, knows: bool) -> None:
        super().__init__()
        self.knows = knows

    def decode(self, *args: object, **more: object) -> tuple[np.ndarray, np.ndarray]:
        masks, score = super().decode(*args, **more)  # type: ignore[arg-type]
        masks[:, [0, 1, 3]] = -1
        return masks, score if self.knows else 1 - score


def test_the_gap_tells_a_good_iou_head_from_a_bad_one() -> None:
    good, bad = (evaluate(_Head(k), Painted(), metrics=("box", "center", "oracle")).metrics for k in (True, False))
    for kind in ("box", "center"):
        assert good[f"{kind}_miou"] == 0 and good[f"{kind}_oracle_miou"] == good[f"{kind}_iou_head_miou"] == ONE and good[f"{kind}_iou_head_gap"] == 0
        assert bad[f"{kind}_oracle_miou"] == ONE and bad[f"{kind}_iou_head_miou"] == 0 and bad[f"{kind}_iou_head_gap"] == ONE


def test_a_baseline_has_one_mask_and_none_without_a_prompt() -> None:
    from edgekd.tasks.promptable import baselines

    disc = baselines.load("baseline/disc")
    assert evaluate(disc, Painted(count=1), metrics=("noc",)).metrics["noc80"] > 1
    for group in ("oracle", "everything"):
        with pytest.raises(UsageError, match="baseline/disc"):
            evaluate(disc, Painted(count=1), metrics=(group,))


class _Limited(Oracle):
    """Takes two points."""

    max_points = 2


def test_more_points_than_a_model_takes_are_refused() -> None:
    asked = predictor(_Limited())
    state = asked.start(Painted()[0].image)
    box = Prompts.boxes(np.array([[0, 0, 16, 12]]))
    assert asked.masks(state, box.join(Prompts.clicks(np.zeros((1, 2)), np.array([ABSENT])))).masks.any()
    with pytest.raises(UsageError, match=r"at most 2 points[\s\S]*given 3"):
        asked.masks(state, box.join(Prompts.clicks(np.array([[3, 3]]))))
    with pytest.raises(UsageError, match="oracle"):
        evaluate(_Limited(), Painted())


class _Wide(Oracle):
    """Sees 64 px, stretched, is prompted in a square of 128 and gives masks of 32: an EfficientViT-SAM that stretches."""

    def __init__(self) -> None:
        super().__init__()
        self.preprocess = Preprocess(64, mean=(0, 0, 0), std=(1, 1, 1), fit="stretch", prompt_size=128)

    def decode(self, embedding: np.ndarray, points: np.ndarray, labels: np.ndarray, mask_input: object = None, has_mask: object = None) -> tuple[np.ndarray, np.ndarray]:
        assert mask_input is None or mask_input.shape[1:] == (1, 32, 32)  # type: ignore[attr-defined]
        twice = embedding.repeat(2, axis=2).repeat(2, axis=3)
        right = np.stack([answer(twice[0, 0], p, k) for p, k in zip(points, labels, strict=True)]).astype(np.float32)
        return np.stack([right] * 4, axis=1), np.tile(np.float32([0.1, 0.2, 0.9, 0.3]), (len(points), 1))


@pytest.mark.parametrize("size", [(64, 64), (64, 128), (128, 32)])
def test_a_stretched_photo_and_a_larger_prompt_square(size: tuple[int, int]) -> None:
    masks = np.zeros((2, *size), bool)
    masks[0, size[0] // 4:size[0] // 2, size[1] // 8:size[1] // 2] = True
    masks[1, size[0] * 5 // 8:, size[1] // 2:] = True
    data = Painted(count=1)
    data.samples = [Sample("one", painted(masks), masks)]
    found = evaluate(_Wide(), data, metrics=("box", "center", "clicks", "noc", "oracle"))
    # at the border between stretched pixels a little is lost
    assert all(found.metrics[m] > 0.85 for m in (*METRICS, "box_oracle_miou")) and found.metrics["noc80"] == 1


def test_progress_is_told_of_every_photo() -> None:
    class Count:
        done = 0

        def advance(self, n: int = 1, **fields: object) -> None:
            self.done += n

    count = Count()
    evaluate(Oracle(), Painted(count=3), progress=count)
    assert count.done == 3


def test_select() -> None:
    scores = np.array([[0.9, 0.1, 0.2, 0.8], [0.0, 0.7, 0.2, 0.1]])
    both, none = np.array([True, True]), np.array([False, False])
    assert select(scores, both).tolist() == [3, 1] and select(scores, none).tolist() == [0, 0]
    assert select(scores, np.array([False, True])).tolist() == [0, 1] and select(scores, both, "first").tolist() == [0, 0]
    with pytest.raises(ValueError, match="rule"):
        select(scores, both, "best")  # type: ignore[arg-type]


def test_the_single_click_rule_reaches_the_model() -> None:
    class Slots(Oracle):
        """Right in slot 2 only."""

        def decode(self, *args: object, **more: object) -> tuple[np.ndarray, np.ndarray]:
            masks, score = super().decode(*args, **more)  # type: ignore[arg-type]
            masks[:, 0] = -1
            return masks, score

    by_iou, first = (evaluate(Slots(), Painted(), single_click_rule=r).metrics for r in ("iou", "first"))  # type: ignore[arg-type]
    assert by_iou["center_miou"] == ONE and first["center_miou"] == 0
    assert by_iou["box_miou"] == by_iou["center_plus1_miou"] == 0  # a box, or two clicks: slot 0 under both rules


def test_a_remembered_teacher_works_once() -> None:
    teacher = Oracle("teacher")
    memory = Remembered(teacher)
    first = evaluate(Oracle(), Painted(), teacher=memory)
    calls = (teacher.embeds, teacher.decodes)
    second = evaluate(Oracle(), Painted(), teacher=memory)
    assert (teacher.embeds, teacher.decodes) == calls == (3, 6)
    assert first.to_dict() == second.to_dict() == evaluate(Oracle(), Painted(), teacher=teacher).to_dict()
    with pytest.raises(ValueError, match="fed-back"):
        memory.masks(memory.start(Painted()[0].image), Prompts.clicks(np.zeros((1, 2))), np.zeros((1, 16, 16)))


def test_predictors_stay_what_they_are() -> None:
    asked = predictor(Oracle())
    assert isinstance(asked, ModelPredictor) and isinstance(asked, Predictor) and predictor(asked) is asked
    state = asked.start(Painted()[0].image)
    assert isinstance(state[1], Frame) and isinstance(asked.masks(state, Prompts.clicks(np.array([[5, 5]]))), Masks)


def test_iou_of_known_masks() -> None:
    a, b = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    assert iou(a, b) == 1
    a[:2], b[1:3] = True, True
    assert iou(a, b) == pytest.approx(4 / 12)
    assert iou(np.stack([a, a]), np.stack([a, ~a])).tolist() == [1, 0]


def test_bootstrap_holds_the_mean_and_shrinks_with_more_photos() -> None:
    rng = np.random.default_rng(0)
    values = rng.uniform(size=400)
    narrow, wide = (bootstrap_interval(values[:n] * 3, np.full(n, 3)) for n in (400, 25))
    assert narrow[0] < values.mean() < narrow[1] and narrow[1] - narrow[0] < wide[1] - wide[0]
    assert bootstrap_interval(values, np.ones(400)) == bootstrap_interval(values, np.ones(400))
    assert bootstrap_interval(np.array([2.0]), np.array([4])) == (0.5, 0.5)


def test_pseudo_labels_are_the_teachers_own_masks() -> None:
    photos = Painted(count=2)
    model = Oracle("teacher")
    data = pseudo_label(model, photos, points_per_side=16)
    assert len(data) == 2 and data.has_masks and "teacher" in data.name and "not ground truth" in data.labels
    masks = data[0].masks
    truth = photos[0].masks
    assert masks is not None and truth is not None and masks.dtype == bool and masks.shape[1:] == (64, 64)
    overlap = np.array([[float(iou(m, t)) for t in truth] for m in masks])
    assert len(masks) == 3 and (overlap.max(axis=1) > 0.98).all()
    decodes = model.decodes
    assert data[0].masks is not None and model.decodes == decodes  # kept
    found = evaluate(model, data, teacher=model)
    assert found.metrics["box_miou"] > 0.98 and found.protocol["labels"] == data.labels


def test_pseudo_labels_fall_back_to_the_best_guess_and_to_none() -> None:
    photos = Painted(count=1)
    strict = pseudo_label(Oracle(), photos, points_per_side=16, iou_thresh=0.99)[0].masks
    assert strict is not None and len(strict) == 1
    nothing = pseudo_label(Empty(), photos)[0].masks
    assert nothing is not None and nothing.shape == (0, 64, 64)
    few = pseudo_label(Oracle(), photos, points_per_side=16, max_instances=2)[0].masks
    assert few is not None and len(few) == 2
    prints = {pseudo_label(Oracle(), photos).fingerprint(), pseudo_label(Oracle(), photos, max_instances=3).fingerprint(), photos.fingerprint()}
    assert len(prints) == 3


def test_stability_and_suppression() -> None:
    sharp, soft = np.full((4, 4), -9.0), np.full((4, 4), -9.0)
    sharp[:2], soft[:2], soft[2] = 9, 9, 0.5
    assert stability(np.stack([sharp, soft])).tolist() == pytest.approx([1, 8 / 12])
    masks = np.stack([sharp > 0, soft > 0, sharp < 0])
    assert suppress(masks, 0.5, 9) == [0, 2] and suppress(masks, 0.9, 9) == [0, 1, 2] and suppress(masks, 0.9, 1) == [0]
    assert suppress(masks[:0], 0.5, 9) == []


def test_scenes_can_be_evaluated() -> None:
    found = evaluate(Empty(), open_data("scenes:seed=5,count=2"))
    assert found.images == 2 and found.protocol["dataset"].startswith("scenes:")
