"""EfficientSAM's encoder: a plain ViT at stride 16 with global attention and no relative position (Xiong et al., arXiv 2312.00863),
written from the paper. Parameter names follow the official checkpoints.

Its position embedding is the one of the 224-pixel pre-training: 14 x 14 places and a class token that is not used. It is resized
(bicubic) to the image at hand whenever the encoder runs, so one checkpoint serves every size; in an exported graph it is a constant.

Its decoder is SAM's with other choices (`DECODER`): prompts are filled up to six points, there is no mask branch, and no embedding
for negative clicks, which are a bare position. Where the authors' code drops the seventh point and those after it, ours uses them.
`RENAME` and `ZEROS` lead from the official names to ours.
"""
from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.models.blocks import activation, sam_neck
from edgekd.models.sam import DecoderShape
from edgekd.models.sam_vit import PatchEmbed

PRETRAINED_SIDE = 14
HEAD_DIM = 64
DECODER = DecoderShape(mask_prompts=False, padded_points=6, gelu=True, group_norm=True, summed_tokens=True)


@dataclass(frozen=True)
class EfficientSamConfig:
    """Geometry: heads of 64 channels."""

    heads: int
    depth: int = 12
    act: str = "gelu"

    def scaled(self, *, width: float = 1.0, depth: float = 1.0, act: str | None = None) -> EfficientSamConfig:
        """Heads times `width`, blocks times `depth` (at least one of each), `act` if given."""
        return replace(self, heads=max(1, round(self.heads * width)), depth=max(1, round(self.depth * depth)), act=act or self.act)


CONFIGS: dict[str, EfficientSamConfig] = {"efficient_sam_ti": EfficientSamConfig(3), "efficient_sam_s": EfficientSamConfig(6)}


class Attention(nn.Module):
    """Self-attention of all tokens, (B, N, C) -> same."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Perceptron(nn.Module):
    """Linear, activation, linear, (..., C) -> same."""

    def __init__(self, dim: int, hidden: int, act: str) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), activation(act), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block, (B, N, C) -> same."""

    def __init__(self, dim: int, config: EfficientSamConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = Attention(dim, config.heads), Perceptron(dim, 4 * dim, config.act)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class EfficientSam(nn.Module):
    """Images (B, 3, S, S) -> embedding (B, embed_dim, S/16, S/16)."""

    def __init__(self, config: EfficientSamConfig, embed_dim: int = 256) -> None:
        super().__init__()
        dim = config.heads * HEAD_DIM
        self.patch_embed = PatchEmbed(dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, PRETRAINED_SIDE**2 + 1, dim))
        self.blocks = nn.ModuleList(Block(dim, config) for _ in range(config.depth))
        self.neck = sam_neck(dim, embed_dim)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def positions(self, side: int) -> Tensor:
        """(1, C, side, side): the position embedding of an image of side x side patches."""
        grid = self.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (PRETRAINED_SIDE, PRETRAINED_SIDE))
        if side == PRETRAINED_SIDE:
            return grid
        return F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images)
        side = x.shape[-1]
        x = (x + self.positions(side)).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.neck(x.transpose(1, 2).unflatten(2, (side, side)))
