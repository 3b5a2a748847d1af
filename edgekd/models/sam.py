"""SAM's mask decoder and the promptable model around it (arXiv 2304.02643, App. A): ONE for teachers and every student, EfficientSAM's
variant included. Parameter names follow Meta's checkpoints.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.models.blocks import LayerNorm2d, as_type, in_graph
from edgekd.models.prompt_encoder import DecoderShape, Dense, PromptEncoder
from edgekd.protocols import ABSENT, Component, Preprocess

NUM_MASKS = 4  # one for unambiguous prompts + three alternatives
FEW = 32
"""Tokens of a prompt, at most, for `attend_few`."""
POINTS = 6
"""Points of a prompt, at most, in a file whose shapes cannot vary: a box and four clicks."""


class ImageTokens(NamedTuple):
    """What the prompts attend to: `tokens` (B, s*s, E), B images or P of them, to which each prompt adds `dense`; `code` (1, s*s, E), where
    they are; `placed`, the sum of both. A tuple, in which FSDP2 finds the tensors that go into a layer and come out of it."""

    tokens: Tensor
    code: Tensor
    placed: Tensor
    prompts: int
    dense: Dense | None = None

    @classmethod
    def of(cls, tokens: Tensor, code: Tensor, prompts: int, dense: Dense | None = None) -> ImageTokens:
        return cls(tokens, code, tokens + as_type(code, tokens), prompts, dense)

    def plus(self, seen: Tensor) -> Tensor:
        """The tokens with what each prompt saw added, (P, s*s, E), before the norm."""
        own = self._with(self.tokens, None)
        if in_graph() or own.shape[0] in (1, self.prompts):
            return repeated(own, self.prompts) + seen
        return (own.unsqueeze(1) + seen.unflatten(0, (own.shape[0], -1))).flatten(0, 1)

    def project(self, linear: nn.Linear, placed: bool = False) -> Tensor:
        """linear(tokens + dense), or with `placed` linear(tokens + code + dense): (P, s*s, out), or (B, s*s, out) where all prompts of an
        image see the same."""
        found = self._with(linear(self.placed if placed else self.tokens), linear.weight)
        return repeated(found, self.prompts) if in_graph() else found

    def _with(self, shared: Tensor, weight: Tensor | None) -> Tensor:
        if self.dense is None:
            return shared
        if self.dense.channels is not None and shared.shape[0] > 1:
            shared = repeated(shared, self.prompts)
        return shared + as_type(self.dense.through(weight), shared)


def repeated(shared: Tensor, prompts: int) -> Tensor:
    """(B, ...) of every image -> (P, ...) of every prompt; those of one image stand together."""
    if shared.shape[0] == 1:
        return shared.expand(prompts, *shared.shape[1:])
    return shared if shared.shape[0] == prompts else shared.unsqueeze(1).expand(-1, prompts // shared.shape[0], *shared.shape[1:]).flatten(0, 1)


class Attention(nn.Module):
    """Multi-head attention with an inner width of dim / downsample."""

    def __init__(self, dim: int, heads: int, downsample: int = 1) -> None:
        super().__init__()
        self.heads, inner = heads, dim // downsample
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(dim, inner), nn.Linear(dim, inner), nn.Linear(dim, inner)
        self.out_proj = nn.Linear(inner, dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None = None) -> Tensor:
        """q (P, A, C), k and v (P, B, C), key_bias (P, 1, 1, B) -> (P, A, C). The side of the image may have its B images instead of P prompts."""
        return self.attend(self.q_proj(q), self.k_proj(k), self.v_proj(v), key_bias)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None = None) -> Tensor:
        """The same, of q, k and v that are projected already."""
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        bias = None if key_bias is None else key_bias.to(q.dtype)
        if not in_graph() and min(q.shape[2], k.shape[2]) <= FEW:
            if (q.shape[2] <= k.shape[2]) != (q.shape[0] >= k.shape[0]):  # an image of fewer cells than a prompt has tokens
                q, k, v = (repeated(x, max(q.shape[0], k.shape[0])) for x in (q, k, v))
            out = attend_few(q, k, v, bias)
        else:
            q, k, v = (repeated(x, max(q.shape[0], k.shape[0])) for x in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.out_proj(out.transpose(1, 2).flatten(2))


def attend_few(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attention between the few tokens of a prompt and many: q (P, h, A, d), k and v (P, h, B, d), bias (P, 1, 1, B) -> (P, h, A, d).

    What an image is asked by all its prompts is one longer list of questions: the side of the image may have fewer rows than P. In steps,
    because torch's fused kernel is made for long sequences on both sides: with 8 tokens and 1024 cells its forward and backward take 2 to 5
    times as long on a CPU. The many come last in the probabilities, so that the softmax runs along whole vectors.
    """
    few_ask, scale = q.shape[2] <= k.shape[2], q.shape[-1] ** -0.5
    few, many = (q, k) if few_ask else (k, q)
    each, tokens = few.shape[0] // many.shape[0], few.shape[2]
    if few_ask:
        together = few.unflatten(0, (-1, each)).transpose(1, 2).flatten(2, 3)
        if bias is None and not torch.is_grad_enabled():
            out = F.scaled_dot_product_attention(together, k, v)  # faster where there is no backward
        else:
            scores = (together * scale) @ k.transpose(2, 3)
            out = torch.softmax(scores if bias is None else scores + bias, -1) @ v
        return out.unflatten(2, (each, tokens)).transpose(1, 2).flatten(0, 1)
    together = (few * scale).unflatten(0, (-1, each)).transpose(1, 2).flatten(2, 3)
    scores = (together @ many.transpose(2, 3)).unflatten(2, (each, tokens)).transpose(1, 2).flatten(0, 1)
    return torch.softmax(scores if bias is None else scores + bias.transpose(2, 3), -2).transpose(2, 3) @ v


class MLP(nn.Module):
    """The transformer's two-layer perceptron; the activation follows Meta's (ReLU) unless the shape says GELU."""

    def __init__(self, dim: int, hidden: int, gelu: bool = False) -> None:
        super().__init__()
        self.gelu = gelu
        self.lin1, self.lin2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        x = self.lin1(x)
        return self.lin2(F.gelu(x) if self.gelu else F.relu(x))


class TwoWayBlock(nn.Module):
    """Tokens attend to themselves, then to the image; the image attends to the tokens."""

    def __init__(self, shape: DecoderShape, first: bool) -> None:
        super().__init__()
        e, h = shape.embed_dim, shape.heads
        self.first, self.summed = first, shape.summed_tokens
        self.self_attn = Attention(e, h)
        self.cross_attn_token_to_image, self.cross_attn_image_to_token = Attention(e, h, 2), Attention(e, h, 2)
        self.mlp = MLP(e, shape.mlp_dim, shape.gelu)
        self.norm1, self.norm2, self.norm3, self.norm4 = (nn.LayerNorm(e) for _ in range(4))

    def forward(self, tokens: Tensor, image: ImageTokens, token_code: Tensor, bias: Tensor) -> tuple[Tensor, ImageTokens]:
        """tokens (P, T, E) and the image's -> both as they are after the block."""
        if self.summed:
            tokens = tokens if self.first else tokens + token_code
            tokens = tokens + self.self_attn(tokens, tokens, tokens, bias)
        elif self.first:
            tokens = self.self_attn(tokens, tokens, tokens, bias)
        else:
            q = tokens + token_code
            tokens = tokens + self.self_attn(q, q, tokens, bias)
        tokens = self.norm1(tokens)
        to_image, to_token = self.cross_attn_token_to_image, self.cross_attn_image_to_token
        seen = to_image.attend(to_image.q_proj(tokens + token_code), image.project(to_image.k_proj, placed=True), image.project(to_image.v_proj))
        tokens = self.norm2(tokens + seen)
        tokens = self.norm3(tokens + self.mlp(tokens))
        seen = to_token.attend(image.project(to_token.q_proj, placed=True), to_token.k_proj(tokens + token_code), to_token.v_proj(tokens), bias)
        return tokens, ImageTokens.of(self.norm4(image.plus(seen)), image.code, image.prompts)


class TwoWayTransformer(nn.Module):
    """Two two-way blocks and a last look of the tokens at the image."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TwoWayBlock(shape, first=i == 0) for i in range(2))
        self.final_attn_token_to_image = Attention(shape.embed_dim, shape.heads, 2)
        self.norm_final_attn = nn.LayerNorm(shape.embed_dim)

    def forward(self, image: ImageTokens, token_code: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """The image's tokens, token_code (P, T, E), bias (P, 1, 1, T) -> tokens (P, T, E), image (P, s*s, E)."""
        tokens = token_code
        for layer in self.layers:
            tokens, image = layer(tokens, image, token_code, bias)
        last = self.final_attn_token_to_image(tokens + token_code, image.placed, image.tokens)
        return self.norm_final_attn(tokens + last), image.tokens


class Head(nn.Module):
    """The three-layer perceptron of the IoU and mask heads."""

    def __init__(self, dim: int, hidden: int, out: int, gelu: bool = False) -> None:
        super().__init__()
        self.gelu = gelu
        self.layers = nn.ModuleList([nn.Linear(dim, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, out)])

    def forward(self, x: Tensor) -> Tensor:
        """(P, dim) -> (P, out)."""
        for layer in self.layers[:-1]:
            x = F.gelu(layer(x)) if self.gelu else F.relu(layer(x))
        return self.layers[-1](x)


class MaskDecoder(nn.Module):
    """Tokens and an image embedding -> four masks and their predicted IoU."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        e = shape.embed_dim
        self.transformer = TwoWayTransformer(shape)
        self.iou_token, self.mask_tokens = nn.Embedding(1, e), nn.Embedding(NUM_MASKS, e)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(e, e // 4, 2, 2), nn.GroupNorm(1, e // 4) if shape.group_norm else LayerNorm2d(e // 4), nn.GELU(),
            nn.ConvTranspose2d(e // 4, e // 8, 2, 2), nn.GELU(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(Head(e, e, e // 8, shape.gelu) for _ in range(NUM_MASKS))
        self.iou_prediction_head = Head(e, 256, NUM_MASKS, shape.gelu)

    def forward(self, embedding: Tensor, dense: Dense | None, image_code: Tensor, points: Tensor, point_bias: Tensor) -> tuple[Tensor, Tensor]:
        """embedding (B, E, s, s) and what each prompt adds to it, image_code (s*s, E), points (P, N, E), point_bias (P, N); P is a
        multiple of B -> mask logits (P, 4, 4s, 4s), IoU (P, 4)."""
        prompts, (height, width) = points.shape[0], embedding.shape[-2:]
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight]).unsqueeze(0).expand(prompts, -1, -1)
        tokens = torch.cat([own.to(points.dtype), points], dim=1)
        bias = F.pad(point_bias, (1 + NUM_MASKS, 0))[:, None, None, :]
        image = embedding.flatten(2).transpose(1, 2)
        if not in_graph():  # once, not at every layer
            kind = embedding.device.type  # torch's meta device, on which models are counted, knows no autocast
            image = image.to(torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else image.dtype).contiguous()
        given = ImageTokens.of(image, image_code.unsqueeze(0), prompts, dense)
        tokens, image = self.transformer(given, tokens, bias)
        hyper = torch.stack([mlp(tokens[:, 1 + i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)], dim=1)
        if in_graph() or not isinstance(self.output_upscaling[1], LayerNorm2d):
            up = self.output_upscaling(image.transpose(1, 2).unflatten(2, (height, width)))
            masks = (hyper @ up.flatten(2)).unflatten(2, (4 * height, 4 * width))
        else:
            masks = self._masks(image.unflatten(1, (height, width)), hyper)
        return masks, self.iou_prediction_head(tokens[:, 0])

    def _masks(self, image: Tensor, hyper: Tensor) -> Tensor:
        """The same masks with the upscaling as linear layers of every cell, image (P, s, s, E), hyper (P, 4, E/8) -> (P, 4, 4s, 4s).

        A transposed convolution of stride 2 and width 2 is a linear layer to the four cells that each becomes. They stay in the last axes and
        only the masks are put in order: 8 times less to move than the maps, and the layers' backward takes 2/3 of the convolutions'.
        """
        first, norm, gelu, second, last = self.output_upscaling
        cells = gelu(norm.over_last(_to_four(image, first)))  # type: ignore[operator, union-attr, arg-type]
        cells = last(_to_four(cells, second))  # type: ignore[operator, arg-type]
        masks = (cells.flatten(1, 4) @ hyper.transpose(1, 2)).unflatten(1, cells.shape[1:5])  # P, s, s, 4, 4, masks
        return masks.unflatten(4, (2, 2)).unflatten(3, (2, 2)).permute(0, 7, 1, 3, 5, 2, 4, 6).reshape(image.shape[0], -1, 4 * image.shape[1], 4 * image.shape[2])


def _to_four(x: Tensor, conv: nn.ConvTranspose2d) -> Tensor:
    """A transposed convolution of stride 2 and width 2 on the last axis: (..., C) -> (..., 4, D), the four cells row by row."""
    assert conv.bias is not None
    return F.linear(x, conv.weight.permute(2, 3, 1, 0).flatten(0, 2), conv.bias.repeat(4)).unflatten(-1, (4, -1))


class Sam(nn.Module):
    """A promptable model: any encoder that keeps the embedding contract + SAM's prompt encoder and mask decoder."""

    def __init__(self, name: str, encoder: nn.Module, shape: DecoderShape, preprocess: Preprocess) -> None:
        super().__init__()
        self.name, self.preprocess, self.shape, self.embed_dim = name, preprocess, shape, shape.embed_dim
        self.encoder = encoder
        self.prompt_encoder = PromptEncoder(shape, preprocess.side)
        self.mask_decoder = MaskDecoder(shape)
        self.proposer: nn.Module | None = None
        """Boxes from the embedding (`edgekd.models.proposer`), for "segment everything" and a click's granularity; most have none."""

    @property
    def parts(self) -> dict[str, nn.Module]:
        """What can be trained on its own, by the names that recipes use."""
        own: dict[str, nn.Module | None] = {"encoder": self.encoder, "prompt_encoder": self.prompt_encoder, "decoder": self.mask_decoder, "proposer": self.proposer}
        return {name: part for name, part in own.items() if part is not None}

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, S, S) normalised -> what a photo alone gives, by name."""
        return {"embedding": self.embed(images)}

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) normalised -> (B, E, F/16, F/16)."""
        return self.encoder(images)

    def decode(
        self, embedding: Tensor, points: Tensor, labels: Tensor, mask_input: Tensor | None = None, has_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """embedding (B, E, s, s), points (P, N, 2) xy in the F frame, labels (P, N), P a multiple of B (prompts of one image stand
        together), mask_input (P, 1, F/4, F/4) with has_mask (P,) -> mask logits (P, 4, F/4, F/4), IoU (P, 4).

        A model without a mask branch (`DecoderShape.mask_prompts`) takes no notice of mask prompts."""
        tokens, bias = self.prompt_encoder.points(points, labels)
        dense = self.prompt_encoder.dense(mask_input, has_mask)
        code = self.prompt_encoder.pe_layer.grid(*embedding.shape[-2:])
        return self.mask_decoder(embedding, dense, code, tokens, bias)

    def propose(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Embedding (1, E, s, s) of one image -> boxes (Q, 4) xyxy in the F frame and their scores (Q,) in 0..1; for models with a proposer."""
        assert self.proposer is not None
        boxes, scores = self.proposer(embedding)
        return boxes[0], scores[0]


class Decoder(nn.Module):
    """The prompt encoder and mask decoder as one exportable component."""

    def __init__(self, model: Sam) -> None:
        super().__init__()
        self.model = model

    def forward(self, image_embeddings: Tensor, point_coords: Tensor, point_labels: Tensor, mask_input: Tensor, has_mask: Tensor) -> tuple[Tensor, Tensor]:
        """image_embeddings (1, E, s, s) and P prompts of N points -> masks (P, 4, F/4, F/4), iou (P, 4)."""
        return self.model.decode(image_embeddings, point_coords, point_labels, mask_input, has_mask)


class _DecoderOnly(nn.Module):
    """What `Decoder` needs of a Sam, without its encoder."""

    decode = Sam.decode

    def __init__(self, model: Sam) -> None:
        super().__init__()
        self.prompt_encoder, self.mask_decoder = model.prompt_encoder, model.mask_decoder


def components(model: Sam) -> dict[str, Component]:
    """The parts of a promptable model that are exported and profiled on their own, with example inputs (P = 2, N = 3)."""
    s, f = model.preprocess.image_size, model.preprocess.side
    decoder = Decoder(_DecoderOnly(model)).eval()  # type: ignore[arg-type]
    example = {
        "image_embeddings": torch.randn(1, model.embed_dim, f // 16, f // 16),
        "point_coords": torch.rand(2, 3, 2) * f,
        "point_labels": torch.tensor([[1.0, 0.0, 1.0], [2.0, 3.0, 1.0]]),
        "mask_input": torch.randn(2, 1, f // 4, f // 4),
        "has_mask": torch.tensor([0.0, 1.0]),
    }
    dynamic = {
        "point_coords": {0: "prompts", 1: "points"}, "point_labels": {0: "prompts", 1: "points"},
        "mask_input": {0: "prompts"}, "has_mask": {0: "prompts"},
    }
    found = {
        "encoder": Component("encoder", model.encoder, {"images": torch.randn(1, 3, s, s)}, ("image_embeddings",)),
        "decoder": Component("decoder", decoder, example, ("masks", "iou"), dynamic, lengths={"prompts": 1, "points": POINTS},
                             padding={"point_labels": ABSENT}),
    }
    if model.proposer is not None:
        found["proposer"] = Component("proposer", model.proposer, {"image_embeddings": example["image_embeddings"]}, ("boxes", "scores"))
    return found
