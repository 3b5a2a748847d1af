"""The data pack: a folder with `index.json`, `splits.json`, photos and 8-bit label maps (or alphas) of the same size."""
from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from edgekd import workspace
from edgekd.data.checks import file_stamp, problems, warn_skipped
from edgekd.data.images import ImageError, read_image
from edgekd.errors import EdgekdError, UsageError, unknown
from edgekd.protocols import Sample

FORMAT = 1
CLEAN_AREA, CLEAN_CERTAIN = (0.03, 0.7), 0.85
"""A model-made alpha counts as a mask only when it is surely a cut-out: not nearly empty or full, and hardly any grey."""


def is_pack(path: Path) -> bool:
    """Whether this folder is a data pack."""
    index = path / "index.json"
    try:
        return index.is_file() and "items" in json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, TypeError):
        return False


class Pack:
    """One split of a pack (`split=None`: all items), in the order of its `splits.json`.

    - kind `regions`: labels cover the whole photo. Every 4-connected piece of at least `min_region` of the photo is a
      mask, largest first (a label can be several pieces, and a click can only mean the piece under it).
    - kind `instances`: 0 is background, every other label is one mask, in the order of labels.
    - items with a `saliency` alpha: the pixels >= 128 are the one mask, if the alpha is a clean cut-out.
    - otherwise unlabelled (`masks` is None). Of several annotators, the item's `primary` one is used.
    """

    def __init__(self, path: str | Path, *, split: str | None = None, masks: bool = True, min_region: float = 0.01) -> None:
        self.root, self.masks, self.min_region = Path(path), masks, min_region
        index, splits = _read_json(self.root / "index.json"), _read_json(self.root / "splits.json")
        if index.get("format") != FORMAT:
            raise UsageError(f"data pack format {index.get('format')!r} is not known (only {FORMAT})", where=self.root / "index.json")
        if split is not None and split not in splits:
            raise unknown("split", split, splits)
        self.kind: str = index.get("kind", "photos")
        self.name = f"{index.get('name', self.root.name)}{f'/{split}' if split else ''}"
        by_id = {item["id"]: item for item in index["items"]}
        wanted = [i for s in ([split] if split else splits) for i in splits[s]]
        items = [by_id[i] for i in wanted if i in by_id]
        reasons = problems([self.root / item["image"] for item in items])
        self.items: list[dict[str, Any]] = [item for item, reason in zip(items, reasons, strict=True) if reason is None]
        self.skipped = [f"{item['image']}: {reason}" for item, reason in zip(items, reasons, strict=True) if reason is not None]
        self.skipped += [f"{i}: not in index.json" for i in wanted if i not in by_id]
        warn_skipped(self.name, self.skipped)
        if not self.items:
            raise UsageError(f"there is no readable image in the data pack '{self.name}'", where=self.root)

    @property
    def has_masks(self) -> bool:
        return self.masks and any(_mask_file(item) for item in self.items)

    @property
    def has_classes(self) -> bool:
        """Whether its items are labelled with classes."""
        return any("label" in item for item in self.items)

    def classes_of(self, index: int) -> int | None:
        """The class of a photo."""
        return self.items[index].get("label")

    @cached_property
    def class_names(self) -> list[str]:
        """Names of the classes by their numbers, from `classes.json`; none where there is no such file."""
        path = self.root / "classes.json"
        if not self.has_classes or not path.is_file():
            return []
        rows = sorted(json.loads(path.read_text(encoding="utf-8")), key=lambda row: row["index"])
        return [str(row["name"]) for row in rows]

    @property
    def labels(self) -> str:
        """Where the masks come from, for the protocol of an evaluation."""
        return "model-made alpha (IS-Net), clean cut-outs only" if any("saliency" in item for item in self.items) else "ground truth"

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Sample:
        item = self.items[index]
        image = read_image(self.root / item["image"])
        file = _mask_file(item) if self.masks else None
        if file is None:
            return Sample(item["id"], image, label=item.get("label"))
        values = _read_labels(self.root / file, image.shape[:2])
        if "masks" not in item:
            return Sample(item["id"], image, (values >= 128)[None], item.get("label"))
        found = _instances(values) if self.kind == "instances" else _regions(values, self.min_region)
        return Sample(item["id"], image, found, item.get("label"))

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def fingerprint(self) -> str:
        """The index's content, the split, and paths, sizes and times of photos and masks."""
        files = [f for item in self.items for f in (item["image"], _mask_file(item) if self.masks else None) if f]
        return workspace.fingerprint(["pack", self.name, self.masks, self.min_region, workspace.sha256(self.root / "index.json"),
                                      [[f, *file_stamp(self.root / f)] for f in files]])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UsageError(f"the data pack's {path.name} cannot be read: {e}", where=path) from e
    if not isinstance(value, dict):
        raise UsageError(f"the data pack's {path.name} should be an object", where=path)
    return value


def _mask_file(item: dict[str, Any]) -> str | None:
    """The label map or clean alpha of an item, if it has one."""
    if item.get("masks"):
        return str(item["masks"][item.get("primary", 0)]["file"])
    alpha = item.get("saliency")
    clean = alpha and CLEAN_AREA[0] < alpha["area"] < CLEAN_AREA[1] and alpha["certain"] > CLEAN_CERTAIN
    return str(alpha["file"]) if alpha and clean else None


def _read_labels(path: Path, size: tuple[int, ...]) -> np.ndarray:
    """(H, W) integer labels of a one-channel PNG, which must be as large as its photo."""
    try:
        with Image.open(path) as image:
            values = np.asarray(image)
    except (OSError, ValueError, SyntaxError) as e:
        raise ImageError(f"the mask cannot be read: {e}", where=path) from e
    if values.shape != tuple(size):
        raise EdgekdError(f"the mask is {values.shape}, its photo {tuple(size)}", where=path)
    return values


def _instances(values: np.ndarray) -> np.ndarray:
    """(H, W) labels -> (K, H, W) bool, one mask a label, 0 left out."""
    labels = np.unique(values)
    return values[None] == labels[labels > 0][:, None, None]


def _regions(values: np.ndarray, min_area: float) -> np.ndarray:
    """(H, W) labels -> (K, H, W) bool: connected pieces of at least `min_area` of the photo, largest first."""
    pieces: list[np.ndarray] = []
    for label in np.unique(values):
        numbered, _ = ndimage.label(values == label)
        areas = np.bincount(numbered.ravel())
        pieces += [numbered == k for k in range(1, len(areas)) if areas[k] >= min_area * values.size]
    pieces.sort(key=lambda m: -int(m.sum()))
    return np.stack(pieces) if pieces else np.zeros((0, *values.shape), dtype=bool)
