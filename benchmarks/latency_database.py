"""Collects the latency database of this machine's class of CPU: what each operator of many untrained networks takes, and each network as a whole.

    python benchmarks/latency_database.py export  --folder F            write the networks (minutes; no clock)
    python benchmarks/latency_database.py measure --folder F --lock L   time them, in turns, holding the lock L a few minutes at a time
    python benchmarks/latency_database.py write   --folder F            the rows as edgekd/latency/data/*.jsonl.gz

Networks are encoders of every family of students at drawn widths, depths and sizes, and those of `operator_sweep.py`, which belong to no family.
Each is measured in several rounds, so that what drifts in an hour falls on all alike; a round times an encoder untraced (the truth that predictions
are held against) and, in another session, traced (the rows of its operators); the drawn networks are only traced. A row is the median of the round that
was disturbed least; the medians of all rounds are kept beside it.
"""
from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import random
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import operator_sweep
import torch

from edgekd import plugins, students
from edgekd.latency import database, graphs
from edgekd.latency.operators import Operator
from edgekd.measurement import Circumstances
from edgekd.models.fold import fold
from edgekd.protocols import Component
from edgekd.workspace import atomic_path, write_json

SWEEP, SWEEP_ROUNDS, PER_FAMILY = 240, 3, 14
SIZES = (128, 160, 192, 224, 256, 288, 320, 384, 448, 512)
MACS = (0.02, 6.0)
"""10^9, least and most of an encoder"""
BASES = {"repvit": ("repvit_xs", "repvit_s", "repvit_m", "edge_sam", "repvit_sam_m0_9"), "tinyvit": ("tinyvit_xs", "tinyvit_s", "mobile_sam"),
         "efficientvit": ("efficientvit_sam_l0", "efficientvit_sam_l1", "efficientvit_sam_xl0"), "efficient_sam": ("efficient_sam_ti", "efficient_sam_s"),
         "nanosam": ("nanosam",)}
RUNTIMES = ("onnx", "openvino")
CHUNK_S, WHOLE_S, PARTS_S = 280.0, 0.4, 0.25


def drawn() -> list[dict[str, Any]]:
    """The encoders: `PER_FAMILY` of each family, of work within `MACS`."""
    rng, found = random.Random(7), []
    for family, bases in BASES.items():
        chosen: dict[str, dict[str, Any]] = {}
        while len(chosen) < PER_FAMILY:
            width = rng.choice((0.25, 0.5, 0.5, 0.75)) if family == "efficientvit" else rng.choice((0.5, 0.75, 1.0, 1.0, 1.25, 1.5))
            name = str(students.parse(f"{rng.choice(bases)}:width={width},depth={rng.choice((0.5, 1.0, 1.0))}"))
            size, embed = rng.choice(SIZES), rng.choice((128, 256))
            with contextlib.suppress(Exception):  # a drawn combination that its family cannot build
                if MACS[0] <= students.describe(name, embed_dim=embed, image_size=size)["gmacs"] <= MACS[1]:
                    key = f"{name}-{size}-{embed}"
                    chosen[key] = {"id": key, "family": family, "student": name, "image_size": size, "embed": embed}
        found += chosen.values()
    return found


def export(folder: Path) -> None:
    """Write every network that is not there yet, and `networks.json`."""
    rows: list[dict[str, Any]] = [*({"id": f"sweep-{n}", "family": database.NO_FAMILY, "seed": n} for n in range(SWEEP)), *drawn()]
    kept = []
    for row in rows:
        path = folder / f"{row['id']}.onnx"
        try:
            if not path.exists():
                torch.manual_seed(0)
                _write_student(row, path) if "student" in row else _write_drawn(row["seed"], path)
            kept.append(row)
        except Exception as e:  # one that cannot be captured is one the fewer
            print(f"{row['id']}: {str(e)[:300]}", flush=True)
    write_json(folder / "networks.json", kept)
    print(f"{len(kept)} networks", flush=True)


def _write_student(row: dict[str, Any], path: Path) -> None:
    """The way `edgekd export` does."""
    module, size = students.encoder(row["student"], row["embed"]).eval(), row["image_size"]
    part = Component("encoder", fold(module), {"images": torch.randn(1, 3, size, size)}, ("image_embeddings",))
    plugins.exporter("onnx").export(part, path, scheme="fp32")


def _write_drawn(seed: int, path: Path) -> None:
    """By the old exporter, which takes a tenth of the time; what the runtimes make of the graph is of the same kinds."""
    module, shape = operator_sweep.network(seed)
    with atomic_path(path) as temp, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (torch.randn(*shape),), str(temp), dynamo=False, opset_version=18, input_names=["images"], output_names=["out"])


# --- the clock


class Turn:
    """One network on one runtime: its untraced call, and its traced one with what each operator took."""

    def __init__(self, path: Path, runtime: str, threads: int) -> None:
        self.path, self.runtime, self.threads = path, runtime, threads

    def whole(self, seconds: float) -> list[float]:
        """Milliseconds of untraced runs."""
        call = self._ort()[0] if self.runtime == "onnx" else self._openvino(traced=False)[0]
        return _timed(call, seconds)

    def parts(self, seconds: float) -> dict[str, float]:
        """Operator -> its median, of traced runs."""
        return self._ort_parts(seconds) if self.runtime == "onnx" else self._openvino_parts(seconds)

    def _ort(self, prefix: str | None = None) -> tuple[Callable[[], object], Any]:
        import onnxruntime as ort

        options = graphs.session_options(self.threads)
        if prefix is not None:
            options.enable_profiling, options.profile_file_prefix = True, prefix
        session = ort.InferenceSession(str(self.path), options, providers=["CPUExecutionProvider"])
        port = session.get_inputs()[0]
        value = {port.name: np.random.default_rng(0).standard_normal(port.shape).astype(np.float32)}
        return (lambda: session.run(None, value)), session

    def _ort_parts(self, seconds: float) -> dict[str, float]:
        found = defaultdict(list)
        with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
            call, session = self._ort(f"{folder}/p")
            skipped = 3
            _timed(call, seconds, warm=skipped)
            for event in json.loads(Path(session.end_profiling()).read_text()):
                if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
                    found[event["name"].removesuffix("_kernel_time")].append(event["dur"] / 1e3)
        return {name: statistics.median(values[skipped:]) for name, values in found.items()}

    def _openvino(self, *, traced: bool) -> tuple[Callable[[], object], Any]:
        model, _ = graphs.compiled(self.path, "fp32", {}, threads=self.threads, PERF_COUNT=traced)
        request = model.create_infer_request()
        value = np.random.default_rng(0).standard_normal(list(model.inputs[0].shape)).astype(np.float32)
        return (lambda: request.infer({0: value}, share_inputs=True)), request

    def _openvino_parts(self, seconds: float) -> dict[str, float]:
        call, request = self._openvino(traced=True)
        found = defaultdict(list)

        def traced() -> None:
            call()
            for part in request.get_profiling_info():
                found[part.node_name].append(part.real_time.total_seconds() * 1e3)

        _timed(traced, seconds, warm=3)
        return {name: statistics.median(values[3:]) for name, values in found.items()}


def _timed(call: Callable[[], object], seconds: float, *, warm: int = 3, least: int = 7, most: int = 40) -> list[float]:
    for _ in range(warm):
        call()
    values: list[float] = []
    while len(values) < most and (len(values) < least or sum(values) < seconds * 1e3):
        start = time.perf_counter()
        call()
        values.append((time.perf_counter() - start) * 1e3)
    return values


@contextlib.contextmanager
def _held(lock: Path | None) -> Iterator[None]:
    if lock is None:
        yield
        return
    with open(lock, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def measure(folder: Path, lock: Path | None, rounds: int, threads: int, chunk_s: float) -> None:
    """Append samples to `samples.jsonl`; what has had its rounds is left out, so that this can be called again."""
    rows, file = json.loads((folder / "networks.json").read_text()), folder / f"samples-{threads}.jsonl"
    drawn_ones = {r["id"] for r in rows if r["family"] == database.NO_FAMILY}
    done: dict[tuple[str, str], int] = defaultdict(int)
    if file.exists():
        for line in file.read_text().splitlines():
            one = json.loads(line)
            done[one["id"], one["runtime"]] += 1
    todo = []
    for number in range(rounds):
        turns = [(r["id"], runtime) for r in rows for runtime in RUNTIMES if number < SWEEP_ROUNDS or r["id"] not in drawn_ones]
        random.Random(number).shuffle(turns)
        for turn in turns:
            if done[turn] > 0:
                done[turn] -= 1
            else:
                todo.append(turn)
    print(f"{len(todo)} turns", flush=True)
    spent = 0.0
    while todo:
        with _held(lock):
            start = time.monotonic()
            about = Circumstances.capture(threads=threads).model_dump(mode="json")
            while todo and time.monotonic() - start < chunk_s:
                id, runtime = todo.pop(0)
                turn = Turn(folder / f"{id}.onnx", runtime, threads)
                whole = turn.whole(WHOLE_S) if id not in drawn_ones else []
                sample = {"id": id, "runtime": runtime, "whole": whole, "parts": turn.parts(PARTS_S), "at": about["date"], "load": about["load_average"]}
                with open(file, "a") as out:
                    out.write(json.dumps(sample) + "\n")
            spent += time.monotonic() - start
        print(f"{len(todo)} turns left after {spent:.0f} s of measuring", flush=True)
        time.sleep(5)


# --- rows


def of_rounds(medians: list[float]) -> float:
    """One time from the medians of several rounds: that of the least disturbed. On a shared machine others only ever add to it."""
    return min(medians)


def write(folder: Path, output: Path, threads: int) -> None:
    """Medians over rounds as rows of the database."""
    rows = {r["id"]: r for r in json.loads((folder / "networks.json").read_text())}
    samples: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for line in (folder / f"samples-{threads}.jsonl").read_text().splitlines():
        one = json.loads(line)
        samples[one["id"], one["runtime"]].append(one)
    about = Circumstances.capture(threads=threads).model_copy(update={"date": max(t["at"] for taken in samples.values() for t in taken), "load_average": None})
    for runtime in RUNTIMES:
        writer = database.Writer(database.key_of(about, "host", runtime, "fp32", threads), about)
        for (id, of), taken in sorted(samples.items()):
            if of == runtime and id in rows:
                operators = _graph(folder / f"{id}.onnx", runtime)
                parts = {name: of_rounds([t["parts"].get(name, 0.0) for t in taken]) for name in taken[0]["parts"]}
                took = [parts.get(o.name, 0.0) for o in operators]
                if rounds := [statistics.median(t["whole"]) for t in taken if t["whole"]]:
                    described = {k: v for k, v in rows[id].items() if k not in ("id", "family")}
                    writer.model(id, rows[id]["family"], operators, took, of_rounds(rounds), rounds=rounds, **described)
                else:
                    writer.parts(rows[id]["family"], operators, took)
        print(writer.save(output / f"{writer.key.slug}.jsonl.gz"), len(writer.rows), flush=True)


def _graph(path: Path, runtime: str) -> list[Operator]:
    """The executed graph, read once."""
    kept = path.with_suffix(f".{runtime}.json")
    if not kept.exists():
        write_json(kept, [{"name": o.name, **o.told()} for o in graphs.executed(path, runtime)])
    return [replace(Operator.read(row), name=row["name"]) for row in json.loads(kept.read_text())]


def main() -> None:
    """Parse and do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("export", "measure", "write"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--lock", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--chunk", type=float, default=CHUNK_S, help="seconds of measuring between two releases of the lock")
    parser.add_argument("--output", type=Path, default=database.SHIPPED)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if given.step == "export":
        export(given.folder)
    elif given.step == "measure":
        measure(given.folder, given.lock, given.rounds, given.threads, given.chunk)
    else:
        write(given.folder, given.output, given.threads)


if __name__ == "__main__":
    main()
