"""SAM on our network equals transformers' SamModel on the same weights, read from either layout; other image sizes are interpolated."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from edgekd import converting, zoo
from edgekd.errors import UsageError
from edgekd.models.sam import Sam
from edgekd.models.sam_vit import VitShape, resize_positions
from edgekd.zoo import loading

SHRUNKEN_H = {"hidden_size": 80, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 256, "window_size": 14, "global_attn_indexes": [1, 3], "mlp_dim": 320}
"""ViT-H with a sixteenth of its width and an eighth of its depth: windows of 14 that need padding, global blocks, heads of 40 channels."""


def library(vision: dict[str, Any] | None = None) -> Any:
    """A seeded SamModel with weights of a size that matters (its own start is near zero)."""
    from transformers import SamConfig, SamModel

    size = (vision or {}).get("image_size", 1024)
    model = SamModel(SamConfig(vision_config=vision or {}, prompt_encoder_config={"image_size": size}, mask_decoder_config={})).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.05 if p.ndim > 1 else 0.2) + (1.0 if p.ndim == 1 and p.mean() > 0.5 else 0.0))
        gaussian = torch.randn(2, 128, generator=generator)
        model.shared_image_embedding.positional_embedding.copy_(gaussian)
        model.prompt_encoder.shared_embedding.positional_embedding.copy_(gaussian)
    return model


def equal(theirs: Any, ours: Sam, size: int) -> None:
    """Encoder to 1e-5 relative, masks and IoU to 1e-4, on four kinds of prompts."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(1, 3, size, size, generator=generator)
    with torch.no_grad():
        wanted, embedding = theirs.get_image_embeddings(image), ours.embed(image)
    assert (wanted - embedding).norm() / wanted.norm() <= 1e-5 and wanted.std() > 0.1
    points = torch.rand(3, 2, 2, generator=generator) * size
    labels = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    box = torch.tensor([[0.1, 0.2, 0.6, 0.9], [0.0, 0.0, 1.0, 1.0], [0.4, 0.3, 0.5, 0.8]]) * size
    corners, corner_labels = box.view(3, 2, 2), torch.tensor([[2.0, 3.0]]).expand(3, 2)
    prior = torch.randn(1, 1, size // 4, size // 4, generator=generator)
    click = {"input_points": points[None], "input_labels": labels[None]}
    kinds: dict[str, tuple[dict[str, Tensor], tuple[Tensor, ...]]] = {
        "points": (click, (points, labels)), "boxes": ({"input_boxes": box[None]}, (corners, corner_labels)),
        "both": ({**click, "input_boxes": box[None]}, (torch.cat([points, corners], 1), torch.cat([labels, corner_labels], 1))),
        "mask": ({"input_points": points[None, :1], "input_labels": labels[None, :1], "input_masks": prior}, (points[:1], labels[:1], prior, torch.ones(1))),
    }
    for kind, (given, mine) in kinds.items():
        with torch.no_grad():
            reference, (masks, iou) = theirs(image_embeddings=wanted, multimask_output=True, **given), ours.decode(wanted, *mine)
        assert (reference.pred_masks[0] - masks[:, 1:]).abs().max() <= 1e-4, kind
        assert (reference.iou_scores[0] - iou[:, 1:]).abs().max() <= 1e-4, kind
        assert masks.std() > 1e-2, "near-constant masks would pass anything"


@pytest.fixture(scope="module")
def shrunken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("shrunken") / "vit-h-small"
    model = library(SHRUNKEN_H)
    model.save_pretrained(folder)
    return model, folder


def test_shrunken_vit_h__equals_the_library_from_its_folder_and_from_metas_layout(shrunken: tuple[Any, Path], tmp_path: Path) -> None:
    theirs, folder = shrunken
    equal(theirs, loading.load(folder), 256)
    converting.convert(folder, to="meta", output=tmp_path / "meta.pth")
    equal(theirs, loading.load(tmp_path / "meta.pth"), 256)


def test_hf_folder_that_we_wrote__loads_in_the_library_and_is_the_same(shrunken: tuple[Any, Path], tmp_path: Path) -> None:
    from transformers import SamModel

    theirs, folder = shrunken
    converting.convert(folder, to="meta", output=tmp_path / "meta.safetensors")
    done = converting.convert(tmp_path / "meta.safetensors", to="hf", output=tmp_path / "again")
    again = SamModel.from_pretrained(tmp_path / "again").eval()
    before, after = theirs.state_dict(), again.state_dict()
    assert done["tensors"] == len(before) and set(before) == set(after) and all(torch.equal(before[k], after[k]) for k in before)
    assert again.config.vision_config.global_attn_indexes == [1, 3] and again.config.vision_config.mlp_dim == 320


@pytest.mark.slow
def test_vit_b__equals_the_library_at_full_size(tmp_path: Path) -> None:
    theirs = library()
    theirs.save_pretrained(tmp_path / "b")
    ours = loading.load(tmp_path / "b", expect="sam_vit_b")
    assert ours.name == "sam_vit_b"
    equal(theirs, ours, 1024)


def test_vit_b__decoder_equals_the_library() -> None:
    """ViT-B's own decoder and neck width at its own mask size, behind an encoder of one block: the part of it that is quick."""
    theirs = library({"hidden_size": 768, "num_hidden_layers": 1, "num_attention_heads": 12, "image_size": 128, "window_size": 14, "global_attn_indexes": [], "mlp_dim": 3072})
    from edgekd.teachers import huggingface

    equal(theirs, huggingface.convert(theirs, "b"), 128)


def test_load__half_precision_becomes_float32(shrunken: tuple[Any, Path], tmp_path: Path) -> None:
    converting.convert(shrunken[1], to="meta", output=tmp_path / "meta.pth")
    half = {k: v.half() for k, v in torch.load(tmp_path / "meta.pth", weights_only=True).items()}
    torch.save(half, tmp_path / "half.pth")
    model = loading.load(tmp_path / "half.pth")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.encoder.pos_embed, half["image_encoder.pos_embed"].float())


def test_load__does_not_depend_on_the_file_afterwards(shrunken: tuple[Any, Path], tmp_path: Path) -> None:
    path = tmp_path / "meta.pth"
    converting.convert(shrunken[1], to="meta", output=path)
    model = loading.load(path)
    before = model.encoder.pos_embed.detach().clone()
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(model.encoder.pos_embed, before)


# --- other image sizes --------------------------------------------------------------------------------------------------


def test_image_size__positions_are_interpolated_and_nothing_else(shrunken: tuple[Any, Path]) -> None:
    model, smaller = loading.load(shrunken[1]), loading.load(shrunken[1], image_size=128)
    assert smaller.preprocess.image_size == 128
    old, new = model.state_dict(), smaller.state_dict()
    changed = {k for k in old if old[k].shape != new[k].shape or not torch.equal(old[k], new[k])}
    assert changed == {"encoder.pos_embed", *(f"encoder.blocks.{i}.attn.rel_pos_{axis}" for i in (1, 3) for axis in "hw")}
    with torch.no_grad():
        embedding = smaller.embed(torch.randn(1, 3, 128, 128))
        masks, _ = smaller.decode(embedding, torch.tensor([[[30.0, 40.0]]]), torch.ones(1, 1))
    assert embedding.shape == (1, 256, 8, 8) and masks.shape == (1, 4, 32, 32) and masks.isfinite().all()


def test_resize_positions__keeps_a_gradient_a_gradient() -> None:
    old = VitShape(256, 4, 2, 1, 14, (1,), 4)
    ramp = torch.linspace(0, 1, 16).view(1, 16, 1, 1).expand(1, 16, 16, 4).contiguous()
    rows = torch.linspace(-1, 1, 31).view(31, 1).expand(31, 4).contiguous()
    state = {"pos_embed": ramp, **{f"blocks.{i}.attn.rel_pos_{a}": rows for i in range(2) for a in "hw"}}
    out = resize_positions(state, old, VitShape(512, 4, 2, 1, 14, (1,), 4))
    assert set(out) == {"pos_embed", "blocks.1.attn.rel_pos_h", "blocks.1.attn.rel_pos_w"}
    assert out["pos_embed"].shape == (1, 32, 32, 4) and out["blocks.1.attn.rel_pos_h"].shape == (63, 4)
    middle = out["pos_embed"][0, 4:-4, 0, 0]
    assert torch.allclose(middle, torch.tensor([((i + 0.5) / 2 - 0.5) / 15 for i in range(4, 28)]), atol=5e-3)
    assert (out["blocks.1.attn.rel_pos_h"][31] - 0).abs().max() < 1e-6, "distance zero stays in the middle"


def test_image_size__that_cannot_be(shrunken: tuple[Any, Path]) -> None:
    with pytest.raises(UsageError, match="multiple of 16"):
        loading.load(shrunken[1], image_size=100)


def test_config__heads_come_from_the_folder(shrunken: tuple[Any, Path]) -> None:
    assert loading.load(shrunken[1]).shape == zoo.DecoderShape()
