"""Teachers by name: the shipped one works, SAM's say where their weights are, Hugging Face folders load."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_sam import reference

from edgekd import teachers
from edgekd.errors import EdgekdError, UsageError
from edgekd.models.efficientnet_lite import TAPS, EfficientNetLite0, SameConv, read_pretrained
from edgekd.teachers import huggingface


def test_sam_nano__is_frozen_and_keeps_the_contract() -> None:
    model = teachers.load("sam_nano")
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        embedding = model.embed(torch.zeros(1, 3, 256, 256))
        masks, iou = model.decode(embedding, torch.tensor([[[100.0, 100.0]]]), torch.ones(1, 1))
    assert embedding.shape == (1, 128, 16, 16) and masks.shape == (1, 4, 64, 64) and iou.shape == (1, 4)
    assert next(model.parameters()).dtype == torch.float32, "shipped in half precision, used in full"


def test_sam_nano__weights_are_small_enough_for_the_wheel() -> None:
    path = teachers.shipped("sam_nano")
    assert path is not None and path.stat().st_size <= 25_000_000


@pytest.mark.parametrize("name", sorted(teachers.HUB))
def test_load__sam_without_weights_names_the_hub_id_and_the_dry_run(name: str) -> None:
    with pytest.raises(UsageError) as e:
        teachers.load(name, offline=True)
    assert teachers.HUB[name][0] in str(e.value) and "--dry-run" in str(e.value)


def test_load__unknown_name() -> None:
    with pytest.raises(UsageError, match="did you mean 'sam_nano'"):
        teachers.load("sam_nanoo")


def test_load__folder_of_hugging_face_files(tmp_path: Path) -> None:
    library = reference(5)
    library.save_pretrained(tmp_path / "tiny-sam")
    ours = teachers.load(str(tmp_path / "tiny-sam"), offline=True)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(ours.embed(images), library.get_image_embeddings(images), atol=1e-6)
    assert ours.preprocess.image_size == 64 and ours.embed_dim == 32


def test_load__folder_of_another_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(EdgekdError):
        teachers.load(str(tmp_path), offline=True)


def test_convert__a_key_too_many_is_named() -> None:
    library = reference(6)
    library.mask_decoder.register_parameter("surprise", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(EdgekdError, match=r"unknown mask_decoder\.surprise"):
        huggingface.convert(library, "odd")


def test_convert__a_shape_that_does_not_fit_is_named() -> None:
    library = reference(7)
    library.mask_decoder.iou_token = torch.nn.Embedding(1, 16)
    with pytest.raises(EdgekdError, match=r"mask_decoder\.iou_token\.weight is"):
        huggingface.convert(library, "odd")


def test_same_conv__pads_as_tensorflow_does() -> None:
    """At stride 2 and kernel 3 on an even side, SAME puts the one padding pixel at the right and bottom."""
    conv = SameConv(1, 1, 3, 2, bias=False)
    conv.weight.data.zero_()
    conv.weight.data[0, 0, 0, 0] = 1  # the window's top-left tap shows where windows start
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert conv(x).flatten().tolist() == [0, 2, 8, 10]


def test_trunk__strides_and_channels() -> None:
    with torch.no_grad():
        maps = EfficientNetLite0().eval()(torch.zeros(1, 3, 64, 64))
    assert {s: tuple(m.shape[1:]) for s, m in maps.items()} == {s: (c, 64 // s, 64 // s) for s, c in TAPS.items()}


def test_read_pretrained__folds_batch_norm_exactly() -> None:
    torch.manual_seed(0)
    trunk, state = EfficientNetLite0(), {}

    def norm(name: str, channels: int) -> None:
        state.update({f"{name}.weight": torch.rand(channels) + 0.5, f"{name}.bias": torch.randn(channels), f"{name}.running_mean": torch.randn(channels),
                      f"{name}.running_var": torch.rand(channels) + 0.5})

    state["_conv_stem.weight"] = torch.randn_like(trunk.stem.weight)
    norm("_bn0", 32)
    for i, block in enumerate(trunk.blocks):
        for part, conv, bn in (("expand", "_expand_conv", "_bn0"), ("depthwise", "_depthwise_conv", "_bn1"), ("project", "_project_conv", "_bn2")):
            layer = getattr(block, part)
            if layer is not None:
                state[f"_blocks.{i}.{conv}.weight"] = torch.randn_like(layer.weight) * 0.1
                norm(f"_blocks.{i}.{bn}", layer.out_channels)
    read_pretrained(trunk, state)
    x = torch.randn(1, 3, 32, 32)
    plain = SameConv(3, 32, 3, 2, bias=False)
    plain.weight.data = state["_conv_stem.weight"]
    expected = torch.nn.functional.batch_norm(plain(x), state["_bn0.running_mean"], state["_bn0.running_var"], state["_bn0.weight"], state["_bn0.bias"], eps=1e-3)
    assert torch.allclose(trunk.stem(x), expected, atol=1e-4)


def test_read_pretrained__another_network() -> None:
    with pytest.raises(KeyError):
        read_pretrained(EfficientNetLite0(), {})
