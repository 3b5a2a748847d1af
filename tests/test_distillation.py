"""The stages: the loss falls, what is frozen stays, a killed run goes on to the same weights, bad numbers are skipped and named."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edgekd.data.scenes import Scenes
from edgekd.distillation.batches import Batches, Source, label_map
from edgekd.distillation.cache import build_cache
from edgekd.distillation.prompting import ask, tapped, token_module
from edgekd.distillation.schedule import cosine, decay_groups, rate
from edgekd.distillation.step import instance_boxes
from edgekd.distillation.trainer import StageTrainer, train_stages
from edgekd.distillation.verbs import new_student
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


def objective(name: str, **options: object) -> dict:
    return {"name": name, "options": options}


TOKENS = PROMPTS | {"objectives": [objective("feature_l1"), objective("decoder_tokens"), objective("hard_masks")], "trainable": ["encoder"], "optimizer": "adam",
                    "decode_iters": 2, "random_iters": True, "prompts": {"corrected_by": "data"}}
TRUTH = PROMPTS | {"objectives": [objective("point_masks", side=16), objective("truth_masks")], "trainable": ["encoder", "prompt_encoder", "decoder"],
                   "decode_iters": 0, "prompts": {"coin": "batch", "clicks": [1, 4], "central": 0.0, "jitter": 0.0}}
BOXES = {"objectives": [objective("box_proposals")], "trainable": ["proposer"]}
HUBER = {"objectives": [objective("feature_huber", delta=0.5)], "optimizer": "adam", "schedule": "constant", "accumulate": 2}


@pytest.mark.parametrize("changes", [{}, PROMPTS, {"ema": 0.5}, {"precision": "bf16"}, TOKENS, TRUTH, BOXES, HUBER],
                         ids=["encoder", "prompts", "ema", "bf16", "tokens", "truth", "boxes", "huber"])
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


def test_run__a_box_proposer_is_made_and_nothing_else_moves(teacher: Sam, source: Source, tmp_path: Path) -> None:
    student = model(1, 8)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    trainer(student, teacher, source, tmp_path, **BOXES, steps=2).run()
    after = student.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items()), "batch norms of the frozen encoder included"
    assert student.proposer is not None and {k.split(".")[0] for k in after} == {"encoder", "prompt_encoder", "mask_decoder", "proposer"}


def test_run__gradients_of_several_batches_add_up_to_those_of_one(teacher: Sam, source: Source, tmp_path: Path) -> None:
    weights = []
    for batch_size, accumulate in ((6, 1), (3, 2)):
        student = model(1, 8)
        one = StageTrainer(student, teacher, stage(steps=2, accumulate=accumulate, frozen_norm=True), Batches([source], student.preprocess, batch_size, 0),
                           tmp_path / f"{batch_size}.pt")
        one.run()
        weights.append(torch.cat([p.flatten() for p in student.encoder.parameters()]))
    assert torch.allclose(*weights, atol=1e-4)


@pytest.mark.parametrize(("changes", "said"), [
    ({"trainable": ["encoder", "decoder"]}, "trains the decoder"), (PROMPTS | {"trainable": ["encoder", "proposer"]}, "trains the proposer"),
    ({"objectives": [{"name": "box_proposals"}]}, "proposes no boxes"),
])
def test_trainer__a_part_that_nothing_reaches_is_refused(teacher: Sam, source: Source, tmp_path: Path, changes: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        trainer(model(1, 8), teacher, source, tmp_path, **changes)
    assert caught.value.hint


@pytest.mark.parametrize("changes", [{}, PROMPTS | {"ema": 0.9}, TRUTH, BOXES | {"accumulate": 2}], ids=["encoder", "prompts", "truth", "boxes"])
def test_run__killed_and_resumed_equals_one_run(teacher: Sam, source: Source, tmp_path: Path, changes: dict) -> None:
    whole = model(1, 8)
    trainer(whole, teacher, source, tmp_path / "whole", **changes, steps=8).run()
    first = trainer(model(1, 8), teacher, source, tmp_path / "cut", **changes, steps=8)
    first.set_modes()
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
        train_stages(student, teacher, stages, lambda step: Batches([source], student.preprocess, step.stage.batch_size, 0), tmp_path, lambda name, row: seen.append(name))
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


class Foreign(torch.nn.Module):
    """A teacher as those of another library: further channels, a decoder of its own that takes one image, no parts of ours."""

    def __init__(self, inner: Sam) -> None:
        super().__init__()
        self.name, self.embed_dim, self.preprocess, self.inner = "foreign", inner.embed_dim, inner.preprocess, inner

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        inner = self.inner.embed(images)
        return torch.cat([inner, 100 + inner[:, :5]], dim=1)

    def decode(self, embedding: torch.Tensor, *prompts: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        assert embedding.shape[:2] == (1, 37)
        return self.inner.decode(embedding[:, :32], *prompts)  # type: ignore[arg-type]


@pytest.mark.parametrize("changes", [{}, PROMPTS | {"instances": 2}], ids=["encoder", "prompts"])
def test_a_foreign_teacher__keeps_its_channels_in_the_cache_and_teaches(teacher: Sam, tmp_path: Path, changes: dict) -> None:
    foreign, scenes = Foreign(teacher).eval(), Scenes(seed=4, count=4, size=64)
    made = build_cache(foreign, scenes, tmp_path / "cache")  # type: ignore[arg-type]
    assert made.embedding(0).shape == (37, 4, 4)
    result = trainer(model(1, 8), foreign, Source(scenes, made), tmp_path, **changes).run()  # type: ignore[arg-type]
    losses = [r["loss"] for r in result.curve]
    assert np.mean(losses[-5:]) < 0.95 * np.mean(losses[:5]) and max(losses) < 50


def test_a_foreign_teacher__has_no_tokens_and_no_decoder_to_lend(teacher: Sam, source: Source, tmp_path: Path) -> None:
    foreign = Foreign(teacher)
    with pytest.raises(UsageError, match="no decoder tokens"):
        trainer(model(1, 8), foreign, source, tmp_path, **TOKENS)  # type: ignore[arg-type]
    student, start = new_student("repvit_xs", 64, foreign)  # type: ignore[arg-type]
    assert student.embed_dim == 32 and student.preprocess.image_size == 64
    assert start.startswith("random weights, the decoder's too") and "foreign" in start


def test_new_student__takes_the_teacher_s_decoder_and_its_frame(teacher: Sam) -> None:
    student, start = new_student("efficientvit_sam_l0:width=0.25,depth=0.25", 32, teacher)
    assert (student.preprocess.image_size, student.preprocess.side) == (32, 64)
    assert torch.equal(student.mask_decoder.iou_token.weight, teacher.mask_decoder.iou_token.weight) and "teacher's own decoder" in start
    student, _ = new_student("repvit_xs", 64, Sam("s", torch.nn.Identity(), SHAPE, Preprocess(128, fit="stretch")))
    assert student.preprocess.fit == "stretch", "it sees photos as its teacher does"


def test_ask__one_call_for_a_batch_equals_one_for_each_image(teacher: Sam) -> None:
    torch.manual_seed(0)
    embedding, points, labels = torch.randn(2, 32, 4, 4), torch.rand(6, 2, 2) * 64, torch.tensor([[1.0, 0.0]]).repeat(6, 1)
    whole, parts = ask(teacher, embedding, points, labels, None, None, tokens=True), [
        ask(teacher, embedding[i : i + 1], points[3 * i : 3 * i + 3], labels[:3], None, None, tokens=True) for i in range(2)]
    assert whole.tokens is not None and whole.tokens.shape == (6, 5, 32) and whole.masks is not None
    assert torch.allclose(whole.tokens, torch.cat([p.tokens for p in parts]), atol=1e-5)  # type: ignore[list-item]
    assert torch.allclose(whole.masks, torch.cat([p.masks for p in parts]), atol=1e-4)  # type: ignore[list-item]


def test_tapped__sees_calls_within_the_context_only(teacher: Sam) -> None:
    linear = torch.nn.Linear(2, 2)
    with tapped(linear) as seen:
        linear(torch.zeros(1, 2))
    linear(torch.zeros(1, 2))
    assert len(seen) == 1 and token_module(linear) is None and token_module(teacher) is teacher.mask_decoder.transformer


def test_instance_boxes__are_the_edges_of_each_instance() -> None:
    labels = torch.zeros(2, 16, 16, dtype=torch.int16)
    labels[0, 2:5, 3:10], labels[0, 8:9, 8:9], labels[0, 12:] = 1, 4, -1
    first, second = instance_boxes(labels)
    assert first.tolist() == [[3, 2, 10, 5], [8, 8, 9, 9]] and second.shape == (0, 4)


def test_batches__every_image_once_an_epoch_and_the_same_again(source: Source) -> None:
    batches = Batches([source], Preprocess(64), 2, seed=3)
    seen = torch.cat([batches[k].places for k in range(3)])
    assert sorted(seen.tolist()) == list(range(6))
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


# --- schedule --------------------------------------------------------------------------------------------------------------


def test_cosine__warms_up_and_ends_at_the_least() -> None:
    rates = [cosine(k, 100, 1.0, 0.1, 10) for k in range(100)]
    assert rates[0] == 0.1 and max(rates) == rates[9] == rates[10] == 1.0
    assert rates[-1] == pytest.approx(0.1) and rates[10:] == sorted(rates[10:], reverse=True)


def test_rate__constant_stays_after_the_warm_up() -> None:
    one = stage(schedule="constant", lr=0.5, warmup=4)
    assert [rate(one, k) for k in (0, 3, 4, 20, 29)] == [0.125, 0.5, 0.5, 0.5, 0.5]


def test_decay_groups__vectors_do_not_decay() -> None:
    matrices, vectors = decay_groups([torch.nn.Linear(3, 2), torch.nn.LayerNorm(2)], 0.1)
    assert [p.ndim for p in matrices["params"]] == [2] and matrices["weight_decay"] == 0.1
    assert [p.ndim for p in vectors["params"]] == [1, 1, 1] and vectors["weight_decay"] == 0.0
