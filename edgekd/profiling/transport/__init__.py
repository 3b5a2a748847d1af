"""How code gets to a device. A transport never installs anything there; `probe` says what is missing."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Completed:
    """A finished command on the device."""

    code: int
    stdout: str
    stderr: str


class Transport(Protocol):
    """A device that files are pushed to and commands run on."""

    name: str

    def probe(self) -> dict[str, object]:
        """What the device is and what it offers: `device`, `os`, `python`, `versions`, ... Raises EdgekdError when out of reach."""
        ...

    def push(self, folder: Path) -> str:
        """Copy a folder to the device; returns its path there."""
        ...

    def run(self, module: str, arguments: Sequence[str], *, timeout_s: float) -> Completed:
        """Run `python -m module arguments` there and wait. Raises EdgekdError when it takes longer than `timeout_s`."""
        ...

    def pull(self, path: str, local: Path) -> Path:
        """Copy a file of the device to `local`."""
        ...
