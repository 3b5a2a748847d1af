"""Photos with instance masks in COCO's JSON: polygons, uncompressed RLE and compressed RLE."""
from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgekd import workspace
from edgekd.data.checks import file_stamp, problems, warn_skipped
from edgekd.data.images import ImageError, read_image
from edgekd.errors import UsageError
from edgekd.protocols import Sample


class Coco:
    """The images of a COCO json, in the order of the file, with one mask an annotation.

    Images are looked for beside the json, in `images/`, in the folder above, and in COCO's own layout
    (`annotations/instances_val2017.json` with `val2017/`). `iscrowd` annotations (many objects in one mask) are left out.

    Raises:
        UsageError: not a COCO json, or none of its images can be found and read.
    """

    def __init__(self, path: str | Path, *, masks: bool = True) -> None:
        self.path = Path(path)
        self.name = self.path.stem
        images, annotations = _load(self.path)
        by_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        for annotation in annotations:
            if annotation.get("segmentation") and not annotation.get("iscrowd"):
                by_image[annotation["image_id"]].append(annotation)
        folders = _image_folders(self.path)
        located = [(record, _locate(record["file_name"], folders)) for record in images]
        reasons = iter(problems([p for _, p in located if p]))
        self.skipped: list[str] = []
        self._items: list[tuple[dict[str, Any], Path]] = []
        for record, file in located:
            reason = next(reasons) if file else "the image does not exist"
            if file and reason is None:
                self._items.append((record, file))
            else:
                self.skipped.append(f"{record['file_name']}: {reason}")
        warn_skipped(self.name, self.skipped)
        if not self._items:
            raise UsageError(f"none of the {len(images)} images named in this file can be found and read", where=self.path,
                             hint=f"looked in {', '.join(str(f) for f in folders)}")
        self._annotations = {r["id"]: by_image[r["id"]] for r, _ in self._items} if masks else {}

    @property
    def has_masks(self) -> bool:
        return any(self._annotations.values())

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Sample:
        record, file = self._items[index]
        image = read_image(file)
        size = (int(record.get("height") or image.shape[0]), int(record.get("width") or image.shape[1]))
        if image.shape[:2] != size:  # annotated as stored, before EXIF turned it
            image = read_image(file, orient=False)
        if image.shape[:2] != size:
            raise ImageError(f"the image is {image.shape[1]} x {image.shape[0]} pixels, the json says {size[1]} x {size[0]}", where=file)
        if not self.has_masks:
            return Sample(record["file_name"], image)
        masks = [decode_segmentation(a["segmentation"], *size) for a in self._annotations[record["id"]]]
        masks = [m for m in masks if m.any()]
        return Sample(record["file_name"], image, np.stack(masks) if masks else np.zeros((0, *size), dtype=bool))

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def fingerprint(self) -> str:
        """The json's content, and paths, sizes and times of the images."""
        return workspace.fingerprint(["coco", workspace.sha256(self.path), self.has_masks,
                                      [[r["file_name"], *file_stamp(p)] for r, p in self._items]])


def _load(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        images, annotations = data["images"], data.get("annotations", [])
        for image in images:
            _ = image["id"], image["file_name"]
        for annotation in annotations:
            _ = annotation["image_id"]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UsageError(f"this is not a COCO json: {type(e).__name__} {e}", where=path,
                         hint='it should hold {"images": [{"id", "file_name", ...}], "annotations": [{"image_id", "segmentation"}]}') from e
    return images, annotations


def _image_folders(path: Path) -> list[Path]:
    here, above = path.parent, path.parent.parent
    coco_style = path.stem.split("_", 1)[-1]  # instances_val2017 -> val2017
    folders = [here, here / "images", here / coco_style, above, above / "images", above / coco_style, above / "images" / coco_style]
    return [f for f in dict.fromkeys(folders) if f.is_dir()]


def _locate(file_name: str, folders: Sequence[Path]) -> Path | None:
    return next((f / file_name for f in folders if (f / file_name).is_file()), None)


def decode_segmentation(segmentation: Any, height: int, width: int) -> np.ndarray:
    """A COCO `segmentation` (polygons, RLE counts or compressed RLE) -> (H, W) bool."""
    if isinstance(segmentation, list):
        mask = np.zeros((height, width), dtype=bool)
        for polygon in segmentation:
            mask |= fill_polygon(np.asarray(polygon, dtype=float).reshape(-1, 2), height, width)
        return mask
    counts = segmentation["counts"]
    return runs_to_mask(counts if isinstance(counts, list) else decompress_counts(counts), *segmentation["size"])


def fill_polygon(corners: np.ndarray, height: int, width: int) -> np.ndarray:
    """(N, 2) xy corners -> (H, W) bool: the pixels whose centre lies inside (even-odd rule).

    Drawing libraries also colour the pixels that the outline touches, half a pixel too much on every side.
    """
    mask = np.zeros((height, width), dtype=bool)
    x0, y0 = corners.T
    x1, y1 = np.roll(corners, -1, axis=0).T
    first, last = max(0, int(np.floor(y0.min()))), min(height, int(np.ceil(y0.max())) + 1)
    for row in range(first, last):
        y = row + 0.5
        crosses = (y0 <= y) != (y1 <= y)
        at = np.sort(x0[crosses] + (y - y0[crosses]) / (y1[crosses] - y0[crosses]) * (x1[crosses] - x0[crosses]))
        edges = np.clip(np.ceil(at - 0.5).astype(int), 0, width)
        for left, right in zip(edges[::2], edges[1::2], strict=True):
            mask[row, left:right] = True
    return mask


def runs_to_mask(counts: Sequence[int], height: int, width: int) -> np.ndarray:
    """Run lengths down the columns, starting with background -> (H, W) bool."""
    values = np.arange(len(counts)) % 2 == 1
    flat = np.repeat(values, np.asarray(counts, dtype=int))
    if flat.size != height * width:
        raise UsageError(f"a run-length mask has {flat.size} pixels, not {height} x {width}")
    return flat.reshape(width, height).T.copy()


def decompress_counts(text: str | bytes) -> list[int]:
    """COCO's compressed run lengths: 5 bits a character (from '0' on, bit 6 = more follow, sign in the last one's
    bit 5); from the fourth run on, the difference to the run two before."""
    counts: list[int] = []
    value = shift = 0
    for character in text.encode() if isinstance(text, str) else text:
        bits = character - 48
        value |= (bits & 0x1F) << shift
        shift += 5
        if bits & 0x20:
            continue
        if bits & 0x10:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    return counts
