"""A teacher whose soft labels tell photos of one class apart: its head is trained a little to keep more than the class.

Ye, Hamidi, Tan, Yang, "Bayes Conditional Distribution Estimation for Knowledge Distillation Based on Conditional Mutual Information"
(arXiv 2401.08732): maximise the log-likelihood and, with a weight, the mutual information of photo and prediction given the class.
"""
from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd import console
from edgekd.checkpoint import weights_sha256
from edgekd.distillation.points import Preparation
from edgekd.distillation.preparations._prepared import kept, photos_of
from edgekd.distillation.taps import outputs
from edgekd.errors import UsageError
from edgekd.protocols import Dataset
from edgekd.workspace import fingerprint

BATCH = 8


class Mcmi(Preparation):
    """Minimises mean(-log p(y|x)) - weight * mean KL(p(.|x) || q_y), where q_y is the mean prediction of the photos of class y.

    The paper fine-tunes the whole teacher; here the head alone learns, on features that are computed once, with all photos in every step,
    so that q is exact. It is renewed before every step and held fixed within it, as in the paper's alternation.

    Args:
        weight: of the mutual information; 0.25 is the authors' setting for fine-tuning.
        steps: of Adam.
        lr: of Adam.
        photos: looked at, at most.
    """

    name, family = "mcmi", "teacher_preparation"
    paper = "Bayes Conditional Distribution Estimation for Knowledge Distillation Based on Conditional Mutual Information (arXiv 2401.08732)"
    needs = frozenset({"classes", "logits"})

    def __init__(self, weight: float = 0.25, steps: int = 100, lr: float = 1e-3, photos: int = 2000) -> None:
        if weight < 0 or steps < 1 or lr <= 0 or photos < 2:
            raise UsageError(f"mcmi takes weight >= 0, steps >= 1, lr > 0 and photos >= 2, not weight={weight:g}, steps={steps}, lr={lr:g}, photos={photos}")
        self.options: dict[str, Any] = {"weight": weight, "steps": steps, "lr": lr, "photos": photos}

    def prepare(self, teacher: Any, data: Dataset, folder: Path) -> Any:
        """A copy of the teacher with its head trained; the head is kept in `folder`.

        Raises:
            UsageError: the photos have no classes, or the teacher's logits do not come from a head of its own.
        """
        classes = labels_of(data, self.options["photos"])
        if "head" not in getattr(teacher, "parts", {}):
            raise UsageError(f"mcmi trains a classifier's head, and the teacher '{teacher.name}' has none", hint="it is for the task classification")
        copied = copy.deepcopy(teacher)
        key = fingerprint([weights_sha256(teacher), data.fingerprint(), self.options])

        def learn() -> dict[str, Tensor]:
            features, known = head_inputs(copied, data, classes)
            return self._learn(copied.parts["head"], features, known)

        copied.parts["head"].load_state_dict(kept(Path(folder) / f"mcmi-{key}.safetensors", learn))
        return copied.eval().requires_grad_(False)

    @torch.enable_grad()
    def _learn(self, head: nn.Module, features: Tensor, classes: Tensor) -> dict[str, Tensor]:
        head.eval().requires_grad_(True)
        optimizer = torch.optim.Adam(head.parameters(), lr=self.options["lr"])
        before = information(head(features).detach(), classes).mean()
        for _ in range(self.options["steps"]):
            logits = head(features)
            loss = F.cross_entropy(logits.float(), classes) - self.options["weight"] * information(logits, classes).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        after = head(features).detach()
        console.log(f"mcmi: information {before:.4g} -> {information(after, classes).mean():.4g}, right {(after.argmax(1) == classes).float().mean():.1%}")
        return {n: p.detach() for n, p in head.state_dict().items()}


def labels_of(data: Dataset, most: int) -> dict[int, int]:
    """Position -> class of the first `most` photos that have one.

    Raises:
        UsageError: fewer than two do.
    """
    ask = getattr(data, "classes_of", None)
    given = {i: ask(i) for i in range(min(most, len(data)))} if ask is not None and getattr(data, "has_classes", True) else {}
    known = {i: int(c) for i, c in given.items() if c is not None and c >= 0}
    if len(known) < 2:
        raise UsageError("mcmi needs labelled photos (classes), and these have none", where=data.name, hint="give a folder of folders, one a class")
    return known


@torch.no_grad()
def head_inputs(teacher: Any, data: Dataset, classes: dict[int, int]) -> tuple[Tensor, Tensor]:
    """What comes into the head for every labelled photo (N, ...), and the classes (N,).

    Raises:
        UsageError: the head does not give the logits, or there are more classes than logits.
    """
    seen: list[Tensor] = []
    head = teacher.parts["head"]
    handle = head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        logits = torch.cat([outputs(teacher, x)["logits"] for x in photos_of(data, teacher, max(classes) + 1, BATCH)])
    finally:
        handle.remove()
    features, at = torch.cat(seen), torch.tensor(sorted(classes))
    if len(features) != len(logits) or not torch.allclose(head(features).float(), logits.float(), atol=1e-3):
        raise UsageError(f"the logits of the teacher '{teacher.name}' are not what its head gives", hint="mcmi trains a head whose outputs are the logits")
    known = torch.tensor([classes[i] for i in sorted(classes)])
    if int(known.max()) >= logits.shape[1]:
        raise UsageError(f"the photos have classes up to {int(known.max())}, and the teacher tells {logits.shape[1]} apart", where=data.name)
    return features[at].float(), known


def information(logits: Tensor, classes: Tensor) -> Tensor:
    """KL(p(.|x) || q_y) of every photo (N,), q_y the mean prediction of its class, held fixed: logits (N, C), classes (N,). Its mean is the
    conditional mutual information of photo and prediction given the class."""
    logs = logits.float().log_softmax(1)
    member = F.one_hot(classes, int(classes.max()) + 1).float()
    mean = (member.T @ logs.detach().exp()) / member.sum(0).clamp(min=1)[:, None]
    return (logs.exp() * (logs - mean[classes].clamp(min=1e-12).log())).sum(1)


preparation = Mcmi
