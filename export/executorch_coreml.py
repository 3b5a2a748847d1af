"""ExecuTorch with its Core ML delegate (`.pte`): for apps that run ExecuTorch on Apple devices. Written and read back here; it runs on a Mac or an iPhone.

    fp16   Core ML's own choice: arithmetic in 16 bits, on the Neural Engine where it can
    fp32   arithmetic in 32 bits, on the CPU and the GPU
"""
from __future__ import annotations

from typing import Any

from edgekd.export._executorch import PteExporter

from edgekd.protocols import Availability, package_version


class ExecuTorchCoreMLExporter(PteExporter):
    """See `edgekd.protocols.Exporter`."""

    format = "executorch_coreml"
    schemes: tuple[str, ...] = ("fp16", "fp32")
    backend, delegate = "coreml", "CoreMLBackend"
    runs = "the Core ML delegate runs on Apple devices, from an app that links it"

    def availability(self) -> Availability:
        """Whether executorch and coremltools are installed."""
        if package_version("executorch") and not package_version("coremltools"):
            return Availability(False, reason="not installed: coremltools", fix='pip install "coremltools==9.0"  (Linux x86-64 and macOS)')
        return super().availability()

    def options(self, scheme: str) -> dict[str, Any]:
        """Arithmetic, and the oldest system that takes the program."""
        return {"precision": scheme, "target": "iOS17"}


exporter = ExecuTorchCoreMLExporter()
