"""Whose classes are whose: the numbers that data gives its classes, in a model's own numbering."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from edgekd import workspace
from edgekd.protocols import Dataset, Sample


def numbering(dataset: Any, classes: int, labels: Sequence[str]) -> dict[int, int] | None:
    """Class of the data -> class of a model with `classes` classes called `labels` (or nothing).

    The same number where there are as many, or where the data does not name its own and none is too large; by the names, in any case, where all
    of the data's are among the model's. None where the data has no classes, or these do not say which of the model's they are.
    """
    if not getattr(dataset, "has_classes", False):
        return None
    names = [n.strip().lower() for n in dataset.class_names]
    if len(names) == classes:
        return {i: i for i in range(classes)}
    if not names:
        used = {c for i in range(len(dataset)) if (c := dataset.classes_of(i)) is not None}
        return {i: i for i in used} if max(used, default=0) < classes else None
    known = {label.strip().lower(): i for i, label in reversed(list(enumerate(labels)))}
    return {i: known[n] for i, n in enumerate(names)} if all(n in known for n in names) else None


class Renumbered:
    """A dataset whose classes are those of a model; without any where they cannot be told."""

    def __init__(self, dataset: Dataset, numbers: dict[int, int] | None, labels: Sequence[str]) -> None:
        self.dataset, self.numbers, self.class_names = dataset, numbers, list(labels)
        self.name, self.skipped = dataset.name, dataset.skipped

    @property
    def has_masks(self) -> bool:
        return self.dataset.has_masks

    @property
    def has_classes(self) -> bool:
        return self.numbers is not None

    def classes_of(self, index: int) -> int | None:
        """The class of a photo."""
        own = self.dataset.classes_of(index) if self.numbers is not None else None  # type: ignore[attr-defined]
        return None if own is None or self.numbers is None else self.numbers[own]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        return replace(self.dataset[index], label=self.classes_of(index))

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def fingerprint(self) -> str:
        return workspace.fingerprint(["renumbered", self.dataset.fingerprint(), sorted((self.numbers or {}).items())])
