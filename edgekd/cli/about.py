"""What there is and what works: list, init, doctor, inspect, convert."""
from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgekd.cli.options import Json, app, show, words


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
    console.table(columns, [[words(row.get(c)) for c in columns] for row in rows])
    return 0


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="A name (edgekd list models), or a file or folder with weights.")],
    strict: Annotated[bool, typer.Option("--strict", help="Refuse a file with a missing, unknown or misshapen key.")] = False, json: Json = False,
) -> int:
    """Say what a model or a file of weights is.

    Family and layout are told from the keys and shapes alone; nothing in the file is executed.
    """
    from edgekd import api

    return show(api.inspect(model=model, strict=strict), json)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A file or folder with weights.")],
    to: Annotated[str, typer.Option("--to", help="The layout to write: meta, hf or edgekd.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The new file (.safetensors, .pth), or for hf a folder.")],
    decoder: Annotated[Path | None, typer.Option("--decoder", help="With --to edgekd, for a file that holds an encoder alone: where the decoder comes from.")] = None,
    json: Json = False,
) -> int:
    """Rewrite weights in another layout, bit by bit the same."""
    from edgekd import api

    return show(api.convert(source=source, to=to, output=output, decoder=decoder), json)


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
def doctor(
    install: Annotated[str | None, typer.Option("--install", metavar="NAME", help="First make the Python environment of a toolchain that cannot share this one: rknn; or what the measuring page needs: browser.")] = None,
    json: Json = False,
) -> int:
    """Say what works here, and what mends the rest."""
    from edgekd import api, console

    found = api.doctor(install=install) if install is not None else api.doctor()
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
    rows += [[f"environment {e['name']}", mark[e["ok"]], " ".join(e["packages"]) if e["ok"] else e["reason"], e["fix"]] for e in found["environments"]]
    rows += [[f"device by {t['name']}", mark[t["ok"]], t["note"], t["fix"]] for t in found["transports"]]
    rows += [[f"plug-in {p['name']}", "--", p["reason"], f"pip uninstall {p['origin']}, or mend it"] for p in found["plugins"]]
    console.table(["what", "", "found", "note or fix"], rows)
    return 0
