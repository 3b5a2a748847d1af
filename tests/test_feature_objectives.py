"""Objectives on features, attention and masked features: against numbers worked out by hand and against torchdistill; padding counts nothing; they train."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from classifying import Classifier
from objective_training import SIDE, bound, convolutional, everywhere, falls, feats, left, train, transformer
from torch import Tensor, nn

from edgekd.distillation import points
from edgekd.distillation.objectives import attention_maps, distiller, dmae, norm_feature, ofa_kd, reviewkd, scalekd, vkd
from edgekd.distillation.outputs import Outputs
from edgekd.distillation.projectors import heads_of, pairs_of, photo, photo_mean
from edgekd.errors import UsageError

MAPS = ["hint", "fitnet_stages", "feature_cosine", "norm_feature", "cwd", "vkd", "scalekd", "reviewkd", "distiller", "ted", "attention_transfer", "mgd", "dmae"]


def build(name: str, **options: object) -> points.Objective:
    return points.build("objective", name, options)


def vectors(*cells: tuple[float, ...]) -> Tensor:
    """A map (1, C, 1, cells) of these cells."""
    return torch.tensor(cells).T[None, :, None]


class Fixed(nn.Module):
    """Gives the same map whatever it is given."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self.out = out

    def forward(self, x: Tensor, *_: Tensor) -> Tensor:
        return self.out


# --- by hand --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hint", "fitnet_stages"])
def test_hint__is_the_squared_error_behind_the_regressor(name: str) -> None:
    ours, theirs = feats(torch.ones(1, 1, 2, 2)), feats(torch.zeros(1, 2, 2, 2))
    one = bound(build(name), ours, theirs)
    one.regressors[0].load_state_dict({"weight": torch.tensor([2.0, 3.0]).reshape(2, 1, 1, 1), "bias": torch.tensor([0.0, 1.0])})
    assert one(ours, theirs, everywhere()).tolist() == [(4 + 16) / 2]


def test_hint__the_finer_map_comes_to_the_coarser_grid_and_pairs_are_averaged() -> None:
    fine, coarse = torch.ones(1, 1, 8, 8), torch.zeros(1, 1, 2, 2)
    ours, theirs = feats(fine, coarse), feats(coarse, fine)
    one = bound(build("hint"), ours, theirs)
    for regressor, gain in zip(one.regressors, (2.0, 1.0), strict=True):
        regressor.load_state_dict({"weight": torch.full((1, 1, 1, 1), gain), "bias": torch.zeros(1)})
    assert one(ours, theirs, everywhere()).tolist() == pytest.approx([(2.0**2 + 1.0**2) / 2])


def test_feature_cosine__by_hand() -> None:
    ours, theirs = feats(vectors((1, 0), (2, 0))), feats(vectors((1, 1), (-3, 0)))
    assert bound(build("feature_cosine"), ours, theirs)(ours, theirs, everywhere()).item() == pytest.approx(((1 - 0.5**0.5) + 2) / 2)


def test_norm_feature__is_one_minus_the_correlation() -> None:
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for theirs, wanted in ((3 * x + 7, 0.0), (-x, 2.0)):
        assert bound(build("norm_feature"), feats(x), feats(theirs))(feats(x), feats(theirs), everywhere(2)).tolist() == pytest.approx([wanted] * 2, abs=1e-4)
    y = x.roll(1, 0)
    found = bound(build("norm_feature"), feats(x), feats(y))(feats(x), feats(y), everywhere(2))
    pearson = [np.mean([np.corrcoef(x[b, c].flatten(), y[b, c].flatten())[0, 1] for c in range(3)]) for b in range(2)]
    assert found.tolist() == pytest.approx([1 - p for p in pearson], abs=1e-4)
    assert norm_feature.standardised(torch.full((1, 1, 2, 2), 5.0), torch.ones(1, 1, 2, 2)).abs().max() == 0, "a constant channel"


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_cwd__by_hand(temperature: float) -> None:
    """Over two cells 1/2, 1/2 of the student against 3/4, 1/4 of the teacher in one channel; alike in the other."""
    ours, theirs = feats(vectors((0, 1), (0, 1))), feats(vectors((temperature * np.log(3), 2), (0, 2)))
    found = bound(build("cwd", temperature=temperature), ours, theirs)(ours, theirs, everywhere())
    assert found.item() == pytest.approx(temperature**2 * (0.75 * np.log(1.5) + 0.25 * np.log(0.5)) / 2, rel=1e-5)


def test_vkd__by_hand() -> None:
    """P = 1: the student (1, 0) against the teacher (3, 1), which is (1, -1) when standardised: smooth L1 of 0 and 1."""
    ours, theirs = feats(vectors((1, 0))), feats(vectors((3, 1)))
    for target, wanted in (("standardise", 0.5 / 2), ("none", (1.5 + 0.5) / 2)):
        one = bound(build("vkd", target=target), ours, theirs)
        one.projectors[0].weight = torch.eye(2)
        assert one(ours, theirs, everywhere()).item() == pytest.approx(wanted, abs=1e-4)


def test_vkd__targets() -> None:
    x = torch.randn(4, 6, 8, 8, generator=torch.Generator().manual_seed(0))
    x[:, 1] = 3 * x[:, 0] + 0.5 * x[:, 1] + 5
    standard = vkd.standardise(x)
    assert standard.mean(1).abs().max() < 1e-5 and torch.allclose(standard.var(1, unbiased=False), torch.ones(4, 8, 8), atol=1e-3)
    inside = torch.ones(4, 1, 8, 8)
    inside[:, :, 6:] = 0
    white = vkd.whiten(x, inside).movedim(1, -1)[:, :6].flatten(0, 2)
    assert torch.allclose(white.T @ white / len(white), torch.eye(6), atol=0.02) and white.mean(0).abs().max() < 1e-3
    with pytest.raises(UsageError, match="no target 'white'"):
        build("vkd", target="white")


@pytest.mark.parametrize(("ours", "theirs"), [(5, 9), (6, 6)])
def test_vkd__the_projector_stays_orthogonal(ours: int, theirs: int) -> None:
    student, teacher = feats(torch.randn(2, ours, 4, 4)), feats(torch.randn(2, theirs, 4, 4))
    one = bound(build("vkd"), student, teacher)
    optimizer = torch.optim.AdamW(one.parameters(), lr=0.1, weight_decay=0.1)
    first = one.projectors[0].weight.detach().clone()
    for _ in range(20):
        optimizer.zero_grad()
        one(student, teacher, everywhere(2)).mean().backward()
        optimizer.step()
    weight = one.projectors[0].weight
    assert torch.allclose(weight.T @ weight, torch.eye(ours), atol=1e-4) and not torch.allclose(weight, first, atol=0.1)
    again = bound(build("vkd"), student, teacher)
    again.load_state_dict(one.state_dict())
    assert torch.allclose(again.projectors[0].weight, weight, atol=1e-6)


def test_scalekd__the_cosine_transform_and_what_is_removed() -> None:
    rows = scalekd.cosines(4)
    assert torch.allclose(rows @ rows.T, torch.eye(4), atol=1e-6)
    assert (rows @ torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == pytest.approx([5.0, -2.2304, 0.0, -0.1585], abs=1e-4)  # scipy.fft.dct(norm="ortho")
    x = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(scalekd.without_low(x, rows, scalekd.cosines(8), 1), x - x.mean((2, 3), keepdim=True), atol=1e-5)
    wave = rows[1][:, None] * scalekd.cosines(8)[1][None] + rows[3][:, None] * scalekd.cosines(8)[2][None]
    assert torch.allclose(scalekd.without_low(wave[None, None], rows, scalekd.cosines(8), 2)[0, 0], rows[3][:, None] * scalekd.cosines(8)[2][None], atol=1e-5)


def test_scalekd__by_hand() -> None:
    """The first view is at a right angle to the teacher everywhere (|a - b|^2 = 2), the second differs from it by a mean, which is removed."""
    theirs = feats(torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0)))
    ours = feats(torch.zeros(1, 3, 4, 4))
    one = bound(build("scalekd", spatial=3.0, frequency=5.0), ours, theirs)
    turned = torch.stack([-theirs.feats[0][:, 1], theirs.feats[0][:, 0]], dim=1)
    one.projectors[0] = nn.ModuleList([Fixed(turned), Fixed(2 * theirs.feats[0] + 9)])
    assert one(ours, theirs, everywhere()).item() == pytest.approx(3.0 * 2, abs=1e-4)
    one.projectors[0] = nn.ModuleList([Fixed(5 * theirs.feats[0]), Fixed(-theirs.feats[0])])
    assert one(ours, theirs, everywhere()).item() == pytest.approx(5.0 * 4, abs=1e-4)


def test_scalekd__queries_lay_the_student_out_as_the_teacher() -> None:
    ours, theirs = feats(torch.randn(2, 3, 8, 8)), feats(torch.randn(2, 12, 4, 4))
    one = bound(build("scalekd", most=6), ours, theirs)
    assert one.grids == [((6, 6), (4, 4))] and heads_of(12) == 4 and heads_of(7) == 1
    assert next(iter(one.projectors[0].children()))(torch.randn(2, 3, 6, 6)).shape == (2, 12, 4, 4)
    with pytest.raises(UsageError, match="of a map of 1 x 1"):
        bound(build("scalekd"), ours, feats(torch.randn(2, 12, 1, 1)))


def test_context_loss__by_hand() -> None:
    """+1 on the left, -1 on the right: 1 at 8, 4 and 2 cells a side, 0 for the mean of all: (1 + 1/2 + 1/4 + 0) / (1 + 1/2 + 1/4 + 1/8)."""
    apart = torch.ones(1, 3, 8, 8)
    apart[..., 4:] = -1
    assert reviewkd.context_loss(apart, torch.zeros(1, 3, 8, 8), torch.ones(1, 1, 8, 8)).item() == pytest.approx(1.75 / 1.875)
    half = left().valid
    assert reviewkd.context_loss(apart, torch.zeros(1, 3, 8, 8), half).item() == pytest.approx(1.0), "padding is at no scale"


def test_reviewkd__every_stage_is_helped_by_the_deeper_ones() -> None:
    ours = feats(*(torch.randn(1, c, s, s, requires_grad=True) for c, s in ((4, 8), (6, 4), (8, 2))))
    theirs = feats(torch.randn(1, 5, 8, 8), torch.randn(1, 7, 4, 4), torch.randn(1, 9, 4, 4))
    one = bound(build("reviewkd", width=8), ours, theirs)
    assert [stage.attention is None for stage in one.stages] == [True, False, False] and one.order == [2, 1, 0]
    shapes: list[tuple[int, ...]] = []
    for stage in one.stages:
        stage.register_forward_hook(lambda _, __, out: shapes.append(tuple(out[0].shape)))
    one(ours, replace(theirs), everywhere()).mean().backward()
    assert shapes == [(1, 9, 4, 4), (1, 7, 4, 4), (1, 5, 8, 8)] and all(f.grad is not None and f.grad.abs().sum() > 0 for f in ours.feats)
    for f in ours.feats:
        f.grad = None
    below, grids = None, [(4, 4), (4, 4), (8, 8)]
    for stage, i, grid in zip(one.stages, one.order, grids, strict=True):
        reviewed, below = stage(ours.feats[i], below, grid)
    reviewed.square().mean().backward()
    assert all(f.grad is not None and f.grad.abs().sum() > 0 for f in ours.feats), "the finest stage hangs on all"


def test_ofa_loss__by_hand() -> None:
    """p_t = (3/4, 1/4), p_s = (1/2, 1/2), target 0: gamma 1 gives the cross-entropy, gamma 2 ((7/4)^2 - 1 + 1/16) ln 2."""
    theirs, ours, target = torch.tensor([[np.log(3), 0.0]]).float(), torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])
    for gamma, wanted in ((1.0, 1.0), (2.0, 2.0625 + 0.0625)):
        assert ofa_kd.ofa_loss(ours, theirs, target, gamma).item() == pytest.approx(wanted * np.log(2), rel=1e-5)


def test_ofa_kd__asks_the_teacher_where_there_is_no_label() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, 0.0, 1.0]])
    assert ofa_kd.targets(logits, None).argmax(1).tolist() == [1, 0]
    assert ofa_kd.targets(logits, torch.tensor([2, -1])).argmax(1).tolist() == [2, 0]
    assert ofa_kd.targets(logits, torch.tensor([[0.2, 0.1, 0.7], [0.0, 1.0, 0.0]])).argmax(1).tolist() == [2, 1]


def test_ofa_kd__is_the_mean_over_exits_and_the_end() -> None:
    ours, theirs = feats(torch.randn(1, 3, 4, 4), logits=torch.zeros(1, 2)), Outputs(logits=torch.tensor([[float(np.log(3)), 0.0]]))
    one = bound(build("ofa_kd", gamma=1.0), ours, theirs)
    one.exits[0].load_state_dict({"weight": torch.zeros(2, 128), "bias": torch.tensor([float(np.log(3)), 0.0])})
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert one(ours, theirs, everywhere()).item() == pytest.approx((entropy + np.log(2)) / 2, rel=1e-5)
    with pytest.raises(UsageError, match="2 classes and the teacher 5"):
        bound(build("ofa_kd"), ours, Outputs(logits=torch.zeros(1, 5)))


def test_ted__filters_first_then_the_student() -> None:
    ours = feats(torch.randn(2, 3, 4, 4, requires_grad=True), embedding=torch.zeros(2, 5, 4, 4))
    theirs = feats(torch.randn(2, 6, 4, 4), embedding=torch.randn(2, 5, 4, 4))
    one = bound(build("ted", alone=0.5, width=8), ours, theirs)

    def reached(step: int) -> set[str]:
        one.zero_grad(set_to_none=True)
        ours.feats[0].grad = None
        one(ours, theirs, everywhere(2, step=step, steps=11)).mean().backward()
        names = {n.split(".")[0] for n, p in one.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        return names | ({"student"} if ours.feats[0].grad is not None else set())

    assert reached(0) == reached(4) == {"ours", "theirs", "our_heads", "their_heads"}
    assert reached(5) == reached(10) == {"ours", "student"}, "the teacher's filters are fixed"


def test_ted__by_hand() -> None:
    """Before: heads that say 0, so the mean square of what is wanted; after: filters that differ by 3."""
    ours, theirs = feats(torch.zeros(1, 2, 4, 4), embedding=torch.zeros(1, 2, 4, 4)), feats(torch.zeros(1, 3, 4, 4), embedding=torch.full((1, 2, 4, 4), 2.0))
    one = bound(build("ted", width=4), ours, theirs)
    for p in one.parameters():
        nn.init.zeros_(p)
    nn.init.constant_(one.ours[0][2].bias, 3.0)
    assert one(ours, theirs, everywhere(step=0, steps=10)).tolist() == [4.0] and one(ours, theirs, everywhere(step=9, steps=10)).tolist() == [9.0]
    ours, theirs = feats(torch.zeros(1, 2, 4, 4)), feats(torch.zeros(1, 3, 4, 4), logits=torch.tensor([[float(np.log(3)), 0.0]]))
    one = bound(build("ted", width=4, output="logits"), ours, theirs)
    for p in one.parameters():
        nn.init.zeros_(p)
    assert one.needs == {"feats", "logits"} and build("ted").needs == {"feats", "embedding"}
    assert one(ours, theirs, everywhere(step=0, steps=10)).item() == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5), rel=1e-5)


def test_mi_alpha__by_hand() -> None:
    """alpha 1 is InfoNCE (and 1); below that numbers from the definition, photo by photo."""
    scores = torch.tensor([[2.0, 0.5], [-1.0, 1.0]])
    assert torch.allclose(distiller.mi_alpha(scores, torch.zeros(2), 1.0), F.cross_entropy(scores.T, torch.arange(2), reduction="none") + 1, atol=1e-6)
    e, a, alpha = scores.exp().numpy(), np.array([0.3, -0.2]), 0.5
    floor = (1 - alpha) * np.exp(a)
    wanted = [np.log(2 / alpha) - np.log(e[j, j] / (alpha * e[:, j].mean() + floor[j])) + e[1 - j, j] / (alpha * e[1 - j, j] + floor[j]) for j in range(2)]
    assert distiller.mi_alpha(scores, torch.from_numpy(a).float(), alpha).tolist() == pytest.approx(wanted, rel=1e-5)
    assert (distiller.mi_alpha(100 * torch.randn(8, 8), torch.randn(8), 0.3) >= 0).all()
    with pytest.raises(UsageError, match="alpha"):
        build("distiller", alpha=0.0)


def test_attention_transfer__by_hand() -> None:
    """All energy in one cell against all in the other; channels and scale do not matter."""
    ours, theirs = feats(vectors((3, -4), (0, 0))), feats(vectors((0,), (7,)))
    for form, wanted in (("paper", 2**0.5), ("code", 1.0)):
        assert bound(build("attention_transfer", form=form), ours, theirs)(ours, theirs, everywhere()).item() == pytest.approx(wanted)
    with pytest.raises(UsageError, match="no form 'both'"):
        build("attention_transfer", form="both")


KL = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)


def test_attention_maps__by_hand() -> None:
    ours, theirs = torch.full((1, 2, 2, 2), 0.5), torch.tensor([[0.75, 0.25], [0.5, 0.5]]).expand(1, 2, 2, 2)
    assert bound(build("attention_maps"), feats(ours), feats(theirs))(feats(ours), feats(theirs), everywhere()).item() == pytest.approx(KL / 2, rel=1e-5)
    opposite = torch.stack([theirs[:, 0], theirs[:, 0].flip(-1)], dim=1)  # four heads of two kinds: their mean is even
    four = torch.cat([opposite, opposite], dim=1)
    assert bound(build("attention_maps"), feats(ours), feats(four))(feats(ours), feats(four), everywhere()).item() == pytest.approx(0, abs=1e-6)


def test_attention_maps__tokens_are_pooled_to_the_coarser_square() -> None:
    """Four by four cells; every query looks evenly at the quarter below its own: after pooling at one cell of two by two, with class token or without."""
    quarter = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3])
    fine = ((quarter[:, None] + 1) % 4 == quarter[None]).float()[None, None] / 4
    wanted = torch.eye(4).roll(1, 1)[None, None]
    assert torch.allclose(attention_maps.pooled(fine, 2), wanted, atol=1e-6)
    token = F.pad(fine * 0.5, (1, 0, 1, 0), value=0.5)
    assert torch.allclose(attention_maps.pooled(token, 2), wanted, atol=1e-6)
    random = torch.randn(2, 3, 37, 37, generator=torch.Generator().manual_seed(0)).softmax(-1)
    assert torch.allclose(attention_maps.pooled(random, 4).sum(-1), torch.ones(2, 3, 16), atol=1e-5), "6 x 6 to 4 x 4, rows still sum to 1"
    coarse = (0.9 * wanted + 0.025).expand(1, 2, 4, 4)
    one = bound(build("attention_maps"), feats(coarse), feats(fine))
    assert one(feats(coarse), feats(fine), everywhere()).item() == pytest.approx(-np.log(0.925), rel=1e-4)


def test_attention_maps__refuses_what_cannot_be_compared() -> None:
    five, square = torch.randn(1, 2, 13, 13).softmax(-1), torch.randn(1, 2, 16, 16).softmax(-1)
    assert attention_maps.grid_of(16) == 4 and attention_maps.grid_of(17) == 4 and attention_maps.grid_of(15) is None and attention_maps.grid_of(197) == 14
    with pytest.raises(UsageError, match="over 15 tokens cannot be compared with attention over 16"):
        bound(build("attention_maps"), feats(torch.randn(1, 2, 15, 15).softmax(-1)), feats(square))
    with pytest.raises(UsageError, match=r"of the teacher gives .* that are none"):
        bound(build("attention_maps"), feats(five), feats(torch.randn(1, 2, 13, 13)))
    with pytest.raises(UsageError, match="pairs"):
        bound(build("attention_maps"), feats(five), feats())


def test_attention_maps__rows_of_padding_are_left_out_where_tokens_are_cells() -> None:
    ours, theirs = torch.full((1, 1, 16, 16), 1 / 16), torch.full((1, 1, 16, 16), 1 / 16)
    theirs.view(1, 1, 4, 4, 16)[..., 2:, :] = F.one_hot(torch.tensor(3), 16).float()  # the right half looks at one cell
    outside = feats(ours, embedding=torch.zeros(1, 2, 4, 4))
    one = bound(build("attention_maps"), outside, feats(theirs))
    assert one(outside, feats(theirs), left()).item() == pytest.approx(0, abs=1e-6) and one(outside, feats(theirs), everywhere()).item() > 1
    windows = feats(ours, embedding=torch.zeros(1, 2, 8, 8))
    assert bound(build("attention_maps"), windows, feats(theirs))(windows, feats(theirs), left()).item() > 1, "tokens of windows have no place"


def test_mgd__by_hand() -> None:
    ours, theirs = feats(torch.full((1, 2, 4, 4), 3.0)), feats(torch.full((1, 2, 4, 4), 1.0))
    for share, wanted in ((0.0, 4.0), (1.0, 1.0)):
        one = bound(build("mgd", share=share), ours, theirs)
        one.generators[0] = nn.Identity()
        assert one(ours, theirs, everywhere()).tolist() == [wanted]
    one = bound(build("mgd", share=0.25), ours, theirs)
    one.generators[0] = nn.Identity()
    hidden = [(4.0 - float(one(ours, theirs, everywhere()))) / 3 * 16]
    assert 1 <= hidden[0] <= 10 and hidden[0] == pytest.approx(round(hidden[0])), "whole cells are hidden"
    context = everywhere()
    several = torch.tensor([float(one(ours, theirs, context)) for _ in range(200)])
    assert ((4 - several) / 3).mean().item() == pytest.approx(0.25, abs=0.03)


def test_dmae__counts_only_what_is_hidden() -> None:
    ours, theirs = feats(torch.zeros(1, 2, 4, 4)), feats(torch.full((1, 2, 4, 4), 3.0))
    one = bound(build("dmae", share=0.25), ours, theirs)
    hidden = one.hidden(torch.ones(1, 1, 4, 4), everywhere())
    assert hidden.sum() == 4
    other = feats(torch.where(hidden > 0, 3.0, 77.0).expand(1, 2, 4, 4))
    one.decoders[0] = Fixed(torch.zeros(1, 2, 4, 4))
    assert one(ours, other, everywhere()).tolist() == [9.0], "the same cells are drawn from the same generator"


def test_dmae__hides_a_share_of_the_photo() -> None:
    one = build("dmae", share=0.75)
    inside = photo(left(3).valid, (4, 4))
    hidden = one.hidden(inside, left(3))  # type: ignore[operator]
    assert hidden.sum((1, 2, 3)).tolist() == [6.0] * 3 and not (hidden * (1 - inside)).any() and len({tuple(h.flatten().tolist()) for h in hidden}) > 1
    assert build("dmae", share=1.0).hidden(torch.ones(1, 1, 2, 2), everywhere()).sum() == 3, "something is seen"  # type: ignore[operator]
    assert build("dmae", share=0.0).hidden(torch.ones(1, 1, 2, 2), everywhere()).sum() == 1, "something is hidden"  # type: ignore[operator]


def test_dmae__the_hidden_cells_of_the_student_are_not_seen_and_visible_ones_can_count() -> None:
    g = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(1, 2, 4, 4, generator=g), feats(torch.randn(1, 3, 4, 4, generator=g))
    one = bound(build("dmae"), feats(ours), theirs)
    hidden = one.hidden(torch.ones(1, 1, 4, 4), everywhere())
    for where, same in ((hidden, True), (1 - hidden, False)):
        changed = feats(torch.where(where > 0, 9.0, ours))
        assert torch.allclose(one(feats(ours), theirs, everywhere()), one(changed, theirs, everywhere())) is same
    both = bound(build("dmae", visible=2.0), feats(ours), theirs)
    both.load_state_dict(one.state_dict(), strict=False)
    extra = dmae.over(both.projectors[0](ours) - theirs.feats[0], 1 - hidden)
    assert torch.allclose(both(feats(ours), theirs, everywhere()), one(feats(ours), theirs, everywhere()) + 2 * extra)


# --- a library ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mid_level() -> object:
    return pytest.importorskip("torchdistill.losses.mid_level", reason="pip install --no-deps torchdistill==1.1.5")


@pytest.mark.parametrize("form", ["paper", "code"])
def test_attention_transfer__equals_torchdistill(mid_level: object, form: str) -> None:
    g = torch.Generator().manual_seed(0)
    ours, theirs = [[torch.randn(3, c, s, s, generator=g) for c, s in sizes] for sizes in (((4, 8), (6, 4)), ((5, 8), (9, 4)))]
    pairs = {str(i): {"student": {"io": "output", "path": str(i)}, "teacher": {"io": "output", "path": str(i)}} for i in range(2)}
    oracle = mid_level.ATLoss(pairs, mode=form)  # type: ignore[attr-defined]
    wanted = oracle(*({str(i): {"output": f} for i, f in enumerate(side)} for side in (ours, theirs)))
    one = bound(build("attention_transfer", form=form), feats(*ours), feats(*theirs))
    assert one(feats(*ours), feats(*theirs), everywhere(3)).mean().item() == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("side", [2, 4, 8, 12])
def test_context_loss__equals_torchdistill(mid_level: object, side: int) -> None:
    g = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(3, 5, side, side, generator=g), torch.randn(3, 5, side, side, generator=g)
    oracle = mid_level.HierarchicalContextLoss("s", "output", "t", "output")  # type: ignore[attr-defined]
    wanted = oracle({"s": {"output": (ours, None)}}, {"t": {"output": theirs}})
    assert reviewkd.context_loss(ours, theirs, torch.ones(3, 1, 16, 16)).mean().item() == pytest.approx(wanted.item(), rel=1e-5)


# --- padding and refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAPS)
def test_padding__counts_nothing(name: str) -> None:
    g = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 6, 8, 8, generator=g), torch.randn(2, 5, 8, 8, generator=g)
    embedding = torch.randn(2, 3, 8, 8, generator=g)

    def loss(fill: float, step: int) -> Tensor:
        a, b, e = ours.clone(), theirs.clone(), embedding.clone()
        for x in (a, b, e):
            x[..., 4:] += fill
        return one(feats(a, embedding=e), feats(b, embedding=e), replace(left(2), step=step, steps=10))

    one = bound(build(name), feats(ours, embedding=embedding), feats(theirs, embedding=embedding), left(2)).train()
    for step in (0, 9):
        assert torch.allclose(loss(0.0, step), loss(30.0, step), rtol=1e-4, atol=1e-5) and torch.isfinite(loss(0.0, step)).all()


def test_photo__of_a_strip_too_thin_for_a_cell_is_everything() -> None:
    valid = torch.zeros(2, 1, 16, 16)
    valid[0, ..., :1], valid[1, ..., :8] = 1, 1
    assert photo(valid, (2, 2)).tolist() == [[[[1, 1], [1, 1]]], [[[1, 0], [1, 0]]]]
    assert photo_mean(torch.tensor([[[[1.0, 3.0], [1.0, 3.0]]]] * 2), valid).tolist() == [[2.0], [1.0]]


@pytest.mark.parametrize("name", MAPS)
def test_bind__refuses_what_is_no_map(name: str) -> None:
    tokens, one = torch.randn(1, 7, 5), torch.randn(1, 5, 4, 4)
    embedding = torch.randn(1, 5, 4, 4)
    with pytest.raises(UsageError, match=r"tap of the student gives \(1, 7, 5\)") as caught:
        bound(build(name), feats(tokens, embedding=embedding), feats(one, embedding=embedding))
    assert "stage test" in str(caught.value) and caught.value.hint
    with pytest.raises(UsageError, match="0 of the student"):
        bound(build(name), feats(embedding=embedding), feats(one, embedding=embedding))


def test_pairs_of__a_foreign_teacher_s_further_channels_are_left_out() -> None:
    class Teacher(nn.Module):
        embed_dim = 3

    from plugin_samples import stage

    from edgekd.distillation.outputs import Setup

    packed, other = torch.randn(1, 7, 4, 4), torch.randn(1, 7, 4, 4)
    found = pairs_of(Setup(nn.Identity(), Teacher(), stage(), feats(other, other), feats(packed, other, embedding=packed), everywhere()), "hint")
    assert [p.theirs[0] for p in found] == [3, 7] and [p.grid for p in found] == [(4, 4)] * 2


# --- training -------------------------------------------------------------------------------------------------------------


def classifier(seed: int, width: int) -> Classifier:
    return Classifier(seed, width, sharp=6.0)


EMBEDDING = [("embedding", "embedding")]
BOTH = [("stage2", "stage2"), ("embedding", "embedding")]
TRAINED: dict[str, tuple[Callable, dict, dict]] = {
    "hint": (convolutional, {}, {}), "hint-3x3": (convolutional, {"name": "hint", "options": {"kernel": 3}, "taps": BOTH}, {}),
    "fitnet_stages": (convolutional, {}, {}), "feature_cosine": (convolutional, {}, {}), "norm_feature": (convolutional, {"taps": BOTH}, {}),
    "cwd": (convolutional, {"options": {"temperature": 1.0}}, {}), "vkd": (convolutional, {}, {}),
    "vkd-white": (convolutional, {"name": "vkd", "options": {"target": "whiten"}}, {"batch_size": 6, "lr": 1e-2, "steps": 60}),
    "scalekd": (convolutional, {}, {}), "reviewkd": (convolutional, {}, {}), "distiller": (convolutional, {"taps": BOTH}, {}),
    "attention_transfer": (convolutional, {}, {}), "attention_maps": (transformer, {}, {}), "mgd": (convolutional, {}, {}), "dmae": (convolutional, {}, {}),
    "ofa_kd": (classifier, {}, {"trainable": ["encoder", "head"], "lr": 1e-2}), "bf16": (convolutional, {"name": "vkd"}, {"precision": "bf16"}),
}


@pytest.mark.parametrize("case", TRAINED)
def test_objective__the_loss_falls(case: str, tmp_path: Path) -> None:
    make, ref, changes = TRAINED[case]
    trainer, losses = train(make, tmp_path, [{"name": case} | ref], **changes)
    assert falls(losses), losses
    before = make(1, 8).state_dict()
    assert any(not torch.equal(v, before[k]) for k, v in trainer.student.state_dict().items() if k.startswith("encoder"))


@pytest.mark.parametrize(("make", "output"), [(convolutional, "embedding"), (classifier, "logits")])
def test_ted__learns_in_both_phases(make: Callable, output: str, tmp_path: Path) -> None:
    _, losses = train(make, tmp_path, [{"name": "ted", "options": {"alone": 0.5, "output": output}}], steps=60, lr=1e-2, schedule="constant")
    assert np.mean(losses[25:30]) < 0.9 * np.mean(losses[:5]), "the filters"
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[30:33]), "the student"


def test_all_of_them__at_once_and_with_a_transformer_as_the_teacher(tmp_path: Path) -> None:
    """A convolutional student of a transformer with one stage: maps of other widths and grids, one tap read by many."""
    def make(seed: int, width: int) -> nn.Module:
        return transformer(seed, width) if seed == 0 else convolutional(seed, width)

    names = [n for n in MAPS if n != "ted"]
    trainer, losses = train(make, tmp_path, [{"name": n} for n in names])
    assert np.isfinite(losses).all() and set(trainer.result.curve[0]) >= {f"loss.{n}" for n in names}
    assert trainer.step_module.pairs["reviewkd"] == [("stage3", "stage1")] and SIDE == 64


def test_run__killed_and_resumed_equals_one_run(tmp_path: Path) -> None:
    """Projectors, their constraint and what is drawn at every step come back from the file."""
    refs = [{"name": n} for n in ("vkd", "reviewkd", "mgd", "dmae", "scalekd")]
    whole, losses = train(convolutional, tmp_path / "whole", refs, steps=6)
    cut, _ = train(convolutional, tmp_path / "cut", refs, steps=6, run=3)
    again, rest = train(convolutional, tmp_path / "cut", refs, steps=6)
    assert cut.step == 3 and rest == pytest.approx(losses, rel=1e-3) and len(rest) == 6
    for (k, a), b in zip(whole.aux.state_dict().items(), again.aux.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-3), k
