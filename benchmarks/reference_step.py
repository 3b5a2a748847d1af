"""A distillation step as EdgeSAM's public training code takes it, written anew: what `benchmarks/distill.py` compares with.

Read in chongzhou96/EdgeSAM at b53372c, `training/`: fp32, NCHW. Every step opens its photos (JPEG decoded by Pillow, resized with
antialiasing, normalised and padded in torch), their annotations (JSON) and the teacher's embeddings (raw fp16 in one file). Blocks keep their
branches. In the second phase the decoders see every prompt with an image of its own, all images in one call (its `MaskDecoderBatch`);
attention is written out; the click into the wrong region is drawn mask by mask in a Python loop, and absent below 10 wrong pixels. AdamW
is torch's default, which on a CPU goes parameter by parameter.

Left out because a CPU run of one process needs none of it: workers of the loader, the distributed wrapper, the gradient scaler (off there).
Different: the four masks of a click are weighed as edgekd does (the first counts 1, the others 1/3 each), so that losses compare.
"""
from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from edgekd.models.prompt_encoder import DecoderShape, PromptEncoder
from edgekd.models.repvit import RepViTConfig
from edgekd.models.sam import NUM_MASKS, Attention, MaskDecoder, Sam

MEAN, STD = torch.tensor([123.675, 116.28, 103.53])[:, None, None], torch.tensor([58.395, 57.12, 57.375])[:, None, None]
FEWEST, IGNORED = 10, -2
Prompts = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Points (P, N, 2), their labels (P, N) and boxes (P, 4)."""


# --- the encoder ---------------------------------------------------------------------------------------------------------


def conv_norm(a: int, b: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution and its batch norm."""
    return nn.Sequential(OrderedDict(c=nn.Conv2d(a, b, kernel, stride, kernel // 2, groups=groups, bias=False), bn=nn.BatchNorm2d(b)))


class Branches(nn.Module):
    """3 x 3 depthwise + 1 x 1 depthwise + identity, each convolution with a norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.conv1 = conv_norm(channels, channels, 3, groups=channels), conv_norm(channels, channels, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same shape."""
        return self.conv(x) + self.conv1(x) + x


class Gate(nn.Module):
    """Squeeze-excite as in timm."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same shape."""
        return x * self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)), inplace=True)).sigmoid()


class Plus(nn.Module):
    """x + m(x)."""

    def __init__(self, m: nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same shape."""
        return x + self.m(x)


class Norm(nn.Module):
    """Layer norm over channels, as means and squares."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same shape."""
        mean = x.mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt((x - mean).pow(2).mean(1, keepdim=True) + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class Encoder(nn.Module):
    """RepViT-M1 with its last stages fused; parameters are named as in edgekd."""

    def __init__(self, config: RepViTConfig, embed: int = 256) -> None:
        super().__init__()
        first, before = config.widths[0], config.widths[0]
        blocks = [nn.Sequential(conv_norm(3, first // 2, 3, 2), nn.GELU(), conv_norm(first // 2, first, 3, 2))]
        for number, (width, depth) in enumerate(zip(config.widths, config.depths, strict=True)):
            if number:
                blocks.append(self._block([conv_norm(before, before, 3, 2, before), nn.Identity(), conv_norm(before, width)], width))
            for i in range(depth):
                gate = Gate(width, max(8, int(width / 4 + 4) // 8 * 8)) if i % 2 == 0 and not (depth >= 3 and i == depth - 1) else nn.Identity()
                blocks.append(self._block([Branches(width), gate], width))
            before = width
        self.features, self.tap = nn.ModuleList(blocks), len(blocks) - 2 - config.depths[3]
        self.fuse_stage2, self.fuse_stage3 = (nn.Conv2d(c, embed, 1, bias=False) for c in config.widths[2:])
        self.neck = nn.Sequential(nn.Conv2d(embed, embed, 1, bias=False), Norm(embed), nn.Conv2d(embed, embed, 3, padding=1, bias=False), Norm(embed))

    @staticmethod
    def _block(mixer: list[nn.Module], width: int) -> nn.Sequential:
        inner = nn.Sequential(conv_norm(width, 2 * width), nn.GELU(), conv_norm(2 * width, width))
        return nn.Sequential(OrderedDict(token_mixer=nn.Sequential(*mixer), channel_mixer=Plus(inner)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, E, S/16, S/16)."""
        shallow = x
        for number, block in enumerate(self.features):
            x = block(x)
            shallow = x if number == self.tap else shallow
        deep = F.interpolate(self.fuse_stage3(x), scale_factor=2.0, mode="bicubic", align_corners=False)
        return self.neck(self.fuse_stage2(shallow) + deep)


# --- prompts and masks ---------------------------------------------------------------------------------------------------


def embed_prompts(encoder: PromptEncoder, prompts: Prompts) -> Tensor:
    """Tokens (P, N, E): points, a padding point where there is no box, then boxes."""
    points, labels, boxes = prompts
    tokens, e = [], encoder.point_embeddings
    if points is not None and labels is not None:
        if boxes is None:
            points = torch.cat([points, torch.zeros(len(points), 1, 2)], 1)
            labels = torch.cat([labels, -torch.ones(len(labels), 1)], 1)
        found = encoder.pe_layer((points + 0.5) / encoder.side)
        found[labels == -1] = 0.0
        found[labels == -1] += encoder.not_a_point_embed.weight
        found[labels == 0] += e[0].weight  # type: ignore[operator]
        found[labels == 1] += e[1].weight  # type: ignore[operator]
        found[labels == IGNORED] = 0.0
        tokens.append(found)
    if boxes is not None:
        corners = encoder.pe_layer((boxes.reshape(-1, 2, 2) + 0.5) / encoder.side)
        corners[:, 0] += e[2].weight[0]  # type: ignore[index, operator]
        corners[:, 1] += e[3].weight[0]  # type: ignore[index, operator]
        tokens.append(corners)
    return torch.cat(tokens, 1)


def attend(a: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention written out."""
    q, k, v = (x.unflatten(-1, (a.heads, -1)).transpose(1, 2) for x in (a.q_proj(q), a.k_proj(k), a.v_proj(v)))
    weights = torch.softmax(q @ k.transpose(2, 3) / q.shape[-1] ** 0.5, dim=-1)
    return a.out_proj((weights @ v).transpose(1, 2).flatten(2))


class Decoder(MaskDecoder):
    """SAM's mask decoder with every prompt's image on its own; the parameters are edgekd's."""

    def predict(self, embedding: Tensor, encoder: PromptEncoder, tokens: Tensor, prompts: Sequence[int], masks: int) -> tuple[Tensor, Tensor]:
        """embedding (B, E, s, s), tokens (P, N, E), the number of prompts of each image -> mask logits (P, masks, 4s, 4s), IoU (P, masks)."""
        total, side = sum(prompts), embedding.shape[-1]
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight]).expand(total, -1, -1)
        code = torch.cat([own, tokens], 1)
        source = torch.cat([one[None].expand(n, -1, -1, -1) for one, n in zip(embedding, prompts, strict=True)])
        source = source + encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(total, -1, side, side)
        image = source.flatten(2).permute(0, 2, 1)
        place = encoder.pe_layer.grid(side, side).expand(total, -1, -1)
        queries = code
        for layer in self.transformer.layers:
            queries, image = self._layer(layer, queries, image, code, place)
        last = self.transformer.final_attn_token_to_image
        queries = self.transformer.norm_final_attn(queries + attend(last, queries + code, image + place, image))
        up = image.transpose(1, 2).reshape(total, -1, side, side)
        for step in self.output_upscaling:
            up = plain_norm(step, up) if hasattr(step, "eps") else step(up)
        hyper = torch.stack([mlp(queries[:, 1 + i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)], 1)
        found = (hyper @ up.flatten(2)).reshape(total, NUM_MASKS, 4 * side, 4 * side)
        return found[:, :masks], self.iou_prediction_head(queries[:, 0])[:, :masks]

    @staticmethod
    def _layer(layer: nn.Module, queries: Tensor, image: Tensor, code: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        if layer.first:
            queries = attend(layer.self_attn, queries, queries, queries)  # type: ignore[arg-type]
        else:
            queries = queries + attend(layer.self_attn, queries + code, queries + code, queries)  # type: ignore[arg-type]
        queries = layer.norm1(queries)  # type: ignore[operator]
        queries = layer.norm2(queries + attend(layer.cross_attn_token_to_image, queries + code, image + place, image))  # type: ignore[operator, arg-type]
        queries = layer.norm3(queries + layer.mlp(queries))  # type: ignore[operator]
        return queries, layer.norm4(image + attend(layer.cross_attn_image_to_token, image + place, queries + code, queries))  # type: ignore[operator, arg-type]


def plain_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """edgekd's layer norm over channels, as means and squares."""
    mean = x.mean(1, keepdim=True)
    x = (x - mean) / torch.sqrt((x - mean).pow(2).mean(1, keepdim=True) + norm.eps)  # type: ignore[operator]
    return norm.weight[:, None, None] * x + norm.bias[:, None, None]  # type: ignore[index, operator]


def error_clicks(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """A click into the wrong part of each mask, mask by mask: ours, theirs (P, h, w) 0/1 -> xy (P, 1, 2) of a cell, labels (P, 1)."""
    wrong_ones, missed = (ours != theirs) * (theirs == 0), (ours != theirs) * (theirs == 1)
    wrong = wrong_ones | missed
    kind = torch.full_like(ours, IGNORED, dtype=torch.int32)
    kind[wrong_ones], kind[missed] = 0, 1
    height, width = ours.shape[-2:]
    grid = torch.stack([torch.arange(width)[None].expand(height, width), torch.arange(height)[:, None].expand(height, width)], -1)
    points, labels = [], []
    for region, named in zip(wrong, kind, strict=True):
        if region.sum() < FEWEST:
            points.append(torch.zeros(1, 2))
            labels.append(torch.full((1,), float(IGNORED)))
        else:
            candidates, answers = grid[region], named[region]
            chosen = torch.randint(len(candidates), (1,))
            points.append(candidates[chosen])
            labels.append(answers[chosen])
    return torch.stack(points), torch.stack(labels)


def mask_losses(logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """5 BCE + 5 dice of each mask: (P, M, h, w) -> (P, M)."""
    p = logits.sigmoid()
    inside = valid.flatten(2)
    bce = (F.binary_cross_entropy(p, target, reduction="none").flatten(2) * inside).sum(-1) / inside.sum(-1)
    p, t = p.flatten(2) * inside, target.flatten(2) * inside
    return 5 * bce + 5 * (1 - (2 * (p * t).sum(-1) + 1) / (p.sum(-1) + t.sum(-1) + 1))


# --- the step ------------------------------------------------------------------------------------------------------------


@dataclass
class Files:
    """What the step reads: JPEGs with annotations (boxes xywh and a point each, in the photo), and the embeddings one after the other."""

    photos: list[Path]
    annotations: list[Path]
    embeddings: Path
    shape: tuple[int, int, int]

    def read(self, index: int, size: int, most: int) -> tuple[Tensor, Tensor, tuple[int, int], Tensor, Tensor]:
        """Photo (3, S, S), embedding (E, s, s), height and width before padding, and at most `most` instances: boxes (P, 4), points (P, 1, 2)."""
        pixels = torch.from_numpy(np.array(Image.open(self.photos[index]).convert("RGB"))).permute(2, 0, 1).contiguous()
        height, width = pixels.shape[1:]
        scale = size / max(height, width)
        new = int(height * scale + 0.5), int(width * scale + 0.5)
        small = F.interpolate(pixels[None].float(), new, mode="bilinear", align_corners=False, antialias=True)[0]
        image = F.pad((small - MEAN) / STD, (0, size - new[1], 0, size - new[0]))
        records = json.loads(self.annotations[index].read_text())["annotations"]
        ratio = torch.tensor([new[1] / width, new[0] / height])
        boxes = torch.tensor([r["bbox"] for r in records]) * ratio.repeat(2)
        points = torch.tensor([r["point_coords"] for r in records]) * ratio
        chosen = torch.randint(len(boxes), (most,)) if len(boxes) > most else torch.arange(len(boxes))
        boxes = torch.cat([boxes[chosen, :2], boxes[chosen, :2] + boxes[chosen, 2:]], 1)
        count = int(np.prod(self.shape))
        with open(self.embeddings, "rb") as file:
            file.seek((count * 2 + 4) * index)
            raw = file.read(count * 2 + 4)
        embedding = torch.from_numpy(np.frombuffer(raw[4:], np.float16).copy()).view(self.shape)
        return image, embedding.float(), new, boxes, points[chosen]


class ReferenceStep:
    """The trainer: `step(indices)` is one optimizer step over these photos.

    Args:
        student: where the weights come from; it is not touched.
        prompts: instances a photo; 0 is the first phase.
    """

    def __init__(self, student: Sam, teacher: Sam, config: RepViTConfig, files: Files, *, lr: float, weight_decay: float, clip: float, prompts: int = 0) -> None:
        self.files, self.size, self.clip, self.prompts = files, student.preprocess.image_size, clip, prompts
        self.encoder = Encoder(config, student.embed_dim)
        self.encoder.load_state_dict(student.encoder.state_dict())
        self.decoder, self.teacher = self._decoder(student), self._decoder(teacher).requires_grad_(False)
        self.prompt_encoders = student.prompt_encoder, teacher.prompt_encoder
        named = [*self.encoder.named_parameters(), *(self.decoder.named_parameters() if prompts else ())]
        self.parameters = [p for _, p in named]
        plain = [p for name, p in named if p.ndim == 1 or name.endswith(".bias")]
        groups: list[dict[str, Any]] = [{"params": [p for p in self.parameters if all(p is not q for q in plain)]}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay)

    @staticmethod
    def _decoder(model: Sam) -> Decoder:
        made = Decoder(model.shape if isinstance(model.shape, DecoderShape) else DecoderShape())
        made.load_state_dict(model.mask_decoder.state_dict())
        return made

    def step(self, indices: Sequence[int], given: Sequence[Prompts] = ()) -> float:
        """The loss. `given`: prompts of every decode, instead of those of the annotations and drawn clicks."""
        self.encoder.train()
        rows = [self.files.read(i, self.size, max(1, self.prompts)) for i in indices]
        images, theirs = torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows])
        ours = self.encoder(images)
        loss = self._masks(ours, theirs, rows, given) if self.prompts else self._embedding(ours, theirs, rows)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def _embedding(self, ours: Tensor, theirs: Tensor, rows: Sequence[tuple]) -> Tensor:
        error = F.mse_loss(ours, theirs, reduction="none")
        inside = (F.interpolate(self._valid(rows, [1] * len(rows), 1), ours.shape[-2:], mode="bilinear", align_corners=False) > 0.5).flatten(2)
        return ((error.flatten(2) * inside).mean(1).sum(-1) / inside.flatten(1).sum(-1)).mean()

    def _valid(self, rows: Sequence[tuple], counts: Sequence[int], masks: int) -> Tensor:
        valid = torch.zeros(len(rows), masks, self.size, self.size)
        for one, row in zip(valid, rows, strict=True):
            one[:, : row[2][0], : row[2][1]] = 1
        return torch.cat([one[None].expand(n, -1, -1, -1) for one, n in zip(valid, counts, strict=True)])

    def _masks(self, ours: Tensor, theirs: Tensor, rows: Sequence[tuple], given: Sequence[Prompts]) -> Tensor:
        boxes = torch.cat([r[3] for r in rows])
        points = torch.cat([r[4] for r in rows])
        as_box = bool(torch.rand(1) > 0.5)
        prompts: Prompts = (None, None, boxes) if as_box else (points, torch.ones(points.shape[:2]), None)
        if given:
            prompts, as_box = given[0], given[0][2] is not None
        first = prompts[2] if as_box else prompts[0]
        assert first is not None
        counts = [len(first) // len(rows)] * len(rows) if given else [len(r[3]) for r in rows]
        masks = 1 if as_box else NUM_MASKS
        valid, total = self._valid(rows, counts, masks), torch.zeros(())
        weights = torch.ones(1) if as_box else torch.tensor([1.0, *[1 / (NUM_MASKS - 1)] * (NUM_MASKS - 1)])
        found = wanted = quality = torch.zeros(0)
        for round_ in range(2):
            if round_:
                prompts = given[1] if given else self._corrected(prompts, found, wanted, quality, valid)
            found, _ = self.decoder.predict(ours, self.prompt_encoders[0], embed_prompts(self.prompt_encoders[0], prompts), counts, masks)
            with torch.no_grad():
                wanted, quality = self.teacher.predict(theirs, self.prompt_encoders[1], embed_prompts(self.prompt_encoders[1], prompts), counts, masks)
            inside = F.interpolate(valid, found.shape[-2:], mode="bilinear", align_corners=False)
            total = total + (mask_losses(found, (wanted > 0).float(), inside) * weights).sum(1).mean() / 2
        return total

    def _corrected(self, prompts: Prompts, found: Tensor, wanted: Tensor, quality: Tensor, valid: Tensor) -> Prompts:
        with torch.no_grad():
            inside = F.interpolate(valid, found.shape[-2:], mode="bilinear", align_corners=False)
            ours, theirs = (found.detach() > 0) * inside, (wanted > 0) * inside
            best, every = quality.argmax(1), torch.arange(len(ours))
            point, label = error_clicks(ours[every, best], theirs[every, best])
            point = point / ours.shape[-1] * self.size
        points, labels, boxes = prompts
        if points is not None and labels is not None:
            point, label = torch.cat([points, point], 1), torch.cat([labels, label], 1)
        return point, label.float(), boxes
