"""NanoSAM's encoder (NVIDIA, 2023): a ResNet-18 (He et al., arXiv 1512.03385), three convolutions, a transposed convolution to stride
16, a projection and a learned position embedding. Written from the description.

The position embedding is for a 64 x 64 map, that of 1024 px; at other sizes it is interpolated. The ResNet's activation is ReLU;
`act` is that of the layers behind it.

Parameter names are those of the published checkpoint (`backbone.layer1.0.conv1...`, `up_1...`, `proj...`, `pos_embedding`).
"""
from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.models.blocks import activation, divisible, fold_batch_norm, initialise


@dataclass(frozen=True)
class NanoSamConfig:
    """Geometry: widths and residual blocks of the four ResNet stages (strides 4 to 32), width of the layers behind them."""

    widths: tuple[int, int, int, int] = (64, 128, 256, 512)
    depths: tuple[int, int, int, int] = (2, 2, 2, 2)
    neck: int = 256
    act: str = "gelu"
    positions: int = 64

    def scaled(self, *, width: float = 1.0, depth: float = 1.0, act: str | None = None) -> NanoSamConfig:
        """Widths times `width` (multiples of 8), depths times `depth` (at least one block), `act` if given."""
        widths = tuple(divisible(w * width) for w in self.widths)
        depths = tuple(max(1, round(d * depth)) for d in self.depths)
        return replace(self, widths=widths, depths=depths, neck=divisible(self.neck * width), act=act or self.act)  # type: ignore[arg-type]


CONFIGS: dict[str, NanoSamConfig] = {"nanosam": NanoSamConfig()}


class Shortcut(nn.Module):
    """ReLU of main(x) + shortcut(x): what a residual block folds into."""

    def __init__(self, main: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.main, self.shortcut = main, shortcut

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.main(x) + self.shortcut(x))


class BasicBlock(nn.Module):
    """(B, cin, H, W) -> (B, cout, H / stride, W / stride): two 3x3 convolutions with norms beside the input (arXiv 1512.03385, fig. 5)."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout)
        self.conv2, self.bn2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False), nn.BatchNorm2d(cout)
        self.downsample = None
        if (cin, stride) != (cout, 1):
            self.downsample = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))
        nn.init.zeros_(self.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))

    def fold(self) -> Shortcut:
        """The same without norms."""
        main = nn.Sequential(fold_batch_norm(self.conv1, self.bn1), nn.ReLU(), fold_batch_norm(self.conv2, self.bn2))
        return Shortcut(main, nn.Identity() if self.downsample is None else fold_batch_norm(*self.downsample))  # type: ignore[arg-type]


class ResNet(nn.Module):
    """Images (B, 3, S, S) -> (B, widths[3], S/32, S/32)."""

    def __init__(self, config: NanoSamConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv1, self.bn1 = nn.Conv2d(3, widths[0], 7, 2, 3, bias=False), nn.BatchNorm2d(widths[0])
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            nn.Sequential(*(
                BasicBlock(widths[max(0, stage - 1)] if i == 0 else width, width, 2 if stage and i == 0 else 1) for i in range(config.depths[stage])
            )) for stage, width in enumerate(widths)
        )

    def forward(self, images: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(images))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def fold(self) -> nn.Sequential:
        """The same without norms."""
        stem = fold_batch_norm(self.conv1, self.bn1)
        return nn.Sequential(stem, nn.ReLU(), self.maxpool, self.layer1, self.layer2, self.layer3, self.layer4)


class NanoSam(nn.Module):
    """Images (B, 3, S, S), S a multiple of 32 -> embedding (B, embed_dim, S/16, S/16)."""

    def __init__(self, config: NanoSamConfig, embed_dim: int = 256) -> None:
        super().__init__()
        self.config = config
        neck = config.neck
        self.backbone = ResNet(config)
        convs = [layer for i in range(3)
                 for layer in (nn.Conv2d(neck if i else config.widths[3], neck, 3, padding=1), activation(config.act))]
        self.up_1 = nn.Sequential(*convs, nn.ConvTranspose2d(neck, neck, 3, 2, 1, 1), activation(config.act))
        self.proj = nn.Sequential(nn.Conv2d(neck, neck, 3, padding=1), activation(config.act), nn.Conv2d(neck, embed_dim, 1))
        initialise(self)
        self.pos_embedding = nn.Parameter(1e-5 * torch.randn(1, embed_dim, config.positions, config.positions))

    def forward(self, images: Tensor) -> Tensor:
        x = self.proj(self.up_1(self.backbone(images)))
        size = (x.shape[2], x.shape[3])
        where: Tensor = self.pos_embedding
        if size != (self.config.positions, self.config.positions):
            where = F.interpolate(where, size=size, mode="bilinear", align_corners=False)
        return x + where
