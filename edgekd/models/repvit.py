"""RepViT encoder for SAM: a mobile convolution net in ViT layout (Wang et al., arXiv 2307.09283), written from the paper.

Each block mixes tokens (depthwise 3x3 with a re-parameterised 1x1 branch and the identity, optional squeeze-excite), then channels
(1x1 - activation - 1x1, residual). Between stages: depthwise 3x3 at stride 2, 1x1 to the next width, and a channel mixer. The
embedding is at stride 16, in one of two ways. EdgeSAM's (`fuse`): stage 4 (stride 32) is projected, doubled and added to the
projected stage 3. RepViT-SAM's: the last downsampling keeps the size. SAM's neck follows. Training, evaluation and export use this
very graph: EdgeSAM doubles with bicubic weights and so does its export here (its own exporter's bilinear costs 8 % of the embedding);
our students double bilinearly.

**Activation.** The paper uses GELU, and so do the published geometries. Ours do not: GELU is an erf on CPUs and has no integer
kernel. CPU milliseconds of the folded encoder at 256 px (Xeon, 1 thread, minimum of 25-30 interleaved runs):

| | onnxruntime fp32 | onnxruntime int8 (U8S8) | OpenVINO bf16 |
|---|---|---|---|
| repvit_xs GELU / Hardswish / ReLU | 5.2 / 4.1 / 4.0 | 4.0 / 3.0 / 2.5 | 3.0 / 2.6 / 2.5 |
| repvit_s GELU / Hardswish / ReLU | 9.9 / 7.7 / 7.4 | 6.7 / 5.0 / 3.8 | 5.2 / 4.6 / 4.6 |

So ReLU where latency comes first (xs, s; it fuses into an int8 convolution and is the only one that lets int8 pass bf16 here) and
Hardswish, the smooth one that still fuses in fp32, where accuracy does (m).

Names follow the official layouts (`features.N.token_mixer.0...`, `channel_mixer.m...`). Published checkpoints exist with two kinds of
token mixer: the early one has a norm on each branch, the later one (`joint_norm`) a norm after the sum.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.models.blocks import (
    ConvBN,
    Residual,
    SqueezeExcite,
    activation,
    bicubic,
    conv_like,
    divisible,
    fold_batch_norm,
    initialise,
    sam_neck,
)


@dataclass(frozen=True)
class RepViTConfig:
    """Geometry. `depths` counts the stride-1 blocks of a stage; squeeze-excite sits in every second of them, the first included,
    except that stages of three or more blocks end without one (paper §3.4, "cross-block")."""

    widths: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    expand: float = 2.0
    act: str = "gelu"
    joint_norm: bool = True
    fuse: bool = True
    upsample: Literal["bilinear", "bicubic"] = "bilinear"
    """of stage 4 before it is added to stage 3; unused without `fuse`"""

    def scaled(self, *, width: float = 1.0, depth: float = 1.0, act: str | None = None) -> RepViTConfig:
        """Widths times `width` (multiples of 8), depths times `depth` (at least one block), `act` if given."""
        widths = tuple(divisible(w * width) for w in self.widths)
        depths = tuple(max(1, round(d * depth)) for d in self.depths)
        return replace(self, widths=widths, depths=depths, act=act or self.act)  # type: ignore[arg-type]


CONFIGS: dict[str, RepViTConfig] = {
    "repvit_xs": RepViTConfig((24, 48, 96, 192), (1, 1, 5, 1), act="relu"),
    "repvit_s": RepViTConfig((32, 64, 128, 256), (2, 2, 8, 1), act="relu"),
    "repvit_m": RepViTConfig((40, 80, 160, 320), (3, 3, 14, 2), act="hardswish"),
    "edge_sam": RepViTConfig((48, 96, 192, 384), (3, 3, 15, 2), joint_norm=False, upsample="bicubic"),
    "repvit_sam_m0_9": RepViTConfig((48, 96, 192, 384), (3, 3, 15, 2), fuse=False),
    "repvit_sam_m1_0": RepViTConfig((56, 112, 224, 448), (3, 3, 15, 2), fuse=False),
    "repvit_sam_m1_1": RepViTConfig((64, 128, 256, 512), (3, 3, 13, 2), fuse=False),
    "repvit_sam_m1_5": RepViTConfig((64, 128, 256, 512), (5, 5, 25, 4), fuse=False),
    "repvit_sam": RepViTConfig((80, 160, 320, 640), (7, 7, 35, 2), fuse=False),
}


class RepDW(nn.Module):
    """Depthwise token mixer, (B, C, H, W) -> same: 3x3 conv-norm + 1x1 conv + identity, one 3x3 convolution when folded.

    `joint_norm`: the 1x1 branch is a plain convolution with bias and a norm `bn` follows the sum; otherwise it has its own norm.
    """

    def __init__(self, channels: int, joint_norm: bool) -> None:
        super().__init__()
        self.conv = ConvBN(channels, channels, 3, groups=channels)
        self.conv1: nn.Module = nn.Conv2d(channels, channels, 1, groups=channels) if joint_norm \
            else ConvBN(channels, channels, 1, groups=channels)
        self.bn = nn.BatchNorm2d(channels) if joint_norm else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x) + self.conv1(x) + x
        return y if self.bn is None else self.bn(y)

    def fold(self) -> nn.Conv2d:
        """The one depthwise 3x3 convolution equal to this block in eval mode."""
        wide, point = self.conv.fold(), self.conv1
        point = point.fold() if isinstance(point, ConvBN) else point
        centre = point.weight.detach() + 1  # type: ignore[operator]
        weight = wide.weight.detach() + F.pad(centre, (1, 1, 1, 1))
        summed = conv_like(self.conv.c, weight, wide.bias.detach() + point.bias.detach())  # type: ignore[union-attr, operator]
        return summed if self.bn is None else fold_batch_norm(summed, self.bn)


class RepViTBlock(nn.Module):
    """(B, cin, H, W) -> (B, cout, H / stride, W / stride). `stride` None: within a stage, `cin` is `cout` and the size stays."""

    def __init__(self, cin: int, cout: int, stride: int | None, *, excite: bool, config: RepViTConfig) -> None:
        super().__init__()
        gate = SqueezeExcite(cin) if excite else nn.Identity()
        if stride is None:
            self.token_mixer = nn.Sequential(RepDW(cin, config.joint_norm), gate)
        else:
            self.token_mixer = nn.Sequential(ConvBN(cin, cin, 3, stride, groups=cin), gate, ConvBN(cin, cout))
        hidden = int(cout * config.expand)
        self.channel_mixer = Residual(nn.Sequential(ConvBN(cout, hidden), activation(config.act), ConvBN(hidden, cout, gamma=0.0)))

    def forward(self, x: Tensor) -> Tensor:
        return self.channel_mixer(self.token_mixer(x))


class RepViT(nn.Module):
    """Images (B, 3, S, S), S a multiple of 32 -> embedding (B, embed_dim, S/16, S/16)."""

    def __init__(self, config: RepViTConfig, embed_dim: int = 256) -> None:
        super().__init__()
        self.config = config
        first = config.widths[0]
        stem = nn.Sequential(ConvBN(3, first // 2, 3, 2), activation(config.act), ConvBN(first // 2, first, 3, 2))
        stages = [list(self._stage(index)) for index in range(4)]
        self.features = nn.ModuleList([stem, *(block for stage in stages for block in stage)])
        self.tap = len(self.features) - 1 - len(stages[3])  # last block of stage 3
        if config.fuse:
            self.fuse_stage2 = nn.Conv2d(config.widths[2], embed_dim, 1, bias=False)
            self.fuse_stage3 = nn.Conv2d(config.widths[3], embed_dim, 1, bias=False)
        self.neck = sam_neck(embed_dim if config.fuse else config.widths[3], embed_dim)
        initialise(self)

    def _stage(self, index: int) -> Iterator[RepViTBlock]:
        """The blocks of stage `index`: the downsampling one first, except in the first stage."""
        config, width, depth = self.config, self.config.widths[index], self.config.depths[index]
        if index:
            yield RepViTBlock(config.widths[index - 1], width, 2 if index < 3 or config.fuse else 1, excite=False, config=config)
        for i in range(depth):
            excite = i % 2 == 0 and not (depth >= 3 and i == depth - 1)
            yield RepViTBlock(width, width, None, excite=excite, config=config)

    def forward(self, images: Tensor) -> Tensor:
        x = shallow = images
        for index, block in enumerate(self.features):
            x = block(x)
            if index == self.tap:
                shallow = x
        if self.config.fuse:
            deep = self.fuse_stage3(x)
            smooth = self.config.upsample == "bicubic"
            deep = bicubic(deep, *shallow.shape[-2:]) if smooth else F.interpolate(deep, scale_factor=2.0, mode="bilinear", align_corners=False)
            x = self.fuse_stage2(shallow) + deep
        return self.neck(x)
