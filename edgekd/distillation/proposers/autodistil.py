"""Students ranked by a short distillation with shared weights: one super-student a family, of which the others are the leading parts.

Xu et al., "Few-shot Task-agnostic Neural Architecture Search for Distilling Large Language Models" (AutoDistil, arXiv 2201.12507): the
space is cut into a few sub-spaces, a super-network of each is distilled once while its sub-networks share its weights, and the best
sub-network is found without training any on its own.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgekd import console, students
from edgekd.distillation.losses import aligned
from edgekd.distillation.points import Proposer, Suggestion
from edgekd.distillation.proposers._looking import encoder, frames, photos, redrawn, size
from edgekd.distillation.softmax import soft_kl
from edgekd.distillation.taps import Seen, outputs
from edgekd.errors import UsageError
from edgekd.protocols import Dataset

Candidate = tuple[str, int]
HELD_OUT = 0.25


class Autodistil(Proposer):
    """Every candidate is drawn equally often; it takes its weights from the leading slices of the super-student's (the largest of its family),
    does one step towards the teacher's embedding, and gives them back. Score: - its error on photos that were not trained on, relative to
    the teacher's own energy, with the weights that it shares in the end.

    What is simplified: candidates are those that the recipe names, families are the sub-spaces, the loss is on embeddings (logits where both
    models have them) instead of self-attention, and layers that the super-student has not in the same place are the candidate's own. A few
    dozen steps rank early learning, not what a full training ends with.

    Args:
        steps: for every candidate.
        images: looked at; a quarter of them to measure.
        batch: photos a step.
        lr: of Adam.
        seed: of weights and order.
    """

    name, family = "autodistil", "student_search"
    paper = "Few-shot Task-agnostic Neural Architecture Search for Distilling Large Language Models (arXiv 2201.12507)"

    def __init__(self, steps: int = 30, images: int = 32, batch: int = 4, lr: float = 2e-3, seed: int = 0) -> None:
        if steps < 1 or images < 4 or batch < 2 or lr <= 0:
            raise UsageError(f"autodistil takes steps >= 1, images >= 4, batch >= 2 and lr > 0, not steps={steps}, images={images}, batch={batch}, lr={lr:g}")
        self.steps, self.images, self.batch, self.lr, self.seed = steps, images, batch, lr, seed

    def propose(self, candidates: Sequence[Candidate], build: Any, teacher: Any, data: Dataset) -> list[Suggestion]:
        """Best first.

        Raises:
            UsageError: a candidate's outputs cannot be compared with the teacher's.
        """
        shown = photos(data, self.images)
        with torch.no_grad():
            told = outputs(teacher, frames(shown, teacher.preprocess))
        held = max(2, round(HELD_OUT * len(shown))) if len(shown) > 4 else 0
        learn, measure = (range(len(shown) - held), range(len(shown) - held, len(shown))) if held else (range(len(shown)),) * 2
        groups: dict[str, dict[Candidate, Any]] = {}
        for one in dict.fromkeys(candidates):
            groups.setdefault(space(one[0]), {})[one] = redrawn(build(*one), self.seed).requires_grad_(True)
        found = []
        for name, models in groups.items():
            inputs = {one: frames(shown, m.preprocess) for one, m in models.items()}
            shared = SuperStudent({one: encoder(m) for one, m in models.items()}, self.lr)
            self._distil(shared, models, inputs, told, learn)
            for one, model in models.items():
                shared.lend(one)
                error = self._error(model, inputs[one], told, measure)
                found.append(Suggestion(*one, -error, f"error {error:.3g} of the teacher's energy after {self.steps} shared steps, {size(model) / 1e6:.2f} M parameters"))
            console.log(f"autodistil: {name}, {len(models)} students")
        return sorted(found, key=lambda s: -s.score)

    def _distil(self, shared: SuperStudent, models: dict[Candidate, Any], inputs: dict[Candidate, Tensor], told: Seen, learn: range) -> None:
        rng = np.random.default_rng(self.seed)
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(self.seed)
            for _ in range(self.steps):
                for i in rng.permutation(len(models)):
                    one = list(models)[i]
                    rows = torch.from_numpy(rng.choice(np.array(learn), min(self.batch, len(learn)), replace=False))
                    shared.lend(one)
                    gap(outputs(models[one].train(), inputs[one][rows]), {n: t[rows] for n, t in told.items()}).mean().backward()
                    shared.learn(one)

    def _error(self, model: Any, images: Tensor, told: Seen, measure: range) -> float:
        """With the statistics of the batch: those of a shared network are of no student."""
        rows = torch.tensor(list(measure))
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return float(gap(outputs(model.train(), images[rows]), {n: t[rows] for n, t in told.items()}).mean())


class SuperStudent:
    """The largest network of a family, whose leading slices are the weights of the others."""

    def __init__(self, networks: dict[Candidate, nn.Module], lr: float) -> None:
        self.networks = networks
        largest = max(networks, key=lambda c: sum(p.numel() for p in networks[c].parameters()))
        self.weights = {n: nn.Parameter(p.detach().clone()) for n, p in networks[largest].named_parameters()}
        own = [p for one in networks for n, p in networks[one].named_parameters() if self._slice(n, p) is None]
        self.optimizer = torch.optim.Adam([*self.weights.values(), *own], lr=lr)

    def _slice(self, name: str, like: Tensor) -> Tensor | None:
        """The part of the shared weight that a network's weight is; None where there is no such weight."""
        whole = self.weights.get(name)
        if whole is None or whole.ndim != like.ndim or any(a < b for a, b in zip(whole.shape, like.shape, strict=True)):
            return None
        return whole[tuple(slice(0, n) for n in like.shape)]

    @torch.no_grad()
    def lend(self, one: Candidate) -> None:
        """Give a network the weights that it shares."""
        for name, p in self.networks[one].named_parameters():
            part = self._slice(name, p)
            if part is not None:
                p.copy_(part)

    @torch.no_grad()
    def learn(self, one: Candidate) -> None:
        """One step of the shared weights by the gradients of a network."""
        for name, p in self.networks[one].named_parameters():
            if p.grad is not None and self._slice(name, p) is not None:
                whole = self.weights[name]
                whole.grad = torch.zeros_like(whole)
                whole.grad[tuple(slice(0, n) for n in p.shape)] = p.grad
                p.grad = None
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.networks[one].zero_grad(set_to_none=True)


def space(name: str) -> str:
    """The sub-space of a student: its name without width and depth."""
    try:
        return students.parse(name).base
    except UsageError:  # a student of another task
        return name.partition(":")[0]


def gap(ours: Seen, theirs: Seen) -> Tensor:
    """(B,): KL of logits where both have as many, else the squared error of the embeddings over the teacher's mean square.

    Raises:
        UsageError: neither can be compared.
    """
    a, t = ours.get("logits"), theirs.get("logits")
    if a is not None and t is not None and a.shape[1] == t.shape[1]:
        return soft_kl(a, t)
    if ours["embedding"].shape[1] > theirs["embedding"].shape[1]:
        raise UsageError(f"an embedding of {ours['embedding'].shape[1]} channels cannot be compared with the teacher's {theirs['embedding'].shape[1]}",
                         hint="take the proposer diswot, which compares relations")
    x, y = aligned(ours["embedding"], theirs["embedding"])
    return (x - y).square().mean((1, 2, 3)) / y.square().mean((1, 2, 3)).clamp(min=1e-12)


proposer = Autodistil
