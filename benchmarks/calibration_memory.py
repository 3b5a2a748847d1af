"""Peak memory of finding int8 ranges at 1024 px with 4, 16 and 64 photos: edgekd's way beside onnxruntime's own; JSON out.

    python benchmarks/calibration_memory.py --output benchmarks/results/calibration-memory-2026-11-22.json

Each row is a process of its own that loads no torch: it opens the float graph of the student's encoder, calibrates, and says its peak resident set. Photos
lie preprocessed on the disk and are read one at a time in both ways; more than there are come shifted. `ours` feeds onnxruntime's calibrators one sample at
a time and looks at what will be quantized (`export/_ranges.py`); `library` is `create_calibrator` and one `collect_data`, as in `quantize_static`. A process
that needs more than `--ceiling` GB is stopped there, and its row says so. Weights do not matter for memory: the student is drawn from a seed.
"""
from __future__ import annotations

import argparse
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
COUNTS, WAYS, METHODS = (4, 16, 64), ("ours", "library"), ("minmax", "percentile")
MARGIN = 1.15
"""how much more memory 16 times as many photos may take and still be called constant"""


class Photos:
    """`count` samples from the photos in a folder, shifted by a row for every round."""

    def __init__(self, folder: Path, count: int) -> None:
        self.files, self.count = sorted(folder.glob("*.npy")), count

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for i in range(self.count):
            yield {"images": np.roll(np.load(self.files[i % len(self.files)]), i // len(self.files), axis=2)}


def peak() -> float:
    """MB of the resident set at its largest so far. Not `ru_maxrss`, which remembers the process that this one was forked from. Linux."""
    return float(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def calibrated(way: str, method: str, file: Path, samples: Photos) -> int:
    """Find the ranges; of how many tensors."""
    import onnx
    from edgekd.export import _ranges
    from edgekd.export._half import layer_of
    from edgekd.export._int8 import ARITHMETIC, _around, quantizable

    if way == "ours":
        graph = onnx.load(file)
        tensors = _around(graph.graph, set(quantizable(graph, dynamic=False)), {n.name: layer_of(n) for n in graph.graph.node})
        return len(_ranges.ranges(_ranges.Watched(file, "encoder", False, tensors), samples, method=method))
    from onnxruntime.quantization import CalibrationMethod, create_calibrator

    options = {"percentile": _ranges.PERCENTILE, "symmetric": False} if method == "percentile" else {}
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        kind = CalibrationMethod.MinMax if method == "minmax" else CalibrationMethod.Percentile
        calibrator = create_calibrator(str(file), list(ARITHMETIC), str(Path(folder) / "watched.onnx"), kind, extra_options=options)
        calibrator.collect_data(_ranges.Checked(samples, "encoder"))
        return len(list(calibrator.compute_data()))


def child(way: str, method: str, count: int, folder: Path, ceiling: float) -> None:
    """One row's process: its figures to stdout."""
    import onnxruntime  # noqa: F401

    resource.setrlimit(resource.RLIMIT_DATA, (int(ceiling * 1e9), resource.RLIM_INFINITY))
    before, start, found, why = peak(), time.perf_counter(), 0, None
    try:
        found = calibrated(way, method, folder / "float.onnx", Photos(folder, count))
    except Exception as e:  # numpy's MemoryError, and onnxruntime's own for the same
        why = f"stopped at the ceiling: {type(e).__name__}"
    cpu = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({"peak_mb": round(peak(), 1), "before_mb": round(before, 1), "tensors": found, "stopped": why,
                      "seconds": round(time.perf_counter() - start, 1), "cpu_seconds": round(cpu.ru_utime + cpu.ru_stime, 1)}))


def prepared(student: str, size: int, data: str, folder: Path) -> int:
    """The float graph and the photos, in `folder`; how many photos."""
    from edgekd.export.onnx import exporter

    from edgekd import students
    from edgekd.data import open_data
    from edgekd.exporting import folded
    from edgekd.models.sam import components
    from edgekd.quantization.calibration import EncoderCalibration

    model = students.build(student, image_size=size).eval()
    photos = EncoderCalibration(open_data(data, masks=False), model.preprocess, limit=64)
    exporter.export(components(folded(model, next(iter(photos))["images"]))["encoder"], folder / "float.onnx", scheme="fp32")
    for i, sample in enumerate(photos):
        np.save(folder / f"{i:03}.npy", sample["images"])
    return len(photos)


def main() -> None:
    """Every way, method and count in turn."""
    parser = argparse.ArgumentParser(description="Peak memory of calibration.")
    parser.add_argument("--output", type=Path, default=ROOT / f"benchmarks/results/calibration-memory-{date.today().isoformat()}.json")
    parser.add_argument("--student", default="repvit_xs")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--data", default=str(ROOT / "examples/photos"))
    parser.add_argument("--counts", type=int, nargs="*", default=list(COUNTS))
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--ceiling", type=float, default=6.0, help="GB of data a process may hold")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.child:
        way, method, count, folder, ceiling = a.child
        return child(way, method, int(count), Path(folder), float(ceiling))
    from edgekd.measurement import Circumstances
    from edgekd.workspace import write_json

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
        photos = prepared(a.student, a.size, a.data, Path(folder))
        about = {"schema": "edgekd.benchmark.calibration_memory/1", "student": a.student, "image_size": a.size, "photos": photos, "ceiling_gb": a.ceiling,
                 "circumstances": Circumstances.capture().model_dump(mode="json")}
        for method in a.methods:
            for way in WAYS:
                for count in a.counts:
                    command = [sys.executable, __file__, "--child", way, method, str(count), folder, str(a.ceiling)]
                    done = subprocess.run(command, capture_output=True, text=True, check=False)
                    told = json.loads(done.stdout) if done.returncode == 0 else {"stopped": f"the process ended with {done.returncode}", "peak_mb": None}
                    rows.append({"method": method, "way": way, "samples": count, "provenance": "measured", **told})
                    print(json.dumps(rows[-1]), flush=True)
                    write_json(a.output, {**about, "constant": constant(rows), "rows": rows})


def constant(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """way and method -> whether the most samples took about the memory of the fewest; only those of which more than one count was measured."""
    found = {}
    for way, method in dict.fromkeys((r["way"], r["method"]) for r in rows):
        peaks = [r["peak_mb"] for r in sorted(rows, key=lambda r: r["samples"]) if (r["way"], r["method"]) == (way, method)]
        stopped = any(r["stopped"] for r in rows if (r["way"], r["method"]) == (way, method))
        if len(peaks) > 1:
            found[f"{way} {method}"] = not stopped and peaks[-1] <= MARGIN * peaks[0]
    return found


if __name__ == "__main__":
    main()
