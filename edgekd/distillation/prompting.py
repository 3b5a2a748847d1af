"""Prompts in the loop: teacher and student answer the same prompt, then the same corrective clicks, and the objectives compare them.

EdgeSAM's second phase (arXiv 2312.06660, sec. 3.2; Algorithm 1) with the whole batch in one decode: a box or a click an instance, then
clicks in the region where the answer is wrong, drawn for all prompts at once. Box and click may share a batch: absent points make room.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.distillation.batches import Batch
from edgekd.distillation.clicks import cells, error_click, first_prompts
from edgekd.distillation.draws import Draws
from edgekd.distillation.outputs import Context, Outputs
from edgekd.distillation.points import Objective
from edgekd.errors import UsageError
from edgekd.models.sam import NUM_MASKS, Sam
from edgekd.protocols import BOX_TOP_LEFT, POSITIVE
from edgekd.recipe import Stage


class PromptLoop:
    """The objectives on masks, by name, each as the mean over the decodes of a step.

    Raises:
        UsageError: an objective needs the decoder's tokens of a teacher whose decoder is not SAM's.
    """

    def __init__(self, student: Sam, teacher: Any, stage: Stage, objectives: Mapping[str, Objective]) -> None:
        self.student, self.teacher, self.stage = student, teacher, stage
        self.objectives = dict(objectives)
        self.tokens = any("tokens" in o.needs for o in self.objectives.values())
        if self.tokens and token_module(teacher) is None:
            raise UsageError(f"the teacher '{teacher.name}' shows no decoder tokens", where=f"stage {stage.name}",
                             hint="take the objective that needs them out; teachers with SAM's own decoder have them")
        asked = any(o.asks_teacher for o in self.objectives.values())
        self.asks_teacher = asked or (stage.decode_iters > 0 and stage.prompts.corrected_by == "teacher")

    def __call__(self, ours: Outputs, theirs: Outputs, batch: Batch, context: Context) -> dict[str, Tensor]:
        """Losses (B,) by objective. `ours` and `theirs` hold the embeddings of the batch, B images."""
        stage, draws = self.stage, context.draws
        assert draws is not None
        masks = batch.masks(stage.instances, draws)
        low = cells(masks)
        low = low >= low.amax((1, 2), keepdim=True).clamp(max=0.5)
        points, labels = self.first(masks, low, draws)
        single = ((labels == POSITIVE).sum(1) == 1) & (labels[:, 0] != BOX_TOP_LEFT)
        context = replace(context, valid_prompts=batch.valid.squeeze(1).repeat_interleave(stage.instances, 0), single=single, truth=masks)
        clicks = draws.integer(stage.decode_iters + 1) if stage.random_iters else stage.decode_iters
        losses: dict[str, list[Tensor]] = {name: [] for name in self.objectives}
        last = has_last = None
        for round_ in range(clicks + 1):
            ours, theirs = self.decode(ours, theirs, points, labels, last, has_last)
            for name, objective in self.objectives.items():
                losses[name].append(objective(ours, theirs, context).unflatten(0, (-1, stage.instances)).mean(1))
            if round_ < clicks:
                answer, point, label = self.correct(ours, theirs, low, context)
                if stage.mask_feedback > 0:
                    last, has_last = answer.unsqueeze(1).clamp(-20, 20), (draws.rand(len(answer)) < stage.mask_feedback).to(answer)
                points, labels = torch.cat([points, point], 1), torch.cat([labels, label], 1)
        return {name: torch.stack(rounds).mean(0) for name, rounds in losses.items()}

    def first(self, masks: Tensor, low: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """The first prompts of the instances, as the stage draws them."""
        p = self.stage.prompts
        return first_prompts(masks, low, p.box_share, draws, together=p.coin == "batch", jitter=p.jitter, central=p.central, clicks=p.clicks)

    def decode(self, ours: Outputs, theirs: Outputs, points: Tensor, labels: Tensor, last: Tensor | None, has: Tensor | None) -> tuple[Outputs, Outputs]:
        """Both models' answers to the prompts, given in the student's frame."""
        assert ours.embedding is not None and theirs.embedding is not None
        scale = self.teacher.preprocess.side / self.student.preprocess.side
        if self.asks_teacher:
            with torch.no_grad():
                theirs = ask(self.teacher, theirs.embedding, (points + 0.5) * scale - 0.5, labels, resized(last, scale), has, tokens=self.tokens)
        return ask(self.student, ours.embedding, points, labels, last, has, tokens=self.tokens), theirs

    def correct(self, ours: Outputs, theirs: Outputs, low: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """The answers (P, h, w) that are to be corrected, and a click in the wrong part of each: point (P, 1, 2), label (P, 1)."""
        assert ours.masks is not None and ours.iou is not None and context.single is not None and context.valid_prompts is not None
        quality = ours.iou.detach() if theirs.iou is None else theirs.iou
        # of one click's alternatives, the mask to correct is the one that is believed in most: several may be right
        best = torch.where(context.single, 1 + quality[:, 1:].argmax(1), 0)
        every = torch.arange(len(best), device=best.device)
        truth = low
        if self.stage.prompts.corrected_by == "teacher":
            assert theirs.masks is not None
            truth = F.interpolate(theirs.masks.float()[every, best].unsqueeze(1), ours.masks.shape[-2:], mode="bilinear", align_corners=False).squeeze(1) > 0
        answer = ours.masks.detach().float()[every, best]
        click, label = error_click(answer > 0, truth, context.valid_prompts > 0, context.draws, fewest=self.stage.prompts.fewest_errors)
        return answer, click, label


def ask(model: Any, embedding: Tensor, points: Tensor, labels: Tensor, mask: Tensor | None, has: Tensor | None, *, tokens: bool = False) -> Outputs:
    """A model's answer to P prompts of B images, those of one image together; a foreign teacher is asked image by image."""
    with tapped(token_module(model) if tokens else None) as seen:
        if isinstance(model, Sam) or len(embedding) == 1:
            masks, iou = model.decode(embedding, points, labels, mask, has)
        else:
            each = len(points) // len(embedding)
            parts = [model.decode(embedding[i : i + 1], *(None if t is None else t[i * each : (i + 1) * each] for t in (points, labels, mask, has)))
                     for i in range(len(embedding))]
            masks, iou = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    return Outputs(embedding, masks, iou, torch.cat([out[0][:, : 1 + NUM_MASKS] for out in seen]) if tokens else None)


def token_module(model: Any) -> nn.Module | None:
    """The two-way transformer of SAM's decoder, whose first output are the tokens; None for a model without one."""
    return getattr(getattr(model, "mask_decoder", None), "transformer", None)


@contextmanager
def tapped(module: nn.Module | None) -> Iterator[list[Any]]:
    """What `module` gave at every call within the context, in order."""
    seen: list[Any] = []
    if module is None:
        yield seen
        return
    handle = module.register_forward_hook(lambda _, __, out: seen.append(out))
    try:
        yield seen
    finally:
        handle.remove()


def resized(mask: Tensor | None, scale: float) -> Tensor | None:
    """A mask prompt (P, 1, h, w) at the resolution of a model whose frame is `scale` times as large."""
    if mask is None or scale == 1:
        return mask
    return F.interpolate(mask, [round(side * scale) for side in mask.shape[-2:]], mode="bilinear", align_corners=False)
