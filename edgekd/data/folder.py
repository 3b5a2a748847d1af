"""A folder of photos. Those of a folder of folders have a class, which is the folder that they are in."""
from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from edgekd import workspace
from edgekd.data.checks import file_stamp, problems, warn_skipped
from edgekd.data.images import SUFFIXES, read_image
from edgekd.errors import UsageError
from edgekd.protocols import Sample


class Folder:
    """The photos below `path`, in the order of their relative paths; hidden files and folders are left out.

    Photos larger than `max_side` are read shrunken to it: no model here looks at more than 1024 pixels, and a dozen
    masks of a 12-megapixel photo would take 150 MB. Unreadable ones are skipped, named in `skipped` and warned about.

    Where every photo is in a folder of its own below `path`, and there are two or more of these, they are the classes, numbered in the order of
    their names.

    Raises:
        UsageError: no image below `path`, or none that can be read.
    """

    has_masks = False

    def __init__(self, path: str | Path, *, max_side: int = 1024, limit: int | None = None) -> None:
        self.root = Path(path)
        self.name = self.root.resolve().name
        self.max_side = max_side
        found = list_images(self.root)
        if not found:
            raise UsageError("there is no image in this folder", where=self.root, hint=f"it should hold {', '.join(sorted(SUFFIXES))} files")
        self.paths: list[Path] = []
        self.skipped: list[str] = []
        self._keep_readable(found, limit if limit is not None else len(found))
        warn_skipped(self.name, self.skipped)
        if not self.paths:
            raise UsageError(f"none of the {len(self.skipped)} image files here can be read: {self.skipped[0]}", where=self.root)
        self.class_names = class_folders(self.root, found)

    def _keep_readable(self, found: list[Path], limit: int) -> None:
        """Check in blocks, so that a small `limit` on a large folder decodes only what it needs."""
        for start in range(0, len(found), 64):
            block = found[start:start + 64]
            for path, reason in zip(block, problems(block), strict=True):
                if len(self.paths) == limit:
                    return
                if reason is None:
                    self.paths.append(path)
                else:
                    self.skipped.append(f"{self._id(path)}: {reason}")

    def _id(self, path: Path) -> str:
        return path.name if path == self.root else path.relative_to(self.root).as_posix()

    @property
    def has_classes(self) -> bool:
        """Whether the folders are classes."""
        return bool(self.class_names)

    def classes_of(self, index: int) -> int | None:
        """The class of a photo."""
        return self.class_names.index(self.paths[index].relative_to(self.root).parts[0]) if self.class_names else None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        path = self.paths[index]
        return Sample(self._id(path), read_image(path, max_side=self.max_side), label=self.classes_of(index))

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def fingerprint(self) -> str:
        """Relative paths, sizes and modification times, and the size the photos are read at."""
        return workspace.fingerprint(["folder", self.max_side, [[self._id(p), *file_stamp(p)] for p in self.paths]])


def class_folders(root: Path, found: list[Path]) -> list[str]:
    """Names of the folders directly below `root` that hold its photos; none where a photo is in no such folder or all are in one."""
    if root.is_file():
        return []
    parts = [path.relative_to(root).parts for path in found]
    names = sorted({p[0] for p in parts})
    return names if len(names) > 1 and all(len(p) > 1 for p in parts) else []


def list_images(root: Path) -> list[Path]:
    """Image files below a folder, or the one image file given; sorted by relative path, hidden ones ignored."""
    if root.is_file():
        return [root]
    found: list[Path] = []
    seen: set[str] = set()  # linked folders are followed, a circle of links once
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        subfolders[:] = [] if real in seen else [s for s in subfolders if not s.startswith(".")]
        files = [] if real in seen else files
        seen.add(real)
        found += [Path(folder, f) for f in files if not f.startswith(".") and Path(f).suffix.lower() in SUFFIXES]
    return sorted(found, key=lambda p: p.relative_to(root).as_posix())
