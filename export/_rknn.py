"""What `export/rknn.py` knows of its files: what one says of itself, what it was built from, and the vendor's simulator as a session.

A .rknn file runs on the NPU only. The simulator builds a model again from what the file was built from, so that is kept outside of the artifact, in
`$EDGEKD_HOME/rknn/<digest of the file>`: it belongs to that file and no other, and the newest `KEPT` are kept.
"""
from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import tempfile
import time
import weakref
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.export import _envs

from edgekd.errors import EdgekdError
from edgekd.protocols import Port
from edgekd.workspace import sha256

if TYPE_CHECKING:
    import numpy as np

ENVIRONMENT = "rknn"
CHILD = Path(__file__).with_name("_rknn_child.py")
KEPT = 16
REPORT = "report.json"
MAGIC = b"RKNN"
SHORT = {"FLOAT16": "fp16", "FLOAT32": "fp32", "FLOAT": "fp32", "BFLOAT16": "bf16", "INT8": "i8", "UINT8": "u8", "INT16": "i16", "INT32": "i32", "INT64": "i64"}
ARITHMETIC = ("Conv", "MatMul", "exMatMul", "Gemm", "exSDPAttention", "ConvTranspose")
PASSIVE = {"InputOperator", "OutputOperator"}
TRUTHS = {"Cast", "Where", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "And", "Or"}
"""Layers whose INT8 is yes and no, not arithmetic."""
MINUTES_TO_START, MINUTES_TO_RUN = 20.0, 20.0


def describe(path: Path) -> dict[str, Any]:
    """What a .rknn file says of itself: `target_platform`, `version`, and `inputs` and `outputs`, name -> (shape, type).

    Raises:
        EdgekdError: it is no such file.
    """
    try:
        data = path.read_bytes()
        start = data.rfind(b'{"connection"')
        if not data.startswith(MAGIC) or start < 0:
            raise ValueError("the parts of such a file are not there")
        about = json.JSONDecoder().raw_decode(data[start:].decode("utf-8", errors="ignore"))[0]
        tensors = {t["tensor_id"]: t for t in about["norm_tensor"]}
        ends = {side: {tensors[e["right_tensor_id"]]["url"]: (tuple(tensors[e["right_tensor_id"]]["size"]), tensors[e["right_tensor_id"]]["dtype"]["vx_type"])
                       for e in about["graph"] if e["left"] == side} for side in ("input", "output")}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise EdgekdError(f"this is no RKNN file: {e}", where=path, hint="export the model again") from e
    return {"target_platform": about["target_platform"], "version": about["version"], "inputs": ends["input"], "outputs": ends["output"]}


def keep(path: Path, material: Path, report: Mapping[str, Any]) -> None:
    """Keep what a file was built from, and what its compiler listed, for as long as it is among the newest."""
    (material / REPORT).write_text(json.dumps(dict(report)), encoding="utf-8")
    folder = store() / sha256(path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temp = Path(tempfile.mkdtemp(prefix=".new.", dir=folder.parent))
    try:
        shutil.copytree(material, temp / "made")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temp / "made", folder)
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    kept = sorted((p for p in folder.parent.iterdir() if not p.name.startswith(".")), key=lambda p: p.stat().st_mtime)
    for old in kept[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def store() -> Path:
    """Where what files were built from is kept."""
    return _envs.home().parent / "rknn"


def material_of(path: Path) -> Path | None:
    """What a file was built from, if it is still there."""
    folder = store() / sha256(path)
    return folder if (folder / REPORT).is_file() else None


def layers(material: Path) -> list[dict[str, Any]]:
    """What the compiler listed: {"kind", "type", "target"} a layer, without inputs and outputs."""
    return [layer for layer in json.loads((material / REPORT).read_text(encoding="utf-8"))["layers"] if layer["kind"] not in PASSIVE]


def operators(listed: list[dict[str, Any]]) -> dict[str, int]:
    """`kind:precision` -> count, most frequent first."""
    def short(layer: Mapping[str, Any]) -> str:
        return "bool" if layer["type"] == "INT8" and layer["kind"] in TRUTHS else SHORT.get(layer["type"], layer["type"].lower())

    return dict(Counter(f"{layer['kind']}:{short(layer)}" for layer in listed).most_common())


def precision(listed: list[dict[str, Any]]) -> str:
    """Of the layers that carry the arithmetic: `fp16`, `int8`, or e.g. `int8+fp16`."""
    found = Counter(layer["type"] for layer in listed if layer["kind"].startswith(ARITHMETIC))
    names = ["int8" if kind in ("INT8", "UINT8") else SHORT.get(kind, kind.lower()) for kind, _ in found.most_common()]
    return "+".join(sorted(dict.fromkeys(names), key=lambda p: p != "int8")) or "fp16"


class SimulatorSession:
    """Rockchip's simulator in its own process, which ends with this object."""

    stand_in_for = "Rockchip's simulator of the NPU, of a model built again from what the file was built from"

    def __init__(self, path: Path, material: Path, python: Path, platform: str, threads: int | None = None) -> None:
        about = describe(path)
        self._path, self._layers = path, layers(material)
        self._inputs, self._outputs = about["inputs"], about["outputs"]
        self._folder = tempfile.TemporaryDirectory(prefix="edgekd-rknn-")
        env = os.environ | {"EDGEKD_RKNN_LOG": str(Path(self._folder.name) / "log.txt"), "OMP_NUM_THREADS": str(threads or 1)}
        # isolated (-I): the folder of the script must not be looked in for modules, it holds our own onnx.py
        self._child = subprocess.Popen([str(python), "-I", str(CHILD), str(material), platform], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       stderr=subprocess.DEVNULL, env=env, cwd=self._folder.name)
        self._end = weakref.finalize(self, _finish, self._child, self._folder)
        self._answer(MINUTES_TO_START)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One simulated run; seconds, and no measure of the device's time."""
        import numpy as np

        given, got = (Path(self._folder.name) / name for name in ("inputs.npz", "outputs.npz"))
        feeds = []
        for name, (shape, kind) in self._inputs.items():
            value = np.ascontiguousarray(inputs[name], dtype=_fed(kind))
            if value.shape != shape:
                raise EdgekdError(f"the file takes {name} of the shape {list(shape)}, and is given {list(value.shape)}", where=self._path)
            feeds.append(value)
        np.savez(given, *feeds)
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps({"inputs": str(given), "outputs": str(got)}).encode() + b"\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            pass  # it died: the answer says so
        self._answer(MINUTES_TO_RUN)
        with np.load(got) as found:
            return {name: found[f"arr_{i}"].astype(np.float32).reshape(shape) for i, (name, (shape, _)) in enumerate(self._outputs.items())}

    @property
    def inputs(self) -> list[Port]:
        """What the file says that it takes."""
        return [Port(name, shape, _fed(kind)) for name, (shape, kind) in self._inputs.items()]

    @property
    def executed_ops(self) -> dict[str, int]:
        """As the compiler listed them when it built the file."""
        return operators(self._layers)

    @property
    def executed_precision(self) -> str:
        """As the compiler listed it when it built the file."""
        return precision(self._layers)

    def _answer(self, minutes: float) -> None:
        """Wait for one line. Raises EdgekdError when it tells a failure, or does not come."""
        assert self._child.stdout is not None
        deadline = time.monotonic() + minutes * 60
        while not select.select([self._child.stdout], [], [], 1.0)[0]:
            if time.monotonic() > deadline:
                self._end()
                raise EdgekdError(f"Rockchip's simulator was stopped after {minutes:g} minutes", where=self._path, hint="a smaller input size")
        line = self._child.stdout.readline()
        said = json.loads(line) if line.strip() else {"error": f"it ended with exit code {self._child.wait()}"}
        if "error" in said:
            self._end()
            raise EdgekdError(f"Rockchip's simulator: {said['error']}", where=self._path)


def _fed(kind: str) -> str:
    """numpy's type of what the simulator is fed for a tensor of the file: it takes floats, and quantizes and rounds itself."""
    return "int64" if kind == "int64" else "float32"


def _finish(child: subprocess.Popen[bytes], folder: tempfile.TemporaryDirectory[str]) -> None:
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except BrokenPipeError:
                pass
    folder.cleanup()
