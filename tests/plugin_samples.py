"""Outputs of a student and a teacher for a batch, as plug-ins see them: everything that any of them may need, small and seeded."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from edgekd.distillation import points
from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.distillation.points import Objective
from edgekd.models.proposer import SLOTS
from edgekd.protocols import Preprocess
from edgekd.recipe import Stage

B, P, S, E, C = 4, 3, 64, 16, 10
HEADS, TOKENS = 2, 16


def outputs(seed: int) -> Outputs:
    """All four masks of a prompt are alike, so that any of them may be the one that learns; all proposals of an image are one box."""
    g = torch.Generator().manual_seed(seed)
    box = torch.tensor([[16.0, 16.0, 48.0, 48.0]]) if seed == 2 else torch.tensor([[2.0, 4.0, 20.0, 30.0]])
    cells = len(SLOTS) * (S // 16) ** 2
    return Outputs(embedding=torch.randn(B, E, S // 16, S // 16, generator=g), iou=torch.rand(B * P, 4, generator=g),
                   masks=torch.randn(B * P, 1, S // 4, S // 4, generator=g).repeat(1, 4, 1, 1), tokens=torch.randn(B * P, 5, E, generator=g),
                   proposals=(box.repeat(B, cells, 1), torch.full((B, cells), 0.5)), logits=torch.randn(B, C, generator=g) * 2,
                   pooled=torch.randn(B, E, generator=g))


def feats(of: Outputs, seed: int, needs: frozenset[str]) -> Outputs:
    """With taps: two maps, coarse last, or one attention. They are made from the embedding, so that a gradient reaches it through them."""
    from dataclasses import replace

    g = torch.Generator().manual_seed(seed + 100)
    assert of.embedding is not None
    fine = torch.nn.functional.interpolate(of.embedding, (8, 8))
    maps = (torch.randn(B, E, 8, 8, generator=g) + fine, torch.randn(B, 2 * E, 4, 4, generator=g) + of.embedding.repeat(1, 2, 1, 1))
    scores = torch.randn(B, HEADS, TOKENS, TOKENS, generator=g) + of.embedding.flatten(2).unsqueeze(1)
    return replace(of, feats=(scores.softmax(-1),) if "attention" in needs else maps)


def context() -> Context:
    """Its truth is what `outputs(2)` says."""
    told = outputs(2)
    assert told.masks is not None and told.proposals is not None
    truth = (told.masks[:, 0] > 0).repeat_interleave(4, 1).repeat_interleave(4, 2)
    instances = torch.zeros(B, S, S, dtype=torch.long)
    instances[:, 8:40, 8:40], instances[:, 44:60, 4:30] = 1, 2
    return Context(valid=torch.ones(B, 1, S // 4, S // 4), valid_prompts=torch.ones(B * P, S // 4, S // 4),
                   single=torch.tensor([1.0, 0.0, 1.0] * B), truth=truth, boxes=[told.proposals[0][0, :1]] * B, side=S,
                   generator=torch.Generator().manual_seed(0), images=torch.randn(B, 3, S, S, generator=torch.Generator().manual_seed(3)),
                   classes=torch.arange(B) % C, instances=instances, domains=torch.zeros(B, dtype=torch.long), places=torch.arange(B), images_total=B,
                   step=2, steps=10, teachers={"one": outputs(2), "two": outputs(3)})


class Network(nn.Module):
    """A model with blocks, for plug-ins that look at one."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.name, self.preprocess, self.embed_dim = f"network{seed}", Preprocess(S), E
        self.encoder = nn.Sequential()
        self.encoder.blocks = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, E, 2, 2), nn.Conv2d(E, E, 2, 2))  # type: ignore[assignment]
        self.head = nn.Linear(E, C)

    @property
    def parts(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder, "head": self.head}

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        embedding = self.encoder.blocks(images)  # type: ignore[operator]
        pooled = embedding.mean((2, 3))
        return {"embedding": embedding, "pooled": pooled, "logits": self.head(pooled)}


def stage(**changes: Any) -> Stage:
    return Stage.model_validate({"name": "test", "steps": 10, "objectives": [{"name": "feature_mse"}]} | changes)


def setup(ours: Outputs, theirs: Outputs) -> Setup:
    teacher = Network(2).eval().requires_grad_(False)
    return Setup(Network(1), teacher, stage(), ours, theirs, context(), {"one": teacher, "two": Network(3).eval().requires_grad_(False)})


class Sampled(nn.Module):
    """An objective that is called with the taps it asked for."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, ours: Outputs, theirs: Outputs, context: Context) -> Tensor:
        needs = self.objective.needs
        if needs & {"feats", "attention"}:
            same = ours is theirs
            ours = feats(ours, 2 if same else 1, needs)
            theirs = feats(theirs, 2, needs)
        return self.objective(ours, theirs, context)


def bound(name: str, **options: Any) -> Sampled:
    """An objective with its modules made from the sample's shapes."""
    objective = points.build("objective", name, options)
    torch.manual_seed(0)
    objective.bind(setup(feats(outputs(1), 1, objective.needs), feats(outputs(2), 2, objective.needs)))
    return Sampled(objective)


def tensors(of: Outputs) -> list[Tensor]:
    """Everything in it that a gradient can reach."""
    return [t for t in (of.embedding, of.masks, of.iou, of.tokens, of.logits, of.pooled, *(of.proposals or ())) if t is not None]
