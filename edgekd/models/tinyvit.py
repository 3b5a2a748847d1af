"""TinyViT encoder for SAM (Wu et al., arXiv 2207.10666; stride-1 last merge as in MobileSAM, arXiv 2306.14289), written from the papers.

One stage of inverted bottlenecks at stride 4, then three stages of window attention at strides 8, 16 and 16. An attention block is:
window attention with a learned bias per offset, a depthwise 3x3 "local" convolution, an MLP. Windows that do not divide the map are
completed with zeros at the right and bottom; these take part in the attention, as in the original, so the weights carry over.

Our own small configurations use windows of 8, 16 and 8, which divide the maps of 256 px exactly (the original 7, 14, 7 come from
224 px: at 256 px the 16 x 16 map would be padded to 28 x 28, three times the work). Any S that is a multiple of 32 works with both.

The activation is chosen as in `edgekd.models.repvit`: GELU in the published geometry, ReLU (xs) and Hardswish (s) in ours. One
encoder (1.1 M parameters, 256 px, 1 thread, CPU milliseconds) took 15.5 / 12.6 / 12.0 with GELU / Hardswish / ReLU in onnxruntime
fp32 and 13.7 / 11.1 / 9.5 in int8. Splitting the joint qkv projection, or folding the scale and the bias table into constants,
made the exported graph no faster (onnxruntime fuses the scale into the product by itself), so attention has no folded form.

Names follow the official layout (`layers.N.blocks.M.attn...`, `layers.N.downsample.conv1...`).
"""
from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from edgekd.models.blocks import ConvBN, Mlp, activation, divisible, from_windows, initialise, sam_neck, to_windows

HEAD_DIM = 32
"""Channels per attention head, the same in every published size."""


@dataclass(frozen=True)
class TinyViTConfig:
    """Geometry. `widths[1:]` are multiples of 32 (one head each 32 channels); `windows` are those of the three attention stages."""

    widths: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    windows: tuple[int, int, int] = (8, 16, 8)
    expand: float = 4.0
    act: str = "gelu"

    def scaled(self, *, width: float = 1.0, depth: float = 1.0, act: str | None = None) -> TinyViTConfig:
        """Widths times `width` (multiples of 8, then of 32), depths times `depth` (at least one block), `act` if given."""
        widths = (divisible(self.widths[0] * width), *(divisible(w * width, HEAD_DIM) for w in self.widths[1:]))
        depths = tuple(max(1, round(d * depth)) for d in self.depths)
        return replace(self, widths=widths, depths=depths, act=act or self.act)  # type: ignore[arg-type]


CONFIGS: dict[str, TinyViTConfig] = {
    "tinyvit_xs": TinyViTConfig((24, 32, 96, 128), (1, 1, 3, 2), act="relu"),
    "tinyvit_s": TinyViTConfig((32, 64, 128, 192), (1, 2, 5, 2), act="hardswish"),
    "mobile_sam": TinyViTConfig((64, 128, 160, 320), (2, 2, 6, 2), windows=(7, 14, 7)),
    "mobile_sam_11m": TinyViTConfig((64, 128, 256, 448), (2, 2, 6, 2), windows=(7, 14, 7)),
    "mobile_sam_21m": TinyViTConfig((96, 192, 384, 576), (2, 2, 6, 2), windows=(7, 14, 7)),
}


class InvertedBottleneck(nn.Module):
    """(B, C, H, W) -> same: 1x1 up, depthwise 3x3, 1x1 down, residual, activation (MBConv)."""

    def __init__(self, channels: int, config: TinyViTConfig) -> None:
        super().__init__()
        hidden = int(channels * config.expand)
        self.conv1 = ConvBN(channels, hidden)
        self.conv2 = ConvBN(hidden, hidden, 3, groups=hidden)
        self.conv3 = ConvBN(hidden, channels, gamma=0.0)
        self.act = activation(config.act)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.conv3(self.act(self.conv2(self.act(self.conv1(x))))))


class Merge(nn.Module):
    """Between stages, (B, cin, H, W) -> (B, cout, H / stride, W / stride): 1x1, depthwise 3x3 with the stride, 1x1."""

    def __init__(self, cin: int, cout: int, stride: int, act: str) -> None:
        super().__init__()
        self.conv1 = ConvBN(cin, cout)
        self.conv2 = ConvBN(cout, cout, 3, stride, groups=cout)
        self.conv3 = ConvBN(cout, cout)
        self.act = activation(act)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(self.act(self.conv2(self.act(self.conv1(x)))))


class WindowAttention(nn.Module):
    """Pre-norm self-attention within windows, (B * windows, window * window, C) -> same.

    The bias of a pair of tokens is learned per head and per absolute offset (|dy|, |dx|), LeViT's scheme (arXiv 2104.01136 §4.2):
    `attention_biases` is (heads, window * window), offset (dy, dx) at dy * window + dx.
    """

    def __init__(self, dim: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = dim // HEAD_DIM, window
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.attention_biases = nn.Parameter(torch.zeros(self.heads, window * window))
        steps = torch.arange(window)
        offsets = (steps[:, None] - steps[None, :]).abs()
        pairs = offsets[:, None, :, None] * window + offsets[None, :, None, :]
        self.register_buffer("attention_bias_idxs", pairs.reshape(-1).contiguous(), persistent=False)

    def bias(self) -> Tensor:
        """(heads, window * window, window * window): the bias of query i and key j."""
        tokens = self.window * self.window
        return self.attention_biases.index_select(1, self.attention_bias_idxs).reshape(self.heads, tokens, tokens)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, tokens, self.heads, 3, HEAD_DIM).permute(3, 0, 2, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]  # each (batch, heads, tokens, HEAD_DIM)
        scores = (q * HEAD_DIM**-0.5) @ k.transpose(-2, -1)
        weights = (scores + self.bias().to(scores.dtype)).softmax(-1)  # under autocast an fp32 bias would lift the whole map to fp32
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, dim))


class TinyViTBlock(nn.Module):
    """(B, C, H, W) -> same: window attention, depthwise 3x3, MLP."""

    def __init__(self, dim: int, window: int, config: TinyViTConfig) -> None:
        super().__init__()
        self.window = window
        self.attn = WindowAttention(dim, window)
        self.local_conv = ConvBN(dim, dim, 3, groups=dim)
        self.mlp = Mlp(dim, int(dim * config.expand), config.act)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2], x.shape[3]
        tokens = x.permute(0, 2, 3, 1)
        mixed = from_windows(self.attn(to_windows(tokens, self.window)), self.window, height, width)
        tokens = self.local_conv((tokens + mixed).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return (tokens + self.mlp(tokens)).permute(0, 3, 1, 2)


class Stage(nn.Module):
    """Blocks, then the merge into the next stage (none after the last)."""

    def __init__(self, blocks: list[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class PatchEmbed(nn.Module):
    """Images (B, 3, S, S) -> (B, C, S/4, S/4): two 3x3 convolutions at stride 2."""

    def __init__(self, channels: int, act: str) -> None:
        super().__init__()
        self.seq = nn.Sequential(ConvBN(3, channels // 2, 3, 2), activation(act), ConvBN(channels // 2, channels, 3, 2))

    def forward(self, images: Tensor) -> Tensor:
        return self.seq(images)


class TinyViT(nn.Module):
    """Images (B, 3, S, S), S a multiple of 32 -> embedding (B, embed_dim, S/16, S/16)."""

    def __init__(self, config: TinyViTConfig, embed_dim: int = 256) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config.widths[0], config.act)
        self.layers = nn.ModuleList(self._stage(index) for index in range(4))
        self.neck = sam_neck(config.widths[3], embed_dim)
        initialise(self)

    def _stage(self, index: int) -> Stage:
        config, width, depth = self.config, self.config.widths[index], self.config.depths[index]
        blocks: list[nn.Module] = [
            TinyViTBlock(width, config.windows[index - 1], config) if index else InvertedBottleneck(width, config) for _ in range(depth)
        ]
        merge = Merge(width, config.widths[index + 1], 1 if index == 2 else 2, config.act) if index < 3 else None
        return Stage(blocks, merge)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images)
        for layer in self.layers:
            x = layer(x)
        return self.neck(x)
