"""SAM's prompt encoder (arXiv 2304.02643, App. A): points, boxes and mask logits -> tokens, and what is added to the image.

Parameter names follow Meta's checkpoints. Two things differ from the released code, neither in the numbers it gives: prompts of
different length share a batch (an ABSENT point is masked out of every attention), and the not-a-point token that SAM's Python adds for
prompts without a box is added inside the graph, so an exported decoder cannot forget it.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgekd.models.blocks import LayerNorm2d, in_graph
from edgekd.models.point_embedding import ABSENT_BIAS
from edgekd.protocols import ABSENT, BOX_TOP_LEFT, NOT_A_POINT

FAR = -1e4
"""The attention bias of absent tokens in torch: no score outweighs it. Files have a near one, which 8 bits can hold; that it is far enough for
a model's scores is shown by the parity of every file, which is compared with torch."""


@dataclass(frozen=True)
class DecoderShape:
    """Sizes and kind of the prompt encoder and mask decoder. The defaults are SAM's; `sam_nano` is half as wide, EfficientSAM another kind.

    Checkpoints keep these values as whole numbers: a new field must be an int or a bool, with SAM's value as its default.
    """

    embed_dim: int = 256
    heads: int = 8
    mlp_dim: int = 2048
    mask_channels: int = 16
    """width of the mask prompt's convolutions"""
    mask_prompts: bool = True
    """False: no mask branch; mask prompts are accepted and change nothing"""
    padded_points: int = 0
    """n > 0: a prompt of fewer points is filled up to n with not-a-point tokens at (-1, -1). 0: one such token if there is no box"""
    gelu: bool = False
    """GELU instead of ReLU in the perceptrons"""
    group_norm: bool = False
    """one norm over the whole upscaled map instead of one for each of its pixels"""
    summed_tokens: bool = False
    """self-attention sees token + code as queries, keys and values, the first too, and its result is added to that sum"""


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
        self.side, self.padded, self.has_mask_branch = side, shape.padded_points, shape.mask_prompts
        self.pe_layer = PositionEmbedding(e)
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, e) for _ in range(4))
        self.not_a_point_embed = nn.Embedding(1, e)
        self.absent_bias = ABSENT_BIAS
        """The bias of absent tokens in files."""
        if not shape.mask_prompts:
            return
        self.no_mask_embed = nn.Embedding(1, e)
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, m // 4, 2, 2), LayerNorm2d(m // 4), nn.GELU(), nn.Conv2d(m // 4, m, 2, 2), LayerNorm2d(m), nn.GELU(), nn.Conv2d(m, e, 1)
        )

    def points(self, coords: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """coords (P, N, 2) in the F frame, labels (P, N) -> tokens (P, N + K, E), attention bias of those tokens (P, N + K).

        SAM: K = 1, a token "not a point" for a prompt without a box, absent for one with a box; it has no position.
        With `padded_points`: K is that many, of which those that fill the prompt up are "not a point" and the others absent; they
        have a position, outside the image.
        """
        labels = labels.to(coords.dtype)
        if self.padded:
            present = (labels != ABSENT).to(labels).sum(dim=1, keepdim=True)
            extra = torch.where(torch.arange(self.padded, device=labels.device) < self.padded - present, NOT_A_POINT, ABSENT).to(labels)
            place = -torch.ones_like(coords[:, :1]).expand(-1, self.padded, -1)
        else:
            has_box = (labels >= BOX_TOP_LEFT).any(dim=1, keepdim=True)
            extra = torch.where(has_box, ABSENT, NOT_A_POINT).to(labels)
            place = torch.zeros_like(coords[:, :1])
        labels = torch.cat([labels, extra], dim=1)
        coords = torch.cat([coords, place], dim=1)
        code = self.pe_layer((coords + 0.5) / self.side)
        if not self.padded:
            code = code * (labels >= 0).to(code).unsqueeze(-1)
        for value, weight in enumerate(e.weight for e in self.point_embeddings if isinstance(e, nn.Embedding)):
            code = code + (labels == value).to(code).unsqueeze(-1) * weight
        code = code + (labels == NOT_A_POINT).to(code).unsqueeze(-1) * self.not_a_point_embed.weight
        return code, (labels == ABSENT).to(code) * (self.absent_bias if in_graph() else FAR)  # finite, so that fp16 keeps it

    def dense(self, mask_input: Tensor | None, has_mask: Tensor | None) -> Dense | None:
        """Mask logits (P, 1, F/4, F/4), has_mask (P,) 0 or 1 (None: all 1) -> what is added to the image; None: nothing is."""
        if not self.has_mask_branch:
            return None
        if mask_input is None:
            return Dense(None, self.no_mask_embed.weight)
        *convolutions, last = self.mask_downscaling
        hidden = mask_input
        for layer in convolutions:
            hidden = layer(hidden)
        hidden = hidden.flatten(2).transpose(1, 2)
        has = torch.ones_like(hidden[:, :1, :1]) if has_mask is None else has_mask.to(hidden.dtype)[:, None, None]
        has = has.expand(-1, hidden.shape[1], -1)
        basis = torch.cat([last.weight.flatten(1), last.bias[:, None], self.no_mask_embed.weight.T], dim=1)  # type: ignore[index, union-attr, operator]
        return Dense(torch.cat([has * hidden, has, 1 - has], dim=2), basis.T)


class Dense:
    """What mask prompts add to the image's tokens, kept as the few channels that it is a linear function of.

    A linear layer of the decoder then sees the image once for all prompts, and of each prompt only those channels: a fifth of the
    decoder's work when many prompts are asked of one photo. `channels` (P, s*s, M) or None, where all prompts add the one row of `basis` (M, E).
    """

    def __init__(self, channels: Tensor | None, basis: Tensor) -> None:
        self.channels, self.basis = channels, basis

    def through(self, weight: Tensor | None = None) -> Tensor:
        """The addition, (P or 1, s*s or 1, E), or the image of it under `weight` (out, E)."""
        basis = self.basis if weight is None else self.basis @ weight.T
        return basis.unsqueeze(0) if self.channels is None else self.channels @ basis
