"""Give a finished model a box proposer: it labels photos with its own masks of everything, and the proposer learns their boxes.

The model is frozen and each photo is embedded once (and once mirrored), so that a step costs a few small convolutions: minutes on a CPU.
"""
from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgekd.data.images import Frame
from edgekd.data.prompts import boxes_from_masks
from edgekd.distillation.objectives.box_proposals import BoxProposals, iou_and_giou
from edgekd.distillation.outputs import Context, Outputs
from edgekd.distillation.schedule import cosine
from edgekd.errors import EdgekdError
from edgekd.models.proposer import BoxProposer
from edgekd.models.sam import Sam
from edgekd.protocols import Dataset, Sample
from edgekd.tasks.promptable.everything import Settings, everything
from edgekd.tasks.promptable.predictor import ModelPredictor


@dataclass(frozen=True)
class Plan:
    """How to train. `labels` is what the model's own masks have to pass; with `truth`, photos with masks are learned from those instead."""

    steps: int = 1000
    batch: int = 16
    lr: float = 2e-3
    weight_decay: float = 0.05
    seed: int = 0
    truth: bool = True
    labels: Settings = field(default_factory=lambda: Settings(points_per_side=16, pred_iou=0.5, stability=0.7))


@dataclass(frozen=True)
class Trained:
    """What came of it: the loss of every step, and the share of wanted boxes that one of the best `k` proposals of a photo meets (IoU 0.5)."""

    photos: int
    boxes: int
    losses: list[float]
    recall: float
    k: int
    seconds: float
    plan: dict[str, Any]


Pair = tuple[Tensor, Tensor]
"""An embedding (E, s, s) in half precision, and the boxes (n, 4) xyxy in the F frame that are wanted there."""


def distil_proposer(model: Sam, dataset: Dataset, *, plan: Plan | None = None, held_out: int = 8,
                    on_step: Callable[[int, float], None] | None = None) -> Trained:
    """Train `model.proposer` (made anew) on `dataset`; nothing else of the model changes. Deterministic.

    Args:
        held_out: every so many-th photo is not trained on but measured.

    Raises:
        EdgekdError: the model finds no mask on any photo.
    """
    plan, began = plan or Plan(), time.monotonic()
    model.eval().requires_grad_(False)
    model.proposer = None
    photos = [pairs(model, sample, plan) for sample in dataset]
    learned = [p for i, own in enumerate(photos) if i % held_out or len(photos) < held_out for p in own if len(p[1])]
    measured = [own[0] for i, own in enumerate(photos) if not i % held_out and len(own[0][1])] or learned
    if not learned:
        raise EdgekdError(f"'{model.name}' finds no mask on {len(photos)} photos, so there is nothing to propose", where=dataset.name,
                          hint="give other photos, or a model that is trained")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        proposer = BoxProposer(model.embed_dim)
    losses = fit(proposer, learned, plan, on_step)
    model.proposer = proposer.eval().requires_grad_(False)
    k = 48
    return Trained(len(photos), sum(len(p[1]) for p in learned), losses, recall(proposer, measured, k), k, time.monotonic() - began, asdict(plan))


def pairs(model: Sam, sample: Sample, plan: Plan) -> list[Pair]:
    """A photo and its mirror image as the proposer sees them."""
    predictor = ModelPredictor(model)
    if plan.truth and sample.masks is not None and sample.masks.any():
        corners = boxes_from_masks(sample.masks[sample.masks.any(axis=(1, 2))])
    else:
        own = everything(predictor, sample.image, mode="grid", settings=plan.labels)
        corners = np.array([s.bbox for s in own], dtype=np.float64).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
    found = []
    for mirrored in (False, True):
        embedding, frame = predictor.start(np.ascontiguousarray(sample.image[:, ::-1]) if mirrored else sample.image)
        here = corners if not mirrored else corners[:, [2, 1, 0, 3]] * (-1, 1, -1, 1) + (frame.width, 0, frame.width, 0)
        found.append((embedding[0].detach().clone().half().cpu(), torch.from_numpy(to_square(here, frame)).float()))
    return found


def to_square(boxes: np.ndarray, frame: Frame) -> np.ndarray:
    """(n, 4) xyxy in pixels of the photo -> in the F frame, on continuous coordinates."""
    return boxes * np.tile(frame.ratio, 2)


def fit(proposer: BoxProposer, data: list[Pair], plan: Plan, on_step: Callable[[int, float], None] | None = None) -> list[float]:
    """Train on embeddings and boxes; the loss of every step."""
    proposer.train().requires_grad_(True).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    objective = BoxProposals()
    optimizer = torch.optim.AdamW(proposer.parameters(), lr=plan.lr, weight_decay=plan.weight_decay, betas=(0.9, 0.99))
    rng, losses = np.random.default_rng(plan.seed), []
    for step in range(plan.steps):
        chosen = [data[i] for i in rng.integers(len(data), size=plan.batch)]
        embedding = torch.stack([e for e, _ in chosen]).float().contiguous(memory_format=torch.channels_last)
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, plan.steps, plan.lr, plan.lr / 100, min(50, plan.steps // 4))
        context = Context(valid=embedding.new_ones(len(chosen), 1, 1, 1), boxes=[b for _, b in chosen])
        loss = objective(Outputs(embedding, proposals=proposer(embedding)), Outputs(embedding), context).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(proposer.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if on_step is not None:
            on_step(step, losses[-1])
    proposer.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return losses


def recall(proposer: BoxProposer, data: list[Pair], k: int) -> float:
    """Share of the wanted boxes that one of the k best proposals of their photo overlaps by IoU >= 0.5, without suppression of duplicates."""
    met = total = 0
    with torch.inference_mode():
        for embedding, wanted in data:
            boxes, scores = proposer(embedding[None].float())
            best = boxes[0][scores[0].topk(min(k, scores.shape[1])).indices]
            pairs_ = iou_and_giou(best.repeat(len(wanted), 1), wanted.repeat_interleave(len(best), 0))[0].view(len(wanted), -1)
            met, total = met + int((pairs_.amax(dim=1) >= 0.5).sum()), total + len(wanted)
    return met / max(total, 1)
