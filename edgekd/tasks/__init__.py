"""What a model can be made to do. A task fixes its prompts, its components and its metrics."""
from __future__ import annotations


def names() -> list[str]:
    """The tasks there are."""
    return ["promptable_segmentation"]
