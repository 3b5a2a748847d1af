"""One stage of distillation, on one screen: embed, ask teacher and student the same, add up the objectives, step.

What is asked once a decode is in `prompting.PromptLoop`. A stage trains the parts that it names and leaves all others as they are.
"""
from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgekd.distillation.batches import Batch, Batches
from edgekd.distillation.clicks import boxes
from edgekd.distillation.objectives import PER_PROMPT, Context, Objective, Outputs
from edgekd.distillation.objectives import build as build_objective
from edgekd.distillation.prompting import PromptLoop
from edgekd.distillation.schedule import optimizer, rate
from edgekd.errors import EdgekdError, UsageError
from edgekd.models.proposer import BoxProposer
from edgekd.models.sam import Sam
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
    """Trains `student` in place through one stage; its state is a file, so that a killed run goes on where it stopped."""

    def __init__(self, student: Sam, teacher: Sam, stage: Stage, batches: Batches, state: Path) -> None:
        self.student, self.teacher, self.stage, self.batches, self.state = student, teacher, stage, batches, Path(state)
        self.objectives: list[tuple[float, Objective]] = [(o.weight, build_objective(o.name, o.options)) for o in stage.objectives]
        self.bf16 = stage.precision == "bf16" or (stage.precision == "auto" and torch.backends.mkldnn.is_available() and _fast_bf16())
        self.trained = trainable_parts(student, stage)
        check_reach(student, stage, [o for _, o in self.objectives])
        self.optimizer = optimizer(stage, [*self.trained, *(o for _, o in self.objectives)])
        self.loop = PromptLoop(student, teacher, stage, self.objectives)
        self.average = {k: v.detach().clone() for k, v in student.state_dict().items()} if stage.ema else None
        self.step, self.result = 0, StageResult(stage.name)

    # --- one step -------------------------------------------------------------------------------------------------------

    def loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """The weighted objectives of one batch, a scalar."""
        embedding = self.student.embed(batch.images)
        boxed = any("boxes" in o.needs for _, o in self.objectives)
        proposals = self.student.proposer(embedding) if boxed and self.student.proposer is not None else None
        ours, theirs = Outputs(embedding, proposals=proposals), Outputs(batch.embedding)
        known = instance_boxes(batch.labels) if boxed else None
        context = Context(batch.valid, boxes=known, side=self.student.preprocess.side, generator=generator)
        total = embedding.new_zeros((), dtype=torch.float32)
        for weight, objective in self.objectives:
            if not objective.needs & PER_PROMPT:
                total = total + weight * objective(ours, theirs, context).mean()
        return total + self.loop(ours, theirs, batch, context) if self.loop.objectives else total

    def train_step(self) -> Row:
        """One optimizer step; a loss or gradient that is not finite is skipped, and too many of them end the stage."""
        stage, lr, value = self.stage, rate(self.stage, self.step), 0.0
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        for number in range(self.step * stage.accumulate, (self.step + 1) * stage.accumulate):
            generator = torch.Generator().manual_seed(stage.seed * 1_000_003 + number)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                loss = self.loss(self.batches[number], generator) / stage.accumulate
            loss.backward()
            value += float(loss.detach())
        norm = float(nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], stage.clip))
        if math.isfinite(norm) and math.isfinite(value):
            self.optimizer.step()
            self.follow()
        else:
            self.result.bad_steps += 1
            if self.result.bad_steps > MOST_BAD_STEPS:
                raise EdgekdError(f"the loss is not finite ({self.result.bad_steps} steps)", where=f"stage {stage.name}, step {self.step}",
                                  hint=f"lower the learning rate: --set stages.N.lr={stage.lr / 10:g}, or --set stages.N.precision=fp32")
        self.step += 1
        return {"step": self.step, "loss": value if math.isfinite(value) else -1.0, "lr": lr, "norm": norm if math.isfinite(norm) else -1.0}

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
            "objectives": [o.state_dict() for _, o in self.objectives], "average": self.average, "curve": self.result.curve,
            "bad_steps": self.result.bad_steps,
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
        for (_, objective), saved in zip(self.objectives, state["objectives"], strict=True):
            objective.load_state_dict(saved)
        self.average, self.step = state["average"], state["step"]
        self.result.curve, self.result.bad_steps = state["curve"], state["bad_steps"]


def trainable_parts(student: Sam, stage: Stage) -> list[nn.Module]:
    """The parts that the stage trains, and nothing else, with gradients; a box proposer is made where it is to be trained and missing."""
    if "proposer" in stage.trainable and student.proposer is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stage.seed)
            student.proposer = BoxProposer(student.embed_dim)
    parts = {"encoder": student.encoder, "decoder": student.mask_decoder, "prompt_encoder": student.prompt_encoder, "proposer": student.proposer}
    student.requires_grad_(False)
    chosen = [part for name in stage.trainable if (part := parts[name]) is not None]
    for part in chosen:
        part.requires_grad_(True)
    return chosen


def check_reach(student: Sam, stage: Stage, objectives: Sequence[Objective]) -> None:
    """Every part that a stage trains must be reached by one of its objectives.

    Raises:
        UsageError: one is not, or boxes are compared with those of a student that proposes none.
    """
    reached = {"encoder": any(o.needs for o in objectives), "proposer": any("boxes" in o.needs for o in objectives)}
    reached["decoder"] = reached["prompt_encoder"] = any(o.needs & PER_PROMPT for o in objectives)
    idle = [part for part in stage.trainable if not reached[part]]
    if idle:
        raise UsageError(f"no objective of the stage trains the {idle[0]}", where=f"stage {stage.name}",
                         hint=f"take {idle[0]} out of 'trainable', or add an objective: {'box_proposals' if idle[0] == 'proposer' else 'prompt_masks'}")
    if reached["proposer"] and student.proposer is None:
        raise UsageError(f"the student '{student.name}' proposes no boxes", where=f"stage {stage.name}", hint="add proposer to 'trainable'")


def instance_boxes(labels: Tensor) -> list[Tensor]:
    """labels (B, F, F) of instances -> of each image (K, 4) float xyxy in the F frame; x1 and y1 are the edges behind the last pixel."""
    found = []
    for one in labels:
        ids = one[one > 0].unique()
        corners = boxes(one == ids[:, None, None]) + 0.5 if len(ids) else labels.new_zeros((0, 2, 2), dtype=torch.float32)
        found.append(corners.flatten(1))
    return found


def _fast_bf16() -> bool:
    """Whether this CPU has bf16 matrix instructions; without them bf16 is slower than fp32."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def train_stages(student: Sam, teacher: Sam, stages: Sequence[Stage], batches: Callable[[Stage], Batches], folder: Path,
                 on_step: Callable[[str, Row], None] | None = None) -> list[StageResult]:
    """All stages in order; each finished one leaves `<number>-<name>.done.pt`, so that it is not trained again."""
    results = []
    for number, stage in enumerate(stages):
        done = Path(folder) / f"{number}-{stage.name}.done.pt"
        trainer = StageTrainer(student, teacher, stage, batches(stage), Path(folder) / f"{number}-{stage.name}.state.pt")
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
