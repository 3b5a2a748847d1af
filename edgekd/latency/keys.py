"""What a row of the database is told by: the device, the runtime with its version, the scheme and the threads.

A CPU is told by its instruction sets and not by its name: they decide which kernels a runtime picks, and two machines of one class differ by little
more than a factor. A board that has a profile of its own is told by that.
"""
from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekd.measurement import Circumstances, cpu, installed

if TYPE_CHECKING:
    from edgekd.target import Target

GENERIC = ("host", "intel_cpu", "generic_ssh_cpu")
"""Targets that name no device: what is measured there belongs to its class of CPU."""
PACKAGES = {"onnx": "onnxruntime", "openvino": "openvino", "litert": "ai-edge-litert", "executorch": "executorch", "ncnn": "ncnn",
            "tensorrt": "tensorrt", "coreml": "coremltools", "qnn": "onnxruntime-qnn"}
"""format -> the package that runs it"""
SETS = (("amx_tile", "amx"), ("avx512f", "avx512"), ("avx2", "avx2"), ("avx", "avx"), ("avx512_vnni", "vnni"), ("avx_vnni", "vnni"),
        ("avx512_bf16", "bf16"), ("asimd", "asimd"), ("asimddp", "dot"), ("i8mm", "i8mm"), ("bf16", "bf16"), ("sve", "sve"))
IMPLIED = {"avx": {"avx2", "avx512"}, "avx2": {"avx512"}}


@dataclass(frozen=True)
class Key:
    """`runtime` is a format (`onnx`), `version` that of the package that runs it; `threads` 0 is as many as the runtime chose, which nobody told."""

    device: str
    runtime: str
    version: str
    scheme: str
    threads: int

    @property
    def slug(self) -> str:
        """For a file name."""
        return re.sub(r"[^A-Za-z0-9.+_-]", "_", "-".join([self.device, self.runtime, self.version.split()[-1], self.scheme, f"{self.threads}t"]))


def cpu_class(flags: Iterable[str], machine: str | None = None) -> str:
    """`x86_64+avx512+vnni+bf16`: the architecture and the instruction sets that decide about kernels."""
    flags = set(flags)
    found = list(dict.fromkeys(name for flag, name in SETS if flag in flags))
    found = [name for name in found if not IMPLIED.get(name, set()) & set(found)]
    architecture = "x86_64" if any(f.startswith(("avx", "amx")) for f in flags) else "aarch64" if "asimd" in flags else machine or platform.machine() or "cpu"
    return "+".join([architecture, *found])


def here() -> str:
    """The class of this machine's CPU."""
    return cpu_class(cpu()[1])


def device_of(target: str | Target, flags: Iterable[str] | None = None) -> str:
    """What the database calls a target: its own name, or of one that names no device the class of its CPU (`flags`; this machine's by default)."""
    name = target if isinstance(target, str) else target.name
    return name if name not in GENERIC else here() if flags is None else cpu_class(flags)


def version_of(runtime: str, versions: Mapping[str, str] | None = None) -> str:
    """`onnxruntime 1.31.1`; of `versions`, or as installed here. `unknown` where nobody knows."""
    package = PACKAGES.get(runtime, runtime)
    versions = installed([package]) if versions is None else versions
    return f"{package} {versions.get(package, 'unknown')}"


def key_of(circumstances: Circumstances, target: str | Target, runtime: str, scheme: str, threads: int | None) -> Key:
    """The key of what was measured under these circumstances. A runtime's own choice of threads is one a core."""
    cores = re.search(r"\((\d+) cores?\)", circumstances.device)
    return Key(device_of(target, circumstances.cpu_flags), runtime, version_of(runtime, circumstances.versions), scheme, threads or int(cores[1] if cores else 0))


def settled(threads: int | None) -> int:
    """The same of this machine."""
    return threads or os.cpu_count() or 1
