"""A process that writes a cache, for tests that kill it: `python cache_writer.py FOLDER RANK WORLD [SHARD]`.

With SHARD it hangs forever when that shard is on disk under its temporary name and about to be given its own.
"""
from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch

from edgekd.data.scenes import Scenes
from edgekd.distillation.cache import build_cache, writing
from edgekd.models.sam import DecoderShape, Sam
from edgekd.protocols import Preprocess

SCENES = Scenes(seed=9, count=16, size=64)
SHARD_IMAGES = 2


def teacher(seed: int = 0, delay: float = 0.0) -> Sam:
    """Maps of (64, 8, 8): the smallest that are coded. `delay` seconds a call."""
    torch.manual_seed(seed)

    class Slow(torch.nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            time.sleep(delay)
            return super().forward(x)

    return Sam("tiny", torch.nn.Sequential(Slow(3, 64, 8, 8)), DecoderShape(embed_dim=64, heads=2, mlp_dim=32), Preprocess(64)).eval().requires_grad_(False)


def main(folder: Path, rank: int, world: int, hang_at: int | None) -> None:
    """Write until done, or hang."""
    replace = os.replace

    def hanging(a: Path, b: Path) -> None:
        if hang_at is not None and Path(b).name == f"shard-{hang_at:05d}.safetensors":
            (folder / "hangs").touch()
            time.sleep(600)
        replace(a, b)

    os.replace = hanging  # type: ignore[assignment]
    writing.SHARD_IMAGES = SHARD_IMAGES
    made = build_cache(teacher(delay=0.05), SCENES, folder, rank=rank, world=world, patience=60)
    print(made.made)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]) if len(sys.argv) > 4 else None)
