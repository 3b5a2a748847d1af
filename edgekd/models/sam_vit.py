"""SAM's image encoder: a ViT with windowed and global attention and decomposed relative position (arXiv 2304.02643, App. A;
ViTDet, arXiv 2203.16527). Parameter names follow Meta's checkpoints. `HybridStem` is `sam_nano`'s: a pretrained convolutional
trunk in place of the patch embedding, which learns from little data (ViT hybrid, arXiv 2010.11929)."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.models.blocks import LayerNorm2d
from edgekd.models.efficientnet_lite import TAPS, EfficientNetLite0


@dataclass(frozen=True)
class VitShape:
    """Sizes of the encoder at its own image size."""

    image_size: int
    dim: int
    depth: int
    heads: int
    window: int
    global_blocks: tuple[int, ...]
    out: int
    mlp_ratio: float = 4.0


def relative_bias(q: Tensor, table_h: Tensor, table_w: Tensor, size: int) -> Tensor:
    """Decomposed relative position: q (B, heads, size*size, d), tables (2*size - 1, d) -> bias (B, heads, size*size, size*size)."""
    index = torch.arange(size, device=q.device)
    index = index[:, None] - index[None, :] + size - 1
    grid = q.unflatten(2, (size, size))
    by_row = torch.einsum("bnyxd,ykd->bnyxk", grid, table_h[index].to(q.dtype))
    by_column = torch.einsum("bnyxd,xkd->bnyxk", grid, table_w[index].to(q.dtype))
    return (by_row[..., :, None] + by_column[..., None, :]).flatten(4).flatten(2, 3)


class VitAttention(nn.Module):
    """Self-attention over a square of tokens with decomposed relative position."""

    def __init__(self, dim: int, heads: int, size: int) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * size - 1, dim // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * size - 1, dim // heads))

    def forward(self, x: Tensor) -> Tensor:
        """(B, size, size, C) -> the same shape."""
        q, k, v = self.qkv(x.flatten(1, 2)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        bias = relative_bias(q, self.rel_pos_h, self.rel_pos_w, self.size)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(out.transpose(1, 2).flatten(2)).unflatten(1, (self.size, self.size))


class VitMLP(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.lin1, self.lin2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        return self.lin2(F.gelu(self.lin1(x)))


class VitBlock(nn.Module):
    """Pre-norm transformer block; attention inside windows, or over the whole image when `window` is 0."""

    layout = "nhwc"

    def __init__(self, shape: VitShape, window: int) -> None:
        super().__init__()
        self.window = window
        self.norm1, self.norm2 = nn.LayerNorm(shape.dim, eps=1e-6), nn.LayerNorm(shape.dim, eps=1e-6)
        self.attn = VitAttention(shape.dim, shape.heads, window or shape.image_size // 16)
        self.mlp = VitMLP(shape.dim, int(shape.dim * shape.mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        """(B, s, s, C) -> the same shape."""
        y = self.norm1(x)
        x = x + (self.windowed(y) if self.window else self.attn(y))
        return x + self.mlp(self.norm2(x))

    def windowed(self, y: Tensor) -> Tensor:
        """Attention in windows; the image is padded right and bottom with zeros to whole windows, as SAM does."""
        batch, side, w = y.shape[0], y.shape[1], self.window
        pad = (w - side % w) % w
        y = F.pad(y, (0, 0, 0, pad, 0, pad)) if pad else y
        n = (side + pad) // w
        y = y.reshape(batch, n, w, n, w, -1).transpose(2, 3).flatten(0, 2)
        y = self.attn(y).unflatten(0, (batch, n, n)).transpose(2, 3).reshape(batch, n * w, n * w, -1)
        return y[:, :side, :side]


class PatchEmbed(nn.Module):
    """SAM's own stem: a 16x16 convolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, 16, 16)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, dim, S/16, S/16)."""
        return self.proj(images)


class HybridStem(nn.Module):
    """A convolutional trunk whose maps of strides 4, 8, 16 and 32 are brought to stride 16 and projected.

    Strides 4 and 8 are folded into channels (after a 1x1 reduction), not averaged: the mask's edges come from them.
    """

    def __init__(self, dim: int, fine: int = 16) -> None:
        super().__init__()
        self.trunk = EfficientNetLite0()
        self.reduce4, self.reduce8 = nn.Conv2d(TAPS[4], fine, 1), nn.Conv2d(TAPS[8], 2 * fine, 1)
        self.proj = nn.Conv2d(16 * fine + 4 * 2 * fine + TAPS[16] + TAPS[32], dim, 1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, dim, S/16, S/16)."""
        maps = self.trunk(images)
        fine = F.pixel_unshuffle(self.reduce4(maps[4]), 4)
        middle = F.pixel_unshuffle(self.reduce8(maps[8]), 2)
        coarse = F.interpolate(maps[32], scale_factor=2.0, mode="nearest")
        return self.proj(torch.cat([fine, middle, maps[16], coarse], dim=1))


class SamVit(nn.Module):
    """Stem + position embedding + blocks + neck."""

    def __init__(self, shape: VitShape, patch_embed: nn.Module | None = None) -> None:
        super().__init__()
        side = shape.image_size // 16
        self.patch_embed = patch_embed or PatchEmbed(shape.dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, side, side, shape.dim))
        self.blocks = nn.ModuleList(VitBlock(shape, 0 if i in shape.global_blocks else shape.window) for i in range(shape.depth))
        self.neck = nn.Sequential(
            nn.Conv2d(shape.dim, shape.out, 1, bias=False), LayerNorm2d(shape.out), nn.Conv2d(shape.out, shape.out, 3, padding=1, bias=False), LayerNorm2d(shape.out)
        )
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, out, S/16, S/16)."""
        x = self.patch_embed(images).permute(0, 2, 3, 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.neck(x.permute(0, 3, 1, 2))


def resize_positions(state: Mapping[str, Tensor], old: VitShape, new: VitShape) -> dict[str, Tensor]:
    """The position embedding (bicubic, as in ViTDet) and the global blocks' relative positions (linear, as in SAM) of an encoder of size
    `old`, for `new.image_size`; everything else does not depend on the image size."""
    side = new.image_size // 16
    positions = state["pos_embed"].float().permute(0, 3, 1, 2)
    out = {"pos_embed": F.interpolate(positions, size=(side, side), mode="bicubic", align_corners=False).permute(0, 2, 3, 1).contiguous()}
    for i in range(old.depth):
        if old.window and i not in old.global_blocks:
            continue
        for name in (f"blocks.{i}.attn.rel_pos_h", f"blocks.{i}.attn.rel_pos_w"):
            rows = state[name].float().T[None]
            out[name] = F.interpolate(rows, size=2 * side - 1, mode="linear", align_corners=False)[0].T.contiguous()
    return out


CONFIGS: dict[str, VitShape] = {
    "sam_vit_b": VitShape(1024, 768, 12, 12, 14, (2, 5, 8, 11), 256),
    "sam_vit_l": VitShape(1024, 1024, 24, 16, 14, (5, 11, 17, 23), 256),
    "sam_vit_h": VitShape(1024, 1280, 32, 16, 14, (7, 15, 23, 31), 256),
}
"""The published sizes (arXiv 2304.02643, App. A)."""
