"""Class vectors of a vision-language teacher: one vector a class, in the space of the teacher's pooled features."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from edgekd.distillation.outputs import Setup
from edgekd.errors import UsageError

HINT = "a file (C, D) .npy or .safetensors of the teacher's text encoder, one row a class in the order of the logits"


def class_vectors(setup: Setup, name: str, path: str) -> Tensor:
    """(C, D) float32 of unit length, D being the teacher's pooled features: from a file, else the teacher's own: its attribute `class_vectors`
    (a vision-language model's text embeddings), or the weights of the linear layer that makes its logits.

    Raises:
        UsageError: no such file, not a matrix of that width, or a teacher that has none.
    """
    width = setup.theirs["pooled"].shape[1]
    if path:
        found = read_vectors(Path(path), setup.where)
        if found.shape[1] != width:
            raise UsageError(f"class vectors of {found.shape[1]} numbers, and the teacher's pooled features have {width}", where=path, hint=HINT)
    else:
        logits = setup.ours.logits if setup.theirs.logits is None else setup.theirs.logits
        own = teacher_vectors(setup.teacher, width, None if logits is None else logits.shape[1])
        if own is None:
            raise UsageError(f"objective '{name}' needs class vectors, and the teacher has none of its own", where=setup.where, hint=f"vectors: {HINT}")
        found = own
    if setup.ours.logits is not None and len(found) != setup.ours.logits.shape[1]:
        raise UsageError(f"{len(found)} class vectors, and the student tells {setup.ours.logits.shape[1]} classes apart", where=path or setup.where, hint=HINT)
    return nn.functional.normalize(found.detach().float(), dim=1)


def read_vectors(path: Path, where: str) -> Tensor:
    """A matrix from a .npy or a .safetensors with one tensor.

    Raises:
        UsageError: no such file, one that cannot be read, or another shape.
    """
    if not path.is_file():
        raise UsageError(f"there is no file {path}", where=where, hint=HINT)
    try:
        if path.suffix == ".npy":
            found = torch.from_numpy(np.load(path, allow_pickle=False).astype(np.float32))
        else:
            (found,) = load_file(path).values()
    except (ValueError, TypeError, OSError, SafetensorError) as e:
        raise UsageError(f"the class vectors cannot be read: {e}", where=path, hint=HINT) from e
    if found.ndim != 2 or not bool(torch.isfinite(found.float()).all()):
        raise UsageError(f"class vectors are a matrix of finite numbers, not {list(found.shape)}", where=path, hint=HINT)
    return found.float()


def teacher_vectors(teacher: Any, width: int, classes: int | None) -> Tensor | None:
    """(C, D) of a teacher's own, not normalised: its attribute `class_vectors`, else the weights of its last linear layer from D numbers to C
    classes; None where it has neither."""
    own = getattr(teacher, "class_vectors", None)
    if isinstance(own, Tensor) and own.ndim == 2 and own.shape[1] == width:
        return own.detach()
    linear = [m for m in teacher.modules() if isinstance(m, nn.Linear)] if isinstance(teacher, nn.Module) else []
    heads = [m for m in linear if (m.in_features, m.out_features) == (width, classes)]
    return heads[-1].weight.detach() if heads else None
