"""A promptable model small enough for tests: every layer kind of the real ones, folding included, and trained-looking masks."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgekd.artifact import ArtifactComponent, Manifest, PreprocessSpec, describe_files
from edgekd.artifact import Tensor as Described
from edgekd.models.blocks import LayerNorm2d
from edgekd.models.fold import fold
from edgekd.models.sam import DecoderShape, Sam
from edgekd.protocols import Component, Preprocess

SIZE, WIDTH = 64, 32


class ConvBn(nn.Module):
    """Convolution and batch norm that fold into one convolution."""

    def __init__(self, a: int, b: int, stride: int = 1) -> None:
        super().__init__()
        self.c, self.bn = nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b)
        with torch.no_grad():
            self.bn.running_mean.normal_(0, 0.1)
            self.bn.running_var.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.c(x))

    def fold(self) -> nn.Module:
        scale = self.bn.weight / (self.bn.running_var + self.bn.eps).sqrt()
        out = nn.Conv2d(self.c.in_channels, self.c.out_channels, 3, self.c.stride, 1)
        with torch.no_grad():
            out.weight.copy_(self.c.weight * scale[:, None, None, None])
            assert out.bias is not None
            out.bias.copy_(self.bn.bias - self.bn.running_mean * scale)
        return out


class Encoder(nn.Module):
    """(B, 3, S, S) -> (B, WIDTH, S/16, S/16), with squeeze-and-excitation and a two-layer neck."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(ConvBn(3, 8, 2), nn.GELU(), ConvBn(8, 16, 2), nn.GELU(), ConvBn(16, 16, 2), nn.GELU(), ConvBn(16, 32, 2))
        self.squeeze, self.excite = nn.Conv2d(32, 8, 1), nn.Conv2d(8, 32, 1)
        self.neck, self.norm = nn.Conv2d(32, WIDTH, 1, bias=False), LayerNorm2d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x * torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.norm(self.neck(x))


def tiny_sam(seed: int = 0) -> Sam:
    """A seeded Sam of 64 px and width 32."""
    torch.manual_seed(seed)
    return Sam("tiny", Encoder(), DecoderShape(embed_dim=WIDTH, heads=4, mlp_dim=64, mask_channels=8), Preprocess(SIZE)).eval()


def linear_component(inner: int = 8) -> Component:
    """A component of MatMuls with a free batch axis: quick to export where the real decoder's shape does not matter."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(inner, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    return Component("head", module, {"x": torch.randn(3, inner)}, ("y",), {"x": {0: "rows"}})


def conv_component() -> Component:
    """A component of convolutions only."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    return Component("encoder", module, {"images": torch.randn(1, 3, 16, 16)}, ("image_embeddings",))


def samples(component: Component, count: int = 4, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Random inputs shaped like the component's example."""
    rng = np.random.default_rng(seed)
    return [{k: rng.standard_normal(tuple(v.shape)).astype(np.float32) for k, v in component.example.items()} for _ in range(count)]


def expected(component: Component, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    """What torch computes."""
    with torch.no_grad():
        out = component.module(*(torch.from_numpy(inputs[k]) for k in component.example))
    return [o.numpy() for o in (out if isinstance(out, tuple) else (out,))]


def fake_artifact(folder: Path, **changed: Any) -> Manifest:
    """An artifact folder whose files hold no model: enough for manifests, hashes and sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "encoder.onnx").write_bytes(b"encoder" * 100)
    (folder / "decoder.onnx").write_bytes(b"decoder" * 10)
    x, y = Described(name="x", dtype="float32", shape=["P", 2]), Described(name="y", dtype="float32", shape=["P"])
    parts = {n: ArtifactComponent(file=f"{n}.onnx", files=[f"{n}.onnx"], inputs=[x], outputs=[y], scheme="fp32", executed_precision="fp32",
                                  executed_ops={"Conv": 3}, parity={"mask_iou": 1.0}) for n in ("encoder", "decoder")}
    values: dict[str, Any] = dict(
        id="tiny-64-onnx-fp32", student="tiny", image_size=64, embed_dim=32, format="onnx", scheme="fp32", components=parts,
        preprocess=PreprocessSpec(image_size=64, mean=(1, 2, 3), std=(4, 5, 6)), files=describe_files(folder, ["encoder.onnx", "decoder.onnx"]),
        created="2026-01-01T00:00:00+00:00", checked="nothing: a fixture")
    manifest = Manifest(**(values | changed))
    manifest.save(folder)
    return manifest


def bf16_steps_learn(encoder: nn.Module) -> None:
    """Twelve training steps as the engine makes them (bf16 autocast, channels_last) bring the loss down and leave the weights in fp32."""
    encoder = encoder.train().to(memory_format=torch.channels_last)
    images = torch.randn(4, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    wanted = torch.randn(4, 32, 4, 4)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        with torch.autocast("cpu", torch.bfloat16):
            out = encoder(images)
        loss = (out.float() - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] * 0.9
    assert all(p.dtype == torch.float32 for p in encoder.parameters())


def onnx_gap(encoder: nn.Module, images: Tensor, folder: Path) -> float:
    """Largest difference between an encoder, folded and exported, and itself. images (B, 3, S, S)."""
    from edgekd.export.onnx import exporter

    path = folder / "encoder.onnx"
    exporter.export(Component("encoder", fold(encoder.eval()), {"images": images}, ("image_embeddings",)), path, scheme="fp32")
    got = exporter.open(path, scheme="fp32").run({"images": images.numpy()})["image_embeddings"]
    with torch.no_grad():
        return float(np.abs(got - encoder(images).numpy()).max())


def unreached(encoder: nn.Module, side: int) -> list[str]:
    """Parameters that get no gradient, or zeros only, from a random loss on two images of `side` pixels; what they get must be finite."""
    for m in encoder.train().modules():  # a zero residual scale would hide what lies before it
        if isinstance(m, nn.BatchNorm2d):
            nn.init.ones_(m.weight)
    out = encoder(torch.randn(2, 3, side, side))
    (out * torch.randn(out.shape)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in encoder.parameters() if p.grad is not None)
    return [n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
