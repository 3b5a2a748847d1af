"""Objectives on logits and pooled features against numbers worked out by hand and against torchdistill.

That each of them trains a classifier is in test_logit_training.py.
"""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from classifying import Classifier, bind, outputs
from safetensors.torch import save_file
from torch import Tensor

from edgekd import tasks
from edgekd.distillation import points
from edgekd.distillation.checks import check_recipe
from edgekd.distillation.outputs import Context, Outputs
from edgekd.errors import UsageError
from edgekd.recipe import Recipe

HALF = float(np.log(2))


def context(classes: list[int] | Tensor | None = None, photos: int = 2, **more: Any) -> Context:
    return Context(torch.ones(photos, 1, 4, 4), classes=torch.tensor(classes) if isinstance(classes, list) else classes, steps=10, **more)


def run(name: str, ours: Outputs, theirs: Outputs, classes: list[int] | Tensor | None = None, teacher: Any = None, **options: Any) -> Tensor:
    """The loss of each photo with the plug-in bound to these very outputs."""
    count = len(next(t for t in (ours.logits, ours.pooled) if t is not None))
    seen = context(classes, count)
    return bind(points.build("objective", name, options), ours, theirs, seen, teacher)(ours, theirs, seen)


def logits(*rows: list[float]) -> Outputs:
    """Outputs whose softmax is given by the shares of each row."""
    return outputs(logits=torch.tensor(rows).log())


def random(seed: int, photos: int = 6, classes: int = 7) -> Outputs:
    g = torch.Generator().manual_seed(seed)
    return outputs(logits=torch.randn(photos, classes, generator=g) * 2, pooled=torch.randn(photos, 5, generator=g))


# --- divergences of the logits ----------------------------------------------------------------------------------------


def test_kd__by_hand() -> None:
    """KL((3/4, 1/4) || (1/2, 1/2)) = ln 2 - H(3/4); with T = 2 the teacher's shares are as the roots of 3 : 1, and it counts four times."""
    theirs, ours = logits([0.75, 0.25]), logits([0.5, 0.5])
    assert run("kd", ours, theirs, temperature=1.0).item() == pytest.approx(HALF + 0.75 * np.log(0.75) + 0.25 * np.log(0.25), abs=1e-6)
    p = 3**0.5 / (1 + 3**0.5)
    assert run("kd", ours, theirs, temperature=2.0).item() == pytest.approx(4 * (HALF + p * np.log(p) + (1 - p) * np.log(1 - p)), abs=1e-6)


def test_kd__equals_torchdistill() -> None:
    library = pytest.importorskip("torchdistill.losses.mid_level", reason="pip install --no-deps torchdistill==1.1.5")
    ours, theirs = random(1), random(2)
    classes = torch.tensor([0, 1, 2, 3, 4, 5])
    said = library.KDLoss(".", "output", ".", "output", temperature=3.0, alpha=0.5, beta=2.0, reduction="batchmean")(
        {".": {"output": ours.logits}}, {".": {"output": theirs.logits}}, classes)
    found = 0.5 * run("cross_entropy", ours, theirs, classes) + 2 * run("kd", ours, theirs, temperature=3.0)
    assert found.mean().item() == pytest.approx(said.item(), rel=1e-5)


def test_dkd__by_hand() -> None:
    """Class 0: teacher 1/2 against 1/2, student 1/4 against 3/4. The rest: teacher (1/2, 1/2), student (2/3, 1/3)."""
    theirs, ours = logits([0.5, 0.25, 0.25]), logits([0.25, 0.5, 0.25])
    of_class = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    of_rest = 0.5 * np.log(0.5 / (2 / 3)) + 0.5 * np.log(0.5 / (1 / 3))
    found = run("dkd", ours, theirs, [0], alpha=2.0, beta=3.0, temperature=1.0)
    assert found.item() == pytest.approx(2 * of_class + 3 * of_rest, abs=1e-6)
    assert torch.equal(found, run("dkd", ours, theirs, alpha=2.0, beta=3.0, temperature=1.0)), "without labels: the teacher's best class"


def test_dkd__is_kd_where_the_rest_counts_the_teacher_s_doubt() -> None:
    ours, theirs = random(1), random(2)
    classes = torch.tensor([3, 1, 4, 1, 5, 0])
    part = {a: run("dkd", ours, theirs, classes, alpha=a, beta=1 - a, temperature=1.0) for a in (1.0, 0.0)}
    doubt = 1 - theirs["logits"].softmax(1)[torch.arange(6), classes]
    assert torch.allclose(part[1.0] + doubt * part[0.0], run("kd", ours, theirs, temperature=1.0), atol=1e-5)


def test_target_class__labels_count_where_they_are_and_may() -> None:
    theirs, ours = logits([0.1, 0.2, 0.7], [0.6, 0.2, 0.2]), random(1, 2, 3)
    both = run("dkd", ours, theirs, [0, -1])
    assert torch.equal(both, run("dkd", ours, theirs, [0, 0])), "class -1: the teacher's best, here 0"
    assert torch.equal(run("dkd", ours, theirs, [0, 1], labels=False), run("dkd", ours, theirs))
    mixed = torch.tensor([[0.8, 0.2, 0.0], [-1.0, -1.0, -1.0]])
    assert torch.equal(run("dkd", ours, theirs, mixed), both), "of shares the largest counts"


@pytest.mark.parametrize("name", ["dkd", "nkd", "pld", "uskd", "cross_entropy"])
def test_labels__that_the_model_does_not_know_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="classes up to number 3, and the model tells 3 apart"):
        run(name, random(1, 2, 3), random(2, 2, 3), [0, 3])


def test_nkd__by_hand() -> None:
    theirs, ours = logits([0.5, 0.25, 0.25]), logits([0.25, 0.5, 0.25])
    wanted = -0.5 * np.log(0.25) + 1.5 * -(0.5 * np.log(2 / 3) + 0.5 * np.log(1 / 3))
    assert run("nkd", ours, theirs, [0]).item() == pytest.approx(wanted, abs=1e-6)


def test_uskd__by_hand() -> None:
    """S_t = 1/2 and 1/4, squares 1/4 and 1/16, mean 5/32; the other classes are 0.3, 0.2 and 0.5, 0.25: Zipf (2/3, 1/3) in that order."""
    found = run("uskd", logits([0.5, 0.3, 0.2], [0.5, 0.25, 0.25]), Outputs(), [0, 2], alpha=2.0, beta=0.5)
    first = -2 * (1 + 1 / 4 - 5 / 32) * np.log(1 / 2) - 0.5 * (2 / 3 * np.log(0.6) + 1 / 3 * np.log(0.4))
    second = -2 * (1 + 1 / 16 - 5 / 32) * np.log(1 / 4) - 0.5 * (2 / 3 * np.log(2 / 3) + 1 / 3 * np.log(1 / 3))
    assert found.tolist() == pytest.approx([first, second], abs=1e-5)
    alone = run("uskd", logits([0.5, 0.3, 0.2], [0.5, 0.25, 0.25]), Outputs(), [0, -1], alpha=1.0, beta=0.0)
    assert alone.tolist() == pytest.approx([HALF, 0.0], abs=1e-6), "the mean is over labelled photos, an unlabelled one costs nothing"


def test_ssld__by_hand() -> None:
    p, q = np.array([0.75, 0.25]), np.array([0.5, 0.5])
    symmetric = ((p - q) * np.log(p / q)).sum() / 2
    m = (p + q) / 2
    mixture = ((p * np.log(p / m)).sum() + (q * np.log(q / m)).sum()) / 2
    ours, theirs = logits([0.5, 0.5]), logits([0.75, 0.25])
    assert run("ssld", ours, theirs).item() == pytest.approx(symmetric, abs=1e-6)
    assert run("ssld", ours, theirs, mixture=True).item() == pytest.approx(mixture, abs=1e-6)
    far = run("ssld", outputs(logits=torch.tensor([[40.0, -40.0]])), outputs(logits=torch.tensor([[-40.0, 40.0]])), mixture=True)
    assert far.item() == pytest.approx(HALF, abs=1e-5), "at most ln 2"


def test_bd_kd__by_hand() -> None:
    """The student knows nothing and the teacher is sure: the reverse divergence counts double; the other way round the forward one."""
    p, q = np.array([0.75, 0.25]), np.array([0.5, 0.5])
    forward, reverse = (p * np.log(p / q)).sum(), (q * np.log(q / p)).sum()
    flat, sure = logits([0.5, 0.5]), logits([0.75, 0.25])
    assert run("bd_kd", flat, sure, temperature=1.0).item() == pytest.approx(forward + 2 * reverse, abs=1e-6)
    assert run("bd_kd", sure, flat, temperature=1.0).item() == pytest.approx(2 * reverse + forward, abs=1e-6)  # forward and reverse change places
    assert run("bd_kd", flat, sure, temperature=1.0, lean=1.0).item() == pytest.approx(forward + reverse, abs=1e-6)


def test_cross_entropy__labels_shares_and_photos_without() -> None:
    ours = random(1, 3, 4)
    hard = run("cross_entropy", ours, Outputs(), [2, -1, 0])
    assert torch.allclose(hard, F.cross_entropy(ours["logits"], torch.tensor([2, -1, 0]), reduction="none", ignore_index=-1)) and hard[1] == 0
    shares = torch.tensor([[0.0, 0.3, 0.7, 0.0], [-1.0] * 4, [1.0, 0.0, 0.0, 0.0]])
    mixed = run("cross_entropy", ours, Outputs(), shares)
    assert torch.allclose(mixed[[0, 2]], F.cross_entropy(ours["logits"][[0, 2]], shares[[0, 2]], reduction="none")) and mixed[1] == 0
    smooth = run("cross_entropy", ours, Outputs(), [2, -1, 0], smoothing=0.1)
    assert torch.allclose(smooth[[0, 2]], F.cross_entropy(ours["logits"][[0, 2]], torch.tensor([2, 0]), reduction="none", label_smoothing=0.1))
    assert run("cross_entropy", ours, Outputs(), None).tolist() == [0, 0, 0], "a batch without labels costs nothing"


def test_dist__by_hand() -> None:
    """Over the classes of a photo the correlation of (1/2, 1/4, 1/4) with (1/4, 1/2, 1/4) is -1/2; over two photos it is 1 or -1."""
    ours, theirs = logits([0.5, 0.25, 0.25], [0.25, 0.5, 0.25]), logits([0.25, 0.5, 0.25], [0.5, 0.25, 0.25])
    assert run("dist", ours, theirs, gamma=0.0).tolist() == pytest.approx([1.5, 1.5], abs=1e-5)
    swapped = run("dist", ours, theirs, beta=0.0)
    assert swapped.tolist() == pytest.approx([4 / 3, 4 / 3], abs=1e-5), "1 - (-1) for two classes, 0 for the one that is always 1/4"


def test_dist__equals_torchdistill() -> None:
    library = pytest.importorskip("torchdistill.losses.mid_level", reason="pip install --no-deps torchdistill==1.1.5")
    ours, theirs = random(1, 16), random(2, 16)
    said = library.DISTLoss(".", "output", ".", "output", beta=2.0, gamma=3.0, tau=1.5)({".": {"output": ours.logits}}, {".": {"output": theirs.logits}})
    found = run("dist", ours, theirs, beta=2.0, gamma=3.0, temperature=1.5)
    assert found.mean().item() == pytest.approx(said.item(), rel=1e-5) and bool((found >= 0).all())


def test_pld__is_the_likelihood_of_the_teacher_s_order() -> None:
    """Teacher 0.1 : 0.3 : 0.6, target 1, so the order is 1, 2, 0: the student chooses 1 of all, then 2 of {2, 0}, then 0 of {0}."""
    s = np.array([0.5, 0.3, 0.2])
    wanted = 0.3 * -np.log(s[1] / 1.0) + 0.6 * -np.log(s[2] / (s[2] + s[0])) + 0.1 * -np.log(1.0)
    assert run("pld", logits(s.tolist()), logits([0.1, 0.3, 0.6]), [1]).item() == pytest.approx(wanted, abs=1e-6)


def test_sinkd__by_hand() -> None:
    """Two photos whose answers are swapped: the plan takes each to the other, at hardly any cost. One answer for both: nothing can be saved."""
    a, b = [0.9, 0.1], [0.1, 0.9]
    assert run("sinkd", logits(a, b), logits(b, a), temperature=1.0).tolist() == pytest.approx([0, 0], abs=1e-4)
    assert run("sinkd", logits(a, a), logits(b, b), temperature=1.0).tolist() == pytest.approx([1.6, 1.6], abs=1e-5)
    k = np.exp(-1.6 / 2)  # a blur of 2 leaves k / (1 + k) of each row at the far answer
    assert run("sinkd", logits(a, b), logits(a, b), temperature=1.0, blur=2.0).tolist() == pytest.approx([1.6 * k / (1 + k)] * 2, abs=1e-5)


def test_sinkd__the_plan_carries_everything_once() -> None:
    from edgekd.distillation.objectives.sinkd import plan

    found = plan(torch.rand(6, 6, generator=torch.Generator().manual_seed(0)), 0.05, 200)
    assert torch.allclose(found.sum(0), torch.ones(6), atol=1e-5) and torch.allclose(found.sum(1), torch.ones(6), atol=1e-3)


@pytest.mark.parametrize("name", ["kd", "dkd", "nkd", "ssld", "dist", "pld", "bd_kd", "sinkd", "dhkd", "lelp", "dho"])
def test_logits__of_other_classes_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"'{name}' compares logits, and the student has 3 of them, the teacher 4") as caught:
        run(name, random(1, 4, 3), random(2, 4, 4))
    assert caught.value.hint and caught.value.where == "stage test"


def test_logits__one_class_is_none() -> None:
    with pytest.raises(UsageError, match="tells 1 apart"):
        run("kd", random(1, 4, 1), random(2, 4, 1))


def test_recipe__logits_are_refused_where_the_task_has_none() -> None:
    recipe = Recipe.model_validate({"name": "r", "students": [{"name": "repvit_xs"}], "stages": [{"name": "a", "steps": 1, "objectives": [{"name": "dkd"}]}]})
    assert "logits" not in tasks.get(recipe.task).outputs
    with pytest.raises(UsageError, match="objective 'dkd' needs logits, which the task promptable_segmentation does not give"):
        check_recipe(recipe)


# --- second heads and class vectors -----------------------------------------------------------------------------------


def test_dhkd__by_hand() -> None:
    """The second head says 0; the teacher's logits are 0 and 2: T^2 (softplus(1) + softplus(-1)) / 2 - ln 2 at T = 2."""
    ours, theirs = outputs(logits=torch.zeros(1, 2), pooled=torch.ones(1, 3)), outputs(logits=torch.tensor([[0.0, 2.0]]), pooled=torch.ones(1, 3))
    one = bind(points.build("objective", "dhkd", {"aux": 3.0}), ours, theirs, context(photos=1))
    torch.nn.init.zeros_(one.head.weight), torch.nn.init.zeros_(one.head.bias)
    binary = 4 * ((np.log1p(np.e) + np.log1p(1 / np.e)) / 2 - HALF)
    kd = run("kd", ours, theirs).item()
    assert one(ours, theirs, context(photos=1)).item() == pytest.approx(kd + 3 * binary, abs=1e-5)
    one.head.bias.data = theirs["logits"][0]
    assert one(ours, theirs, context(photos=1)).item() == pytest.approx(kd, abs=1e-6), "least where the logits themselves are equal"


def test_dho__by_hand_and_both_heads_together() -> None:
    ours, theirs = random(1, 3), random(2, 3)
    one = bind(points.build("objective", "dho", {"mix": 0.25, "temperature": 1.0}), ours, theirs, context(photos=3))
    found = one(ours, theirs, context([1, -1, 2], 3))
    other = one.head(ours["pooled"])
    labels = F.cross_entropy(ours["logits"], torch.tensor([1, -1, 2]), reduction="none", ignore_index=-1)
    distilled = F.kl_div(other.log_softmax(1), theirs["logits"].softmax(1), reduction="none").sum(1)
    assert torch.allclose(found, 0.75 * labels + 0.25 * distilled, atol=1e-5)
    assert torch.allclose(one.combined(ours, 0.5, 2.0), (ours["logits"].softmax(1) + (other / 2).softmax(1)) / 2)
    one.own = "teacher"
    distilled = F.kl_div(ours["logits"].log_softmax(1), theirs["logits"].softmax(1), reduction="none").sum(1)
    assert one(ours, theirs, context(None, 3)).tolist() == pytest.approx((0.25 * distilled).tolist(), abs=1e-5), "the exported head learns without labels"


def vectors_file(folder: Path, rows: list[list[float]], suffix: str = ".npy") -> str:
    path = folder / f"text{suffix}"
    if suffix == ".npy":
        np.save(path, np.array(rows))
    else:
        save_file({"text": torch.tensor(rows)}, path)
    return str(path)


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_class_vectors__by_hand(tmp_path: Path, suffix: str) -> None:
    """Vectors along the axes, of any length: the similarities of (3, 4) are 0.6 and 0.8, those of (1, 0) are 1 and 0."""
    path = vectors_file(tmp_path, [[2.0, 0.0], [0.0, 5.0]], suffix)
    ours, theirs = outputs(pooled=torch.tensor([[3.0, 4.0]])), outputs(pooled=torch.tensor([[1.0, 0.0]]))
    one = bind(points.build("objective", "class_vectors", {"vectors": path, "scale": 2.0}), ours, theirs, context(photos=1))
    one.projector = torch.nn.Identity()
    t, s = np.exp([2.0, 0.0]) / np.exp([2.0, 0.0]).sum(), np.exp([1.2, 1.6]) / np.exp([1.2, 1.6]).sum()
    assert one(ours, theirs, context(photos=1)).item() == pytest.approx((t * np.log(t / s)).sum(), abs=1e-5)
    assert "vectors" in one.state_dict() and not one.vectors.requires_grad


def test_vl2v__by_hand(tmp_path: Path) -> None:
    """The student says (0, 1). The teacher's image (1, 0) has cosine 0 with it; the text of class 1, (3, 4) / 5, has 0.8, of class 0 none."""
    path = vectors_file(tmp_path, [[1.0, 0.0], [3.0, 4.0]])
    ours, theirs = outputs(pooled=torch.tensor([[0.0, 2.0]])), outputs(pooled=torch.tensor([[1.0, 0.0]]))
    one = bind(points.build("objective", "vl2v", {"vectors": path, "image": 0.25}), ours, theirs, context(photos=1))
    one.projector = torch.nn.Identity()
    assert one(ours, theirs, context([1], 1)).item() == pytest.approx(1 - 0.75 * 0.8)
    assert one(ours, theirs, context(photos=1)).item() == pytest.approx(1.0), "without a label: class 0, nearest to the teacher's image"


def test_class_vectors__come_from_the_teacher_where_no_file_is_named() -> None:
    teacher, ours, theirs = Classifier(0, 5, classes=7), random(1), random(2)
    one = bind(points.build("objective", "class_vectors", {}), ours, theirs, context(photos=6), teacher)
    assert torch.allclose(one.vectors, F.normalize(teacher.head.weight, dim=1))
    teacher.class_vectors = torch.ones(7, 5)
    assert torch.allclose(bind(points.build("objective", "vl2v", {}), ours, theirs, context(photos=6), teacher).vectors, torch.full((7, 5), 5**-0.5))


@pytest.mark.parametrize(("rows", "said"), [(None, "has none of its own"), ("gone", "there is no file"), ([[1.0, 2.0]], "of 2 numbers, and the teacher's pooled"),
                                            ([[1.0] * 5] * 3, "3 class vectors, and the student tells 7"), ("text", "cannot be read")])
def test_class_vectors__that_do_not_fit_are_refused(tmp_path: Path, rows: Any, said: str) -> None:
    path = "" if rows is None else str(tmp_path / "gone.npy") if rows == "gone" else vectors_file(tmp_path, [[1.0]] if rows == "text" else rows)
    if rows == "text":
        Path(path).write_text("no array")
    with pytest.raises(UsageError, match=said) as caught:
        bind(points.build("objective", "class_vectors", {"vectors": path}), random(1), random(2), context(photos=6))
    assert ".npy" in (caught.value.hint or "")


# --- state of their own -----------------------------------------------------------------------------------------------


def test_nd__by_hand() -> None:
    """Class 0's mean is (3, 0) after (2, 0) and (4, 0): <(0, 1), e> = 0; (6, 0) is longer than the teacher's and points along e: 0."""
    theirs = outputs(logits=torch.zeros(2, 2), pooled=torch.tensor([[2.0, 0.0], [4.0, 0.0]]))
    one = bind(points.build("objective", "nd", {}), theirs, theirs, context())
    found = one(outputs(pooled=torch.tensor([[0.0, 1.0], [6.0, 0.0]])), theirs, context([0, 0]))
    assert found.tolist() == pytest.approx([1.0, 0.0]) and one.means[0].tolist() == [3.0, 0.0] and one.counts.tolist() == [2.0, 0.0]
    shorter = one(outputs(pooled=torch.tensor([[1.0, 0.0], [3.0, 0.0]])), theirs, context([0, 0]))
    assert shorter.tolist() == pytest.approx([0.5, 0.25]), "shorter than the teacher's 2 and 4"


def test_nd__the_means_are_those_of_all_photos_seen() -> None:
    g = torch.Generator().manual_seed(0)
    features, classes = torch.randn(30, 5, generator=g), torch.randint(0, 4, (30,), generator=g)
    one = bind(points.build("objective", "nd", {}), random(1, 6, 4), random(2, 6, 4), context(photos=6))
    for at in range(0, 30, 6):
        rows = slice(at, at + 6)
        one(random(1), outputs(logits=torch.zeros(6, 4), pooled=features[rows]), context(classes[rows], 6))
    assert torch.allclose(one.means, torch.stack([features[classes == c].mean(0) for c in range(4)]), atol=1e-6)
    before = one.means.clone()
    one.eval()(random(1), outputs(logits=torch.zeros(6, 4), pooled=features[:6] + 1), context(classes[:6], 6))
    assert torch.equal(one.means, before), "only training adds to them"


def lelp(theirs: Outputs, seen: Context, teacher: Any = None, **options: Any) -> Any:
    return bind(points.build("objective", "lelp", {"photos": len(theirs["pooled"])} | options), theirs, theirs, seen, teacher, steps=1000)


def test_lelp__by_hand() -> None:
    """One class varies along x, the other along y: so do their directions, with variance 1; subclasses of the other class weigh nothing."""
    x = torch.linspace(-3, 3, 12).unsqueeze(1)
    pooled = torch.cat([torch.cat([x, 0 * x], 1) + 10, torch.cat([0 * x, 2 * x], 1)])
    classes = torch.arange(2).repeat_interleave(12)
    theirs = outputs(logits=F.one_hot(classes, 2) * 40.0, pooled=pooled)
    one = lelp(theirs, context(classes, 24), subclasses=1)
    found = one(theirs, theirs, context(classes, 24))
    assert bool(one.ready) and one.centres.tolist() == pytest.approx(np.array([[10.0, 10.0], [0.0, 0.0]]), abs=1e-5)
    size = float(x.square().mean().sqrt())
    assert one.directions.abs()[:, 0].tolist() == pytest.approx(np.array([[1 / size, 0], [0, 0.5 / size]]), abs=1e-5)
    assert found.tolist() == pytest.approx([0] * 24, abs=1e-4), "one subclass a class: the classes alone"
    two = lelp(theirs, context(classes, 24), subclasses=2)
    found = two(theirs, theirs, context(classes, 24))
    own = torch.stack([two.subclass_logits(pooled)[i, c] for i, c in enumerate(classes)])
    said = torch.stack([two.head(pooled).unflatten(1, (2, 2))[i, c] for i, c in enumerate(classes)])
    assert torch.allclose(found, F.kl_div(said.log_softmax(1), own.softmax(1), reduction="none").sum(1), atol=1e-4)
    assert two.subclass_logits(pooled)[:12, 0].square().mean().item() == pytest.approx(1.0, rel=1e-4)


def test_lelp__what_the_classifier_reads_is_left_out() -> None:
    """The features vary most along the classifier's own weights, which tell nothing new: the direction is the other one."""
    teacher = Classifier(0, 3, classes=2)
    teacher.head.weight.data = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]])
    g = torch.Generator().manual_seed(0)
    pooled = torch.randn(40, 3, generator=g) * torch.tensor([9.0, 2.0, 0.1])
    theirs = outputs(logits=teacher.head(pooled).detach(), pooled=pooled)
    one = lelp(theirs, context(photos=40), teacher, subclasses=1)
    one(theirs, theirs, context(photos=40))
    assert bool((F.normalize(one.directions[:, 0], dim=1)[:, 1].abs() > 0.99).all())


def test_lelp__learns_the_classes_until_it_has_its_directions() -> None:
    ours, theirs = random(1), random(2)
    one = bind(points.build("objective", "lelp", {"photos": 12}), ours, theirs, context(photos=6), steps=1000)
    first = one(ours, theirs, context(photos=6))
    assert not one.ready and torch.allclose(first, run("kd", ours, theirs, temperature=1.0), atol=1e-6)
    assert (one(ours, theirs, context(photos=6)) > first).any() and one.ready
    early = bind(points.build("objective", "lelp", {}), ours, theirs, context(photos=6), steps=1000)
    early(ours, theirs, replace(context(photos=6), step=3))
    assert early.ready, "a quarter of the stage is long enough, however few photos came by"
