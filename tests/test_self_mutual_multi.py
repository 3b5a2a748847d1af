"""Learning from oneself, from a peer and from several teachers: numbers worked out by hand, and training through real stages."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import classifying
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from classifying import Classifier, Photos
from torch import Tensor, nn

from edgekd.distillation import points
from edgekd.distillation.batches import Batches, Source
from edgekd.distillation.cache import build_cache
from edgekd.distillation.copies import Frozen, Peer, apart, map_error
from edgekd.distillation.objectives.module_swap import like_own, run_between
from edgekd.distillation.objectives.unic import Ladder, Unic, kept
from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.distillation.step import Step, wanted
from edgekd.distillation.taps import as_map
from edgekd.distillation.targets.teacher_choice import cka
from edgekd.distillation.trainer import StageTrainer
from edgekd.errors import UsageError
from edgekd.recipe import Stage

B, C, E = 4, 3, 6


def stage(**changes: Any) -> Stage:
    given = {"name": "main", "objectives": [{"name": "kd"}], "trainable": ["encoder", "head"], "steps": 40, "batch_size": 5, "lr": 1e-2, "warmup": 2, "precision": "fp32"}
    return Stage.model_validate(given | changes)


def context(step: int = 0, steps: int = 11, **more: Any) -> Context:
    return Context(torch.ones(B, 1, 16, 16), images=torch.zeros(B, 3, 64, 64), step=step, steps=steps, generator=torch.Generator().manual_seed(0), **more)


def bound(name: str, student: nn.Module | None = None, ours: Outputs | None = None, theirs: Outputs | None = None, at: Context | None = None,
          point: str = "objective", teachers: dict | None = None, **options: Any) -> Any:
    plugin = points.build(point, name, options)
    torch.manual_seed(0)
    plugin.bind(Setup(student or Classifier(1, 8), None, stage(), ours or Outputs(), theirs or Outputs(), at or context(), teachers or {}))
    return plugin


class Fixed(nn.Module):
    """A model that gives one parameter whatever it sees, as logits and as the cells of an embedding."""

    def __init__(self, *values: float, embedding_only: bool = False) -> None:
        super().__init__()
        self.name, self.only = "fixed", embedding_only
        self.encoder = nn.Linear(1, 1)
        self.value = nn.Parameter(torch.tensor(values))
        self.register_buffer("seen", torch.tensor(0))

    @property
    def parts(self) -> dict[str, nn.Module]:
        return {"encoder": self}

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        self.seen += 1  # type: ignore[operator]
        embedding = self.value[:, None, None].expand(len(images), -1, 4, 4)
        return {"embedding": embedding} if self.only else {"embedding": embedding, "logits": self.value.expand(len(images), -1)}


# --- copies ------------------------------------------------------------------------------------------------------------------


def test_frozen__stays_in_eval_mode_and_follows_by_hand() -> None:
    model = Fixed(1.0, 2.0)
    copy = Frozen(model)
    holder = nn.ModuleList([copy]).train()
    assert holder.training and not copy.training and not copy.model.training and not any(p.requires_grad for p in copy.parameters())
    with torch.no_grad():
        model.value.copy_(torch.tensor([3.0, 0.0]))
    model.seen += 7
    copy.follow(model, 0.75)
    assert copy.model.value.tolist() == [1.5, 1.5] and int(copy.model.seen) == 7


def test_peer__has_other_weights_where_the_student_learns_and_its_frozen_norms_stay() -> None:
    model = Classifier(1, 8)
    model.encoder.norm = nn.BatchNorm2d(8)
    model.encoder.norm.requires_grad_(False)
    model.head.requires_grad_(False)
    peer = Peer(model).train()
    assert torch.equal(peer.model.head.weight, model.head.weight) and not torch.equal(peer.model.encoder.blocks[1][0].weight, model.encoder.blocks[1][0].weight)
    assert peer.model.encoder.blocks[1][0].training and not peer.model.encoder.norm.training and peer.training
    assert all(torch.equal(a, b) for a, b in zip(Peer(model, reset=False).model.parameters(), model.parameters(), strict=True))


def test_apart__logits_where_both_have_them_else_embeddings() -> None:
    ours, theirs = Outputs(torch.zeros(1, 2, 2, 2), logits=torch.zeros(1, 2)), Outputs(torch.full((1, 2, 2, 2), 3.0), logits=torch.tensor([[0.0, np.log(3.0)]]))
    valid = torch.ones(1, 1, 4, 4)
    assert apart(ours, theirs, valid, 1.0).item() == pytest.approx(0.25 * np.log(0.5) + 0.75 * np.log(1.5)), "KL of (1/4, 3/4) and (1/2, 1/2)"
    assert apart(replace(ours, logits=None), theirs, valid, 1.0).item() == 9.0


# --- oneself -------------------------------------------------------------------------------------------------------------------


def test_ema_self__follows_once_a_step_by_hand() -> None:
    """keep = min(0.5, 2 / 11) at step 1, then 3 / 12 at step 2."""
    student = Fixed(1.0, 0.0, embedding_only=True)
    one = bound("ema_self", student, decay=0.5)
    for step, value in ((0, 3.0), (1, 3.0), (1, 99.0), (2, 5.0)):
        with torch.no_grad():
            student.value.copy_(torch.tensor([value, 0.0]))
        ours = Outputs(student.outputs(torch.zeros(B, 3, 8, 8))["embedding"])
        loss = one(ours, Outputs(), context(step))
    first = 2 / 11 * 1.0 + 9 / 11 * 3.0
    average = 0.25 * first + 0.75 * 5.0
    assert one.average.model.value[0].item() == pytest.approx(average)
    assert loss.tolist() == pytest.approx([(5.0 - average) ** 2 / 2] * B)


def test_snapshot_self__is_taken_every_so_often_and_counts_more_and_more() -> None:
    student = Fixed(1.0, 0.0, embedding_only=True)
    one = bound("snapshot_self", student, every=4, alpha=0.5)
    found = []
    for step in range(11):
        with torch.no_grad():
            student.value[0] = 1.0 + step
        found.append(one(Outputs(student.outputs(torch.zeros(B, 3, 8, 8))["embedding"]), Outputs(), context(step))[0].item())
    past = [1, 1, 1, 1, 5, 5, 5, 5, 9, 9, 9]
    assert found == pytest.approx([0.5 * step / 10 * (1 + step - p) ** 2 / 2 for step, p in enumerate(past)])


def test_deep_supervision__by_hand() -> None:
    """Heads that give 0: the embedding's square, T^2 KL of the student's softmax and the uniform one, log C for a label, 0 without."""
    ours = Outputs(torch.full((B, E, 4, 4), 2.0), logits=torch.tensor([[0.0, 0.0, np.log(2.0)]]).repeat(B, 1).float(),
                   feats=(torch.randn(B, 5, 16, 16), torch.randn(B, 7, 8, 8), torch.randn(B, E, 4, 4)))
    one = bound("deep_supervision", ours=ours, feature=0.5, soft=2.0, hard=3.0, temperature=1.0)
    assert len(one.heads) == 2
    for p in one.heads.parameters():
        nn.init.zeros_(p)
    kl = 0.5 * np.log(0.25 * 3) + 0.5 * np.log(0.5 * 3)
    found = one(ours, Outputs(), context(classes=torch.tensor([0, 1, -1, 2])))
    wanted_ = [0.5 * 4 + 2 * kl + 3 * np.log(3)] * B
    wanted_[2] -= 3 * np.log(3)
    assert found.tolist() == pytest.approx(wanted_)


def test_deep_supervision__the_deepest_gets_no_gradient() -> None:
    deep, early = torch.randn(B, E, 4, 4, requires_grad=True), torch.randn(B, 5, 8, 8, requires_grad=True)
    ours = Outputs(deep, feats=(early, deep))
    bound("deep_supervision", ours=ours)(ours, Outputs(), context()).sum().backward()
    assert deep.grad is None and early.grad is not None
    with pytest.raises(UsageError, match="one stage only"):
        bound("deep_supervision", ours=replace(ours, feats=(deep,)))


# --- a peer ---------------------------------------------------------------------------------------------------------------------


def test_mutual__by_hand_and_who_learns_from_whom() -> None:
    student = Fixed(0.0, 0.0)
    one = bound("mutual", student, reset=False, taught=0.5)
    with torch.no_grad():
        one.peer.model.value.copy_(torch.tensor([0.0, np.log(3.0)]))
    teacher = Outputs(logits=torch.tensor([[np.log(3.0), 0.0]]).repeat(B, 1).float())
    logits = torch.zeros(B, 2, requires_grad=True)
    found = one(Outputs(logits=logits), teacher, context())
    to_peer = 0.25 * np.log(0.5) + 0.75 * np.log(1.5)  # KL(peer || student)
    to_student = 0.5 * np.log(2.0) + 0.5 * np.log(2 / 3)  # KL(student || peer)
    to_teacher = 0.75 * np.log(3.0) + 0.25 * np.log(1 / 3)  # KL(teacher || peer)
    assert found.tolist() == pytest.approx([to_peer + to_student + 0.5 * to_teacher] * B)
    found.mean().backward()
    assert logits.grad is not None
    assert logits.grad[0].tolist() == pytest.approx([0.25 / B, -0.25 / B]), "softmax(student) - softmax(peer), nothing of the other terms"
    assert one.peer.model.value.grad.tolist() == pytest.approx([(0.25 - 0.5) + 0.5 * (0.25 - 0.75), (0.75 - 0.5) + 0.5 * (0.75 - 0.25)])
    assert student.value.grad is None


def test_mutual_embedding__by_hand() -> None:
    one = bound("mutual_embedding", Fixed(1.0, 1.0, embedding_only=True), reset=False, taught=0.5)
    ours, theirs = Outputs(torch.full((B, 2, 4, 4), 3.0)), Outputs(torch.full((B, 2, 4, 4), 4.0))
    assert one(ours, theirs, context()).tolist() == pytest.approx([4 + 4 + 0.5 * 9] * B)


# --- several teachers -------------------------------------------------------------------------------------------------------------


def teachers(**more: Any) -> dict[str, Outputs]:
    g = torch.Generator().manual_seed(5)
    return {"one": Outputs(torch.randn(B, E, 4, 4, generator=g), logits=torch.randn(B, C, generator=g), pooled=torch.randn(B, 5, generator=g)),
            "two": Outputs(torch.randn(B, E, 8, 8, generator=g), logits=torch.randn(B, C, generator=g), pooled=torch.randn(B, 9, generator=g))} | more


def test_kept__the_hardest_teacher_always_counts_and_the_others_now_and_then() -> None:
    losses = torch.rand(3, 4000, generator=torch.Generator().manual_seed(1))
    found = kept(losses, 0.25, torch.Generator().manual_seed(2))
    hardest = losses == losses.amax(0)
    assert bool((found[hardest] == 1).all()) and found[~hardest].mean().item() == pytest.approx(0.75, abs=0.02)
    assert torch.equal(kept(losses, 1.0, None), hardest.float()) and bool((kept(losses, 0.0, None) == 1).all())


def test_unic__by_hand() -> None:
    """Ladders that give a constant map of ones; every teacher's cells are c x ones: cosine 0, smooth L1 |1 - c| - 0.5 or its half square."""
    given = {"one": Outputs(torch.full((B, E, 4, 4), 3.0)), "two": Outputs(torch.full((B, 2, 8, 8), 0.5))}
    ours = Outputs(torch.zeros(B, E, 4, 4), feats=(torch.randn(B, 3, 16, 16), torch.randn(B, 4, 8, 8)))
    one = bound("unic", ours=ours, theirs=given["one"], at=context(teachers=given), standardise=False, drop=1.0)
    for ladder in one.ladders:
        for step in ladder.steps:
            nn.init.zeros_(step[2].weight)
            nn.init.constant_(step[2].bias, 0.5)
    each = [(2.0 - 0.5) / 2, 0.5 * 0.5**2 / 2]
    assert one.eval()(ours, given["one"], context(teachers=given)).tolist() == pytest.approx([np.mean(each)] * B), "not in training: no dropping"
    assert one.train()(ours, given["one"], context(teachers=given)).tolist() == pytest.approx([each[0]] * B), "all but the hardest are dropped"


def test_unic__teachers_are_standardised_by_what_was_seen_so_far() -> None:
    norm = nn.BatchNorm2d(1, affine=False, momentum=None)
    first, second = torch.tensor([0.0, 4.0]).view(2, 1, 1, 1), torch.tensor([4.0, 8.0]).view(2, 1, 1, 1)
    Unic.scaled(first, norm)
    found = Unic.scaled(second, norm).flatten()
    deviation = np.sqrt(8.0 + 1e-5)  # of both batches; the mean of their means is (2 + 6) / 2
    assert found.tolist() == pytest.approx([0.0, 4.0 / deviation])
    assert torch.equal(Unic.scaled(second, norm.eval()).flatten(), found), "not in training: nothing is taken in"


def test_unic__each_teacher_keeps_its_own_grid_and_width() -> None:
    maps = (torch.randn(2, 3, 16, 16), torch.randn(2, 4, 8, 8))
    assert Ladder([3, 4], 7, 5)(maps, (4, 4)).shape == (2, 7, 4, 4)
    with pytest.raises(UsageError, match="several teachers"):
        bound("unic", ours=Outputs(torch.zeros(B, E, 4, 4), feats=maps), at=context(teachers={"one": teachers()["one"]}))


def test_teacher_mean__by_hand() -> None:
    given = teachers()
    one = bound("teacher_mean", at=context(teachers=given), point="target", weights=[1, 3])
    found = one(Outputs(), given["one"], context(teachers=given))
    mean = 0.25 * given["one"]["logits"].softmax(-1) + 0.75 * given["two"]["logits"].softmax(-1)
    assert torch.allclose(found["logits"], mean.log(), atol=1e-5)
    resampled = F.interpolate(given["two"]["embedding"], (4, 4), mode="bilinear", antialias=True)
    assert torch.allclose(found["embedding"], 0.25 * given["one"]["embedding"] + 0.75 * resampled, atol=1e-6)
    assert found.pooled is given["one"].pooled, "of different widths: the first teacher's stays"
    plain = bound("teacher_mean", at=context(teachers=given), point="target", probabilities=False)(Outputs(), given["one"], context(teachers=given))
    assert torch.allclose(plain["logits"], (given["one"]["logits"] + given["two"]["logits"]) / 2, atol=1e-6)


def test_teacher_mean__weights_go_to_the_final_ones_in_a_straight_line() -> None:
    given = teachers()
    one = bound("teacher_mean", at=context(teachers=given), point="target", weights=[1, 0], final_weights=[1, 3])
    for step, first in ((0, 1.0), (5, 1 - 0.5 * 0.75), (10, 0.25)):
        assert one.shares(list(given.values()), context(step, teachers=given))[:, 0].tolist() == pytest.approx([first, 1 - first])


def test_teacher_mean__confidence_by_hand() -> None:
    """Photo 0 has a label: cross-entropies; photo 1 has none: entropies."""
    a, b = torch.tensor([[2.0, 0.0, 0.0], [5.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    given = {"one": Outputs(logits=a), "two": Outputs(logits=b)}
    at = context(teachers=given, classes=torch.tensor([1, -1]))
    found = bound("teacher_mean", at=at, point="target", confidence=True).shares(list(given.values()), at)
    p = a.softmax(-1)
    doubts = torch.tensor([[-float(p[0, 1].log()), -float((p[1] * p[1].log()).sum())], [float(np.log(3))] * 2])
    assert torch.allclose(found, 1 - doubts.softmax(0), atol=1e-6) and found.sum(0).tolist() == pytest.approx([1, 1])
    assert found[0, 0] < 0.5 < found[0, 1], "wrong on photo 0, sure on photo 1"


@pytest.mark.parametrize(("options", "given", "said"), [
    ({"weights": [1, 2, 3]}, teachers(), "3 weights for 2 teachers"), ({}, {"one": teachers()["one"]}, "there is one"),
    ({}, {"one": Outputs(torch.zeros(B, 3, 4, 4)), "two": Outputs(torch.zeros(B, 4, 4, 4))}, "no output of one shape"),
    ({"confidence": True}, {"one": Outputs(torch.zeros(B, 3, 4, 4)), "two": Outputs(torch.zeros(B, 3, 4, 4))}, "confidence is read from logits"),
    ({"weights": [0, 0]}, teachers(), "not all 0"),
])
def test_teacher_mean__what_cannot_be_mixed_is_refused(options: dict, given: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        bound("teacher_mean", at=context(teachers=given), point="target", **options)
    assert caught.value.hint


def test_cka__by_hand() -> None:
    x = torch.tensor([[1.0], [-1.0], [0.0]])
    assert cka(x, -3 * x).item() == pytest.approx(1.0) and cka(x, torch.tensor([[1.0], [1.0], [-2.0]])).item() == pytest.approx(0.0)
    y = torch.tensor([[1.0], [0.0], [-1.0]])  # (x . y)^2 / (|x|^2 |y|^2)
    assert cka(x, y).item() == pytest.approx(1 / 4)


@pytest.mark.parametrize("by", ["nearest", "weighted"])
def test_teacher_choice__after_enough_photos_the_teacher_that_knows_the_classes_speaks(by: str) -> None:
    labels = torch.tensor([0, 1, 2, 0])
    good = Outputs(logits=torch.full((B, C), 1.0), pooled=F.one_hot(labels, C).float())
    bad = Outputs(logits=torch.full((B, C), -1.0), pooled=torch.tensor([[1.0, 0.0], [1.0, 0.2], [0.0, 0.5], [0.3, 0.0]]))
    given = {"bad": bad, "good": good}
    one = bound("teacher_choice", at=context(teachers=given), point="target", by=by, photos=6, power=3.0, probabilities=False)
    at = context(teachers=given, classes=labels)
    assert one(Outputs(), bad, at)["logits"].flatten().tolist() == pytest.approx([0.0] * B * C), "both alike"
    found = one(Outputs(), bad, at)["logits"][0, 0].item()
    assert int(one.count) == 6 and one.labels.tolist() == [0, 1, 2, 0, 0, 1]
    worse, best = one.similarities(2).tolist()
    assert best == pytest.approx(1.0) and worse < 0.9
    share = 1.0 if by == "nearest" else 1 / (1 + worse**3)
    assert found == pytest.approx(2 * share - 1, abs=1e-5)


# --- a block in the teacher's place --------------------------------------------------------------------------------------------


def test_run_between__is_the_blocks_between_on_what_is_given() -> None:
    student = Classifier(1, 8)
    given, images = torch.randn(2, 8, 16, 16), torch.zeros(2, 3, 64, 64)
    blocks = student.encoder.blocks
    found = run_between(student, blocks[0], blocks[1], given, images)  # type: ignore[index, arg-type]
    assert torch.allclose(found, blocks[1](given), atol=1e-6)  # type: ignore[index, operator]
    assert torch.equal(student.outputs(images)["logits"], student.outputs(images)["logits"]), "the hooks are gone"
    with pytest.raises(UsageError, match="not run after"):
        run_between(student, blocks[1], nn.Identity(), given, images)  # type: ignore[index, arg-type]


@pytest.mark.parametrize("own", [torch.randn(2, 5, 4, 4), torch.randn(2, 4, 4, 5), torch.randn(2, 16, 5), torch.randn(2, 17, 5)])
def test_like_own__is_the_inverse_of_as_map(own: Tensor) -> None:
    given = torch.randn(2, 5, 4, 4)
    put = like_own(given, own, None)
    assert put.shape == own.shape and torch.equal(as_map(put), given)
    if own.shape[1] == 17:
        assert torch.equal(put[:, 0], own[:, 0]), "the class token stays"


def test_module_swap__by_hand() -> None:
    """One module, stitches that pass everything through: the error of the student's second block on the teacher's first map."""
    student = Classifier(1, 8).eval()
    maps = (torch.randn(B, 8, 16, 16), torch.randn(B, 8, 8, 8))
    images = torch.randn(B, 3, 64, 64)
    ours = Outputs(feats=(torch.randn(B, 8, 16, 16), torch.randn(B, 8, 8, 8)), taps={"stage1": torch.zeros(1), "stage2": torch.zeros(1)})
    ours = replace(ours, taps={"stage1": ours.feats[0], "stage2": ours.feats[1]})
    at = replace(context(), images=images)
    one = bound("module_swap", student, ours, Outputs(feats=maps), at, module=2)
    assert set(one.into) == set(one.out) == {"1"}
    for stitch in (one.into["1"], one.out["1"]):
        nn.init.dirac_(stitch.weight)
        nn.init.zeros_(stitch.bias)
    wanted_ = map_error(student.encoder.blocks[1](maps[0]), maps[1], at.valid)  # type: ignore[index, operator]
    assert torch.allclose(one(ours, Outputs(feats=maps), at), wanted_, atol=1e-5)
    with pytest.raises(UsageError, match="there are 2 modules"):
        bound("module_swap", student, ours, Outputs(feats=maps), at, module=3)


# --- training -------------------------------------------------------------------------------------------------------------------


class Shown:
    """The batches of a stage together with what its teachers gave for them."""

    def __init__(self, folder: Path, count: int, **changes: Any) -> None:
        self.teachers = {f"classifier{w}": Classifier(w, w, sharp=30.0).eval().requires_grad_(False) for w in (16, 12, 20)[:count]}
        self.stage, data = stage(**changes), Photos()
        caches = [build_cache(t, data, folder / n, outputs=wanted([self.stage], t)) for n, t in self.teachers.items()]  # type: ignore[arg-type]
        source = Source(data, *caches)  # type: ignore[arg-type]

        def batches(step: Step) -> Batches:
            live = {n: t.preprocess for n, t in step.teachers.items()} if step.live else {}
            return Batches([source], step.student.preprocess, self.stage.batch_size, 0, live=live)

        self.trainer = StageTrainer(Classifier(1, 8), self.teachers, self.stage, batches, folder / "state.pt")


ALONE: dict[str, dict] = {
    "ema_self": {"objectives": [{"name": "kd"}, {"name": "ema_self", "options": {"decay": 0.9}}]},
    "snapshot_self": {"objectives": [{"name": "kd"}, {"name": "snapshot_self", "options": {"every": 10}}]},
    # the deepest learns from labels as in the paper; under kd its own growing logits are the larger part of the loss
    "deep_supervision": {"objectives": [{"name": "deep_supervision", "options": {"hard": 1.0, "soft": 0.1, "feature": 0.1}}, {"name": "cross_entropy"}]},
    "mutual": {"objectives": [{"name": "kd"}, {"name": "mutual"}]},
    "mutual_embedding": {"objectives": [{"name": "mutual_embedding"}, {"name": "kd"}]},
    "module_swap": {"objectives": [{"name": "module_swap"}], "trainable": ["encoder"]},
}
SEVERAL: dict[str, dict] = {
    "unic": {"objectives": [{"name": "unic"}], "trainable": ["encoder"]},
    "teacher_mean": {"targets": [{"name": "teacher_mean", "options": {"confidence": True}}]},
    "teacher_choice": {"targets": [{"name": "teacher_choice", "options": {"photos": 10}}]},
}
CASES = {name: (1, changes) for name, changes in ALONE.items()} | {name: (3, changes) for name, changes in SEVERAL.items()}


@pytest.mark.parametrize("name", CASES)
def test_run__the_loss_falls_and_nothing_stays_in_the_student(name: str, tmp_path: Path) -> None:
    one = Shown(tmp_path, CASES[name][0], **CASES[name][1]).trainer
    keys = set(one.student.state_dict())
    assert classifying.fall(one) < 0.9
    assert set(one.student.state_dict()) == keys and any(name in key for key in one.aux)


def test_run__the_peer_learns_too_and_the_average_is_not_optimised(tmp_path: Path) -> None:
    one = Shown(tmp_path, 1, objectives=[{"name": "kd"}, {"name": "mutual"}, {"name": "ema_self"}], steps=3).trainer
    peer = one.step_module.objectives["mutual"].peer.model  # type: ignore[union-attr]
    average = one.step_module.objectives["ema_self"].average.model  # type: ignore[union-attr]
    trained = {id(p) for g in one.optimizer.param_groups for p in g["params"]}
    assert all(id(p) in trained for p in peer.parameters()) and not any(id(p) in trained for p in average.parameters())  # type: ignore[union-attr]
    before = peer.head.weight.detach().clone()  # type: ignore[union-attr]
    one.run()
    assert not torch.equal(before, peer.head.weight)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", CASES)
def test_run__killed_and_resumed_equals_one_run(name: str, tmp_path: Path) -> None:
    count, changes = CASES[name]
    changes = changes | {"steps": 9, "accumulate": 2}
    whole = Shown(tmp_path / "whole", count, **changes).trainer
    whole.run()
    first = Shown(tmp_path / "cut", count, **changes).trainer
    first.set_modes()
    for _ in range(5):
        first.result.curve.append(first.train_step())
    first.save()
    resumed = Shown(tmp_path / "cut", count, **changes).trainer
    with torch.no_grad():
        for p in (*resumed.student.parameters(), *resumed.aux.parameters()):
            p.add_(1.0)  # everything must come from the file
    resumed.run()
    for a, b in ((whole.student, resumed.student), (whole.aux, resumed.aux)):
        for (k, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
            assert torch.allclose(x.float(), y.float(), atol=1e-5), k


@pytest.mark.parametrize("name", ["unic", "teacher_mean"])
def test_run__live_teachers_teach_what_their_caches_do(name: str, tmp_path: Path) -> None:
    curves = []
    for asked in ("cached", "live"):
        one = Shown(tmp_path / asked, 2, **SEVERAL[name], teacher=asked, steps=4).trainer
        curves.append([row["loss"] for row in one.run().curve])
    assert curves[0] == pytest.approx(curves[1], rel=0.05), "a cache is rounded, the photos of a batch are whole bytes"


def test_step__every_teacher_is_told_by_its_name(tmp_path: Path) -> None:
    seen: list[dict[str, int]] = []

    class Spy(points.Objective):
        name, family, paper = "spy", "multi_teacher", "none"
        needs = frozenset({"embedding", "teachers"})

        def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
            seen.append({n: o["embedding"].shape[1] for n, o in context.teachers.items()})
            assert teacher.embedding is next(iter(context.teachers.values())).embedding
            return student["embedding"].mean((1, 2, 3)) ** 2

    one = Shown(tmp_path, 3, objectives=[{"name": "feature_mse"}], trainable=["encoder"])
    one.trainer.step_module.objectives["feature_mse"] = Spy()
    one.trainer.train_step()
    assert seen == [{"classifier16": 16, "classifier12": 12, "classifier20": 20}]


def test_cache__a_further_teacher_without_the_output_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="fixed gives no logits"):
        build_cache(as_teacher(Fixed(1.0, 2.0, embedding_only=True)), Photos(), tmp_path, outputs={"logits": None})  # type: ignore[arg-type]


def as_teacher(model: Fixed) -> Fixed:
    model.preprocess = Classifier(0, 8).preprocess  # type: ignore[assignment]
    return model.eval()


def test_step__controllers_are_told_what_was_compared(tmp_path: Path) -> None:
    one = Shown(tmp_path, 2, targets=[{"name": "teacher_mean", "options": {"weights": [0, 1]}}]).trainer
    seen: list[Context] = []
    one.step_module.controllers = [Told(seen.append)]
    one.train_step()
    at = seen[0]
    assert at.student is not None and at.teacher is not None and at.student["logits"].shape == (5, 5) and not at.student["logits"].requires_grad
    second = one.step_module.teachers["classifier12"]
    with torch.no_grad():
        assert torch.allclose(at.teacher["logits"].softmax(-1), second.outputs(at.images)["logits"].softmax(-1), atol=0.05), "after the target"
    assert at.step == 0 and at.steps == 40 and at.images_total == 15


class Told(points.Controller):
    """Passes on what it is told."""

    name, family, paper = "told", "adaptive_weighting", "none"

    def __init__(self, tell: Callable[[Context], None]) -> None:
        super().__init__()
        self.tell = tell

    def weigh(self, losses: Any, context: Context) -> dict[str, Tensor]:
        self.tell(context)
        return dict(losses)
