"""What is computed in training equals the plain form: of the encoder, the decoder and the step, as `benchmarks/reference_step.py` writes them."""
from __future__ import annotations

import importlib
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from edgekd.data.scenes import Scenes
from edgekd.distillation.batches import Batches, Source
from edgekd.distillation.cache import build_cache
from edgekd.distillation.trainer import StageTrainer
from edgekd.models import blocks, sam
from edgekd.models.repvit import RepViT, RepViTConfig
from edgekd.models.sam import DecoderShape, Sam
from edgekd.protocols import Preprocess
from edgekd.recipe import Stage

SMALL = RepViTConfig((8, 16, 24, 32), (1, 2, 3, 1), joint_norm=False, upsample="bicubic")
SHAPE = DecoderShape(embed_dim=32, heads=2, mlp_dim=32)
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def reference() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("reference_step")
    sys.path.remove(str(BENCHMARKS))


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def alike(ours: dict[str, Tensor], theirs: dict[str, Tensor], most: float = 1e-3) -> bool:
    """Within float rounding; gradients that are zero but for it are not compared."""
    scale = max(float(t.abs().max()) for t in theirs.values())
    return ours.keys() == theirs.keys() and all(float((ours[k] - t).abs().max()) <= most * float(t.abs().max()) + 1e-6 * scale for k, t in theirs.items())


def test_encoder__output_gradients_and_statistics_of_the_plain_form(reference: ModuleType) -> None:
    torch.manual_seed(0)
    ours, plain = RepViT(SMALL, 32).train(), reference.Encoder(SMALL, 32).train()
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(torch.randn_like(p) * 0.05)  # the residual branches start at 0
    plain.load_state_dict(ours.state_dict())
    images, weight = torch.randn(3, 3, 64, 64), torch.randn(3, 32, 4, 4)
    found = ours(images.contiguous(memory_format=torch.channels_last))
    wanted = plain(images)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    (found * weight).sum().backward()
    (wanted * weight).sum().backward()
    assert alike(gradients(ours), gradients(plain))
    state = plain.state_dict()
    assert all(torch.allclose(v.float(), state[k].float(), atol=1e-5, rtol=1e-4) for k, v in ours.state_dict().items())


def test_encoder__bf16_stays_near_fp32() -> None:
    torch.manual_seed(0)
    encoder = RepViT(SMALL, 32).train()
    images = torch.randn(3, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    wanted = encoder(images).detach()
    with torch.autocast("cpu", torch.bfloat16):
        found = encoder(images).detach().float()
    assert (found - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu__is_torchs_in_every_layout(layout: torch.memory_format, approximate: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 16, 6, 5).contiguous(memory_format=layout)
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours, theirs = blocks.GELU(approximate)(one), nn.GELU(approximate)(two)
    assert ours.stride() == theirs.stride()
    torch.testing.assert_close(ours, theirs, atol=5e-6, rtol=1e-5)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    torch.testing.assert_close(one.grad, two.grad, atol=5e-5, rtol=1e-4)


def test_squeeze_excite__the_gradient_has_channels_last_too() -> None:
    torch.manual_seed(0)
    gate = blocks.SqueezeExcite(16)
    x = torch.randn(2, 16, 6, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = gate(x)
    plain = x * gate.fc2(torch.relu(gate.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()
    torch.testing.assert_close(y, plain)
    ours, theirs = torch.autograd.grad(y.square().sum(), x)[0], torch.autograd.grad(plain.square().sum(), x)[0]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert ours.is_contiguous(memory_format=torch.channels_last)


# --- the decoder ---------------------------------------------------------------------------------------------------------


def answers(model: Sam, images: int, prompts: int, size: int, masks: bool) -> dict[str, Tensor]:
    """Masks, IoU and every gradient of one decode."""
    make = torch.Generator().manual_seed(3)
    embedding = torch.randn(images, 32, size // 16, size // 16, generator=make).requires_grad_()
    points, labels = torch.rand(prompts, 3, 2, generator=make) * size, torch.tensor([[1.0, 0.0, -2.0], [2.0, 3.0, 1.0]])[torch.arange(prompts) % 2]
    given = (torch.randn(prompts, 1, size // 4, size // 4, generator=make), (torch.arange(prompts) % 2).float()) if masks else ()
    model.zero_grad()
    with torch.no_grad():
        frozen, _ = model.decode(embedding, points, labels, *given)
    found, iou = model.decode(embedding, points, labels, *given)
    (found.square().mean() + iou.mean()).backward()
    assert embedding.grad is not None
    torch.testing.assert_close(frozen, found.detach(), atol=1e-4, rtol=1e-4)
    return {"masks": found.detach(), "iou": iou.detach(), "embedding": embedding.grad} | gradients(model)


@pytest.mark.parametrize("masks", [False, True], ids=["no masks", "mask prompts"])
@pytest.mark.parametrize(("images", "prompts", "size"), [(1, 5, 128), (2, 6, 128), (3, 3, 128), (2, 6, 32)])
@pytest.mark.parametrize("kind", [{}, {"padded_points": 6, "gelu": True, "summed_tokens": True, "group_norm": True}], ids=["sam", "efficient_sam"])
def test_decode__in_steps_equals_the_graph_that_is_exported(monkeypatch: pytest.MonkeyPatch, kind: dict, images: int, prompts: int, size: int, masks: bool) -> None:
    torch.manual_seed(0)
    model = Sam("tiny", nn.Identity(), DecoderShape(embed_dim=32, heads=2, mlp_dim=32, **kind), Preprocess(size))
    ours = answers(model, images, prompts, size, masks)
    monkeypatch.setattr(sam, "in_graph", lambda: True)
    assert alike(ours, answers(model, images, prompts, size, masks))


@pytest.mark.parametrize("as_box", [False, True], ids=["click", "box"])
def test_decode__equals_the_reference_with_an_image_for_every_prompt(reference: ModuleType, as_box: bool) -> None:
    torch.manual_seed(0)
    model = Sam("tiny", nn.Identity(), SHAPE, Preprocess(128))
    plain = reference.Decoder(SHAPE)
    plain.load_state_dict(model.mask_decoder.state_dict())
    embedding = torch.randn(2, 32, 8, 8)
    more, labels = torch.rand(6, 1, 2) * 128, torch.tensor([[1.0], [0.0]]).repeat(3, 1)
    first = torch.rand(6, 2, 2) * 128 if as_box else torch.rand(6, 1, 2) * 128
    kinds = torch.tensor([[2.0, 3.0]] if as_box else [[1.0]]).expand(6, -1)
    found, iou = model.decode(embedding, torch.cat([first, more], 1), torch.cat([kinds, labels], 1))
    prompts = (more, labels, first.flatten(1)) if as_box else (torch.cat([first, more], 1), torch.cat([kinds, labels], 1), None)
    wanted, quality = plain.predict(embedding, model.prompt_encoder, reference.embed_prompts(model.prompt_encoder, prompts), [3, 3], 4)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(iou, quality, atol=1e-4, rtol=1e-3)


def test_graph__is_told_from_computing() -> None:
    seen: list[bool] = []

    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(blocks.in_graph())
            return x + 1

    Asks()(torch.zeros(1))
    torch.export.export(Asks(), (torch.zeros(1),))
    torch.jit.trace(Asks(), torch.zeros(1), check_trace=False)
    assert seen[0] is False and seen[1:] and all(seen[1:])


# --- small sets ----------------------------------------------------------------------------------------------------------


def test_defaults__do_not_diverge_on_eight_photos(tmp_path: Path) -> None:
    """EdgeSAM's second phase does on a user's small set (chongzhou96/EdgeSAM#55): the defaults of a stage must not, at two photos a step."""
    torch.manual_seed(0)
    teacher = Sam("t", nn.Conv2d(3, 32, 16, 16), SHAPE, Preprocess(64)).eval().requires_grad_(False)
    student = Sam("s", RepViT(SMALL, 32), SHAPE, Preprocess(64))
    student.prompt_encoder.load_state_dict(teacher.prompt_encoder.state_dict())
    scenes = Scenes(seed=4, count=8, size=64)
    source = Source(scenes, build_cache(teacher, scenes, tmp_path / "cache"))
    stage = Stage.model_validate({"name": "s", "objectives": [{"name": "prompt_masks"}], "trainable": ["encoder", "decoder"], "steps": 120, "batch_size": 2,
                                  "instances": 4})
    result = StageTrainer(student, teacher, stage, Batches([source], student.preprocess, 2, 0), tmp_path / "s.pt").run()
    losses = [row["loss"] for row in result.curve]
    assert result.bad_steps == 0 and len(losses) == 120
    assert statistics.mean(losses[-20:]) < 0.8 * statistics.mean(losses[:20]) and max(losses[-60:]) < 1.5 * max(losses[:20])
