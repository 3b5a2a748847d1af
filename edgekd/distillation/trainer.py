"""One stage of distillation: losses of a batch, weighted and added up, one optimizer step after another.

What a batch costs the student is in `step.Step`. A stage trains the parts that it names and leaves all others as they are.
"""
from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from edgekd import checkpoint
from edgekd.distillation.batches import Ahead, Batch, Batches
from edgekd.distillation.distributed import current, gathered, load, load_optimizer, moved, placed, plain_norms, shared_copy, sync_norms
from edgekd.distillation.draws import Draws, Source
from edgekd.distillation.generations import build_assistants, end_loss, teachers_of
from edgekd.distillation.outputs import PER_PROMPT
from edgekd.distillation.parts import modules_of, part_of
from edgekd.distillation.points import Objective
from edgekd.distillation.schedule import optimizer, rate
from edgekd.distillation.step import Step
from edgekd.errors import EdgekdError, UsageError
from edgekd.models.proposer import BoxProposer
from edgekd.recipe import Stage
from edgekd.workspace import atomic_path, fingerprint

MOST_BAD_STEPS = 10
CHECKPOINT_SECONDS = 15.0
Row = dict[str, float | None]


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
        self.student, self.stage, self.state, self.group = student, stage, Path(state), current()
        self.step_module = Step(student, teachers, stage)
        self.batches = batches(self.step_module) if callable(batches) else batches
        self.batch_size = min(self.batches.batch_size, max(1, len(self.batches) // self.group.world))
        self.bf16 = stage.precision == "bf16" or (stage.precision == "auto" and _fast_bf16(self.group.device))
        self.trained = trainable_parts(student, stage)
        check_reach(student, stage, list(self.step_module.objectives.values()))
        self.step_module.images_total = len(self.batches)
        self.step_module.bind(self.batches.batch(range(min(2, len(self.batches)))))
        self.aux = self.step_module.aux
        self.optimizer = optimizer(stage, [*self.trained, self.aux])
        self.average = {k: v.detach().clone() for k, v in student.state_dict().items()} if stage.ema else None
        self.plain, self.model = self.step_module, cast(nn.Module, self.step_module)
        self.started, self.step, self.seen, self.result = False, 0, 0, StageResult(stage.name)
        self.ahead: Ahead | None = None

    # --- one step -------------------------------------------------------------------------------------------------------

    def numbers(self, part: int) -> range:
        """Which images of the stream are this process's in the `part`-th batch from here."""
        first = self.seen + (part * self.group.world + self.group.rank) * self.batch_size
        return range(first, first + self.batch_size)

    def batch(self, part: int) -> Batch:
        """The `part`-th batch from here; while `run` lasts it was made during the step before."""
        if self.ahead is None:
            return self.batches.batch(self.numbers(part))
        last = self.step + 1 >= self.stage.steps and part + 1 == self.stage.accumulate
        return self.ahead.batch(self.numbers(part), range(0) if last else self.numbers(part + 1))

    def losses(self, batch: Batch, draws: Source) -> dict[str, Tensor]:
        """Losses (B,) by objective, as they are added up: with the recipe's weights, and what controllers make of them."""
        with torch.autocast(self.group.device.type, torch.bfloat16, enabled=self.bf16):
            return self.model(batch, draws, self.step)

    def gradients(self) -> tuple[Batch, dict[str, float]]:
        """Add up the gradients of a step's batches over all processes; the last batch, and each objective's mean loss."""
        stage, group, found = self.stage, self.group, dict[str, Tensor]()
        for part in range(stage.accumulate):
            draws = Draws(stage.seed * 1_000_003 + self.step * stage.accumulate + part, group.rank, group.world)
            batch = moved(self.batch(part), group.device)
            with group.collecting(self.model, part == stage.accumulate - 1):
                losses = {name: loss.mean() / stage.accumulate for name, loss in self.losses(batch, draws).items()}
                torch.stack(list(losses.values())).sum().backward()
            found = {name: loss.detach() + found.get(name, 0.0) for name, loss in losses.items()}
        return batch, dict(zip(found, group.mean(torch.stack(list(found.values()))).tolist(), strict=True))

    def train_step(self) -> Row:
        """One optimizer step; a loss or gradient that is not finite is skipped, and too many of them end the stage."""
        stage, lr = self.stage, rate(self.stage, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        batch, parts = self.gradients()
        norm = self.group.clip([p for g in self.optimizer.param_groups for p in g["params"]], stage.clip)
        value = sum(parts.values())
        if math.isfinite(norm) and math.isfinite(value):
            self.optimizer.step()
            self.follow()
        else:
            self.result.bad_steps += 1
            if self.result.bad_steps > MOST_BAD_STEPS:
                raise EdgekdError(f"the loss is not finite ({self.result.bad_steps} steps)", where=f"stage {stage.name}, step {self.step}",
                                  hint=f"lower the learning rate: --set stages.N.lr={stage.lr / 10:g}, or --set stages.N.precision=fp32")
        for controller in self.step_module.controllers:
            controller.after(self.step_module.context(batch, self.step))
        self.step += 1
        self.seen += stage.accumulate * self.group.world * self.batch_size
        row = {"step": self.step, "loss": value, "lr": lr, "norm": norm, **({f"loss.{k}": v for k, v in parts.items()} if len(parts) > 1 else {})}
        return {k: v if math.isfinite(v) else None for k, v in row.items()}

    def follow(self) -> None:
        """Move the average of the weights towards them."""
        if self.average is None:
            return
        keep = min(self.stage.ema, (self.step + 1) / (self.step + 10))
        state = self.step_module.student.state_dict()
        for k, v in self.average.items():
            v.lerp_(state[k], 1 - keep) if v.is_floating_point() else v.copy_(state[k])

    # --- the stage ------------------------------------------------------------------------------------------------------

    def run(self, on_step: Callable[[Row], None] | None = None) -> StageResult:
        """Train to the end of the stage, from the saved state if there is one; afterwards the student holds the averaged weights."""
        self.start()
        self.resume()
        begun = saved = time.monotonic()
        self.set_modes()
        try:
            with Ahead(self.batches) as self.ahead:
                while self.step < self.stage.steps:
                    row = self.train_step()
                    self.result.curve.append(row)
                    if on_step:
                        on_step(row)
                    if self.group.agreed(time.monotonic() - saved > CHECKPOINT_SECONDS):
                        self.save()
                        saved = time.monotonic()
        finally:
            self.ahead = None
        self.finish()
        self.result.seconds += time.monotonic() - begun
        return self.result

    def start(self) -> None:
        """Bring the step to the device of this process, and the processes together."""
        group, plain, self.started = self.group, self.step_module, True
        if group.sharded:  # sharding changes modules for good: a copy is sharded, and the student filled from it in the end
            self.step_module = shared_copy(plain, [*plain.teachers.values(), *plain.policies])
            self.trained = trainable_parts(self.step_module.student, self.stage)
            self.aux = self.step_module.aux
        for module in (self.step_module, *plain.teachers.values()):
            if isinstance(module, nn.Module):
                module.to(group.device)
        if group.world > 1 and group.device.type == "cuda" and self.stage.sync_norm and not self.stage.frozen_norm:
            sync_norms(self.step_module)
        if group.sharded or group.device.type != "cpu":
            self.optimizer = optimizer(self.stage, [*self.trained, self.aux])
        self.model, self.optimizer = group.wrap(self.step_module, self.optimizer)
        if self.average is not None:
            self.average = {k: v.detach().clone() for k, v in self.step_module.student.state_dict().items()}

    def finish(self) -> None:
        """Leave the student with its final weights, plain, frozen and on the CPU: averaged where the stage averages, and as its controllers
        leave it."""
        if self.started:
            self.end()
        if self.average is not None:
            self.student.load_state_dict(self.average)
        for controller in self.step_module.controllers:
            controller.finish()
        self.student.eval().requires_grad_(False)

    def end(self) -> None:
        """Undo `start`."""
        self.started = False
        average = None if self.average is None else gathered(self.average)
        if self.group.sharded:
            self.plain.load_state_dict(gathered(self.step_module.state_dict()))
        self.average, self.model, self.step_module, self.aux = average, self.plain, self.plain, self.plain.aux
        for module in (self.plain, *self.plain.teachers.values()):
            if isinstance(module, nn.Module):
                module.cpu()
        plain_norms(self.plain)
        self.group.unwrap()

    def set_modes(self) -> None:
        """Only what learns is in training mode: batch norms of frozen parts keep their statistics too."""
        self.step_module.student.eval()
        self.aux.train()
        for part in self.trained:
            part.train()
        if self.stage.frozen_norm:
            for module in self.step_module.student.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def key(self) -> str:
        """A state file belongs to this stage as it is written in the recipe."""
        return fingerprint([self.stage.model_dump(), self.student.name, self.student.preprocess.image_size])

    def save(self) -> None:
        """Everything that the next step depends on, atomically; the first process writes, and any number of them can go on from it."""
        if not self.group.first and not self.group.sharded:
            return
        state: dict[str, Any] = gathered({
            "key": self.key(), "step": self.step, "seen": self.seen, "student": self.step_module.student.state_dict(), "average": self.average,
            "optimizer": self.optimizer.state_dict(), "aux": self.aux.state_dict(), "bad_steps": self.result.bad_steps})
        if self.group.first:
            with atomic_path(self.state) as temp:
                torch.save({**state, "curve": self.result.curve}, temp)

    def resume(self) -> None:
        """Take up the saved state; one that is damaged or of another stage is left alone and overwritten later."""
        state = self.group.share(self._read)
        if state is None:
            return
        load(self.step_module.student, state["student"])
        load_optimizer(self.optimizer, state["optimizer"])
        load(self.aux, state["aux"])
        if self.average is not None and state["average"] is not None:
            self.average = {k: placed(v, self.average[k]) for k, v in state["average"].items()}
        else:
            self.average = None
        self.step, self.seen = state["step"], state["seen"]
        self.result.curve, self.result.bad_steps = state["curve"], state["bad_steps"]

    def _read(self) -> dict[str, Any] | None:
        try:
            state = torch.load(self.state, map_location="cpu", weights_only=True)
        except Exception:  # no file, or cut short, or no zip: torch raises a different one for each
            return None
        return state if state.get("key") == self.key() else None


def trainable_parts(student: Any, stage: Stage) -> list[nn.Module]:
    """The parts that the stage trains, and nothing else, with gradients; a box proposer is made where it is to be trained and missing.

    Raises:
        UsageError: the student has no such part.
    """
    if "proposer" in stage.trainable and getattr(student, "proposer", 0) is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stage.seed)
            student.proposer = BoxProposer(student.embed_dim)
    chosen = modules_of(student, stage.trainable)
    student.requires_grad_(False)
    for part in chosen:
        part.requires_grad_(True)
    return chosen


NEAREST = {"proposer": "box_proposals", "head": "kd"}
"""Part of a student -> an objective that trains it, for messages."""


def check_reach(student: Any, stage: Stage, objectives: Sequence[Objective]) -> None:
    """Every part that a stage trains must be reached by one of its objectives.

    Raises:
        UsageError: one is not, or boxes are compared with those of a student that proposes none.
    """
    reached = {"encoder": any(o.needs for o in objectives), "proposer": any("boxes" in o.needs for o in objectives)}
    reached["decoder"] = reached["prompt_encoder"] = any(o.needs & PER_PROMPT for o in objectives)
    reached["head"] = any(o.needs & {"logits", "pooled", "embedding", "images"} or ("feats" in o.needs and o.default_taps == "embedding") for o in objectives)
    idle = [part for part in map(part_of, stage.trainable) if not reached.get(part, True)]
    if idle:
        raise UsageError(f"no objective of the stage trains the {idle[0]}", where=f"stage {stage.name}",
                         hint=f"take {idle[0]} out of 'trainable', or add an objective: {NEAREST.get(idle[0], 'prompt_masks')}")
    if reached["proposer"] and getattr(student, "proposer", None) is None:
        raise UsageError(f"the student '{student.name}' proposes no boxes", where=f"stage {stage.name}", hint="add proposer to 'trainable'")


def _fast_bf16(device: torch.device) -> bool:
    """Whether a device has bf16 matrix instructions; without them bf16 is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def train_stages(student: Any, teachers: Any, stages: Sequence[Stage], batches: Callable[[Step], Batches], folder: Path,
                 on_step: Callable[[str, Row], None] | None = None, build: Callable[[str], Any] | None = None) -> list[StageResult]:
    """All stages in order; each finished one leaves `<number>-<name>.done.pt`, so that it is not trained again.

    Args:
        build: makes an untrained assistant from its name, for stages that train one.
    """
    results: list[StageResult] = []
    assistants, losses = build_assistants(stages, build), dict[str, float]()
    for number, stage in enumerate(stages):
        done = Path(folder) / f"{number}-{stage.name}.done.pt"
        learner = student if stage.student is None else assistants[stage.student]
        if stage.init_from is not None:
            checkpoint.load_into(learner, Path(stage.init_from))
        trainer = StageTrainer(learner, teachers_of(stage, teachers, assistants, losses), stage, batches, Path(folder) / f"{number}-{stage.name}.state.pt")
        results.append(_finished(trainer, done) or _train(trainer, done, on_step))
        if stage.student is not None:
            losses[stage.student] = end_loss(results[-1].curve)
    return results


def _finished(trainer: StageTrainer, done: Path) -> StageResult | None:
    state, trainer.state = trainer.state, done
    trainer.resume()
    trainer.state = state
    if trainer.step < trainer.stage.steps:
        return None
    trainer.finish()
    return trainer.result


def _train(trainer: StageTrainer, done: Path, on_step: Callable[[str, Row], None] | None) -> StageResult:
    result = trainer.run((lambda row: on_step(trainer.stage.name, row)) if on_step else None)
    state, trainer.state, trainer.average = trainer.state, done, None
    trainer.save()
    if trainer.group.first:
        state.unlink(missing_ok=True)
    return result
