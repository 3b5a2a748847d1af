"""What runs on the device: opens artifacts, runs them, prints one JSON document. Needs numpy, pydantic and the runtime; no torch.

    python -m edgekd.profiling.runner FOLDER... [--repeats 30] [--threads 2] [--prompts 1]     samples, taken in turns
    python -m edgekd.profiling.runner FOLDER --footprint                                       peak memory of loading and one run
    python -m edgekd.profiling.runner FOLDER --layers                                          what every operator takes, by the runtime's own count

In place of a folder stands a model file alone, as `edgekd.profiling.bare.ModelFile.told` writes it.
"""
from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgekd.measurement import Circumstances
from edgekd.profiling import door
from edgekd.profiling.bare import ModelFile, OpenedFile
from edgekd.profiling.footprint import peak_memory_bytes
from edgekd.profiling.latency import Samples, interleave
from edgekd.runtime import TOGETHER, Opened, open_artifact


def opened(folder: str | Path, threads: int | None) -> tuple[Opened | OpenedFile, dict[str, float]]:
    """An artifact with all sessions open, or a file, and the milliseconds each took to open."""
    file, took = ModelFile.of(str(folder)), dict[str, float]()
    model = open_artifact(Path(folder), threads=threads) if file is None else OpenedFile(file, threads=threads)
    for part in model.parts:
        start = time.perf_counter()
        model.session(part)
        took[part] = (time.perf_counter() - start) * 1e3
    return model, took


def latency(folders: Sequence[str], *, threads: int | None, prompts: int, warmup: int, repeats: int, max_seconds: float) -> dict[str, Any]:
    """Samples of every part of every artifact, all taken in turns in this process."""
    models = {str(i): opened(folder, threads) for i, folder in enumerate(folders)}
    todo = {f"{i} {part}": call for i, (model, _) in models.items() for part, call in model.calls(prompts).items()}
    found = interleave(todo, warmup=warmup, repeats=repeats, max_seconds=max_seconds)
    return {"artifacts": [_described(model, took, {part: found[f"{i} {part}"] for part in (*model.parts, TOGETHER)}) for i, (model, took) in models.items()],
            "circumstances": Circumstances.capture(threads=threads, warmup=warmup, repeats=repeats).model_dump(mode="json")}


def footprint(folder: str, *, threads: int | None, prompts: int) -> dict[str, Any]:
    """Peak memory before opening, and after opening and one run of everything."""
    before = peak_memory_bytes()
    model, _ = opened(folder, threads)
    model.calls(prompts)[TOGETHER]()
    return {"peak_memory_bytes": peak_memory_bytes(), "baseline_bytes": before}


def layers(folder: str, *, threads: int | None, prompts: int, repeats: int) -> dict[str, Any]:
    """What the operators of every component take, in this process, where nothing else is timed: counting slows a runtime down."""
    from edgekd.profiling.layers import measured

    model, _ = opened(folder, threads)
    rows = measured(ModelFile.of(folder) or Path(folder), model, threads=threads, prompts=prompts, repeats=repeats)
    return {"layers": [row.model_dump(mode="json") for row in rows]}


def _described(model: Opened | OpenedFile, took: dict[str, float], samples: dict[str, Samples]) -> dict[str, Any]:
    parts = {part: {"samples_ms": samples[part].values, "warmup": samples[part].warmup, "steady": samples[part].steady, "load_ms": took[part],
                    "executed_precision": model.session(part).executed_precision, "executed_ops": model.session(part).executed_ops} for part in model.parts}
    inputs = {"inputs": model.described()} if isinstance(model, OpenedFile) else {}
    return {"id": model.name, "components": parts, "together_ms": samples[TOGETHER].values, **inputs}


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, print. Errors go to stderr with exit code 1."""
    parser = door.parser("edgekd.profiling.runner", "Run artifacts here and print what was measured as JSON.", warmup=3, repeats=30)
    parser.add_argument("--footprint", action="store_true", help="peak memory of one artifact instead of latency")
    parser.add_argument("--layers", action="store_true", help="what every operator of one artifact takes instead of latency")
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="the only output there is; accepted for symmetry with edgekd")
    a = parser.parse_args(arguments)
    if a.footprint:
        return door.answer(lambda: footprint(a.folders[0], threads=a.threads, prompts=a.prompts))
    if a.layers:
        return door.answer(lambda: layers(a.folders[0], threads=a.threads, prompts=a.prompts, repeats=a.repeats))
    return door.answer(lambda: latency(a.folders, threads=a.threads, prompts=a.prompts, warmup=a.warmup, repeats=a.repeats, max_seconds=a.max_seconds))


if __name__ == "__main__":
    sys.exit(main())
