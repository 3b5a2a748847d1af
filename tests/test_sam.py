"""The one prompt encoder and mask decoder: equal to transformers' SamModel, absent points change nothing, boxes and clicks mix."""
from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from torch import nn

from edgekd.models.prompt_encoder import PromptEncoder
from edgekd.models.sam import DecoderShape, Sam, components
from edgekd.models.sam_vit import PatchEmbed, SamVit, VitShape
from edgekd.protocols import Preprocess
from edgekd.teachers.huggingface import convert

SIZE = 64


def reference(seed: int = 0):
    """A small seeded SamModel with weights of a size that matters (its own init is near zero)."""
    from transformers import SamConfig, SamMaskDecoderConfig, SamModel, SamPromptEncoderConfig, SamVisionConfig

    config = SamConfig(
        vision_config=SamVisionConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=SIZE, window_size=3, global_attn_indexes=[1],
                                      mlp_dim=64, output_channels=32, num_pos_feats=16).to_dict(),
        prompt_encoder_config=SamPromptEncoderConfig(hidden_size=32, image_size=SIZE, mask_input_channels=8).to_dict(),
        mask_decoder_config=SamMaskDecoderConfig(hidden_size=32, mlp_dim=64, num_attention_heads=2, iou_head_hidden_dim=256).to_dict())
    torch.manual_seed(seed)
    model = SamModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.2)
        model.shared_image_embedding.positional_embedding.normal_(0, 1)
        model.prompt_encoder.shared_embedding.positional_embedding.copy_(model.shared_image_embedding.positional_embedding)
    return model


@pytest.fixture(scope="module")
def pair():
    model = reference()
    return model, convert(model, "tiny").eval()


def test_embed__equals_the_library(pair) -> None:
    library, ours = pair
    images = torch.randn(1, 3, SIZE, SIZE)
    with torch.no_grad():
        assert torch.allclose(library.get_image_embeddings(images), ours.embed(images), atol=1e-6)


@pytest.mark.parametrize("kind", ["points", "box", "point_and_box"])
def test_decode__equals_the_library(pair, kind: str) -> None:
    library, ours = pair
    embedding = torch.randn(1, 32, SIZE // 16, SIZE // 16)
    points = torch.tensor([[[10.0, 20.0], [40.0, 33.0]], [[5.0, 60.0], [22.0, 8.0]]])
    labels = torch.tensor([[1, 0], [1, 1]])
    box = torch.tensor([[3.0, 4.0, 50.0, 60.0], [8.0, 2.0, 30.0, 31.0]])
    given: dict = {"image_embeddings": embedding, "multimask_output": True}
    if kind != "box":
        given |= {"input_points": points[None], "input_labels": labels[None]}
    if kind != "points":
        given |= {"input_boxes": box[None]}
    corners, corner_labels = box.view(2, 2, 2), torch.tensor([[2, 3], [2, 3]])
    mine = {"points": (points, labels), "box": (corners, corner_labels),
            "point_and_box": (torch.cat([points, corners], 1), torch.cat([labels, corner_labels], 1))}[kind]
    with torch.no_grad():
        theirs = library(**given)
        masks, iou = ours.decode(embedding, mine[0], mine[1].float())
    assert torch.allclose(theirs.pred_masks[0], masks[:, 1:], atol=1e-4)
    assert torch.allclose(theirs.iou_scores[0], iou[:, 1:], atol=1e-4)
    assert masks.abs().max() > 1e-3, "near-zero outputs would pass anything"


def test_decode__mask_prompt_equals_the_library(pair) -> None:
    library, ours = pair
    embedding, prior = torch.randn(1, 32, 4, 4), torch.randn(1, 1, 16, 16)
    with torch.no_grad():
        theirs = library(image_embeddings=embedding, input_points=torch.tensor([[[[10.0, 20.0]]]]), input_labels=torch.ones(1, 1, 1, dtype=torch.int),
                         input_masks=prior, multimask_output=True)
        masks, _ = ours.decode(embedding, torch.tensor([[[10.0, 20.0]]]), torch.ones(1, 1), prior, torch.ones(1))
    assert torch.allclose(theirs.pred_masks[0], masks[:, 1:], atol=1e-4)


def test_decode__absent_points_change_nothing(pair) -> None:
    _, ours = pair
    embedding = torch.randn(1, 32, 4, 4)
    short = torch.tensor([[[10.0, 20.0]]]), torch.tensor([[1.0]])
    long = torch.tensor([[[10.0, 20.0], [55.0, 3.0], [1.0, 1.0]]]), torch.tensor([[1.0, -2.0, -2.0]])
    with torch.no_grad():
        for a, b in zip(ours.decode(embedding, *short), ours.decode(embedding, *long), strict=True):
            assert torch.allclose(a, b, atol=1e-5)


def test_decode__boxes_and_clicks_in_one_batch_equal_one_by_one(pair) -> None:
    _, ours = pair
    embedding = torch.randn(1, 32, 4, 4)
    points = torch.tensor([[[3.0, 4.0], [50.0, 60.0]], [[30.0, 31.0], [0.0, 0.0]]])
    labels = torch.tensor([[2.0, 3.0], [1.0, -2.0]])
    with torch.no_grad():
        both = ours.decode(embedding, points, labels)
        for i in range(2):
            alone = ours.decode(embedding, points[i : i + 1], labels[i : i + 1])
            assert all(torch.allclose(b[i : i + 1], a, atol=1e-5) for a, b in zip(alone, both, strict=True))


def test_decode__several_images_equal_one_by_one(pair) -> None:
    _, ours = pair
    embedding, points, labels = torch.randn(2, 32, 4, 4), torch.rand(6, 1, 2) * SIZE, torch.ones(6, 1)
    with torch.no_grad():
        masks, _ = ours.decode(embedding, points, labels)
        for i in range(2):
            alone, _ = ours.decode(embedding[i : i + 1], points[3 * i : 3 * i + 3], labels[3 * i : 3 * i + 3])
            assert torch.allclose(alone, masks[3 * i : 3 * i + 3], atol=1e-5)


def test_prompt_encoder__token_for_prompts_without_a_box_is_not_a_point() -> None:
    encoder = PromptEncoder(DecoderShape(embed_dim=32, heads=2, mlp_dim=32), SIZE)
    with torch.no_grad():
        tokens, bias = encoder.points(torch.zeros(2, 2, 2), torch.tensor([[2.0, 3.0], [1.0, -2.0]]))
    assert tokens.shape == (2, 3, 32)
    assert torch.equal(tokens[1, 2], encoder.not_a_point_embed.weight[0])
    assert (bias < 0).tolist() == [[False, False, True], [False, True, False]], "with a box the extra token is masked out, as is the absent point"


def test_has_mask__zero_ignores_the_mask(pair) -> None:
    _, ours = pair
    embedding, point, label = torch.randn(1, 32, 4, 4), torch.tensor([[[9.0, 9.0]]]), torch.ones(1, 1)
    with torch.no_grad():
        a, _ = ours.decode(embedding, point, label)
        b, _ = ours.decode(embedding, point, label, torch.randn(1, 1, 16, 16), torch.zeros(1))
    assert torch.allclose(a, b, atol=1e-5)


def test_sam_vit__equals_the_library() -> None:
    library = reference(3).vision_encoder
    ours = SamVit(VitShape(SIZE, 32, 2, 2, 3, (1,), 32, mlp_ratio=2.0), PatchEmbed(32)).eval()
    names = {"patch_embed.projection": "patch_embed.proj", "layers": "blocks", "layer_norm1": "norm1", "layer_norm2": "norm2"}
    state = {}
    for key, value in library.state_dict().items():
        if key.startswith("neck."):
            for old, new in (("conv1", "0"), ("layer_norm1", "1"), ("conv2", "2"), ("layer_norm2", "3")):
                key = key.replace(f"neck.{old}.", f"neck.{new}.")
        else:
            for old, new in names.items():
                key = key.replace(old, new)
        state[key] = value
    ours.load_state_dict(state)
    images = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        assert torch.allclose(library(images).last_hidden_state, ours(images), atol=1e-5)


def test_components__run_as_described() -> None:
    shape = DecoderShape(embed_dim=32, heads=2, mlp_dim=32)
    model = Sam("tiny", SamVit(VitShape(SIZE, 32, 1, 2, 0, (0,), 32), PatchEmbed(32)), shape, Preprocess(SIZE)).eval()
    found = components(model)
    with torch.no_grad():
        assert found["encoder"].module(*found["encoder"].example.values()).shape == (1, 32, 4, 4)
        masks, iou = found["decoder"].module(*found["decoder"].example.values())
    assert masks.shape == (2, 4, 16, 16) and iou.shape == (2, 4)
    assert not any(k.startswith("model.encoder") for k in found["decoder"].module.state_dict()), "the decoder carries no encoder"


def test_components__a_proposer_is_the_third() -> None:
    class Proposer(nn.Module):
        def forward(self, image_embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            cells = image_embeddings.flatten(2).transpose(1, 2)
            return cells[..., :4], cells[..., 4].sigmoid()

    shape = DecoderShape(embed_dim=32, heads=2, mlp_dim=32)
    model = Sam("tiny", SamVit(VitShape(SIZE, 32, 1, 2, 0, (0,), 32), PatchEmbed(32)), shape, Preprocess(SIZE)).eval()
    assert model.proposer is None and list(components(model)) == ["encoder", "decoder"]
    model.proposer = Proposer()
    found = components(model)
    assert list(found) == ["encoder", "decoder", "proposer"] and found["proposer"].outputs == ("boxes", "scores")
    with torch.no_grad():
        boxes, scores = found["proposer"].module(*found["proposer"].example.values())
    assert boxes.shape == (1, 16, 4) and scores.shape == (1, 16)


def test_decoder_shape__is_whole_numbers_and_sams_by_default() -> None:
    # Checkpoints keep it as a dict of ints; one written before a field existed gets SAM's value for it.
    values = asdict(DecoderShape())
    assert all(isinstance(v, int) for v in values.values())
    assert DecoderShape(**{k: int(v) for k, v in values.items()}) == DecoderShape()
    old = {"embed_dim": 256, "heads": 8, "mlp_dim": 2048, "mask_channels": 16}
    assert DecoderShape(**old) == DecoderShape()
    keys = PromptEncoder(DecoderShape(), 1024).state_dict()
    assert len(keys) == 17, "the tensors of Meta's prompt encoder"
