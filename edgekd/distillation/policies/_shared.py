"""What policies share: the refusal of a cached teacher, and classes as shares."""
from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from edgekd.distillation import points
from edgekd.distillation.outputs import PER_PROMPT, Setup
from edgekd.errors import UsageError

FROM_MASKS = PER_PROMPT | {"truth", "boxes", "instances"}


def refuse_cached(policy: points.Policy, setup: Setup) -> None:
    """A policy that changes pixels needs the teacher itself.

    Raises:
        UsageError: the stage takes the teacher's outputs from the cache, which knows nothing of the changed photos.
    """
    if setup.stage.teacher == "cached":
        raise UsageError(f"policy '{policy.name}' changes the photos, and the teacher's cached outputs are of the unchanged ones", where=setup.where,
                         hint="leave 'teacher' out of the stage (auto), or set it to live")


def objectives_on_masks(setup: Setup) -> list[str]:
    """Names of the stage's objectives that learn from prompts or from the instances of a photo."""
    return [o.name for o in setup.stage.objectives if points.registry("objective")[o.name].needs & FROM_MASKS]


def class_count(setup: Setup) -> int | None:
    """Classes of the task, as the student's logits have them; None for a student without."""
    return None if setup.ours.logits is None else setup.ours.logits.shape[-1]


def mixed_classes(classes: Tensor | None, partner: Tensor, share: Tensor, count: int | None) -> Tensor | None:
    """Classes (B,) long or shares (B, C) of photos that were mixed with `partner` (B,), `share` (B,) of each being its own -> shares (B, C).

    A row is -1 where one of the two photos has no class. Without a count of classes, each keeps its own."""
    if classes is None or count is None:
        return classes
    known = F.one_hot(classes.clamp(min=0), count).float() if classes.ndim == 1 else classes.float()
    missing = classes < 0 if classes.ndim == 1 else (classes < 0).any(1)
    found = share[:, None] * known + (1 - share[:, None]) * known[partner]
    found[missing | (missing[partner] & (share < 1))] = -1.0
    return found
