"""The TinyViT encoder: contract, published geometry, windows, attention bias, gradients, export."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import bf16_steps_learn, onnx_gap, unreached
from torch import nn

from edgekd.models.blocks import from_windows, to_windows
from edgekd.models.tinyvit import CONFIGS, HEAD_DIM, TinyViT, TinyViTConfig, WindowAttention

TINY = TinyViTConfig((16, 32, 32, 64), (1, 1, 2, 1), windows=(4, 8, 4), act="relu")
PADDED = TinyViTConfig((16, 32, 32, 64), (1, 1, 1, 1), windows=(7, 14, 7))


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("config", [TINY, PADDED], ids=["exact", "padded"])
@pytest.mark.parametrize("size", [32, 192, 224, 256, 320])
def test_embedding_contract(config: TinyViTConfig, size: int) -> None:
    with torch.no_grad():
        assert TinyViT(config, 32).eval()(torch.randn(1, 3, size, size)).shape == (1, 32, size // 16, size // 16)


@pytest.mark.parametrize("name,parameters", [("tinyvit_xs", 973_820), ("tinyvit_s", 2_285_392), ("mobile_sam", 5_260_052)])
def test_parameter_counts(name: str, parameters: int) -> None:
    with torch.device("meta"):
        assert count(TinyViT(CONFIGS[name], 128)) == parameters


@pytest.mark.parametrize("name,classifier", [("mobile_sam", 5_392_764), ("mobile_sam_11m", 10_996_972), ("mobile_sam_21m", 21_198_568)])
def test_published_geometry(name: str, classifier: int) -> None:
    """The published ImageNet models of 5, 11 and 21 M are this trunk with windows of 7, 7, 14, 7, a norm and a 1000-way layer."""
    with torch.device("meta"):
        model, last = TinyViT(CONFIGS[name], 256), CONFIGS[name].widths[3]
    assert count(model) - count(model.neck) == classifier - (2 * last + 1000 * last + 1000)


def test_published_checkpoint_fits_key_for_key() -> None:
    """MobileSAM's encoder: 6,065,532 parameters in 302 tensors, 4 of which are the unused norm and 1000-way layer of the classifier."""
    with torch.device("meta"):
        model = TinyViT(CONFIGS["mobile_sam"], 256)
    keys = model.state_dict().keys()
    assert count(model) == 6_065_532 - (2 * 320 + 1000 * 320 + 1000) and len(keys) == 302 - 4
    for key in ("patch_embed.seq.0.c.weight", "patch_embed.seq.2.bn.bias", "layers.0.blocks.1.conv3.bn.weight", "layers.0.downsample.conv2.c.weight",
                "layers.2.blocks.5.attn.attention_biases", "layers.1.blocks.0.attn.norm.weight", "layers.3.blocks.0.mlp.fc1.weight",
                "layers.3.blocks.1.mlp.norm.bias", "layers.3.blocks.1.local_conv.c.weight", "neck.0.weight"):
        assert key in keys
    assert "layers.3.downsample.conv1.c.weight" not in keys


@pytest.mark.parametrize("height,width,size", [(8, 8, 8), (8, 8, 4), (9, 5, 4), (3, 3, 7), (12, 12, 16)])
def test_windows_round_trip(height: int, width: int, size: int) -> None:
    x = torch.randn(2, height, width, 3)
    windows = to_windows(x, size)
    assert windows.shape == (2 * -(-height // size) * -(-width // size), size * size, 3)
    assert torch.equal(from_windows(windows, size, height, width), x)


def test_windows_are_in_reading_order_and_padded_with_zeros() -> None:
    x = torch.arange(1.0, 16.0).reshape(1, 3, 5, 1)
    windows = to_windows(x, 2)[..., 0]
    assert windows.tolist() == [[1, 2, 6, 7], [3, 4, 8, 9], [5, 0, 10, 0], [11, 12, 0, 0], [13, 14, 0, 0], [15, 0, 0, 0]]


def test_bias_depends_on_absolute_offsets_only() -> None:
    attention = WindowAttention(HEAD_DIM, 3)
    with torch.no_grad():
        attention.attention_biases.copy_(torch.arange(9.0)[None])
        bias = attention.bias()[0]
    for i in range(9):
        for j in range(9):
            assert bias[i, j] == abs(i // 3 - j // 3) * 3 + abs(i % 3 - j % 3)


def test_bias_table_is_not_in_checkpoints_and_is_contiguous() -> None:
    attention = WindowAttention(HEAD_DIM, 4)
    assert "attention_bias_idxs" not in attention.state_dict()
    assert attention.attention_bias_idxs.is_contiguous() and attention.attention_bias_idxs.shape == (4**4,)


def test_attention_equals_its_definition() -> None:
    torch.manual_seed(0)
    attention = WindowAttention(2 * HEAD_DIM, 3).eval()
    with torch.no_grad():
        attention.attention_biases.normal_()
        x = torch.randn(2, 9, 2 * HEAD_DIM)
        heads = attention.qkv(attention.norm(x)).reshape(2, 9, 2, 3 * HEAD_DIM)
        out = torch.empty(2, 9, 2, HEAD_DIM)
        for h in range(2):
            q, k, v = heads[:, :, h].split(HEAD_DIM, -1)
            out[:, :, h] = torch.softmax(q @ k.mT / HEAD_DIM**0.5 + attention.bias()[h], -1) @ v
        torch.testing.assert_close(attention(x), attention.proj(out.reshape(2, 9, -1)), atol=1e-5, rtol=1e-5)


def test_a_window_sees_only_itself() -> None:
    torch.manual_seed(0)
    attention = WindowAttention(HEAD_DIM, 4).eval()
    x = torch.randn(1, 8, 8, HEAD_DIM)
    changed = x.clone()
    changed[:, 4:, 4:] += 1.0 * torch.randn(4, 4, HEAD_DIM)
    with torch.no_grad():
        a, b = (from_windows(attention(to_windows(t, 4)), 4, 8, 8) for t in (x, changed))
    assert torch.equal(a[:, :4], b[:, :4]) and not torch.allclose(a[:, 4:, 4:], b[:, 4:, 4:])


def test_every_parameter_gets_a_gradient() -> None:
    torch.manual_seed(0)
    assert unreached(TinyViT(TINY, 32), 64) == []


def test_bf16_channels_last_step_learns() -> None:
    torch.manual_seed(0)
    bf16_steps_learn(TinyViT(TINY, 32))


def test_attention_maps_stay_in_bf16_under_autocast() -> None:
    attention, seen = WindowAttention(HEAD_DIM, 4), []
    attention.proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        attention(torch.randn(2, 16, HEAD_DIM))
    assert seen == [torch.bfloat16]


def test_memory_format_does_not_change_the_result() -> None:
    model, x = TinyViT(TINY, 32).eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        plain = model(x)
        last = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(plain, last, atol=1e-4, rtol=1e-4)


def test_state_dict_round_trip() -> None:
    one, two = TinyViT(TINY, 32).eval(), TinyViT(TINY, 32).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert not torch.equal(one(x), two(x))
        two.load_state_dict(one.state_dict(), strict=True)
        assert torch.equal(one(x), two(x))


@pytest.mark.parametrize("name", CONFIGS)
def test_scaled_by_one_is_the_same(name: str) -> None:
    assert CONFIGS[name].scaled() == CONFIGS[name]


def test_scaled_keeps_whole_heads() -> None:
    config = CONFIGS["tinyvit_s"].scaled(width=0.7, depth=0.5)
    assert config.widths == (24, 32, 96, 128) and config.depths == (1, 1, 2, 1)


@pytest.mark.parametrize("config", [TINY, PADDED], ids=["exact", "padded"])
def test_onnxruntime_parity(config: TinyViTConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    assert onnx_gap(TinyViT(config, 32), torch.randn(1, 3, 96, 96), tmp_path) <= 1e-4
