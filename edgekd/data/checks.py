"""What every file-backed dataset does the same way: find unreadable photos before a run starts, and say so once."""
from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from edgekd.data.images import ImageError, read_image

CHECK_SIDE = 64
"""JPEGs are decoded at 1/8 when checked: every byte is still read, so a truncated file is found, at a fraction of the time."""


def problem(path: Path) -> str | None:
    """Why this photo cannot be used, or None. Decodes it: a header says nothing about a truncated file."""
    try:
        read_image(path, max_side=CHECK_SIDE)
    except ImageError as e:
        return e.what
    return None


def problems(paths: Sequence[Path]) -> list[str | None]:
    """`problem` of each path, in order, on a few threads (Pillow decodes outside the interpreter lock)."""
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return list(pool.map(problem, paths))


def warn_skipped(dataset: str, skipped: Sequence[str]) -> None:
    """One warning for all unreadable photos of a dataset; the first ten are named, all are in `Dataset.skipped`."""
    if not skipped:
        return
    from edgekd import console

    more = f" and {len(skipped) - 10} more" if len(skipped) > 10 else ""
    console.warn(f"{dataset}: {len(skipped)} image{'s' * (len(skipped) > 1)} skipped: {'; '.join(skipped[:10])}{more}")


def file_stamp(path: Path) -> list[int]:
    """Size and modification time: what a fingerprint sees of a file without reading it. A file that went missing shows too."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return [-1, -1]
    return [stat.st_size, stat.st_mtime_ns]
