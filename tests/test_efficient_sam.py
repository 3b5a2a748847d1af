"""EfficientSAM: sizes of the published models, numbers of the authors' own code, and what its decoder does differently."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import bf16_steps_learn
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from edgekd import checkpoint, students
from edgekd.models.efficient_sam import CONFIGS, DECODER, EfficientSam, EfficientSamConfig
from edgekd.models.prompt_encoder import PromptEncoder
from edgekd.models.sam import DecoderShape, Sam
from edgekd.protocols import Component, Preprocess

SIZE, E = 96, 32
NEGATIVE = "prompt_encoder.point_embeddings.0.weight"  # the one tensor that their files lack
TINY = replace(DECODER, embed_dim=E, heads=2, mlp_dim=48)
PROMPTS = {
    "points": (torch.tensor([[[10.0, 20.0], [40.0, 33.0]], [[5.0, 90.0], [22.0, 8.0]]]), torch.tensor([[1, 0], [1, 1]])),
    "box": (torch.tensor([[[3.0, 4.0], [50.0, 60.0]]]), torch.tensor([[2, 3]])),
    "box_and_points": (torch.tensor([[[3.0, 4.0], [50.0, 60.0], [9.0, 9.0], [70.0, 1.0], [30.0, 31.0], [33.0, 34.0]]]), torch.tensor([[2, 3, 1, 0, 1, 1]])),
}


def tiny() -> Sam:
    """A small EfficientSAM whose weights are waves: the same everywhere, whatever torch's generators do."""
    model = Sam("tiny", EfficientSam(EfficientSamConfig(heads=1, depth=2), E), TINY, Preprocess(SIZE, fit="stretch")).eval()
    state = model.state_dict()
    for i, key in enumerate(sorted(state)):
        value = state[key]
        wave = 0.3 * torch.sin(torch.arange(value.numel(), dtype=torch.float64) * (0.7 + 0.013 * i) + i)
        norm = value.ndim == 1 and key.endswith("weight")
        state[key] = (wave + (1 if norm else 0)).reshape(value.shape).float()
    state[NEGATIVE] = torch.zeros(1, E)
    model.load_state_dict(state)
    return model


def picture() -> torch.Tensor:
    """(1, 3, SIZE, SIZE)."""
    return torch.sin(torch.arange(3 * SIZE * SIZE, dtype=torch.float64) * 0.011).reshape(1, 3, SIZE, SIZE).float() * 2


@pytest.mark.parametrize("name,params,gmacs,tensors", [("efficient_sam_ti", 6.16e6, 102.3, 153), ("efficient_sam_s", 22.35e6, 245.6, 153)])
def test_sizes_are_the_published_ones(name: str, params: float, gmacs: float, tensors: int) -> None:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        encoder = EfficientSam(CONFIGS[name], 256)
        encoder(torch.zeros(1, 3, 1024, 1024))
        whole = Sam(name, encoder, DECODER, Preprocess(1024, fit="stretch"))
    assert sum(p.numel() for p in encoder.parameters()) == pytest.approx(params, rel=5e-3)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs, rel=5e-3)
    assert len(encoder.state_dict()) == tensors and len(whole.state_dict()) == 278 + 1
    assert sum(p.numel() for p in whole.parameters()) == pytest.approx(params + 4.06e6, rel=5e-3)


def test_embed__numbers_of_the_authors_code() -> None:
    # Their encoder (github.com/yformer/EfficientSAM, d525f62) with these weights, channels 0, 8, 16, 24 of row 2, columns 1 to 4.
    theirs = torch.tensor([[1.080442, 1.179643, 1.186309, 1.184939], [-1.613238, -1.495771, -1.371358, -1.356919],
                           [1.450474, 0.946423, 0.622514, 0.589495], [-0.105652, 0.195154, 0.358658, 0.374255]])
    with torch.no_grad():
        assert torch.allclose(tiny().embed(picture())[0, ::8, 2, 1:5], theirs, atol=1e-4)


@pytest.mark.parametrize("kind,here,there,quality", [
    ("points", [[0.187425, -0.111181, 0.180094, -0.036296], [0.187609, -0.114815, 0.181573, -0.038624]],
     [[0.179928, 0.068247, 0.154617, -0.026347], [0.179868, 0.067982, 0.155985, -0.027467]],
     [[2.766926, -3.744543, 1.985246, 1.953744], [2.956812, -3.600680, 1.623236, 2.243008]]),
    ("box", [[0.187601, -0.116837, 0.182107, -0.039467]], [[0.179454, 0.076095, 0.155256, -0.027829]], [[3.052576, -3.525422, 1.437431, 2.390057]]),
    ("box_and_points", [[0.186391, -0.072622, 0.171829, -0.029178]], [[0.181351, 0.039289, 0.154817, -0.023197]], [[2.291166, -4.084682, 2.867965, 1.237754]]),
])
def test_decode__numbers_of_the_authors_code(kind: str, here: list, there: list, quality: list) -> None:
    # Their mask decoder (multimask_output False, then True): masks at row 5, column 7 and at row 20, column 3, and the predicted IoU.
    model = tiny()
    points, labels = PROMPTS[kind]
    with torch.no_grad():
        masks, iou = model.decode(model.embed(picture()), points, labels.float())
    assert torch.allclose(masks[:, :, 5, 7], torch.tensor(here), atol=2e-5)
    assert torch.allclose(masks[:, :, 20, 3], torch.tensor(there), atol=2e-5)
    assert torch.allclose(iou, torch.tensor(quality), atol=1e-4)


def test_decode__prompts_of_every_length_share_a_call() -> None:
    model = tiny()
    embedding = torch.randn(1, E, 6, 6)
    points, labels = torch.rand(3, 8, 2) * SIZE, torch.ones(3, 8)
    labels[0, 1:], labels[1, :2], labels[1, 4:] = -2, torch.tensor([2.0, 3.0]), -2
    with torch.no_grad():
        masks, iou = model.decode(embedding, points, labels)
        for row, count in enumerate((1, 4, 8)):
            alone = model.decode(embedding, points[row : row + 1, :count], labels[row : row + 1, :count])
            assert torch.allclose(alone[0][0], masks[row], atol=1e-5) and torch.allclose(alone[1][0], iou[row], atol=1e-4)


def test_decode__a_seventh_point_counts() -> None:
    model = tiny()
    embedding, points, labels = torch.randn(1, E, 6, 6), torch.rand(1, 7, 2) * SIZE, torch.ones(1, 7)
    with torch.no_grad():
        six, seven = model.decode(embedding, points[:, :6], labels[:, :6]), model.decode(embedding, points, labels)
    assert (six[1] - seven[1]).abs().max() > 1e-2, "the authors' code drops it without a word"


def test_decode__mask_prompts_change_nothing() -> None:
    model = tiny()
    embedding, points, labels = torch.randn(1, E, 6, 6), *PROMPTS["points"]
    with torch.no_grad():
        a, b = (model.decode(embedding, points, labels.float(), *mask)[0] for mask in ((), (torch.randn(2, 1, 24, 24), torch.ones(2))))
    assert torch.equal(a, b) and not any("mask_downscaling" in k or "no_mask" in k for k in model.state_dict())


@pytest.mark.parametrize("change", [{"gelu": False}, {"group_norm": False}, {"summed_tokens": False}, {"padded_points": 0}])
def test_every_choice_of_the_decoder_matters(change: dict) -> None:
    model = tiny()
    other = Sam("sam", model.encoder, replace(TINY, **change), model.preprocess).eval()
    other.load_state_dict(model.state_dict())
    embedding, (points, labels) = torch.randn(1, E, 6, 6), PROMPTS["points"]
    with torch.no_grad():
        pairs = zip(model.decode(embedding, points, labels.float()), other.decode(embedding, points, labels.float()), strict=True)
        assert max((a - b).abs().max() for a, b in pairs) > 1e-3


def test_position_embedding__is_the_pretrained_one_at_224_pixels() -> None:
    encoder = tiny().encoder
    assert isinstance(encoder, EfficientSam)
    assert torch.equal(encoder.positions(14).flatten(2).transpose(1, 2), encoder.pos_embed[:, 1:])
    assert encoder.positions(6).shape == (1, 64, 6, 6)


def test_checkpoint__keeps_the_kind_of_decoder(tmp_path: Path) -> None:
    model = students.build("efficient_sam_ti:width=0.34,depth=0.25", image_size=64, shape=TINY)
    again = checkpoint.load(checkpoint.save(model, tmp_path / "a.safetensors"))
    assert again.shape == TINY != DecoderShape(E, heads=2, mlp_dim=48) and again.name == "efficient_sam_ti-width0.34-depth0.25"
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again.embed(images), model.eval().embed(images))


def test_trains_in_bf16() -> None:
    torch.manual_seed(0)
    bf16_steps_learn(EfficientSam(EfficientSamConfig(heads=1, depth=2), 32))


class Points(nn.Module):
    """The prompt encoder's tokens as a component of their own: quick to export."""

    def __init__(self, encoder: PromptEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, coords: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder.points(coords, labels)


def test_export__the_padding_is_in_the_graph(tmp_path: Path) -> None:
    from edgekd.export.onnx import exporter

    module = Points(tiny().prompt_encoder).eval()
    free = {0: "prompts", 1: "points"}
    component = Component("points", module, {"coords": torch.rand(2, 3, 2), "labels": torch.ones(2, 3)}, ("tokens", "bias"), {"coords": free, "labels": free})
    exporter.export(component, tmp_path / "points.onnx", scheme="fp32")
    session = exporter.open(tmp_path / "points.onnx", scheme="fp32")
    for coords, labels in [*PROMPTS.values(), (torch.rand(5, 9, 2) * SIZE, torch.ones(5, 9))]:
        with torch.no_grad():
            tokens, bias = module(coords, labels.float())
        out = session.run({"coords": coords.numpy(), "labels": labels.float().numpy()})
        assert torch.allclose(torch.from_numpy(out["tokens"]), tokens, atol=1e-5)
        assert torch.equal(torch.from_numpy(out["bias"]) < -30, bias < -30), "-32 in files, -1e4 here: both are never looked at"
