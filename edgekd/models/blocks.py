"""Small blocks shared by the encoders and the SAM decoder.

Maps are (B, C, H, W), best kept in `torch.channels_last`; windows and tokens are (B, N, C). A block whose deployed form
differs from its training form has `.fold() -> nn.Module`: a new module with the same outputs in eval mode
(see `edgekd.models.fold`). Nothing here writes in place or needs float64, so bf16 autocast is safe.
"""
from __future__ import annotations

import functools
import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.errors import unknown


def in_graph() -> bool:
    """Whether operations are being recorded for an export or a compiler, not computed."""
    return torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch.jit.is_tracing()


def as_type(x: Tensor, like: Tensor) -> Tensor:
    """`x` in the type of `like`: a sum of bf16 and float32 would be float32, which takes twice as long to move."""
    return x if x.dtype == like.dtype else x.to(like.dtype)


class GELU(nn.GELU):
    """The same; torch has a faster kernel for tensors that lie in the order of their axes, which maps with channels last do once turned."""

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.is_contiguous() or in_graph():
            return super().forward(x)
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": GELU, "gelu_tanh": partial(GELU, approximate="tanh"), "relu": nn.ReLU, "hardswish": nn.Hardswish,
}


def activation(name: str) -> nn.Module:
    """A fresh activation by name; an unknown one is a UsageError with the nearest name."""
    if name not in ACTIVATIONS:
        raise unknown("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]()


def divisible(value: float, by: int = 8) -> int:
    """`value` rounded to the nearest positive multiple of `by` (halves go up)."""
    return max(by, int(value + by / 2) // by * by)


def rounded(value: float, by: int = 8) -> int:
    """`divisible`, but never more than a tenth below `value`: MobileNet's and EfficientNet's rule for scaled widths."""
    found = divisible(value, by)
    return found if found >= 0.9 * value else found + by


class ConvBN(nn.Module):
    """Convolution `c` without bias and batch norm `bn`, padded to keep the size at stride 1.

    (B, cin, H, W) -> (B, cout, ceil(H / stride), ceil(W / stride)). `gamma` is the initial scale of the norm: 0 makes a residual
    branch start as the identity (Goyal et al., arXiv 1706.02677 §5.1).
    """

    def __init__(self, cin: int, cout: int, kernel: int = 1, stride: int = 1, *, groups: int = 1, gamma: float = 1.0) -> None:
        super().__init__()
        self.c = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(cout)
        nn.init.constant_(self.bn.weight, gamma)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.c(x))

    def fold(self) -> nn.Conv2d:
        """The one convolution with bias that equals this block in eval mode."""
        return fold_batch_norm(self.c, self.bn)


def fold_batch_norm(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> nn.Conv2d:
    """A new convolution equal to `bn(conv(x))` with the running statistics of `bn`."""
    mean, var = bn.running_mean, bn.running_var
    if mean is None or var is None:
        raise ValueError("a batch norm without running statistics cannot be folded")
    scale = bn.weight.detach() * torch.rsqrt(var + bn.eps)
    bias = bn.bias.detach() - mean * scale
    if conv.bias is not None:
        bias = bias + conv.bias.detach() * scale
    return conv_like(conv, conv.weight.detach() * scale[:, None, None, None], bias)


def conv_like(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> nn.Conv2d:
    """A new convolution of the geometry of `conv` with this weight (cout, cin / groups, k, k) and bias (cout,)."""
    new = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, groups=conv.groups,  # type: ignore[arg-type]
                    device=weight.device, dtype=weight.dtype)
    new.weight = nn.Parameter(weight.clone(), requires_grad=conv.weight.requires_grad)
    new.bias = nn.Parameter(bias.clone(), requires_grad=conv.weight.requires_grad)
    return new.train(conv.training)


class LayerNorm2d(nn.Module):
    """SAM's layer norm over the channels of every pixel, (B, C, H, W) -> same (arXiv 2304.02643; eps 1e-6).

    Written as the ordinary layer norm of the channels-last view: free in `channels_last` memory, one node in exported graphs
    (which may keep it in fp32 by itself), and no explicit square that overflows fp16.
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.channels, self.eps = channels, eps  # a plain integer: tracing exporters take no traced shape here

    def forward(self, x: Tensor) -> Tensor:
        return self.over_last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def over_last(self, x: Tensor) -> Tensor:
        """The same of maps with channels last, (..., C)."""
        return F.layer_norm(x, (self.channels,), self.weight, self.bias, self.eps)


class SqueezeExcite(nn.Module):
    """Channel gate from the global mean, (B, C, H, W) -> same (arXiv 1709.01507): 1x1 `fc1`, ReLU, 1x1 `fc2`, sigmoid.

    The hidden width is C / 4 rounded to a multiple of 8, as in RepViT.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = divisible(channels / 4)
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        # turned, so that the gradient of the mean has channels last too: adding it to another order takes ten times as long
        mean = x.mean((2, 3), keepdim=True) if in_graph() else x.permute(0, 2, 3, 1).mean((1, 2))[:, :, None, None]
        gate = self.fc2(F.relu(self.fc1(mean)))
        return x * gate.sigmoid()


class Residual(nn.Module):
    """x + m(x)."""

    def __init__(self, m: nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, x: Tensor) -> Tensor:
        return x + self.m(x)


class Mlp(nn.Module):
    """Pre-norm two-layer perceptron over the last axis, (..., C) -> (..., C): `norm`, `fc1`, `act`, `fc2`."""

    def __init__(self, dim: int, hidden: int, act: str = "gelu") -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.act = activation(act)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(self.norm(x))))


def to_windows(x: Tensor, size: int) -> Tensor:
    """(B, H, W, C) -> (B * windows, size * size, C), zero-padded at the right and bottom to whole windows.

    H and W are read as plain integers: an exported graph is for one image size.
    """
    height, width, channels = x.shape[1], x.shape[2], x.shape[3]
    bottom, right = -height % size, -width % size
    if bottom or right:
        x = F.pad(x, (0, 0, 0, right, 0, bottom))
    rows, columns = (height + bottom) // size, (width + right) // size
    x = x.reshape(-1, rows, size, columns, size, channels)
    return x.transpose(2, 3).reshape(-1, size * size, channels)


def from_windows(x: Tensor, size: int, height: int, width: int) -> Tensor:
    """The inverse of `to_windows`: (B * windows, size * size, C) -> (B, height, width, C), padding cut off."""
    rows, columns, channels = -(-height // size), -(-width // size), x.shape[-1]
    x = x.reshape(-1, rows, columns, size, size, channels).transpose(2, 3)
    x = x.reshape(-1, rows * size, columns * size, channels)
    return x if (rows * size, columns * size) == (height, width) else x[:, :height, :width]


def sam_neck(channels: int, embed_dim: int) -> nn.Sequential:
    """SAM's neck, (B, channels, s, s) -> (B, embed_dim, s, s): 1x1 conv, norm, 3x3 conv, norm (arXiv 2304.02643, App. A)."""
    return nn.Sequential(
        nn.Conv2d(channels, embed_dim, 1, bias=False), LayerNorm2d(embed_dim),
        nn.Conv2d(embed_dim, embed_dim, 3, padding=1, bias=False), LayerNorm2d(embed_dim),
    )


@functools.lru_cache(maxsize=64)
def cubic_weights(size: int, target: int) -> tuple[tuple[float, ...], ...]:
    """(target, size): bicubic resampling along one axis (Keys' kernel with a = -0.75, borders repeated, half-pixel centres)."""
    a, rows = -0.75, []
    for place in range(target):
        centre = (place + 0.5) * size / target - 0.5
        row = [0.0] * size
        for source in range(math.floor(centre) - 1, math.floor(centre) + 3):
            d = abs(centre - source)
            weight = (a + 2) * d**3 - (a + 3) * d**2 + 1 if d <= 1 else a * (d**3 - 5 * d**2 + 8 * d - 4)
            row[min(max(source, 0), size - 1)] += weight
        rows.append(tuple(row))
    return tuple(rows)


def bicubic(x: Tensor, height: int, width: int) -> Tensor:
    """(B, C, h, w) -> (B, C, height, width), equal to `interpolate(mode="bicubic", align_corners=False)`.

    A small matrix per axis: runtimes have fast kernels for that and slow ones, or none, for bicubic resizing (256 maps of 32 x 32
    took onnxruntime more than a hundred times as long).
    """
    pairs = zip(x.shape[-2:], (height, width), strict=True)
    rows, columns = (torch.tensor(cubic_weights(int(size), target), dtype=x.dtype, device=x.device) for size, target in pairs)
    return rows @ x @ columns.T


def initialise(model: nn.Module) -> None:
    """Convolutions: Kaiming normal over the true fan-out (depthwise included); linear layers: truncated normal, std 0.02; biases 0.

    Norms keep what their constructors chose (`gamma` of `ConvBN`).
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
        elif isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
