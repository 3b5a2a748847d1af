"""How much memory and disk a process or artifact takes."""
from __future__ import annotations

import sys
from pathlib import Path


def peak_memory_bytes(status: Path = Path("/proc/self/status")) -> int:
    """The largest resident size this process ever had.

    From VmHWM where there is one: `ru_maxrss` of a process started by a larger one begins with the parent's peak on Linux.
    """
    try:
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())
