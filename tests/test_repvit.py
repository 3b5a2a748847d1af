"""The RepViT encoder: contract, published geometry, gradients, export."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from tiny import bf16_steps_learn, onnx_gap, unreached
from torch import nn

from edgekd.errors import UsageError
from edgekd.models import blocks
from edgekd.models.repvit import CONFIGS, RepViT, RepViTConfig

TINY = RepViTConfig((8, 16, 24, 32), (1, 1, 3, 1), act="relu")


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("size", [32, 192, 224, 256, 320])
def test_embedding_contract(size: int) -> None:
    with torch.no_grad():
        assert RepViT(TINY, 32).eval()(torch.randn(2, 3, size, size)).shape == (2, 32, size // 16, size // 16)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("size", [32, 96, 224])
def test_both_ways_embed_at_stride_16(fuse: bool, size: int) -> None:
    with torch.no_grad():
        assert RepViT(replace(TINY, fuse=fuse), 32).eval()(torch.randn(1, 3, size, size)).shape == (1, 32, size // 16, size // 16)


@pytest.mark.parametrize("name,parameters", [("repvit_xs", 815_532), ("repvit_s", 1_539_240), ("repvit_m", 3_410_084)])
def test_parameter_counts(name: str, parameters: int) -> None:
    assert count(RepViT(CONFIGS[name], 128)) == parameters


@pytest.mark.parametrize("name,classifier", [
    ("repvit_sam_m0_9", 5_103_560), ("repvit_sam_m1_0", 6_852_900), ("repvit_sam_m1_1", 8_288_888), ("repvit_sam_m1_5", 14_130_408),
    ("repvit_sam", 23_046_512),
])
def test_published_geometry(name: str, classifier: int) -> None:
    """The published ImageNet models are this trunk, a norm and a 1000-way layer."""
    with torch.device("meta"):
        model, last = RepViT(CONFIGS[name], 128), CONFIGS[name].widths[3]
    assert count(model.features) == classifier - (2 * last + 1000 * last + 1000)


def test_edge_sam_fits_key_for_key() -> None:
    """5,517,552 parameters in 684 tensors: norms on the branches, stages 3 and 4 fused into a neck of 256."""
    with torch.device("meta"):
        model = RepViT(CONFIGS["edge_sam"], 256)
    keys = model.state_dict().keys()
    assert count(model) == 5_517_552 and len(keys) == 684
    for key in ("features.0.0.c.weight", "features.0.2.bn.bias", "features.1.token_mixer.0.conv1.c.weight", "features.1.token_mixer.1.fc1.weight",
                "features.4.token_mixer.0.c.weight", "features.4.token_mixer.2.c.weight", "features.4.channel_mixer.m.2.bn.weight",
                "fuse_stage2.weight", "fuse_stage3.weight", "neck.3.bias"):
        assert key in keys


def test_repvit_sam_has_a_joint_norm_and_no_fusion() -> None:
    with torch.device("meta"):
        state = RepViT(CONFIGS["repvit_sam"], 256).state_dict()
    assert {"features.1.token_mixer.0.conv1.weight", "features.1.token_mixer.0.conv1.bias", "features.1.token_mixer.0.bn.weight"} <= state.keys()
    assert "features.1.token_mixer.0.conv1.c.weight" not in state and not any(key.startswith("fuse_") for key in state)
    assert state["neck.0.weight"].shape == (256, 640, 1, 1)


def test_the_fused_embedding_is_the_sum_of_two_stages() -> None:
    """Stage 3 projected, plus stage 4 projected and doubled with the configured weights."""
    torch.manual_seed(0)
    for mode in ("bilinear", "bicubic"):
        model = RepViT(replace(TINY, upsample=mode), 16).eval()  # type: ignore[arg-type]
        x = images = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            for block in model.features[:-2]:  # stage 4: the downsampling block and one more
                x = block(x)
            deep = model.features[-1](model.features[-2](x))
            doubled = nn.Upsample(scale_factor=2, mode=mode)(nn.functional.conv2d(deep, model.fuse_stage3.weight))
            wanted = model.neck(nn.functional.conv2d(x, model.fuse_stage2.weight) + doubled)
            torch.testing.assert_close(model(images), wanted, atol=1e-5, rtol=1e-5)


def test_upsampling_modes_differ() -> None:
    """EdgeSAM's own exporter swaps the mode; here it is part of the configuration, because it changes the embedding."""
    torch.manual_seed(0)
    one = RepViT(replace(TINY, upsample="bicubic"), 16).eval()
    two = RepViT(TINY, 16).eval()
    two.load_state_dict(one.state_dict())
    images = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        assert (one(images) - two(images)).norm() / one(images).norm() > 0.01
    assert CONFIGS["edge_sam"].upsample == "bicubic" and CONFIGS["repvit_s"].upsample == "bilinear"


def test_squeeze_excite_places() -> None:
    """Every second block of a stage, the first included; none in downsampling blocks nor at the end of a longer stage."""
    with torch.device("meta"):
        model = RepViT(CONFIGS["repvit_sam_m0_9"], 128)
    gates = [isinstance(block.token_mixer[1], blocks.SqueezeExcite) for block in model.features[1:]]
    stages = [[1, 0, 0], [0, 1, 0, 0], [0] + [1, 0] * 7 + [0], [0, 1, 0]]
    assert gates == [bool(g) for stage in stages for g in stage]


@pytest.mark.parametrize("channels,hidden", [(24, 8), (48, 16), (56, 16), (96, 24), (112, 32), (224, 56)])
def test_squeeze_excite_width(channels: int, hidden: int) -> None:
    assert blocks.SqueezeExcite(channels).fc1.out_channels == hidden


def test_every_parameter_gets_a_gradient() -> None:
    missing = unreached(RepViT(TINY, 32), 64)
    # a constant shift right before a batch norm cannot matter: these are the biases of the 1x1 branch under the joint norm
    assert all(n.endswith("conv1.bias") or n.endswith("conv.bn.bias") for n in missing), missing


def test_bf16_channels_last_step_learns() -> None:
    torch.manual_seed(0)
    bf16_steps_learn(RepViT(TINY, 32))


def test_starts_as_the_identity_in_the_channel_mixers() -> None:
    model = RepViT(TINY, 32).eval()
    x = torch.randn(1, 24, 4, 4)
    mixer = next(b.channel_mixer for b in model.features[1:] if b.channel_mixer.m[0].c.in_channels == 24)
    with torch.no_grad():
        assert torch.equal(mixer(x), x)


def test_state_dict_round_trip() -> None:
    one, two = RepViT(TINY, 32).eval(), RepViT(TINY, 32).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert not torch.equal(one(x), two(x))
        two.load_state_dict(one.state_dict(), strict=True)
        assert torch.equal(one(x), two(x))


@pytest.mark.parametrize("name", CONFIGS)
def test_scaled_by_one_is_the_same(name: str) -> None:
    assert CONFIGS[name].scaled() == CONFIGS[name]


def test_scaled() -> None:
    config = CONFIGS["repvit_s"].scaled(width=0.7, depth=0.3, act="gelu")
    assert config.widths == (24, 48, 88, 176) and config.depths == (1, 1, 2, 1) and config.act == "gelu"


def test_unknown_activation() -> None:
    with pytest.raises(UsageError, match="unknown activation 'gelo'") as caught:
        RepViT(TINY.scaled(act="gelo"), 32)
    assert "did you mean 'gelu'" in str(caught.value)


def test_layer_norm_2d_is_sams() -> None:
    norm = blocks.LayerNorm2d(6)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_()
    x = torch.randn(2, 6, 5, 4) * 3 + 1
    mean, var = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
    wanted = (x - mean) / (var + 1e-6).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]
    torch.testing.assert_close(norm(x), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("upsample", ["bilinear", "bicubic"])
def test_onnxruntime_parity(tmp_path: Path, upsample: Literal["bilinear", "bicubic"]) -> None:
    torch.manual_seed(0)
    assert onnx_gap(RepViT(replace(TINY, upsample=upsample), 32), torch.randn(1, 3, 96, 96), tmp_path) <= 1e-4


@pytest.mark.parametrize(("size", "target"), [(4, 8), (16, 64), (5, 15), (6, 6)])
def test_bicubic_is_torchs(size: int, target: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, size, size + 1)
    wanted = nn.functional.interpolate(x, (target, target + 2), mode="bicubic", align_corners=False)
    torch.testing.assert_close(blocks.bicubic(x, target, target + 2), wanted, atol=1e-5, rtol=1e-5)
