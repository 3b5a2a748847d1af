"""How much each photo listens to the teacher and how much to its label, learnt (TGeo-KD, arXiv 2312.15112).

A small network sees where the student, the teacher, the label and the teacher's mean for the class are from each other, and gives the photo's
ratio. It is trained so that a step with these ratios lowers the loss on labels of photos that the step did not see.
"""
from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.distillation.distributed import current
from edgekd.distillation.outputs import Context, Setup
from edgekd.distillation.points import Controller
from edgekd.distillation.softmax import labels_of
from edgekd.distillation.weighing import check_whole, gradient, known_objective, several_objectives, shared_parameter
from edgekd.errors import UsageError

EDGES = 6


class PerSample(Controller):
    """a_i L_teacher,i + (1 - a_i) L_labels,i with a_i = sigmoid(MLP(distances between student, teacher, label and the teacher's mean for the class)).

    One step ahead, d L_held / d a_i = -lr / n <g_held, g_teacher,i - g_labels,i>, where g are gradients at a shared weight and L_held is the
    label's loss of the `held` share of the batch, which the step leaves out; the MLP follows sum_i a_i d L_held / d a_i.

    Simplified from the paper: the inner problem is one step, looked at from where the student is (first order, plain gradient descent); gradients at
    one weight instead of all; the held-out photos are a share of each batch instead of a set of their own; the MLP sees the lengths of
    the six edges instead of their vectors; and it trains with the student's optimizer, its gradient scaled to 1 at most.

    Args:
        labels: the objective that learns from labels; all others learn from the teacher.
        held: share of a batch that is held out when the MLP learns.
        every: batches between two lessons of the MLP; in the others the whole batch trains.
        hidden: width of the MLP.
        momentum: what the class means keep of themselves.
        at: path of the shared weight; none: the last trainable matrix of the encoder.
    """

    name, family, paper = "per_sample", "adaptive_weighting", "TGeo-KD (arXiv 2312.15112)"
    needs = frozenset({"logits", "classes"})
    means: Tensor
    met: Tensor
    calls: Tensor

    def __init__(self, labels: str, held: float = 0.25, every: int = 1, hidden: int = 16, momentum: float = 0.9, at: str = "") -> None:
        super().__init__()
        if not 0 < held < 1:
            raise UsageError(f"per_sample: held is a share of the batch between 0 and 1, not {held}")
        self.labels, self.held, self.every, self.momentum, self.at = labels, held, max(1, every), momentum, at
        self.network = nn.Sequential(nn.Linear(EDGES, hidden), nn.Tanh(), nn.Linear(hidden, 1))
        self.ratio: Tensor | None = None

    def begin(self, setup: Setup) -> None:
        """Start at a ratio of one half for every photo."""
        several_objectives(setup.stage, self.name)
        known_objective(self.labels, setup.stage, self.name)
        ours, theirs = setup.ours["logits"].shape[1], setup.theirs["logits"].shape[1]
        if ours != theirs:
            raise UsageError(f"per_sample compares logits, and the student has {ours} of them, the teacher {theirs}", where=setup.where)
        check_whole(self.name)
        self._held = (setup.student,)
        shared_parameter(setup.student, self.at)
        for layer in self.network:
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
        nn.init.zeros_(self.network[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.network[-1].bias)  # type: ignore[arg-type]
        self.register_buffer("means", torch.full((ours, ours), 1 / ours))
        self.register_buffer("met", torch.zeros(ours, dtype=torch.bool))
        self.register_buffer("calls", torch.tensor(0))

    def weigh(self, losses: Mapping[str, Tensor], context: Context) -> dict[str, Tensor]:
        """losses (B,) of each objective -> the same, weighted photo by photo."""
        ratio = self.ratios(context)
        learn = int(self.calls) % self.every == 0 and len(ratio) > 1
        self.calls += 1
        rest = len(ratio) - (max(1, round(self.held * len(ratio))) if learn else 0)
        taught = torch.stack([loss for n, loss in losses.items() if n != self.labels]).sum(0)
        pull = ratio.detach().clone()
        share = torch.ones_like(pull)
        if learn:
            share[rest:], share[:rest] = 0.0, len(ratio) / rest  # what is held out is not trained on, and the mean stays a mean
        found = {n: loss * share * (1 - pull if n == self.labels else pull) for n, loss in losses.items()}
        if learn:
            lesson = ratio[:rest] * self.lookahead(taught, losses[self.labels], rest)
            found[self.labels] = found[self.labels] + (lesson.sum() - lesson.sum().detach())
        self.ratio = ratio.detach()
        return found

    def ratios(self, context: Context) -> Tensor:
        """(B,) in 0..1; 1 for photos without a label."""
        assert context.student is not None and context.teacher is not None
        ours, theirs = context.student["logits"].float().softmax(-1), context.teacher["logits"].float().softmax(-1)
        given = labels_of(context, ours.shape[1])
        if given is None:
            return torch.ones(len(ours), device=ours.device)
        classes, known = given
        self.remember(theirs, classes, known)
        label, mean = F.one_hot(classes, ours.shape[1]).float(), self.means[classes]
        corners = (ours, theirs, label, mean)
        edges = [(a - b).norm(dim=1) for i, a in enumerate(corners) for b in corners[i + 1 :]]
        ratio = self.network(torch.stack(edges, 1)).squeeze(1).float().sigmoid()
        return torch.where(known, ratio, 1.0)

    @torch.no_grad()
    def remember(self, theirs: Tensor, classes: Tensor, known: Tensor) -> None:
        """Move the teacher's mean of each class that the batch has towards its photos."""
        for c in classes[known].unique():
            new, keep = theirs[known & (classes == c)].mean(0), self.momentum if bool(self.met[c]) else 0.0
            self.means[c], self.met[c] = keep * self.means[c] + (1 - keep) * new, True

    def lookahead(self, taught: Tensor, labelled: Tensor, rest: int) -> Tensor:
        """d L_held / d a_i of the first `rest` photos, up to a factor, so that the largest is 1."""
        at = shared_parameter(self._held[0], self.at)
        held = current().mean(gradient(labelled[rest:].mean(), at))
        difference = taught - labelled
        found = -torch.stack([gradient(difference[i], at) @ held for i in range(rest)])
        return found / found.abs().max().clamp(min=1e-12)


controller = PerSample
