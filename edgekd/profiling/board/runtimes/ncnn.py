"""ncnn networks on the CPU, the 16-bit options as the scheme says: ncnn turns some on by itself."""
from __future__ import annotations

import os
from collections import Counter
from typing import TYPE_CHECKING, Any

from ..job import Trouble
from . import Array, Facts, Session, module, of_numpy

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ..job import Part

OPTIONS = {"fp32": (), "fp16": ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic"), "bf16": ("use_bf16_packed", "use_bf16_storage")}
ARITHMETIC = {"Convolution", "ConvolutionDepthWise", "Deconvolution", "DeconvolutionDepthWise", "Convolution1D", "ConvolutionDepthWise1D",
              "InnerProduct", "Gemm", "MatMul", "SDPA", "MultiHeadAttention"}
PASSIVE = {"Input", "Split", "MemoryData"}
ONLY_FP32 = "31=3"
"""ncnn's mark of a layer that neither stores nor computes in fp16"""


def opened(part: Part, threads: int | None, tools: Mapping[str, str]) -> NcnnSession:
    """See `edgekd.profiling.board.runtimes`."""
    return NcnnSession(part, threads)


class NcnnSession(Session):
    """A network without Vulkan."""

    def __init__(self, part: Part, threads: int | None) -> None:
        self._ncnn, self._part = module("ncnn"), part
        if part.scheme not in OPTIONS:
            raise Trouble(f"ncnn is told nothing of the precision '{part.scheme}'", f"it takes {', '.join(OPTIONS)}")
        self._net = self._ncnn.Net()
        for option in (o for options in OPTIONS.values() for o in options):
            setattr(self._net.opt, option, option in OPTIONS[part.scheme])
        self._net.opt.use_vulkan_compute = False
        if threads:
            self._net.opt.num_threads = threads
        stem = part.file[:-len(".param")] if part.file.endswith(".param") else os.path.splitext(part.file)[0]
        for load, file in ((self._net.load_param, part.file), (self._net.load_model, f"{stem}.bin")):
            code = load(file) if os.path.isfile(file) else "no file"
            if code:
                raise Trouble(f"ncnn cannot open {os.path.basename(file)}: it gives {code}", "export the model again, or update ncnn on the board")
        given = part.arrays()
        self._kept = [given[name].reshape(given[name].shape[1:] or (1,)) for name in self._net.input_names()]  # a Mat of an array only borrows it
        self._feed = [(name, self._ncnn.Mat(self._kept[i]).clone()) for i, name in enumerate(self._net.input_names())]
        self._names = list(self._net.output_names())
        self._last: list[Any] = []

    def run(self) -> None:
        """One call. Raises Trouble where ncnn gives a code instead of an output."""
        extractor = self._net.create_extractor()
        for name, mat in self._feed:
            extractor.input(name, mat)
        self._last = []
        for name in self._names:
            code, mat = extractor.extract(name)
            if code:
                raise Trouble(f"ncnn does not compute {name}: extract gives {code}", "not enough memory, or a damaged file")
            self._last.append(mat)

    def outputs(self) -> dict[str, Array]:
        """Of the last call, with the batch axis that ncnn has not."""
        import numpy as np

        return {name: of_numpy(np.array(self._last[i])[None]) for i, name in enumerate(self._names)}

    def facts(self) -> Facts:
        """From the layers that ncnn loaded."""
        layers = list(self._executed())
        counted = Counter(precision for kind, precision in layers if kind in ARITHMETIC)
        wanted = self._part.scheme
        away = Counter(kind for kind, precision in layers if precision != wanted)
        return Facts("+".join(sorted(counted, key=lambda p: -counted[p])) or "fp32", dict(Counter(f"{k}:{p}" for k, p in layers).most_common()),
                     [f"{n} {kind} in fp32: ncnn has no {wanted} code for it on this CPU" for kind, n in away.most_common()] if wanted != "fp32" else [])

    def _executed(self) -> Iterator[tuple[str, str]]:
        """(kind, precision) of every layer that computes."""
        option = self._net.opt
        with open(self._part.file, encoding="utf-8") as f:
            marked = {line.split()[1] for line in f.read().splitlines()[2:] if line.strip() and line.split()[-1] == ONLY_FP32}
        half = option.use_fp16_storage and option.use_fp16_arithmetic and self._ncnn.cpu_support_arm_asimdhp()
        for layer in self._net.layers():
            if layer.type in PASSIVE:
                continue
            if half and layer.support_fp16_storage and layer.name not in marked:
                yield layer.type, "fp16"
            else:
                yield layer.type, "bf16" if option.use_bf16_storage and layer.support_bf16_storage else "fp32"
