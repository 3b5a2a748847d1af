"""ONNX Runtime's `onnxruntime_perf_test` (microsoft/onnxruntime, onnxruntime/test/perftest).

With a result file it writes every run: `model,seconds,peak bytes,CPU %,run`. Inputs are ours: it reads `test_data_set_0/input_N.pb` beside the model. With `-p`
it leaves onnxruntime's own profile, which says what was executed and where.
"""
from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgekd.errors import EdgekdError
from edgekd.profiling.drivers._ort_nodes import facts, layers_of, nodes_of
from edgekd.profiling.drivers._program import Executed, Launch, Program, numbers

NAME = "onnxruntime_perf_test"
WHERE = ("build it: ./build.sh --android --android_abi arm64-v8a --android_api 27 --config Release in onnxruntime's repository; it lies in build/Android/Release. "
         "Name its libonnxruntime.so as `libraries`")
RUNS = 5
PROVIDERS = {"cpu": "CPUExecutionProvider", "xnnpack": "XnnpackExecutionProvider", "nnapi": "NnapiExecutionProvider", "qnn": "QNNExecutionProvider"}


class Onnx:
    """See `edgekd.profiling.drivers._program.Tool`."""

    note = f"{NAME} runs on the inputs of the job"

    def __init__(self, program: Program, part: Mapping[str, Any], folder: str, threads: int | None, tools: Mapping[str, str]) -> None:
        self._provider = tools.get("provider", "cpu")
        if self._provider not in PROVIDERS:
            raise EdgekdError(f"{NAME} has no provider '{self._provider}'", hint=f"tools.provider of the target is one of {', '.join(PROVIDERS)}")
        self._program, self._place = program, f"{folder}/{place(part)}"
        self._model, self._count, self._peak = f"{self._place}/{Path(part['file']).name}", 0, list[int]()
        self._words = ["-e", self._provider, "-m", "times", *(["-x", str(threads)] if threads else [])]

    def launch(self, *, warmup: int, seconds: float) -> Launch:
        """Five runs after those for warming up, of which the program makes one more of its own accord."""
        self._count += 1
        result, runs = f"{self._place}/result-{self._count}.csv", warmup + RUNS
        done = self._program.run(*self._words, "-r", str(runs), self._model, result)
        rows = re.findall(r"^[^,\n]*,([\d.e+-]+),(\d+),\d+,(\d+)\s*$", self._program.device.run(["cat", result], timeout_s=30).stdout, re.MULTILINE)
        load = numbers(r"Session creation time cost:\s*([\d.e+-]+)\s*s", done.stdout + done.stderr)
        if len(rows) != runs:
            last = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()][-2:]
            raise EdgekdError(f"{NAME} wrote {len(rows)} times instead of {runs}: {' / '.join(last)[:300] or 'it said nothing'}", where=result)
        self._peak += [int(peak) for _, peak, _ in rows]
        return Launch([float(s) * 1e3 for s, _, _ in rows][warmup:], load[0] * 1e3 if load else None, 1, warmup + 1)

    def executed(self, *, layers: bool) -> Executed:
        """From onnxruntime's profile of a few runs."""
        self._program.run(*self._words, "-r", str(RUNS), "-p", f"{self._place}/profile", self._model, f"{self._place}/profiled.csv")
        text = self._program.device.run(["sh", "-c", 'cat "$1"/profile*.json', "edgekd", self._place], timeout_s=60).stdout
        try:
            nodes = nodes_of(json.loads(text))
        except (ValueError, TypeError, KeyError, AttributeError):
            nodes = []
        if not nodes:
            return Executed("" if self._provider == "cpu" else "unknown", note=f"{NAME} left no profile: what it executed is not known")
        found = facts(nodes, PROVIDERS[self._provider])
        return Executed(found["executed_precision"], found["executed_ops"], found["fell_back"], layers_of(nodes) if layers else None)

    def memory(self) -> int | None:
        """As the program told with every run so far."""
        return max(self._peak, default=0) or None

    def answers(self) -> dict[str, str]:
        """None: it writes no outputs."""
        return {}


def place(part: Mapping[str, Any]) -> str:
    """The folder below the job's that a component has to itself: the program looks for inputs beside the model."""
    return f"{part['file']}.perf"


def stage(part: Mapping[str, Any], folder: Path) -> None:
    """Write that folder: the model's files and its inputs as protobuf."""
    import numpy as np
    from onnx import numpy_helper

    own, base = folder / place(part), Path(part["file"]).parent
    data = own / "test_data_set_0"
    data.mkdir(parents=True, exist_ok=True)
    for file in part["files"]:
        there = own / Path(file).relative_to(base)
        there.parent.mkdir(parents=True, exist_ok=True)
        if not there.exists():
            shutil.copyfile(folder / file, there)
    taken = _takes(folder / part["file"])
    for index, one in enumerate(i for i in part["inputs"] if i["name"] in taken):
        value = np.fromfile(folder / one["file"], np.dtype(one["dtype"])).reshape(one["shape"])
        (data / f"input_{index}.pb").write_bytes(numpy_helper.from_array(value, one["name"]).SerializeToString())


def _takes(model: Path) -> set[str]:
    """The inputs that the graph has: an export may drop one that nothing uses."""
    import onnx

    try:
        return {i.name for i in onnx.load(model, load_external_data=False).graph.input}
    except Exception as e:  # protobuf's own kinds
        raise EdgekdError("the ONNX file cannot be read", where=model, hint="export the model again") from e
