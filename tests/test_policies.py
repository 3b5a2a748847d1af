"""Data policies: what is drawn, seen and mixed, and that a stage learns with each of them and goes on after a kill."""
from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import plugin_samples
import pytest
import torch
from torch import Tensor

from edgekd.data.scenes import Scenes
from edgekd.distillation import points
from edgekd.distillation.batches import Batch, Batches, Source
from edgekd.distillation.cache import build_cache
from edgekd.distillation.outputs import Context, Setup
from edgekd.distillation.policies import cutmix, ddk, hard, mixup, pruning, views
from edgekd.distillation.policies._shared import mixed_classes
from edgekd.distillation.trainer import StageTrainer
from edgekd.errors import UsageError
from edgekd.models.sam import DecoderShape, Sam
from edgekd.protocols import Preprocess, Sample
from edgekd.recipe import Stage

LIVE = ["mixup", "cutmix", "views", "hard"]
SHAPE = DecoderShape(embed_dim=32, heads=2, mlp_dim=32)


def model(seed: int, width: int, size: int = 64) -> Sam:
    torch.manual_seed(seed)
    encoder = torch.nn.Sequential(torch.nn.Conv2d(3, width, 8, 8), torch.nn.BatchNorm2d(width), torch.nn.ReLU(), torch.nn.Conv2d(width, 32, 2, 2))
    return Sam(f"tiny{width}", encoder, SHAPE, Preprocess(size))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(count: int = 4, size: int = 64, teacher: int = 128) -> Batch:
    """Photos of which the teacher sees the same at twice the size; the lower quarter of every second one is padding."""
    images = torch.rand(count, 3, 8, 8, generator=generator(1)) * 4 - 2
    labels = torch.ones(count, size, size, dtype=torch.int16)
    labels[::2, size * 3 // 4 :] = -1
    inside = (labels >= 0).float().unsqueeze(1)

    def at(side: int) -> Tensor:
        shown = torch.nn.functional.interpolate(images, (side, side), mode="bilinear", align_corners=False)
        return shown * torch.nn.functional.interpolate(inside, (side, side))

    return Batch(at(size), labels, (torch.nn.functional.avg_pool2d(inside, 4) > 0.5).float(), {}, torch.zeros(count, dtype=torch.long), torch.arange(count),
                 torch.arange(count) % 3, {"network2": at(teacher)})


def setup(images: int = 6, **stage: Any) -> Setup:
    made = plugin_samples.setup(plugin_samples.outputs(1), plugin_samples.outputs(2))
    return dataclasses.replace(made, stage=plugin_samples.stage(**stage), teachers={"network2": made.teacher},
                               context=dataclasses.replace(made.context, images_total=images))


def bound(name: str, images: int = 6, **options: Any) -> Any:
    policy = points.build("policy", name, options)
    policy.bind(setup(images))
    return policy


def halved(images: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(images, 2)


# --- mixing -----------------------------------------------------------------------------------------------------------------


def test_mixup__student_and_teacher_see_the_same_sum_and_classes_follow() -> None:
    policy, before = bound("mixup", alpha=1.0, share=1.0), batch()
    after = policy.mix(before, generator(3))
    assert after.classes is not None and after.classes.shape == (4, plugin_samples.C) and torch.allclose(after.classes.sum(1), torch.ones(4))
    assert not torch.allclose(after.images, before.images)
    assert torch.allclose(halved(after.teacher_images["network2"]), after.images, atol=0.15)
    for i in range(4):
        own = float(after.classes[i, before.classes[i]])
        assert own >= 0.5, "the photo that prompts ask about counts more"
        others = [j for j in range(4) if torch.allclose(after.images[i], own * before.images[i] + (1 - own) * before.images[j], atol=1e-5)]
        assert others or own == 1.0
    assert torch.equal(after.labels, before.labels) and torch.equal(after.valid, before.valid)


def test_mixup__partial_leaves_the_rest_as_it_is() -> None:
    before = batch()
    after = bound("mixup", alpha=1.0, share=0.5).mix(before, generator(3))
    untouched = [i for i in range(4) if torch.equal(after.images[i], before.images[i])]
    assert len(untouched) >= 2
    for i in untouched:
        assert float(after.classes[i, before.classes[i]]) == 1.0


def test_mixup__strength_is_the_spread_of_the_beta() -> None:
    def mean_change(alpha: float) -> float:
        policy, before = bound("mixup", alpha=alpha, share=1.0), batch(32)
        return float((policy.mix(before, generator(0)).images - before.images).abs().mean())

    assert mean_change(0.05) < 0.5 * mean_change(8.0)


def test_mixed_classes__by_hand() -> None:
    found = mixed_classes(torch.tensor([0, 2, -1]), torch.tensor([1, 0, 0]), torch.tensor([0.75, 1.0, 0.5]), 3)
    assert found is not None and found.tolist() == [[0.75, 0.0, 0.25], [0.0, 0.0, 1.0], [-1.0, -1.0, -1.0]]
    again = mixed_classes(found, torch.tensor([1, 0, 1]), torch.tensor([0.5, 1.0, 1.0]), 3)
    assert again is not None and again.tolist() == [[0.375, 0.0, 0.625], [0.0, 0.0, 1.0], [-1.0, -1.0, -1.0]]


def test_cutmix__a_rectangle_at_the_same_place_and_classes_by_what_is_seen() -> None:
    before = batch()
    after = bound("cutmix", share=1.0).mix(before, generator(5))
    changed = (after.images != before.images).any(1)
    assert changed.any() and not changed.all()
    theirs = (after.teacher_images["network2"] != before.teacher_images["network2"]).any(1)
    assert torch.equal(theirs[:, ::2, ::2], changed)
    for i in range(4):
        rows, columns = torch.where(changed[i])
        if len(rows):
            inside = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
            assert inside >= len(rows) > 0.5 * inside, "what changed is a rectangle, less the pixels that are alike or padding in both"
    assert torch.allclose(after.classes.sum(1), torch.ones(4)) and ((after.labels < 0).float().mean() < 0.25)


def test_rectangle__has_the_area_that_is_not_kept() -> None:
    rng = np.random.default_rng(0)
    boxes = [cutmix.rectangle(rng, 0.75, 1000) for _ in range(200)]
    inner = [b for b in boxes if b[0] > 0 and b[1] < 1000 and b[2] > 0 and b[3] < 1000]
    assert inner and all(abs((b[1] - b[0]) * (b[3] - b[2]) - 250_000) < 2000 for b in inner)


def test_cutmix__refuses_objectives_on_masks_and_mixup_does_not() -> None:
    told = setup(objectives=[{"name": "prompt_masks"}])
    with pytest.raises(UsageError, match="prompt_masks") as caught:
        cutmix.Cutmix().bind(told)
    assert "mixup" in str(caught.value.hint)
    mixup.Mixup().bind(told)


@pytest.mark.parametrize("name", LIVE)
def test_live_policies__refuse_a_cached_teacher(name: str) -> None:
    assert points.registry("policy")[name].live
    with pytest.raises(UsageError, match="cached"):
        points.build("policy", name, {}).bind(setup(teacher="cached"))


@pytest.mark.parametrize(("name", "options"), [("mixup", {"alpha": 0.0}), ("cutmix", {"share": 0.0}), ("views", {"crop": 0.0}), ("hard", {"every": 0}),
                                               ("pruning", {"keep": 0.0}), ("pruning", {"by": "luck"}), ("ddk", {"smooth": 2.0})])
def test_policies__refuse_senseless_options(name: str, options: dict) -> None:
    with pytest.raises(UsageError, match=name):
        points.build("policy", name, options)


# --- views ------------------------------------------------------------------------------------------------------------------


def sample() -> Sample:
    """A photo whose red channel says which instance a pixel is of."""
    image, masks = np.full((90, 120, 3), 90, np.uint8), np.zeros((2, 90, 120), bool)
    masks[0, 5:40, 5:60], masks[1, 50:85, 70:115] = True, True
    image[masks[0], 0], image[masks[1], 0] = 255, 0
    return Sample("a", image, masks)


def test_views__masks_stay_on_their_instances() -> None:
    policy = views.Views(crop=0.4, colour=0.0)
    sizes = set()
    for seed in range(20):
        seen = policy.view(sample(), np.random.default_rng(seed))
        assert seen.masks is not None and len(seen.masks) and seen.masks.shape[1:] == seen.image.shape[:2] and seen.masks.any((1, 2)).all()
        for mask in seen.masks:
            assert set(np.unique(seen.image[mask][:, 0])) in ({255}, {0})
        sizes.add(seen.image.shape[:2])
        assert seen.image.shape[0] * seen.image.shape[1] >= 0.35 * 90 * 120
    assert len(sizes) > 10


def test_views__are_drawn_from_their_own_numbers() -> None:
    policy = views.Views()
    a, b, c = (policy.view(sample(), np.random.default_rng(s)).image for s in (1, 1, 2))
    assert np.array_equal(a, b) and (a.shape != c.shape or not np.array_equal(a, c))
    plain = views.Views(crop=1.0, flip=0.0, colour=0.0).view(sample(), np.random.default_rng(0))
    assert np.array_equal(plain.image, sample().image)
    mirrored = views.Views(crop=1.0, flip=1.0, colour=0.0).view(sample(), np.random.default_rng(0))
    assert np.array_equal(mirrored.image, sample().image[:, ::-1])


def test_lit__by_hand() -> None:
    image = np.array([[[100, 100, 100], [50, 50, 50]]], np.uint8)
    assert views.lit(image, 1.2, 1.0, 1.0)[0, :, 0].tolist() == [120, 60]
    assert views.lit(image, 1.0, 0.5, 1.0)[0, :, 0].tolist() == [88, 62]  # the mean is 75; 87.5 rounds to even
    red = np.array([[[255, 0, 0]]], np.uint8)
    assert views.lit(red, 1.0, 1.0, 0.0)[0, 0].tolist() == [76, 76, 76]


# --- hard -------------------------------------------------------------------------------------------------------------------


def test_hard__moves_student_and_teacher_alike_with_labels() -> None:
    policy, before = bound("hard"), batch()
    numbers = torch.zeros(4, hard.NUMBERS)
    numbers[:, 4] = 0.25  # the view looks an eighth of the photo to the right
    after = policy.changed(before, numbers)
    assert torch.allclose(after.images[..., :48], before.images[..., 8:56], atol=1e-5)
    assert torch.allclose(after.teacher_images["network2"][..., :96], before.teacher_images["network2"][..., 16:112], atol=1e-5)
    assert (after.labels[..., 56:] == -1).all() and (after.valid[..., 14:] == 0).all() and torch.equal(after.labels[..., :56], before.labels[..., 8:])
    assert after.labels.dtype == torch.int16


def test_hard__no_change_is_no_change_and_padding_stays_empty() -> None:
    policy, before = bound("hard"), batch()
    after = policy.changed(before, torch.zeros(4, hard.NUMBERS))
    assert torch.allclose(after.images, before.images, atol=1e-5) and torch.equal(after.labels, before.labels) and torch.equal(after.valid, before.valid)
    bright = torch.zeros(4, hard.NUMBERS)
    bright[:, 9:] = 0.2
    assert (policy.changed(before, bright).images[0, :, 48:] == 0).all()


def test_recoloured__by_hand() -> None:
    spec = Preprocess(64, mean=(100.0, 100.0, 100.0), std=(50.0, 50.0, 50.0))
    pixels = torch.tensor([200.0, 100.0, 40.0])
    numbers = torch.tensor([[0.5, 0.0, 0.0, 0.0, 0.1, 0.0]])
    found = hard.recoloured(((pixels - 100) / 50).view(1, 3, 1, 1), numbers, spec) * 50 + 100
    assert torch.allclose(found.flatten(), torch.tensor([300.0, 125.5, 40.0]), atol=1e-3)


def test_hard__learns_to_make_them_disagree_and_stays_within_its_limits() -> None:
    policy, data = bound("hard", every=1, lr=0.1, share=1.0), batch(8)

    def value() -> float:
        with torch.no_grad():
            return float(np.mean([float(policy.gain(data, policy.draw(policy.theta, 8, generator(100 + k)))) for k in range(10)]))

    student = policy._held[0]
    weights = [p.clone() for p in student.parameters()]
    before = value()
    for k in range(30):
        policy.mix(data, generator(k))
    assert value() > before + 0.02 * abs(before)
    assert all(torch.equal(a, b) for a, b in zip(weights, student.parameters(), strict=True)) and all(p.grad is None for p in student.parameters())
    assert (policy.draw(policy.theta * 100, 8, generator(0)).abs() <= policy.limits + 1e-6).all()
    assert not list(policy.parameters()), "the stage's optimizer, which goes down, must not get hold of them"


def test_hard__the_models_modes_and_statistics_stay(tmp_path: Path) -> None:
    student, teacher = model(1, 8).train(), model(0, 24).eval()
    told = dataclasses.replace(setup(), student=student, teachers={"t": teacher})
    policy = hard.Hard(every=1)
    policy.bind(told)
    data = dataclasses.replace(batch(), teacher_images={"t": batch().images})
    policy.mix(data, generator(0))
    assert student.encoder[1].training and not teacher.training and (student.encoder[1].running_mean == 0).all()


# --- pruning and re-weighting -------------------------------------------------------------------------------------------------


def observed(policy: Any, places: list[int], losses: list[float], domains: list[int] | None = None) -> None:
    policy.observe(torch.tensor(losses), Context(torch.ones(1), places=torch.tensor(places), domains=torch.tensor(domains or [0] * len(places))))


@pytest.mark.parametrize(("by", "kept"), [("hard", [0, 0, 0, 1, 1, 1]), ("easy", [1, 1, 1, 0, 0, 0])])
def test_pruning__keeps_by_the_loss_of_the_first_epoch(by: Any, kept: list[int]) -> None:
    policy = pruning.Pruning(0.5, by)
    policy.bind(setup(6))
    none = np.zeros(6, int)
    observed(policy, [0, 3, 5], [0.1, 0.9, 0.5])
    assert policy.weights(6, none, 0) is None and policy.weights(6, none, 2) is None, "it has not seen all of them"
    observed(policy, [1, 2, 4], [0.2, 0.3, 0.4])
    assert policy.weights(6, none, 1) is None and policy.weights(6, none, 2).tolist() == kept
    observed(policy, [0, 1, 2], [9.0, 9.0, 9.0])
    assert policy.weights(6, none, 5).tolist() == kept, "settled once"


def test_pruning__random_is_settled_at_once_and_the_same_again() -> None:
    shares = [bound("pruning", 20, keep=0.25, seed=s).weights(20, np.zeros(20, int), 0) for s in (0, 0, 1)]
    assert shares[0].sum() == 5 and shares[0].tolist() == shares[1].tolist() != shares[2].tolist()


def test_ddk__draws_the_worse_data_set_more_often() -> None:
    policy = bound("ddk", 4, smooth=0.5)
    domains = np.array([0, 0, 0, 1])
    observed(policy, [0, 1, 2, 3], [0.1, 0.1, 0.1, 0.3], [0, 0, 0, 1])
    assert policy.weights(4, domains, 1) is None, "an epoch later, however far ahead batches are made"
    share = policy.weights(4, domains, 2)
    assert share == pytest.approx([0.375 / 3] * 3 + [0.625])  # 0.5 * (1/4, 3/4) + 0.5 / 2
    observed(policy, [3, 3, 3, 3], [0.1] * 4, [1] * 4)
    assert policy.weights(4, domains, 2) == pytest.approx(share), "asked again while epoch 2 is under way, it says the same"
    assert policy.weights(4, domains, 3) == pytest.approx([0.5 / 3] * 3 + [0.5]), "both 0.1 now: what was not drawn keeps its gap"
    assert policy.weights(4, np.zeros(4, int), 3) is None


def test_ddk__smoothing_by_hand() -> None:
    domains = np.array([0, 1])
    assert ddk.mixture(np.array([1.0, 3.0]), domains, 0.0).tolist() == [0.5, 0.5]
    assert ddk.mixture(np.array([1.0, 3.0]), domains, 1.0).tolist() == [0.25, 0.75]
    assert ddk.mixture(np.array([0.0, 0.0]), domains, 1.0).tolist() == [0.5, 0.5]


# --- in a stage -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher() -> Sam:
    return model(0, 24).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def sources(teacher: Sam, tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    return [Source(scenes, build_cache(teacher, scenes, tmp_path_factory.mktemp("cache"))) for scenes in (Scenes(seed=4, count=6, size=64), Scenes(seed=9, count=4, size=64))]


def trainer(student: Sam, teacher: Sam, sources: list[Source], folder: Path, name: str, steps: int = 40, **options: object) -> StageTrainer:
    stage = Stage.model_validate({"name": "encoder", "objectives": [{"name": "feature_mse"}], "steps": steps, "batch_size": 4, "lr": 3e-3, "warmup": 2,
                                  "precision": "fp32", "policies": [{"name": name, "options": options}]})

    def batches(step: Any) -> Batches:
        return Batches(sources, student.preprocess, 4, 0, live={teacher.name: teacher.preprocess} if step.live else {}, policies=step.policies)

    return StageTrainer(student, teacher, stage, batches, folder / "state.pt")


@pytest.mark.parametrize(("name", "options"), [("mixup", {}), ("cutmix", {}), ("views", {}), ("hard", {}), ("pruning", {"by": "hard"}), ("ddk", {})])
def test_stage__learns_with_the_policy(teacher: Sam, sources: list[Source], tmp_path: Path, name: str, options: dict) -> None:
    one = trainer(model(1, 8), teacher, sources, tmp_path, name, **options)
    assert one.step_module.live is points.registry("policy")[name].live
    losses = [r["loss"] for r in one.run().curve]
    assert np.mean(losses[-6:]) < 0.9 * np.mean(losses[:6])


@pytest.mark.parametrize(("name", "options"), [("hard", {}), ("pruning", {"by": "hard"}), ("ddk", {"smooth": 1.0}), ("views", {})])
def test_stage__killed_and_resumed_equals_one_run(teacher: Sam, sources: list[Source], tmp_path: Path, name: str, options: dict) -> None:
    whole = model(1, 8)
    trainer(whole, teacher, sources, tmp_path / "whole", name, 14, **options).run()
    first = trainer(model(1, 8), teacher, sources, tmp_path / "cut", name, 14, **options)
    first.set_modes()
    for _ in range(9):
        first.result.curve.append(first.train_step())
    first.save()
    resumed = model(1, 8)
    trainer(resumed, teacher, sources, tmp_path / "cut", name, 14, **options).run()
    for (k, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.allclose(a.float(), b.float(), atol=1e-4), k


def test_stage__pruned_photos_are_not_drawn_any_more(teacher: Sam, sources: list[Source], tmp_path: Path) -> None:
    one = trainer(model(1, 8), teacher, sources, tmp_path, "pruning", 30, by="easy", keep=0.4)
    one.run()
    policy: Any = one.step_module.policies[0]
    kept = set(policy.kept.nonzero().flatten().tolist())
    drawn = [set(one.batches.batch(range(e * 10, e * 10 + 10)).places.tolist()) for e in (0, 2, 3)]
    assert len(kept) == 4 and drawn[0] == set(range(10)) and drawn[1] <= kept and drawn[2] <= kept


def test_stage__views_show_another_crop_every_epoch_and_the_teacher_sees_the_same(teacher: Sam, sources: list[Source], tmp_path: Path) -> None:
    one = trainer(model(1, 8), teacher, sources, tmp_path, "views")
    place = one.batches.place(0)
    again = next(n for n in range(10, 20) if one.batches.place(n) == place)
    seen = one.batches.batch([0, again])
    assert seen.teacher_images is not None and not torch.allclose(seen.images[0], seen.images[1])
    assert (seen.teacher_images[teacher.name] - seen.images).abs().mean() < 0.02, "both see 64 px; the student's were rounded to bytes"
