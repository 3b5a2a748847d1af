"""NanoSAM's encoder: contract, published keys, equality with a library's ResNet, position embedding, export."""
from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_fold import unsettle
from tiny import bf16_steps_learn, onnx_gap

from edgekd.models.fold import fold
from edgekd.models.nanosam import CONFIGS, BasicBlock, NanoSam, NanoSamConfig

TINY = NanoSamConfig((8, 16, 24, 32), (1, 1, 1, 2), neck=16, positions=4)


@pytest.mark.parametrize("size", [32, 96, 160])
def test_embedding_contract(size: int) -> None:
    with torch.no_grad():
        assert NanoSam(TINY, 32).eval()(torch.randn(2, 3, size, size)).shape == (2, 32, size // 16, size // 16)


def test_scaled() -> None:
    config = CONFIGS["nanosam"].scaled(width=0.5, depth=0.5, act="relu")
    assert (config.widths, config.depths, config.neck, config.act) == ((32, 64, 128, 256), (1, 1, 1, 1), 128, "relu")


def test_published_keys() -> None:
    """ResNet-18 without its classifier (11,176,512 parameters) and the layers behind it, in 133 tensors."""
    with torch.device("meta"):
        model = NanoSam(CONFIGS["nanosam"], 256)
    state = model.state_dict()
    assert len(state) == 133 and sum(p.numel() for p in model.backbone.parameters()) == 11_176_512
    assert {"backbone.conv1.weight", "backbone.bn1.running_mean", "backbone.layer1.1.conv2.weight", "backbone.layer4.0.downsample.1.weight",
            "up_1.0.bias", "up_1.4.weight", "proj.2.bias"} <= state.keys()
    assert "backbone.layer1.0.downsample.0.weight" not in state
    assert state["up_1.6.weight"].shape == (256, 256, 3, 3) and state["pos_embedding"].shape == (1, 256, 64, 64)


@torch.no_grad()
def test_the_resnet_equals_the_librarys() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=list(TINY.widths), depths=list(TINY.depths), layer_type="basic")
    theirs = unsettle(transformers.ResNetModel(config))

    def key(name: str) -> str:
        name = name.replace("embedder.embedder.convolution", "conv1").replace("embedder.embedder.normalization", "bn1")
        name = re.sub(r"encoder\.stages\.(\d)\.layers\.", lambda m: f"layer{int(m[1]) + 1}.", name)
        name = re.sub(r"layer\.(\d)\.convolution", lambda m: f"conv{int(m[1]) + 1}", name)
        name = re.sub(r"layer\.(\d)\.normalization", lambda m: f"bn{int(m[1]) + 1}", name)
        return name.replace("shortcut.convolution", "downsample.0").replace("shortcut.normalization", "downsample.1")

    ours = NanoSam(TINY, 32).backbone.eval()
    ours.load_state_dict({key(name): value for name, value in theirs.state_dict().items()}, strict=True)
    images = torch.randn(2, 3, 64, 64)
    wanted = theirs(images).last_hidden_state
    assert (ours(images) - wanted).norm() / wanted.norm() <= 1e-5


@torch.no_grad()
def test_a_block_equals_its_definition() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 6)
    block = unsettle(BasicBlock(4, 8, 2))
    hidden = block.bn1(F.conv2d(x, block.conv1.weight, stride=2, padding=1)).clamp(min=0)
    beside = block.downsample[1](F.conv2d(x, block.downsample[0].weight, stride=2))
    wanted = (block.bn2(F.conv2d(hidden, block.conv2.weight, padding=1)) + beside).clamp(min=0)
    torch.testing.assert_close(block(x), wanted)
    torch.testing.assert_close(fold(block)(x), wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_position_embedding_is_added_as_it_is_at_its_own_size_and_interpolated_elsewhere() -> None:
    model = NanoSam(TINY, 32).eval()
    images = torch.randn(1, 3, 64, 64)
    bare, half = (model(x) for x in (images, images[..., :32, :32]))  # fresh positions are 1e-5: none, nearly
    positions = torch.arange(16.0).reshape(4, 4).expand(1, 32, 4, 4)
    model.pos_embedding.copy_(positions)
    torch.testing.assert_close(model(images) - bare, positions, atol=1e-3, rtol=0)
    mean = torch.tensor([[2.5, 4.5], [10.5, 12.5]]).expand(1, 32, 2, 2)  # of each quarter
    torch.testing.assert_close(model(images[..., :32, :32]) - half, mean, atol=1e-3, rtol=0)


def test_starts_as_the_identity_in_the_blocks() -> None:
    block = BasicBlock(8, 8, 1).eval()
    x = torch.randn(1, 8, 4, 4)
    with torch.no_grad():
        assert torch.equal(block(x), x.relu())


def test_bf16_channels_last_step_learns() -> None:
    torch.manual_seed(0)
    bf16_steps_learn(NanoSam(TINY, 32))


def test_onnxruntime_parity(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = unsettle(NanoSam(TINY, 32))
    with torch.no_grad():
        model.pos_embedding.normal_()
    assert onnx_gap(model, torch.randn(1, 3, 96, 96), tmp_path) <= 1e-4  # 6 x 6: the positions are interpolated in the graph
