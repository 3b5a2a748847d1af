"""Objectives on relations, correspondences and contrasts against numbers worked out by hand and against torchdistill; each trains a classifier."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import classifying
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from classifying import Classifier, bind, fall, outputs, trainer
from torch import Tensor

from edgekd.distillation import points
from edgekd.distillation.objectives.correspondence import average_precision, relevance
from edgekd.distillation.outputs import Context, Outputs
from edgekd.distillation.relations import common_grid, mean_over, photo_vector, tokens
from edgekd.errors import UsageError


def context(photos: int, valid: Tensor | None = None, **more: Any) -> Context:
    return Context(torch.ones(photos, 1, 16, 16) if valid is None else valid, steps=10, **more)


def run(name: str, ours: Tensor, theirs: Tensor, seen: Context | None = None, **options: Any) -> Tensor:
    """The loss of each photo for taps (B, C, h, w) or (B, D)."""
    seen, s, t = seen or context(len(ours)), outputs(feats=ours), outputs(feats=theirs)
    return bind(points.build("objective", name, options), s, t, seen)(s, t, seen)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def left_half(photos: int) -> Tensor:
    """Photos of which the right half is padding."""
    valid = torch.ones(photos, 1, 16, 16)
    valid[..., 8:] = 0
    return valid


# --- vectors and tokens -----------------------------------------------------------------------------------------------


def test_photo_vector__is_the_mean_over_the_photo() -> None:
    x = torch.zeros(1, 2, 4, 4)
    x[:, 0, :, :2], x[:, 1, :, 2:] = 3.0, 7.0
    assert photo_vector(x, context(1)).tolist() == [[1.5, 3.5]]
    assert photo_vector(x, context(1, left_half(1))).tolist() == [[3.0, 0.0]]
    assert torch.equal(photo_vector(random(0, 3, 5), context(3)), random(0, 3, 5))


def test_common_grid__is_the_coarser_map_s_and_no_larger_than_allowed() -> None:
    assert common_grid(torch.zeros(1, 2, 8, 8), torch.zeros(1, 9, 4, 6), 256) == (4, 6)
    assert common_grid(torch.zeros(1, 2, 64, 64), torch.zeros(1, 2, 64, 64), 256) == (16, 16)
    assert tokens(random(0, 2, 5, 8, 8), (4, 2)).shape == (2, 8, 5)


def test_mean_over__leaves_out_what_is_not_finite_behind_the_mask() -> None:
    assert mean_over(torch.tensor([[1.0, torch.inf], [torch.nan, 5.0]]), torch.tensor([[1, 0], [0, 0]]), 1).tolist() == [1.0, 0.0]


# --- photos with photos -----------------------------------------------------------------------------------------------


def test_rkd__by_hand() -> None:
    """Student 0, 1, 2 on a line: distances 1, 2, 1 in units of their mean 4/3. Teacher: an equilateral triangle, all distances 1 of mean 1."""
    ours, theirs = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]]), torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 3**0.5 / 2]])

    def huber(d: float) -> float:
        return d * d / 2 if abs(d) < 1 else abs(d) - 0.5

    near, far = huber(0.75 - 1), huber(1.5 - 1)
    assert run("rkd", ours, theirs, angle=0.0).tolist() == pytest.approx([(near + far) / 3, 2 * near / 3, (near + far) / 3], abs=1e-5)
    ends, middle = 2 * huber(1 - 0.5) / 9, 2 * huber(-1 - 0.5) / 9  # cos 60 degrees is 1/2; on a line it is 1 at the ends, -1 in the middle
    assert run("rkd", ours, theirs, distance=0.0, angle=1.0).tolist() == pytest.approx([ends, middle, ends], abs=1e-5)


def test_rkd__equals_torchdistill() -> None:
    library = pytest.importorskip("torchdistill.losses.mid_level", reason="pip install --no-deps torchdistill==1.1.5")
    ours, theirs = random(1, 7, 5), random(2, 7, 9)
    said = library.RKDLoss("s", "t", 1.5, 2.5, "mean")({"s": {"output": ours}}, {"t": {"output": theirs}})
    assert run("rkd", ours, theirs, distance=1.5, angle=2.5).mean().item() == pytest.approx(said.item(), rel=1e-4)


def test_rkd__does_not_see_size_or_turn() -> None:
    x = random(1, 6, 4)
    turned = 3 * x @ torch.linalg.qr(random(2, 4, 4))[0] + 1
    assert run("rkd", x, turned).max() < 1e-6 < run("rkd", x, random(3, 6, 4)).min()


def test_affinity__by_hand() -> None:
    """Student's photos at right angles: rows (1, 0), (0, 1). Teacher's are one: rows (1, 1) / sqrt 2."""
    ours, theirs = torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([[1.0], [1.0]])
    wanted = ((1 - 0.5**0.5) ** 2 + 0.5) / 2
    assert run("affinity", ours, theirs).tolist() == pytest.approx([wanted, wanted], abs=1e-6)


def test_affinity__is_the_norm_of_the_paper() -> None:
    """Tung and Mori, eq. 4: the squared Frobenius norm of the difference over B^2, with rows of length 1."""
    ours, theirs = random(1, 5, 3, 4, 4), random(2, 5, 7, 2, 2)
    grams = [(f @ f.T) / np.linalg.norm(f @ f.T, axis=1, keepdims=True) for f in (ours.flatten(1).numpy(), theirs.flatten(1).numpy())]
    assert run("affinity", ours, theirs).mean().item() == pytest.approx(((grams[0] - grams[1]) ** 2).sum() / 25, rel=1e-4)


def test_affinity__softmax_over_the_other_photos() -> None:
    """Cosines of photo 0 with the two others: student (1, 0), teacher (0, 0)."""
    ours = torch.tensor([[1.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    found = run("affinity", ours, torch.eye(3), temperature=0.5)
    p = np.exp(2) / (np.exp(2) + 1)
    half = 0.25 * -0.5 * (np.log(2 * p) + np.log(2 * (1 - p)))
    assert found.tolist() == pytest.approx([half, half, 0.0], abs=1e-6)


# --- patches ----------------------------------------------------------------------------------------------------------


def test_token_relations__by_hand() -> None:
    """Four patches; the student's are all alike, the teacher's two and two at right angles: 8 of 16 pairs differ by 1."""
    ours, theirs = torch.ones(1, 3, 2, 2), torch.zeros(1, 2, 2, 2)
    theirs[:, 0, 0], theirs[:, 1, 1] = 4.0, 1.0
    assert run("token_relations", ours, theirs).tolist() == pytest.approx([0.5])
    p = np.array([np.e, 1, 1]) / (np.e + 2)
    assert run("token_relations", ours, theirs, temperature=1.0).tolist() == pytest.approx([(p * np.log(3 * p)).sum()], abs=1e-6)


def test_token_relations__of_padding_do_not_count() -> None:
    ours, theirs = random(1, 2, 3, 4, 4), random(2, 2, 5, 4, 4)
    seen = context(2, left_half(2))
    for temperature in (0.0, 0.5):
        first = run("token_relations", ours, theirs, seen, temperature=temperature)
        changed = ours.clone()
        changed[..., 2:] = random(3, 2, 3, 4, 2)
        assert torch.allclose(first, run("token_relations", changed, theirs, seen, temperature=temperature), atol=1e-6)
        assert torch.allclose(first, run("token_relations", ours[..., :2], theirs[..., :2], temperature=temperature), atol=1e-5), "as if there were none"


def test_token_relations__need_no_equal_grid_and_are_capped() -> None:
    ours, theirs = random(1, 2, 3, 32, 32), random(2, 2, 5, 16, 16)
    pooled = F.avg_pool2d(ours, 8), F.avg_pool2d(theirs, 4)
    assert torch.allclose(run("token_relations", ours, theirs, most=16), run("token_relations", *pooled), atol=1e-6)


def test_average_precision__is_the_usual_one_in_the_limit() -> None:
    """Ranked right, wrong, right, wrong: (1 + 2/3) / 2."""
    scores, relevant, there = torch.tensor([0.9, 0.7, 0.5, 0.1]), torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.ones(4, dtype=torch.bool)
    assert average_precision(scores, relevant, there, 1e-3).item() == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(scores, relevant, torch.tensor([True, False, True, False]), 1e-3).item() == pytest.approx(1.0)
    soft = torch.tensor([1.0, 0.5, 0.25, 0.0])  # (1 x 1 + 1/2 x 3/4 + 1/4 x 7/12) / (7/4) in this order
    assert average_precision(scores, soft, there, 1e-3).item() == pytest.approx((1 + 0.375 + 0.25 * 1.75 / 3) / 1.75)
    assert average_precision(scores, soft, there, 1e-3) > average_precision(-scores, soft, there, 1e-3)


def test_relevance__is_stretched_over_the_photo() -> None:
    found = relevance(torch.tensor([0.2, 0.6, 0.4, 0.9]), torch.tensor([True, True, True, False]))
    assert found.tolist() == pytest.approx([0.0, 1.0, 0.5, 0.0])


def test_correspondence__by_hand() -> None:
    """Two photos of the same four patches, in another order; the student mistakes patch 0 for 1 of the other photo, and 1 for 0."""
    eye = torch.eye(4)
    theirs = torch.stack([eye, eye]).transpose(1, 2).unflatten(2, (2, 2))
    ours = torch.stack([eye, eye[[1, 0, 2, 3]]]).transpose(1, 2).unflatten(2, (2, 2))
    found = run("correspondence", ours, theirs, temperature=1e-3)
    wrong = 1 - 1 / (1 + 1 + 0.5 + 0.5)  # the right patch counts whole, as does the one ranked above it; its two equals count half
    assert found.tolist() == pytest.approx([2 * wrong / 4] * 2, abs=1e-4)
    p = np.array([np.e, 1, 1, 1]) / (np.e + 3)
    soft = run("correspondence", ours, theirs, ranking=False, temperature=1.0)
    assert soft.tolist() == pytest.approx([2 * (p[0] - p[1]) / 4] * 2, abs=1e-5), "KL of a softmax of which two values change places"


def test_correspondence__of_padding_do_not_count() -> None:
    ours, theirs, seen = random(1, 3, 4, 4, 4), random(2, 3, 6, 4, 4), context(3, left_half(3))
    for ranking in (True, False):
        first = run("correspondence", ours, theirs, seen, ranking=ranking)
        assert torch.allclose(first, run("correspondence", ours[..., :2], theirs[..., :2], ranking=ranking), atol=1e-5)


# --- contrast ---------------------------------------------------------------------------------------------------------


def contrast(ours: Tensor, theirs: Tensor, seen: Context, **options: Any) -> Any:
    """The objective with projections that change nothing."""
    one = bind(points.build("objective", "crd", {"dim": ours.shape[1], "temperature": 1.0} | options), outputs(feats=ours), outputs(feats=theirs), seen)
    for layer in (one.ours, one.theirs):
        torch.nn.init.eye_(layer.weight), torch.nn.init.zeros_(layer.bias)
    return one


def test_crd__by_hand() -> None:
    """Unit vectors: student (1, 0), (1, 0); teacher (1, 0), (0, 1). Cosines of row 0 are (1, 0), of row 1 (1, 0); of the columns (1, 1), (0, 0)."""
    ours, theirs = torch.tensor([[3.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    found = contrast(ours, theirs, context(2))(outputs(feats=ours), outputs(feats=theirs), context(2))
    right, wrong, back = np.log1p(np.exp(-1)), np.log1p(np.exp(1)), np.log(2)
    assert found.tolist() == pytest.approx([(right + back) / 2, (wrong + back) / 2], abs=1e-6)


def test_crd__the_queue_adds_negatives_but_never_the_photo_itself() -> None:
    ours, theirs = random(1, 2, 4), random(2, 2, 4)
    one = contrast(ours, theirs, context(2), queue=3)
    steps = [torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([0, 4])]
    vectors = [random(10 + k, 2, 4) for k in range(3)]
    for places, t in zip(steps[:2], vectors[:2], strict=True):
        one(outputs(feats=ours), outputs(feats=t), context(2, places=places))
    assert one.kept_places.tolist() == [3, 1, 2] and torch.equal(one.kept[1], vectors[0][1]), "the oldest made room"
    found = one(outputs(feats=ours), outputs(feats=vectors[2]), context(2, places=torch.tensor([3, 4])))
    a, b = F.normalize(ours, dim=1), F.normalize(torch.cat([vectors[2], vectors[1][1:], vectors[0][1:], vectors[1][:1]]), dim=1)
    near = a @ b.T
    forward = [-(near[0, 0] - near[0, [0, 1, 3, 4]].logsumexp(0)), -(near[1, 1] - near[1].logsumexp(0))]
    back = [-(near[i, i] - near[:, i].logsumexp(0)) for i in range(2)]
    assert found.tolist() == pytest.approx([float(f + g) / 2 for f, g in zip(forward, back, strict=True)], abs=1e-5)
    before = one.kept.clone()
    one.eval()(outputs(feats=ours), outputs(feats=theirs), context(2, places=steps[2]))
    assert torch.equal(one.kept, before), "only training fills it"


def test_crd__a_photo_drawn_twice_is_no_negative() -> None:
    ours = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    one = contrast(ours, ours, context(2))
    assert one(outputs(feats=ours), outputs(feats=ours), context(2, places=torch.tensor([7, 7]))).tolist() == pytest.approx([0, 0], abs=1e-6)


def test_cpc_rank__by_hand() -> None:
    """For photo 0 the teacher ranks 1, 2, 3; the student's cosines with them are 0, 1, 0. Of the three only the first is asked to be first."""
    ours = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, 3.0]])
    angle = torch.tensor([0.0, 0.3, 0.7, 1.5])
    theirs = torch.stack([angle.cos(), angle.sin()], 1)
    first, second = np.log(np.e + 2) - 0, np.log(np.e + 1) - 1
    assert run("cpc_rank", ours, theirs, hard=1, temperature=1.0)[0].item() == pytest.approx(first, abs=1e-5)
    for hard in (2, 9):
        assert run("cpc_rank", ours, theirs, hard=hard, temperature=1.0)[0].item() == pytest.approx((first + second) / 2, abs=1e-5), "the last is last anyway"


# --- what is refused --------------------------------------------------------------------------------------------------

NAMES = ("rkd", "affinity", "token_relations", "crd", "correspondence", "cpc_rank")


@pytest.mark.parametrize(("name", "fewest", "options"), [("rkd", 3, {}), ("affinity", 2, {}), ("affinity", 3, {"temperature": 0.1}), ("crd", 2, {}), ("cpc_rank", 3, {}),
                                                         ("correspondence", 2, {})])
def test_batches__that_are_too_small_are_refused(name: str, fewest: int, options: dict) -> None:
    feats = outputs(feats=torch.zeros(2, 4, 4, 4))
    one = points.build("objective", name, options)
    bind(one, feats, feats, context(2), batch_size=fewest)
    with pytest.raises(UsageError, match=f"compares {fewest} photos of a batch with each other, and a batch has {fewest - 1}"):
        bind(one, feats, feats, context(2), batch_size=fewest - 1)


@pytest.mark.parametrize("name", ["token_relations", "correspondence"])
def test_patches__of_what_is_no_map_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"a tap of the teacher gives \[2, 9\], no map"):
        run(name, torch.zeros(2, 4, 4, 4), torch.zeros(2, 9))


@pytest.mark.parametrize("name", NAMES)
def test_a_teacher_s_channels_for_its_own_decoder_are_left_out(name: str) -> None:
    ours, theirs = random(1, 4, 6, 4, 4), random(2, 4, 8, 4, 4)

    def loss(whole: Tensor) -> Tensor:
        s, t = Outputs(embedding=ours, feats=(ours,)), Outputs(embedding=whole, feats=(whole,))
        return bind(points.build("objective", name, {}), s, t, context(4), Classifier(0, 8))(s, t, context(4))

    assert torch.equal(loss(theirs), loss(torch.cat([theirs, 100 * random(3, 4, 5, 4, 4)], 1)))


# --- training ---------------------------------------------------------------------------------------------------------

TRAINED = [("rkd", {}, []), ("affinity", {}, []), ("affinity", {"temperature": 0.2}, []), ("token_relations", {}, []), ("token_relations", {"temperature": 0.2}, []),
           ("correspondence", {}, []), ("correspondence", {"ranking": False}, []), ("crd", {}, []), ("crd", {"queue": 8}, []), ("cpc_rank", {}, []), ("rkd", {}, [["pooled", "pooled"]]),
           ("token_relations", {}, [["stage1", "stage2"], ["stage2", "embedding"]])]


@pytest.mark.parametrize(("name", "options", "taps"), TRAINED)
def test_training__the_loss_falls(tmp_path: Path, name: str, options: dict, taps: list) -> None:
    assert fall(trainer(tmp_path, [{"name": name, "options": options, "taps": taps}], trainable=["encoder"])) < 0.9


def test_training__a_student_of_the_teacher_s_relations_finds_its_neighbours(tmp_path: Path) -> None:
    one = trainer(tmp_path, [{"name": "rkd"}], trainable=["encoder"], steps=80)
    photos = one.batches.batch(range(classifying.PHOTOS))

    def correlation() -> float:
        with torch.no_grad():
            ours = one.student.eval().outputs(photos.images)["pooled"]
        return float(np.corrcoef(torch.pdist(ours), torch.pdist(photos.cached["classifier16"]["embedding"].mean((2, 3))))[0, 1])

    before = correlation()
    one.run()
    assert correlation() > max(before + 0.02, 0.9)


def test_training__bfloat16_keeps_distances_exact(tmp_path: Path) -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        one = trainer(tmp_path / precision, [{"name": n} for n in NAMES], trainable=["encoder"], precision=precision, steps=5)
        losses[precision] = one.run().curve[0]["loss"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)
