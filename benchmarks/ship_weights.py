"""Put a distilled checkpoint into the wheel, in half precision.

    python benchmarks/ship_weights.py runs/students/repvit_s-256.safetensors
"""
from __future__ import annotations

import sys
from pathlib import Path

from edgekd import checkpoint, students

LARGEST = 5_500_000


def main(source: Path) -> None:
    """Convert, write to `edgekd/students/weights/NAME.safetensors`, refuse what is too large for a wheel."""
    meta, model = checkpoint.read_meta(source), checkpoint.load(source)
    path = checkpoint.save(model.half(), students.WEIGHTS / f"{meta.name}{checkpoint.SUFFIX}", teacher=meta.teacher, history=meta.history)
    size = path.stat().st_size
    if size > LARGEST:
        path.unlink()
        sys.exit(f"{path.name} would be {size} bytes, more than {LARGEST}")
    print(f"{path}: {size} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
