"""ncnn (`.ncnn.param` + `.ncnn.bin`): small CPUs, Arm before all. TorchScript -> pnnx -> ncnn; never from a simplified ONNX graph, of which
pnnx makes zeros without a word.

    fp32   weights as they are; every 16-bit option is off, of which ncnn turns some on by itself
    fp16   weights in 16 bits, half the size; computed in fp16 where the CPU can (Arm v8.2), in fp32 elsewhere. Layers that real inputs show
           to overflow are marked in the file and stay in fp32
    bf16   the file of fp32, values kept in bf16 and sums in fp32, for the layers that ncnn has such code for; the rest runs in fp32

ncnn knows no batch axis and tensors of four axes at most, so that windowed attention and prompt decoders do not fit: what it has no layers for
is refused, with the names. Whether it has is tried, in a child process, not guessed from the model's name.
"""
from __future__ import annotations

import os
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.export import _child
from edgekd.export._half import LARGEST, MARGIN
from edgekd.export._program import contiguous

from edgekd.errors import CannotTake, EdgekdError, UsageError, first_line, unknown
from edgekd.protocols import Availability, Component, Facts, Port, package_version

if TYPE_CHECKING:
    import numpy as np

OPTIONS = {
    "fp32": (),
    "fp16": ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic"),
    "bf16": ("use_bf16_packed", "use_bf16_storage"),
}
"""scheme -> the 16-bit options that are on"""
ARITHMETIC = {"Convolution", "ConvolutionDepthWise", "Deconvolution", "DeconvolutionDepthWise", "Convolution1D", "ConvolutionDepthWise1D",
              "InnerProduct", "Gemm", "MatMul", "SDPA", "MultiHeadAttention"}
PASSIVE = {"Input", "Split", "MemoryData"}
ONLY_FP32 = "31=3"
"""ncnn's mark of a layer that neither stores nor computes in fp16"""
LARGEST_RANK = 4
MINUTES = 10.0
FIX = 'pip install "edgekd[ncnn]"'
HINT = "students that fit: repvit_*, edge_sam, nanosam, efficientvit_sam_*; for others use another format"


class NcnnExporter(Facts):
    """See `edgekd.protocols.Exporter`."""

    format = "ncnn"
    suffix = ".ncnn.param"
    extra: str | None = "ncnn"
    schemes: tuple[str, ...] = tuple(OPTIONS)
    fixed_shapes = True
    beside: str | None = "onnx"

    def availability(self) -> Availability:
        """Whether ncnn, which runs files, and pnnx, which makes them, are installed."""
        missing = [p for p in ("ncnn", "pnnx") if not package_version(p)]
        if missing:
            return Availability(False, reason=f"not installed: {', '.join(missing)}", fix=FIX, runs="ncnn" not in missing)
        return Availability(True, version=f"ncnn {package_version('ncnn')}, pnnx {package_version('pnnx')}")

    def export(self, component: Component, path: Path, *, scheme: str, calibration: Any = None, qdq: str = "u8s8") -> list[Path]:
        """Write `path` and the `.bin` beside it (see `edgekd.protocols.Exporter.export`).

        `fp16` takes `calibration` too: the inputs that are searched for what overflows.
        """
        if scheme not in self.schemes:
            raise unknown("ncnn scheme", scheme, self.schemes)
        if scheme == "fp16" and calibration is None:
            raise UsageError(f"{scheme} needs calibration images", where=component.name, hint="give a folder of images with --data")
        if missing := self.availability().reason:
            raise EdgekdError(f"ncnn cannot be written here: {missing}", hint=FIX)
        if scheme == "fp16":
            _weights_fit(component)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{component.name}.", dir=path.parent) as folder:
            script = Path(folder) / "made.pt"
            outputs = _trace(component, script)
            request = {"script": str(script), "shapes": [list(t.shape) for t in component.example.values()], "half": scheme == "fp16"}
            found = _child.call("edgekd.export._ncnn:convert", request, minutes=MINUTES, what="pnnx")
            _refuse(component, found)
            made = script.with_name("made.ncnn.param")
            _name(made, component)
            _try(component, made, outputs, found["limits"])
            if scheme == "fp16":
                _mark(made, overflowing(made, calibration))
            for temp, final in ((weights(made), weights(path)), (made, path)):  # the .param, which makes it a model, last
                os.replace(temp, final)
        return [path, weights(path)]

    def open(self, path: Path, *, scheme: str, threads: int | None = None) -> NcnnSession:
        """A session on the CPU with `threads` threads (None: ncnn's own choice)."""
        return NcnnSession(Path(path), scheme, threads)


class NcnnSession:
    """An ncnn network on the CPU with its 16-bit options fixed."""

    def __init__(self, path: Path, scheme: str, threads: int | None = None, *, keep_all: bool = False) -> None:
        """keep_all: every blob can be asked for, not the outputs alone."""
        if scheme not in OPTIONS:
            raise unknown("ncnn scheme", scheme, OPTIONS)
        self._ncnn, self._path = _ncnn(), path
        self._net = self._ncnn.Net()
        for option in (o for options in OPTIONS.values() for o in options):
            setattr(self._net.opt, option, option in OPTIONS[scheme])
        self._net.opt.use_vulkan_compute, self._net.opt.lightmode = False, not keep_all
        if threads:
            self._net.opt.num_threads = threads
        for step, load, file in (("load_param", self._net.load_param, path), ("load_model", self._net.load_model, weights(path))):
            code = load(str(file)) if file.is_file() else "no file"
            if code:
                raise EdgekdError(f"ncnn cannot open the file: {step} gives {code}", where=file, hint="export the model again")
        shapes = _input_shapes(path)
        self._ports = [Port(name, shapes[name], "float32") for name in self._net.input_names()]
        self._outputs = list(self._net.output_names())

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Inputs (1, ...) to outputs (1, ...); ncnn itself sees no batch axis."""
        return self.blobs(inputs, self._outputs)

    def blobs(self, inputs: Mapping[str, np.ndarray], names: Iterable[str]) -> dict[str, np.ndarray]:
        """The values of any blobs, by name."""
        import numpy as np

        extractor = self._net.create_extractor()
        for port in self._ports:
            value = np.ascontiguousarray(inputs[port.name], dtype=np.float32)
            if value.shape != port.shape:
                raise EdgekdError(f"the file takes {port.name} of the shape {list(port.shape)}, and is given {list(value.shape)}", where=self._path)
            extractor.input(port.name, self._ncnn.Mat(value.reshape(value.shape[1:] or (1,))).clone())  # a Mat of an array only borrows it
        found = {}
        for name in names:
            code, mat = extractor.extract(name)
            if code:
                raise EdgekdError(f"ncnn does not compute {name}: extract gives {code}", where=self._path, hint="not enough memory, or a damaged file")
            found[name] = np.array(mat)[None]
        return found

    @property
    def inputs(self) -> list[Port]:
        """What the network takes, by its own Input layers."""
        return list(self._ports)

    @property
    def executed_ops(self) -> dict[str, int]:
        """`layer:precision` -> count in the network that ncnn loaded, most frequent first."""
        return dict(Counter(f"{kind}:{precision}" for kind, precision in self._layers()).most_common())

    @property
    def executed_precision(self) -> str:
        """Of the layers that carry the arithmetic: `fp32`, `fp16`, or e.g. `bf16+fp32` when some have no other code."""
        found = Counter(precision for kind, precision in self._layers() if kind in ARITHMETIC)
        return "+".join(sorted(found, key=lambda p: -found[p])) or "fp32"

    @property
    def kept_fp32(self) -> dict[str, str]:
        """Layers of an fp16 file that are marked to stay in fp32 -> why."""
        return {line.split()[1]: "its values pass half of fp16's range" for line in _lines(self._path) if line.split()[-1] == ONLY_FP32}

    def _layers(self) -> Iterator[tuple[str, str]]:
        """(kind, precision) of every layer that computes. ncnn decides by layer: its option, the CPU, and whether the layer has such code."""
        option, marked = self._net.opt, self.kept_fp32
        half = option.use_fp16_storage and option.use_fp16_arithmetic and self._ncnn.cpu_support_arm_asimdhp()
        for layer in self._net.layers():
            if layer.type in PASSIVE:
                continue
            if half and layer.support_fp16_storage and layer.name not in marked:
                yield layer.type, "fp16"
            else:
                yield layer.type, "bf16" if option.use_bf16_storage and layer.support_bf16_storage else "fp32"


def weights(param: Path) -> Path:
    """The file of weights that belongs to a `.param`."""
    return param.with_name(param.name.removesuffix(".param") + ".bin")


def overflowing(param: Path, samples: Iterable[Mapping[str, np.ndarray]]) -> set[str]:
    """Layers that read or write a value beyond half of fp16's range for `samples` (input name -> array), found in ncnn's own fp32 run.

    Sums inside normalisation need no watching: ncnn's are fp32.
    """
    import numpy as np

    session = NcnnSession(param, "fp32", keep_all=True)
    parts = [line.split() for line in _lines(param)]
    names = sorted({blob for part in parts for blob in part[4 + int(part[2]):][:int(part[3])] if part[0] != "Input"})
    high: set[str] = set()
    for sample in samples:
        high |= {name for name, value in session.blobs(sample, names).items() if not np.abs(value).max(initial=0.0) <= LARGEST * MARGIN}
    return {part[1] for part in parts if part[0] not in PASSIVE and high.intersection(part[4:4 + int(part[2]) + int(part[3])])}


def _weights_fit(component: Component) -> None:
    """Raises EdgekdError for weights that fp16 has no numbers for: pnnx would write infinity without a word."""
    for name, weight in component.module.named_parameters():
        if not (largest := float(weight.detach().abs().max())) <= LARGEST:
            raise EdgekdError(f"{name} holds weights up to {largest:.3g}, beyond fp16's {LARGEST:g}", where=component.name, hint="use fp32 or bf16")


def _trace(component: Component, script: Path) -> dict[str, list[int]]:
    """Write the component as TorchScript; output name -> shape. Raises CannotTake for inputs that ncnn has no form for."""
    import torch

    if component.module.training:
        raise EdgekdError("the module is in training mode and would be exported with its training behaviour", where=component.name,
                          hint="call .eval() first")
    for name, tensor in component.example.items():
        if tensor.dtype != torch.float32 or tensor.dim() == 0 or tensor.shape[0] != 1 or tensor.dim() > LARGEST_RANK + 1:
            raise CannotTake(f"ncnn takes float32 inputs of a batch of one and up to {LARGEST_RANK} further axes, and {name} is "
                             f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}", where=component.name, hint=HINT)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # shapes are fixed, so that what the tracer takes for constants is constant
            module, example = contiguous(component.module), tuple(t.contiguous() for t in component.example.values())
            torch.jit.trace(module, example, check_trace=False).save(str(script))
            out = module(*example)
    except Exception as e:  # torch raises dozens of kinds: all mean that it cannot be captured
        raise EdgekdError(f"the component cannot be captured by torch.jit.trace: {first_line(e)}", where=component.name) from e
    return {name: list(t.shape) for name, t in zip(component.outputs, out if isinstance(out, tuple) else (out,), strict=True)}


def _name(param: Path, component: Component) -> None:
    """Give blobs the component's names in place of pnnx's in0, out0, and Input layers their size, which pnnx leaves out."""
    names = {f"in{i}": n for i, n in enumerate(component.example)} | {f"out{i}": n for i, n in enumerate(component.outputs)}
    made = []
    for line in param.read_text(encoding="utf-8").splitlines():
        part = line.split()
        if len(part) > 4:
            kind, name, bottoms, tops = part[0], part[1], int(part[2]), int(part[3])
            blobs, rest = part[4:4 + bottoms + tops], part[4 + bottoms + tops:]
            if kind == "Input" and blobs[0] in names:
                rest = _size(component.example[names[blobs[0]]].shape[1:])
            line = " ".join([f"{kind:<24} {name:<24} {bottoms} {tops}", *(names.get(b, f"b{b}") for b in blobs), *rest])
        made.append(line)
    param.write_text("\n".join(made) + "\n", encoding="utf-8")


SIZES = {1: ("0",), 2: ("1", "0"), 3: ("2", "1", "0"), 4: ("2", "11", "1", "0")}
"""number of axes -> the keys of their lengths in an Input layer: 0 is width, 1 height, 2 channels, 11 depth"""


def _size(shape: Iterable[int]) -> list[str]:
    lengths = list(shape) or [1]
    return sorted((f"{key}={n}" for key, n in zip(SIZES[len(lengths)], lengths, strict=True)), key=lambda pair: int(pair.split("=")[0]))


def _input_shapes(param: Path) -> dict[str, tuple[int, ...]]:
    """Blob -> (1, ...) of the Input layers in a .param file."""
    found = {}
    for line in _lines(param):
        part = line.split()
        if part[0] == "Input":
            sizes = dict(re.findall(r"(\d+)=(\d+)", " ".join(part[5:])))
            found[part[4]] = (1, *(int(sizes[key]) for key in SIZES[len(sizes)]))
    return found


def _lines(param: Path) -> list[str]:
    """The lines of layers: kind, name, number of bottoms and tops, their blobs, parameters."""
    return [line for line in param.read_text(encoding="utf-8").splitlines()[2:] if line.strip()]


def _try(component: Component, param: Path, outputs: dict[str, list[int]], limits: list[str]) -> None:
    """Raises CannotTake, unless ncnn loads the files and computes outputs of torch's shapes. Where only their axes differ the file is mended."""
    request = {"param": str(param), "inputs": {n: list(t.shape) for n, t in component.example.items()}, "outputs": outputs}
    for name, shape in outputs.items():
        if shape[:1] != [1] or len(shape) > LARGEST_RANK + 1:
            raise CannotTake(f"ncnn gives outputs of a batch of one and up to {LARGEST_RANK} further axes, and {name} is {shape}", where=component.name, hint=HINT)
    for _ in range(2):
        try:
            found = _child.call("edgekd.export._ncnn:attempt", request, minutes=MINUTES, what="ncnn")
        except EdgekdError as e:  # it crashed or hung on a network that pnnx thought complete
            raise CannotTake(e.what, where=component.name, hint=HINT) from e
        _refuse(component, found, limits)
        if not found["other"]:
            return
        for name in found["other"]:
            _reshape(param, name, outputs[name][1:])
    raise CannotTake(f"the shape of its {', '.join(found['other'])} cannot be had from ncnn", where=component.name, hint=HINT)


def _reshape(param: Path, name: str, shape: list[int]) -> None:
    """Append a Reshape to the network, whose output is then called `name`."""
    magic, counts, *lines = param.read_text(encoding="utf-8").splitlines()
    layers, blobs = (int(n) + 1 for n in counts.split())
    before = f"{name}_before"
    renamed = []
    for line in lines:
        part = line.split()
        where = [i for i in range(4, 4 + int(part[2]) + int(part[3])) if part[i] == name]
        for i in where:
            part[i] = before
        renamed.append(" ".join([f"{part[0]:<24} {part[1]:<24} {part[2]} {part[3]}", *part[4:]]) if where else line)
    renamed.append(" ".join([f"{'Reshape':<24} {'shape_of_' + name:<24} 1 1 {before} {name}", *_size(shape)]))
    param.write_text("\n".join([magic, f"{layers} {blobs}", *renamed]) + "\n", encoding="utf-8")


def _refuse(component: Component, found: Mapping[str, Any], limits: Iterable[str] = ()) -> None:
    if "refused" in found:
        why = "; ".join([str(found["refused"]), *(f"pnnx: {limit}" for limit in limits)])
        raise CannotTake(why, where=component.name, hint=HINT)


def _mark(param: Path, layers: set[str]) -> None:
    lines = param.read_text(encoding="utf-8").splitlines()
    marked = [f"{line} {ONLY_FP32}" if line.split()[1:2] and line.split()[1] in layers else line for line in lines]
    param.write_text("\n".join(marked) + "\n", encoding="utf-8")


def _ncnn() -> Any:
    try:
        import ncnn
    except ImportError as e:
        raise EdgekdError("ncnn is not installed", hint=FIX) from e
    return ncnn


exporter = NcnnExporter()
