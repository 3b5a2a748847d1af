"""A model of dense features: any encoder, and a projection to the teacher's width and grid."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.models.blocks import initialise
from edgekd.protocols import Component, Preprocess


class Projection(nn.Module):
    """(B, C, h, w) -> (B, E, s, s): a 1x1 convolution, resized bilinearly where the encoder's grid is another."""

    def __init__(self, channels: int, embed_dim: int, grid: int) -> None:
        super().__init__()
        self.conv, self.grid = nn.Conv2d(channels, embed_dim, 1), grid
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x if x.shape[-1] == self.grid else F.interpolate(x, size=(self.grid, self.grid), mode="bilinear", align_corners=False)


class DenseFeatures(nn.Module):
    """Encoder and projection: images (B, 3, S, S) -> embedding (B, E, s, s)."""

    task = "dense_features"

    def __init__(self, name: str, encoder: nn.Module, channels: int, preprocess: Preprocess, *, embed_dim: int, grid: int) -> None:
        super().__init__()
        self.name, self.preprocess, self.embed_dim, self.grid = name, preprocess, embed_dim, grid
        self.encoder, self.head = encoder, Projection(channels, embed_dim, grid)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """What can be trained on its own, by the names that recipes use."""
        return {"encoder": self.encoder, "head": self.head}

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) normalised -> (B, E, s, s)."""
        return self.head(self.encoder(images))

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, S, S) normalised -> what a photo gives, by name."""
        return {"embedding": self.embed(images)}


class _Features(nn.Module):
    """The part that is exported."""

    def __init__(self, model: DenseFeatures) -> None:
        super().__init__()
        self.encoder, self.head = model.encoder, model.head

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images))


def components(model: DenseFeatures) -> dict[str, Component]:
    """The model as its one exportable part: images (1, 3, S, S) -> embedding (1, E, s, s)."""
    side = model.preprocess.image_size
    return {"encoder": Component("encoder", _Features(model).eval(), {"images": torch.randn(1, 3, side, side)}, ("embedding",))}
