"""Photos with instance masks in COCO's or LVIS's JSON: polygons, uncompressed RLE and compressed RLE."""
from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as pycoco

from edgekd import workspace
from edgekd.data.checks import file_stamp, problems, warn_skipped
from edgekd.data.images import ImageError, read_image
from edgekd.errors import UsageError
from edgekd.protocols import Sample

FORM = 'it should hold {"images": [{"id", "file_name" or "coco_url", ...}], "annotations": [{"image_id", "segmentation"}]}'
SPLITS = ("train2017", "val2017", "test2017", "train2014", "val2014")
CHECKED_AT_ONCE = 64


class Coco:
    """The images of a COCO or LVIS json, in the order of the file, with one mask an annotation.

    Images are looked for by their name (LVIS: by the end of `coco_url`) in the folder given, or else beside the json, in `images/`, in
    the folder above, and in the folders of COCO's splits there. `iscrowd` annotations (many objects in one mask) are no instances; they are
    kept for COCO's AP and AR, where what lies on them counts neither way (`annotations`). LVIS's lists of categories that were looked for
    and not found are kept in `record`.

    Args:
        images: the folder that holds the images, or the folders of the splits that do.
        limit: stop after so many readable images.

    Raises:
        UsageError: not such a json, a run-length mask of another size than its image, or none of its images can be found and read.
    """

    def __init__(self, path: str | Path, *, masks: bool = True, images: str | Path | None = None, limit: int | None = None) -> None:
        self.path = Path(path)
        data = _load(self.path)
        self.categories = {c["id"]: str(c.get("name", c["id"])) for c in data["categories"]}
        by_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        for annotation in data["annotations"]:
            if annotation.get("segmentation"):
                by_image[annotation["image_id"]].append(annotation)
        self.skipped: list[str] = []
        self._items: list[tuple[dict[str, Any], Path]] = []
        folders = _image_folders(self.path, Path(images).expanduser() if images else None)
        self._keep_readable(data["images"], folders, len(data["images"]) if limit is None else limit)
        self.name = self.path.stem + (f"[:{limit}]" if limit is not None and limit < len(data["images"]) else "")
        warn_skipped(self.name, self.skipped)
        if not self._items:
            raise UsageError(f"none of the {len(data['images'])} images named in this file can be found and read", where=self.path,
                             hint=f"looked in {', '.join(str(f) for f in folders)}")
        self.image_ids = frozenset(r["id"] for r in data["images"])
        self._annotations = {r["id"]: by_image[r["id"]] for r, _ in self._items} if masks else {}
        self.has_masks = any(not a.get("iscrowd") for found in self._annotations.values() for a in found)

    def _keep_readable(self, records: Sequence[dict[str, Any]], folders: Sequence[Path], limit: int) -> None:
        """Check in blocks, so that a small `limit` on a large file decodes only what it needs."""
        for start in range(0, len(records), CHECKED_AT_ONCE):
            located = [(r, _locate(r, folders)) for r in records[start:start + CHECKED_AT_ONCE]]
            reasons = iter(problems([p for _, p in located if p]))
            for record, file in located:
                reason = next(reasons) if file else "the image does not exist"
                if len(self._items) == limit:
                    return
                if file and reason is None:
                    self._items.append((record, file))
                else:
                    self.skipped.append(f"{image_name(record)}: {reason}")

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Sample:
        record, file = self._items[index]
        name, image = image_name(record), read_image(file)
        size = (int(record.get("height") or image.shape[0]), int(record.get("width") or image.shape[1]))
        if image.shape[:2] != size:  # annotated as stored, before EXIF turned it
            image = read_image(file, orient=False)
        if image.shape[:2] != size:
            raise ImageError(f"the image is {image.shape[1]} x {image.shape[0]} pixels, the json says {size[1]} x {size[0]}", where=file)
        if not self.has_masks:
            return Sample(name, image)
        wanted = [a for a in self._annotations[record["id"]] if not a.get("iscrowd")]
        masks = [decode_segmentation(a["segmentation"], *size, where=f"{self.path}, annotation {a.get('id')}") for a in wanted]
        masks = [m for m in masks if m.any()]
        return Sample(name, image, np.stack(masks) if masks else np.zeros((0, *size), dtype=bool))

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def record(self, index: int) -> dict[str, Any]:
        """The image's entry in the json."""
        return self._items[index][0]

    def annotations(self, index: int) -> list[dict[str, Any]]:
        """The image's annotations as the json has them, crowds included."""
        return self._annotations.get(self._items[index][0]["id"], [])

    def fingerprint(self) -> str:
        """The json's content, and paths, sizes and times of the images."""
        return workspace.fingerprint(["coco", workspace.sha256(self.path), self.has_masks,
                                      [[image_name(r), *file_stamp(p)] for r, p in self._items]])


def image_name(record: dict[str, Any]) -> str:
    """The `file_name` of an image's entry; LVIS has only an address, whose last part names the file."""
    return str(record.get("file_name") or str(record["coco_url"]).rsplit("/", 1)[-1])


def _load(path: Path) -> dict[str, Any]:
    """`images`, `annotations` and `categories` of a json that is checked as far as it is used."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(data, list) and data and isinstance(data[0], dict) and "score" in data[0]:
            raise UsageError("this is not a COCO json but a list of detections", where=path, hint="give the ground truth as the data and these with --boxes")
        found = {"images": data["images"], "annotations": data.get("annotations", []), "categories": data.get("categories", [])}
        sizes = {r["id"]: [r.get("height"), r.get("width")] for r in found["images"] if image_name(r)}
        categories = {c["id"] for c in found["categories"]}
        for annotation in found["annotations"]:
            size = sizes.get(annotation["image_id"])
            segmentation = annotation.get("segmentation")
            if isinstance(segmentation, dict) and size and None not in size and list(segmentation["size"]) != size:
                raise UsageError(f"a run-length mask is {segmentation['size']}, its image {size} (height, width)",
                                 where=f"{path}, annotation {annotation.get('id')}")
            if categories and annotation.get("category_id", next(iter(categories))) not in categories:
                raise UsageError(f"annotation {annotation.get('id')} is of category {annotation['category_id']}, which this COCO json does not list", where=path)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UsageError(f"this is not a COCO json: {type(e).__name__} {e}", where=path, hint=FORM) from e
    if not found["images"]:
        raise UsageError("this COCO json names no images", where=path, hint=FORM)
    return found


def _image_folders(path: Path, given: Path | None) -> list[Path]:
    if given is not None:
        if not given.is_dir():
            raise UsageError("there is no folder of images here", where=given)
        return [given, *(given / s for s in SPLITS if (given / s).is_dir())]
    coco_style = path.stem.split("_", 1)[-1]  # instances_val2017 -> val2017
    roots = [base / sub for base in (path.parent, path.parent.parent) for sub in ("", "images")]
    folders = [root / sub for root in roots for sub in ("", coco_style, *SPLITS)]
    return [f for f in dict.fromkeys(folders) if f.is_dir()]


def _locate(record: dict[str, Any], folders: Sequence[Path]) -> Path | None:
    """By the name as it is (it may hold folders) or by its last part."""
    name = image_name(record)
    url = str(record.get("coco_url") or "").split("/")
    names = dict.fromkeys([name, Path(name).name, *(["/".join(url[-2:]), url[-1]] if url[-1] else [])])
    return next((f / n for n in names for f in folders if (f / n).is_file()), None)


def decode_segmentation(segmentation: Any, height: int, width: int, *, where: object = None) -> np.ndarray:
    """A COCO `segmentation` (polygons, RLE counts or compressed RLE) -> (H, W) bool.

    Raises:
        UsageError: it is neither, or run lengths of another size.
    """
    try:
        if isinstance(segmentation, list):
            return fill_polygons(segmentation, height, width)
        size, counts = tuple(segmentation["size"]), segmentation["counts"]
        if size != (height, width):
            raise UsageError(f"a run-length mask is {size[0]} x {size[1]}, not {height} x {width}")
        return runs_to_mask(counts if isinstance(counts, list) else decompress_counts(counts), height, width)
    except UsageError as e:
        raise UsageError(e.what, where=where) from e
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as e:
        raise UsageError(f"a segmentation is neither polygons nor run lengths: {type(e).__name__} {e}", where=where) from e


def fill_polygons(polygons: Sequence[Sequence[float]], height: int, width: int) -> np.ndarray:
    """Polygons [x, y, x, y, ...] -> (H, W) bool, their union, drawn by pycocotools as in every published COCO number.

    Fewer than three corners enclose nothing. (pycocotools would read four numbers as a box.)
    """
    corners = [np.asarray(p, dtype=np.float64) for p in polygons]
    corners = [c for c in corners if c.size >= 6 or c.ndim != 1]
    if any(c.ndim != 1 or c.size % 2 or not np.isfinite(c).all() or np.abs(c).max() > 10 * (height + width) for c in corners):
        raise UsageError(f"a polygon is no list of x, y, x, y, ... in or near its {width} x {height} image")
    if not corners:
        return np.zeros((height, width), dtype=bool)
    return np.asarray(pycoco.decode(pycoco.merge(pycoco.frPyObjects([c.tolist() for c in corners], height, width)))).astype(bool)


def runs_to_mask(counts: Sequence[int], height: int, width: int) -> np.ndarray:
    """Run lengths down the columns, starting with background -> (H, W) bool."""
    runs = np.asarray(counts, dtype=np.int64)
    if (runs.size and runs.min() < 0) or runs.sum() != height * width:
        raise UsageError(f"a run-length mask has {runs.sum()} pixels, not {height} x {width}")
    return np.repeat(np.arange(runs.size) % 2 == 1, runs).reshape(width, height).T.copy()


def decompress_counts(text: str | bytes) -> list[int]:
    """COCO's compressed run lengths: 5 bits a character (from '0' on, bit 6 = more follow, sign in the last one's
    bit 5); from the fourth run on, the difference to the run two before.

    Not by pycocotools, which reads beyond the end of a string that is cut short.
    """
    bits = np.frombuffer(text.encode("latin-1") if isinstance(text, str) else bytes(text), dtype=np.uint8).astype(np.int64) - 48
    if not bits.size:
        return []
    ends = np.flatnonzero((bits & 0x20) == 0)
    if bits.min() < 0 or bits.max() > 63 or not ends.size or ends[-1] != bits.size - 1:
        raise UsageError("these are not compressed run lengths, or they are cut short")
    starts = np.concatenate([[0], ends[:-1] + 1])
    place = 5 * (np.arange(bits.size) - np.repeat(starts, ends - starts + 1))
    if place.max() > 50:
        raise UsageError("these are not compressed run lengths: a run has too many digits")
    values = np.add.reduceat((bits & 0x1F) << place, starts)
    values -= np.where(bits[ends] & 0x10, 1 << (place[ends] + 5), 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values.tolist()
