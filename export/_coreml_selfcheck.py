"""Compare the Core ML packages in this folder with what edgekd expects of them. For a Mac (macOS 14 or newer), with Xcode for the compiler's say:

    pip install coremltools numpy
    python3 selfcheck.py [--units all|cpu|gpu|ne] [--json]

Every `NAME.selfcheck.npz` holds inputs (`in/...`), places in the outputs (`at/...`), what the model gives there in torch (`torch/...`) and what an
interpreter of the package gave there where it was made (`file/...`). Ends with 1 when an output is further away than `limit` (relative L2).
"""
from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

UNITS = {"all": "ALL", "cpu": "CPU_ONLY", "gpu": "CPU_AND_GPU", "ne": "CPU_AND_NE"}
RUNS = 20

Predict = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


def compiled(package: Path) -> str:
    """What Xcode's compiler says of the package: "accepted", its complaint, or that it is not there."""
    if shutil.which("xcrun") is None:
        return "not compiled: no xcrun here (xcode-select --install)"
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(["xcrun", "coremlcompiler", "compile", str(package), folder], capture_output=True, text=True, check=False)
    return "accepted" if done.returncode == 0 else f"refused: {(done.stderr or done.stdout).strip()[-500:]}"


def on_core_ml(package: Path, units: str) -> tuple[Predict, dict[str, int]]:
    """The package on Core ML, and how many of its operations run on which unit (empty where Core ML does not say)."""
    import coremltools as ct

    model = ct.models.MLModel(str(package), compute_units=ct.ComputeUnit[UNITS[units]])
    try:
        plan = ct.models.compute_plan.MLComputePlan.load_from_path(model.get_compiled_model_path(), compute_units=ct.ComputeUnit[UNITS[units]])
        operations = plan.model_structure.program.functions["main"].block.operations
        used = [plan.get_compute_device_usage_for_mlprogram_operation(o) for o in operations]
        placed = Counter(type(u.preferred_compute_device).__name__ for u in used if u is not None)
    except Exception as e:  # only newer systems tell; what counts are the numbers
        print(f"Core ML does not say where it runs: {e}", file=sys.stderr)
        placed = Counter()
    return model.predict, dict(placed)


def compare(expected: Mapping[str, np.ndarray], predict: Predict) -> dict[str, Any]:
    """Relative L2 of every output from torch's and from the interpreter's, and the median milliseconds of a call."""
    inputs = {name[3:]: value for name, value in expected.items() if name.startswith("in/")}
    given = predict(inputs)
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        predict(inputs)
        times.append((time.perf_counter() - start) * 1e3)
    found: dict[str, Any] = {"ms": round(float(np.median(times)), 3), "limit": float(expected["limit"]), "outputs": {}}
    for name in (n[3:] for n in expected if n.startswith("at/")):
        value = np.asarray(given[name], np.float64).reshape(-1)[expected[f"at/{name}"]]
        found["outputs"][name] = {source: _distance(value, expected[f"{source}/{name}"]) for source in ("torch", "file") if f"{source}/{name}" in expected}
    worst = [d.get("file", d["torch"]) for d in found["outputs"].values()]
    found["passed"] = bool(worst) and all(d <= found["limit"] for d in worst)
    return found


def _distance(value: np.ndarray, expected: np.ndarray) -> float:
    if not np.isfinite(value).all():
        return float("inf")
    return float(np.linalg.norm(value - expected) / max(float(np.linalg.norm(expected)), 1e-12))


def check(folder: Path, units: str = "all", opened: Callable[[Path, str], tuple[Predict, dict[str, int]]] = on_core_ml) -> dict[str, Any]:
    """Every package of the folder by name."""
    found = {}
    for file in sorted(folder.glob("*.selfcheck.npz")):
        name = file.name.removesuffix(".selfcheck.npz")
        package = folder / f"{name}.mlpackage"
        with np.load(file) as held:
            expected = dict(held)
        predict, placed = opened(package, units)
        found[name] = {"compiler": compiled(package), "operations_on": placed, **compare(expected, predict)}
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """0: all passed."""
    parser = argparse.ArgumentParser(description="Compare the Core ML packages in this folder with what is expected of them.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--units", choices=UNITS, default="all", help="what Core ML may use")
    parser.add_argument("--json", action="store_true", help="one document instead of lines")
    asked = parser.parse_args(arguments)
    found = check(asked.folder, asked.units)
    if not found:
        print(f"no *.selfcheck.npz in {asked.folder}", file=sys.stderr)
        return 1
    if asked.json:
        print(json.dumps(found, indent=1))
    for name, told in found.items() if not asked.json else ():
        distances = ", ".join(f"{o} {d.get('file', d['torch']):.2g} from the file's own, {d['torch']:.2g} from torch" for o, d in told["outputs"].items())
        print(f"{name}: {'passed' if told['passed'] else 'FAILED'}: {distances} (limit {told['limit']:g}); {told['ms']} ms; "
              f"compiler: {told['compiler']}; operations: {told['operations_on'] or 'Core ML does not say where'}")
    return 0 if all(told["passed"] for told in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
