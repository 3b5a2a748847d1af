"""One stage of distillation: losses of a batch, weighted and added up, one optimizer step after another.

What a batch costs the student is in `step.Step`. A stage trains the parts that it names and leaves all others as they are.
"""
from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgekd.distillation.batches import Batch, Batches
from edgekd.distillation.outputs import PER_PROMPT, Context
from edgekd.distillation.points import Objective
from edgekd.distillation.schedule import optimizer, rate
from edgekd.distillation.step import Step
from edgekd.errors import EdgekdError, UsageError, unknown
from edgekd.models.proposer import BoxProposer
from edgekd.recipe import Stage
from edgekd.workspace import atomic_path, fingerprint

MOST_BAD_STEPS = 10
CHECKPOINT_SECONDS = 15.0
Row = dict[str, float]


@dataclass
class StageResult:
    """What a stage did: `curve` has a row a step; `bad_steps` were skipped because their loss was not finite."""

    name: str
    curve: list[Row] = field(default_factory=list)
    bad_steps: int = 0
    seconds: float = 0.0


class StageTrainer:
    """Trains `student` in place through one stage; its state is a file, so that a killed run goes on where it stopped.

    Args:
        teachers: the teacher, or several by name with the recipe's own first.
    """

    def __init__(self, student: Any, teachers: Any, stage: Stage, batches: Callable[[Step], Batches] | Batches, state: Path) -> None:
        teachers = dict(teachers) if isinstance(teachers, Mapping) else {teachers.name: teachers}
        self.student, self.stage, self.state = student, stage, Path(state)
        self.step_module = Step(student, teachers, stage)
        self.batches = batches(self.step_module) if callable(batches) else batches
        self.bf16 = stage.precision == "bf16" or (stage.precision == "auto" and torch.backends.mkldnn.is_available() and _fast_bf16())
        self.trained = trainable_parts(student, stage)
        check_reach(student, stage, list(self.step_module.objectives.values()))
        self.step_module.bind(self.batches.batch(range(min(2, len(self.batches)))))
        self.aux = self.step_module.aux
        self.optimizer = optimizer(stage, [*self.trained, self.aux])
        self.average = {k: v.detach().clone() for k, v in student.state_dict().items()} if stage.ema else None
        self.step, self.result = 0, StageResult(stage.name)

    # --- one step -------------------------------------------------------------------------------------------------------

    def losses(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Losses (B,) by objective, as they are added up: with the recipe's weights, and what controllers make of them."""
        module = self.step_module
        for policy in module.policies:
            batch = policy.mix(batch, generator)
        found = module(batch, generator, self.step)
        context = self.context(batch)
        weighted = {name: loss * module.refs[name].weight_at(context.progress) for name, loss in found.items()}
        for controller in module.controllers:
            weighted = controller.weigh(weighted, context)
        if module.policies:
            total = torch.stack(list(weighted.values())).sum(0).detach()
            for policy in module.policies:
                policy.observe(total, context)
        return weighted

    def context(self, batch: Batch) -> Context:
        """What controllers and policies are told of a step."""
        return Context(batch.valid, images=batch.images, classes=batch.classes, domains=batch.domains, places=batch.places, images_total=len(self.batches),
                       step=self.step, steps=self.stage.steps)

    def train_step(self) -> Row:
        """One optimizer step; a loss or gradient that is not finite is skipped, and too many of them end the stage."""
        stage, lr, parts = self.stage, rate(self.stage, self.step), dict[str, float]()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        batch = None
        for number in range(self.step * stage.accumulate, (self.step + 1) * stage.accumulate):
            generator = torch.Generator().manual_seed(stage.seed * 1_000_003 + number)
            batch = self.batches[number]
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                losses = {name: loss.mean() / stage.accumulate for name, loss in self.losses(batch, generator).items()}
            torch.stack(list(losses.values())).sum().backward()
            for name, loss in losses.items():
                parts[name] = parts.get(name, 0.0) + float(loss.detach())
        norm = float(nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], stage.clip))
        value = sum(parts.values())
        if math.isfinite(norm) and math.isfinite(value):
            self.optimizer.step()
            self.follow()
        else:
            self.result.bad_steps += 1
            if self.result.bad_steps > MOST_BAD_STEPS:
                raise EdgekdError(f"the loss is not finite ({self.result.bad_steps} steps)", where=f"stage {stage.name}, step {self.step}",
                                  hint=f"lower the learning rate: --set stages.N.lr={stage.lr / 10:g}, or --set stages.N.precision=fp32")
        if batch is not None:
            for controller in self.step_module.controllers:
                controller.after(self.context(batch))
        self.step += 1
        row = {"step": self.step, "loss": value, "lr": lr, "norm": norm, **({f"loss.{k}": v for k, v in parts.items()} if len(parts) > 1 else {})}
        return {k: v if math.isfinite(v) else -1.0 for k, v in row.items()}

    def follow(self) -> None:
        """Move the average of the weights towards them."""
        if self.average is None:
            return
        keep = min(self.stage.ema, (self.step + 1) / (self.step + 10))
        state = self.student.state_dict()
        for k, v in self.average.items():
            v.lerp_(state[k], 1 - keep) if v.is_floating_point() else v.copy_(state[k])

    # --- the stage ------------------------------------------------------------------------------------------------------

    def run(self, on_step: Callable[[Row], None] | None = None) -> StageResult:
        """Train to the end of the stage, from the saved state if there is one; afterwards the student holds the averaged weights."""
        self.resume()
        begun = saved = time.monotonic()
        self.set_modes()
        while self.step < self.stage.steps:
            row = self.train_step()
            self.result.curve.append(row)
            if on_step:
                on_step(row)
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                self.save()
                saved = time.monotonic()
        if self.average is not None:
            self.student.load_state_dict(self.average)
        self.student.eval().requires_grad_(False)
        self.result.seconds += time.monotonic() - begun
        return self.result

    def set_modes(self) -> None:
        """Only what learns is in training mode: batch norms of frozen parts keep their statistics too."""
        self.student.eval()
        self.aux.train()
        for part in self.trained:
            part.train()
        if self.stage.frozen_norm:
            for module in self.student.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def key(self) -> str:
        """A state file belongs to this stage as it is written in the recipe."""
        return fingerprint([self.stage.model_dump(), self.student.name, self.student.preprocess.image_size])

    def save(self) -> None:
        """Everything that the next step depends on, atomically."""
        state: dict[str, Any] = {
            "key": self.key(), "step": self.step, "student": self.student.state_dict(), "optimizer": self.optimizer.state_dict(),
            "aux": self.aux.state_dict(), "average": self.average, "curve": self.result.curve, "bad_steps": self.result.bad_steps,
        }
        with atomic_path(self.state) as temp:
            torch.save(state, temp)

    def resume(self) -> None:
        """Take up the saved state; one that is damaged or of another stage is left alone and overwritten later."""
        try:
            state = torch.load(self.state, weights_only=True)
        except Exception:  # no file, or cut short, or no zip: torch raises a different one for each
            return
        if state.get("key") != self.key():
            return
        self.student.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.aux.load_state_dict(state["aux"])
        self.average, self.step = state["average"], state["step"]
        self.result.curve, self.result.bad_steps = state["curve"], state["bad_steps"]


def trainable_parts(student: Any, stage: Stage) -> list[nn.Module]:
    """The parts that the stage trains, and nothing else, with gradients; a box proposer is made where it is to be trained and missing.

    Raises:
        UsageError: the student has no such part.
    """
    if "proposer" in stage.trainable and getattr(student, "proposer", 0) is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stage.seed)
            student.proposer = BoxProposer(student.embed_dim)
    parts = student.parts
    for name in stage.trainable:
        if name not in parts:
            raise unknown("part of the student", name, parts)
    student.requires_grad_(False)
    chosen = [parts[name] for name in stage.trainable]
    for part in chosen:
        part.requires_grad_(True)
    return chosen


def check_reach(student: Any, stage: Stage, objectives: Sequence[Objective]) -> None:
    """Every part that a stage trains must be reached by one of its objectives.

    Raises:
        UsageError: one is not, or boxes are compared with those of a student that proposes none.
    """
    reached = {"encoder": any(o.needs for o in objectives), "proposer": any("boxes" in o.needs for o in objectives)}
    reached["decoder"] = reached["prompt_encoder"] = any(o.needs & PER_PROMPT for o in objectives)
    reached["head"] = any(o.needs & {"logits", "pooled", "embedding", "images"} for o in objectives)
    idle = [part for part in stage.trainable if not reached.get(part, True)]
    if idle:
        raise UsageError(f"no objective of the stage trains the {idle[0]}", where=f"stage {stage.name}",
                         hint=f"take {idle[0]} out of 'trainable', or add an objective: {'box_proposals' if idle[0] == 'proposer' else 'prompt_masks'}")
    if reached["proposer"] and getattr(student, "proposer", None) is None:
        raise UsageError(f"the student '{student.name}' proposes no boxes", where=f"stage {stage.name}", hint="add proposer to 'trainable'")


def _fast_bf16() -> bool:
    """Whether this CPU has bf16 matrix instructions; without them bf16 is slower than fp32."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def train_stages(student: Any, teachers: Any, stages: Sequence[Stage], batches: Callable[[Step], Batches], folder: Path,
                 on_step: Callable[[str, Row], None] | None = None) -> list[StageResult]:
    """All stages in order; each finished one leaves `<number>-<name>.done.pt`, so that it is not trained again."""
    results = []
    for number, stage in enumerate(stages):
        done = Path(folder) / f"{number}-{stage.name}.done.pt"
        trainer = StageTrainer(student, teachers, stage, batches, Path(folder) / f"{number}-{stage.name}.state.pt")
        results.append(_finished(trainer, done) or _train(trainer, done, on_step))
    return results


def _finished(trainer: StageTrainer, done: Path) -> StageResult | None:
    state, trainer.state = trainer.state, done
    trainer.resume()
    trainer.state = state
    if trainer.step < trainer.stage.steps:
        return None
    trainer.student.eval().requires_grad_(False)
    return trainer.result


def _train(trainer: StageTrainer, done: Path, on_step: Callable[[str, Row], None] | None) -> StageResult:
    result = trainer.run((lambda row: on_step(trainer.stage.name, row)) if on_step else None)
    state, trainer.state, trainer.average = trainer.state, done, None
    trainer.save()
    state.unlink(missing_ok=True)
    return result
