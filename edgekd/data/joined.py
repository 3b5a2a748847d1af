"""Several datasets as one."""
from __future__ import annotations

from collections.abc import Iterator, Sequence

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
    def labels(self) -> str:
        """Where the masks of each part come from."""
        return "; ".join(f"{part.name}: {getattr(part, 'labels', 'ground truth')}" for part in self.parts)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Sample:
        part, i = self.places[index]
        sample = self.parts[part][i]
        return sample if part == 0 else Sample(f"{part}/{sample.id}", sample.image, sample.masks)

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def fingerprint(self) -> str:
        return workspace.fingerprint([part.fingerprint() for part in self.parts])
