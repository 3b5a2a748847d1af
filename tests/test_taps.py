"""Named taps on every kind of network here and on one of a library: shapes, gradients, the same outputs, and names that do not exist."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd import students, teachers
from edgekd.distillation.taps import Taps, as_map, attend, discover, of_photos, outputs, resolve
from edgekd.errors import EdgekdError, UsageError
from edgekd.models.sam_vit import SamVit, VitShape
from edgekd.protocols import Preprocess

SIDE = 64


def student(name: str, size: int = SIDE) -> nn.Module:
    torch.manual_seed(0)
    return students.build(f"{name}:width=0.25,depth=0.25", image_size=size, embed_dim=32).eval()


class Wrapped(nn.Module):
    """An encoder behind the little that taps ask of a model."""

    def __init__(self, encoder: nn.Module, size: int = SIDE) -> None:
        super().__init__()
        self.name, self.preprocess, self.encoder = "wrapped", Preprocess(size), encoder

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        out = self.encoder(images)
        return {"embedding": out if isinstance(out, Tensor) else as_map(out.last_hidden_state)}


def sam_vit() -> Wrapped:
    torch.manual_seed(0)
    return Wrapped(SamVit(VitShape(SIDE, dim=16, depth=3, heads=2, window=2, global_blocks=(1,), out=8))).eval()


def hugging_face(implementation: str) -> Wrapped:
    transformers = pytest.importorskip("transformers", reason="pip install edgekd[teachers]")
    torch.manual_seed(0)
    config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=SIDE, patch_size=16,
                                    attn_implementation=implementation)
    return Wrapped(transformers.ViTModel(config, add_pooling_layer=False)).eval()


STAGES = {
    "repvit_xs": [(8, 16), (16, 8), (24, 4), (48, 2)], "tinyvit_xs": [(8, 16), (32, 8), (32, 4)], "mobile_sam": [(16, 16), (32, 8), (96, 4)],
    "nanosam": [(16, 16), (32, 8), (64, 4), (128, 2)], "efficient_sam_ti": [(64, 4)], "efficientvit_sam_l0": [(8, 32), (16, 16), (32, 8), (64, 4), (128, 2)],
    "efficientvit_sam_xl0": [(8, 32), (16, 16), (32, 8), (64, 4), (128, 2), (256, 1)],
}


@pytest.mark.parametrize("name", STAGES)
def test_stages__are_the_last_map_of_every_resolution(name: str) -> None:
    model, images = student(name), torch.randn(2, 3, SIDE, SIDE)
    found = discover(model, images[:1])
    seen = Taps(model, found).run(images)
    stages = [seen[n] for n in found if n.startswith("stage")]
    sides = [m.shape[-1] for m in stages]
    assert sides == sorted(set(sides), reverse=True) and all(m.shape[0] == 2 and m.shape[2] == m.shape[3] for m in stages)
    assert [(m.shape[1], m.shape[-1]) for m in stages] == STAGES[name]
    blocks = [n for n in found if n.startswith("block")]
    assert blocks == [f"block{i}" for i in range(len(blocks))] and {found[n] for n in found if n.startswith("stage")} <= {found[n] for n in blocks}


@pytest.mark.parametrize(("name", "count"), [("repvit_xs", 0), ("nanosam", 0), ("efficientvit_sam_l0", 0), ("tinyvit_xs", 3), ("efficient_sam_ti", 3)])
def test_attention__is_found_where_there_are_probabilities(name: str, count: int) -> None:
    model, images = student(name), torch.randn(2, 3, SIDE, SIDE)
    found = {k: v for k, v in discover(model, images[:1]).items() if k.startswith("attention")}
    assert list(found) == [f"attention{i}" for i in range(count)], "linear attention and the prompts' decoder are none"
    seen = Taps(model, found).run(images)
    for tap in found:
        assert seen[tap].shape[0] == 2 and seen[tap].shape[2] == seen[tap].shape[3]
        assert torch.allclose(seen[tap].sum(-1), torch.ones(seen[tap].shape[:3]), atol=1e-5)


@pytest.mark.parametrize("make", [lambda: student("efficient_sam_ti"), lambda: student("tinyvit_xs"), sam_vit, lambda: hugging_face("sdpa")],
                         ids=["efficient_sam", "tinyvit", "sam_vit", "hugging_face"])
def test_taps__do_not_change_what_the_model_gives(make: object) -> None:
    model, images = make(), torch.randn(2, 3, SIDE, SIDE)  # type: ignore[operator]
    taps = Taps(model, discover(model, images[:1]))
    assert any(n.startswith("attention") for n in taps.paths)
    with torch.no_grad():
        plain, tapped = outputs(model, images)["embedding"], taps.run(images)["embedding"]
    assert torch.allclose(plain, tapped, atol=1e-5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()), "no hook is left behind"


def test_sam_vit__windows_are_counted_as_heads_and_blocks_are_maps() -> None:
    model, images = sam_vit(), torch.randn(3, 3, SIDE, SIDE)
    found = discover(model, images[:1])
    seen = Taps(model, found).run(images)
    assert [tuple(seen[f"attention{i}"].shape) for i in range(3)] == [(3, 8, 4, 4), (3, 2, 16, 16), (3, 8, 4, 4)]
    assert all(seen[f"block{i}"].shape == (3, 16, 4, 4) for i in range(3)) and list(found).count("stage1") == 1 and "stage2" not in found
    alone = Taps(model, found).run(images[1:2])
    for name in found:
        assert torch.allclose(seen[name][1:2], alone[name], atol=1e-5), f"{name} of a photo does not depend on its batch"


def test_sam_vit__attention_is_what_the_block_computes() -> None:
    model, images = sam_vit(), torch.randn(1, 3, SIDE, SIDE)
    block = model.encoder.blocks[1]  # type: ignore[index,union-attr]
    seen = Taps(model, {"block0": "encoder.blocks.0", "attention1": "encoder.blocks.1.attn"}).run(images)
    tokens = block.norm1(seen["block0"].permute(0, 2, 3, 1)).flatten(1, 2)
    v = block.attn.qkv(tokens).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)[2]
    wanted = block.attn(block.norm1(seen["block0"].permute(0, 2, 3, 1)))
    assert torch.allclose(block.attn.proj((seen["attention1"] @ v).transpose(1, 2).flatten(2)).unflatten(1, (4, 4)), wanted, atol=1e-5)


def test_hugging_face__class_token_and_fused_attention() -> None:
    fused, plain, images = hugging_face("sdpa"), hugging_face("eager"), torch.randn(2, 3, SIDE, SIDE)
    found = discover(fused, images[:1])
    seen = Taps(fused, found).run(images)
    assert seen["block0"].shape == seen["stage1"].shape == (2, 16, 4, 4), "without the class token"
    with torch.no_grad():
        wanted = plain.encoder(images, output_attentions=True, output_hidden_states=True)
    for i in range(2):
        assert torch.allclose(seen[f"attention{i}"], wanted.attentions[i], atol=1e-5) and seen[f"attention{i}"].shape == (2, 2, 17, 17)
    assert torch.allclose(seen["block0"], as_map(wanted.hidden_states[1]), atol=1e-5)


def test_sam_nano__trunk_and_transformer_of_one_resolution_are_one_stage() -> None:
    if not teachers.shipped("sam_nano"):
        pytest.skip("the teacher's weights are not in this checkout")
    teacher = teachers.load("sam_nano")
    images = torch.zeros(1, 3, teacher.preprocess.image_size, teacher.preprocess.image_size)
    found = discover(teacher, images)
    assert [found[n] for n in found if n.startswith("stage")][-2:] == ["encoder.blocks.5", "encoder.patch_embed.trunk.blocks.15"]
    assert [n for n in found if n.startswith("attention")] == [f"attention{i}" for i in range(6)]
    seen = Taps(teacher, {n: found[n] for n in ("stage4", "stage5", "attention2")}).run(images)
    assert seen["stage4"].shape == (1, 256, 16, 16) and seen["stage5"].shape == (1, 320, 8, 8) and seen["attention2"].shape == (1, 8, 256, 256)


# --- gradients ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: student("efficient_sam_ti"), lambda: student("tinyvit_xs"), sam_vit, lambda: hugging_face("sdpa")],
                         ids=["efficient_sam", "tinyvit", "sam_vit", "hugging_face"])
def test_attention__carries_gradients(make: object) -> None:
    model, images = make().train(), torch.randn(2, 3, SIDE, SIDE)  # type: ignore[operator]
    last = [n for n in discover(model, images[:1]) if n.startswith("attention")][-1]
    seen = Taps(model, {last: discover(model, images[:1])[last]}).run(images)[last]
    (seen * torch.randn_like(seen)).sum().backward()
    reached = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert any("qkv" in n or "query" in n or "q_proj" in n for n in reached) and any("patch_embed" in n or "patch_embeddings" in n for n in reached)


@pytest.mark.parametrize("name", ["repvit_xs", "efficientvit_sam_l0", "nanosam"])
def test_stages__carry_gradients(name: str) -> None:
    model, images = student(name).train(), torch.randn(2, 3, SIDE, SIDE)
    found = discover(model.eval(), images[:1])
    seen = Taps(model.train(), {"stage2": found["stage2"]}).run(images)["stage2"]
    seen.square().mean().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


# --- attention in steps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [{}, {"scale": 0.3}, {"is_causal": True}, {"attn_mask": torch.randn(1, 4, 5, 5)}, {"attn_mask": torch.ones(5, 5).tril() > 0},
                                   {"enable_gqa": True}], ids=["plain", "scale", "causal", "bias", "mask", "groups"])
def test_attend__equals_the_fused_kernel(given: dict) -> None:
    g = torch.Generator().manual_seed(0)
    heads = 2 if given.get("enable_gqa") else 4
    q, k, v = torch.randn(3, 4, 5, 8, generator=g), torch.randn(3, heads, 5, 8, generator=g), torch.randn(3, heads, 5, 8, generator=g)
    out, probabilities = attend(q, k, v, **given)
    assert torch.allclose(out, F.scaled_dot_product_attention(q, k, v, **given), atol=1e-5)
    assert probabilities.shape == (3, 4, 5, 5) and torch.allclose(probabilities.sum(-1), torch.ones(3, 4, 5), atol=1e-5)


class Torch(nn.Module):
    """torch's own attention module and encoder layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.name, self.patches = "torch", nn.Conv2d(3, 16, 16, 16)
        self.layers = nn.ModuleList([nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)])

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        return {"embedding": as_map(self.layers[0](self.patches(images).flatten(2).transpose(1, 2)))}


def test_multi_head_attention__of_torch_is_seen() -> None:
    model, images = Torch().eval(), torch.randn(2, 3, SIDE, SIDE)
    found = discover(model, images[:1])
    assert found == {"block0": "layers.0", "stage1": "layers.0", "attention0": "layers.0.self_attn"}
    with torch.no_grad():
        seen, plain = Taps(model, found).run(images), model.outputs(images)["embedding"]
        tokens = model.patches(images).flatten(2).transpose(1, 2)
        wanted = model.layers[0].self_attn(tokens, tokens, tokens, average_attn_weights=False)[1]
    assert torch.allclose(seen["embedding"], plain, atol=1e-5) and torch.allclose(seen["attention0"], wanted, atol=1e-5)


# --- maps and names -------------------------------------------------------------------------------------------------------


def test_as_map__by_layout() -> None:
    assert as_map(torch.zeros(2, 5, 4, 4)).shape == (2, 5, 4, 4)
    assert as_map(torch.zeros(2, 4, 4, 5)).shape == (2, 5, 4, 4), "height and width are alike, channels are not"
    assert as_map(torch.zeros(2, 4, 4, 4), "nhwc").shape == (2, 4, 4, 4)
    tokens = torch.arange(4).float().reshape(1, 4, 1)
    assert as_map(tokens)[0, 0].tolist() == [[0, 1], [2, 3]]
    for before in (1, 2, 5):
        assert torch.equal(as_map(torch.cat([torch.full((1, before, 1), 9.0), torch.arange(16).float().reshape(1, 16, 1)], 1)), torch.arange(16.0).reshape(1, 1, 4, 4))
    assert as_map(torch.zeros(2, 77, 8)).shape == (2, 77, 8) and as_map(torch.zeros(2, 8)).shape == (2, 8), "no picture"


def test_of_photos__windows_become_heads_of_their_photo() -> None:
    windows = torch.arange(2 * 3).float().reshape(6, 1, 1, 1).expand(6, 2, 4, 4)
    assert of_photos(windows, 2)[:, :, 0, 0].tolist() == [[0, 0, 1, 1, 2, 2], [3, 3, 4, 4, 5, 5]]
    assert of_photos(windows, 6) is windows


def test_resolve__names_the_nearest_taps() -> None:
    model = student("repvit_xs")
    known = discover(model, torch.zeros(1, 3, SIDE, SIDE))
    assert resolve(model, known, "embedding", "student", "here") is None and resolve(model, known, "stage2", "student", "here") == "encoder.features.3"
    assert resolve(model, known, "encoder.features.3", "student", "here") == "encoder.features.3", "a module's path"
    with pytest.raises(UsageError, match=r"the student 'repvit_xs.*' has no tap 'stage9'; did you mean 'stage") as caught:
        resolve(model, known, "stage9", "student", "stage encoder")
    said = str(caught.value)
    assert sum(f"'stage{n}'" in said for n in range(1, 5)) >= 3 and "embedding, block0" in said and "stage encoder" in said
    with pytest.raises(UsageError, match="did you mean 'embedding'"):
        resolve(model, {}, "embeding", "teacher", "here")


def test_run__a_tap_that_gives_nothing_is_named() -> None:
    model = student("repvit_xs")
    with pytest.raises(EdgekdError, match="the tap 'attention0' gave nothing"):
        Taps(model, {"attention0": "encoder.features.3"}).run(torch.zeros(1, 3, SIDE, SIDE))
    with pytest.raises(EdgekdError, match="the tap 'mask_decoder' gave nothing"):
        Taps(model, {"mask_decoder": "mask_decoder"}).run(torch.zeros(1, 3, SIDE, SIDE))


def test_taps__leave_nothing_behind_when_the_model_fails() -> None:
    model = sam_vit()
    with pytest.raises(RuntimeError):
        Taps(model, {"attention0": "encoder.blocks.0.attn"}).run(torch.zeros(1, 4, SIDE, SIDE))
    broken = sam_vit()
    broken.encoder.blocks[0].attn.proj = nn.Linear(3, 3)  # type: ignore[index,union-attr]
    with pytest.raises(RuntimeError):
        Taps(broken, {"attention0": "encoder.blocks.0.attn"}).run(torch.zeros(1, 3, SIDE, SIDE))
    assert torch.overrides._get_current_function_mode_stack() == []
