"""ExecuTorch's `executor_runner` (pytorch/executorch, examples/portable/executor_runner; built with XNNPACK it is xnn_executor_runner).

A build since 2026 tells the time of every run (`Iteration 3 of 8: 1.84 ms`) and how long the model took to load; older ones tell the sum, so that a sample
is the mean of a start's runs, the first included. Inputs are ours; outputs come back where the build can write them.
"""
from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgekd.errors import EdgekdError, first_line
from edgekd.profiling.drivers._program import Executed, Launch, Program, numbers

NAME = "executor_runner"
WHERE = ("build it: cmake --preset android-arm64-v8a (ExecuTorch's docs, Building from Source), target executor_runner with "
         "EXECUTORCH_BUILD_XNNPACK and EXECUTORCH_BUILD_EXTENSION_RUNNER_UTIL")
RUNS, MEAN_OF = 5, 10
"""Timed runs of a start; and what a sample is the mean of where single runs are not told."""
TOTAL = re.compile(r"Model executed successfully (\d+) time\(s\) in ([\d.]+) ms")
INPUTS = re.compile(r"^[^,]+$")


class Executorch:
    """See `edgekd.profiling.drivers._program.Tool`."""

    note = f"{NAME} runs on the inputs of the job"

    def __init__(self, program: Program, part: Mapping[str, Any], folder: str, threads: int | None, local: Path) -> None:
        self._program, self._part, self._out, self._local = program, part, f"{folder}/{part['file']}.out", local
        files = [f"{folder}/{i['file']}" for i in part["inputs"]]
        given = [f"--inputs={','.join(files)}"] if all(INPUTS.match(f) for f in files) else []
        self._words = [f"--model_path={folder}/{part['file']}", *given, *([f"--cpu_threads={threads}"] if threads else []), "--print_output=none"]
        self._singly: bool | None = None

    def launch(self, *, warmup: int, seconds: float) -> Launch:
        """Five runs after those for warming up; of a build that tells no single ones, the mean of ten and those."""
        runs = warmup + (MEAN_OF if self._singly is False else RUNS)
        done = self._program.run(*self._words, f"--num_executions={runs}")
        said = done.stdout + done.stderr
        each, load = numbers(r"Iteration \d+ of \d+: ([\d.e+]+) ms", said), numbers(r"Model loaded in ([\d.e+]+) ms", said)
        self._singly = bool(each)
        if len(each) == runs:
            return Launch(each[warmup:], load[0] if load else None, 1, warmup)
        total = TOTAL.search(said)
        if total is None or int(total[1]) == 0:
            last = [line for line in said.splitlines() if line.strip()][-2:]
            raise EdgekdError(f"{NAME} ended without telling times: {' / '.join(last)[:300] or 'it said nothing'}",
                              hint="build it with logging (EXECUTORCH_ENABLE_LOGGING=ON), at level Info")
        return Launch([float(total[2]) / int(total[1])], load[0] if load else None, int(total[1]), 0)

    def executed(self, *, layers: bool) -> Executed:
        """From the file: what a `.pte` gives to its delegates was decided when it was exported."""
        try:
            from edgekd.export._executorch_file import read

            found = read(self._local / self._part["file"])
        except (EdgekdError, ImportError) as e:
            return Executed(note=f"{NAME} does not tell what it executes, which is what the file says, and that cannot be read here: {first_line(e)}")
        away = [f"{name} (x{n}) on portable kernels" for name, n in found.outside.items()]
        return Executed(found.precision, found.ops, away, None, f"{NAME} does not tell what it executes: precision and operators are those in the file"
                        + ("; it tells no times of layers" if layers else ""))

    def memory(self) -> int | None:
        """It does not say."""
        return None

    def answers(self) -> dict[str, str]:
        """What `--output_file` writes: NAME-0.bin and so on, in the order of the outputs. None of a build that lacks it."""
        if not any(w.startswith("--inputs=") for w in self._words):
            return {}
        self._program.run(*self._words, "--num_executions=1", f"--output_file={self._out}")
        if self._program.without & {"inputs", "output_file"}:
            return {}
        return {output: f"{self._out}-{i}.bin" for i, output in enumerate(self._part["outputs"])}
