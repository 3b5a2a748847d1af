"""Module to module: each block of the student first learns in the place of the teacher's, then all of them together (m2mKD, arXiv 2402.16918)."""
from __future__ import annotations

from collections.abc import Sequence

from edgekd.distillation.points import Controller
from edgekd.errors import UsageError
from edgekd.recipe import ObjectiveRef, Stage


class M2mKD(Controller):
    """The stage becomes: one stage a module with the objective `module_swap`, in which that module alone learns, then the stage itself with what is left of
    the steps.

    Args:
        modules: number of modules, ending at the taps stage1, stage2, ... of both models.
        taps: [student's, teacher's] pairs that end the modules, in place of `modules`.
        share: of the steps that goes to modules, evenly.
        part: the part of the student that has the modules.
    """

    name, family, paper = "m2mkd", "multi_step", "m2mKD (arXiv 2402.16918)"

    def __init__(self, modules: int = 4, taps: Sequence[Sequence[str]] = (), share: float = 0.5, part: str = "encoder") -> None:
        super().__init__()
        self.taps = [(str(s), str(t)) for s, t in taps] or [(f"stage{i}", f"stage{i}") for i in range(1, modules + 1)]
        if not 0 < share < 1:
            raise UsageError(f"m2mkd: share of the steps between 0 and 1, not {share}")
        self.share, self.part = share, part

    def expand(self, stage: Stage) -> list[Stage]:
        """The stages in order; together they have the stage's steps."""
        rest = [ref for ref in stage.controllers if ref.name != self.name]
        each = max(1, round(stage.steps * self.share / len(self.taps)))
        found = []
        for number, (ours, _) in enumerate(self.taps, 1):
            after = self.taps[number - 2][0] if number > 1 else ""
            swap = ObjectiveRef(name="module_swap", options={"module": number}, taps=self.taps)
            found.append(stage.model_copy(update={
                "name": f"{stage.name}-module{number}", "objectives": [swap], "targets": [], "controllers": [], "steps": each,
                "trainable": [f"{self.part}[{after}:{ours}]"], "warmup": min(stage.warmup, each // 4), "init_from": stage.init_from if number == 1 else None}))
        left = max(1, stage.steps - each * len(self.taps))
        found.append(stage.model_copy(update={"controllers": rest, "steps": left, "warmup": min(stage.warmup, left // 4), "init_from": None}))
        return found


controller = M2mKD
