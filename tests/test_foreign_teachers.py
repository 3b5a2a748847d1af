"""SAM 2, SAM 3, SAM-HQ and EdgeTAM behind our contract: the library's own answers, for every kind of prompt, in one call."""
from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from edgekd.errors import EdgekdError, UsageError
from edgekd.protocols import Promptable
from edgekd.students.backbones import INSTALL, mend_torchvision
from edgekd.teachers import foreign

E = 32
HEAD = {"hidden_size": E, "mlp_dim": 48, "num_attention_heads": 2, "iou_head_hidden_dim": 32}
NEEDS_TIMM = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason=f"timm is not installed: {INSTALL}")


def sam2() -> Any:
    from transformers import Sam2Config, Sam2Model

    backbone = {"model_type": "sam2_hiera_det_model", "hidden_size": 8, "num_attention_heads": 1, "image_size": [64, 64], "blocks_per_stage": [1, 1, 2, 1],
                "embed_dim_per_stage": [8, 16, 32, 64], "num_attention_heads_per_stage": [1, 2, 2, 4], "window_size_per_stage": [4, 4, 4, 2],
                "global_attention_blocks": [3], "window_positional_embedding_background_size": [4, 4]}
    vision = {"backbone_config": backbone, "backbone_channel_list": [64, 32, 16, 8], "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]], "fpn_hidden_size": E}
    return Sam2Model(Sam2Config(vision_config=vision, prompt_encoder_config={"hidden_size": E, "image_size": 64, "mask_input_channels": 8}, mask_decoder_config=HEAD))


def sam3() -> Any:
    from transformers import Sam3TrackerConfig, Sam3TrackerModel

    backbone = {"model_type": "sam3_vit_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56,
                "pretrain_image_size": 28, "patch_size": 14, "window_size": 2, "global_attn_indexes": [1]}
    vision = {"model_type": "sam3_vision_model", "backbone_config": backbone, "fpn_hidden_size": E, "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]}
    prompt = {"hidden_size": E, "image_size": 56, "patch_size": 14, "mask_input_channels": 8}
    return Sam3TrackerModel(Sam3TrackerConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=HEAD))


def sam_hq() -> Any:
    from transformers import SamHQConfig, SamHQModel

    vision = {"hidden_size": 24, "output_channels": E, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "window_size": 3,
              "global_attn_indexes": [1], "mlp_dim": 48, "num_pos_feats": E // 2}
    prompt = {"hidden_size": E, "image_size": 64, "mask_input_channels": 8}
    return SamHQModel(SamHQConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=HEAD | {"vit_dim": 24}))


def edgetam() -> Any:
    from transformers import EdgeTamConfig, EdgeTamModel

    backbone = {"model_type": "timm_wrapper", "architecture": "repvit_m0_9", "num_classes": 2, "label_names": ["a", "b"],
                "model_args": {"in_chans": 3, "features_only": True, "out_indices": [0, 1, 2, 3]}}
    vision = {"backbone_config": backbone, "backbone_channel_list": [384, 192, 96, 48], "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
              "fpn_hidden_size": E}
    return EdgeTamModel(EdgeTamConfig(vision_config=vision, prompt_encoder_config={"hidden_size": E, "image_size": 64, "mask_input_channels": 8},
                                      mask_decoder_config=HEAD))


MAKE = {"sam2": sam2, "sam3_tracker": sam3, "sam_hq": sam_hq, "edgetam": edgetam}


@pytest.fixture(scope="module", params=["sam2", "sam3_tracker", "sam_hq", pytest.param("edgetam", marks=NEEDS_TIMM)])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, foreign.Foreign, Path]:
    """The library's model with weights that matter, ours loaded from the files it saved, and their folder."""
    mend_torchvision()
    folder = tmp_path_factory.mktemp(request.param) / "tiny"
    torch.manual_seed(0)
    model = MAKE[request.param]().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" not in name and "backbone" not in name:
                p.normal_(0, 0.15)
    model.save_pretrained(folder)
    return model, foreign.load(folder, offline=True), folder


def images(ours: foreign.Foreign, count: int = 1) -> torch.Tensor:
    side = ours.preprocess.image_size
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(3))


def library(model: Any, pixels: torch.Tensor, **prompts: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The library's own forward on one image: its one mask, then its three."""
    with torch.no_grad():
        out = [model(pixel_values=pixels, multimask_output=several, **prompts) for several in (False, True)]
    return torch.cat([o.pred_masks[0] for o in out], 1), torch.cat([o.iou_scores[0] for o in out], 1)


POINTS = torch.tensor([[[10.0, 20.0], [40.0, 33.0]], [[5.0, 60.0], [22.0, 8.0]], [[50.0, 51.0], [1.0, 2.0]]])
SIGNS = torch.tensor([[1, 0], [1, 1], [0, 1]])
BOX = torch.tensor([[3.0, 4.0, 50.0, 60.0], [8.0, 2.0, 30.0, 31.0], [0.0, 0.0, 63.0, 63.0]])


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    assert a.shape == b.shape
    return bool((a - b).abs().max() <= 1e-4)


def test_load__keeps_the_contract(pair: tuple[Any, foreign.Foreign, Path]) -> None:
    _, ours, _ = pair
    assert isinstance(ours, Promptable) and ours.name == "tiny" and ours.embed_dim == ours.shape.embed_dim == E
    assert not ours.training and not ours.train().training and not any(p.requires_grad for p in ours.parameters())
    embedding = ours.embed(images(ours, 2))
    side = ours.preprocess.side
    assert embedding.shape[0] == 2 and embedding.shape[1] > E and embedding.shape[2:] == (side // 16, side // 16)
    masks, iou = ours.decode(embedding, POINTS[:2], SIGNS[:2].float())
    assert masks.shape == (2, 4, side // 4, side // 4) and iou.shape == (2, 4) and not masks.requires_grad


@pytest.mark.parametrize("kind", ["points", "box", "point_and_box"])
def test_decode__equals_the_library(pair: tuple[Any, foreign.Foreign, Path], kind: str) -> None:
    model, ours, _ = pair
    pixels, scale = images(ours), ours.preprocess.image_size / ours.preprocess.side
    given: dict[str, Any] = {}
    if kind != "box":
        given |= {"input_points": POINTS[None] * scale, "input_labels": SIGNS[None]}
    if kind != "points":
        given |= {"input_boxes": BOX[None] * scale}
    corners, corner_labels = BOX.view(3, 2, 2), torch.tensor([[2, 3]] * 3)
    points, labels = {"points": (POINTS, SIGNS), "box": (corners, corner_labels),
                      "point_and_box": (torch.cat([POINTS, corners], 1), torch.cat([SIGNS, corner_labels], 1))}[kind]
    theirs, quality = library(model, pixels, **given)
    masks, iou = ours.decode(ours.embed(pixels), points, labels.float())
    assert close(theirs, masks) and close(quality, iou)
    assert masks.std() > 1e-2, "near-constant outputs would pass anything"


def test_decode__mask_prompt_equals_the_library(pair: tuple[Any, foreign.Foreign, Path]) -> None:
    model, ours, _ = pair
    pixels, scale, side = images(ours), ours.preprocess.image_size / ours.preprocess.side, ours.preprocess.side // 4
    prior = torch.randn(1, 1, side, side) * 4
    theirs, quality = library(model, pixels, input_points=POINTS[None, :1] * scale, input_labels=SIGNS[None, :1], input_masks=prior)
    without, _ = library(model, pixels, input_points=POINTS[None, :1] * scale, input_labels=SIGNS[None, :1])
    masks, iou = ours.decode(ours.embed(pixels), POINTS[[0, 0]], SIGNS[[0, 0]].float(), prior.expand(2, -1, -1, -1), torch.tensor([1.0, 0.0]))
    assert close(theirs, masks[:1]) and close(quality, iou[:1]) and close(without, masks[1:])
    assert not torch.allclose(masks[0], masks[1], atol=1e-3)


def test_decode__prompts_of_every_length_share_a_call(pair: tuple[Any, foreign.Foreign, Path]) -> None:
    _, ours, _ = pair
    embedding = ours.embed(images(ours))
    points = torch.tensor([[[9.0, 9.0], [30.0, 40.0], [5.0, 6.0]], [[3.0, 4.0], [50.0, 60.0], [20.0, 20.0]], [[33.0, 1.0], [0.0, 0.0], [0.0, 0.0]]])
    labels = torch.tensor([[1.0, 0.0, 1.0], [2.0, 3.0, -2.0], [-2.0, -2.0, 1.0]])
    masks, iou = ours.decode(embedding, points, labels)
    alone = [ours.decode(embedding, points[:1], labels[:1]), ours.decode(embedding, points[1:2, :2], labels[1:2, :2]),
             ours.decode(embedding, points[2:, 2:], labels[2:, 2:])]
    assert close(masks, torch.cat([m for m, _ in alone])) and close(iou, torch.cat([i for _, i in alone]))
    nothing, _ = ours.decode(embedding, points[:1, :1], torch.tensor([[-2.0]]))
    assert nothing.isfinite().all()


def test_decode__several_images_equal_one_by_one(pair: tuple[Any, foreign.Foreign, Path]) -> None:
    _, ours, _ = pair
    embedding, labels = ours.embed(images(ours, 2)), torch.ones(4, 1)
    points = torch.tensor([[[9.0, 9.0]], [[30.0, 40.0]], [[5.0, 50.0]], [[60.0, 6.0]]])
    masks, _ = ours.decode(embedding, points, labels)
    for i in range(2):
        assert close(masks[2 * i : 2 * i + 2], ours.decode(embedding[i : i + 1], points[2 * i : 2 * i + 2], labels[:2])[0])


def test_decode__half_a_box_is_refused(pair: tuple[Any, foreign.Foreign, Path]) -> None:
    _, ours, _ = pair
    with pytest.raises(EdgekdError, match="1 corners"):
        ours.decode(ours.embed(images(ours)), torch.zeros(1, 1, 2), torch.tensor([[2.0]]))


def test_load__missing_weights_are_named(pair: tuple[Any, foreign.Foreign, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    _, _, folder = pair
    tensors = load_file(folder / "model.safetensors")
    del tensors[next(k for k in tensors if k.endswith("mask_decoder.iou_token.weight"))]  # SAM 3's files put a prefix before it
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(EdgekdError, match=r"missing mask_decoder\.iou_token\.weight"):
        foreign.load(tmp_path, offline=True)


def test_load__unknown_weights_are_named(pair: tuple[Any, foreign.Foreign, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    _, _, folder = pair
    save_file(load_file(folder / "model.safetensors") | {"mask_decoder.stray": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(EdgekdError, match=r"unknown mask_decoder\.stray"):
        foreign.load(tmp_path, offline=True)


@pytest.mark.parametrize("kind,fit,mean", [("sam2", "stretch", 123.675), ("sam3_tracker", "stretch", 127.5), ("sam_hq", "pad", 123.675), ("edgetam", "stretch", 123.675)])
def test_kinds__photos_are_seen_as_the_published_processors_show_them(kind: str, fit: str, mean: float) -> None:
    assert (foreign.KINDS[kind].fit, foreign.KINDS[kind].mean[0]) == (fit, mean)


@pytest.mark.parametrize("pair", ["sam2", pytest.param("edgetam", marks=NEEDS_TIMM)], indirect=True)  # the others are published otherwise
def test_load__a_video_config_gives_its_image_model(pair: tuple[Any, foreign.Foreign, Path], tmp_path: Path) -> None:
    _, ours, folder = pair
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": f"{config['model_type']}_video"}))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    again = foreign.load(tmp_path, offline=True)
    assert torch.equal(again.embed(images(ours)), ours.embed(images(ours)))


def test_load__other_models_are_refused_with_what_is_supported(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(UsageError, match="'clip' cannot be a teacher") as caught:
        foreign.load(tmp_path, offline=True)
    assert "sam2" in str(caught.value) and "edgetam" in str(caught.value) and set(foreign.MODEL_TYPES) == set(foreign.KINDS)


def test_load__nothing_there(tmp_path: Path) -> None:
    with pytest.raises(EdgekdError, match="no model can be read"):
        foreign.load(tmp_path / "absent", offline=True)


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
def test_load__edgetam_without_timm_names_the_command(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "edgetam"}')
    with pytest.raises(UsageError) as caught:
        foreign.load(tmp_path, offline=True)
    assert INSTALL in str(caught.value)
