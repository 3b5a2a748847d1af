"""A small class-agnostic box proposer on the image embedding: where masks are likely to be, before any prompt is asked.

After the object-aware boxes of MobileSAMv2 (arXiv 2312.09579) and EdgeSAM's proposal module (arXiv 2312.06660, sec. 3.2.3), but anchor-free
(FCOS, arXiv 1904.01355) and a few depthwise blocks on the embedding that the decoder uses anyway: no second backbone. A cell proposes several
sizes, since a part and the whole it belongs to can have the same centre.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.models.blocks import LayerNorm2d

STRIDE = 16
"""Pixels of the prompts' square (side F) per cell of the embedding."""
SLOTS = ((-0.25, -0.25, 0), (0.25, -0.25, 0), (-0.25, 0.25, 0), (0.25, 0.25, 0), (0.0, 0.0, 1), (0.0, 0.0, 2))
"""What a cell proposes: (dx, dy) of the slot's centre in cells, and its range of sizes. Small boxes are looked for at four places a cell."""
RANGES = ((0.0, 0.16), (0.16, 0.4), (0.4, 1e9))
"""Longer side of the boxes of each range, as a share of F."""
UNIT = (1 / 32, 1 / 8, 1 / 3)
"""Distance to an edge at which a slot starts, as a share of F."""


class Block(nn.Module):
    """Depthwise 5x5 and two pointwise convolutions around a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.spatial, self.norm = nn.Conv2d(width, width, 5, padding=2, groups=width), LayerNorm2d(width)
        self.widen, self.narrow = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, s, s) -> the same shape."""
        return x + self.narrow(F.gelu(self.widen(self.norm(self.spatial(x)))))


class BoxProposer(nn.Module):
    """Embedding (B, E, s, s) -> boxes with scores, `len(SLOTS)` a cell. Positions are continuous: 0 is the left edge of the F x F square."""

    def __init__(self, embed_dim: int, width: int = 96, depth: int = 4) -> None:
        super().__init__()
        self.embed_dim, self.width, self.depth = embed_dim, width, depth
        self.stem, self.blocks = nn.Conv2d(embed_dim, width, 1), nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm, self.head = LayerNorm2d(width), nn.Conv2d(width, 5 * len(SLOTS), 1)
        nn.init.normal_(self.head.weight, std=0.01)
        with torch.no_grad():
            assert self.head.bias is not None
            self.head.bias.zero_()[::5] = -4.6  # nearly every slot is empty: start from a score of 1 % (focal loss, arXiv 1708.02002)

    def raw(self, embedding: Tensor) -> Tensor:
        """(B, E, s, s) -> (B, Q, 5): the logit of the score, and the four distances to the edges before `decode`. Q = s * s * slots."""
        out = self.head(self.norm(self.blocks(self.stem(embedding))))
        return out.unflatten(1, (len(SLOTS), 5)).permute(0, 3, 4, 1, 2).flatten(1, 3)

    def forward(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """(B, E, s, s) -> boxes (B, Q, 4) xyxy in the F frame and inside it, scores (B, Q) in 0..1: the IoU expected of the box."""
        raw = self.raw(embedding)
        return decode(raw, embedding.shape[-1]), raw[..., 0].sigmoid()


def decode(raw: Tensor, cells: int) -> Tensor:
    """Raw output (B, Q, 5) of an embedding `cells` wide -> boxes (B, Q, 4) xyxy in the F frame."""
    centres, unit = places(cells, raw.device)
    reach = F.softplus(raw[..., 1:].float()) * (unit / 0.6931472)  # softplus(0) = ln 2
    boxes = torch.cat([centres - reach[..., :2], centres + reach[..., 2:]], dim=-1)
    return boxes.clamp(0, cells * STRIDE)


def places(cells: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Centres (Q, 2) xy in the F frame, and the unit of each slot's distances (Q, 1) in pixels."""
    at = torch.arange(cells, device=device, dtype=torch.float32) + 0.5
    y, x = torch.meshgrid(at, at, indexing="ij")
    slots = torch.tensor(SLOTS, device=device)
    centres = torch.stack([x, y], dim=-1).unsqueeze(2) + slots[:, :2]
    unit = torch.tensor(UNIT, device=device)[slots[:, 2].long()] * (cells * STRIDE)
    return centres.flatten(0, 2) * STRIDE, unit.repeat(cells * cells).unsqueeze(1)


def ranges(cells: int) -> Tensor:
    """(Q,) which of `RANGES` each slot is for."""
    return torch.tensor([s[2] for s in SLOTS]).long().repeat(cells * cells)
