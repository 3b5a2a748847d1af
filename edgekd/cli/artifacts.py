"""Models, their files and results: quantize, export, profile, evaluate, predict, report."""
from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from edgekd.cli.options import (
    BoardPython,
    Data,
    DeviceUrl,
    Json,
    KnownHosts,
    Limit,
    Output,
    Split,
    SshKey,
    TargetName,
    Threads,
    app,
    board,
    lengths,
    numbers,
    show,
)
from edgekd.errors import UsageError

Modes = Annotated[list[str] | None, typer.Option("--mode", help="With --everything: grid, hierarchical or proposals. Repeatable; all when left out.")]


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="A checkpoint, a student with shipped weights, or a float .onnx file of your own.")],
    output: Output,
    scheme: Annotated[str | None, typer.Option("--scheme", help="A precision (edgekd list schemes), with exceptions if wanted: "
                                               "'w8a8_static + {decoder: fp32}'; or auto, which finds the fastest mix within --max-drop.")] = None,
    sensitivity: Annotated[bool, typer.Option("--sensitivity", help="Rank the layers by what 8 bits cost them, with a plot; writes no model.")] = False,
    max_drop: Annotated[float, typer.Option("--max-drop", help="Of auto: points of accuracy (0..100) that may be lost to fp32.")] = 0.5,
    target_ms: Annotated[float | None, typer.Option("--target-ms", help="Of auto: a ceiling of latency, encoder and one prompt, median.")] = None,
    format: Annotated[str, typer.Option("--format", help="A file format (edgekd list formats).")] = "onnx",
    target: TargetName = "host",
    data: Annotated[str | None, typer.Option("--data", help="Photos, as everywhere; of an .onnx file also a folder of .npz or .npy samples.")] = None,
    length: Annotated[list[str] | None, typer.Option("--length", metavar="AXIS=N", help="Of an .onnx file: an axis of any length. Repeatable.")] = None,
    mean: Annotated[str | None, typer.Option("--mean", metavar="R,G,B", help="Of an .onnx file that takes photos: what is taken off RGB in 0..255.")] = None,
    std: Annotated[str | None, typer.Option("--std", metavar="R,G,B", help="And what it is divided by then; 255 when left out.")] = None,
    size: Annotated[str | None, typer.Option("--size", metavar="S|HxW", help="Of an .onnx file that takes photos of any size.")] = None, json: Json = False,
) -> int:
    """Export in a precision and compare with fp32.

    Size, latency and agreement of the answers, with a verdict. Exit code 1 when it is no gain.
    """
    from edgekd import api

    if sensitivity == (scheme is not None):
        raise UsageError("--sensitivity writes no model and takes no --scheme" if sensitivity else "no precision is named",
                         hint="--scheme w8a8_static, --scheme auto, or --sensitivity")
    if sensitivity:
        return _show_layers(api.sensitivity(model=model, format=format, target=target, data=data, output=output), json)
    found = api.quantize(model=model, scheme=scheme or "", format=format, target=target, data=data, output=output, lengths=lengths(length or []),
                         mean=_colour("mean", mean), std=_colour("std", std), size=_sides(size), max_drop=max_drop, target_ms=target_ms)
    if json or "pareto" not in found:
        show(found, json)
    else:
        _show_mixes(found)
    return 0 if found["verdict"] != "rejected" else 1


def _show_layers(found: dict[str, Any], json: bool) -> int:
    from edgekd import console

    if json:
        console.emit(found)
        return 0
    console.table(["layer", "what", "points lost alone", "dB"], [[r["name"], r["kind"], round(r["miou_drop"], 3), round(r["sqnr_db"], 1)] for r in found["layers"]])
    console.table(["in float", "the last", "points lost"], [[r["kept"], r["layer"], round(r["miou_drop"], 3)] for r in found["cumulative"]], title=found["plot"])
    return 0


def _show_mixes(found: dict[str, Any]) -> None:
    from edgekd import console

    drop = next(k for k in found if k.endswith("_drop") and k != "max_drop")
    rows = [[("* " if r["id"] == found["id"] else "") + r["scheme"], round(r[drop], 3), round(r["disagreement"], 2), r["latency_ratio"] and round(r["latency_ratio"], 2),
             round(r["size_ratio"], 2)] for r in found["candidates"]]
    console.table(["scheme (* is taken)", "points lost", "disagreement", "time, of fp32's", "size, of fp32's"], rows, title=f"{found['verdict']}: {found['reason']}")


def _colour(name: str, text: str | None) -> list[float] | None:
    return None if text is None else numbers(text, (1, 3), f"--{name} takes R,G,B", hint=f"for instance --{name} 123.675,116.28,103.53")


def _sides(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    sides = text.split("x")
    if len(sides) > 2 or not all(s.isdigit() and int(s) > 0 for s in sides):
        raise UsageError(f"--size takes one number or HEIGHTxWIDTH, not '{text}'", hint="for instance --size 224 or --size 480x640")
    return int(sides[0]), int(sides[-1])


@app.command()
def export(
    to: Annotated[str, typer.Option("--to", help="Formats, with commas between: onnx,openvino.")], output: Output,
    model: Annotated[str | None, typer.Argument(help="A checkpoint, a teacher, a student with shipped weights, or module:factory.")] = None,
    named: Annotated[str | None, typer.Option("--model", metavar="MODULE:FACTORY",
                                              help="A model of your own: what makes it. Needs --input.")] = None,
    input: Annotated[list[str] | None, typer.Option("--input", metavar="[NAME=]SHAPE[:TYPE]",
                                                    help="Of a model of your own: 1x3x224x224, or tokens=Nx77:int64 with an axis N of any length. Repeatable.")] = None,
    scheme: Annotated[str | None, typer.Option("--scheme", help="A precision (edgekd list schemes); each format's own first one when left out.")] = None,
    target: Annotated[str | None, typer.Option("--target", help="The device it is for; decides how int8 is written.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="Photos, as everywhere; of a model of your own also a folder of .npz or .npy samples.")] = None,
    mean: Annotated[str | None, typer.Option("--mean", metavar="R,G,B", help="Of a model of your own that takes photos: what is taken off RGB in 0..255.")] = None,
    std: Annotated[str | None, typer.Option("--std", metavar="R,G,B", help="And what it is divided by then; 255 when left out.")] = None,
    threads: Threads = None,
    decoder_signature: Annotated[str, typer.Option("--decoder-signature", help="batched; sam, segment-anything's own; or embedded, for NPUs.")] = "batched",
    length: Annotated[list[str] | None, typer.Option("--length", metavar="AXIS=N", help="Of formats whose shapes cannot vary: prompts=16, points=4; "
                                                     "of --input: N=8. Repeatable.")] = None,
    json: Json = False,
) -> int:
    """Write a model's files and check them.

    Every file is run on its own runtime, where that runs here, and compared with the model; the manifest says how it went.
    """
    from edgekd import api, console

    formats = [f.strip() for f in to.split(",") if f.strip()]
    if not formats:
        raise UsageError("--to names no format", hint="edgekd export MODEL --to onnx,openvino --output DIR")
    if (model is None) == (named is None):
        raise UsageError("no model is named" if model is None else "two models are named",
                         hint="edgekd export MODEL, or --model module:factory --input 1x3x224x224")
    found = api.export(model=model or named or "", inputs=input or [], mean=_colour("mean", mean), std=_colour("std", std), to=formats,
                       output=output, scheme=scheme, data=data, target=target, threads=threads,
                       decoder_signature=decoder_signature, lengths=lengths(length or []))  # type: ignore[arg-type]
    rows = found["exports"]
    if json:
        console.emit(found)
    else:
        console.table(["format", "scheme", "status", "ran here", "mask IoU", "MB", "where or why"], [_words(r) for r in rows])
    return 0 if all(r["status"] == "ok" for r in rows) else 1


def _words(row: dict[str, Any]) -> list[Any]:
    """An exported format's line of the table."""
    if row["status"] != "ok":
        return [row["format"], row["scheme"], row["status"], None, None, None, row["reason"] + (f"; hint: {row['hint']}" if row["hint"] else "")]
    overlap = [c["parity"]["mask_iou"] for c in row["components"].values() if "mask_iou" in c["parity"]]
    ran = ", ".join(f"{name} {c['state']}" for name, c in row["components"].items() if c["state"] != "ran") or "yes"
    return [row["format"], row["scheme"], "ok", ran, round(min(overlap), 5) if overlap else None, round(row["size_bytes"] / 1e6, 2), row["path"]]


@app.command()
def profile(
    artifact: Annotated[str, typer.Argument(help="An artifact or run folder, or a model file alone: .onnx, .xml, .tflite, .pte, ...")],
    target: TargetName = "host", threads: Threads = None,
    warmup: Annotated[int, typer.Option("--warmup", help="Runs before the clock starts.")] = 3,
    repeats: Annotated[int, typer.Option("--repeats", help="Runs that are timed, at most.")] = 30,
    prompts: Annotated[int, typer.Option("--prompts", help="Prompts per image in one decoder call.")] = 1,
    everything: Annotated[bool, typer.Option("--everything", help="Measure segmenting everything instead, all decoder calls included.")] = False,
    mode: Modes = None,
    format: Annotated[str | None, typer.Option("--format", help="Of a file, where its suffix does not say it (edgekd list formats).")] = None,
    scheme: Annotated[str | None, typer.Option("--scheme", help="Of a file: the precision to run it in, where its runtime has a choice.")] = None,
    length: Annotated[list[str] | None, typer.Option("--length", metavar="AXIS=N", help="Of a file: an axis of any length, 1 when left out. Repeatable.")] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Also what every operator takes, by the modules of the network, with advice.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="With --layers: a folder for a page of it, layers.html.")] = None,
    save: Annotated[bool, typer.Option("--save", help="Add it to your database of latencies, from which others are predicted.")] = False,
    device: DeviceUrl = None, ssh_key: SshKey = None, known_hosts: KnownHosts = None, board_python: BoardPython = None, json: Json = False,
) -> int:
    """Measure latency, memory and size on a device."""
    from edgekd import api, console

    if everything:
        found = api.profile_everything(artifact=artifact, target=target, threads=threads, repeats=repeats, modes=mode or [])
        if json:
            console.emit(found)
        else:
            console.table(["mode", "prompts", "masks", "total p50, ms", "of it decoder"],
                          [[r["mode"], r["prompts"], r["masks"], round(r["latency_ms"]["p50"], 1), round(r["parts_ms"]["decoder"]["p50"], 1)] for r in found])
        return 0
    profiled = api.profile(artifact=artifact, target=target, threads=threads, warmup=warmup, repeats=repeats, prompts=prompts, format=format, scheme=scheme,
                           lengths=lengths(length or []), layers=layers, save=save, output=output, device=board(device, ssh_key, known_hosts, board_python))
    if layers and not json:
        _show_costs(profiled)
    return show({k: v for k, v in profiled.items() if json or k not in ("layers", "advice")}, json)


def _show_costs(found: dict[str, Any], most: int = 15) -> None:
    """The costliest layers, and what is advised."""
    from edgekd import console

    rows = sorted(found.get("layers", []), key=lambda r: -r["ms"])
    console.table(["component", "layer", "operator", "ms", "% of it", "precision"],
                  [[r["component"], r["name"], r["op"], round(r["ms"], 4), round(100 * r["share"], 1), r.get("precision")] for r in rows[:most]],
                  title=f"{len(rows)} layers" if rows else "the runtime there told no layers")
    for a in found.get("advice", []):
        print(f"{a['component']}, {100 * a['share']:.0f} %, {a['ms']:.3g} ms: {a['what']}: {a['do']} ({a['see']})")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A teacher, student, checkpoint, artifact, run, baseline/disc or hub id.")], data: Data, split: Split = None,
    teacher: Annotated[str | None, typer.Option("--teacher", help="Measure the agreement with this teacher; known already for artifacts.")] = None,
    limit: Limit = None, max_instances: Annotated[int | None, typer.Option("--max-instances", help="Masks asked for per image, at most.")] = None,
    threads: Threads = None,
    metrics: Annotated[str | None, typer.Option("--metrics", help="With commas between: box,center,clicks (these when left out), noc, oracle, everything.")] = None,
    boxes: Annotated[str | None, typer.Option("--boxes", help="COCO's AP instead, for a detector's results json, or for 'truth'.")] = None,
    mode: Annotated[str, typer.Option("--mode", help="How the group everything is asked: grid, hierarchical, proposals, or auto.")] = "auto",
    images: Annotated[Path | None, typer.Option("--images", help="The photos of a COCO or LVIS json, when not beside it.")] = None,
    json: Json = False,
) -> int:
    """Measure a model's accuracy.

    Of masks with boxes, one click and further clicks; of classes; of features; and the agreement with its teacher.
    """
    from edgekd import api, console

    found = api.evaluate(model=model, data=data, split=split, teacher=teacher, limit=limit, max_instances=max_instances, threads=threads, boxes=boxes,
                         everything_mode=mode, images=images,
                         metrics=[m.strip() for m in metrics.split(",") if m.strip()] if metrics is not None else None)
    if json:
        console.emit(found.to_dict())
        return 0
    flat = {**found.metrics, **{f"teacher_agreement.{k}": v for k, v in (found.teacher_agreement or {}).items()}}
    console.table(["metric", "mean", "95 % low", "95 % high"], [[k, round(v, 4), *(round(x, 4) for x in found.interval95[k])] for k, v in flat.items()],
                  title=f"{found.model} on {found.protocol['dataset']}: {found.images} images, {found.instances} instances")
    return 0


@app.command()
def predict(
    model: Annotated[str, typer.Argument(help="An artifact or run folder, or any other model.")],
    image: Annotated[Path, typer.Argument(help="A photo.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The mask, a PNG of the photo's size; with --everything, or of a classifier, a JSON file.")] = None,
    point: Annotated[list[str] | None, typer.Option("--point", metavar="X,Y[,0]", help="A click in pixels; ,0 means not this. Repeatable.")] = None,
    box: Annotated[str | None, typer.Option("--box", metavar="X0,Y0,X1,Y1", help="A box in pixels.")] = None,
    everything: Annotated[bool, typer.Option("--everything", help="All masks of the photo, as COCO run lengths and a picture.")] = False,
    mode: Annotated[str, typer.Option("--mode", help="With --everything: grid, hierarchical, proposals, or auto.")] = "auto",
    points_per_side: Annotated[int | None, typer.Option("--points-per-side", help="With --everything: of the grid.")] = None,
    threads: Threads = None, json: Json = False,
) -> int:
    """Segment what a prompt means, or everything; or name the class."""
    from edgekd import api, console

    if everything:
        if point or box is not None:
            raise UsageError("--everything takes no prompt", hint="leave out --point and --box")
        if output is None:
            raise UsageError("there is no file to write the masks to", hint="give one with --output masks.json")
        all_ = api.everything(model=model, image=image, output=output, mode=mode, points_per_side=points_per_side, threads=threads)
        return show({"masks": len(all_), "json": str(output), "picture": str(output.with_suffix(".png")), "mode": all_.mode, "prompts": all_.work.prompts}, json)
    clicks = [numbers(p, (2, 3), "--point takes X,Y or X,Y,0") for p in point or []]
    corners = numbers(box, (4,), "--box takes X0,Y0,X1,Y1") if box is not None else None
    found = api.predict(model=model, image=image, output=output, points=[(c[0], c[1]) for c in clicks],
                        labels=[int(c[2]) if len(c) == 3 else 1 for c in clicks], threads=threads,
                        box=(corners[0], corners[1], corners[2], corners[3]) if corners else None)
    document = found.document()
    if "classes" not in document:
        return show({"mask": str(output), **document}, json)
    if json:
        console.emit(document)
    else:
        console.table(["class", "name", "probability"], [[c["class"], c["name"], round(c["probability"], 4)] for c in document["classes"]])
    return 0


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    merge: Annotated[Path | None, typer.Option("--merge", metavar="MEASURED.JSON", help="What run_on_device.sh of this run wrote on the board.")] = None,
    json: Json = False,
) -> int:
    """Make the report of a run again.

    With --merge the candidates are judged anew by what a board measured; exit code 1 when none meets the budget there.
    """
    from edgekd import api

    if merge is None:
        return show({"report": str(api.report(run=run))}, json)
    found = api.merge(run=run, measured=merge)
    return show({"report": str(run / "report.html"), "verdict": found.verdict, "chosen": found.chosen, "reason": found.reason}, json) or int(found.verdict == "missed")
