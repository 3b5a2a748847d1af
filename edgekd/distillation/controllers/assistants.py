"""Teacher to assistant to student: where the gap is large, a network between the two learns first and then teaches (AMD, arXiv 2407.04208)."""
from __future__ import annotations

from collections.abc import Sequence

from edgekd.distillation.points import Controller
from edgekd.errors import UsageError
from edgekd.recipe import PluginRef, Stage


class Assistants(Controller):
    """Every candidate learns from the teacher in a stage of its own, then the student from the candidate with the largest - loss / (parameters saved).
    With an anchor a < 1 the student's target is (1 - a) x assistant + a x the base teacher (seed "Recursive meta-distillation").

    Simplified from the paper: candidates are students by name, each trained by itself, instead of prunings of the teacher that share weights; and
    they are judged by their distillation loss instead of accuracy.

    Args:
        names: candidates, students by name; with `chain` each teaches the next instead.
        share: of the stage's steps that goes to the assistants, evenly.
        chain: train the candidates one from the other in this order, the last one teaches the student.
        anchor: share of the base teacher in what the student learns, at first.
        final_anchor: the same at the end; none: as at first.
    """

    name, family, paper = "assistants", "multi_step", "AMD: Automatic Multi-step Distillation (arXiv 2407.04208)"

    def __init__(self, names: Sequence[str], share: float = 0.5, chain: bool = False, anchor: float = 0.0, final_anchor: float | None = None) -> None:
        super().__init__()
        if not names or not 0 < share < 1:
            raise UsageError("assistants: name at least one student, and a share of the steps between 0 and 1", hint="names: [repvit_m], share: 0.5")
        self.names, self.share, self.chain = list(dict.fromkeys(names)), share, chain
        self.anchor, self.final_anchor = anchor, anchor if final_anchor is None else final_anchor

    def expand(self, stage: Stage) -> list[Stage]:
        """A stage for each assistant, then the student's own; together they have the stage's steps."""
        rest = [ref for ref in stage.controllers if ref.name != self.name]
        each = max(1, round(stage.steps * self.share / len(self.names)))
        found = []
        for number, name in enumerate(self.names):
            before = [self.names[number - 1]] if self.chain and number else []
            found.append(stage.model_copy(update={"name": f"{stage.name}-assistant{number + 1}", "student": name, "teacher_from": before, "steps": each,
                                                  "controllers": rest, "warmup": min(stage.warmup, each // 4), "init_from": None}))
        targets = list(stage.targets)
        if self.anchor or self.final_anchor:
            options = {"weights": [1 - self.anchor, self.anchor], "final_weights": [1 - self.final_anchor, self.final_anchor]}
            targets.append(PluginRef(name="teacher_mean", options=options))
        left = max(1, stage.steps - each * len(self.names))
        found.append(stage.model_copy(update={"teacher_from": self.names[-1:] if self.chain else self.names, "steps": left, "controllers": rest,
                                              "targets": targets, "warmup": min(stage.warmup, left // 4)}))
        return found


controller = Assistants
