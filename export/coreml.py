"""Core ML packages (`.mlpackage`, ML program, iOS 17 and macOS 14 on): written and checked anywhere, run on a Mac.

    fp16             arithmetic in fp16, inputs and outputs in fp32; what overflows on real inputs stays in fp32 and is named. Only fp16
                     programs reach the Neural Engine, so this is what a user gets who names none
    fp32             arithmetic in fp32, on CPU and GPU
    w8_weight_only   fp16 with 8-bit weights, linear, symmetric, a scale for each channel
    w6_weight_only   fp16 with weights from a palette of 64 values a tensor (k-means)
    w4_weight_only   the same with 16 values
    w8a8_static      8-bit weights and activations around convolutions and linear layers; their kernels are integer ones on Apple's newest chips only

Up to 64 prompts of up to 16 points go into one call; a program whose axes vary may be kept off the Neural Engine, which `selfcheck.py` tells.
Where Core ML is not, what a file says is computed by an interpreter (`_mil.py`), which the parity gate runs on, and its contents are read back and
held against the model. Beside each package lie inputs with the outputs expected of them, and a script for a Mac that compares
(`_coreml_selfcheck.py`).
"""
from __future__ import annotations

import importlib.util
import os
import platform
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.export import _mil
from edgekd.export._mil import FIX, Interpreter, Program

from edgekd.errors import EdgekdError, UsageError, first_line, unknown
from edgekd.protocols import Availability, Check, Component, Facts, Port, package_version
from edgekd.tuning import PLAIN, Tuning

if TYPE_CHECKING:
    import numpy as np

SCHEMES = ("fp16", "fp32", "w8_weight_only", "w6_weight_only", "w4_weight_only", "w8a8_static")
MODEL = "Data/com.apple.CoreML/model.mlmodel"
ON_A_MAC = "copy the artifact to a Mac and run there: python3 selfcheck.py"


class CoreMLExporter(Facts):
    """See `edgekd.protocols.Exporter`."""

    format = "coreml"
    suffix = ".mlpackage"
    extra: str | None = "coreml"
    schemes: tuple[str, ...] = SCHEMES
    tunes: Mapping[str, frozenset[Any]] = {"keep": frozenset({"fp32", "fp16"}), "rest": frozenset({"fp16"}), "granularity": frozenset({"tensor"}),
                                           "symmetric": frozenset({True, False})}
    """What is not integer is fp16 in any case. A palette is one a tensor, in the format's own way. Activations are symmetric unless told otherwise."""

    def availability(self) -> Availability:
        """Whether coremltools is installed with its own library, and whether this is a Mac."""
        system = platform.system()
        if system not in ("Darwin", "Linux"):
            return Availability(False, reason=f"coremltools does not run on {system}", fix="export on Linux or macOS", runs=False)
        missing = [p for p in ("coremltools", "scikit-learn") if not package_version(p)]
        if missing:
            return Availability(False, reason=f"not installed: {', '.join(missing)}", fix=FIX, runs=False)
        if not _has_library():
            return Availability(False, reason="coremltools was built without its own library: there is no wheel of it for this Python", runs=False,
                                fix="use Python 3.10 to 3.13 on x86-64 Linux or macOS, and there: " + FIX)
        version = f"coremltools {package_version('coremltools')}"
        if system != "Darwin":
            return Availability(True, version=version, reason="Core ML is on Apple's systems only", fix=ON_A_MAC, runs=False)
        return Availability(True, version=version)

    def export(self, component: Component, path: Path, *, scheme: str, calibration: Any = None, qdq: str = "u8s8", tuning: Tuning = PLAIN) -> list[Path]:
        """Write the package `path` and what a Mac needs to check it (see `edgekd.protocols.Exporter.export`). Integers are Core ML's own way, whatever
        `qdq`. Without `calibration` overflows are looked for on the component's example. A layer kept in fp16 has its weights whole, one kept in fp32
        computes in fp32 too."""
        from edgekd.export import _coreml, _coreml_beside

        if scheme not in self.schemes:
            raise unknown("coreml scheme", scheme, self.schemes)
        if scheme.endswith("_static") and calibration is None:
            raise UsageError(f"{scheme} needs calibration images", where=component.name, hint="give a folder of images with --data")
        if scheme == "fp32" and "fp16" in tuning.keep.values():
            raise UsageError("layers of an fp32 program cannot be in fp16", where=component.name, hint='write fp16 + {"the other layers": fp32}')
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        samples = calibration if calibration is not None else [{name: t.detach().cpu().numpy() for name, t in component.example.items()}]
        with tempfile.TemporaryDirectory(prefix=f".{path.stem}.", dir=path.parent) as folder:
            made = Path(folder) / path.name
            _coreml.build(component, made, scheme, samples, tuning)
            beside = _coreml_beside.write(component, Program.read(made), Path(folder), scheme)
            return _place(made, beside, path, Path(folder))

    def open(self, path: Path, *, scheme: str, threads: int | None = None) -> CoreMLSession:
        """A session on the unit that Core ML chooses; `threads` is its own choice too."""
        if platform.system() != "Darwin":
            raise EdgekdError("Core ML is on Apple's systems only", where=path, hint=ON_A_MAC)
        return CoreMLSession(Path(path))

    def check(self, component: Component, path: Path, *, scheme: str) -> Check:
        """The file's inputs, outputs, operations and weights against the component.

        Raises:
            EdgekdError: one of them is not the component's.
        """
        from edgekd.export import _coreml_check

        return _coreml_check.check(component, Path(path), scheme)

    def stand_in(self, path: Path, *, scheme: str, threads: int | None = None) -> Interpreter | None:
        """The interpreter of the program in the file; None where that holds an operation which it does not know."""
        program = Program.read(path)
        return None if _mil.unknown(program) else Interpreter(program, threads)


class CoreMLSession:
    """A package on Core ML, on a Mac. Not run by edgekd's own tests, which run where there is none."""

    def __init__(self, path: Path) -> None:
        ct = _mil.coremltools()
        self._program = Program.read(path)
        try:
            self._model = ct.models.MLModel(str(path), compute_units=ct.ComputeUnit.ALL)
        except Exception as e:  # coremltools raises RuntimeError and Exception itself
            raise EdgekdError(f"Core ML cannot open the package: {first_line(e)}", where=path, hint="export the model again") from e

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs are the caller's own. More prompts than a call takes go through in several."""
        return _mil.in_pieces(self._predict, self._program, inputs)

    def _predict(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        import numpy as np

        try:
            found = self._model.predict({port.name: np.asarray(inputs[port.name], port.dtype) for port in self.inputs})
        except Exception as e:  # as above
            raise EdgekdError(f"Core ML cannot compute the package: {first_line(e)}", where=self._program.path) from e
        return {name: np.array(found[name]) for name in self._program.outputs}

    @property
    def inputs(self) -> list[Port]:
        """What the package takes."""
        return [_mil.port(self._program, name) for name in self._program.inputs]

    @property
    def executed_precision(self) -> str:
        """Core ML computes an ML program in the types that it declares, which are read back from the package."""
        return self._program.arithmetic_precision()

    @property
    def executed_ops(self) -> dict[str, int]:
        """`operation:precision` -> count. `selfcheck.py` in the artifact says which unit carries them out."""
        return self._program.ops_by_precision()

    @property
    def kept_fp32(self) -> dict[str, str]:
        """Layers of an fp16 program that stay in fp32 -> why, as written into it."""
        return _mil.kept(self._program)


def _has_library() -> bool:
    """Whether coremltools came with what reads and writes weight files; nothing is imported."""
    found = importlib.util.find_spec("coremltools")
    folders = [Path(p) for p in (found.submodule_search_locations or [])] if found else []
    return any(library for folder in folders for library in folder.glob("libmilstoragepython*"))


def _place(made: Path, beside: list[Path], path: Path, folder: Path) -> list[Path]:
    """Everything appears under its name only when whole; the package, which is a folder, last."""
    written = []
    for file in beside:
        os.replace(file, path.parent / file.name)
        written.append(path.parent / file.name)
    if path.exists():
        os.replace(path, folder / "old")
    (made / MODEL).chmod(0o644)  # coremltools writes it for its owner alone
    os.replace(made, path)
    inside = sorted((p for p in path.rglob("*") if p.is_file()), key=lambda p: (p.name != "model.mlmodel", p.as_posix()))
    return inside + written


exporter = CoreMLExporter()
