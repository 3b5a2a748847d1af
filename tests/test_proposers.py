"""Proposers: scores by hand, rankings that are known beforehand, and what is recommended from the runs there are."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from plugin_samples import Network
from tiny import tiny_sam
from torch import Tensor, nn

from edgekd import console, students
from edgekd.data.scenes import Scenes
from edgekd.distillation import points, verbs
from edgekd.distillation.material import TrainingData
from edgekd.distillation.proposers import _history, autodistil, diswot, recipe_planner
from edgekd.distillation.proposers._looking import photos, redrawn, size
from edgekd.distillation.proposers.recipe_planner import recommend
from edgekd.errors import UsageError
from edgekd.models.sam import Sam
from edgekd.protocols import Preprocess
from edgekd.recipe import Recipe

REPVIT = "repvit_xs:width=0.25,depth=0.25"


def scenes(count: int = 8) -> Scenes:
    return Scenes(seed=4, count=count, size=64)


def build(name: str, image_size: int) -> Sam:
    return students.build(name, image_size=image_size, shape=tiny_sam().shape)


class Blind(nn.Module):
    """An encoder that sees the mean colour alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.mean((2, 3), keepdim=True)).expand(-1, -1, 4, 4)


def sam(encoder: nn.Module, name: str) -> Sam:
    teacher = tiny_sam()
    return Sam(name, encoder, teacher.shape, Preprocess(64))


class Seeing(nn.Sequential):
    """An encoder of patches."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 32, 16, 16), nn.ReLU(), nn.Conv2d(32, 32, 1))


KINDS = {"blind": Blind, "seeing": Seeing}


def patches() -> Sam:
    """A teacher whose maps are the photo, coarser."""
    encoder = nn.Conv2d(3, 32, 16, 16, bias=False)
    torch.manual_seed(0)
    encoder.weight.data = (torch.randn(32, 3) / 256)[:, :, None, None].expand(-1, -1, 16, 16).clone()
    return sam(encoder, "patches").eval().requires_grad_(False)


def build_kind(name: str, image_size: int) -> Sam:
    torch.manual_seed(1)
    return sam(KINDS[name](), name)


# --- what they look at ------------------------------------------------------------------------------------------------------------


def test_photos__are_spread_over_the_data() -> None:
    data = scenes(9)
    assert [np.array_equal(a, data[i].image) for a, i in zip(photos(data, 3), (0, 4, 8), strict=True)] == [True] * 3
    assert len(photos(data, 100)) == 9


def test_redrawn__forgets_a_checkpoint_and_is_the_same_again() -> None:
    def weights(start: float) -> Tensor:
        model = Network(1)
        nn.init.constant_(model.encoder.blocks[0].weight, start)  # type: ignore[index, union-attr, arg-type]
        before = torch.get_rng_state()
        redrawn(model, 5)
        assert torch.equal(before, torch.get_rng_state())
        return model.encoder.blocks[0].weight.detach()  # type: ignore[index, union-attr, return-value]

    assert torch.equal(weights(0.0), weights(7.0)) and weights(0.0).std() > 0


# --- without training -------------------------------------------------------------------------------------------------------------


def test_apart__by_hand() -> None:
    a, b = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    half = 0.5**0.5
    assert diswot.apart(a, a) == 0.0 and diswot.apart(a, 5 * a) == pytest.approx(0.0, abs=1e-6), "lengths do not matter"
    assert diswot.apart(a, b) == pytest.approx((1 - half) ** 2 + half**2, rel=1e-5)
    assert diswot.apart(torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]), a) == 0.0, "nor do widths"


def test_activation__is_grad_cam_of_the_pooled_energy() -> None:
    maps = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad((0.5 * maps.mean((2, 3)).square()).sum(), maps)
    cam = F.relu((gradient.sum((2, 3), keepdim=True) * maps).sum(1)).flatten(1)
    assert torch.allclose(diswot.activation(maps.detach()), cam.detach(), atol=1e-6)


def test_diswot__the_teacher_s_own_maps_are_at_no_distance() -> None:
    maps = torch.randn(4, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    assert sum(diswot.distances(maps, maps)) == pytest.approx(0.0, abs=1e-6)
    turned = torch.einsum("bchw,cd->bdhw", maps, torch.linalg.qr(torch.randn(6, 6))[0])
    assert diswot.distances(turned, maps)[1] == pytest.approx(0.0, abs=1e-5), "relations do not depend on the basis"
    assert sum(diswot.distances(torch.randn(4, 6, 4, 4), maps)) > 0.1


def test_diswot__one_that_sees_comes_before_one_that_does_not() -> None:
    ranked = points.build("proposer", "diswot", {"images": 8}).propose([("blind", 64), ("seeing", 64)], build_kind, patches(), scenes())
    assert [s.student for s in ranked] == ["seeing", "blind"] and ranked[0].score > ranked[1].score and ranked[0].score <= 0
    again = points.build("proposer", "diswot", {"images": 8}).propose([("seeing", 64), ("blind", 64)], build_kind, patches(), scenes())
    assert again == ranked, "the same whatever the order and whatever ran before"


def test_diswot__sizes_may_differ_from_the_teacher_s() -> None:
    ranked = points.build("proposer", "diswot", {"images": 4, "seeds": 2}).propose([(REPVIT, 64), (REPVIT, 32)], build, tiny_sam(), scenes(4))
    assert {s.image_size for s in ranked} == {64, 32} and all(np.isfinite(s.score) for s in ranked)


def test_diswot__evolution_adds_widths_and_depths_that_can_be_built_and_are_not_larger() -> None:
    given = [(REPVIT, 64), ("repvit_xs:width=0.5,depth=0.25", 64)]
    ranked = points.build("proposer", "diswot", {"images": 4, "generations": 2, "population": 2}).propose(given, build, tiny_sam(), scenes(4))
    new = [s for s in ranked if (s.student, 64) not in given]
    most = max(size(build(*one)) for one in given)
    assert new and all("found by" in s.reason for s in new) and all(size(build(s.student, 64)) <= most for s in new)
    assert ranked == sorted(ranked, key=lambda s: -s.score)


def test_changed__another_student_of_the_same_kind() -> None:
    rng = np.random.default_rng(0)
    found = {diswot.changed((REPVIT, 64), rng) for _ in range(20)}
    assert len(found) > 3 and all(one is not None and one[0].startswith("repvit_xs") and one[1] == 64 for one in found)
    assert diswot.changed(("no_such_student", 64), rng) is None


# --- with shared weights ------------------------------------------------------------------------------------------------------------


def test_super_student__lends_its_leading_slices_and_learns_from_them() -> None:
    torch.manual_seed(0)
    large, small = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)), nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    shared = autodistil.SuperStudent({("large", 1): large, ("small", 1): small}, lr=0.1)
    shared.lend(("small", 1))
    assert torch.equal(small[0].weight, large[0].weight[:3]) and torch.equal(small[1].weight, large[1].weight[:, :3])
    small(torch.ones(1, 4)).sum().backward()
    shared.learn(("small", 1))
    shared.lend(("large", 1))
    assert not torch.equal(large[0].weight[:3], small[0].weight) and small[0].weight.grad is None
    before = large[1].weight[:, 3:].clone()
    shared.lend(("small", 1))
    assert torch.equal(small[0].weight, large[0].weight[:3]) and torch.equal(large[1].weight[:, 3:], before), "what it does not share is not touched"


def test_autodistil__one_that_can_learn_comes_before_one_that_cannot() -> None:
    ranked = points.build("proposer", "autodistil", {"steps": 25, "images": 8}).propose([("blind", 64), ("seeing", 64)], build_kind, patches(), scenes())
    assert [s.student for s in ranked] == ["seeing", "blind"] and "steps" in ranked[0].reason
    assert ranked == points.build("proposer", "autodistil", {"steps": 25, "images": 8}).propose([("blind", 64), ("seeing", 64)], build_kind, patches(), scenes())


def test_autodistil__more_steps_leave_a_smaller_error() -> None:
    given = [(REPVIT, 64), ("repvit_xs:width=0.5,depth=0.25", 64)]
    few, many = ({(s.student, s.image_size): s.score for s in points.build("proposer", "autodistil", {"steps": n, "images": 8}).propose(given, build, tiny_sam(3), scenes())}
                 for n in (1, 12))
    assert set(few) == set(given) and all(many[one] > few[one] for one in given)


def test_space__a_student_without_its_width_and_depth() -> None:
    assert autodistil.space("repvit_xs:width=0.5") == autodistil.space("repvit_xs-depth0.5") == "repvit_xs"
    assert autodistil.space("somebody_else") == "somebody_else"


def test_autodistil__gap_by_hand_and_refusals() -> None:
    ours, theirs = torch.zeros(2, 3, 4, 4), torch.full((2, 5, 4, 4), 2.0)
    assert autodistil.gap({"embedding": ours}, {"embedding": theirs}).tolist() == [1.0, 1.0]
    with pytest.raises(UsageError, match="channels") as caught:
        autodistil.gap({"embedding": theirs}, {"embedding": ours})
    assert "diswot" in str(caught.value.hint)
    a, t = torch.randn(2, 3), torch.randn(2, 3)
    kl = F.kl_div(a.log_softmax(1), t.softmax(1), reduction="none").sum(1)
    assert torch.allclose(autodistil.gap({"embedding": ours, "logits": a}, {"embedding": ours, "logits": t}), kl, atol=1e-6)


# --- from earlier runs ----------------------------------------------------------------------------------------------------------------


def earlier(folder: Path, name: str, recipe: str, kept: dict[tuple[str, int], float], objectives: tuple[str, ...] = ("feature_mse",), teacher: str = "sam_nano") -> None:
    """A run as `compress` leaves it, as far as it is read."""
    (folder / name).mkdir(parents=True)
    rows: list[dict[str, Any]] = [{"student": s, "image_size": n, "scheme": scheme, "trained": True, "accuracy": {"box_miou": 0.8 * k if scheme == "fp32" else 0.1}}
                                  for (s, n), k in kept.items() for scheme in ("fp32", "w8_dynamic")]
    rows.append({"student": "untrained", "image_size": 64, "scheme": "fp32", "trained": False, "accuracy": None})
    (folder / name / "report.json").write_text(json.dumps({"run": {"recipe": recipe}, "teacher": {"name": teacher, "accuracy": {"box_miou": 0.8}},
                                                           "protocol": {"images": 15}, "candidates": rows}))
    stages = [{"objectives": [{"name": o} for o in objectives], "steps": 40}]
    (folder / name / "recipe.resolved.yaml").write_text(json.dumps({"stages": stages}))


def test_history__reads_what_a_run_kept_of_its_teacher_and_leaves_out_what_is_broken(tmp_path: Path) -> None:
    earlier(tmp_path, "a", "default", {("repvit_s", 256): 0.9, ("repvit_s", 192): 0.85})
    (tmp_path / "b").mkdir()
    (tmp_path / "b/report.json").write_text("{")
    (tmp_path / "c").mkdir()
    (tmp_path / "c/report.json").write_text('{"teacher": {}}')
    found = _history.runs(tmp_path, "box_miou")
    assert {(r.student, r.image_size): round(r.kept, 4) for r in found} == {("repvit_s", 256): 0.9, ("repvit_s", 192): 0.85}
    assert found[0].objectives == ("feature_mse",) and found[0].steps == 40
    assert _history.runs(tmp_path, "top1") == [] and _history.runs(tmp_path / "none", "box_miou") == []


def test_history__reads_the_reports_that_compress_writes(root: Path) -> None:
    if not (root / "runs/demo/report.json").is_file():
        pytest.skip("the demo's report is not in this checkout")
    found = _history.runs(root / "runs", "box_miou")
    assert any(r.folder == "demo" and 0.5 < r.kept < 1.1 and r.steps > 0 and "feature_mse" in r.objectives for r in found)


def test_recipe_planner__ranks_by_what_was_kept_and_relatives_count_less(tmp_path: Path) -> None:
    earlier(tmp_path, "a", "default", {("repvit_s", 256): 0.9, ("tinyvit_5m", 256): 0.97})
    earlier(tmp_path, "b", "default", {("repvit_s", 256): 0.94})
    earlier(tmp_path, "c", "default", {("nanosam", 256): 0.99}, teacher="another")
    ranked = points.build("proposer", "recipe_planner", {"runs": str(tmp_path)}).propose(
        [("nanosam", 256), ("repvit_s", 192), ("repvit_s", 256), ("tinyvit_5m", 256)], None, Network(1) | named("sam_nano"), scenes(1))
    assert [(s.student, s.image_size) for s in ranked] == [("tinyvit_5m", 256), ("repvit_s", 256), ("repvit_s", 192), ("nanosam", 256)]
    assert ranked[1].score == pytest.approx(0.92) and ranked[2].score == pytest.approx(0.92 * 0.9) and ranked[3].score == 0
    assert "runs/a, runs/b" in ranked[1].reason and "another size" in ranked[2].reason and "no earlier run" in ranked[3].reason


class named:
    """`Network(1) | named("x")` is that network called x."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __ror__(self, model: Any) -> Any:
        model.name = self.name
        return model


def test_recommend__measured_recipes_come_with_their_source_and_more_runs_count_more(tmp_path: Path) -> None:
    for i in range(3):
        earlier(tmp_path / "runs", f"many{i}", "default", {("repvit_s", 256): 0.9})
    earlier(tmp_path / "runs", "one", "edge_sam_nano", {("repvit_s", 256): 0.92}, ("feature_mse", "prompt_masks"))
    rows = recommend(100, student="repvit_s", runs=tmp_path / "runs", claims=tmp_path)
    measured = [r for r in rows if r["evidence"] == "measured"]
    assert [r["recipe"] for r in measured] == ["default", "edge_sam_nano"] and measured[0]["confidence"] > measured[1]["confidence"]
    assert measured[0]["source"] == "runs/many0, runs/many1, runs/many2" and "90.0%" in measured[0]["why"] and measured[0]["steps"] == 40
    strange = [r for r in recommend(100, teacher="another", runs=tmp_path / "runs", claims=tmp_path) if r["evidence"] == "measured"]
    assert strange[0]["confidence"] < measured[0]["confidence"] and "another teacher" in strange[0]["why"]
    assert [r["confidence"] for r in rows] == sorted((r["confidence"] for r in rows), reverse=True)


def test_recommend__claims_that_were_rerun_count_by_their_interval(tmp_path: Path) -> None:
    def arm(name: str, mean: float, low: float) -> dict[str, Any]:
        difference = {"box_miou": {"mean": mean, "low": low, "high": 2 * mean}}
        return {"arm": name, "seeds": 3, "against_feature_mse": {"difference": difference}}

    league = [arm("feature_mse + affinity", 1.5, 0.5), arm("feature_l1", 0.4, -0.6), arm("feature_huber", -1.0, -2.0), arm("feature_mse", 0.0, 0.0)]
    (tmp_path / "claims-2026-01-01.json").write_text("broken")
    (tmp_path / "claims-2025-01-01.json").write_text(json.dumps({"league": league}))
    rows = [r for r in recommend(2000, runs=tmp_path, claims=tmp_path) if r["source"] == "claims-2025-01-01.json"]
    assert [r["plug_ins"] for r in rows] == [{"objective": ["feature_mse", "affinity"]}, {"objective": ["feature_l1"]}]
    assert rows[0]["confidence"] > rows[1]["confidence"] and "+1.5 points" in rows[0]["why"]


def advised(images: int, **facts: Any) -> dict[str, dict[str, Any]]:
    return {r["source"]: r for r in recommend(images, runs="nowhere", claims="nowhere", **facts)}


def test_recommend__without_history_papers_speak_by_size_task_and_labels() -> None:
    few, many = advised(40), advised(5000)
    assert "EdgeSAM issue 55; arXiv 2312.06660" in few and "EdgeSAM issue 55; arXiv 2312.06660" not in many
    assert few["EdgeSAM issue 55; arXiv 2312.06660"]["recipe"] == "default" and few["EdgeSAM issue 55; arXiv 2312.06660"]["steps"] == 60
    prompts = many["EdgeSAM, arXiv 2312.06660"]
    assert prompts["recipe"] == "edge_sam_nano" and "iou_head" in prompts["plug_ins"]["objective"] and prompts["steps"] == 6250
    assert advised(5000, teacher="sam_vit_h")["EdgeSAM, arXiv 2312.06660"]["recipe"] == "edge_sam"
    assert "SSLD, arXiv 2103.05959" in advised(100, task="classification") and "SSLD, arXiv 2103.05959" not in advised(100, task="classification", labelled=True)
    assert all(r["evidence"] == "quoted" and 0 < r["confidence"] <= 1 and r["why"] for r in (*few.values(), *many.values()))


def test_recommend__a_wide_gap_and_low_precision_add_what_is_for_them() -> None:
    plain, asked = advised(100), advised(100, gap=30.0, low_precision=True)
    assert "arXiv 1802.05668; arXiv 2211.11014" not in plain and asked["arXiv 1802.05668; arXiv 2211.11014"]["plug_ins"]["controller"] == ["fake_quant"]
    assert set(asked) - set(plain) <= {"arXiv 1802.05668; arXiv 2211.11014", "AMD, arXiv 2407.04208"}
    with pytest.raises(UsageError, match="0 photos"):
        recommend(0)


def test_recommend__names_only_what_there_is() -> None:
    for task in ("promptable_segmentation", "classification", "dense_features"):
        for row in recommend(5000, task=task, gap=50, low_precision=True, labelled=True, runs="nowhere", claims="nowhere"):
            assert row["plug_ins"] and all(name in points.registry(point) for point, names in row["plug_ins"].items() for name in names)
    assert recipe_planner._row([("objective", "not_there_yet")], why="")["plug_ins"] == {}


# --- in a recipe ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), [("diswot", {"images": 4}), ("autodistil", {"steps": 2, "images": 4}), ("recipe_planner", {"runs": "nowhere"})])
def test_propose__a_recipe_takes_the_first(monkeypatch: pytest.MonkeyPatch, name: str, options: dict) -> None:
    told: list[str] = []
    monkeypatch.setattr(console, "log", told.append)
    recipe = Recipe.model_validate({"name": "r", "students": [{"name": REPVIT, "image_sizes": [32, 64]}], "stages": [{"name": "s", "steps": 1, "objectives": [{"name": "feature_mse"}]}],
                                    "proposer": {"name": name, "options": options}})
    from edgekd.distillation.batches import Source

    chosen = verbs.propose(recipe, tiny_sam(), TrainingData([Source(scenes(4))], scenes(4), [], ""))
    assert chosen in [(str(students.parse(REPVIT)), 32), (REPVIT, 32), (REPVIT, 64)] and sum("repvit_xs" in line for line in told) >= 2


@pytest.mark.parametrize(("name", "options"), [("diswot", {"images": 1}), ("autodistil", {"steps": 0})])
def test_proposers__refuse_senseless_options(name: str, options: dict) -> None:
    with pytest.raises(UsageError, match=name):
        points.build("proposer", name, options)
