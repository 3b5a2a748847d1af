"""The stages: the loss falls, what is frozen stays, a killed run goes on to the same weights, bad numbers are skipped and named."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edgekd.data.scenes import Scenes
from edgekd.distillation import objectives
from edgekd.distillation.batches import Batches, Source, label_map
from edgekd.distillation.cache import build_cache
from edgekd.distillation.objectives import Context, Outputs
from edgekd.distillation.schedule import cosine, decay_groups
from edgekd.distillation.trainer import StageTrainer, train_stages
from edgekd.errors import EdgekdError, UsageError
from edgekd.models.sam import DecoderShape, Sam
from edgekd.protocols import Preprocess, Sample
from edgekd.recipe import Stage

SHAPE = DecoderShape(embed_dim=32, heads=2, mlp_dim=32)


def model(seed: int, width: int, size: int = 64) -> Sam:
    torch.manual_seed(seed)
    encoder = torch.nn.Sequential(torch.nn.Conv2d(3, width, 8, 8), torch.nn.BatchNorm2d(width), torch.nn.ReLU(), torch.nn.Conv2d(width, 32, 2, 2))
    return Sam(f"tiny{width}", encoder, SHAPE, Preprocess(size))


@pytest.fixture(scope="module")
def teacher() -> Sam:
    return model(0, 24).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def source(teacher: Sam, tmp_path_factory: pytest.TempPathFactory) -> Source:
    scenes = Scenes(seed=4, count=6, size=64)
    return Source(scenes, build_cache(teacher, scenes, tmp_path_factory.mktemp("cache")))


def stage(**changes: object) -> Stage:
    given = {"name": "encoder", "objectives": [{"name": "feature_mse"}], "trainable": ["encoder"], "steps": 30, "batch_size": 3, "lr": 3e-3, "warmup": 2,
             "precision": "fp32", "instances": 3}
    return Stage.model_validate(given | changes)


PROMPTS = {"name": "prompts", "objectives": [{"name": "prompt_masks"}, {"name": "iou_head"}], "trainable": ["encoder", "decoder"], "decode_iters": 1}


def trainer(student: Sam, teacher: Sam, source: Source, folder: Path, **changes: object) -> StageTrainer:
    return StageTrainer(student, teacher, stage(**changes), Batches([source], student.preprocess, 3, 0), folder / "state.pt")


@pytest.mark.parametrize("changes", [{}, PROMPTS, {"ema": 0.5}, {"precision": "bf16"}], ids=["encoder", "prompts", "ema", "bf16"])
def test_run__the_loss_falls(teacher: Sam, source: Source, tmp_path: Path, changes: dict) -> None:
    result = trainer(model(1, 8), teacher, source, tmp_path, **changes).run()
    losses = [r["loss"] for r in result.curve]
    assert len(losses) == 30 and np.mean(losses[-5:]) < 0.95 * np.mean(losses[:5])


def test_run__only_what_the_stage_names_is_trained(teacher: Sam, source: Source, tmp_path: Path) -> None:
    student = model(1, 8)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    trainer(student, teacher, source, tmp_path, steps=2).run()
    changed = {k.split(".")[0] for k, v in student.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"encoder"}
    trainer(student, teacher, source, tmp_path / "b", **PROMPTS, steps=2).run()
    changed = {k.split(".")[0] for k, v in student.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"encoder", "mask_decoder"}, "the prompt encoder stays the teacher's"


@pytest.mark.parametrize("changes", [{}, PROMPTS | {"ema": 0.9}], ids=["encoder", "prompts"])
def test_run__killed_and_resumed_equals_one_run(teacher: Sam, source: Source, tmp_path: Path, changes: dict) -> None:
    whole = model(1, 8)
    trainer(whole, teacher, source, tmp_path / "whole", **changes, steps=8).run()
    first = trainer(model(1, 8), teacher, source, tmp_path / "cut", **changes, steps=8)
    first.student.train()
    for _ in range(5):
        first.result.curve.append(first.train_step())
    first.save()
    resumed = model(2, 8)  # other weights: everything must come from the file
    resumed.prompt_encoder.load_state_dict(whole.prompt_encoder.state_dict())
    result = trainer(resumed, teacher, source, tmp_path / "cut", **changes, steps=8).run()
    assert [r["step"] for r in result.curve] == list(range(1, 9))
    for (k, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.allclose(a.float(), b.float(), atol=1e-4), k  # a step moves weights by 3e-3; summation order alone by 1e-5


def test_run__frozen_norm_keeps_the_statistics(teacher: Sam, source: Source, tmp_path: Path) -> None:
    for frozen in (True, False):
        student = model(1, 8)
        trainer(student, teacher, source, tmp_path / str(frozen), steps=2, frozen_norm=frozen).run()
        assert bool((student.encoder[1].running_mean == 0).all()) is frozen


def test_run__a_damaged_state_is_not_used(teacher: Sam, source: Source, tmp_path: Path) -> None:
    one = trainer(model(1, 8), teacher, source, tmp_path, steps=3)
    one.save()
    one.state.write_bytes(one.state.read_bytes()[:-200])
    assert len(trainer(model(1, 8), teacher, source, tmp_path, steps=3).run().curve) == 3


def test_run__a_loss_that_is_not_finite_is_skipped_then_ends_the_stage(teacher: Sam, source: Source, tmp_path: Path) -> None:
    student = model(1, 8)
    one = trainer(student, teacher, source, tmp_path, steps=30)
    student.encoder[0].weight.data[0, 0, 0, 0] = float("inf")
    with pytest.raises(EdgekdError, match="not finite") as e:
        one.run()
    assert "lr" in str(e.value.hint)


def test_train_stages__finished_stages_are_not_trained_again(teacher: Sam, source: Source, tmp_path: Path) -> None:
    stages = [stage(steps=3), stage(**PROMPTS, steps=2)]

    def run(student: Sam) -> tuple[Sam, int]:
        seen: list[str] = []
        train_stages(student, teacher, stages, lambda s: Batches([source], student.preprocess, s.batch_size, s.seed), tmp_path, lambda name, row: seen.append(name))
        return student, len(seen)

    first, steps = run(model(1, 8))
    again, repeated = run(model(1, 8))
    assert (steps, repeated) == (5, 0)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    assert not again.training and not list(tmp_path.glob("*.state.pt"))


def test_a_smaller_student_learns_from_a_larger_teacher(teacher: Sam, source: Source, tmp_path: Path) -> None:
    small = model(1, 8, size=32)
    for changes in ({}, PROMPTS):
        result = trainer(small, teacher, source, tmp_path / str(len(changes)), **changes, steps=12).run()
        assert np.isfinite([r["loss"] for r in result.curve]).all()


def test_batches__every_image_once_an_epoch_and_the_same_again(source: Source) -> None:
    batches = Batches([source], Preprocess(64), 2, seed=3)
    seen = torch.cat([batches[k].embedding for k in range(3)])
    assert len({e.numpy().tobytes() for e in seen}) == 6
    assert torch.equal(batches[1].images, Batches([source], Preprocess(64), 2, seed=3)[1].images)


def test_batches__match_what_the_model_sees_at_work(source: Source) -> None:
    from edgekd.data.images import preprocess

    spec = Preprocess(64)
    batch = Batches([source], spec, 6, seed=0)[0]
    frames = [preprocess(source.dataset[i].image, spec)[0] for i in range(6)]
    for image in batch.images.numpy():
        nearest = min(np.abs(image - f).mean() for f in frames)
        assert nearest < 0.02, "training and inference preprocess alike (training rounds to whole bytes)"


def test_label_map__small_on_top_and_unlabelled_everywhere() -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    small, large = np.zeros((8, 8), bool), np.ones((8, 8), bool)
    small[2:4, 2:4] = True
    found = label_map(Sample("a", image, np.stack([small, large])))
    assert found[3, 3] == 1 and found[0, 0] == 2
    assert (label_map(Sample("a", image)) == 1).all()


# --- objectives ----------------------------------------------------------------------------------------------------------


def test_feature_mse__leaves_padding_out() -> None:
    ours, theirs = torch.zeros(1, 2, 4, 4), torch.ones(1, 2, 4, 4)
    theirs[:, :, 2:] = 100
    valid = torch.zeros(1, 1, 16, 16)
    valid[:, :, :8] = 1
    loss = objectives.build("feature_mse", {})(Outputs(ours), Outputs(theirs), Context(valid))
    assert loss.tolist() == [1.0]


def masks_context(prompts: int, size: int, single: list[bool]) -> Context:
    return Context(torch.ones(1, 1, size, size), torch.ones(prompts, size, size), torch.tensor(single))


def test_prompt_masks__by_hand() -> None:
    teacher_logits, student_logits = torch.full((1, 4, 2, 2), 5.0), torch.zeros(1, 4, 2, 2)
    loss = objectives.build("prompt_masks", {"bce": 1.0, "dice": 0.0})(Outputs(torch.zeros(0), student_logits), Outputs(torch.zeros(0), teacher_logits),
                                                                      masks_context(1, 2, [False]))
    assert loss.item() == pytest.approx(np.log(2))
    dice = objectives.build("prompt_masks", {"bce": 0.0, "dice": 1.0})(Outputs(torch.zeros(0), student_logits), Outputs(torch.zeros(0), teacher_logits),
                                                                      masks_context(1, 2, [False]))
    assert dice.item() == pytest.approx(1 - (2 * 2 + 1) / (2 + 4 + 1))


def test_prompt_masks__alternatives_learn_from_one_click_only() -> None:
    teacher_logits, student_logits = torch.full((2, 4, 2, 2), 5.0), torch.full((2, 4, 2, 2), 9.0)
    student_logits[:, 2] = -9.0
    loss = objectives.build("prompt_masks", {})(Outputs(torch.zeros(0), student_logits), Outputs(torch.zeros(0), teacher_logits), masks_context(2, 2, [True, False]))
    assert loss[0] > 10 and loss[1] < 0.1


def test_iou_head__is_a_squared_error() -> None:
    ours, theirs = Outputs(torch.zeros(0), iou=torch.zeros(1, 4)), Outputs(torch.zeros(0), iou=torch.tensor([[0.0, 1.0, 0.0, 1.0]]))
    assert objectives.build("iou_head", {})(ours, theirs, masks_context(1, 2, [True])).tolist() == [0.5]


def test_objectives__unknown_names_and_options() -> None:
    with pytest.raises(UsageError, match="did you mean 'feature_mse'"):
        objectives.build("feture_mse", {})
    with pytest.raises(UsageError, match="temperature"):
        objectives.build("prompt_masks", {"temperature": 2})


@pytest.mark.parametrize("name", objectives.names())
def test_objectives__say_what_they_are(name: str) -> None:
    found = objectives.describe(name)
    assert found["family"] and found["paper"] and set(found["needs"]) <= {"embedding", "masks", "iou"} and found["needs"]


# --- schedule --------------------------------------------------------------------------------------------------------------


def test_cosine__warms_up_and_ends_at_the_least() -> None:
    rates = [cosine(k, 100, 1.0, 0.1, 10) for k in range(100)]
    assert rates[0] == 0.1 and max(rates) == rates[9] == rates[10] == 1.0
    assert rates[-1] == pytest.approx(0.1) and rates[10:] == sorted(rates[10:], reverse=True)


def test_decay_groups__vectors_do_not_decay() -> None:
    matrices, vectors = decay_groups([torch.nn.Linear(3, 2), torch.nn.LayerNorm(2)], 0.1)
    assert [p.ndim for p in matrices["params"]] == [2] and matrices["weight_decay"] == 0.1
    assert [p.ndim for p in vectors["params"]] == [1, 1, 1] and vectors["weight_decay"] == 0.0
