"""Students ranked without any training: the untrained network whose maps already relate photos and places as the teacher's do learns best from it.

Dong, Li, Wei, "DisWOT: Student Architecture Search for Distillation WithOut Training" (arXiv 2303.15678): similarity of semantic activation
maps and of the relations among the photos of one batch, searched by evolution.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd import students
from edgekd.distillation.points import Proposer, Suggestion
from edgekd.distillation.proposers._looking import frames, on_one_grid, photos, redrawn, size
from edgekd.distillation.taps import outputs
from edgekd.errors import UsageError
from edgekd.protocols import Dataset

Candidate = tuple[str, int]
STEPS = (0.75, 0.9, 1.1, 1.25)


class Diswot(Proposer):
    """Score = -(semantic + relation), of one batch: each the mean squared distance of the rows of two similarity matrices with rows of length 1.

    Semantic: how alike two cells are, over the photos, in the class-free activation map ReLU(sum_c m_c A_c), m_c the channel's mean, which is
    Grad-CAM of a photo's pooled energy; the paper takes the classes' Grad-CAMs, which a model without classes has not. Relation: how alike
    two photos are, A A^T. The paper draws the teacher's weights again too; ours is the trained one, which is there. Students are drawn again.

    With `generations` the names themselves evolve: width and depth of the best are changed, no encoder larger than the largest named.

    Args:
        images: photos in the batch.
        seeds: drawings of each student; the score is their mean.
        generations: of the evolution; 0 ranks only what is named.
        population: kept from one generation to the next.
        seed: of weights and changes.
    """

    name, family, paper = "diswot", "student_search", "DisWOT: Student Architecture Search for Distillation WithOut Training (arXiv 2303.15678)"

    def __init__(self, images: int = 16, seeds: int = 1, generations: int = 0, population: int = 6, seed: int = 0) -> None:
        if images < 2 or seeds < 1 or generations < 0 or population < 1:
            raise UsageError(f"diswot takes images >= 2, seeds >= 1, generations >= 0 and population >= 1, not images={images}, seeds={seeds}")
        self.images, self.seeds, self.generations, self.population, self.seed = images, seeds, generations, population, seed

    def propose(self, candidates: Sequence[Candidate], build: Any, teacher: Any, data: Dataset) -> list[Suggestion]:
        """Best first: what was named, and with `generations` what came of it."""
        shown = photos(data, self.images)
        with torch.no_grad():
            theirs = outputs(teacher, frames(shown, teacher.preprocess))["embedding"]
        scored: dict[Candidate, tuple[float, float]] = {}
        most = 0
        for one in candidates:
            model = build(*one)
            most = max(most, size(model))
            scored[one] = self._score(model, shown, theirs)
        rng = np.random.default_rng(self.seed)
        for _ in range(self.generations):
            best = sorted(scored, key=lambda c: sum(scored[c]))[: self.population]
            for one in [c for parent in best if (c := changed(parent, rng)) is not None and c not in scored]:
                model = _built(build, one)
                if model is not None and size(model) <= most:
                    scored[one] = self._score(model, shown, theirs)
        return [Suggestion(name, side, -sum(scored[name, side]), f"untrained, its maps are {a:.3g} from the teacher's and its relations {b:.3g}"
                           + ("" if (name, side) in candidates else "; found by changing width and depth"))
                for (name, side), (a, b) in sorted(scored.items(), key=lambda item: sum(item[1]))]

    @torch.no_grad()
    def _score(self, model: Any, shown: Sequence[np.ndarray], theirs: Tensor) -> tuple[float, float]:
        images = frames(shown, model.preprocess)
        found = []
        with torch.random.fork_rng(devices=[]):
            for k in range(self.seeds):
                torch.manual_seed(self.seed + k)
                # statistics of the batch: those kept in an untrained network are of nothing
                found.append(distances(outputs(redrawn(model, self.seed + k).train(), images)["embedding"], theirs))
        semantic, relation = np.mean(found, axis=0)
        return float(semantic), float(relation)


def distances(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """Embeddings (B, E, s, s) and (B, E', t, t) of the same photos -> semantic and relation distance."""
    a, b = on_one_grid(ours, theirs)
    return apart(activation(a).T, activation(b).T), apart(a.flatten(1), b.flatten(1))


def activation(maps: Tensor) -> Tensor:
    """maps (B, C, h, w) -> (B, h w): every channel counts by its mean over the photo."""
    return F.relu((maps * maps.mean((2, 3), keepdim=True)).sum(1)).flatten(1)


def apart(ours: Tensor, theirs: Tensor) -> float:
    """Two sets of N vectors (N, D) and (N, D') -> mean over rows of the squared distance of their similarity matrices, rows of length 1."""
    a, b = (F.normalize(x.float() @ x.float().T, dim=1) for x in (ours, theirs))
    return float((a - b).square().sum(1).mean())


def changed(one: Candidate, rng: np.random.Generator) -> Candidate | None:
    """The same student with another width or depth; None for one that has neither."""
    try:
        parsed = students.parse(one[0])
    except UsageError:
        return None
    low, high = students.LIMITS
    width, depth = (float(np.clip(round(v * rng.choice(STEPS) if move else v, 3), low, high))
                    for v, move in zip((parsed.width, parsed.depth), rng.permutation([True, bool(rng.random() < 0.5)]), strict=True))
    return str(replace(parsed, width=width, depth=depth)), one[1]


def _built(build: Callable[[str, int], Any], one: Candidate) -> Any:
    try:
        return build(*one)
    except UsageError:  # of somebody else's backbones not every width can be built
        return None


proposer = Diswot
