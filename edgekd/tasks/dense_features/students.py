"""Students of dense features by name: the encoder of any student, and a projection to the teacher's width and grid.

    mobilenet_v3_large, resnet50_d       with their settings, as students of classification
    repvit_s, tinyvit_xs, timm/NAME ...  every encoder of `edgekd list students`
"""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from edgekd.errors import UsageError
from edgekd.models.features import DenseFeatures
from edgekd.protocols import Preprocess
from edgekd.tasks.classification.students import canonical, trunk


def build(name: str, *, image_size: int, embed_dim: int, grid: int, preprocess: Preprocess | None = None, seed: int = 0) -> Any:
    """An untrained student, the same for the same seed whatever ran before.

    Args:
        image_size: S in pixels, a multiple of 32.
        embed_dim: E of the teacher.
        grid: s, the side of the student's own embedding.
        preprocess: the teacher's, so that both see the same pixels; its size is replaced.

    Raises:
        UsageError: unknown name, or a size that cannot be built.
    """
    if image_size < 32 or image_size % 32:
        raise UsageError(f"the image size of a student is a multiple of 32, not {image_size}", where=name, hint=f"nearest: {max(32, round(image_size / 32) * 32)}")
    safe = canonical(name)
    spec = replace(preprocess or Preprocess(image_size), image_size=image_size, prompt_size=None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder, channels, _ = trunk(name)
        return DenseFeatures(safe, encoder, channels, spec, embed_dim=embed_dim, grid=grid)
