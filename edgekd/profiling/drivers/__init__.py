"""How a job is carried out on a device: by our one-file runner where there is a Python (`python`), by the runtime's own benchmark programs where there
is none (`tools`), by a page (`browser`).

A driver is a module with `measure(device, job, folder, target) -> result`: the job of `edgekd.profiling.boards` and the folder that holds its files here
to the result that came back. Both are JSON documents; docs/devices.md describes them.
"""
from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgekd.profiling.transport import Transport
    from edgekd.target import Target

BY = {"ssh": "python", "local": "python", "adb": "tools", "browser": "browser"}
"""Way to the device -> driver."""


def measure(device: Transport, job: dict[str, Any], folder: Path, target: str | Target) -> dict[str, Any]:
    """Carry out a job. Raises EdgekdError, with what was finished before kept in its message's `partial`, where nothing at all came back."""
    found: dict[str, Any] = importlib.import_module(f"{__name__}.{BY[device.name]}").measure(device, job, folder, target)
    return found
