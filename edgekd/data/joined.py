"""Several datasets as one."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from edgekd import workspace
from edgekd.protocols import Dataset, Sample


class Joined:
    """Datasets one after the other. An id that two of them use gets its dataset's number, so that ids stay unique."""

    def __init__(self, parts: Sequence[Dataset]) -> None:
        self.parts = list(parts)
        self.places = [(p, i) for p, part in enumerate(self.parts) for i in range(len(part))]
        self.name = " + ".join(part.name for part in self.parts)
        self.skipped = [s for part in self.parts for s in part.skipped]

    @property
    def has_masks(self) -> bool:
        return all(part.has_masks for part in self.parts)

    @property
    def has_classes(self) -> bool:
        """Whether all parts number the same classes."""
        return all(getattr(part, "has_classes", False) for part in self.parts) and len({tuple(part.class_names) for part in self.parts}) == 1  # type: ignore[attr-defined]

    @property
    def class_names(self) -> list[str]:
        """Names of the classes that all parts share."""
        return self.parts[0].class_names if self.has_classes else []  # type: ignore[attr-defined]

    def classes_of(self, index: int) -> int | None:
        """The class of a photo."""
        part, i = self.places[index]
        return self.parts[part].classes_of(i) if self.has_classes else None  # type: ignore[attr-defined]

    @property
    def labels(self) -> str:
        """Where the masks of each part come from."""
        return "; ".join(f"{part.name}: {getattr(part, 'labels', 'ground truth')}" for part in self.parts)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Sample:
        part, i = self.places[index]
        sample = self.parts[part][i]
        return replace(sample, id=sample.id if part == 0 else f"{part}/{sample.id}", label=self.classes_of(index))

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def fingerprint(self) -> str:
        return workspace.fingerprint([part.fingerprint() for part in self.parts])
