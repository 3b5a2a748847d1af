"""Block by block, then pairs of blocks, then end to end: early on, no block has to follow what the blocks before it still change
(StableKD, arXiv 2312.13223)."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgekd.distillation.points import Controller
from edgekd.errors import UsageError
from edgekd.recipe import ObjectiveRef, Stage


class StableKD(Controller):
    """The stage becomes: one stage for each block, in which it alone learns to give the teacher's map at its end; one for each 2, 4, ... neighbouring
    blocks together; and the stage itself, end to end, with what is left of the steps.

    Simplified from the paper: a block is fed by the student's own frozen blocks before it, not by the teacher's, so that no stitching is needed
    (`m2mkd` feeds it the teacher's); and blocks are trained one after another rather than side by side.

    Args:
        blocks: number of blocks, ending at the taps stage1, stage2, ... of both models.
        taps: [student's, teacher's] pairs that end the blocks, in place of `blocks`.
        share: of the steps that goes to blocks.
        merge: whether there are stages of 2, 4, ... blocks between.
        objective: what compares the maps; it needs feats.
        options: of that objective.
        part: the part of the student that has the blocks.
    """

    name, family, paper = "stablekd", "multi_step", "StableKD (arXiv 2312.13223)"

    def __init__(self, blocks: int = 4, taps: Sequence[Sequence[str]] = (), share: float = 0.5, merge: bool = True, objective: str = "hint",
                 options: dict[str, Any] | None = None, part: str = "encoder") -> None:
        super().__init__()
        self.taps = [(str(s), str(t)) for s, t in taps] or [(f"stage{i}", f"stage{i}") for i in range(1, blocks + 1)]
        if len(self.taps) < 2 or not 0 < share < 1:
            raise UsageError("stablekd: two blocks or more, and a share of the steps between 0 and 1", hint="blocks: 4, share: 0.5")
        self.share, self.merge, self.objective, self.options, self.part = share, merge, objective, dict(options or {}), part

    def groups(self) -> list[tuple[int, int]]:
        """(first, last) block of each stage before the last, numbered from 0."""
        count, size, found = len(self.taps), 1, []
        while size < count:
            found += [(i, min(i + size, count) - 1) for i in range(0, count, size)]
            if not self.merge:
                break
            size *= 2
        return found

    def expand(self, stage: Stage) -> list[Stage]:
        """The stages in order; together they have the stage's steps."""
        rest = [ref for ref in stage.controllers if ref.name != self.name]
        groups = self.groups()
        each = max(1, round(stage.steps * self.share / len(groups)))
        found = []
        for number, (first, last) in enumerate(groups, 1):
            after = self.taps[first - 1][0] if first else ""
            hint = ObjectiveRef(name=self.objective, options=self.options, taps=[self.taps[last]])
            label = f"{first + 1}" if first == last else f"{first + 1}to{last + 1}"
            found.append(stage.model_copy(update={
                "name": f"{stage.name}-{number}-block{label}", "objectives": [hint], "targets": [], "controllers": [], "steps": each,
                "trainable": [f"{self.part}[{after}:{self.taps[last][0]}]"], "warmup": min(stage.warmup, each // 4),
                "init_from": stage.init_from if number == 1 else None}))
        left = max(1, stage.steps - each * len(groups))
        found.append(stage.model_copy(update={"controllers": rest, "steps": left, "warmup": min(stage.warmup, left // 4), "init_from": None}))
        return found


controller = StableKD
