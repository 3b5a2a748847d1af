"""Small random networks for the latency database: pieces that every vision encoder is made of, at random sizes.

They belong to no family of students and follow none: kinds of pieces, channels, sides and heads are drawn from broad ranges, so that a predictor
trained on them has seen every kind of operator of an architecture that it has not seen. `network(seed)` is always the same.
"""
from __future__ import annotations

import math
import random
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekd.models.blocks import LayerNorm2d

MOST_MACS = 1_500_000_000
"""of one network"""
ACTS: tuple[Callable[[], nn.Module], ...] = (nn.Identity, nn.ReLU, nn.GELU, lambda: nn.GELU(approximate="tanh"), nn.Hardswish, nn.SiLU, nn.ReLU6)


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same."""
        return x + self.inner(x)


class Gate(nn.Module):
    """Channels weighted by what their means say (squeeze and excite)."""

    def __init__(self, channels: int, hidden: int, act: Callable[[], nn.Module], gate: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Conv2d(channels, hidden, 1), act(), nn.Conv2d(hidden, channels, 1), gate())

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        return x * self.mlp(x.mean((2, 3), keepdim=True))


class Attention(nn.Module):
    """Attention over tokens, all of them or those of a window; `style` says how queries, keys and values are laid out, `bias` adds to the scores."""

    def __init__(self, channels: int, heads: int, width: int, style: int, window: int, bias: int) -> None:
        super().__init__()
        self.heads, self.width, self.style, self.window = heads, width, style, window
        self.norm, self.qkv, self.out = nn.LayerNorm(channels), nn.Linear(channels, 3 * heads * width), nn.Linear(heads * width, channels)
        self.bias = nn.Parameter(torch.randn(1, heads, bias, bias)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        b, c, h, w = x.shape
        k = self.window
        if k:
            tokens = x.permute(0, 2, 3, 1).reshape(b, h // k, k, w // k, k, c).transpose(2, 3).reshape(-1, k * k, c)
        else:
            tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self._mixed(self.norm(tokens))
        if k:
            return tokens.reshape(b, h // k, w // k, k, k, c).transpose(2, 3).reshape(b, h, w, c).permute(0, 3, 1, 2)
        return tokens.transpose(1, 2).reshape(b, c, h, w)

    def _mixed(self, tokens: Tensor) -> Tensor:
        n, t, _ = tokens.shape
        mixed = self.qkv(tokens)
        if self.style == 0:
            q, k, v = mixed.reshape(n, t, 3, self.heads, self.width).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.style == 1:
            q, k, v = (p.transpose(1, 2) for p in mixed.reshape(n, t, self.heads, 3 * self.width).split(self.width, dim=3))
        else:
            q, k, v = (p.reshape(n, t, self.heads, self.width).transpose(1, 2) for p in mixed.chunk(3, dim=-1))
        scores = (q * self.width ** -0.5) @ k.transpose(-2, -1)
        scores = (scores if self.bias is None else scores + self.bias).softmax(-1)
        return self.out((scores @ v).transpose(1, 2).reshape(n, t, -1))


class Kernelised(nn.Module):
    """Attention without softmax: products of mapped keys with values first, then divided by what the keys sum up to."""

    def __init__(self, channels: int, heads: int, width: int, twice: bool, normed: bool) -> None:
        super().__init__()
        self.heads, self.width, self.normed = heads, width, normed
        self.qkv = nn.Conv2d(channels, 3 * heads * width, 1)
        self.more = nn.Conv2d(3 * heads * width, 3 * heads * width, 1, groups=3 * heads) if twice else None
        self.out = nn.Conv2d((2 if twice else 1) * heads * width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        b, _, h, w = x.shape
        mixed = self.qkv(x)
        parts = mixed if self.more is None else torch.cat([mixed, self.more(mixed)], 1)
        q, k, v = parts.reshape(b, -1, 3 * self.width, h * w).chunk(3, dim=2)
        q, k = F.relu(q), F.relu(k)
        if self.normed:
            k = k / (k.mean(-1, keepdim=True).sum(2, keepdim=True) + 1e-6)
        state = v @ k.transpose(-1, -2)
        mean = k.sum(-1, keepdim=True)
        return x + self.out(((state @ q) / ((q * mean).sum(2, keepdim=True) + 1e-6)).reshape(b, -1, h, w))


class Mlp(nn.Module):
    """Norm and two layers, over tokens."""

    def __init__(self, channels: int, hidden: int, act: Callable[[], nn.Module], flat: bool) -> None:
        super().__init__()
        self.flat, self.inner = flat, nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, hidden), act(), nn.Linear(hidden, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        if self.flat:
            tokens = x.flatten(2).transpose(1, 2)
            return (tokens + self.inner(tokens)).transpose(1, 2).reshape(x.shape)
        tokens = x.permute(0, 2, 3, 1)
        return (tokens + self.inner(tokens)).permute(0, 3, 1, 2)


class Joined(nn.Module):
    """Two branches side by side."""

    def __init__(self, a: nn.Module, b: nn.Module) -> None:
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, the channels of both, ...)."""
        return torch.cat([self.a(x), self.b(x)], 1)


class Placed(nn.Module):
    """A constant is added, as position encodings are."""

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.randn(1, channels, side, side))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, S, S) -> the same shape."""
        return x + self.place


class Drawn:
    """Draws one network piece by piece and counts its work."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        photo = self.rng.random() < 0.2
        self.side = self.rng.choice((96, 128, 192, 224, 256, 320, 384, 512) if photo else (4, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96, 128))
        self.channels = 3 if photo else self.width(most=3e6 / self.side**2)
        self.start, self.macs = (1, self.channels, self.side, self.side), 0
        self.pieces: list[nn.Module] = []

    def width(self, least: int = 8, most: float = 1024) -> int:
        """Channels: log-uniform, mostly multiples of 8, some of 4 or anything."""
        value = 2 ** self.rng.uniform(3.5, max(4.0, min(10.5, math.log2(max(16, most)))))
        step = self.rng.choice((8, 8, 16, 16, 32, 4, 4, 1))
        return max(least, round(value / step) * step)

    def act(self) -> Callable[[], nn.Module]:
        return self.rng.choice(ACTS)

    def take(self, macs: float) -> bool:
        """Whether there is room for so much work; counts it if so."""
        if self.macs + macs > MOST_MACS:
            return False
        self.macs += int(macs)
        return True

    def conv(self) -> None:
        kernel, stride = self.rng.choice((1, 1, 1, 3, 3, 5, 7)), self.rng.choice((1, 1, 1, 2)) if self.side >= 8 else 1
        if self.rng.random() < 0.08 and self.side >= 64:
            kernel = stride = self.rng.choice((4, 8, 16))
        out = self.width(most=4 * self.channels if self.channels > 3 else 256)
        groups = self.channels if kernel in (3, 5, 7) and self.channels > 3 and self.rng.random() < 0.45 else 1
        if groups > 1:
            out = self.channels * self.rng.choice((1, 1, 1, 2))
        side = (self.side - 1) // stride + 1 if kernel != stride else self.side // kernel
        if self.take(side**2 * out * self.channels / groups * kernel**2):
            padding = 0 if kernel == stride else kernel // 2
            self.pieces += [nn.Conv2d(self.channels, out, kernel, stride, padding, groups=groups, bias=self.rng.random() < 0.7), self.act()()]
            self.channels, self.side = out, side

    def residual(self) -> None:
        c, hidden = self.channels, self.width(most=4 * self.channels)
        kind, act = self.rng.randrange(4), self.act()
        if kind == 0 and self.take(2 * 9 * c * c * self.side**2):
            inner = [nn.Conv2d(c, c, 3, 1, 1), act(), nn.Conv2d(c, c, 3, 1, 1)]
        elif kind == 1 and self.take((2 * hidden * c + 9 * hidden) * self.side**2):
            inner = [nn.Conv2d(c, hidden, 1), act(), nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden), act(), nn.Conv2d(hidden, c, 1)]
        elif kind == 2 and self.take((10 * hidden * c) * self.side**2):
            inner = [nn.Conv2d(c, hidden, 3, 1, 1), act(), nn.Conv2d(hidden, c, 1)]
        elif self.take(2 * hidden * c * self.side**2):
            inner = [nn.Conv2d(c, hidden, 1), act(), nn.Conv2d(hidden, c, 1)]
        else:
            return
        self.pieces += [Residual(nn.Sequential(*inner)), *([act()] if self.rng.random() < 0.3 else [])]

    def gate(self) -> None:
        self.pieces.append(Gate(self.channels, max(4, self.channels // self.rng.choice((2, 4, 8))), self.act(), self.rng.choice((nn.Sigmoid, nn.Hardsigmoid))))

    def attention(self) -> None:
        heads, width, c = self.rng.choice((1, 2, 3, 4, 5, 6, 8)), self.rng.choice((8, 16, 24, 32, 32, 48, 64, 64)), self.channels
        fitting = [k for k in (4, 6, 7, 8, 10, 14, 16) if self.side % k == 0 and self.side > k]
        window = self.rng.choice(fitting) if fitting and self.rng.random() < 0.5 else 0
        length = (window or self.side) ** 2
        if length <= 1600 and length > 8 and self.take(self.side**2 * (4 * c * heads * width + 2 * length * heads * width)):
            bias = length if self.rng.random() < 0.4 and length <= 1024 else 0
            self.pieces.append(Attention(c, heads, width, self.rng.randrange(3), window, bias))

    def kernelised(self) -> None:
        heads, width, c, twice = self.rng.choice((1, 2, 4, 6, 8, 12)), self.rng.choice((8, 16, 24, 32, 48)), self.channels, self.rng.random() < 0.5
        if self.take(self.side**2 * heads * width * (4 * c + 3 * width * 2 + 2 * width)):
            self.pieces.append(Kernelised(c, heads, width, twice, self.rng.random() < 0.5))

    def mlp(self) -> None:
        hidden = round(self.channels * self.rng.choice((1, 2, 3, 4)))
        if self.take(2 * hidden * self.channels * self.side**2):
            self.pieces.append(Mlp(self.channels, hidden, self.act(), self.rng.random() < 0.7))

    def resize(self) -> None:
        kind = self.rng.randrange(5)
        if kind == 0 and self.side <= 64:
            self.pieces.append(nn.Upsample(scale_factor=2, mode=self.rng.choice(("bilinear", "nearest"))))
            self.side *= 2
        elif kind == 1 and self.side <= 64 and self.take(9 * self.channels * min(256, self.channels) * self.side**2):
            out = min(256, self.channels)
            self.pieces += [nn.ConvTranspose2d(self.channels, out, *self.rng.choice(((2, 2), (3, 2, 1, 1)))), self.act()()]
            self.side, self.channels = self.side * 2, out
        elif kind == 2 and self.side >= 8 and not self.side % 2:
            self.pieces.append(self.rng.choice((nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2), nn.MaxPool2d(2))))
            self.side = self.side // 2
        elif kind == 3 and self.take(2 * self.channels * 64 * self.side**2):
            a, b = self.width(most=128), self.width(most=128)
            self.pieces.append(Joined(nn.Conv2d(self.channels, a, 1), nn.Conv2d(self.channels, b, 1)))
            self.channels = a + b
        else:
            self.pieces.append(Placed(self.channels, self.side))

    def norm(self) -> None:
        self.pieces += [LayerNorm2d(self.channels), *([self.act()()] if self.rng.random() < 0.3 else [])]


def network(seed: int) -> tuple[nn.Module, tuple[int, ...]]:
    """A module in eval mode and the shape of its only input."""
    drawn = Drawn(seed)
    draws = (drawn.conv, drawn.conv, drawn.residual, drawn.gate, drawn.attention, drawn.kernelised, drawn.mlp, drawn.resize, drawn.norm)
    if drawn.channels == 3:
        drawn.conv()
    drawn.conv()
    for _ in range(drawn.rng.randrange(4, 12)):
        drawn.rng.choice(draws)()
        if drawn.channels * drawn.side**2 > 4e6:  # a tensor of 16 MB: nothing small devices run has larger ones
            break
    torch.manual_seed(seed)
    return nn.Sequential(*drawn.pieces).eval(), drawn.start
