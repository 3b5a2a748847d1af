"""A classifier small enough for tests, photos of a few classes, and a stage that distils one into another."""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgekd.distillation.batches import Batches, Source
from edgekd.distillation.cache import build_cache
from edgekd.distillation.outputs import Outputs, Setup
from edgekd.distillation.step import wanted
from edgekd.distillation.trainer import StageTrainer
from edgekd.protocols import Preprocess, Sample
from edgekd.recipe import Stage

CLASSES, SIDE, PHOTOS = 5, 64, 15


class Photos:
    """Blurred noise of a colour for each class; every third photo has no label where `some` is true."""

    def __init__(self, some: bool = False) -> None:
        self.name, self.skipped, self.some = "colours", list[str](), some
        self.has_masks, self.has_classes = False, True

    def __len__(self) -> int:
        return PHOTOS

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Sample:
        rng = np.random.default_rng(index)
        colour = np.random.default_rng(100 + index % CLASSES).integers(0, 255, (1, 1, 3))
        noise = rng.integers(0, 255, (4, 4, 3)).repeat(SIDE // 4, 0).repeat(SIDE // 4, 1)
        return Sample(f"{index}", (0.5 * colour + 0.5 * noise).astype(np.uint8), label=self.classes_of(index))

    def classes_of(self, index: int) -> int | None:
        return None if self.some and index % 3 == 0 else index % CLASSES

    def fingerprint(self) -> str:
        return f"colours-{self.some}"


class Classifier(nn.Module):
    """Three stages, a pooled feature of `width` numbers and a linear head. `sharp` scales the logits: a teacher that has an opinion."""

    def __init__(self, seed: int, width: int, sharp: float = 1.0, classes: int = CLASSES) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.name, self.preprocess, self.embed_dim = f"classifier{width}", Preprocess(SIDE), width
        self.encoder = nn.Module()
        self.encoder.blocks = nn.Sequential(nn.Sequential(nn.Conv2d(3, width, 4, 4), nn.ReLU()), nn.Sequential(nn.Conv2d(width, width, 2, 2), nn.ReLU()),
                                            nn.Conv2d(width, width, 2, 2))
        self.head = nn.Linear(width, classes)
        with torch.no_grad():
            self.head.weight.mul_(sharp)

    @property
    def parts(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder, "head": self.head}

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        embedding = self.encoder.blocks(images)  # type: ignore[operator]
        pooled = embedding.mean((2, 3))
        return {"embedding": embedding, "pooled": pooled, "logits": self.head(pooled)}


def trainer(folder: Path, objectives: list[dict], width: int = 8, photos: Photos | None = None, **changes: Any) -> StageTrainer:
    """A stage that distils a classifier of width 16 into one of another width, from its cache."""
    teacher, student = Classifier(0, 16, sharp=30.0).eval().requires_grad_(False), Classifier(1, width)
    stage = Stage.model_validate({"name": "classes", "objectives": objectives, "trainable": ["encoder", "head"], "steps": 40, "batch_size": 5, "lr": 1e-2,
                                  "warmup": 2, "precision": "fp32"} | changes)
    data = photos or Photos()
    cache = build_cache(teacher, data, folder / "cache", outputs=wanted([stage], teacher))  # type: ignore[arg-type]
    source = Source(data, cache)  # type: ignore[arg-type]
    return StageTrainer(student, teacher, stage, Batches([source], student.preprocess, stage.batch_size, 0), folder / "state.pt")


def fall(one: StageTrainer) -> float:
    """Mean loss of the last five steps in units of that of the first five."""
    losses = [row["loss"] for row in one.run().curve]
    assert len(losses) == one.stage.steps and np.isfinite(losses).all() and one.result.bad_steps == 0
    return float(np.mean(losses[-5:]) / np.mean(losses[:5]))


def outputs(**named: Tensor) -> Outputs:
    """Outputs of given tensors, `feats` as one."""
    feats = named.pop("feats", None)
    return Outputs(**named, feats=() if feats is None else (feats,))  # type: ignore[arg-type]


def bind(objective: Any, ours: Outputs, theirs: Outputs, context: Any, teacher: Any = None, **stage: Any) -> Any:
    """The plug-in, bound to these outputs with a seed of its own."""
    settings: Mapping[str, Any] = {"name": "test", "steps": 10, "batch_size": 8, "objectives": [{"name": "kd"}]} | stage
    torch.manual_seed(0)
    objective.bind(Setup(Classifier(1, 8), teacher, Stage.model_validate(settings), ours, theirs, context))
    return objective


def without_labels(context: Any) -> Any:
    """The same context of photos that nobody labelled."""
    return replace(context, classes=None)
