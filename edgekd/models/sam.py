"""SAM's prompt encoder and mask decoder (arXiv 2304.02643, App. A): ONE for the teacher and every student.

Parameter names follow Meta's checkpoints. Two things differ from the released code, neither in the numbers it gives:
prompts of different length share a batch (an ABSENT point is masked out of every attention), and the not-a-point token that
SAM's Python adds for prompts without a box is added inside the graph, so an exported decoder cannot forget it.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.models.blocks import LayerNorm2d
from edgekd.protocols import ABSENT, BOX_TOP_LEFT, NOT_A_POINT, Component, Preprocess

NUM_MASKS = 4  # one for unambiguous prompts + three alternatives


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of the prompt encoder and mask decoder. The defaults are SAM's; `sam_nano` is half as wide."""

    embed_dim: int = 256
    heads: int = 8
    mlp_dim: int = 2048
    mask_channels: int = 16
    """width of the mask prompt's convolutions"""


class PositionEmbedding(nn.Module):
    """Random Fourier features of positions in 0..1 (SAM uses a Gaussian of standard deviation 1)."""

    positional_encoding_gaussian_matrix: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, dim // 2))

    def forward(self, xy: Tensor) -> Tensor:
        """(..., 2) positions in 0..1 -> (..., dim)."""
        angle = 2 * math.pi * ((2 * xy - 1) @ self.positional_encoding_gaussian_matrix)
        return torch.cat([angle.sin(), angle.cos()], dim=-1)

    def grid(self, height: int, width: int) -> Tensor:
        """(height * width, dim): the code of every cell's centre."""
        device = self.positional_encoding_gaussian_matrix.device
        y = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) / height
        x = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) / width
        xy = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1)
        return self(xy).flatten(0, 1)


class PromptEncoder(nn.Module):
    """Points, boxes (as two corner points) and low-resolution mask logits -> tokens and a dense map."""

    def __init__(self, shape: DecoderShape, side: int) -> None:
        super().__init__()
        e, m = shape.embed_dim, shape.mask_channels
        self.side = side
        self.pe_layer = PositionEmbedding(e)
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, e) for _ in range(4))
        self.not_a_point_embed = nn.Embedding(1, e)
        self.no_mask_embed = nn.Embedding(1, e)
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, m // 4, 2, 2), LayerNorm2d(m // 4), nn.GELU(), nn.Conv2d(m // 4, m, 2, 2), LayerNorm2d(m), nn.GELU(), nn.Conv2d(m, e, 1)
        )

    def points(self, coords: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """coords (P, N, 2) in the F frame, labels (P, N) -> tokens (P, N + 1, E), attention bias of those tokens (P, N + 1).

        The token added at the end is "not a point" for a prompt without a box and absent for one with a box.
        """
        labels = labels.to(coords.dtype)
        has_box = (labels >= BOX_TOP_LEFT).any(dim=1, keepdim=True)
        extra = torch.where(has_box, ABSENT, NOT_A_POINT).to(labels)
        labels = torch.cat([labels, extra], dim=1)
        coords = torch.cat([coords, torch.zeros_like(coords[:, :1])], dim=1)
        code = self.pe_layer((coords + 0.5) / self.side)
        code = code * (labels >= 0).to(code).unsqueeze(-1)
        for value, weight in enumerate(e.weight for e in self.point_embeddings if isinstance(e, nn.Embedding)):
            code = code + (labels == value).to(code).unsqueeze(-1) * weight
        code = code + (labels == NOT_A_POINT).to(code).unsqueeze(-1) * self.not_a_point_embed.weight
        return code, (labels == ABSENT).to(code) * -1e4  # finite, so that fp16 and int8 runtimes keep it

    def dense(self, mask_input: Tensor, has_mask: Tensor) -> Tensor:
        """mask logits (P, 1, F/4, F/4), has_mask (P,) 0 or 1 -> (P, E, F/16, F/16)."""
        has = has_mask.to(mask_input.dtype)[:, None, None, None]
        return has * self.mask_downscaling(mask_input) + (1 - has) * self.no_mask_embed.weight[:, :, None, None]


class Attention(nn.Module):
    """Multi-head attention with an inner width of dim / downsample."""

    def __init__(self, dim: int, heads: int, downsample: int = 1) -> None:
        super().__init__()
        self.heads, inner = heads, dim // downsample
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(dim, inner), nn.Linear(dim, inner), nn.Linear(dim, inner)
        self.out_proj = nn.Linear(inner, dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None = None) -> Tensor:
        """q (P, A, C), k and v (P, B, C), key_bias (P, 1, 1, B) -> (P, A, C)."""
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p, x in ((self.q_proj, q), (self.k_proj, k), (self.v_proj, v)))
        bias = None if key_bias is None else key_bias.to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """The transformer's two-layer perceptron; the activation follows Meta's (ReLU)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.lin1, self.lin2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        return self.lin2(F.relu(self.lin1(x)))


class TwoWayBlock(nn.Module):
    """Tokens attend to themselves, then to the image; the image attends to the tokens."""

    def __init__(self, shape: DecoderShape, first: bool) -> None:
        super().__init__()
        e, h = shape.embed_dim, shape.heads
        self.first = first
        self.self_attn = Attention(e, h)
        self.cross_attn_token_to_image, self.cross_attn_image_to_token = Attention(e, h, 2), Attention(e, h, 2)
        self.mlp = MLP(e, shape.mlp_dim)
        self.norm1, self.norm2, self.norm3, self.norm4 = (nn.LayerNorm(e) for _ in range(4))

    def forward(self, tokens: Tensor, image: Tensor, token_code: Tensor, image_code: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (P, T, E), image (P, s*s, E) -> the same shapes."""
        if self.first:
            tokens = self.self_attn(tokens, tokens, tokens, bias)
        else:
            q = tokens + token_code
            tokens = tokens + self.self_attn(q, q, tokens, bias)
        tokens = self.norm1(tokens)
        tokens = self.norm2(tokens + self.cross_attn_token_to_image(tokens + token_code, image + image_code, image))
        tokens = self.norm3(tokens + self.mlp(tokens))
        image = self.norm4(image + self.cross_attn_image_to_token(image + image_code, tokens + token_code, tokens, bias))
        return tokens, image


class TwoWayTransformer(nn.Module):
    """Two two-way blocks and a last look of the tokens at the image."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TwoWayBlock(shape, first=i == 0) for i in range(2))
        self.final_attn_token_to_image = Attention(shape.embed_dim, shape.heads, 2)
        self.norm_final_attn = nn.LayerNorm(shape.embed_dim)

    def forward(self, image: Tensor, image_code: Tensor, token_code: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """image (P, s*s, E), image_code (1, s*s, E), token_code (P, T, E), bias (P, 1, 1, T) -> tokens, image."""
        tokens = token_code
        for layer in self.layers:
            tokens, image = layer(tokens, image, token_code, image_code, bias)
        last = self.final_attn_token_to_image(tokens + token_code, image + image_code, image)
        return self.norm_final_attn(tokens + last), image


class Head(nn.Module):
    """The three-layer perceptron of the IoU and mask heads."""

    def __init__(self, dim: int, hidden: int, out: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(dim, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, out)])

    def forward(self, x: Tensor) -> Tensor:
        """(P, dim) -> (P, out)."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class MaskDecoder(nn.Module):
    """Tokens and an image embedding -> four masks and their predicted IoU."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        e = shape.embed_dim
        self.transformer = TwoWayTransformer(shape)
        self.iou_token, self.mask_tokens = nn.Embedding(1, e), nn.Embedding(NUM_MASKS, e)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(e, e // 4, 2, 2), LayerNorm2d(e // 4), nn.GELU(), nn.ConvTranspose2d(e // 4, e // 8, 2, 2), nn.GELU()
        )
        self.output_hypernetworks_mlps = nn.ModuleList(Head(e, e, e // 8) for _ in range(NUM_MASKS))
        self.iou_prediction_head = Head(e, 256, NUM_MASKS)

    def forward(self, image: Tensor, image_code: Tensor, points: Tensor, point_bias: Tensor) -> tuple[Tensor, Tensor]:
        """image (P, E, s, s) with the dense prompt added, image_code (s*s, E), points (P, N, E), point_bias (P, N)
        -> mask logits (P, 4, 4s, 4s), IoU (P, 4)."""
        prompts, _, height, width = image.shape
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight]).unsqueeze(0).expand(prompts, -1, -1)
        tokens = torch.cat([own.to(points.dtype), points], dim=1)
        bias = F.pad(point_bias, (1 + NUM_MASKS, 0))[:, None, None, :]
        tokens, image = self.transformer(image.flatten(2).transpose(1, 2), image_code.unsqueeze(0), tokens, bias)
        up = self.output_upscaling(image.transpose(1, 2).unflatten(2, (height, width)))
        hyper = torch.stack([mlp(tokens[:, 1 + i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)], dim=1)
        masks = (hyper @ up.flatten(2)).unflatten(2, (4 * height, 4 * width))
        return masks, self.iou_prediction_head(tokens[:, 0])


class Sam(nn.Module):
    """A promptable model: any encoder that keeps the embedding contract + SAM's prompt encoder and mask decoder."""

    def __init__(self, name: str, encoder: nn.Module, shape: DecoderShape, preprocess: Preprocess) -> None:
        super().__init__()
        self.name, self.preprocess, self.shape, self.embed_dim = name, preprocess, shape, shape.embed_dim
        self.encoder = encoder
        self.prompt_encoder = PromptEncoder(shape, preprocess.side)
        self.mask_decoder = MaskDecoder(shape)

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) normalised -> (B, E, F/16, F/16)."""
        return self.encoder(images)

    def decode(
        self, embedding: Tensor, points: Tensor, labels: Tensor, mask_input: Tensor | None = None, has_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """embedding (B, E, s, s), points (P, N, 2) xy in the F frame, labels (P, N), P a multiple of B (prompts of one image stand
        together), mask_input (P, 1, F/4, F/4) with has_mask (P,) -> mask logits (P, 4, F/4, F/4), IoU (P, 4)."""
        prompts = points.shape[0]
        tokens, bias = self.prompt_encoder.points(points, labels)
        if mask_input is None:
            dense = self.prompt_encoder.no_mask_embed.weight[:, :, None, None]
        else:
            dense = self.prompt_encoder.dense(mask_input, torch.ones(prompts) if has_mask is None else has_mask)
        if embedding.shape[0] != 1:
            embedding = embedding.repeat_interleave(prompts // embedding.shape[0], dim=0)
        image = (embedding + dense).expand(prompts, -1, -1, -1)
        code = self.prompt_encoder.pe_layer.grid(*embedding.shape[-2:])
        return self.mask_decoder(image, code, tokens, bias)


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
    return {
        "encoder": Component("encoder", model.encoder, {"images": torch.randn(1, 3, s, s)}, ("image_embeddings",)),
        "decoder": Component("decoder", decoder, example, ("masks", "iou"), dynamic),
    }
