"""The loop and its training stages: compress, cache, distill, train."""
from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from edgekd.cli.options import (
    BoardPython,
    Data,
    DeviceUrl,
    Json,
    KnownHosts,
    Limit,
    MaybeData,
    Output,
    RecipeName,
    Sets,
    Split,
    SshKey,
    TargetName,
    Teacher,
    app,
    board,
    command_line,
    show,
)
from edgekd.errors import UsageError

if TYPE_CHECKING:
    from edgekd.recipe import CacheCodec
    from edgekd.report.schema import Report


@app.command()
def compress(
    target: TargetName, data: Data, teacher: Teacher = None, recipe: RecipeName = "default",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the run; runs/TEACHER-TARGET-RECIPE when left out.")] = None,
    budget_ms: Annotated[float | None, typer.Option("--budget-ms", help="Latency ceiling: encoder and one prompt, median.")] = None,
    budget_fps: Annotated[float | None, typer.Option("--budget-fps", help="The same as photos a second, one after the other.")] = None,
    percentile: Annotated[str | None, typer.Option("--percentile", help="Which latency is held to its ceiling: p50 (when left out) or p90.")] = None,
    budget_mb: Annotated[float | None, typer.Option("--budget-mb", help="Size ceiling of all files, 10^6 bytes.")] = None,
    budget_memory: Annotated[float | None, typer.Option("--budget-memory", metavar="MB", help="Ceiling of peak memory, 10^6 bytes.")] = None,
    budget_mj: Annotated[float | None, typer.Option("--budget-mj", help="Ceiling of energy for one use, on devices that tell their power.")] = None,
    min_accuracy: Annotated[float | None, typer.Option("--min-accuracy", help="Floor of the budget's metric, 0..1.")] = None,
    max_drop: Annotated[float | None, typer.Option("--max-drop", help="What may be lost of it to the teacher, 0..1.")] = None,
    objective: Annotated[str | None, typer.Option("--objective", help="Of all within the budget: fastest, most-accurate or balanced.")] = None,
    device: DeviceUrl = None, ssh_key: SshKey = None, known_hosts: KnownHosts = None, board_python: BoardPython = None, sets: Sets = None, dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and its costs; start nothing.")] = False,
    resume: Annotated[bool, typer.Option("--resume/--fresh", help="Continue where an earlier run in this folder stopped, or start over.")] = True,
    json: Json = False,
) -> int:
    """Find the best small model for a device.

    The whole loop: plan, distil, quantize, export, profile, decide, report. Exit code 1 when no candidate meets the budget. Without --device, for a
    device that is not here: everything but the measuring, and run_on_device.sh for the board. Further limits (components, prompts, segment everything) are
    `--set budget.components.decoder=5`.
    """
    from edgekd import api, console

    output = output or api.run_folder(target=target, recipe=recipe, teacher=teacher)
    where: dict[str, Any] = {"target": target, "data": data, "teacher": teacher, "recipe": recipe, "sets": sets or [], "output": output,
                             "device": board(device, ssh_key, known_hosts, board_python),
                             "budget": {"latency_ms": budget_ms, "fps": budget_fps, "percentile": percentile, "size_mb": budget_mb, "memory_mb": budget_memory,
                                        "energy_mj": budget_mj, "min_accuracy": min_accuracy, "max_drop": max_drop, "objective": objective}}
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
