"""The runner that edgekd pushes to boards against the runtimes' own measuring; JSON out.

    python benchmarks/runner_agreement.py --output benchmarks/results/runner-agreement-2026-11-22.json

Against OpenVINO's `benchmark_app` (synchronous, one stream, f32, the same threads): the same file, each in processes of its own that follow each other in
turns, ours and theirs, then theirs and ours. Every round gives a ratio of medians, which a drifting machine leaves alone; the median of the rounds counts, and its 95 % interval says whether the
machine was quiet enough to conclude anything (`conclusive`).

Against onnxruntime's own figure, the `model_run` of its profile: one session, the same runs, timed by our loop from outside and by onnxruntime from inside.
What lies between is the call from Python. Weights do not matter for latency: students are drawn from a seed.
"""
from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgekd import plugins, students
from edgekd.measurement import Circumstances
from edgekd.models.fold import fold
from edgekd.probes import pictures
from edgekd.profiling import boards
from edgekd.profiling.bare import model_file
from edgekd.profiling.board import loop
from edgekd.profiling.board.job import read
from edgekd.profiling.board.runtimes.onnx import OnnxSession
from edgekd.protocols import Component
from edgekd.workspace import write_json

ROOT = Path(__file__).resolve().parents[1]
GOAL = 0.05
EMBED = 256
MEDIAN = re.compile(r"Median:\s+([\d.]+) ms")
FORMATS = ("openvino", "onnx")


def exported(name: str, size: int, folder: Path) -> dict[str, Path]:
    """A student's encoder in both formats."""
    torch.manual_seed(0)
    images = torch.from_numpy(pictures(1, size, np.random.default_rng(0)))
    part = Component("encoder", fold(students.encoder(name, EMBED).eval()), {"images": images}, ("image_embeddings",))
    found = {}
    for format in FORMATS:
        exporter = plugins.exporter(format)
        found[format] = folder / f"{name}{exporter.suffix}"
        exporter.export(part, found[format], scheme="fp32")
    return found


def staged(file: Path, folder: Path, asked: boards.Asked) -> Path:
    """The folder of a job for one file, with the runner."""
    boards.stage([model_file(file, scheme="fp32")], asked, "host", folder)
    boards.bundle(folder / boards.RUNNER)
    return folder


def ours(folder: Path) -> list[float]:
    """The runner's samples in milliseconds, of a process that begins anew."""
    (folder / "result.partial.jsonl").unlink(missing_ok=True)
    done = subprocess.run([sys.executable, str(folder / boards.RUNNER), str(folder / "job.json")], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["failed"] == [], (folder / "result.json").read_text()
    return list(json.loads((folder / "result.json").read_text())["models"][0]["components"]["model"]["samples_ms"])


def theirs(file: Path, images: Path, repeats: int, threads: int) -> float:
    """benchmark_app's median in milliseconds."""
    command = [str(Path(sys.executable).parent / "benchmark_app"), "-m", str(file), "-d", "CPU", "-api", "sync", "-hint", "none", "-nstreams", "1",
               "-nthreads", str(threads), "-infer_precision", "f32", "-ip", "f32", "-niter", str(repeats), "-i", str(images)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = MEDIAN.search(done.stdout)
    if done.returncode or not found:
        sys.exit(f"benchmark_app fails:\n{done.stdout[-1500:]}{done.stderr[-500:]}")
    return float(found.group(1))


def against_openvino(name: str, size: int, file: Path, folder: Path, *, rounds: int, repeats: int, threads: int) -> dict[str, Any]:
    """Rounds of both in turns."""
    asked = boards.Asked(repeats=repeats, threads=threads, max_seconds=60.0, memory=False)
    at = staged(file, folder, asked)
    images = at / json.loads((at / "job.json").read_text())["models"][0]["components"]["model"]["inputs"][0]["file"]
    found = []
    for i in range(rounds):
        if i % 2:
            other, own = theirs(file, images, repeats, threads), statistics.median(ours(at))
        else:
            own, other = statistics.median(ours(at)), theirs(file, images, repeats, threads)
        found.append((own, other))
        print(f"{name} openvino round {i + 1}: ours {own:.3f} ms, benchmark_app {other:.3f} ms, ratio {own / other:.3f}", flush=True)
    return _row(name, size, "openvino", "benchmark_app, median of synchronous requests", found)


def against_onnxruntime(name: str, size: int, file: Path, folder: Path, *, rounds: int, repeats: int, threads: int) -> dict[str, Any]:
    """Rounds of one session each, under its own profiler."""
    at = staged(file, folder, boards.Asked(repeats=repeats, threads=threads, memory=False))
    part = read(str(at / "job.json")).models[0].parts["model"]
    found = []
    for i in range(rounds):
        session = OnnxSession(part, threads)
        session._session = session._start(str(at / f"profile{i}"))
        samples = loop.measure(session.run, repeats=repeats, max_seconds=60.0)
        with open(session._session.end_profiling(), encoding="utf-8") as f:
            told = [e["dur"] / 1e3 for e in json.load(f) if e.get("name") == "model_run"]
        own, other = statistics.median(samples.values), statistics.median(told[samples.warmup:])
        found.append((own, other))
        print(f"{name} onnx round {i + 1}: ours {own:.3f} ms, model_run {other:.3f} ms, ratio {own / other:.3f}", flush=True)
    return _row(name, size, "onnx", "onnxruntime's profile, duration of model_run in the same session", found)


def _row(name: str, size: int, format: str, against: str, found: list[tuple[float, float]]) -> dict[str, Any]:
    ratios = [own / other for own, other in found]
    ratio = statistics.median(ratios)
    low, high = interval(ratios)
    return {"student": name, "image_size": size, "format": format, "scheme": "fp32", "against": against, "provenance": "measured",
            "rounds": [{"ours_ms": own, "theirs_ms": other, "ratio": own / other} for own, other in found], "ratio_of_medians": ratio,
            "ratio_interval": [low, high], "goal": GOAL, "met": abs(ratio - 1) <= GOAL, "conclusive": max(abs(low - 1), abs(high - 1)) <= GOAL}


def interval(values: list[float]) -> tuple[float, float]:
    """Where the median lies with 95 % confidence whatever the distribution: order statistics by the binomial sign test."""
    ordered, n = sorted(values), len(values)
    k, tail = 0, 0.5 ** n
    while k < n // 2 and 2 * tail <= 0.05:
        k += 1
        tail += math.comb(n, k) * 0.5 ** n
    return ordered[max(0, k - 1)], ordered[n - max(1, k)]


def main() -> None:
    """Measure and write the document."""
    parser = argparse.ArgumentParser(description="The board's runner against benchmark_app and onnxruntime's profile.")
    parser.add_argument("--output", type=Path, default=ROOT / f"benchmarks/results/runner-agreement-{date.today().isoformat()}.json")
    parser.add_argument("--students", nargs="+", default=["repvit_xs", "tinyvit_xs"])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    a = parser.parse_args()
    timing = {"rounds": a.rounds, "repeats": a.repeats, "threads": a.threads}
    rows = []
    with tempfile.TemporaryDirectory(prefix="edgekd-") as temp:
        for name in a.students:
            files = exported(name, a.size, Path(temp) / "files")
            rows.append(against_openvino(name, a.size, files["openvino"], Path(temp) / f"{name}-openvino", **timing))
            rows.append(against_onnxruntime(name, a.size, files["onnx"], Path(temp) / f"{name}-onnx", **timing))
    write_json(a.output, {"benchmark": "runner_agreement", "provenance": "measured", "goal": GOAL,
                          "rows": rows, "met": all(r["met"] for r in rows), "cores": os.cpu_count(),
                          "circumstances": Circumstances.capture(threads=a.threads, repeats=a.repeats).model_dump(mode="json")})
    print(json.dumps([{k: r[k] for k in ("student", "format", "ratio_of_medians", "ratio_interval", "met", "conclusive")} for r in rows], indent=2))


if __name__ == "__main__":
    main()
