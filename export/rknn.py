"""RKNN (`.rknn`): the NPU of Rockchip's RK3588, built by rknn-toolkit2 in an environment of its own (`_envs.py`): it pins a torch of its own.

    fp16          everything in fp16, from an ONNX graph of torch's older exporter, the one that the toolkit was made for
    w8a8_static   8-bit weights per channel and 8-bit activations, calibrated by the toolkit; what it cannot quantize stays in fp16

The file runs on the board only. What is said of it here: the file's own description is held against the component, the compiler's list says what
runs on the NPU in what precision and what is left to the CPU, and the gate is on the vendor's simulator (slow, and no measure of time).
"""
from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from edgekd.export import _child, _envs, _rknn
from edgekd.export._program import contiguous, quiet

from edgekd.errors import EdgekdError, UsageError, first_line, unknown
from edgekd.protocols import Availability, Check, Component, Facts, Session

PLATFORM = "rk3588"
OPSET = 18
SAMPLES = 16
"""Calibration inputs that are used at most; the toolkit holds all in memory."""
MINUTES = 60.0


class RknnExporter(Facts):
    """See `edgekd.protocols.Exporter`."""

    format = "rknn"
    suffix = ".rknn"
    extra: str | None = None
    schemes: tuple[str, ...] = ("fp16", "w8a8_static")
    fixed_shapes = True

    def availability(self) -> Availability:
        """Whether the toolkit's environment is there. What it writes runs on a board, never here."""
        spec = _envs.known(_rknn.ENVIRONMENT)
        if _envs.python_of(_rknn.ENVIRONMENT) is None:
            return Availability(False, reason=f"it needs an environment of its own, of {spec.disk / _envs.GB:.1f} GB", fix=_envs.command(_rknn.ENVIRONMENT), runs=False)
        return Availability(True, version=spec.packages[0].replace("==", " "), reason="its files run on a Rockchip NPU only",
                            fix="on the board: pip install rknn-toolkit-lite2", runs=False)

    def export(self, component: Component, path: Path, *, scheme: str, calibration: Any = None, qdq: str = "u8s8") -> list[Path]:
        """Write the component at `path` (see `edgekd.protocols.Exporter.export`). The toolkit picks its own style of int8."""
        if scheme not in self.schemes:
            raise unknown("rknn scheme", scheme, self.schemes)
        if scheme == "w8a8_static" and calibration is None:
            raise UsageError(f"{scheme} needs calibration images", where=component.name, hint="give a folder of images with --data")
        python, path = _python(), Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.stem}.", dir=path.parent) as folder:
            material, made = Path(folder) / "material", Path(folder) / path.name
            material.mkdir()
            names = _capture(component, material / "model.onnx")
            dataset = _dataset(calibration, names, Path(folder)) if scheme == "w8a8_static" else None
            request = {"material": str(material), "output": str(made), "platform": PLATFORM, "dataset": dataset}
            report = _child.call(f"{_rknn.CHILD}:convert", request, minutes=MINUTES, what="rknn-toolkit2", python=python)
            if not made.is_file():
                raise EdgekdError("rknn-toolkit2 wrote no file and said nothing", where=component.name)
            _rknn.keep(made, material, report)
            os.replace(made, path)
        return [path]

    def open(self, path: Path, *, scheme: str, threads: int | None = None) -> Session:
        """Refused: see `stand_in`."""
        raise EdgekdError("an RKNN file runs on a Rockchip NPU only", where=path, hint="copy it to the board and run it with rknn-toolkit-lite2")

    def check(self, component: Component, path: Path, *, scheme: str) -> Check:
        """The file's own description against the component, and the compiler's list of what it built."""
        about = _rknn.describe(Path(path))
        if PLATFORM not in about["target_platform"]:
            raise EdgekdError(f"the file is for {', '.join(about['target_platform'])}, not for {PLATFORM}", where=path)
        if missing := [n for n in component.outputs if n not in about["outputs"]]:
            raise EdgekdError(f"the file lacks outputs of the component: {', '.join(missing)}", where=path)
        for name, (shape, _) in about["inputs"].items():
            if name not in component.example or tuple(component.example[name].shape) != shape:
                raise EdgekdError(f"the file's input {name} {list(shape)} is none of the component's", where=path)
        material = _rknn.material_of(Path(path))
        listed = _rknn.layers(material) if material else []
        left = Counter(layer["kind"] for layer in listed if layer["target"] != "NPU")
        details = {"target": PLATFORM, "layers": len(listed), "not_on_the_npu": dict(left.most_common())}
        said = f", {sum(left.values())} of {len(listed)} layers on the CPU by its own list" if listed else ""
        return Check("built", f"built for {PLATFORM} by rknn-toolkit2 {about['version'].split('(')[0]}{said}; inputs and outputs read back from the file",
                     _rknn.precision(listed), _rknn.operators(listed), details)

    def stand_in(self, path: Path, *, scheme: str, threads: int | None = None) -> Session | None:
        """The vendor's simulator, of what this very file was built from; None where that is not kept any more."""
        material = _rknn.material_of(Path(path))
        return _rknn.SimulatorSession(Path(path), material, _python(), PLATFORM, threads) if material else None


def _python() -> Path:
    python = _envs.python_of(_rknn.ENVIRONMENT)
    if python is None:
        raise EdgekdError("rknn-toolkit2 is not installed: it needs an environment of its own", hint=_envs.command(_rknn.ENVIRONMENT))
    return python


def _capture(component: Component, file: Path) -> list[str]:
    """Write the component as ONNX with torch's older exporter; the inputs that the graph takes, in its order."""
    import onnx
    import torch

    if component.module.training:
        raise EdgekdError("the module is in training mode and would be exported with its training behaviour", where=component.name,
                          hint="call .eval() first")
    example = tuple(t.contiguous() for t in component.example.values())
    try:
        with quiet(), warnings.catch_warnings(), _no_stdout(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(contiguous(component.module), example, str(file), dynamo=False, opset_version=OPSET, input_names=list(component.example),
                              output_names=list(component.outputs))
    except Exception as e:  # torch raises dozens of kinds: all mean that it cannot be captured
        raise EdgekdError(f"the component cannot be captured as ONNX by torch's older exporter: {first_line(e)}", where=component.name) from e
    return [i.name for i in onnx.load(file, load_external_data=False).graph.input]


@contextlib.contextmanager
def _no_stdout() -> Iterator[None]:
    """Nothing reaches stdout, of C++ neither: that exporter prints the whole graph of what it cannot export."""
    sys.stdout.flush()
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _dataset(calibration: Iterable[Mapping[str, Any]], names: list[str], folder: Path) -> str:
    """Write calibration inputs as the toolkit reads them: a line per sample, a .npy file per input."""
    import numpy as np

    lines = []
    for number, sample in zip(range(SAMPLES), calibration, strict=False):
        files = [folder / f"{number}_{place}.npy" for place in range(len(names))]
        for name, file in zip(names, files, strict=True):
            np.save(file, np.ascontiguousarray(sample[name]))
        lines.append(" ".join(str(f) for f in files))
    if not lines:
        raise UsageError("there are no calibration inputs", hint="give a folder of images with --data")
    (folder / "dataset.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder / "dataset.txt")


exporter = RknnExporter()
