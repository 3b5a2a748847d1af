"""ResNet50-D (He et al., "Bag of Tricks", arXiv 1812.01187, fig. 2): a ResNet-50 with a stem of three 3x3 convolutions, strides on the 3x3
convolutions, and shortcuts that average before their 1x1 convolution. 25.6 M parameters with its classifier, 4.35 G multiply-adds at 224 px.
"""
from __future__ import annotations

from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.errors import UsageError
from edgekd.models.blocks import ConvBN, divisible, initialise

EXPANSION = 4


@dataclass(frozen=True)
class ResNetDConfig:
    """Geometry: bottleneck widths and blocks of the four stages (strides 4 to 32), and the width of the stem's first two convolutions."""

    widths: tuple[int, int, int, int] = (64, 128, 256, 512)
    depths: tuple[int, int, int, int] = (3, 4, 6, 3)
    stem: int = 32
    act: str = "relu"

    def scaled(self, *, width: float = 1.0, depth: float = 1.0, act: str | None = None) -> ResNetDConfig:
        """Widths times `width` (multiples of 8), depths times `depth` (at least one block). Raises UsageError for another activation."""
        if act not in (None, self.act):
            raise UsageError("ResNet-D takes a width and a depth and no activation", hint="write resnet50_d:width=0.5,depth=0.5")
        widths = tuple(divisible(w * width) for w in self.widths)
        depths = tuple(max(1, round(d * depth)) for d in self.depths)
        return replace(self, widths=widths, depths=depths, stem=divisible(self.stem * width))  # type: ignore[arg-type]

    @property
    def pooled(self) -> int:
        """Channels of the encoder's map."""
        return self.widths[3] * EXPANSION


class Bottleneck(nn.Module):
    """(B, cin, H, W) -> (B, 4 width, H / stride, W / stride): 1x1, 3x3 with the stride, 1x1, beside the input or its averaged projection."""

    def __init__(self, cin: int, width: int, stride: int) -> None:
        super().__init__()
        cout = width * EXPANSION
        self.conv1, self.conv2, self.conv3 = ConvBN(cin, width), ConvBN(width, width, 3, stride), ConvBN(width, cout, gamma=0.0)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or cin != cout:
            self.shortcut = nn.Sequential(*([nn.AvgPool2d(stride)] if stride > 1 else []), ConvBN(cin, cout))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv3(F.relu(self.conv2(F.relu(self.conv1(x)))))
        return F.relu(self.shortcut(x) + y)


class ResNetD(nn.Module):
    """Images (B, 3, S, S), S a multiple of 32 -> map (B, 2048, S/32, S/32)."""

    def __init__(self, config: ResNetDConfig) -> None:
        super().__init__()
        first = config.widths[0]
        self.stem = nn.Sequential(ConvBN(3, config.stem, 3, 2), nn.ReLU(), ConvBN(config.stem, config.stem, 3), nn.ReLU(), ConvBN(config.stem, first, 3), nn.ReLU(),
                                  nn.MaxPool2d(3, 2, 1))
        blocks, cin = [], first
        for index, (width, depth) in enumerate(zip(config.widths, config.depths, strict=True)):
            for i in range(depth):
                blocks.append(Bottleneck(cin, width, 2 if i == 0 and index else 1))
                cin = width * EXPANSION
        self.blocks = nn.ModuleList(blocks)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return x
