"""The EfficientViT encoder: contract, official keys, linear attention, neck, gradients, export."""
from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_fold import unsettle
from tiny import bf16_steps_learn, onnx_gap, unreached
from torch import nn

from edgekd.models.efficientvit import CONFIGS, HEAD_DIM, ConvNorm, EfficientViT, FusedMBConv, LiteAttention, MBConv, Neck, ResConv
from edgekd.models.fold import fold

TINY = CONFIGS["efficientvit_sam_l0"].scaled(width=0.125, depth=0.25)
TINY_XL = CONFIGS["efficientvit_sam_xl0"].scaled(width=0.0625, depth=0.25, act="relu")


def test_scaled() -> None:
    assert TINY.widths == (8, 8, 16, 32, 64) and TINY.depths == (1, 1, 1, 1, 1) and TINY.neck == (32, 1, 1)
    assert TINY_XL.depths == (0, 1, 1, 1, 1, 1) and TINY_XL.widths == (8, 8, 8, 16, 32, 64)
    assert (TINY.stride, TINY_XL.stride, TINY.act, TINY_XL.act) == (8, 16, "gelu_tanh", "relu")


@pytest.mark.parametrize("size", [32, 96, 128])
def test_embedding_contract(size: int) -> None:
    with torch.no_grad():
        assert EfficientViT(TINY, 32).eval()(torch.randn(2, 3, size, size)).shape == (2, 32, size // 8, size // 8)
        assert EfficientViT(TINY_XL, 32).eval()(torch.randn(2, 3, size, size)).shape == (2, 32, size // 16, size // 16)


@pytest.mark.parametrize("name,keys", [
    ("efficientvit_sam_l0", (
        "backbone.stages.0.op_list.0.conv.weight", "backbone.stages.0.op_list.1.main.conv2.norm.running_var",
        "backbone.stages.2.op_list.0.main.spatial_conv.norm.weight", "backbone.stages.3.op_list.0.main.depth_conv.conv.bias",
        "backbone.stages.4.op_list.1.context_module.main.aggreg.0.1.weight", "backbone.stages.4.op_list.4.local_module.main.inverted_conv.conv.bias",
        "neck.input_ops.2.op_list.0.norm.bias", "neck.middle.op_list.3.main.point_conv.conv.weight", "neck.output_ops.0.op_list.0.conv.bias",
    )),
    ("efficientvit_sam_xl0", (
        "backbone.stages.0.op_list.0.norm.bias", "backbone.stages.4.op_list.0.main.inverted_conv.conv.bias",
        "backbone.stages.5.op_list.3.context_module.main.qkv.conv.weight", "backbone.stages.5.op_list.1.context_module.main.proj.norm.weight",
        "neck.middle.op_list.5.main.spatial_conv.conv.weight", "norm.weight",
    )),
])
def test_official_keys(name: str, keys: tuple[str, ...]) -> None:
    with torch.device("meta"):
        state = EfficientViT(CONFIGS[name], 256).state_dict()
    assert not set(keys) - state.keys()
    assert "backbone.stages.4.op_list.0.main.inverted_conv.norm.weight" not in state  # late stages have a bias there instead
    kernel = 5 if "_l" in name else 3
    assert state["backbone.stages.4.op_list.1.context_module.main.aggreg.0.0.weight"].shape[2:] == (kernel, kernel)
    assert state["neck.input_ops.0.op_list.0.conv.weight"].shape[1] == CONFIGS[name].widths[-1]  # deepest first


def test_norms_are_as_published() -> None:
    model = EfficientViT(TINY, 32)
    assert {m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-6} and model.norm.eps == 1e-6


@torch.no_grad()
def test_linear_attention_equals_its_definition() -> None:
    """For each head of each scale, pixel i takes sum_j (relu q_i . relu k_j) v_j / sum_j (relu q_i . relu k_j)."""
    torch.manual_seed(0)
    channels, height, width = 2 * HEAD_DIM, 3, 5
    block = unsettle(LiteAttention(channels, 5, gamma=1.0))
    x = torch.randn(1, channels, height, width)
    qkv = F.conv2d(x, block.qkv.conv.weight)
    depthwise, pointwise = (conv.weight for conv in block.aggreg[0])
    gathered = F.conv2d(qkv, depthwise, padding=2, groups=3 * channels)
    second = torch.cat([F.conv2d(part, weight) for part, weight in zip(gathered.split(HEAD_DIM, 1), pointwise.split(HEAD_DIM, 0), strict=True)], 1)
    heads = []
    for scale in (qkv, second):
        for head in scale[0].flatten(1).split(3 * HEAD_DIM):  # a head's q, k and v lie together
            q, k, v = head.split(HEAD_DIM)
            weights = q.clamp(min=0).mT @ k.clamp(min=0)  # (query, key)
            heads.append((weights / weights.sum(1, keepdim=True)) @ v.mT)
    mixed = torch.cat(heads, 1).mT.reshape(1, -1, height, width)
    torch.testing.assert_close(block(x), block.proj(mixed), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_attention_is_finite_where_no_key_matches() -> None:
    block = LiteAttention(HEAD_DIM, 3, gamma=1.0).eval()
    block.qkv.conv.weight.zero_()
    assert torch.equal(block(torch.randn(1, HEAD_DIM, 4, 4)), torch.zeros(1, HEAD_DIM, 4, 4))


@torch.no_grad()
def test_attention_keeps_within_fp16() -> None:
    """4096 pixels of values around 100: the plain sums pass fp16's 65504, ours give what fp32 gives."""
    torch.manual_seed(0)
    block = LiteAttention(HEAD_DIM, 3, gamma=1.0).eval()
    x = torch.randn(1, HEAD_DIM, 64, 64).abs() * 100
    _, k, v = block.qkv(x).split(HEAD_DIM, 1)
    assert (k.relu() * v).sum((2, 3)).abs().max() > 65504
    wanted = block(x)
    block.half()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert (block(x.half()) - wanted).norm() / wanted.norm() < 0.01


@torch.no_grad()
def test_bottlenecks_equal_their_definitions() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 6)

    def gelu(y: torch.Tensor) -> torch.Tensor:
        return 0.5 * y * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)))

    res = unsettle(ResConv(4, 8, 1, 2, "gelu_tanh", False, 1.0))
    hidden = gelu(res.conv1.norm(F.conv2d(x, res.conv1.conv.weight, padding=1)))
    torch.testing.assert_close(res(x), res.conv2.norm(F.conv2d(hidden, res.conv2.conv.weight, padding=1)))

    fused = unsettle(FusedMBConv(4, 8, 2, 2, "gelu_tanh", False, 1.0))
    hidden = gelu(fused.spatial_conv.norm(F.conv2d(x, fused.spatial_conv.conv.weight, stride=2, padding=1)))
    torch.testing.assert_close(fused(x), fused.point_conv.norm(F.conv2d(hidden, fused.point_conv.conv.weight)))

    plain = unsettle(MBConv(4, 8, 2, 3, "gelu_tanh", True, 1.0))
    up, deep = plain.inverted_conv.conv, plain.depth_conv.conv
    hidden = gelu(F.conv2d(gelu(F.conv2d(x, up.weight, up.bias)), deep.weight, deep.bias, stride=2, padding=1, groups=12))
    torch.testing.assert_close(plain(x), plain.point_conv.norm(F.conv2d(hidden, plain.point_conv.conv.weight)))


@torch.no_grad()
def test_neck_sums_three_upsampled_maps() -> None:
    """Constant maps of 1, 10 and 100 through identity projections: every pixel is 111, then a linear output layer of weight 2, bias 1."""
    config = TINY.scaled()
    neck = Neck(config, 4).eval()
    for op, channels in zip(neck.input_ops, reversed(config.widths[-3:]), strict=True):
        weight = op.op_list[0].conv.weight
        weight.zero_()
        weight[:, 0] = 1  # every output channel copies the first input channel
        assert weight.shape[1] == channels
    output = neck.output_ops[0].op_list[0].conv
    output.weight.zero_()
    output.weight[:, 3] = 2
    output.bias.fill_(1)
    maps = tuple(torch.full((1, channels, side, side), value) for channels, side, value in zip(config.widths[-3:], (8, 4, 2), (1.0, 10.0, 100.0), strict=True))
    out = neck(maps)  # fresh residual blocks are the identity: the scale of their last norm is 0
    assert out.shape == (1, 4, 8, 8)
    torch.testing.assert_close(out, torch.full((1, 4, 8, 8), 2 * 111.0 + 1), rtol=1e-4, atol=0)


@torch.no_grad()
def test_neck_upsamples_with_bicubic_weights() -> None:
    """A lone pixel of the coarse map, doubled: Keys' kernel with a = -0.75 at offsets of 1/4 and 3/4."""
    config = TINY.scaled()
    neck = Neck(config, 1).eval()
    for op in neck.input_ops:
        op.op_list[0].conv.weight.zero_()
    neck.input_ops[1].op_list[0].conv.weight[:, 0] = 1
    neck.output_ops[0].op_list[0].conv.weight.zero_()
    neck.output_ops[0].op_list[0].conv.weight[:, 0] = 1
    neck.output_ops[0].op_list[0].conv.bias.zero_()
    fine, middle, coarse = (torch.zeros(1, c, s, s) for c, s in zip(config.widths[-3:], (16, 8, 4), strict=True))
    middle[0, 0, 4, 4] = 1

    def kernel(t: float, a: float = -0.75) -> float:
        t = abs(t)
        return (a + 2) * t**3 - (a + 3) * t**2 + 1 if t <= 1 else a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0

    line = torch.tensor([kernel((i + 0.5) / 2 - 0.5 - 4) for i in range(16)])
    torch.testing.assert_close(neck((fine, middle, coarse))[0, 0], line[:, None] * line[None, :], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_conv_norm_folds_with_and_without_norm_and_activation() -> None:
    x = torch.randn(1, 4, 5, 5)
    for norm, act in ((True, "relu"), (True, None), (False, "relu"), (False, None)):
        block = unsettle(ConvNorm(4, 6, 3, norm=norm, act=act))
        torch.testing.assert_close(fold(block)(x), block(x), atol=1e-5, rtol=1e-5)


def test_every_parameter_gets_a_gradient() -> None:
    torch.manual_seed(0)
    assert unreached(EfficientViT(TINY, 32), 128) == []


def test_bf16_channels_last_step_learns() -> None:
    torch.manual_seed(0)
    bf16_steps_learn(EfficientViT(TINY_XL, 32))


def test_onnxruntime_parity(tmp_path: Path) -> None:
    torch.manual_seed(0)
    assert onnx_gap(unsettle(EfficientViT(TINY, 32)), torch.randn(1, 3, 96, 96), tmp_path) <= 1e-4
