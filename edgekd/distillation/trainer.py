"""One stage of distillation, on one screen: embed, ask teacher and student the same prompts, add up the objectives, step.

The prompt loop is EdgeSAM's second phase (arXiv 2312.06660, sec. 3.2; Algorithm 1): a box or a click an instance, then clicks in the
region where student and teacher differ. All prompts of a batch are decoded in one call, and the error region of all of them is
sampled at once. What differs: box and click are mixed within a batch (absent points make room), and small batches clip at 1.0.
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
from edgekd.distillation.clicks import error_click, first_prompts
from edgekd.distillation.objectives import Context, Objective, Outputs
from edgekd.distillation.objectives import build as build_objective
from edgekd.distillation.schedule import cosine, decay_groups
from edgekd.errors import EdgekdError
from edgekd.models.sam import Sam
from edgekd.recipe import Stage
from edgekd.workspace import atomic_path, fingerprint

SHARE_BOX = 0.5
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
        self.prompted = any({"masks", "iou"} & o.needs for _, o in self.objectives)
        self.bf16 = stage.precision == "bf16" or (stage.precision == "auto" and torch.backends.mkldnn.is_available() and _fast_bf16())
        parts = [m for name, m in (("encoder", student.encoder), ("decoder", student.mask_decoder)) if name in stage.trainable]
        student.requires_grad_(False)
        for part in parts:
            part.requires_grad_(True)
        self.trained = parts
        groups = decay_groups([*parts, *(o for _, o in self.objectives)], stage.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=stage.lr, betas=(0.9, 0.999), fused=True)
        self.average = {k: v.detach().clone() for k, v in student.state_dict().items()} if stage.ema else None
        self.step, self.result = 0, StageResult(stage.name)

    # --- one step -------------------------------------------------------------------------------------------------------

    def loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """The weighted objectives of one batch, a scalar."""
        embedding = self.student.embed(batch.images)
        ours, theirs = Outputs(embedding), Outputs(batch.embedding)
        context = Context(batch.valid)
        total = embedding.new_zeros((), dtype=torch.float32)
        for weight, objective in self.objectives:
            if objective.needs == {"embedding"}:
                total = total + weight * objective(ours, theirs, context).mean()
        return total + self.prompt_loop(ours, theirs, batch, generator) if self.prompted else total

    def prompt_loop(self, ours: Outputs, theirs: Outputs, batch: Batch, generator: torch.Generator) -> Tensor:
        """The objectives on masks, mean over the decodes."""
        masks = batch.masks(self.stage.instances, generator)
        low = torch.nn.functional.avg_pool2d(masks.float().unsqueeze(1), 4).squeeze(1)
        low = low >= low.amax((1, 2), keepdim=True).clamp(max=0.5)
        points, labels = first_prompts(masks, low, SHARE_BOX, generator)
        valid = batch.valid.squeeze(1).repeat_interleave(self.stage.instances, 0)
        context = Context(batch.valid, valid, single=labels[:, 0] == 1)
        scale = self.teacher.preprocess.side / self.student.preprocess.side
        losses: list[Tensor] = []
        last = has_last = None
        for round_ in range(self.stage.decode_iters + 1):
            with torch.no_grad():
                target, quality = self.teacher.decode(theirs.embedding, (points + 0.5) * scale - 0.5, labels, resized(last, scale), has_last)
            logits, predicted = self.student.decode(ours.embedding, points, labels, last, has_last)
            ours, theirs = Outputs(ours.embedding, logits, predicted), Outputs(theirs.embedding, target, quality)
            losses.append(sum((w * o(ours, theirs, context).mean() for w, o in self.objectives if o.needs != {"embedding"}), logits.new_zeros(())))
            if round_ < self.stage.decode_iters:
                # the mask to correct is the one the teacher believes in most (facts of a click: several may be right)
                best = torch.where(context.single, 1 + quality[:, 1:].argmax(1), 0) if context.single is not None else quality.argmax(1)
                every = torch.arange(len(best))
                truth = nn.functional.interpolate(target.float()[every, best].unsqueeze(1), logits.shape[-2:], mode="bilinear", align_corners=False).squeeze(1) > 0
                answer = logits.detach().float()[every, best]
                click, label = error_click(answer > 0, truth, valid > 0, generator)
                last, has_last = answer.unsqueeze(1).clamp(-20, 20), (torch.rand(len(answer), generator=generator) < self.stage.mask_feedback).float()
                points, labels = torch.cat([points, click], 1), torch.cat([labels, label], 1)
        return torch.stack(losses).mean()

    def train_step(self) -> Row:
        """One optimizer step; a loss or gradient that is not finite is skipped, and too many of them end the stage."""
        stage, generator = self.stage, torch.Generator().manual_seed(self.stage.seed * 1_000_003 + self.step)
        rate = cosine(self.step, stage.steps, stage.lr, stage.min_lr, stage.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = self.batches[self.step]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            loss = self.loss(batch, generator)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], stage.clip))
        value = float(loss.detach())
        if math.isfinite(norm) and math.isfinite(value):
            self.optimizer.step()
            self.follow()
        else:
            self.result.bad_steps += 1
            if self.result.bad_steps > MOST_BAD_STEPS:
                raise EdgekdError(f"the loss is not finite ({self.result.bad_steps} steps)", where=f"stage {stage.name}, step {self.step}",
                                  hint=f"lower the learning rate: --set stages.N.lr={stage.lr / 10:g}, or --set stages.N.precision=fp32")
        self.step += 1
        return {"step": self.step, "loss": value if math.isfinite(value) else -1.0, "lr": rate, "norm": norm if math.isfinite(norm) else -1.0}

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
        self.student.train()
        if self.stage.frozen_norm:
            for module in self.student.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
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


def resized(mask: Tensor | None, scale: float) -> Tensor | None:
    """A mask prompt (P, 1, h, w) at the resolution of a model whose input is `scale` times as large."""
    if mask is None or scale == 1:
        return mask
    return nn.functional.interpolate(mask, [round(side * scale) for side in mask.shape[-2:]], mode="bilinear", align_corners=False)


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
