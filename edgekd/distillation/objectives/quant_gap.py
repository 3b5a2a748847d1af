"""What rounding took from a student: its outputs, maps and attention against those in full precision.

Kim et al., "Understanding and Improving Knowledge Distillation for Quantization-Aware Training of Large Transformer Encoders" (arXiv
2211.11014): a loss on the attention maps and one on the attention's outputs recover a quantized transformer better than one on the scores.
"""
from __future__ import annotations

import copy
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.distillation.losses import over_photo
from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.distillation.points import Objective
from edgekd.distillation.softmax import soft_kl
from edgekd.distillation.taps import Taps, discover
from edgekd.errors import UsageError


class QuantGap(Objective):
    """Mean over the pairs: |a - t|^2 / mean |t|^2 of maps (B, C, h, w), mean KL(t || a) over the rows of attention (B, heads, N, N); and with
    `logits`, KL of the soft labels. Against the teacher, or against the student itself as it was when the stage began.

    The paper's attention-output loss is a pair that names the attention's module, its attention-map loss one that names `attention0`, ....
    Against the student itself the pairs are its embedding and, if wanted, its stage maps, or the paper's two of every attention; what the teacher gives
    is not looked at.

    Args:
        against: "teacher"; "self", the student before it was rounded (by the controller `fake_quant`); "self_stages", the same with its stages;
            "self_attention", with the maps and outputs of its attentions.
        logits: weight of the KL of logits, where both give them.
        temperature: of that KL.
    """

    name, family = "quant_gap", "quantization_aware"
    paper = "Understanding and Improving Knowledge Distillation for Quantization-Aware Training of Large Transformer Encoders (arXiv 2211.11014)"
    needs = frozenset({"embedding", "feats", "images"})
    default_taps = "embedding"

    def __init__(self, against: Literal["teacher", "self", "self_stages", "self_attention"] = "teacher", logits: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__()
        if against not in ("teacher", "self", "self_stages", "self_attention") or logits < 0 or temperature <= 0:
            raise UsageError("quant_gap takes against teacher, self, self_stages or self_attention, logits >= 0 and temperature > 0, "
                             f"not against={against}, logits={logits:g}")
        self.against, self.logits, self.temperature = against, logits, temperature
        self.reference: nn.Module | None = None
        if against != "teacher":
            self.asks_teacher = False  # type: ignore[misc]
        if against in ("self_stages", "self_attention"):
            self.default_taps = "student" if against == "self_stages" else "student_attention"  # type: ignore[misc]

    def bind(self, setup: Setup) -> None:
        """Copy the student, where it is compared with itself; raises UsageError for pairs that cannot be compared."""
        if self.against != "teacher":
            if any(o.name == self.name and o.options.get("against") == self.against and o.taps for o in setup.stage.objectives):
                raise UsageError("quant_gap against the student itself knows what to compare", where=setup.where, hint="leave 'taps' out")
            self.reference = copy.deepcopy(setup.student).eval().requires_grad_(False)
            assert setup.context.images is not None
            kept = {"self_stages": "stage", "self_attention": "attention"}.get(self.against)
            known = {} if kept is None else {n: p for n, p in discover(self.reference, setup.context.images[:1]).items() if n.startswith(kept)}
            outputs = known.values() if self.against == "self_attention" else ()
            self.paths: dict[str, str | None] = {**known, **{path: path for path in outputs}, "embedding": None}
            return
        for a, t in zip(setup.ours.feats, setup.theirs.feats, strict=True):
            if attention(t) and a.shape[1:] != t.shape[1:]:
                raise UsageError(f"attention of {tuple(a.shape[1:])} cannot be compared with the teacher's {tuple(t.shape[1:])}", where=setup.where,
                                 hint="compare it with the student itself: options: {against: self}")
            if a.shape[1] > t.shape[1]:
                raise UsageError(f"quant_gap compares maps channel by channel, and the student's has {a.shape[1]}, the teacher's {t.shape[1]}",
                                 where=setup.where, hint="compare it with the student itself: options: {against: self}, or name other taps")

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """-> (B,)."""
        if self.reference is not None:
            inside = () if self.against == "self" else student.feats
            student, teacher = replace(student, feats=(*inside, student["embedding"])), self._full(context)
        parts = [gap(a, t, context.valid) for a, t in zip(student.feats, teacher.feats, strict=True)]
        loss = torch.stack(parts).mean(0)
        if self.logits and student.logits is not None and teacher.logits is not None and student.logits.shape == teacher.logits.shape:
            loss = loss + self.logits * soft_kl(student.logits, teacher.logits, self.temperature)
        return loss

    @torch.no_grad()
    def _full(self, context: Context) -> Outputs:
        """What the student gave in full precision, in the order of its pairs."""
        assert self.reference is not None and context.images is not None
        found = Outputs.of(Taps(self.reference.eval(), self.paths).run(context.images))
        return found.paired(list(self.paths))


def attention(x: Tensor) -> bool:
    """Whether a tap is attention probabilities (B, heads, N, N): its rows sum to 1."""
    return x.ndim == 4 and x.shape[-1] == x.shape[-2] and bool((x >= 0).all()) and bool(((x.float().sum(-1) - 1).abs() < 1e-2).all())


def gap(ours: Tensor, theirs: Tensor, valid: Tensor) -> Tensor:
    """(B,) of one pair."""
    if attention(theirs):
        return rows_kl(ours.float().clamp(min=1e-8).log(), theirs.float())
    if len(ours) != len(valid):  # windows: every photo has as many, padding included
        each = (ours.float() - theirs.float()).square().flatten(1).mean(1) / theirs.float().square().flatten(1).mean(1).clamp(min=1e-12)
        return each.unflatten(0, (len(valid), -1)).mean(1)
    theirs = theirs[:, : ours.shape[1]].float()
    if theirs.shape[-2:] != ours.shape[-2:]:
        theirs = F.interpolate(theirs, ours.shape[-2:], mode="bilinear", align_corners=False, antialias=True)
    scale = over_photo(theirs.square(), valid).clamp(min=1e-12)
    return over_photo((ours.float() - theirs).square(), valid) / scale


def rows_kl(ours: Tensor, theirs: Tensor) -> Tensor:
    """Mean over all rows of KL(theirs || ours): logs (B, ..., N) and probabilities (B, ..., N) -> (B,)."""
    return F.kl_div(ours, theirs, reduction="none").sum(-1).flatten(1).mean(1)


objective = QuantGap
