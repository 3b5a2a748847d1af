"""MobileNetV3-Large (Howard et al., arXiv 1905.02244, table 1), written from the paper: inverted residuals with squeeze-and-excite, ReLU in
the early stages and Hardswish in the late ones. 5.48 M parameters with its classifier, 0.22 G multiply-adds at 224 px.
"""
from __future__ import annotations

from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.errors import UsageError
from edgekd.models.blocks import ConvBN, activation, initialise, rounded

# kernel, expanded width, width, squeeze-and-excite, activation, stride of each block at width 1
BLOCKS = (
    (3, 16, 16, False, "relu", 1),
    (3, 64, 24, False, "relu", 2), (3, 72, 24, False, "relu", 1),
    (5, 72, 40, True, "relu", 2), (5, 120, 40, True, "relu", 1), (5, 120, 40, True, "relu", 1),
    (3, 240, 80, False, "hardswish", 2), (3, 200, 80, False, "hardswish", 1), (3, 184, 80, False, "hardswish", 1), (3, 184, 80, False, "hardswish", 1),
    (3, 480, 112, True, "hardswish", 1), (3, 672, 112, True, "hardswish", 1),
    (5, 672, 160, True, "hardswish", 2), (5, 960, 160, True, "hardswish", 1), (5, 960, 160, True, "hardswish", 1),
)
LAST, HIDDEN = 960, 1280
"""Channels that are pooled, and of the layer between pooling and classes."""


@dataclass(frozen=True)
class MobileNetV3Config:
    """Geometry: every width of the paper times `width`, in multiples of 8. The hidden layer of the classifier only grows."""

    width: float = 1.0
    act: str = "hardswish"

    def scaled(self, *, width: float = 1.0, depth: float = 1.0, act: str | None = None) -> MobileNetV3Config:
        """Another width. Raises UsageError for a depth or activation: the paper's blocks have one each."""
        if depth != 1.0 or act not in (None, self.act):
            raise UsageError("MobileNetV3 takes a width and no depth or activation", hint="write mobilenet_v3_large:width=0.5")
        return replace(self, width=self.width * width)

    @property
    def pooled(self) -> int:
        """Channels of the encoder's map."""
        return rounded(LAST * self.width)

    @property
    def hidden(self) -> int:
        """Width of the classifier's hidden layer."""
        return rounded(HIDDEN * max(1.0, self.width))


class Gate(nn.Module):
    """Squeeze-and-excite with a hard sigmoid, (B, C, H, W) -> same: 1x1 `fc1` to C / 4, ReLU, 1x1 `fc2` (sec. 5.3)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = rounded(channels / 4)
        self.fc1, self.fc2 = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


class InvertedResidual(nn.Module):
    """(B, cin, H, W) -> (B, cout, H / stride, W / stride): expand, depthwise, gate, project (linear); added where the shape is kept."""

    def __init__(self, cin: int, mid: int, cout: int, kernel: int, stride: int, *, gate: bool, act: str) -> None:
        super().__init__()
        layers: list[nn.Module] = [] if mid == cin else [ConvBN(cin, mid), activation(act)]
        layers += [ConvBN(mid, mid, kernel, stride, groups=mid), activation(act)]
        layers += [Gate(mid)] if gate else []
        self.layers = nn.Sequential(*layers, ConvBN(mid, cout))
        self.residual = stride == 1 and cin == cout

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return x + y if self.residual else y


class MobileNetV3(nn.Module):
    """Images (B, 3, S, S) -> map (B, 960 x width, S/32, S/32)."""

    def __init__(self, config: MobileNetV3Config) -> None:
        super().__init__()
        cin = rounded(16 * config.width)
        self.stem = nn.Sequential(ConvBN(3, cin, 3, 2), activation("hardswish"))
        blocks = []
        for kernel, mid, cout, gate, act, stride in BLOCKS:
            mid, cout = rounded(mid * config.width), rounded(cout * config.width)
            blocks.append(InvertedResidual(cin, mid, cout, kernel, stride, gate=gate, act=act))
            cin = cout
        self.blocks = nn.ModuleList(blocks)
        self.last = nn.Sequential(ConvBN(cin, config.pooled), activation("hardswish"))
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return self.last(x)
