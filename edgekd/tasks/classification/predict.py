"""The likeliest classes of one photo."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.data.images import preprocess, read_image
from edgekd.errors import UsageError
from edgekd.tasks.classification.scoring import log_softmax, logits_of
from edgekd.workspace import write_json

TOP = 5


@dataclass(frozen=True)
class Classes:
    """The likeliest classes of a photo, best first: number, name (None where names are not known) and probability."""

    model: str
    image: str
    found: list[tuple[int, str | None, float]]

    def document(self) -> dict[str, Any]:
        """What `edgekd predict` shows."""
        return {"model": self.model, "image": self.image, "classes": [{"class": i, "name": name, "probability": p} for i, name, p in self.found]}


def predict_file(model: Any, photo: Path, output: Path | None = None, *, top: int = TOP, **prompt: Any) -> Classes:
    """The `top` likeliest classes of a photo; as JSON at `output`, where there is one.

    Raises:
        UsageError: a prompt, which a classifier does not take, or no such photo.
    """
    if prompt:
        raise UsageError(f"'{model.name}' is a classifier and takes no prompt", hint="leave out --point and --box")
    logits = logits_of(model, preprocess(read_image(photo), model.preprocess)[0][None])[0]
    probabilities = np.exp(log_softmax(logits))
    order = np.argsort(-logits, kind="stable")[:top]
    found = Classes(model.name, str(photo), [(int(i), model.labels[i] if model.labels else None, float(probabilities[i])) for i in order])
    if output is not None:
        write_json(Path(output), found.document())
    return found
