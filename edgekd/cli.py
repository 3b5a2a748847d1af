"""The command line. A verb here reads its flags, calls the function of the same name in `edgekd.api` and shows the result.

Data goes to stdout (one JSON document with `--json`), progress and messages to stderr. Exit codes: 0 done, 1 failed or budget
missed, 2 wrong usage. Nothing heavy is imported before a verb runs, so that `--help` is instant.
"""
from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from edgekd import __version__
from edgekd.errors import EdgekdError, UsageError

if TYPE_CHECKING:
    from edgekd.report.schema import Report

INTERRUPTED = 130
# The parser's own errors, whichever click this typer is built on (its own copy, or the package).
ParserError: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

app = typer.Typer(name="edgekd", add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
                  help="From a large vision model and a device to the best small model that runs there within a budget.")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout; messages stay on stderr.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.")]
Data = Annotated[str, typer.Option("--data", help="A folder of photos, a COCO json, a data pack, or scenes:seed=1,count=100.")]
MaybeData = Annotated[str | None, typer.Option("--data", help="A folder of photos, a COCO json, a data pack, or scenes:seed=1,count=100.")]
Split = Annotated[str | None, typer.Option("--split", help="Which split of the data.")]
Limit = Annotated[int | None, typer.Option("--limit", help="The first so many images only.")]
Teacher = Annotated[str | None, typer.Option("--teacher", help="The model to copy from; the recipe's when left out.")]
RecipeName = Annotated[str, typer.Option("--recipe", help="A recipe by name (edgekd list recipes) or a YAML file.")]
TargetName = Annotated[str, typer.Option("--target", help="A device by name (edgekd list targets) or a YAML file.")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one value of the recipe: stages.0.steps=100. Repeatable.")]
Threads = Annotated[int | None, typer.Option("--threads", help="CPU threads of the runtime.")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None:
    if version:
        print(f"edgekd {__version__}")
        raise typer.Exit


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
    report = api.compress(**where, resume=resume, command=_command())
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
    split: Split = None, limit: Limit = None, json: Json = False,
) -> int:
    """Write a teacher's outputs to disk, or check them."""
    from edgekd import api

    if verify is not None:
        return _show(api.verify_cache(folder=verify), json)
    if teacher is None or data is None or output is None:
        raise UsageError("cache needs --teacher, --data and --output (or --verify FOLDER)", hint="edgekd cache --teacher sam_nano --data photos --output cache")
    return _show(api.cache(teacher=teacher, data=data, output=output, split=split, limit=limit), json)


@app.command()
def distill(
    data: Data, output: Output, teacher: Teacher = None, recipe: RecipeName = "default",
    student: Annotated[str | None, typer.Option("--student", help="Which student of the recipe; the first when left out.")] = None,
    sets: Sets = None, json: Json = False,
) -> int:
    """Train one student from a teacher."""
    from edgekd import api

    return _show(api.distill(data=data, output=output, recipe=recipe, teacher=teacher, student=student, sets=sets or []), json)


@app.command()
def train(recipe: Annotated[str, typer.Option("--recipe", help="A recipe with a train section.")], output: Output, sets: Sets = None, json: Json = False) -> int:
    """Train a teacher from labelled masks.

    The recipe needs a train section. The same command again continues where it stopped.
    """
    from edgekd import api

    return _show(api.train(recipe=recipe, output=output, sets=sets or []), json)


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="A checkpoint, or a student with shipped weights.")],
    scheme: Annotated[str, typer.Option("--scheme", help="A precision (edgekd list schemes).")], output: Output,
    format: Annotated[str, typer.Option("--format", help="A file format (edgekd list formats).")] = "onnx",
    target: TargetName = "host", data: MaybeData = None, json: Json = False,
) -> int:
    """Export in a precision and compare with fp32.

    Size, latency and agreement of the masks, with a verdict. Exit code 1 when it is no gain.
    """
    from edgekd import api

    found = api.quantize(model=model, scheme=scheme, format=format, target=target, data=data, output=output)
    _show(found, json)
    return 0 if found["verdict"] != "rejected" else 1


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A checkpoint, a teacher, or a student with shipped weights.")],
    to: Annotated[str, typer.Option("--to", help="Formats, with commas between: onnx,openvino.")], output: Output,
    scheme: Annotated[str, typer.Option("--scheme", help="A precision (edgekd list schemes).")] = "fp32",
    target: Annotated[str | None, typer.Option("--target", help="The device it is for; decides how int8 is written.")] = None,
    data: MaybeData = None, threads: Threads = None, json: Json = False,
) -> int:
    """Write a model's files and check them.

    Every file is run on its own runtime and compared with the model; the manifest says how it went.
    """
    from edgekd import api, console

    formats = [f.strip() for f in to.split(",") if f.strip()]
    if not formats:
        raise UsageError("--to names no format", hint="edgekd export MODEL --to onnx,openvino --output DIR")
    found = api.export(model=model, to=formats, output=output, scheme=scheme, data=data, target=target, threads=threads)
    rows = found["exports"]
    if json:
        console.emit(found)
    else:
        console.table(["format", "scheme", "status", "MB", "where or why"],
                      [[r["format"], r["scheme"], r["status"], round(r["size_bytes"] / 1e6, 2) if "size_bytes" in r else None, r.get("path") or r["reason"]]
                       for r in rows])
    return 0 if all(r["status"] == "ok" for r in rows) else 1


@app.command()
def profile(
    artifact: Annotated[str, typer.Argument(help="An artifact or run folder.")], target: TargetName = "host", threads: Threads = None,
    warmup: Annotated[int, typer.Option("--warmup", help="Runs before the clock starts.")] = 3,
    repeats: Annotated[int, typer.Option("--repeats", help="Runs that are timed, at most.")] = 30,
    prompts: Annotated[int, typer.Option("--prompts", help="Prompts per image in one decoder call.")] = 1, json: Json = False,
) -> int:
    """Measure latency, memory and size on a device."""
    from edgekd import api

    return _show(api.profile(artifact=artifact, target=target, threads=threads, warmup=warmup, repeats=repeats, prompts=prompts), json)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A teacher, student, checkpoint, artifact, run, baseline/disc or hub id.")], data: Data, split: Split = None,
    teacher: Annotated[str | None, typer.Option("--teacher", help="Measure the agreement with this teacher; known already for artifacts.")] = None,
    limit: Limit = None, max_instances: Annotated[int | None, typer.Option("--max-instances", help="Masks asked for per image, at most.")] = None,
    threads: Threads = None, json: Json = False,
) -> int:
    """Measure a model's accuracy.

    With boxes, one click and further clicks, and the agreement with its teacher.
    """
    from edgekd import api, console

    found = api.evaluate(model=model, data=data, split=split, teacher=teacher, limit=limit, max_instances=max_instances, threads=threads)
    if json:
        console.emit(found.to_dict())
        return 0
    flat = {**found.metrics, **{f"teacher_agreement.{k}": v for k, v in (found.teacher_agreement or {}).items()}}
    console.table(["metric", "mean IoU", "95 % low", "95 % high"], [[k, round(v, 4), *(round(x, 4) for x in found.interval95[k])] for k, v in flat.items()],
                  title=f"{found.model} on {found.protocol['dataset']}: {found.images} images, {found.instances} instances")
    return 0


@app.command()
def predict(
    model: Annotated[str, typer.Argument(help="An artifact or run folder, or any other model.")],
    image: Annotated[Path, typer.Argument(help="A photo.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The mask, a PNG of the photo's size.")],
    point: Annotated[list[str] | None, typer.Option("--point", metavar="X,Y[,0]", help="A click in pixels; ,0 means not this. Repeatable.")] = None,
    box: Annotated[str | None, typer.Option("--box", metavar="X0,Y0,X1,Y1", help="A box in pixels.")] = None,
    threads: Threads = None, json: Json = False,
) -> int:
    """Segment what a click or a box means."""
    from edgekd import api

    clicks = [_numbers(p, (2, 3), "--point takes X,Y or X,Y,0") for p in point or []]
    corners = _numbers(box, (4,), "--box takes X0,Y0,X1,Y1") if box is not None else None
    found = api.predict(model=model, image=image, output=output, points=[(c[0], c[1]) for c in clicks],
                        labels=[int(c[2]) if len(c) == 3 else 1 for c in clicks], threads=threads,
                        box=(corners[0], corners[1], corners[2], corners[3]) if corners else None)
    return _show({"mask": str(output), "area": int(found.mask.sum()), "predicted_iou": found.score}, json)


def _numbers(text: str, counts: tuple[int, ...], usage: str) -> list[float]:
    try:
        values = [float(v) for v in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in counts:
        raise UsageError(f"{usage}, not '{text}'", hint="pixels from the top left corner of the photo, for instance --point 120,80")
    return values


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run folder.")], json: Json = False) -> int:
    """Make the report of a run again."""
    from edgekd import api

    return _show({"report": str(api.report(run=run))}, json)


@app.command("list")
def list_(
    kind: Annotated[str, typer.Argument(help="teachers, students, models, targets, formats, schemes, objectives, tasks, recipes or runs.")], json: Json = False,
) -> int:
    """Show what there is."""
    from edgekd import catalogue, console

    rows = catalogue.rows(kind)
    if json:
        console.emit(rows)
        return 0
    columns = list(dict.fromkeys(key for row in rows for key in row))
    console.table(columns, [[_words(row.get(c)) for c in columns] for row in rows])
    return 0


def _words(value: Any) -> Any:
    if isinstance(value, dict):
        return "; ".join(f"{k}: {_words(v)}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value


@app.command()
def init(
    kind: Annotated[str, typer.Argument(help="recipe or target.")], name: Annotated[str, typer.Argument(help="The shipped one to copy.")],
    path: Annotated[Path, typer.Argument(help="The new file.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
) -> int:
    """Copy a recipe or target to edit."""
    from edgekd import api

    api.init(kind=kind, name=name, path=path, force=force)
    print(f"wrote {path}\nnext: edgekd compress --{kind} ./{path} ..." if not path.is_absolute() else f"wrote {path}\nnext: edgekd compress --{kind} {path} ...")
    return 0


@app.command()
def doctor(json: Json = False) -> int:
    """Say what works here, and what mends the rest."""
    from edgekd import api, console

    found = api.doctor()
    if json:
        console.emit(found)
        return 0
    mark = {True: "ok", False: "--"}
    gb = 1e9
    rows = [["edgekd", "ok", found["edgekd"], None], ["python", mark[found["python"]["ok"]], found["python"]["version"], None],
            ["cpu", "ok", f"{found['cpu']['name']} {' '.join(found['cpu']['flags'])}", "; ".join(found["cpu"]["hints"]) or None],
            ["memory", mark[found["memory"]["ok"]], f"{found['memory']['available_bytes'] / gb:.1f} of {found['memory']['total_bytes'] / gb:.1f} GB free", None],
            ["disk", mark[found["disk"]["ok"]], f"{found['disk']['free_bytes'] / gb:.1f} GB free", None]]
    rows += [[f"format {f['name']}", mark[f["ok"]], f["version"] or f["reason"], f["fix"]] for f in found["formats"]]
    rows += [[f"device by {t['name']}", mark[t["ok"]], t["note"], None] for t in found["transports"]]
    rows += [[f"plug-in {p['name']}", "--", p["reason"], f"pip uninstall {p['origin']}, or mend it"] for p in found["plugins"]]
    console.table(["what", "", "found", "note or fix"], rows)
    return 0


def _show(document: dict[str, Any], json: bool) -> int:
    """A result: the JSON document, or one `key: value` line each."""
    from edgekd import console

    if json:
        console.emit(document)
    else:
        for key, value in document.items():
            print(f"{key}: {_words(value)}")
    return 0


def _command() -> str:
    import shlex

    return shlex.join(["edgekd", *sys.argv[1:]])


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave with its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--json" in given:
        from edgekd import console

        console.plain()
    sys.exit(_run(given))


def _run(given: list[str]) -> int:
    try:
        code = app(args=given, prog_name="edgekd", standalone_mode=False)
    except EdgekdError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    except ParserError as e:  # unknown options, missing values
        if type(e).__name__ == "NoArgsIsHelpError":
            print(getattr(e, "message", ""), file=sys.stderr)
        else:
            print(f"error: {e.format_message()}\n  hint: edgekd {_verb(given)}--help", file=sys.stderr)  # type: ignore[attr-defined]
        return 2
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:  # the reader of our stdout went away (`edgekd list | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as e:
        if os.environ.get("EDGEKD_DEBUG") == "1":
            raise
        print(f"error: {type(e).__name__}: {e}\n  hint: this is a fault of edgekd; {_traceback()}", file=sys.stderr)
        return 1
    if code == INTERRUPTED:  # some versions of the parser turn Ctrl-C into this code themselves
        print("stopped; the same command continues where it was", file=sys.stderr)
    return code if isinstance(code, int) else 0


def _verb(given: Sequence[str]) -> str:
    first = given[0] if given else ""
    return f"{first} " if first in {c.name or (c.callback.__name__ if c.callback else "") for c in app.registered_commands} else ""


def _traceback() -> str:
    """Keep the traceback in a file and say where."""
    import tempfile
    import traceback

    try:
        with tempfile.NamedTemporaryFile("w", prefix="edgekd-error-", suffix=".log", delete=False) as f:
            f.write(f"{_command()}\n\n{traceback.format_exc()}")
    except OSError:
        return "EDGEKD_DEBUG=1 shows the traceback"
    return f"the traceback is in {f.name} (EDGEKD_DEBUG=1 shows it here)"
