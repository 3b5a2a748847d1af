"""A user's own ONNX file in another precision, against itself: size, time measured in turns, what became of the outputs. One that is no gain is called that.

The float file is only read. Formats that can make something of an ONNX file have `rewrite` (`export/onnx.py`, `export/openvino.py`).
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekd import console, plugins, schemes
from edgekd.comparing import Comparison, check_runs, is_integer
from edgekd.errors import EdgekdError, UsageError, first_line
from edgekd.own import data as own_data
from edgekd.parity import difference
from edgekd.profiling import ModelFile, model_file, profile_many
from edgekd.profiling.bare import OpenedFile, require_runtime
from edgekd.target import Target
from edgekd.tasks.tensors.inputs import Input, draw, lengths_of
from edgekd.tasks.tensors.parity import cosine
from edgekd.workspace import usable_folder, write_json

SEEDED = 8
"""Calls on seeded arrays that outputs are compared on where there is no data."""
SUFFIX = ".onnx"


@dataclass(frozen=True)
class Request:
    """What is asked for. `lengths`: of axes of any length, in seeded arrays and pictures."""

    source: Path
    scheme: str
    format: str
    target: Target
    output: Path
    data: str | Path | None = None
    lengths: Mapping[str, int] | None = None
    photos: own_data.Photos | None = None


def quantize(asked: Request) -> dict[str, Any]:
    """Write `OUTPUT/STEM-SCHEME.onnx` (or `.xml`) and a JSON document of the same name beside it, and return the document.

    Raises:
        UsageError: unknown names, no data for a static scheme, or data that does not fit the model.
        EdgekdError: the file is damaged, or cannot be quantized, with the reason.
    """
    exporter = _able(asked)
    inputs = OpenedFile(model_file(asked.source, format="onnx")).inputs  # only there have axes of any length their names
    seen, held, shown = _shown(asked, inputs)
    lengths = _of(inputs, next(iter(held)))
    reference = model_file(asked.source, format=asked.format, scheme="fp32", lengths=lengths)
    require_runtime(reference)
    folder = usable_folder(asked.output)
    path = folder / f"{asked.source.stem}-{asked.scheme}{exporter.suffix}"
    _never_over(path, reference.files)
    console.log(f"quantize {path.name}")
    files = exporter.rewrite(asked.source, path, scheme=asked.scheme, calibration=seen, qdq=asked.target.qdq(asked.format))
    found = model_file(path, format=asked.format, scheme=asked.scheme, lengths=lengths)
    session = OpenedFile(found)
    differences = outputs(OpenedFile(reference), session, held)
    document = _document(asked, reference, found, session, differences)
    document |= {"files": [f.name for f in files], "shown": shown}
    write_json(path.with_suffix(".json"), document)
    return document


def _able(asked: Request) -> Any:
    """The exporter, if it makes what is asked of an ONNX file, and the file is there."""
    if not asked.source.is_file():
        raise UsageError(f"there is no file at {asked.source}")
    if asked.scheme == "auto" or (precision := check_runs(asked.scheme, asked.format, asked.target)).text != precision.scheme.name:
        raise UsageError(f"an ONNX file of your own takes plain schemes, not '{asked.scheme}'", where=asked.source,
                         hint="edgekd list schemes; layers and answers are known of edgekd's own models only")
    exporter = plugins.exporter(asked.format)
    if not hasattr(exporter, "rewrite"):
        able = [name for name, e in plugins.exporters().items() if hasattr(e, "rewrite")]
        raise UsageError(f"an ONNX file cannot be quantized to {asked.format}", hint=f"it can to {' and '.join(able)}")
    if asked.scheme == "fp32":
        raise UsageError("fp32 is what the file is", hint=f"name another precision: {', '.join(s for s in exporter.schemes if s != 'fp32')}")
    if schemes.get(asked.scheme).needs_calibration and asked.data is None:
        raise UsageError(f"{asked.scheme} needs samples of the model's inputs", hint="give a folder of .npz files or photos with --data; w8_dynamic needs none")
    return exporter


def _shown(asked: Request, inputs: list[Input]) -> tuple[Any, Any, dict[str, Any]]:
    """What ranges are found on, what outputs are compared on, and what the document says of both."""
    looked = schemes.get(asked.scheme).looks_at_inputs
    if asked.data is not None:
        calls = own_data.read(asked.data, inputs, _named(inputs, asked.lengths or {}), asked.photos)
        seen, held, apart = calls.split()
        return seen if looked else None, held, {"data": str(asked.data), **own_data.words(calls), "ranges": len(seen) if looked else 0, "compared": len(held),
                                                "held_out": apart or not looked}
    lengths = lengths_of(inputs, asked.lengths or {})
    drawn = [draw(inputs, lengths, seed) for seed in range(2 * SEEDED)]
    return drawn[SEEDED:] if looked else None, drawn[:SEEDED], {"data": None, "kind": "seeded arrays", "ranges": SEEDED if looked else 0, "compared": SEEDED,
                                                                "held_out": True}


def _named(inputs: list[Input], given: Mapping[str, int]) -> dict[str, int]:
    """The lengths that were given, by symbol: no other stands for a picture's size."""
    known = lengths_of(inputs, given)
    places = {f"{i.name}.{axis}": n for i in inputs for axis, n in enumerate(i.shape) if isinstance(n, str)}
    return {symbol: known[symbol] for symbol in (places.get(name, name) for name in given)}


def _of(inputs: list[Input], sample: Mapping[str, np.ndarray]) -> dict[str, int]:
    """The lengths that a sample gives axes of any length, by their places: every runtime understands these."""
    return {f"{i.name}.{axis}": sample[i.name].shape[axis] for i in inputs for axis, n in enumerate(i.shape) if isinstance(n, str)}


def _never_over(path: Path, source: list[Path]) -> None:
    if any((path.exists() and path.samefile(f)) or path.with_name(f"{path.name}.data").resolve() == f.resolve() for f in source if f.exists()):
        raise UsageError("the float file would be written over", where=path, hint="name another folder with --output")


def outputs(reference: OpenedFile, found: OpenedFile, calls: Any) -> dict[str, dict[str, Any]]:
    """Every output of both files on the same inputs: largest difference, relative L2, cosine; of whole numbers the share that is equal.

    Raises:
        EdgekdError: a file does not run on them, or the float file answers NaN.
    """
    ours: dict[str, list[np.ndarray]] = {}
    theirs: dict[str, list[np.ndarray]] = {}
    for one in calls:
        for file, answers in ((reference, ours), (found, theirs)):
            for name, value in _run(file, one).items():
                answers.setdefault(name, []).append(np.ravel(value))
    table: dict[str, dict[str, Any]] = {}
    for (name, a), b in zip(ours.items(), theirs.values(), strict=True):  # by place: converters may rename an output
        x, y = (np.concatenate(each).astype(np.float64) for each in (a, b))
        if not np.isfinite(x).all():
            raise EdgekdError(f"the float file's output '{name}' holds NaN or infinity", where=reference.file.path,
                              hint="give inputs that the model takes with --data")
        if x.size and a[0].dtype.kind == "f":
            gap = difference(x, y)
            table[name] = {**gap, "cosine": cosine(x, y) if gap["finite"] else -1.0}
        elif x.size:
            table[name] = {"same": float((x == y).mean()), "finite": True}
    return table


def _run(file: OpenedFile, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    try:
        return file.session("model").run(inputs)
    except EdgekdError:
        raise
    except Exception as e:  # runtimes share no kind of error
        raise EdgekdError(f"the file does not run on {', '.join(f'{n} {np.shape(v)}' for n, v in inputs.items())}: {first_line(e)}", where=file.file.path,
                          hint="give axes of any length with --length AXIS=N, or inputs of the model with --data") from e


def _document(asked: Request, reference: ModelFile, found: ModelFile, session: OpenedFile, table: dict[str, dict[str, Any]]) -> dict[str, Any]:
    latencies: list[Any] = [None, None]
    if asked.target.reachable:
        latencies = [p.latency_ms for p in profile_many([reference, found], asked.target, memory=False)]
    floats = [one for one in table.values() if "cosine" in one]
    worst = min([one["cosine"] for one in floats] + [one["same"] for one in table.values() if "same" in one], default=1.0)
    compared = Comparison(found.size_bytes / reference.size_bytes, latencies[1].p50 / latencies[0].p50 if latencies[0] else None, 1 - worst,
                          "cosine" if floats else "equal outputs")
    verdict, reason = compared.verdict()
    if broken := [name for name, one in table.items() if not one["finite"]]:
        verdict, reason = "rejected", f"its output '{broken[0]}' holds NaN or infinity"
    ops = session.session("model").executed_ops
    return {
        "id": found.path.stem, "path": str(found.path), "source": str(asked.source), "format": asked.format, "scheme": asked.scheme, "target": asked.target.name,
        "size_bytes": found.size_bytes, "size_ratio": compared.size_ratio, "latency_ratio": compared.latency_ratio,
        "latency_ms": latencies[1].model_dump(mode="json") if latencies[1] else None,
        "float_latency_ms": latencies[0].model_dump(mode="json") if latencies[0] else None,
        "cosine": min((one["cosine"] for one in floats), default=None),
        "relative_l2": max((one["relative_l2"] for one in floats), default=None), "outputs": table,
        "executed_precision": session.session("model").executed_precision, "executed_integer_ops": sum(n for op, n in ops.items() if is_integer(op)),
        "executed_ops": ops, "verdict": verdict, "reason": reason}
