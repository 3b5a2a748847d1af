"""How files get to a device and commands run there. A transport never installs anything on it; `probe` says what is missing.

One file a way, each a context manager: what was pushed is removed and the device set free when it is closed.
"""
from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from typing_extensions import Self

from edgekd.errors import EdgekdError, UsageError

if TYPE_CHECKING:
    from edgekd.target import Target


@dataclass(frozen=True)
class Completed:
    """A finished command on the device."""

    code: int
    stdout: str
    stderr: str


class Lost(EdgekdError):
    """The connection broke. What a command had written is still on the device, and the next call connects again."""


class Transport(Protocol):
    """A device that files are pushed to and commands run on. Everything here raises EdgekdError, with a hint, when the device is out of reach."""

    name: str
    """`local`, `ssh`, `adb` or `browser`."""

    def probe(self) -> dict[str, object]:
        """What the device is and what it offers: `device`, `os`, `arch`, `python`, `versions`, `free_bytes`, `clock_skew_s`, what of these is known."""
        ...

    def push(self, path: Path) -> str:
        """Copy a file or folder into a folder on the device that is this session's own; its path there. A copy that breaks off leaves nothing half-written."""
        ...

    def run(self, command: Sequence[str], *, timeout_s: float) -> Completed:
        """Run a program with its arguments, each one word whatever is in it, and wait. One that takes longer than `timeout_s`, or whose connection is
        lost, is killed on the device too, with all its children; then EdgekdError."""
        ...

    def pull(self, path: str, local: Path) -> Path:
        """Copy a file of the device to `local`, atomically."""
        ...

    def close(self) -> None:
        """Remove what was pushed, set the device free, hang up. Never raises, and may be called twice."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


def reach(target: str | Target) -> Transport:
    """The way to a target's device, not connected yet.

    Raises:
        UsageError: there is none from here; the target's own words say what would have to be done.
    """
    if isinstance(target, str) or target.device.transport == "local":
        from edgekd.profiling.transport.local import Local

        return Local()
    if not target.reachable:
        raise UsageError(f"the target '{target.name}' cannot be reached from here, so nothing can be measured on it", hint=target.device.how)
    opened: Transport = importlib.import_module(f"{__name__}.{target.device.transport}").connect(target)
    return opened
