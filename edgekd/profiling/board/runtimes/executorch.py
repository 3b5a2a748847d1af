"""`.pte` files in ExecuTorch: by its Python bindings, else by the program `executor_runner`. Operators and precision are fixed in the file: the one who
wrote it reads them there."""
from __future__ import annotations

import json
import os
import re
import tempfile
from typing import TYPE_CHECKING, Any

from ..job import Trouble
from ..loop import MIN_SAMPLES, MOST_SAMPLES, Samples
from . import Array, Session, first_line, module, of_numpy, program
from .programs import execute

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..job import Part

NAMES = "edgekd_names"
"""The constant method of a file that answers with the names of its inputs and outputs, as JSON."""
TOOK = re.compile(r"Model executed successfully (\d+) time\(s\) in ([\d.]+) ms")
ITERATION = re.compile(r"Iteration \d+ of \d+: ([\d.]+) ms")
"""newer ones tell every execution's time"""
EACH = 10
"""executions in one process of an older program, whose mean is one sample"""
MEANS = f"this executor_runner tells the time of {EACH} executions together: each sample is their mean, the first and cold one among them"


def opened(part: Part, threads: int | None, tools: Mapping[str, str]) -> Session:
    """See `edgekd.profiling.board.runtimes`."""
    if "executor_runner" in tools:
        return RunnerSession(part, threads, tools)
    try:
        return BoundSession(part, threads, module("executorch"))
    except Trouble as e:
        if "missing" not in e.what:
            raise
        try:
            return RunnerSession(part, threads, tools)
        except Trouble:
            raise e from None


class BoundSession(Session):
    """By the Python bindings, which take torch tensors."""

    def __init__(self, part: Part, threads: int | None, runtime: Any) -> None:
        import torch

        try:
            if threads:
                from executorch.extension.pybindings import portable_lib  # type: ignore[import-untyped]

                portable_lib._unsafe_reset_threadpool(threads)
            self._program = runtime.Runtime.get().load_program(part.file)
            self._forward = self._program.load_method("forward")
            told = json.loads(self._program.load_method(NAMES).execute([])[0]) if NAMES in self._program.method_names else {}
        except (RuntimeError, KeyError) as e:
            raise Trouble(f"ExecuTorch cannot open the file: {first_line(e)}", "the runtime on the board must be of the version that wrote it") from e
        given = part.arrays()
        self._feed = [torch.from_numpy(given[name].copy()) for name in told.get("inputs") or [i.name for i in part.inputs]]
        count = self._forward.metadata.num_outputs()
        self._names = list(told.get("outputs") or part.outputs[:count] or [f"output{i}" for i in range(count)])
        self._last: Any = []

    def run(self) -> None:
        """One call."""
        self._last = self._forward.execute(self._feed)

    def outputs(self) -> dict[str, Array]:
        """Of the last call."""
        return {name: of_numpy(self._last[i].numpy()) for i, name in enumerate(self._names)}


class RunnerSession(Session):
    """By ExecuTorch's example program, which times executions itself."""

    times_itself = True

    def __init__(self, part: Part, threads: int | None, tools: Mapping[str, str]) -> None:
        self._program, self._part, self._threads = program("executorch", tools), part, threads
        self._outputs: dict[str, Array] = {}
        self.notes: list[str] = []

    def run(self) -> None:
        """One process with one execution, whose outputs are kept."""
        with tempfile.TemporaryDirectory(prefix="edgekd-", dir=os.path.dirname(self._part.file)) as folder:
            self._execute(1, f"--output_file={os.path.join(folder, 'out')}")
            self._outputs = {}
            for i, name in enumerate(self._part.outputs):
                with open(os.path.join(folder, f"out-{i}.bin"), "rb") as f:
                    data = f.read()
                self._outputs[name] = Array("float32", [len(data) // 4], data)

    def outputs(self) -> dict[str, Array]:
        """Of the last call, flat: the program tells no shapes."""
        return self._outputs

    def samples(self, *, warmup: int, repeats: int, max_seconds: float, mode: str) -> Samples:
        """Of every execution after the warm-up, or, of a program that tells no single ones, means of `EACH`."""
        single, mean = self._execute(warmup + EACH)
        found = Samples(warmup=warmup if single else 0, steady=True)
        if single:
            count = max(MIN_SAMPLES, int(max_seconds * 1e3 / max(mean, 1e-3))) if mode == "time" else repeats
            most = max(MIN_SAMPLES, int(max_seconds * 1e3 / max(mean, 1e-3)))
            found.values = self._execute(warmup + min(count, most, MOST_SAMPLES))[0][warmup:]
            return found
        self.notes = [MEANS]
        while len(found.values) < (MIN_SAMPLES if mode == "time" else min(repeats, MIN_SAMPLES)) or (mode == "time" and found.spent_s * EACH < max_seconds):
            found.values.append(self._execute(EACH)[1])
        return found

    def _execute(self, count: int, *more: str) -> tuple[list[float], float]:
        """Milliseconds of every execution where they are told, and their mean."""
        command = [self._program, f"--model_path={self._part.file}", "--method_name=forward", f"--inputs={','.join(i.file for i in self._part.inputs)}",
                   f"--num_executions={count}", "--print_output=none", *([f"--cpu_threads={self._threads}"] if self._threads else []), *more]
        said = execute(command, os.path.dirname(self._part.file), timeout=600).text
        took = TOOK.search(said)
        if not took:
            raise Trouble("executor_runner does not say how long it took", "use one of ExecuTorch 1.0 or newer")
        return [float(ms) for ms in ITERATION.findall(said)], float(took.group(2)) / float(took.group(1))
