"""Cleaner dense features: what a ViT gives for a cell depends on where the cell lies; its average over moved and mirrored views does so less.

Chen, Yan et al., "Vision Transformers with Self-Distilled Registers" (PH-Reg, arXiv 2505.21501): the frozen ViT with random shifts and mirror
images gives clean targets, and a copy with register tokens and a few unlocked weights learns to give them in one pass. Here the copy has
no new tokens: its last layers learn, so that every encoder, also one without tokens, can be cleaned.
"""
from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd import console
from edgekd.checkpoint import weights_sha256
from edgekd.distillation.points import Preparation
from edgekd.distillation.preparations._prepared import Ask, View, averaged, kept, photos_of, stride_of, with_outputs
from edgekd.distillation.taps import Seen, outputs
from edgekd.errors import UsageError, unknown
from edgekd.protocols import Dataset
from edgekd.workspace import fingerprint


class PhReg(Preparation):
    """Target: the mean embedding over `views` shifted and mirrored copies, each moved back. Without `steps` the teacher gives it itself, at
    views + 1 times the cost; with `steps` its last layers learn it, by 1 - cosine + squared error a cell, and it costs what it did.

    Args:
        views: moved copies of a photo beside itself.
        reach: furthest shift, in cells of the embedding.
        steps: of learning; 0 averages instead.
        modules: paths of what learns; none: the encoder's `neck`, else the last of its parts that has weights.
        photos: looked at for learning, at most.
        batch: photos a step.
        lr: of Adam.
        seed: of the shifts and of the order of photos.
    """

    name, family, paper = "ph_reg", "teacher_preparation", "Vision Transformers with Self-Distilled Registers (arXiv 2505.21501)"

    def __init__(self, views: int = 8, reach: int = 2, steps: int = 0, modules: list[str] | None = None, photos: int = 64, batch: int = 4, lr: float = 1e-4,
                 seed: int = 0) -> None:
        if views < 1 or reach < 1 or steps < 0 or photos < 1 or batch < 1:
            raise UsageError(f"ph_reg takes views, reach, photos and batch of at least 1 and steps >= 0, not views={views}, reach={reach}, steps={steps}")
        self.options: dict[str, Any] = {"views": views, "reach": reach, "steps": steps, "modules": modules or [], "photos": photos, "batch": batch, "lr": lr, "seed": seed}
        rng = np.random.default_rng(seed)
        self.views = [View(bool(i % 2 == 0), False, *(int(n) for n in rng.integers(-reach, reach + 1, 2))) for i in range(views)]

    def prepare(self, teacher: Any, data: Dataset, folder: Path) -> Any:
        """The teacher with averaged embeddings, or a copy of it whose last layers give them.

        Raises:
            UsageError: nothing in the teacher is called as `modules` says.
        """
        stride, width = stride_of(teacher), getattr(teacher, "embed_dim", None)

        def change(ask: Ask, images: Tensor) -> Seen:
            return averaged(ask, images, self.views, stride, width, everything=False)

        if not self.options["steps"]:
            return with_outputs(teacher, change, "ph_reg", [n for v in self.views for n in (v.flip, v.down, v.right)])
        copied = copy.deepcopy(teacher)
        names = [n for path in last_layers(copied, self.options["modules"]) for n, _ in _parameters(copied, path)]
        key = fingerprint([weights_sha256(teacher), data.fingerprint(), self.options])

        def learn() -> dict[str, Tensor]:
            return self._learn(copied, names, [(x, change(lambda y: outputs(teacher, y), x)["embedding"]) for x in self._photos(teacher, data)])

        found = kept(Path(folder) / f"ph_reg-{key}.safetensors", learn)
        copied.load_state_dict(found, strict=False)
        return copied.eval().requires_grad_(False)

    def _photos(self, teacher: Any, data: Dataset) -> list[Tensor]:
        return list(photos_of(data, teacher, self.options["photos"], self.options["batch"]))

    @torch.enable_grad()
    def _learn(self, model: Any, names: list[str], pairs: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """Train `names` of `model` on (photos, clean embeddings), in eval mode: statistics of norms stay."""
        model.eval().requires_grad_(False)
        learned = {n: p for n, p in model.named_parameters() if n in names}
        for p in learned.values():
            p.requires_grad_(True)
        optimizer, rng = torch.optim.Adam(learned.values(), lr=self.options["lr"]), np.random.default_rng(self.options["seed"])
        first = last = 0.0
        for step in range(self.options["steps"]):
            images, clean = pairs[int(rng.integers(len(pairs)))]
            loss = gap(outputs(model, images)["embedding"], clean.detach())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            first, last = (loss.item() if step == 0 else first), loss.item()
        console.log(f"ph_reg: {first:.4g} -> {last:.4g} in {self.options['steps']} steps")
        return {n: p.detach() for n, p in learned.items()}


def gap(ours: Tensor, clean: Tensor) -> Tensor:
    """1 - cosine and squared error of embeddings (B, E, s, s), means over cells and added up -> ()."""
    return (1 - F.cosine_similarity(ours.float(), clean.float(), dim=1)).mean() + F.mse_loss(ours.float(), clean.float())


def last_layers(teacher: Any, modules: list[str]) -> list[str]:
    """Paths of what learns.

    Raises:
        UsageError: there is no such module, or nothing with weights.
    """
    known = {path for path, _ in teacher.named_modules() if path}
    for path in modules:
        if path not in known:
            raise unknown("module of the teacher", path, known)
    if modules:
        return modules
    if "encoder.neck" in known:
        return ["encoder.neck"]
    path, module = ("encoder", teacher.encoder) if "encoder" in known else ("", teacher)
    while True:  # into the last part that has weights, down to the last that is not merely a list of others
        parts = [(name, m) for name, m in module.named_children() if any(True for _ in m.parameters())]
        if not parts or (path and not isinstance(module, (nn.Sequential, nn.ModuleList))):
            break
        path, module = f"{path}.{parts[-1][0]}".lstrip("."), parts[-1][1]
    if not any(True for _ in module.parameters()):
        raise UsageError(f"nothing in the teacher '{teacher.name}' can learn", hint="name the module paths under 'modules', or leave 'steps' out")
    return [path]


def _parameters(teacher: Any, path: str) -> list[tuple[str, nn.Parameter]]:
    return [(f"{path}.{n}", p) for n, p in teacher.get_submodule(path).named_parameters()]


preparation = PhReg
