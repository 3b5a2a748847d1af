"""Training a promptable teacher from labelled masks, as SAM was (arXiv 2304.02643, App. A), on a scale two cores can carry.

What differs from the paper, and why: BCE instead of focal loss (focal gave empty masks at this scale), 3 decodes instead of 11,
and an auxiliary loss that pulls the embeddings of pixels of one instance together (a dense gradient; its layer is not kept).
"""
from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.distillation.clicks import error_click, first_prompts
from edgekd.distillation.labelled import LabelledBatch, batches
from edgekd.distillation.losses import bce, dice, iou
from edgekd.models.sam import Sam
from edgekd.workspace import atomic_path

SHARE_MASK_FEEDBACK, SHARE_BOX = 0.25, 0.5


class Affinity(nn.Module):
    """Pixels of the same instance should have like embeddings, others not: a training-only head on the image embedding."""

    def __init__(self, embed_dim: int, width: int = 12) -> None:
        super().__init__()
        self.head = nn.Conv2d(embed_dim, 16 * width, 1)
        self.scale = nn.Parameter(torch.tensor(5.0))
        self.shift = nn.Parameter(torch.tensor(0.0))

    def forward(self, embedding: Tensor, labels: Tensor, generator: torch.Generator, points: int = 192) -> Tensor:
        """embedding (B, E, s, s), labels (B, S, S) -> scalar: BCE over pairs of random pixels."""
        fine = F.normalize(F.pixel_shuffle(self.head(embedding), 4).float(), dim=1).flatten(2)
        at = torch.randint(fine.shape[-1], (points,), generator=generator)
        ids = labels[:, 2::4, 2::4].flatten(1)[:, at].long()
        vectors = fine[:, :, at]
        logit = self.scale * (vectors.transpose(1, 2) @ vectors) + self.shift
        same = (ids[:, :, None] == ids[:, None, :]).float()
        known = ((ids >= 0)[:, :, None] & (ids >= 0)[:, None, :]).float()
        return (F.binary_cross_entropy_with_logits(logit, same, reduction="none") * known).sum() / known.sum().clamp(min=1)


def mask_losses(logits: Tensor, quality: Tensor, target: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """logits (P, 4, h, w), predicted IoU (P, 4), target (P, h, w) share of the cell that is inside, valid (P, h, w)
    -> loss (P,), true IoU (P, 4). Mask 0 always learns; of the three alternatives only the best one does (SAM's rule)."""
    each = 2 * bce(logits, target.unsqueeze(1).expand_as(logits), valid.unsqueeze(1)) + dice(logits, target.unsqueeze(1), valid.unsqueeze(1))
    true = iou((logits > 0) & (valid.unsqueeze(1) > 0), (target > 0.5).unsqueeze(1)).detach()
    iou_loss = (quality - true).square().mean(1)
    best = each[:, 1:].min(1).values
    return each[:, 0] + best + 0.05 * each[:, 1:].mean(1) + 0.5 * iou_loss, true


def prompt_rounds(model: Sam, embedding: Tensor, batch: LabelledBatch, rounds: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One first prompt and `rounds` corrective clicks: mean loss, IoU of mask 0 after each decode (rounds + 1,)."""
    target = F.avg_pool2d(batch.masks.float().unsqueeze(1), 4).squeeze(1)
    low = target > 0.5
    valid = batch.valid.squeeze(1).repeat_interleave(len(target) // len(batch.images), 0)
    points, labels = first_prompts(batch.masks, low | (target >= target.amax((1, 2), keepdim=True)), SHARE_BOX, generator)
    mask_input = has_mask = None
    losses, scores = [], []
    for round_ in range(rounds + 1):
        logits, quality = model.decode(embedding, points, labels, mask_input, has_mask)
        logits, quality = logits.float(), quality.float()
        loss, true = mask_losses(logits, quality, target, valid)
        losses.append(loss.mean())
        scores.append(true[:, 0].mean())
        if round_ == rounds:
            break
        with torch.no_grad():
            chosen = logits[torch.arange(len(logits)), quality.argmax(1)]
            # drawn among pixels, not cells of the logits: what is left to correct is often a thin border
            fine = F.interpolate(logits[:, :1], batch.masks.shape[-2:], mode="bilinear", align_corners=False).squeeze(1) > 0
            inside = (batch.labels >= 0).repeat_interleave(len(fine) // len(batch.labels), 0)
            click, label = error_click(fine, batch.masks, inside, generator, side=1)
            points, labels = torch.cat([points, click], 1), torch.cat([labels, label], 1)
            mask_input = chosen.unsqueeze(1).clamp(-20, 20)
            has_mask = (torch.rand(len(chosen), generator=generator) < SHARE_MASK_FEEDBACK).float()
    return torch.stack(losses).mean(), torch.stack(scores)


def learning_rate(step: int, steps: int, warmup: int, decay: float) -> float:
    """Share of the peak: linear warm-up, constant, then linear to 1 % over the last `decay` share of the run (WSD schedule)."""
    if step < warmup:
        return (step + 1) / warmup
    left = (steps - step) / max(1.0, decay * steps)
    return max(0.01, min(1.0, left))


def parameter_groups(model: nn.Module, weight_decay: float, trunk_lr: float) -> list[dict[str, Any]]:
    """No weight decay on vectors; the pretrained trunk learns `trunk_lr` times as fast as the rest."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups.setdefault(("trunk" in name, p.ndim < 2), []).append(p)
    return [
        {"params": ps, "weight_decay": 0.0 if flat else weight_decay, "scale": trunk_lr if trunk else 1.0} for (trunk, flat), ps in groups.items()
    ]


class SupervisedTrainer:
    """State of one run: model, its average, optimizer and step; `run` continues from the last checkpoint in `folder`."""

    def __init__(self, model: Sam, config: Any, sources: list, weights: list[float], folder: Path) -> None:
        self.model, self.config, self.sources, self.weights, self.folder = model, config, sources, weights, Path(folder)
        self.affinity = Affinity(model.embed_dim)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(config.trunk_lr > 0 or ".trunk." not in name)
        everything = nn.ModuleList([model, self.affinity])
        self.optimizer = torch.optim.AdamW(parameter_groups(everything, config.weight_decay, config.trunk_lr), lr=config.lr, betas=(0.9, 0.98), fused=True)
        self.average = {k: v.detach().clone() for k, v in model.state_dict().items()}
        self.step = 0
        self.resume()

    @property
    def checkpoint(self) -> Path:
        return self.folder / "train.pt"

    def resume(self) -> None:
        """Take up the last checkpoint, if there is one."""
        if self.checkpoint.exists():
            state = torch.load(self.checkpoint, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.affinity.load_state_dict(state["affinity"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average, self.step = state["average"], state["step"]

    def save(self) -> None:
        """Write everything needed to go on, atomically."""
        state = {"model": self.model.state_dict(), "affinity": self.affinity.state_dict(), "optimizer": self.optimizer.state_dict(),
                 "average": self.average, "step": self.step}
        with atomic_path(self.checkpoint) as temp:
            torch.save(state, temp)

    def train_step(self, batch: LabelledBatch, step: int) -> dict[str, float]:
        """One optimizer step; returns what goes into the log."""
        c = self.config
        generator = torch.Generator().manual_seed(c.seed * 7_919 + step)
        rate = learning_rate(step, c.steps, c.warmup, c.decay)
        for group in self.optimizer.param_groups:
            group["lr"] = c.lr * rate * group["scale"]
        rounds = int(torch.randint(0, c.max_clicks + 1, (1,), generator=generator))
        with torch.autocast("cpu", torch.bfloat16, enabled=c.bf16):
            embedding = self.model.embed(batch.images.contiguous(memory_format=torch.channels_last))
            loss, scores = prompt_rounds(self.model, embedding, batch, rounds, generator)
            affinity = self.affinity(embedding, batch.labels, generator)
        total = loss + c.affinity * affinity
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), c.clip))
        if not math.isfinite(norm):
            return {"step": step, "skipped": 1.0}
        self.optimizer.step()
        self.update_average(min(c.ema, (step + 1) / (step + 20)))
        return {"step": step, "loss": float(loss.detach()), "affinity": float(affinity.detach()), "iou_first": float(scores[0]), "iou_last": float(scores[-1]),
                "clicks": rounds, "norm": norm, "lr": c.lr * rate}

    def update_average(self, keep: float) -> None:
        """Exponential moving average of the weights."""
        state = self.model.state_dict()
        for k, v in self.average.items():
            if v.is_floating_point():
                v.lerp_(state[k], 1 - keep)

    def run(self, on_step: Callable[[dict[str, float]], None] | None = None) -> None:
        """Train up to `config.steps`, logging to `log.jsonl`."""
        c = self.config
        self.model.train()
        work = batches(self.sources, self.weights, self.model.preprocess, batch_size=c.batch_size, prompts=c.instances, seed=c.seed,
                       first=self.step, last=c.steps, workers=c.workers)
        with open(self.folder / "log.jsonl", "a") as log:
            start = time.time()
            for step, batch in work:
                row = self.train_step(batch, step)
                self.step = step + 1
                row["seconds"] = round(time.time() - start, 1)
                log.write(json.dumps(row) + "\n")
                log.flush()
                if on_step:
                    on_step(row)
                if self.step % c.checkpoint_every == 0 or self.step == c.steps:
                    self.save()
