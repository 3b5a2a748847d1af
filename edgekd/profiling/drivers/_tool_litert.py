"""LiteRT's `benchmark_model` (google-ai-edge/LiteRT, tflite/tools/benchmark; TensorFlow's is the same program with other paths).

It tells mean, least and most of its runs, and of all runs singly the first and the last: `count=2 first=301 curr=296 min=296 max=301 avg=298 std=2`. So every
start makes two timed runs, whose times it tells exactly, and is one of many. Its inputs are random numbers of its own.
"""
from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from edgekd.errors import EdgekdError
from edgekd.profiling.drivers._program import Executed, Launch, Program, numbers

NAME = "benchmark_model"
WHERE = ("get android_aarch64_benchmark_model (android_arm_... for 32 bits) from https://ai.google.dev/edge/litert/models/measurement, "
         "or build it: bazel build -c opt --config=android_arm64 //tflite/tools/benchmark:benchmark_model")
RUNS = 2
WARM_S = 0.2
"""Seconds of warming up in every start at least: the clock of an idle phone is low."""
DELEGATES = {"xnnpack": "--use_xnnpack=true", "gpu": "--use_gpu=true", "nnapi": "--use_nnapi=true", "none": "--use_xnnpack=false"}
STATS = re.compile(r"count=(\d+)\s+(?:first=(\d+)\s+curr=(\d+)|curr=(\d+))")
TIMINGS = re.compile(r"Inference timings in us: Init: ([\d.e+]+), First inference: ([\d.e+]+), Warmup \(avg\): ([\d.e+]+), Inference \(avg\): ([\d.e+]+)")
PARTLY = re.compile(r"the model graph will be partially executed by the delegate(?: w/ (\d+) delegate kernels)?", re.I)
ARITHMETIC = re.compile(r"convolution|fully connected|batch matrix multiply|conv_2d|fully_connected|batch_matmul|transpose_conv", re.I)
TYPES = ((re.compile(r"\b(QS8|QU8|QC8|QD8|QP8|QB4|QC4)"), "int8"), (re.compile(r"\bF16\b"), "fp16"), (re.compile(r"\bF32\b"), "fp32"))
"""What XNNPACK calls the numbers of an operator, in its name: `Convolution (NHWC, QC8) IGEMM`; the first that fits."""


class Litert:
    """See `edgekd.profiling.drivers._program.Tool`."""

    note = f"{NAME} runs on random inputs of its own, {RUNS} timed runs a start"

    def __init__(self, program: Program, part: Mapping[str, Any], folder: str, threads: int | None, tools: Mapping[str, str]) -> None:
        delegate = tools.get("delegate", "xnnpack")
        if delegate not in DELEGATES:
            raise EdgekdError(f"{NAME} has no delegate '{delegate}'", hint=f"tools.delegate of the target is one of {', '.join(DELEGATES)}")
        self._program, self._profile, self._delegate = program, f"{folder}/{part['file']}.profile.csv", delegate
        # a GPU takes fp16 for fp32 unless it is told not to
        half = {"xnnpack": ["--xnnpack_force_fp16=true"] if part["scheme"] == "fp16" else [],
                "gpu": [f"--gpu_precision_loss_allowed={'true' if part['scheme'] == 'fp16' else 'false'}"]}.get(delegate, [])
        self._beyond = {"gpu": "fp16" if part["scheme"] == "fp16" else "fp32", "nnapi": "unknown"}.get(delegate)
        self._words = [f"--graph={folder}/{part['file']}", *([f"--num_threads={threads}"] if threads else []), DELEGATES[delegate], *half]

    def launch(self, *, warmup: int, seconds: float) -> Launch:
        """Two runs."""
        done = self._program.run(*self._words, *self._counts(warmup, seconds))
        timings, stats = TIMINGS.search(done.stdout + done.stderr), STATS.findall(done.stdout + done.stderr)
        if timings is None or not stats:
            raise _odd(done.stdout)
        count, first, last, only = stats[-1]
        told = [first, last] if first else [only] * int(count)  # "(all same)"
        if int(count) > len(told):  # it made more runs than it was asked for: what it says of them is their mean
            return Launch([float(timings[4]) / 1e3], float(timings[1]) / 1e3, int(count), int(stats[0][0]))
        return Launch([float(us) / 1e3 for us in told], float(timings[1]) / 1e3, 1, int(stats[0][0]) if len(stats) > 1 else 0)

    def _counts(self, warmup: int, seconds: float) -> list[str]:
        return [f"--num_runs={RUNS}", "--min_secs=0", f"--max_secs={seconds:g}", f"--warmup_runs={max(1, warmup)}", f"--warmup_min_secs={WARM_S:g}"]

    def executed(self, *, layers: bool) -> Executed:
        """From its operator profile, a CSV file."""
        done = self._program.run(*self._words, "--num_runs=10", "--min_secs=0", "--max_secs=20", "--warmup_runs=2", "--warmup_min_secs=0",
                                 "--enable_op_profiling=true", f"--profiling_output_csv_file={self._profile}")
        text = self._program.device.run(["cat", self._profile], timeout_s=30).stdout
        rows = operators(text or done.stdout)
        found = read(rows, done.stdout + done.stderr, self._delegate, layers)
        if self._beyond is None or found.precision:
            return found
        told = "computes 8-bit files in floating point" if self._delegate == "gpu" else "does not tell in which precision it computes"
        return replace(found, precision=self._beyond, note=f"{NAME}: the delegate {self._delegate} {told}")

    def memory(self) -> int | None:
        """Watched by the program itself, in a start of its own because that disturbs it."""
        done = self._program.run(*self._words, *self._counts(1, 20), "--report_peak_memory_footprint=true", "--memory_footprint_check_interval_ms=5")
        found = numbers(r"Overall peak memory footprint \(MB\) via periodic monitoring: ([\d.e+]+)", done.stdout + done.stderr)
        return int(found[-1] * (1 << 20)) if found else None  # it divides kilobytes by 1024

    def answers(self) -> dict[str, str]:
        """None: its inputs are not ours."""
        return {}


def operators(text: str) -> list[dict[str, Any]]:
    """The rows `node type,first,avg_ms,%,cdf%,mem KB,times called,name` of its profile, in the order they ran. Commas in a type are not escaped; those in a
    name are tabs."""
    _, _, regular = text.rpartition("Operator-wise Profiling Info for Regular Benchmark Runs")
    lines, found, inside = (regular or text).splitlines(), list[dict[str, Any]](), False
    for line in lines:
        cells = [c.strip() for c in line.rsplit(",", 7)]
        if line.startswith("node type"):
            if found:
                break  # the same again, sorted by time
            inside = True
        elif inside and len(cells) == 8:
            try:
                found.append({"op": cells[0], "ms": float(cells[2]), "name": re.sub(r":\d+$", "", cells[7].replace("\t", ",")).strip("[] ")})
            except ValueError:
                inside = False
        elif found:
            break
    return found


def read(rows: Sequence[Mapping[str, Any]], said: str, delegate: str, layers: bool) -> Executed:
    """What was executed, from the profile and from what it says of its delegate."""
    computed = [r for r in rows if ARITHMETIC.search(r["op"])]
    kinds = [_type(r["op"]) for r in computed]
    known = [k for k in dict.fromkeys(sorted(filter(None, kinds), key=("int8", "fp16", "fp32").index))]
    precision = "+".join(known) if known and None not in kinds else ""
    # behind a delegate every operator is `Delegate/...`; what is left is the interpreter's own
    outside = [r for r in rows if delegate != "none" and not r["name"].startswith("Delegate/") and "delegate" not in r["op"].lower()]
    partly = PARTLY.search(said)
    fell = [f"{r['name']} ({r['op']}) on LiteRT's own kernels" for r in outside] if partly or any(r["name"].startswith("Delegate/") for r in rows) else []
    if delegate != "none" and "Failed to apply" in said:
        fell = [f"all operators on LiteRT's own kernels: {delegate} was not applied"]
    told = [{"name": r["name"], "op": r["op"], "ms": r["ms"], "precision": _type(r["op"])} for r in rows] if layers and rows else None
    return Executed(precision, dict(Counter(str(r["op"]) for r in rows).most_common()), fell, told,
                    None if precision else f"{NAME}'s profile does not tell the precision of the arithmetic: it is that of the file")


def _type(op: str) -> str | None:
    return next((name for pattern, name in TYPES if pattern.search(op)), None)


def _odd(text: str) -> EdgekdError:
    last = [line for line in text.splitlines() if line.strip()][-2:]
    return EdgekdError(f"{NAME} ended without telling times: {' / '.join(last)[:300] or 'it said nothing'}", hint="is it LiteRT's or TensorFlow Lite's program?")
