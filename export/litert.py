"""LiteRT (`.tflite`): Android, Raspberry Pi and what else ran TensorFlow Lite. Written by litert-torch from the torch program, run here by its interpreter.

    fp32             weights as they are
    fp16             weights in 16 bits, arithmetic in fp32 on CPUs; a GPU delegate computes in fp16, which nothing here can show
    w8a8_static      8-bit convolutions and linear layers where they carry the arithmetic, the rest in fp32 (`_litert.py` says what and why)
    w8a16_static     the same with 16-bit activations: near fp32, for NPUs that have them. On CPUs it is 10 to 30 times slower than fp32
    w8_dynamic       8-bit weights, activations quantized at run time
    w8_weight_only   8-bit weights, arithmetic in fp32
    w8a8_qat         8-bit layers with the ranges that were trained for them, all else in fp32
    w4a8_qat         the same: 15 levels a weight, stored in 8 bits

Inputs and outputs are float32 in every scheme, under the component's names in the signature `serving_default`. A file that is integer throughout, for
NPUs, is what `ethos_u.py` compiles. Writing needs torch and the converter; running needs `ai-edge-litert` alone, as on the device.
"""
from __future__ import annotations

import hashlib
import os
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.export import _layers_litert
from edgekd.export._child import call
from edgekd.export._inputs import looked_at
from edgekd.export._litert_graph import ARITHMETIC, precision, tag
from edgekd.export.onnx import content_key

from edgekd.errors import EdgekdError, UsageError, first_line, unknown
from edgekd.protocols import Availability, Component, Facts, Port, package_version
from edgekd.tuning import PLAIN, Tuning, layer_name

if TYPE_CHECKING:
    import numpy as np

FIX = 'pip install "edgekd[litert]"'
RUNTIME = "ai-edge-litert"
WRITERS = ("litert-torch", "ai-edge-quantizer")
SIGNATURE = "serving_default"
MINUTES = 30.0
KEPT_FILES = 4
OUTSIDE = " (outside XNNPACK)"

_files: OrderedDict[str, tempfile.TemporaryDirectory[str]] = OrderedDict()


def float_file(component: Component) -> Path:
    """The component as an fp32 `.tflite` file, not to be changed. The same content is converted only once per process.

    Raises:
        EdgekdError: torch cannot capture it or litert-torch cannot convert it, with the reason.
    """
    from edgekd.export._program import program

    key = content_key(component)
    if key not in _files:
        import torch

        folder = tempfile.TemporaryDirectory(prefix="edgekd-")
        try:
            saved, file = Path(folder.name) / "program.pt2", Path(folder.name) / "float.tflite"
            torch.export.save(program(component), saved)
            _ask(component, "convert", {"program": str(saved), "output": str(file), "inputs": list(component.example), "outputs": list(component.outputs)},
                 "litert-torch")
            saved.unlink()
        except BaseException:
            folder.cleanup()
            raise
        _files[key] = folder
        while len(_files) > KEPT_FILES:
            _files.popitem(last=False)[1].cleanup()
    _files.move_to_end(key)
    return Path(_files[key].name) / "float.tflite"


def write(component: Component, target: Path, scheme: str, calibration: Iterable[Mapping[str, np.ndarray]] | None, *, whole: bool = False,
          tuning: Tuning = PLAIN) -> None:
    """Write the component to `target` in a scheme; `whole`: integers wherever an operator has them.

    Calibration inputs that have a `fingerprint()` are looked at once for each component: what they show is kept beside its fp32 file.
    """
    source = float_file(component)
    if scheme == "fp32":
        target.write_bytes(source.read_bytes())
        return
    with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
        request: dict[str, Any] = {"source": str(source), "output": str(target), "scheme": scheme, "whole": whole, "tuning": _told(component, tuning)}
        if scheme.endswith("_static"):
            known = fingerprint() if callable(fingerprint := getattr(calibration, "fingerprint", None)) else None
            ranges = (source.parent / f"ranges-{hashlib.sha256(known.encode()).hexdigest()}.json") if known else Path(folder) / "ranges.json"
            request |= {"ranges": str(ranges), "samples": folder}
            if tuning.naive or not ranges.is_file():
                _spread(component, calibration, Path(folder))
        _ask(component, "quantize", request, "ai-edge-quantizer")


def _told(component: Component, tuning: Tuning) -> dict[str, Any]:
    """What the child is told of a tuning, as JSON."""
    grids = {name: (grid.input, grid.output) for name, grid in tuning.grids.items() if grid.input and grid.output}
    return {"keep": list(tuning.keep), "granularity": tuning.granularity, "symmetric": tuning.symmetric, "naive": tuning.naive, "grids": grids,
            "peaks": _peaks(component, grids) if grids else {}}


def _peaks(component: Component, layers: Collection[str]) -> dict[str, list[float]]:
    """Layer -> largest absolute weight of every output channel."""
    import torch

    found: dict[str, list[float]] = {}
    for path, module in component.module.named_modules():
        if layer_name(path) in layers:
            axis = 1 if isinstance(module, torch.nn.ConvTranspose2d) else 0
            weight: Any = module.weight
            found[layer_name(path)] = weight.detach().abs().transpose(0, axis).flatten(1).amax(1).tolist()
    return found


def _spread(component: Component, calibration: Iterable[Mapping[str, np.ndarray]] | None, folder: Path) -> None:
    """Calibration inputs as files, one each."""
    import numpy as np

    for i, sample in enumerate(looked_at(component, calibration)):
        arrays: dict[str, Any] = {name: np.ascontiguousarray(sample[name], dtype=np.float32) for name in component.example}
        np.savez(folder / f"{i:06}.npz", **arrays)


def _ask(component: Component, function: str, request: dict[str, Any], what: str) -> None:
    try:
        call(f"edgekd.export._litert:{function}", request, minutes=MINUTES, what=what)
    except EdgekdError as e:
        raise EdgekdError(e.what, where=component.name, hint=e.hint or "use another scheme or format") from e


class LitertExporter(Facts):
    """See `edgekd.protocols.Exporter`."""

    format = "litert"
    suffix = ".tflite"
    extra: str | None = "litert"
    schemes: tuple[str, ...] = ("fp32", "fp16", "w8a8_static", "w8a16_static", "w8_dynamic", "w8_weight_only", "w8a8_qat", "w4a8_qat")
    fixed_shapes = True
    # the quantizer finds ranges by the extremes or by a moving average of them (`naive`), and no other way
    tunes: Mapping[str, frozenset[Any]] = {"keep": frozenset({"fp32"}), "granularity": frozenset({"tensor"}), "symmetric": frozenset({True, False}),
                                           "naive": frozenset({True})}

    def availability(self) -> Availability:
        """Whether litert-torch and ai-edge-quantizer are installed; `runs`: whether ai-edge-litert is, which needs neither, nor torch."""
        version = package_version(RUNTIME)
        told = f"{RUNTIME} {version}" if version else None
        missing = [p for p in (*WRITERS, RUNTIME) if not package_version(p)]
        if missing:
            return Availability(False, told, f"not installed: {', '.join(missing)}", FIX, runs=version is not None)
        return Availability(True, told)

    def export(self, component: Component, path: Path, *, scheme: str, calibration: Any = None, qdq: str = "u8s8", tuning: Tuning = PLAIN) -> list[Path]:
        """Write `path` (see `edgekd.protocols.Exporter.export`). The quantizer has one QDQ style: signed, activations asymmetric unless asked for."""
        if scheme not in self.schemes:
            raise unknown("litert scheme", scheme, self.schemes)
        if scheme.endswith("_static") and calibration is None:
            raise UsageError(f"{scheme} needs calibration images", where=component.name, hint="give a folder of images with --data")
        if tuning.symmetric is not None and scheme != "w8a8_static":
            raise UsageError(f"{scheme} leaves no choice between symmetric and asymmetric activations", where=component.name, hint="w8a8_static does")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.stem}.", dir=path.parent) as folder:
            write(component, Path(folder) / path.name, scheme, calibration, tuning=tuning)
            os.replace(Path(folder) / path.name, path)
        return [path]

    def open(self, path: Path, *, scheme: str, threads: int | None = None) -> LitertSession:
        """A session on the CPU with `threads` threads (None: LiteRT's own choice, which is 1)."""
        return LitertSession(Path(path), threads)

    def layers(self, path: Path, *, scheme: str, inputs: Mapping[str, np.ndarray], threads: int | None = None, repeats: int = 30) -> list[dict[str, Any]]:
        """See `edgekd.protocols.Facts.layers`."""
        return _layers_litert.layers(Path(path), inputs, threads, repeats, LitertSession(Path(path), threads).operators())

    def modules(self, path: Path) -> Mapping[str, str]:
        """Operators, by their number and what they write, -> modules."""
        return _layers_litert.modules(LitertSession(Path(path)).operators())


class LitertSession:
    """A `.tflite` file in LiteRT's interpreter, with XNNPACK for what that takes."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError as e:
            raise EdgekdError(f"{RUNTIME} is not installed", hint=f"pip install {RUNTIME}") from e
        try:
            self._interpreter = Interpreter(model_path=str(path), num_threads=threads)
            self._interpreter.allocate_tensors()
            runner = self._interpreter.get_signature_runner(SIGNATURE)
            self._inputs, self._outputs = runner.get_input_details(), runner.get_output_details()
        except (ValueError, RuntimeError, OSError) as e:
            raise EdgekdError(f"LiteRT cannot open the file: {first_line(e)}", where=path, hint="export the model again") from e
        self._path = path

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs are copies. What the file does not take of `inputs` is left out.

        Raises:
            EdgekdError: a wrong shape, or an operator failed.
        """
        import numpy as np

        try:
            for name, about in self._inputs.items():
                self._interpreter.set_tensor(about["index"], np.ascontiguousarray(inputs[name], dtype=about["dtype"]))
            self._interpreter.invoke()
        except (ValueError, RuntimeError) as e:
            raise EdgekdError(f"LiteRT cannot run the file: {first_line(e)}", where=self._path) from e
        return {name: self._interpreter.get_tensor(about["index"]) for name, about in self._outputs.items()}

    @property
    def inputs(self) -> list[Port]:
        """What the file takes."""
        ordered = sorted(self._inputs.items(), key=lambda i: int(i[1]["index"]))
        return [Port(name, tuple(int(n) for n in about["shape"]), about["dtype"].__name__) for name, about in ordered]

    @property
    def executed_ops(self) -> dict[str, int]:
        """`operator:type` -> count, most frequent first. The type of arithmetic is that of its weights and activations; what XNNPACK did not
        take, and LiteRT's own kernels compute, is marked."""
        return dict(Counter(f"{kind}{'' if inside else OUTSIDE}:{tag}" for kind, tag, inside in self._operators()).most_common())

    @property
    def executed_precision(self) -> str:
        """Of the operators that carry the arithmetic: `fp32`, `int8`, or e.g. `int8+fp32` when both are left."""
        return precision([tag for kind, tag, _ in self._operators() if kind in ARITHMETIC])

    def operators(self) -> list[dict[str, Any]]:
        """See `edgekd.export._layers_litert.operators`."""
        return _layers_litert.operators(self._interpreter, self._inside())

    def _inside(self) -> set[int]:
        """Numbers of the operators that XNNPACK computes."""
        nodes = self._interpreter._get_ops_details()
        return _delegated([n for n in nodes if n["op_name"] != "DELEGATE"], [n for n in nodes if n["op_name"] == "DELEGATE"])

    def _operators(self) -> list[tuple[str, str, bool]]:
        """(operator, type, whether XNNPACK computes it) of the file's graph."""
        types = {int(t["index"]): t["dtype"].__name__.rstrip("_") for t in self._interpreter.get_tensor_details()}
        plain = [n for n in self._interpreter._get_ops_details() if n["op_name"] != "DELEGATE"]
        inside = self._inside()

        def of(tensors: Any) -> list[str]:
            return [types[int(t)] for t in tensors if int(t) in types]

        return [(str(n["op_name"]), tag(n["op_name"], of(n["inputs"]), of(n["outputs"])), int(n["index"]) in inside) for n in plain]


def _delegated(plain: list[dict[str, Any]], delegates: list[dict[str, Any]]) -> set[int]:
    """Operators that a delegate's node stands for: all on the way from its inputs to its outputs."""
    source = {int(t): node for node in plain for t in node["outputs"]}
    found: set[int] = set()
    for delegate in delegates:
        ends, waiting = {int(t) for t in delegate["inputs"]}, [int(t) for t in delegate["outputs"]]
        while waiting:
            tensor = waiting.pop()
            if tensor not in ends and tensor in source and int(source[tensor]["index"]) not in found:
                found.add(int(source[tensor]["index"]))
                waiting.extend(int(t) for t in source[tensor]["inputs"])
    return found


exporter = LitertExporter()
