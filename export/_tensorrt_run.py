"""An engine on a GPU: built once a content, GPU and version, then run from numpy arrays. Reviewed; the project's machine has no GPU to run it on."""
from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.export import _tensorrt_build as builder
from edgekd.export._child import call
from edgekd.export._trtexec import layers_of, operators, precision

from edgekd.errors import EdgekdError, first_line
from edgekd.protocols import Port
from edgekd.workspace import fingerprint, sha256

if TYPE_CHECKING:
    import numpy as np

MINUTES = 60
"""for one engine: a small Jetson times thousands of kernels"""


def engine(path: Path, spec: Mapping[str, Any]) -> Path:
    """The engine of an ONNX file, built in a process of its own if there is none of this content, GPU and version of TensorRT.

    Raises:
        EdgekdError: TensorRT is broken here or refuses the file, with the node.
    """
    weights = path.with_name(f"{path.name}.data")
    content = {"graph": sha256(path), "weights": sha256(weights) if weights.is_file() else None, "spec": dict(spec), "gpu": Device().name,
               "tensorrt": _tensorrt().__version__}
    folder = cache() / fingerprint(content)
    if not (folder / "engine").is_file() or not (folder / "layers.json").is_file():  # the engine is written last
        call("edgekd.export._tensorrt_run:build", {"folder": str(folder), "path": str(path), "spec": dict(spec)}, minutes=MINUTES, what="TensorRT")
    return folder / "engine"


def build(folder: str, path: str, spec: dict[str, Any]) -> dict[str, Any]:
    """The child's side of `engine`."""
    at = Path(folder)
    at.mkdir(parents=True, exist_ok=True)
    return builder.build(spec | {"onnx": Path(path).name}, Path(path).parent, engine=at / "engine", layers=at / "layers.json",
                         timing_cache=at.parent / "timing.cache")


def cache() -> Path:
    """The folder of built engines."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgekd" / "tensorrt"


class EngineSession:
    """See `edgekd.protocols.Session`. More prompts than the profile has go through in several calls."""

    def __init__(self, file: Path, spec: Mapping[str, Any], kept_fp32: Mapping[str, str]) -> None:
        trt = _tensorrt()
        self.kept_fp32 = dict(kept_fp32)
        self._log, self._spec, self._device = builder.logger(trt), spec, Device()
        self._engine = trt.Runtime(self._log).deserialize_cuda_engine(file.read_bytes())
        if self._engine is None:
            raise EdgekdError(f"the engine does not load: {builder.reason(self._log)}", where=file, hint="remove it: it is built again")
        self._context = self._engine.create_execution_context()
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        self._inputs = [n for n in names if self._engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self._outputs = [n for n in names if n not in self._inputs]
        self._types = {n: trt.nptype(self._engine.get_tensor_dtype(n)) for n in names}
        self._layers = layers_of(json.loads(file.with_name("layers.json").read_text(encoding="utf-8")), where=file)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Raises EdgekdError when an axis is longer than the engine was built for."""
        import numpy as np

        parts = pieces({n: inputs[n] for n in self._inputs}, self._spec)
        found = [self._once(part) for part in parts]
        return found[0] if len(found) == 1 else {n: np.concatenate([one[n] for one in found]) for n in self._outputs}

    @property
    def inputs(self) -> list[Port]:
        """What the engine takes."""
        import numpy as np

        axes = self._spec["axes"]
        return [Port(n, tuple(None if d < 0 else int(d) for d in self._engine.get_tensor_shape(n)), np.dtype(self._types[n]).name,
                     tuple(axes.get(n, {}).get(str(i)) for i in range(len(self._engine.get_tensor_shape(n))))) for n in self._inputs]

    @property
    def executed_precision(self) -> str:
        """Of the engine's layers, as its inspector tells them."""
        return precision(self._layers)

    @property
    def executed_ops(self) -> dict[str, int]:
        """`layer type:precision` -> count in the engine."""
        return operators(self._layers)

    def _once(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        import numpy as np

        arrays = {n: np.ascontiguousarray(v, dtype=self._types[n]) for n, v in inputs.items()}
        for name, value in arrays.items():
            if not self._context.set_input_shape(name, value.shape):
                raise EdgekdError(f"the engine does not take a shape of {value.shape}: {builder.reason(self._log)}", where=name)
        outputs = {n: np.empty(tuple(self._context.get_tensor_shape(n)), self._types[n]) for n in self._outputs}
        with self._device.memory({**arrays, **outputs}) as memory:
            for name, address in memory.items():
                self._context.set_tensor_address(name, address)
            for name, value in arrays.items():
                self._device.upload(memory[name], value)
            if not self._context.execute_async_v3(self._device.stream):
                raise EdgekdError(f"the engine does not run: {builder.reason(self._log)}")
            for name, value in outputs.items():
                self._device.download(value, memory[name])
        return outputs


def pieces(inputs: Mapping[str, np.ndarray], spec: Mapping[str, Any]) -> list[dict[str, np.ndarray]]:
    """Inputs cut along the axis of rows where there are more than the engine takes.

    Raises:
        EdgekdError: another axis is longer than that.
    """
    rows = {n for n, axes in spec["axes"].items() if "0" in axes and n in inputs}
    for name, value in inputs.items():
        for axis, symbol in spec["axes"].get(name, {}).items():
            most = spec["shapes"][name]["max"][int(axis)]
            if int(axis) and value.shape[int(axis)] > most:
                raise EdgekdError(f"the engine takes {most} {symbol} at most, and is given {value.shape[int(axis)]}", where=name)
    if not rows:
        return [dict(inputs)]
    most, count = min(spec["shapes"][n]["max"][0] for n in rows), len(inputs[next(iter(rows))])
    return [{n: v[first:first + most] if n in rows else v for n, v in inputs.items()} for first in range(0, count, most)]


class Device:
    """The first GPU, through cuda-python: memory, copies and a stream."""

    def __init__(self) -> None:
        self._cuda = _cuda()
        self.stream = int(self._do(self._cuda.cudaStreamCreate()))

    @property
    def name(self) -> str:
        """Product and compute capability: what an engine is tied to."""
        told = self._do(self._cuda.cudaGetDeviceProperties(0))
        product = told.name.decode() if isinstance(told.name, bytes) else str(told.name)
        return f"{product.strip(chr(0))} SM {told.major}.{told.minor}"

    def memory(self, arrays: Mapping[str, np.ndarray]) -> _Memory:
        """Room on the GPU for every array, as a context: name -> address."""
        return _Memory(self, {name: max(1, value.nbytes) for name, value in arrays.items()})

    def upload(self, address: int, array: np.ndarray) -> None:
        """Copy an array to the GPU, in the stream's order."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._do(self._cuda.cudaMemcpyAsync(address, array.ctypes.data, array.nbytes, kind, self.stream))

    def download(self, array: np.ndarray, address: int) -> None:
        """Copy into an array, after everything that was asked of the stream."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._do(self._cuda.cudaMemcpyAsync(array.ctypes.data, address, array.nbytes, kind, self.stream))
        self._do(self._cuda.cudaStreamSynchronize(self.stream))

    def allocate(self, size: int) -> int:
        """Address of memory on the GPU."""
        return int(self._do(self._cuda.cudaMalloc(size)))

    def free(self, address: int) -> None:
        """Give memory back."""
        self._do(self._cuda.cudaFree(address))

    def _do(self, answer: Any) -> Any:
        """cuda-python answers (error,) or (error, value)."""
        error, *value = answer if isinstance(answer, tuple) else (answer,)
        if int(error) != 0:
            raise EdgekdError(f"CUDA: {getattr(error, 'name', error)}", hint="see `nvidia-smi` (on a Jetson `tegrastats`): is the GPU free?")
        return value[0] if value else None


class _Memory:
    def __init__(self, device: Device, sizes: Mapping[str, int]) -> None:
        self._device, self._sizes, self._held = device, sizes, dict[str, int]()

    def __enter__(self) -> dict[str, int]:
        try:
            for name, size in self._sizes.items():
                self._held[name] = self._device.allocate(size)
        except EdgekdError:
            self.__exit__()
            raise
        return self._held

    def __exit__(self, *_: object) -> None:
        for name in list(self._held):
            self._device.free(self._held.pop(name))


def _tensorrt() -> Any:
    try:
        return builder.load()
    except builder.Refused as e:
        raise EdgekdError(e.what, hint="install NVIDIA's TensorRT for this GPU; on a Jetson it comes with JetPack") from e


def _cuda() -> Any:
    reason: BaseException | None = None
    for module in ("cuda.bindings.runtime", "cuda.cudart"):  # cuda-python 12.6 and newer, and before
        try:
            return import_module(module)
        except (ImportError, OSError) as e:
            reason = reason or e
    raise EdgekdError(f"cuda-python cannot be imported: {first_line(reason or ImportError())}", hint="pip install cuda-python")
