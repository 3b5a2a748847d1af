"""Folding: the deployed form equals the training form in eval mode, and only then."""
from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd import students
from edgekd.models import blocks, repvit
from edgekd.models.fold import fold


def unsettle(model: nn.Module, seed: int = 1) -> nn.Module:
    """Random norm statistics and affine terms, as after training (fresh ones would make folding trivially right)."""
    generator = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.3, generator=generator)
            m.running_var.uniform_(0.3, 2.0, generator=generator)
            with torch.no_grad():
                m.weight.uniform_(0.4, 1.6, generator=generator)
                m.bias.normal_(0, 0.3, generator=generator)
        elif isinstance(m, (nn.Conv2d, nn.Linear)) and m.bias is not None:
            with torch.no_grad():
                m.bias.normal_(0, 0.3, generator=generator)
    return model.eval()


@torch.no_grad()
def both(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs of the training form and of the folded form."""
    return model(x), fold(model)(x)


def assert_equal(before: Tensor, after: Tensor) -> None:
    assert F.cosine_similarity(before.flatten(), after.flatten(), dim=0).item() >= 0.999999
    assert (before - after).abs().max().item() <= 1e-4


@pytest.mark.parametrize("kernel,stride,groups", [(1, 1, 1), (3, 1, 1), (3, 2, 8), (1, 1, 8), (3, 2, 1)])
def test_conv_bn(kernel: int, stride: int, groups: int) -> None:
    block = unsettle(blocks.ConvBN(8, 16, kernel, stride, groups=groups))
    x = torch.randn(2, 8, 9, 9)
    before, after = both(block, x)
    assert before.shape == (2, 16, -(-9 // stride), -(-9 // stride))
    assert_equal(before, after)
    assert isinstance(fold(block), nn.Conv2d)


def test_conv_with_bias_and_norm() -> None:
    conv = nn.Conv2d(4, 6, 3, padding=1)
    norm = nn.BatchNorm2d(6)
    whole = unsettle(nn.Sequential(conv, norm))
    x = torch.randn(1, 4, 7, 7)
    with torch.no_grad():
        assert_equal(whole(x), blocks.fold_batch_norm(conv, norm)(x))


def test_norm_without_statistics_is_refused() -> None:
    with pytest.raises(ValueError, match="running statistics"):
        blocks.fold_batch_norm(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))


@pytest.mark.parametrize("joint_norm", [True, False])
def test_depthwise_mixer_becomes_one_convolution(joint_norm: bool) -> None:
    block = unsettle(repvit.RepDW(12, joint_norm))
    assert_equal(*both(block, torch.randn(2, 12, 10, 11)))
    folded = fold(block)
    assert isinstance(folded, nn.Conv2d) and folded.groups == 12 and folded.kernel_size == (3, 3)


@torch.no_grad()
def test_the_rule_of_per_branch_norms() -> None:
    """EdgeSAM's layout: conv_bn(3x3) + conv_bn(1x1) + identity is one kernel, g3/s3 W3 + pad(g1/s1 W1 + 1), s = sqrt(var + eps)."""
    block = unsettle(repvit.RepDW(5, joint_norm=False))
    wide, point = block.conv, block.conv1
    g3, g1 = (part.bn.weight / (part.bn.running_var + 1e-5).sqrt() for part in (wide, point))
    weight = wide.c.weight * g3[:, None, None, None]
    weight[:, :, 1, 1] += (point.c.weight[:, :, 0, 0] * g1[:, None]) + 1
    bias = (wide.bn.bias - wide.bn.running_mean * g3) + (point.bn.bias - point.bn.running_mean * g1)
    folded = block.fold()
    torch.testing.assert_close(folded.weight, weight)
    torch.testing.assert_close(folded.bias, bias)


@torch.no_grad()
def test_the_rule_of_a_joint_norm() -> None:
    """RepViT-SAM's layout: the plain 1x1 branch and the identity lie under the norm too, g/s (g3/s3 W3 + pad(W1 + 1))."""
    block = unsettle(repvit.RepDW(5, joint_norm=True))
    wide, point, bn = block.conv, block.conv1, block.bn
    g3, g = (norm.weight / (norm.running_var + 1e-5).sqrt() for norm in (wide.bn, bn))
    weight = wide.c.weight * g3[:, None, None, None]
    weight[:, :, 1, 1] += point.weight[:, :, 0, 0] + 1
    bias = (wide.bn.bias - wide.bn.running_mean * g3) + point.bias
    folded = block.fold()
    torch.testing.assert_close(folded.weight, weight * g[:, None, None, None])
    torch.testing.assert_close(folded.bias, (bias - bn.running_mean) * g + bn.bias)


@pytest.mark.parametrize("name", [
    "repvit_xs", "repvit_s", "repvit_m", "edge_sam:width=0.5,depth=0.25", "repvit_sam:width=0.25,depth=0.25", "tinyvit_xs", "tinyvit_s",
    "mobile_sam:depth=0.25", "efficientvit_sam_l0:width=0.25,depth=0.5", "efficientvit_sam_xl0:width=0.25,depth=0.25", "nanosam:width=0.25",
])
def test_students_fold_exactly(name: str) -> None:
    model = unsettle(students.encoder(name))
    generator = torch.Generator().manual_seed(3)
    before, after = both(model, torch.randn(1, 3, 128, 128, generator=generator))
    assert before.std() > 0.1  # not vacuous
    assert_equal(before, after)


@pytest.mark.parametrize("name", students.names())
def test_no_norm_and_no_branch_is_left(name: str) -> None:
    with torch.device("meta"):
        model = students.encoder(name).eval()
    folded = fold(model)
    kinds = {type(m) for m in folded.modules()}
    assert not kinds & {nn.BatchNorm2d, blocks.ConvBN, repvit.RepDW}
    assert not any(callable(getattr(m, "fold", None)) for m in folded.modules())


def test_the_original_is_untouched() -> None:
    model = unsettle(students.encoder("repvit_xs"))
    before = copy.deepcopy(model.state_dict())
    fold(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_folded_parameters_share_nothing() -> None:
    model = students.encoder("tinyvit_xs").eval()
    own = {p.data_ptr() for p in model.parameters()}
    assert own.isdisjoint(p.data_ptr() for p in fold(model).parameters())


def test_folded_form_is_deterministic_and_in_eval_mode() -> None:
    model = unsettle(students.encoder("repvit_xs"))
    one, two = fold(model), fold(model)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not any(m.training for m in one.modules())


def test_a_whole_student_folds_with_its_decoder() -> None:
    model = unsettle(students.build("repvit_xs", image_size=64))
    folded = fold(model)
    points, labels = torch.tensor([[[20.0, 30.0]]]), torch.ones(1, 1)
    with torch.no_grad():
        before = model.decode(model.embed(torch.ones(1, 3, 64, 64)), points, labels)
        after = folded.decode(folded.embed(torch.ones(1, 3, 64, 64)), points, labels)
    assert_equal(before[0], after[0])
    assert folded.name == model.name and folded.preprocess == model.preprocess


class Inner(nn.Module):
    def fold(self) -> nn.Module:
        return nn.Identity()


class Outer(nn.Module):
    """Folds as a whole into something that holds another foldable part."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def fold(self) -> nn.Module:
        assert isinstance(self.inner, Inner), "the outermost must fold before its parts"
        return nn.Sequential(Inner(), nn.ReLU())


def test_outermost_first_then_what_it_returned() -> None:
    folded = fold(nn.Sequential(Outer(), Inner()))
    assert [type(m) for m in folded[0]] == [nn.Identity, nn.ReLU]
    assert isinstance(folded[1], nn.Identity)


def test_a_module_used_twice_stays_one() -> None:
    shared = blocks.ConvBN(4, 4)
    folded = fold(nn.ModuleList([shared, shared]).eval())
    assert folded[0] is folded[1] and isinstance(folded[0], nn.Conv2d)


class Short(nn.Module):
    """Folds into modules made while folding, which may be given the memory of modules dropped just before."""

    def fold(self) -> nn.Module:
        return nn.Sequential(nn.ReLU(), nn.Tanh())


def test_new_modules_are_not_taken_for_dropped_ones() -> None:
    for _ in range(20):
        folded = fold(nn.Sequential(*(nn.Sequential(Short(), Inner(), Short()) for _ in range(30))))
        assert all([type(m) for m in part[0]] == [nn.ReLU, nn.Tanh] and isinstance(part[1], nn.Identity) for part in folded)


def test_a_module_without_anything_to_fold_is_copied() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    folded = fold(model)
    assert folded is not model and torch.equal(folded[0].weight, model[0].weight)


def test_frozen_parts_stay_frozen() -> None:
    block = blocks.ConvBN(4, 4).requires_grad_(False)
    assert not any(p.requires_grad for p in fold(block).parameters())


def test_dtype_is_kept() -> None:
    assert fold(blocks.ConvBN(4, 4).double().eval()).weight.dtype == torch.float64
