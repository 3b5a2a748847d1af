"""EfficientViT encoder for SAM (Cai et al., arXiv 2205.14756; SAM variants: arXiv 2402.05008), written from the papers.

Convolutional stages (residual, fused and plain inverted bottlenecks) halve the map one after another; the last stages mix tokens by
multi-scale linear attention, whose cost is linear in the number of pixels. The neck brings the last three stages to one width,
upsamples them (bicubic) to the finest of the three, adds them, runs a few residual blocks and a layer norm.

L variants read 512 px and embed at stride 8, XL variants 1024 px at stride 16: 64 x 64 either way, so a prompt's square is 1024.
Norms have eps 1e-6 and GELU is the tanh approximation, as published; neither is in the checkpoints.

Parameter names are those of the official checkpoints (`backbone.stages.S.op_list.I...`, `neck...`, `norm`).
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from edgekd.models.blocks import LayerNorm2d, activation, bicubic, divisible, fold_batch_norm, initialise

HEAD_DIM = 32
"""Channels per attention head, the same in every published size."""
EPS = 1e-6
Kind = Literal["res", "fmb", "mb", "att"]


@dataclass(frozen=True)
class EfficientViTConfig:
    """Geometry. Stage i is at stride 2**(i + 1); `depths` counts the blocks after the one that downsamples (the stem in stage 0).

    Attributes:
        kinds: what these blocks are: two 3x3 (`res`), 3x3 up and 1x1 down (`fmb`), 1x1 up, depthwise 3x3, 1x1 down (`mb`), linear
            attention and `mb` (`att`).
        expands: hidden width over input width of these blocks; a downsampling block has four times it.
        few_norms: whether all but the last convolution of the stage's bottlenecks have a bias instead of a norm.
        scale: kernel of the depthwise convolution that gathers the second scale of the attention.
        neck: (width, residual `fmb` blocks, their expansion).
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    kinds: tuple[Kind, ...]
    expands: tuple[int, ...]
    few_norms: tuple[bool, ...]
    neck: tuple[int, int, int]
    scale: int = 5
    act: str = "gelu_tanh"

    @property
    def stride(self) -> int:
        """Of the embedding: that of the third stage from the end."""
        return int(2 ** (len(self.widths) - 2))

    def scaled(self, *, width: float = 1.0, depth: float = 1.0, act: str | None = None) -> EfficientViTConfig:
        """Widths times `width` (multiples of 8, of 32 where there is attention), depths times `depth` (at least one block unless
        there is none), `act` if given."""
        widths = tuple(divisible(w * width, HEAD_DIM if kind == "att" else 8) for w, kind in zip(self.widths, self.kinds, strict=True))
        first, *rest = (max(1, round(d * depth)) if d else 0 for d in (self.neck[1], *self.depths))
        neck = (divisible(self.neck[0] * width), first, self.neck[2])
        return replace(self, widths=widths, depths=tuple(rest), neck=neck, act=act or self.act)


def _large(depths: tuple[int, ...], neck: int) -> EfficientViTConfig:
    """An L variant: five stages, stride 8."""
    return EfficientViTConfig((32, 64, 128, 256, 512), depths, ("res", "fmb", "fmb", "mb", "att"), (1, 4, 4, 4, 6),
                              (False, False, False, True, True), (256, neck, 1))


def _extra_large(depths: tuple[int, ...], neck: int) -> EfficientViTConfig:
    """An XL variant: six stages, stride 16."""
    return EfficientViTConfig((32, 64, 128, 256, 512, 1024), depths, ("res", "fmb", "fmb", "fmb", "att", "att"), (1, 4, 4, 4, 4, 6),
                              (False, False, False, False, True, True), (256, neck, 4), scale=3)


CONFIGS: dict[str, EfficientViTConfig] = {
    "efficientvit_sam_l0": _large((1, 1, 1, 4, 4), 4),
    "efficientvit_sam_l1": _large((1, 1, 1, 6, 6), 8),
    "efficientvit_sam_l2": _large((1, 2, 2, 8, 8), 12),
    "efficientvit_sam_xl0": _extra_large((0, 1, 1, 2, 3, 3), 6),
    "efficientvit_sam_xl1": _extra_large((1, 2, 2, 4, 6, 6), 12),
}


class ConvNorm(nn.Module):
    """(B, cin, H, W) -> (B, cout, ceil(H / stride), ceil(W / stride)): convolution, batch norm (`norm` False: a bias instead) and
    activation (None: none)."""

    def __init__(self, cin: int, cout: int, kernel: int = 1, stride: int = 1, *, groups: int = 1, norm: bool = True, act: str | None = None,
                 bias: bool | None = None, gamma: float = 1.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=not norm if bias is None else bias)
        self.norm = nn.BatchNorm2d(cout, eps=EPS) if norm else None
        self.act = None if act is None else activation(act)
        if self.norm is not None:
            nn.init.constant_(self.norm.weight, gamma)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = x if self.norm is None else self.norm(x)
        return x if self.act is None else self.act(x)

    def fold(self) -> nn.Module:
        """The same as one convolution and the activation."""
        conv = self.conv if self.norm is None else fold_batch_norm(self.conv, self.norm)
        return conv if self.act is None else nn.Sequential(conv, self.act)


class _Bottleneck(nn.Module):
    """Convolutions in a row under the names `parts`; (B, cin, H, W) -> (B, cout, H / stride, W / stride)."""

    parts: tuple[str, ...]

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = getattr(self, part)(x)
        return x


class ResConv(_Bottleneck):
    """Two 3x3 convolutions."""

    parts = ("conv1", "conv2")

    def __init__(self, cin: int, cout: int, stride: int, expand: int, act: str, few_norms: bool, gamma: float) -> None:
        super().__init__()
        hidden = cin * expand
        self.conv1 = ConvNorm(cin, hidden, 3, stride, norm=not few_norms, act=act)
        self.conv2 = ConvNorm(hidden, cout, 3, gamma=gamma)


class FusedMBConv(_Bottleneck):
    """3x3 up, 1x1 down."""

    parts = ("spatial_conv", "point_conv")

    def __init__(self, cin: int, cout: int, stride: int, expand: int, act: str, few_norms: bool, gamma: float) -> None:
        super().__init__()
        hidden = cin * expand
        self.spatial_conv = ConvNorm(cin, hidden, 3, stride, norm=not few_norms, act=act)
        self.point_conv = ConvNorm(hidden, cout, gamma=gamma)


class MBConv(_Bottleneck):
    """1x1 up, depthwise 3x3, 1x1 down."""

    parts = ("inverted_conv", "depth_conv", "point_conv")

    def __init__(self, cin: int, cout: int, stride: int, expand: int, act: str, few_norms: bool, gamma: float) -> None:
        super().__init__()
        hidden = cin * expand
        self.inverted_conv = ConvNorm(cin, hidden, norm=not few_norms, act=act)
        self.depth_conv = ConvNorm(hidden, hidden, 3, stride, groups=hidden, norm=not few_norms, act=act)
        self.point_conv = ConvNorm(hidden, cout, gamma=gamma)


BOTTLENECKS: dict[str, type[ResConv] | type[FusedMBConv] | type[MBConv]] = {"res": ResConv, "fmb": FusedMBConv, "mb": MBConv}


class LiteAttention(nn.Module):
    """Multi-scale ReLU linear attention, (B, C, H, W) -> same (arXiv 2205.14756 §3.1).

    Heads of 32 channels at two scales: the q, k, v of the pixels, and those gathered by a depthwise convolution and mixed within each
    head's q, k and v. A head gives v relu(k)^T relu(q) over the sum of relu(k)^T relu(q), with the sums over the pixels taken once.
    q and k are brought to sums of 1 first: the quotient stays, and no term exceeds the largest v (as written in the paper, the sums
    over thousands of pixels pass fp16's 65504).
    """

    def __init__(self, channels: int, scale: int, gamma: float) -> None:
        super().__init__()
        inner = 3 * channels
        self.qkv = ConvNorm(channels, inner, norm=False, bias=False)
        self.aggreg = nn.ModuleList([nn.Sequential(
            nn.Conv2d(inner, inner, scale, padding=scale // 2, groups=inner, bias=False),
            nn.Conv2d(inner, inner, 1, groups=inner // HEAD_DIM, bias=False),
        )])
        self.proj = ConvNorm(2 * channels, channels, gamma=gamma)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2], x.shape[3]
        qkv = self.qkv(x)
        heads = torch.cat([qkv, self.aggreg[0](qkv)], dim=1).reshape(x.shape[0], -1, 3 * HEAD_DIM, height * width)
        q, k, v = heads.split(HEAD_DIM, dim=2)  # each (B, 2 * heads, HEAD_DIM, H * W)
        q, k = q.relu(), k.relu()
        q = q / (q.sum(2, keepdim=True) + 1e-4)
        k = k / (k.mean(3, keepdim=True).sum(2, keepdim=True) + 1e-4) / (height * width)
        state = torch.cat([v @ k.transpose(2, 3), k.sum(3).unsqueeze(2)], dim=2)  # values and, last, the weights
        mixed = state @ q
        out = mixed[:, :, :-1] / mixed[:, :, -1:].clamp(min=1e-6)
        return self.proj(out.reshape(x.shape[0], -1, height, width))


class Block(nn.Module):
    """main(x), plus x if `residual`."""

    def __init__(self, main: nn.Module, residual: bool = True) -> None:
        super().__init__()
        self.main, self.residual = main, residual

    def forward(self, x: Tensor) -> Tensor:
        return x + self.main(x) if self.residual else self.main(x)


class AttentionBlock(nn.Module):
    """(B, C, H, W) -> same: linear attention for context, then an inverted bottleneck for locality."""

    def __init__(self, channels: int, expand: int, scale: int, act: str) -> None:
        super().__init__()
        self.context_module = Block(LiteAttention(channels, scale, gamma=0.0))
        self.local_module = Block(MBConv(channels, channels, 1, expand, act, few_norms=True, gamma=0.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.local_module(self.context_module(x))


class Operations(nn.Module):
    """Modules in a row, under the official name `op_list`."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.op_list = nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Tensor:
        for module in self.op_list:
            x = module(x)
        return x


class Backbone(nn.Module):
    """Images (B, 3, S, S) -> the maps of the last three stages, finest first."""

    def __init__(self, config: EfficientViTConfig) -> None:
        super().__init__()
        self.stages = nn.ModuleList(Operations(*_stage(config, index)) for index in range(len(config.widths)))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        maps = [images]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps[-3], maps[-2], maps[-1]


def _stage(config: EfficientViTConfig, index: int) -> Iterator[nn.Module]:
    """The blocks of a stage, the downsampling one first."""
    width, kind, expand, few, act = config.widths[index], config.kinds[index], config.expands[index], config.few_norms[index], config.act
    if index == 0:
        yield ConvNorm(3, width, 3, 2, act=act)
    else:
        down = FusedMBConv if kind == "fmb" else MBConv
        yield Block(down(config.widths[index - 1], width, 2, 4 * expand, act, few, gamma=1.0), residual=False)
    for _ in range(config.depths[index]):
        if kind == "att":
            yield AttentionBlock(width, expand, config.scale, act)
        else:
            yield Block(BOTTLENECKS[kind](width, width, 1, expand, act, few, gamma=0.0))


class Neck(nn.Module):
    """The maps of the last three stages, finest first -> (B, embed_dim, s, s) with s that of the finest."""

    def __init__(self, config: EfficientViTConfig, embed_dim: int) -> None:
        super().__init__()
        width, depth, expand = config.neck
        self.input_ops = nn.ModuleList(Operations(ConvNorm(channels, width)) for channels in reversed(config.widths[-3:]))
        self.middle = Operations(*(Block(FusedMBConv(width, width, 1, expand, config.act, False, gamma=0.0)) for _ in range(depth)))
        self.output_ops = nn.ModuleList([Operations(ConvNorm(width, embed_dim, norm=False))])

    def forward(self, maps: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        deepest, deep, total = (op(x) for op, x in zip(self.input_ops, reversed(maps), strict=True))
        for x in (deep, deepest):
            total = total + bicubic(x, *total.shape[-2:])
        return self.output_ops[0](self.middle(total))


class EfficientViT(nn.Module):
    """Images (B, 3, S, S), S a multiple of 32 -> embedding (B, embed_dim, S/8, S/8) for L, (B, embed_dim, S/16, S/16) for XL."""

    def __init__(self, config: EfficientViTConfig, embed_dim: int = 256) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        self.neck = Neck(config, embed_dim)
        self.norm = LayerNorm2d(embed_dim, eps=EPS)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.neck(self.backbone(images)))
