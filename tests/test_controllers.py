"""Controllers: weights against numbers worked out by hand, stages that follow from one another, and training through all of them."""
from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import classifying
import numpy as np
import pytest
import torch
from classifying import Classifier, Photos
from torch import Tensor, nn

from edgekd import checkpoint, students
from edgekd.data.scenes import Scenes
from edgekd.distillation import checks, generations, points
from edgekd.distillation.batches import Batches, Source
from edgekd.distillation.cache import build_cache
from edgekd.distillation.material import load_teachers
from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.distillation.parts import modules_of
from edgekd.distillation.step import Step, wanted
from edgekd.distillation.taps import discover
from edgekd.distillation.trainer import Row, StageResult, StageTrainer, train_stages
from edgekd.distillation.weighing import objective_names
from edgekd.errors import UsageError
from edgekd.recipe import Recipe, Stage

TWO = [{"name": "kd"}, {"name": "cross_entropy"}]


def stage(**changes: Any) -> Stage:
    given = {"name": "main", "objectives": TWO, "trainable": ["encoder", "head"], "steps": 40, "batch_size": 5, "lr": 1e-2, "warmup": 2, "precision": "fp32"}
    return Stage.model_validate(given | changes)


def ref(name: str, **options: Any) -> dict:
    return {"name": name, "options": options}


class Point(nn.Module):
    """A student of one weight matrix (1, 2), so that gradients can be read off."""

    def __init__(self) -> None:
        super().__init__()
        self.name, self.encoder = "point", nn.Linear(2, 1)

    @property
    def w(self) -> Tensor:
        return self.encoder.weight


def begun(name: str, student: nn.Module | None = None, ours: Outputs | None = None, theirs: Outputs | None = None, objectives: list | None = None,
          **options: Any) -> Any:
    controller = points.build("controller", name, options)
    context = Context(torch.ones(2, 1, 4, 4))
    controller.begin(Setup(student or Point(), None, stage(objectives=objectives or TWO), ours or Outputs(), theirs or Outputs(), context))
    return controller


AT = Context(torch.ones(2, 1, 4, 4))


# --- gradient_norm ---------------------------------------------------------------------------------------------------------


def pulls(student: Point, kd: float, labels: float) -> dict[str, Tensor]:
    """Losses (2,) whose gradients at the weight have the norms 5 kd and 5 labels."""
    direction = torch.tensor([[3.0, 4.0]])
    return {"kd": (kd * direction * student.w).sum().expand(2), "cross_entropy": (labels * direction * student.w).sum().expand(2)}


@pytest.mark.parametrize(("share", "wanted"), [(0.5, 4.0), (0.2, 1.0), (0.8, 16.0)])
def test_gradient_norm__an_objective_gets_its_share_beside_the_reference(share: float, wanted: float) -> None:
    """Norms 20 and 5: p = 5 w / (5 w + 20)."""
    student = Point()
    controller = begun("gradient_norm", student, share=share)
    losses = pulls(student, 4.0, 1.0)
    found = controller.weigh(losses, AT)
    assert controller.norms.tolist() == pytest.approx([20.0, 5.0]) and controller.weights.tolist() == pytest.approx([1.0, wanted])
    assert torch.allclose(found["cross_entropy"], wanted * losses["cross_entropy"]) and torch.equal(found["kd"], losses["kd"])


def test_gradient_norm__norms_are_smoothed_and_looked_at_now_and_then() -> None:
    student = Point()
    controller = begun("gradient_norm", student, momentum=0.9, every=2, reference="cross_entropy")
    controller.weigh(pulls(student, 4.0, 1.0), AT)
    assert controller.weights.tolist() == pytest.approx([0.25, 1.0])
    controller.weigh(pulls(student, 100.0, 1.0), AT)
    assert controller.norms.tolist() == pytest.approx([20.0, 5.0]), "not looked at"
    controller.weigh(pulls(student, 8.0, 1.0), AT)
    assert controller.norms.tolist() == pytest.approx([0.9 * 20 + 0.1 * 40, 5.0]) and controller.weights[0].item() == pytest.approx(5.0 / 22.0)


def test_gradient_norm__within_the_band_nothing_moves() -> None:
    student = Point()
    controller = begun("gradient_norm", student, share=0.5, band=0.2)
    controller.weigh(pulls(student, 1.0, 0.6), AT)  # p = 0.375
    assert controller.weights.tolist() == [1.0, 1.0]
    controller.update(torch.tensor([5.0, 0.0]))
    controller.looks.fill_(0)
    controller.update(torch.tensor([5.0, 1.0]))  # p = 1/6
    assert controller.weights.tolist() == pytest.approx([1.0, 5.0])


def test_gradient_norm__what_is_not_finite_or_does_not_reach_the_weight_moves_nothing() -> None:
    student = Point()
    controller = begun("gradient_norm", student)
    other = nn.Parameter(torch.ones(2))
    controller.weigh(pulls(student, 4.0, 1.0) | {"cross_entropy": other * 2}, AT)
    assert controller.weights.tolist() == [1.0, 1.0] and controller.norms[1] == 0
    controller.update(torch.tensor([float("nan"), 1.0]))
    assert torch.isfinite(controller.norms).all() and controller.weights.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("options", "objectives", "said"), [
    ({}, [{"name": "kd"}], "balances objectives, and the stage has one"), ({"reference": "kdd"}, TWO, "has no objective 'kdd'"),
    ({"at": "encoder.wait"}, TWO, "encoder.wait"), ({"share": 1.5}, TWO, "share is between 0 and 1"),
])
def test_gradient_norm__what_cannot_be_balanced_is_refused(options: dict, objectives: list, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        begun("gradient_norm", objectives=objectives, **options)
    assert caught.value.hint


def test_objective_names__are_those_of_the_step() -> None:
    one = stage(objectives=[ref("kd"), ref("feature_mse"), ref("kd", temperature=2.0), ref("kd", temperature=1.0)])
    step = Step(Classifier(1, 8), {"t": Classifier(0, 16)}, one)
    assert objective_names(one) == list(step.objectives) == ["kd", "feature_mse", "kd.2", "kd.3"]


# --- uncertainty, pruned_weight --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("positive", "penalty"), [(True, np.log(1 + 0.5)), (False, np.log(0.5) / 2)])
def test_uncertainty__by_hand(positive: bool, penalty: float) -> None:
    controller = begun("uncertainty", positive=positive)
    found = controller.weigh({"kd": torch.tensor([2.0, 4.0]), "cross_entropy": torch.tensor([0.0, 1.0])}, AT)
    assert found["kd"].tolist() == pytest.approx([2 + penalty, 4 + penalty]) and found["cross_entropy"].tolist() == pytest.approx([penalty, 1 + penalty])


def test_uncertainty__a_large_loss_comes_to_count_less_and_ends_at_the_optimum() -> None:
    """Kendall's L / (2 s^2) + log s is least at s^2 = L."""
    controller = begun("uncertainty", positive=False)
    optimizer = torch.optim.SGD(controller.parameters(), 0.5)
    for _ in range(100):
        optimizer.zero_grad()
        sum(loss.mean() for loss in controller.weigh({"kd": torch.full((2,), 3.0), "cross_entropy": torch.full((2,), 0.1)}, AT).values()).backward()
        optimizer.step()
    assert controller.log_variance.exp().tolist() == pytest.approx([3.0, 0.1], rel=1e-3)


def test_pruned_weight__by_hand() -> None:
    controller = begun("pruned_weight", kept=0.25, labels="cross_entropy", full=0.4, pruned=0.8)
    found = controller.weigh({"kd": torch.ones(2), "cross_entropy": torch.ones(2)}, AT)
    assert found["kd"].tolist() == pytest.approx([0.7, 0.7]) and found["cross_entropy"].tolist() == pytest.approx([0.3, 0.3])
    with pytest.raises(UsageError, match="shares of 1"):
        begun("pruned_weight", kept=2, labels="cross_entropy")


# --- per_sample --------------------------------------------------------------------------------------------------------------

LOGITS = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 2.0], [2.0, 0.0, 0.0]])


def told(classes: list[int]) -> Context:
    return Context(torch.ones(4, 1, 4, 4), classes=torch.tensor(classes), student=Outputs(logits=torch.zeros(4, 3)), teacher=Outputs(logits=LOGITS))


def per_sample(student: Point, **options: Any) -> Any:
    return begun("per_sample", student, Outputs(logits=LOGITS), Outputs(logits=LOGITS), labels="cross_entropy", **options)


def slopes(student: Point, kd: list[float], labels: list[float]) -> dict[str, Tensor]:
    """Losses (4,) with these gradients at the first of the two weights, and none at the second."""
    return {"kd": torch.tensor(kd) * student.w[0, 0], "cross_entropy": torch.tensor(labels) * student.w[0, 0]}


def test_per_sample__begins_with_one_half_and_leaves_the_held_out_photos_out() -> None:
    student = Point()
    controller = per_sample(student, held=0.25)
    losses = slopes(student, [1.0] * 4, [2.0] * 4)
    found = controller.weigh(losses, told([0, 1, 2, 0]))
    assert controller.ratio.tolist() == pytest.approx([0.5] * 4)
    for name in losses:
        expected = losses[name] * 0.5 * torch.tensor([4 / 3, 4 / 3, 4 / 3, 0.0])
        assert torch.allclose(found[name], expected, atol=1e-6), "the lesson of the network adds nothing to the value"


def test_per_sample__photos_without_a_label_listen_to_the_teacher_alone() -> None:
    student = Point()
    controller = per_sample(student, every=2)
    controller.calls.fill_(1)  # the whole batch trains
    found = controller.weigh(slopes(student, [1.0] * 4, [2.0] * 4), told([0, -1, 2, 0]))
    w = float(student.w[0, 0].detach())
    assert found["kd"].tolist() == pytest.approx([0.5 * w, w, 0.5 * w, 0.5 * w])
    assert found["cross_entropy"].tolist() == pytest.approx([w, 0.0, w, w])


def test_per_sample__the_lookahead_by_hand() -> None:
    """Held-out gradient 3; photo 0: teacher 5, label 1; photo 1: 1, 3; photo 2: alike. d L_held / d a is -3 (5 - 1), -3 (1 - 3), 0, scaled by 12."""
    student = Point()
    losses = slopes(student, [5.0, 1.0, 2.0, 9.0], [1.0, 3.0, 2.0, 3.0])
    assert per_sample(student).lookahead(losses["kd"], losses["cross_entropy"], 3).tolist() == pytest.approx([-1.0, 0.5, 0.0])


def test_per_sample__the_network_learns_whom_to_listen_to() -> None:
    """The teacher's gradient agrees with the held-out photos' on photos of class 0, the label's on those of class 1."""
    student = Point()
    controller = per_sample(student)
    context = replace(told([0, 1, 0, 1]), teacher=Outputs(logits=torch.tensor([[9.0, 0.0, 0.0], [0.0, 0.0, 9.0]]).repeat(2, 1)))
    optimizer = torch.optim.Adam(controller.parameters(), 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        losses = slopes(student, [5.0, 1.0, 5.0, 1.0], [1.0, 5.0, 1.0, 5.0])
        torch.stack(list(controller.weigh(losses, context).values())).sum(0).mean().backward()
        optimizer.step()
    assert controller.ratio[0] > 0.8 and controller.ratio[1] < 0.2


def test_per_sample__class_means_by_hand() -> None:
    controller = per_sample(Point(), momentum=0.75)
    p = torch.tensor([[0.6, 0.4, 0.0], [0.2, 0.8, 0.0]])
    controller.remember(p, torch.tensor([1, 1]), torch.tensor([True, True]))
    assert controller.means[1].tolist() == pytest.approx([0.4, 0.6, 0.0]) and controller.means[0].tolist() == pytest.approx([1 / 3] * 3)
    controller.remember(p[:1], torch.tensor([1]), torch.tensor([True]))
    assert controller.means[1].tolist() == pytest.approx([0.45, 0.55, 0.0])


# --- what a stage trains -----------------------------------------------------------------------------------------------------


def names_of(student: nn.Module, *trainable: str) -> set[str]:
    chosen = {id(p) for m in modules_of(student, trainable) for p in m.parameters()}
    return {n for n, p in student.named_parameters() if id(p) in chosen}


def test_parts__modules_by_path_and_between_taps() -> None:
    student = Classifier(1, 8)
    assert names_of(student, "encoder.blocks.1") == {"encoder.blocks.1.0.weight", "encoder.blocks.1.0.bias"}
    assert names_of(student, "encoder[:stage1]", "head") == {"encoder.blocks.0.0.weight", "encoder.blocks.0.0.bias", "head.weight", "head.bias"}
    assert names_of(student, "encoder[stage1:stage2]") == names_of(student, "encoder.blocks.1")
    assert names_of(student, "encoder[stage1:]") == names_of(student, "encoder.blocks.1", "encoder.blocks.2")
    assert student.training, "looking leaves the modes alone"


@pytest.mark.parametrize(("trainable", "said"), [
    (["neck"], "part of the student 'neck'"), (["encoder.blocks.7"], "blocks.7"), (["encoder[stage9:]"], "no tap 'stage9'"), (["encoder[stage2:stage1]"], "nothing that can be trained"),
    (["encoder[:embedding]"], "inside the student"), (["encoder[stage1"], "names no part"), (["encoder", "encoder.blocks.0"], "overlap"),
])
def test_parts__what_is_not_there_is_refused(trainable: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        modules_of(Classifier(1, 8), trainable)


@pytest.mark.parametrize("name", ["repvit_xs", "tinyvit_xs", "efficientvit_sam_l0", "efficient_sam_ti", "nanosam"])
def test_parts__ranges_between_taps_divide_a_real_encoder(name: str) -> None:
    student = students.build(f"{name}:width=0.25,depth=0.25", image_size=64, embed_dim=32)
    stages = [t for t in discover(student.eval(), torch.zeros(1, 3, 64, 64)) if t.startswith("stage")]
    ends = ["", *stages, ""]
    ranges = [names_of(student, f"encoder[{a}:{b}]") for a, b in pairwise(ends)]
    whole = {n for n, _ in student.named_parameters() if n.startswith("encoder.")}
    assert set().union(*ranges) == whole and sum(map(len, ranges)) == len(whole) and all(ranges)


def test_trainer__only_the_named_modules_move(tmp_path: Path) -> None:
    one = classifying.trainer(tmp_path, [{"name": "kd"}], trainable=["encoder[stage1:stage2]", "head"], steps=3)
    before = {k: v.clone() for k, v in one.student.state_dict().items()}
    one.run()
    changed = {k.rsplit(".", 1)[0] for k, v in one.student.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"encoder.blocks.1.0", "head"}


# --- stages out of stages ------------------------------------------------------------------------------------------------------


def test_stablekd__blocks_then_pairs_then_all() -> None:
    made = checks.expand([stage(controllers=[ref("stablekd", blocks=4, share=0.6), ref("uncertainty")], steps=1000)])
    assert [s.trainable for s in made] == [["encoder[:stage1]"], ["encoder[stage1:stage2]"], ["encoder[stage2:stage3]"], ["encoder[stage3:stage4]"],
                                           ["encoder[:stage2]"], ["encoder[stage2:stage4]"], ["encoder", "head"]]
    assert [s.steps for s in made] == [100] * 6 + [400] and len({s.name for s in made}) == 7
    assert [o.taps for s in made[:-1] for o in s.objectives] == [[(f"stage{i}", f"stage{i}")] for i in (1, 2, 3, 4, 2, 4)]
    assert made[-1].objectives == stage().objectives and [c.name for c in made[-1].controllers] == ["uncertainty"]
    plain = checks.expand([stage(controllers=[ref("stablekd", taps=[["block0", "stage1"], ["block4", "stage3"]], merge=False)])])
    assert [s.trainable[0] for s in plain] == ["encoder[:block0]", "encoder[block0:block4]", "encoder"] and plain[1].objectives[0].taps == [("block4", "stage3")]


def test_m2mkd__modules_then_all() -> None:
    made = checks.expand([stage(controllers=[ref("m2mkd", modules=2, share=0.5)], steps=100)])
    assert [(s.name, s.steps, s.trainable) for s in made] == [("main-module1", 25, ["encoder[:stage1]"]), ("main-module2", 25, ["encoder[stage1:stage2]"]),
                                                              ("main", 50, ["encoder", "head"])]
    assert [s.objectives[0].options for s in made[:2]] == [{"module": 1}, {"module": 2}]


def test_assistants__side_by_side_or_in_a_chain() -> None:
    made = checks.expand([stage(controllers=[ref("assistants", names=["a", "b"], share=0.4)], steps=100)])
    assert [(s.student, s.teacher_from, s.steps) for s in made] == [("a", [], 20), ("b", [], 20), (None, ["a", "b"], 60)]
    chain = checks.expand([stage(controllers=[ref("assistants", names=["a", "b"], chain=True, anchor=0.5, final_anchor=0.0)])])
    assert [(s.student, s.teacher_from) for s in chain] == [("a", []), ("b", ["a"]), (None, ["b"])]
    assert chain[-1].targets[0].options == {"weights": [0.5, 0.5], "final_weights": [1.0, 0.0]} and not chain[0].targets
    generations.check_generations(made)


def test_expand__controllers_of_what_was_made_are_asked_too() -> None:
    made = checks.expand([stage(name="one"), stage(controllers=[ref("assistants", names=["a"]), ref("m2mkd", modules=2)], steps=80)])
    assert [s.name for s in made] == ["one", "main-assistant1-module1", "main-assistant1-module2", "main-assistant1", "main-module1", "main-module2", "main"]
    assert [s.teacher_from for s in made[-3:]] == [["a"]] * 3 and sum(s.steps for s in made[1:]) == 80


@pytest.mark.parametrize(("stages", "said"), [
    ([stage(teacher_from=["a"])], "no earlier stage trains the assistant 'a'"), ([stage(student="a")], "no stage trains the student itself"),
    ([stage(name="x", student="a"), stage(teacher_from=["a"], teacher="cached")], "has no cache"),
])
def test_generations__an_order_that_cannot_be_is_refused(stages: list[Stage], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        generations.check_generations(stages)


def test_check_recipe__names_of_modules_pass_and_other_parts_do_not() -> None:
    recipe = {"name": "r", "students": [{"name": "repvit_xs"}], "stages": [{"name": "e", "objectives": [{"name": "feature_mse"}], "steps": 3}]}
    recipe["stages"][0]["trainable"] = ["encoder[stage1:]", "decoder.output_upscaling"]  # type: ignore[index]
    assert checks.check_recipe(Recipe.model_validate(recipe))
    recipe["stages"][0]["trainable"] = ["encodr[stage1:]"]  # type: ignore[index]
    with pytest.raises(UsageError, match="trainable part"):
        checks.check_recipe(Recipe.model_validate(recipe))


# --- training ------------------------------------------------------------------------------------------------------------------


CONTROLLERS = {
    "gradient_norm": ref("gradient_norm", share=0.4, band=0.1), "uncertainty": ref("uncertainty"), "pruned_weight": ref("pruned_weight", kept=0.5, labels="cross_entropy"),
    "per_sample": ref("per_sample", labels="cross_entropy", held=0.4),
}


@pytest.mark.parametrize("name", CONTROLLERS)
def test_run__the_loss_falls_under_a_controller(name: str, tmp_path: Path) -> None:
    one = classifying.trainer(tmp_path, TWO, controllers=[CONTROLLERS[name]])
    assert classifying.fall(one) < 0.9
    state = {k: v for k, v in one.aux.state_dict().items() if k.startswith("controller")}
    if name == "gradient_norm":
        assert state["controller_0_gradient_norm.weights"][1] != 1
    if name in ("uncertainty", "per_sample"):
        assert any(p.requires_grad for n, p in one.aux.named_parameters() if n.startswith("controller")) and state
    assert not [k for k in one.student.state_dict() if "controller" in k]


@pytest.mark.parametrize("name", CONTROLLERS)
def test_run__killed_and_resumed_with_a_controller_equals_one_run(name: str, tmp_path: Path) -> None:
    def made(folder: str) -> StageTrainer:
        return classifying.trainer(tmp_path / folder, TWO, controllers=[CONTROLLERS[name]], steps=8, accumulate=2)

    whole = made("whole")
    whole.run()
    first = made("cut")
    first.set_modes()
    for _ in range(5):
        first.result.curve.append(first.train_step())
    first.save()
    resumed = made("cut")
    resumed.run()
    for a, b in ((whole.student, resumed.student), (whole.aux, resumed.aux)):
        for (k, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
            assert torch.allclose(x.float(), y.float(), atol=1e-6), k


def run_stages(folder: Path, stages: list[Stage], student: nn.Module | None = None, **more: Any) -> tuple[list[StageResult], list[tuple[str, Row]]]:
    """Stages of a classifier under a teacher of its own kind, from its cache; results and rows as they came."""
    teacher, data, seen = Classifier(0, 16, sharp=30.0).eval().requires_grad_(False), Photos(), list[tuple[str, Row]]()
    source = Source(data, build_cache(teacher, data, folder / "cache", outputs=wanted(stages, teacher)))  # type: ignore[arg-type]

    def batches(step: Step) -> Batches:
        live = {n: t.preprocess for n, t in step.teachers.items()} if step.live else {}
        return Batches([source], step.student.preprocess, step.stage.batch_size, 0, live=live)

    results = train_stages(student or Classifier(1, 8), {teacher.name: teacher}, stages, batches, folder, lambda n, row: seen.append((n, row)), **more)
    return results, seen


@pytest.mark.parametrize("controller", [ref("stablekd", blocks=3, share=0.6), ref("m2mkd", modules=3, share=0.6)], ids=lambda c: c["name"])
def test_train_stages__every_stage_of_a_decomposition_learns(controller: dict, tmp_path: Path) -> None:
    stages = checks.expand([stage(objectives=[{"name": "kd"}], controllers=[controller], steps=200, lr=5e-3)])
    results, _ = run_stages(tmp_path, stages)
    assert len(results) == len(stages) > 3
    for result in results:
        losses = [row["loss"] for row in result.curve]
        assert np.mean(losses[-4:]) < np.mean(losses[:4]), result.name


def test_train_stages__an_assistant_learns_first_and_then_teaches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = checks.expand([stage(objectives=[{"name": "kd"}], controllers=[ref("assistants", names=["w12", "w10"], share=0.6)], steps=100)])
    built, taught = [], {}
    of = generations.teachers_of

    def spy(one: Stage, *rest: Any) -> Any:
        found = of(one, *rest)
        taught[one.name] = list(found)
        return found

    def build(name: str) -> nn.Module:
        built.append(name)
        return Classifier(3, int(name[1:]))

    monkeypatch.setattr("edgekd.distillation.trainer.teachers_of", spy)
    student = Classifier(1, 8)
    results, seen = run_stages(tmp_path, stages, student, build=build)
    assert built == ["w12", "w10"] and len(seen) == 100
    ends = {n: generations.end_loss(r.curve) for n, r in zip(built, results, strict=False)}
    best = max(built, key=lambda n: generations.score(generations.size(Classifier(0, 16)), generations.size(Classifier(0, int(n[1:]))), ends[n]))
    assert taught == {"main-assistant1": ["classifier16"], "main-assistant2": ["classifier16"], "main": [f"classifier{best[1:]}"]}
    for result in results:
        losses = [row["loss"] for row in result.curve]
        assert np.mean(losses[-4:]) < np.mean(losses[:4]), result.name
    again, student = [], Classifier(1, 8)
    run_stages(tmp_path, stages, student, build=lambda n: again.append(n) or Classifier(5, int(n[1:])))  # type: ignore[func-returns-value]
    assert not student.training and again == built


def test_train_stages__an_anchor_keeps_the_base_teacher_beside_the_assistant(tmp_path: Path) -> None:
    stages = checks.expand([stage(objectives=[{"name": "kd"}], controllers=[ref("assistants", names=["w12"], anchor=0.5, final_anchor=0.1)], steps=60)])
    results, _ = run_stages(tmp_path, stages, build=lambda n: Classifier(3, int(n[1:])))
    assert [r.name for r in results] == ["main-assistant1", "main"] and results[-1].curve[-1]["loss"] < results[-1].curve[0]["loss"]


def test_assistants__without_anything_that_builds_them_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing that builds the assistant 'a'"):
        run_stages(tmp_path, [stage(name="x", student="a", objectives=[{"name": "kd"}]), stage(objectives=[{"name": "kd"}])])


def test_train_stages__a_stage_may_start_from_a_checkpoint(tmp_path: Path) -> None:
    source = students.build("repvit_xs:width=0.25,depth=0.25", image_size=64, embed_dim=32)
    path = checkpoint.save(source, tmp_path / "start.safetensors", teacher="t")
    student = students.build("repvit_xs:width=0.25,depth=0.25", image_size=64, embed_dim=32)
    one = stage(objectives=[{"name": "feature_mse"}], trainable=["encoder"], steps=1, lr=1e-9, weight_decay=0.0, init_from=str(path), frozen_norm=True)
    scenes = Scenes(seed=4, count=4, size=64)
    data = Source(scenes, build_cache(source.eval(), scenes, tmp_path / "cache"))
    train_stages(student, source, [one], lambda step: Batches([data], student.preprocess, 4, 0), tmp_path)
    assert all(torch.allclose(a.float(), b.float(), atol=1e-3) for a, b in zip(student.state_dict().values(), source.state_dict().values(), strict=True))
    assert checks.check_recipe(Recipe.model_validate({"name": "r", "students": [{"name": "repvit_xs"}], "stages": [one.model_dump()]}))
    with pytest.raises(UsageError, match="no checkpoint"):
        checks.check_recipe(Recipe.model_validate({"name": "r", "students": [{"name": "repvit_xs"}], "stages": [one.model_dump() | {"init_from": "/no"}]}))


def test_load_teachers__of_one_name_are_refused() -> None:
    recipe = {"name": "r", "teacher": "sam_nano", "more_teachers": ["sam_nano"], "students": [{"name": "repvit_xs"}], "stages": [stage().model_dump()]}
    with pytest.raises(UsageError, match="have one name"):
        load_teachers(Recipe.model_validate(recipe), "scenes:seed=1,count=2", Path())


def test_score__is_the_loss_for_each_parameter_saved() -> None:
    """Teacher 100: 20 saved at loss 1, 60 saved at loss 2, and one that saves nothing."""
    assert generations.score(100, 80, 1.0)[0] == pytest.approx(-1 / 20) and generations.score(100, 40, 2.0)[0] == pytest.approx(-2 / 60)
    assert generations.score(100, 40, 2.0) > generations.score(100, 80, 1.0) > generations.score(100, 120, 0.1)
    assert generations.end_loss([{"loss": 9.0}] * 18 + [{"loss": 1.0}, {"loss": 3.0}, {"loss": None}]) == 2.0
