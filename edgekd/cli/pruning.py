"""A smaller student out of a trained one: prune."""
from __future__ import annotations

import sys
from typing import Annotated

import typer

from edgekd.cli.options import Data, Json, Output, TargetName, Teacher, Threads, app, show


@app.command()
def prune(
    model: Annotated[str, typer.Argument(help="A checkpoint, a student with shipped weights, or a teacher by name.")], data: Data, output: Output,
    target: TargetName = "host",
    target_ms: Annotated[float | None, typer.Option("--target-ms", help="What the encoder may take on the target, in milliseconds (median).")] = None,
    ratio: Annotated[float | None, typer.Option("--ratio", help="In place of a latency: the share of the channels to leave out, up to 0.9.")] = None,
    depth: Annotated[bool, typer.Option("--depth", help="Leave whole blocks out too, those that the embedding misses least; with --ratio, one.")] = False,
    importance: Annotated[str, typer.Option("--importance", help="taylor, magnitude, or auto: taylor where there is a teacher.")] = "auto",
    multiple: Annotated[int, typer.Option("--multiple", help="Channel counts that are left are multiples of this.")] = 8,
    teacher: Teacher = None,
    format: Annotated[str, typer.Option("--format", help="What is measured: a file format (edgekd list formats).")] = "onnx",
    scheme: Annotated[str, typer.Option("--scheme", help="And a precision (edgekd list schemes).")] = "fp32",
    limit: Annotated[int, typer.Option("--limit", help="Photos that importance is judged on, at most.")] = 32,
    threads: Threads = None, json: Json = False,
) -> int:
    """Leave channels and blocks out of a trained model until it is fast enough.

    Writes a checkpoint to distil further. Exit code 1 when the target is out of reach; the checkpoint is then the fastest there is.
    """
    from edgekd import api

    found = api.prune(model=model, data=data, output=output, target=target, target_ms=target_ms, ratio=ratio, depth=depth, importance=importance,
                      multiple=multiple, teacher=teacher, format=format, scheme=scheme, limit=limit, threads=threads)
    show(found, json)
    if not found["met"]:
        print(f"{target_ms:g} ms cannot be reached; the nearest takes {found['latency_ms']:.2f} ms", file=sys.stderr)
    return 0 if found["met"] else 1
