"""What a student starts from and in which form it trains: a checkpoint of its own, folded where a stage rounds it."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekd import checkpoint, console, tasks
from edgekd.distillation.parts import part_of
from edgekd.errors import UsageError
from edgekd.models.rounding import forget
from edgekd.recipe import Recipe, Stage

ROUNDING = ("fake_quant", "quantization_points")
"""Controllers that leave rounded weights."""


@dataclass(frozen=True)
class Rounding:
    """What stages train a student for: the scheme to export it in, None where only weights are rounded; and the end of its file's name."""

    scheme: str | None
    label: str


def check_rounding(stages: Sequence[Stage]) -> Rounding | None:
    """What the stages round the student to, or None.

    Raises:
        UsageError: a later stage would move the weights off their grid.
    """
    found = [(i, ref) for i, stage in enumerate(stages) for ref in stage.controllers if ref.name in ROUNDING and stage.student is None]
    if not found:
        return None
    last, ref = found[-1]
    after = next((s for s in stages[last + 1 :] if s.student is None and {part_of(p) for p in s.trainable} & {"encoder", "head"}), None)
    if after is not None:
        raise UsageError(f"the stage trains what stage {stages[last].name} has rounded, and would move it off its grid", where=f"stage {after.name}",
                         hint=f"put the stage with {ref.name} last")
    bits, activations = ref.options.get("bits", 8 if ref.name == "fake_quant" else 4), ref.options.get("activations", 8)
    exported = ref.name == "fake_quant" and activations == 8
    return Rounding(f"w{8 if bits > 4 else 4}a8_qat", f"w{bits}a8_qat") if exported else Rounding(None, f"w{bits}")


@dataclass(frozen=True)
class Start:
    """A checkpoint to start from and what it says of itself."""

    path: Path
    meta: checkpoint.Meta

    def student(self, teacher: Any) -> tuple[Any, str]:
        """The student, if it can learn from this teacher, and where its weights come from.

        Raises:
            UsageError: what follows its encoder is of another shape than this teacher's.
            EdgekdError: the file is damaged.
        """
        meta, task = self.meta, tasks.get(self.meta.task)
        own = meta.pruned is not None and meta.pruned.kind == "teacher"  # what is left of a teacher: no student has its name
        like = teacher if own else task.student(meta.pruned.base if meta.pruned else meta.name, meta.image_size, teacher)[0]
        fitting = task.header(like)["shape"]
        wrong = [f"{key} {meta.shape.get(key)} instead of {value}" for key, value in fitting.items() if meta.shape.get(key) != value]
        if wrong:
            raise UsageError(f"the checkpoint was distilled from a teacher of another shape than {teacher.name}: {', '.join(wrong)}", where=self.path,
                             hint="take the teacher it was distilled from" + (f": --teacher {meta.teacher}" if meta.teacher else ""))
        return checkpoint.load(self.path), f"checkpoint {self.path.name}"


def starting_point(path: Path, recipe: Recipe, student: str | None) -> Start:
    """The checkpoint that a student is to start from.

    Raises:
        UsageError: it is none, of a teacher, of another task than the recipe's, or of another student than the one named.
        EdgekdError: it is damaged.
    """
    if not checkpoint.is_checkpoint(path):
        raise UsageError("this is no checkpoint of edgekd" if Path(path).exists() else "there is no such checkpoint", where=path,
                         hint="name a .safetensors file that `edgekd distill` wrote, or a student of the recipe with --student")
    meta = checkpoint.read_meta(path)
    if meta.task != recipe.task:
        raise UsageError(f"the checkpoint is of the task {meta.task}, and recipe '{recipe.name}' of {recipe.task}", where=path,
                         hint="take a recipe of that task (edgekd list recipes)")
    if meta.kind != "student":
        raise UsageError(f"the checkpoint is the teacher '{meta.name}', and a student is to be trained", where=path, hint="name it with --teacher")
    if student is not None and tasks.get(recipe.task).student_name(student) != meta.name:
        raise UsageError(f"the checkpoint is of '{meta.name}', not of '{student}'", where=path, hint="leave --student out")
    return Start(path, meta)


def in_form(student: Any, rounding: Rounding | None) -> Any:
    """The student as it is trained: folded where it is rounded, so that what is rounded is what is exported. Ranges of an earlier training are
    taken away: its weights leave their grid."""
    if getattr(student, "form", "training") == "training":
        return student if rounding is None else checkpoint.deployed(student)
    if rounding is None:
        console.warn(f"{student.name} was trained for integers and trains on in float: the ranges of its layers are dropped")
        forget(student)
    return student
