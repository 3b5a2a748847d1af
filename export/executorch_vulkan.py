"""ExecuTorch with its Vulkan delegate (`.pte`): for GPUs of Android phones. Written and read back here; it runs in an app that links the delegate.

    fp32   arithmetic in 32 bits
    fp16   weights and arithmetic in 16 bits
"""
from __future__ import annotations

from typing import Any

from edgekd.export._executorch import PteExporter


class ExecuTorchVulkanExporter(PteExporter):
    """See `edgekd.protocols.Exporter`."""

    format = "executorch_vulkan"
    schemes: tuple[str, ...] = ("fp32", "fp16")
    backend, delegate = "vulkan", "VulkanBackend"
    runs = "the Vulkan delegate is not in ExecuTorch's Python wheel; it runs in an Android app that links it"

    def options(self, scheme: str) -> dict[str, Any]:
        """Whether floats are made 16-bit."""
        return {"force_fp16": scheme == "fp16"}


exporter = ExecuTorchVulkanExporter()
