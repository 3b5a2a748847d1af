"""The recipes of published students: headers that say what to expect, the papers' settings, and a small version of each that really trains."""
from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from edgekd import checkpoint, recipe, students, teachers, zoo
from edgekd.distillation import points, verbs
from edgekd.distillation.batches import Batches
from edgekd.distillation.material import TrainingData, open_training_data
from edgekd.distillation.trainer import StageTrainer, train_stages
from edgekd.models.proposer import BoxProposer
from edgekd.models.sam import Sam
from edgekd.recipe import Recipe, Stage

PUBLISHED = ("mobile_sam", "edge_sam", "repvit_sam", "efficientvit_sam_l0", "nanosam", "tinysam")
SMALL = tuple(f"{name}_nano" for name in PUBLISHED)
LINES = ("What it does:", "Command:", "Data:", "Hardware:", "Expect:")


def header(name: str) -> str:
    lines = recipe.shipped()[name].read_text().splitlines()
    return "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])


# --- what the files say ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*PUBLISHED, *SMALL])
def test_header__says_command_data_hardware_and_what_to_expect(name: str) -> None:
    text = header(name)
    for line in LINES:
        assert f"# {line}" in text, line
    assert f"edgekd distill --recipe {name} " in text


@pytest.mark.parametrize("name", PUBLISHED)
def test_header__the_published_row_has_a_number_and_a_source(name: str) -> None:
    text = header(name)
    expected = text[text.index("# Expect:") : text.index("# Given:")]
    assert re.search(r"\d\d\.\d|0\.\d{3}", expected) and re.search(r"arXiv \d{4}\.\d{5}|README", expected)
    assert "# Chosen:" in text, "what the paper leaves open and we decided"


@pytest.mark.parametrize("name", [*PUBLISHED, *SMALL])
def test_recipe__names_only_what_exists(name: str) -> None:
    found = recipe.resolve(name)
    for student in found.students:
        students.parse(student.name)
    for stage in found.stages:
        for one in stage.objectives:
            points.build("objective", one.name, one.options)
    assert found.teacher in [*teachers.names(), *zoo.names()]


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe__the_student_is_the_published_one_at_its_size(name: str) -> None:
    (student,) = recipe.resolve(name).students
    assert student.image_sizes == [zoo.spec(student.name).preprocess.image_size]


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe__steps_are_the_epochs_that_the_comment_counts(name: str) -> None:
    """`steps: N  # E epochs x I photos / B` is arithmetic that holds, and B is what a step sees."""
    found, text = recipe.resolve(name), recipe.shipped()[name].read_text()
    counted = re.findall(r"steps: (\d+) +# .*?(\d+) epochs? x ([\d,.]+)( million)? photos / (\d+)", text)
    assert len(counted) == text.count("\n    steps:")
    for stage, (steps, epochs, images, million, batch) in zip(found.stages, counted, strict=False):
        count = float(images.replace(",", "")) * (1e6 if million else 1)
        assert abs(int(steps) - int(epochs) * count / int(batch)) <= 1
        assert stage.batch_size * stage.accumulate == int(batch)


@pytest.mark.parametrize("name", SMALL)
def test_small__has_the_stages_of_the_recipe_it_extends(name: str) -> None:
    small, published = recipe.resolve(name), recipe.resolve(name.removesuffix("_nano"))
    assert small.teacher == "sam_nano" and small.stages != published.stages
    for ours, theirs in zip(small.stages, published.stages, strict=True):
        assert (ours.name, [o.name for o in ours.objectives], ours.trainable) == (theirs.name, [o.name for o in theirs.objectives], theirs.trainable)
        assert (ours.prompts, ours.optimizer, ours.schedule, ours.mask_feedback) == (theirs.prompts, theirs.optimizer, theirs.schedule, theirs.mask_feedback)
        assert ours.steps * ours.batch_size * ours.accumulate < 2000 < theirs.steps


def test_edge_sam__as_the_paper_has_it() -> None:
    """arXiv 2312.06660 and training/configs of its repository."""
    one, two, three = recipe.resolve("edge_sam").stages
    assert (one.lr, one.clip, one.weight_decay, one.objectives[0].name) == (0.1 * 64 / 512, 5.0, 0.01, "feature_mse")
    assert one.warmup * 2 == one.steps, "5 of 10 epochs"
    assert (two.lr, two.min_lr, two.clip, two.weight_decay) == (3.2e-3 * 16 / 512, 1e-5, 0.01, 0.05)
    assert (two.instances, two.decode_iters, two.mask_feedback, two.prompts.coin, two.prompts.fewest_errors) == (16, 1, 0.0, "batch", 10)
    assert two.objectives[0].options == {"bce": 5.0, "dice": 5.0, "soft": False} and two.trainable == ["encoder", "decoder"]
    assert three.trainable == ["proposer"]


def test_efficientvit__as_the_paper_has_it() -> None:
    """configs of mit-han-lab/efficientvit: 20 BCE + dice on 112 x 112 points, box or 1 to 10 clicks, 64 masks."""
    stage = recipe.resolve("efficientvit_sam_l0").stages[1]
    options = stage.objectives[0].options
    assert (options["bce"], options["dice"], options["side"], options["oversample"], options["uncertain"]) == (20.0, 1.0, 112, 3.0, 0.75)
    assert (stage.prompts.clicks, stage.instances, stage.decode_iters, stage.weight_decay, stage.clip) == ((1, 10), 64, 0, 0.1, 2.0)


def test_nanosam_and_tinysam__as_their_sources_have_them() -> None:
    (nano,), (tiny,) = recipe.resolve("nanosam").stages, recipe.resolve("tinysam").stages
    assert (nano.optimizer, nano.lr, nano.schedule, nano.objectives[0].name) == ("adam", 3e-4, "constant", "feature_huber")
    assert (tiny.optimizer, tiny.instances, tiny.decode_iters, tiny.random_iters, tiny.prompts.corrected_by) == ("adam", 64, 9, True, "data")
    assert {o.name for o in tiny.objectives} == {"feature_l1", "decoder_tokens", "hard_masks", "truth_masks"}


# --- and that they train -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher() -> Sam:
    return teachers.load("sam_nano")


@pytest.fixture(scope="module")
def data(teacher: Sam, tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    spare = recipe.resolve("mobile_sam_nano", ["data.extra=[]", "data.val_fraction=0"])
    return open_training_data(spare, "scenes:seed=3,count=3,size=96", {teacher.name: teacher}, tmp_path_factory.mktemp("cache"))


def smallest(name: str) -> Recipe:
    """The small recipe with a student of the same family that is smaller still, and a handful of steps."""
    found = recipe.resolve(name)
    base, size = found.students[0].name.partition(":")[0], found.students[0].image_sizes[0] // 4
    sets = [f"students=[{{name: '{base}:width=0.25,depth=0.25', image_sizes: [{size}]}}]"]
    for i, stage in enumerate(found.stages):
        rate = 3e-4 if "decoder" in stage.trainable else 3e-3  # the teacher's decoder knows its work already
        values = {"steps": 8, "batch_size": 3, "instances": 2, "warmup": 1, "lr": rate, "min_lr": rate, "precision": "fp32"}
        sets += [f"stages.{i}.{key}={value}" for key, value in values.items()]
    return recipe.resolve(name, sets)


@pytest.mark.parametrize("name", SMALL)
def test_small__trains_and_the_loss_of_every_stage_falls(name: str, teacher: Sam, data: TrainingData, tmp_path: Path) -> None:
    found = smallest(name)
    student, start = verbs.new_student(found.students[0].name, found.students[0].image_sizes[0], teacher)
    assert "teacher's own decoder" in start
    for number, stage in enumerate(found.stages):
        before = fixed_loss(student, teacher, stage, data)
        train_stages(student, teacher, [stage], data.batches, tmp_path / str(number))
        after = fixed_loss(student, teacher, stage, data)
        assert after < 0.98 * before, f"{stage.name}: {before} -> {after}"
    path = checkpoint.save(student, tmp_path / "student.safetensors", teacher=teacher.name)
    again = checkpoint.load(path)
    assert isinstance(again.proposer, BoxProposer) is ("proposer" in found.stages[-1].trainable)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), student.state_dict().values(), strict=True))


def fixed_loss(student: Sam, teacher: Sam, stage: Stage, data: TrainingData) -> float:
    """The stage's loss on all images with the same prompts every time, boxes and clicks; nothing is learned."""
    batches = Batches(data.sources, student.preprocess, 3, 0)
    trainer = StageTrainer(student, teacher, stage, batches, Path("unused"))
    student.train()  # batch norms: what 8 steps leave in the running statistics says little yet
    kept = {k: v.clone() for k, v in student.state_dict().items()}
    with torch.no_grad():
        losses = [torch.stack([loss.mean() for loss in trainer.losses(batches[0], torch.Generator().manual_seed(seed)).values()]).sum()
                  for seed in range(4 if trainer.step_module.loop else 1)]
    student.load_state_dict(kept)
    student.eval()
    return float(torch.stack(losses).mean())
