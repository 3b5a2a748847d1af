"""The loop and its training stages: compress, cache, distill, train."""
from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from edgekd.cli.options import Data, Json, Limit, MaybeData, Output, RecipeName, Sets, Split, TargetName, Teacher, app, command_line, show
from edgekd.errors import UsageError

if TYPE_CHECKING:
    from edgekd.recipe import CacheCodec
    from edgekd.report.schema import Report


@app.command()
def compress(
    target: TargetName, data: Data, teacher: Teacher = None, recipe: RecipeName = "default",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the run; runs/TEACHER-TARGET-RECIPE when left out.")] = None,
    budget_ms: Annotated[float | None, typer.Option("--budget-ms", help="Latency ceiling: encoder and one prompt, median.")] = None,
    budget_mb: Annotated[float | None, typer.Option("--budget-mb", help="Size ceiling of all files, 10^6 bytes.")] = None,
    sets: Sets = None, dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and its costs; start nothing.")] = False,
    resume: Annotated[bool, typer.Option("--resume/--fresh", help="Continue where an earlier run in this folder stopped, or start over.")] = True,
    json: Json = False,
) -> int:
    """Find the best small model for a device.

    The whole loop: plan, distil, quantize, export, profile, decide, report. Exit code 1 when no candidate meets the budget.
    """
    from edgekd import api, console

    output = output or api.run_folder(target=target, recipe=recipe, teacher=teacher)
    where: dict[str, Any] = {"target": target, "data": data, "teacher": teacher, "recipe": recipe, "sets": sets or [], "output": output,
                             "budget_ms": budget_ms, "budget_mb": budget_mb}
    if dry_run:
        plan = api.plan(**where)
        if json:
            console.emit(plan.to_dict())
        else:
            print(plan.render())
        return 0
    report = api.compress(**where, resume=resume, command=command_line())
    return _show_report(report, output, json)


def _show_report(report: Report, folder: Path, json: bool) -> int:
    """The report on stdout; exit code 1 when the budget was missed."""
    from edgekd import console

    if json:
        console.emit(report.document())
    else:
        from rich.console import Console

        from edgekd.report import terminal_table

        Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(terminal_table(report, folder / "report.html"))
    return 1 if report.verdict == "missed" else 0


@app.command()
def cache(
    teacher: Teacher = None, data: MaybeData = None, output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the cache.")] = None,
    verify: Annotated[Path | None, typer.Option("--verify", help="Compare this cache with its checksums instead.")] = None,
    split: Split = None, limit: Limit = None,
    codec: Annotated[str, typer.Option("--codec", help="packed: a quarter of fp16; int8: half of it; fp16.")] = "packed",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say how large it will be and how long it takes; write nothing.")] = False, json: Json = False,
) -> int:
    """Write a teacher's outputs to disk, or check them."""
    from edgekd import api

    if verify is not None:
        return show(api.verify_cache(folder=verify), json)
    if teacher is None or data is None or output is None:
        raise UsageError("cache needs --teacher, --data and --output (or --verify FOLDER)", hint="edgekd cache --teacher sam_nano --data photos --output cache")
    return show(api.cache(teacher=teacher, data=data, output=output, split=split, limit=limit, codec=cast("CacheCodec", codec), dry_run=dry_run), json)


@app.command()
def distill(
    data: Data, output: Output,
    checkpoint: Annotated[Path | None, typer.Argument(help="A checkpoint of a student to start from; its student and image size are trained on.")] = None,
    teacher: Teacher = None, recipe: RecipeName = "default",
    student: Annotated[str | None, typer.Option("--student", help="Which student of the recipe; the first when left out.")] = None,
    sets: Sets = None, tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard event files too.")] = False, json: Json = False,
) -> int:
    """Train one student from a teacher.

    Leaves a checkpoint, the log (JSONL and CSV) and its curve in the output folder. The same command again continues. With a recipe that trains for
    integers (smoke_qat, qat, qat_w4a8) also the integer artifact; exit code 1 when that is not what was trained.
    """
    from edgekd import api

    found = api.distill(data=data, output=output, checkpoint=checkpoint, recipe=recipe, teacher=teacher, student=student, sets=sets or [],
                        tensorboard=tensorboard)
    return show(found, json) or int(not found.get("artifact_parity", {}).get("passed", True))


@app.command()
def train(recipe: Annotated[str, typer.Option("--recipe", help="A recipe with a train section.")], output: Output, sets: Sets = None, json: Json = False) -> int:
    """Train a teacher from labelled masks.

    The recipe needs a train section. The same command again continues where it stopped.
    """
    from edgekd import api

    return show(api.train(recipe=recipe, output=output, sets=sets or []), json)
