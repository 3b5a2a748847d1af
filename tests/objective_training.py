"""Tiny students and teachers with stages, attention or classes, and a real stage that trains one of them with an objective."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import plugin_samples
import torch
from torch import Tensor, nn

from edgekd.data.scenes import Scenes
from edgekd.distillation.batches import Batches, Source
from edgekd.distillation.cache import build_cache
from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.distillation.step import wanted
from edgekd.distillation.trainer import StageTrainer
from edgekd.models.sam import DecoderShape, Sam
from edgekd.models.sam_vit import SamVit, VitShape
from edgekd.protocols import Preprocess
from edgekd.recipe import Stage

SIDE, EMBED = 64, 32
SHAPE = DecoderShape(embed_dim=EMBED, heads=2, mlp_dim=32)
STEPS = 30


class Staged(nn.Module):
    """An encoder of three stages, 16 x 16, 8 x 8 and 4 x 4, and a neck."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = ((3, width, 4), (width, 2 * width, 2), (2 * width, 3 * width, 2))
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(a, b, s, s), nn.BatchNorm2d(b), nn.ReLU()) for a, b, s in sizes))
        self.neck = nn.Conv2d(3 * width, EMBED, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.neck(self.blocks(images))


def convolutional(seed: int, width: int) -> Sam:
    torch.manual_seed(seed)
    return Sam(f"stages{width}", Staged(width), SHAPE, Preprocess(SIDE))


def transformer(seed: int, width: int) -> Sam:
    torch.manual_seed(seed)
    encoder = SamVit(VitShape(SIDE, dim=width, depth=2, heads=width // 8, window=2, global_blocks=(1,), out=EMBED))
    nn.init.normal_(encoder.pos_embed, std=0.5)
    for block in encoder.blocks:  # attention that looks somewhere
        nn.init.normal_(block.attn.qkv.weight, std=0.4)  # type: ignore[union-attr,arg-type]
    return Sam(f"vit{width}", encoder, SHAPE, Preprocess(SIDE))


def classifier(seed: int, width: int) -> Any:
    return plugin_samples.Network(seed)


def train(make: Any, folder: Path, objectives: list[dict], run: int | None = None, **changes: object) -> tuple[StageTrainer, list[float]]:
    """The trainer after a stage of `STEPS` steps on six scenes, and the loss of every step; `run` stops it after so many, its state saved."""
    teacher, student = make(0, 24).eval().requires_grad_(False), make(1, 8)
    given = {"name": "test", "objectives": objectives, "trainable": ["encoder"], "steps": STEPS, "batch_size": 3, "lr": 5e-3, "warmup": 2, "precision": "fp32"}
    stage = Stage.model_validate(given | changes)
    scenes = Scenes(seed=4, count=6, size=SIDE)
    source = Source(scenes, build_cache(teacher, scenes, folder / "cache", outputs=wanted([stage], teacher)))
    trainer = StageTrainer(student, teacher, stage, Batches([source], student.preprocess, stage.batch_size, 0), folder / "state.pt")
    if run is None:
        return trainer, [row["loss"] for row in trainer.run().curve]
    trainer.set_modes()
    for _ in range(run):
        trainer.result.curve.append(trainer.train_step())
    trainer.save()
    return trainer, [row["loss"] for row in trainer.result.curve]


def falls(losses: list[float], by: float = 0.95) -> bool:
    """Whether the last steps are better than the first; every loss must be a number."""
    return bool(np.isfinite(losses).all() and np.mean(losses[-5:]) < by * np.mean(losses[:5]))


def everywhere(batch: int = 1, side: int = 8, **facts: Any) -> Context:
    """A context without padding."""
    return Context(torch.ones(batch, 1, side, side), generator=torch.Generator().manual_seed(0), **facts)


def left(batch: int = 1, side: int = 8, **facts: Any) -> Context:
    """A context whose right half is padding."""
    valid = torch.ones(batch, 1, side, side)
    valid[..., side // 2 :] = 0
    return Context(valid, generator=torch.Generator().manual_seed(0), **facts)


def bound(objective: Any, ours: Outputs, theirs: Outputs, context: Context | None = None) -> Any:
    """The objective, told what it will see."""
    torch.manual_seed(0)
    batch = next(len(t) for t in (*ours.feats, ours.embedding, ours.logits) if t is not None)
    objective.bind(Setup(nn.Identity(), None, plugin_samples.stage(), ours, theirs, context or everywhere(batch)))
    return objective


def feats(*maps: Tensor, **more: Tensor) -> Outputs:
    """Outputs with taps."""
    return Outputs(feats=maps, **more)
