"""What segment-everything found, as files: a JSON list in the shape of SAM's own, with COCO run lengths, and a picture of it."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edgekd.data.images import read_image
from edgekd.errors import UsageError
from edgekd.protocols import Promptable
from edgekd.tasks.promptable.everything import Everything, Mode, Segment, Settings, everything
from edgekd.workspace import atomic_path, write_atomic

COLOURS = ((0, 158, 115), (230, 159, 0), (86, 180, 233), (204, 121, 167), (213, 94, 0), (0, 114, 178), (240, 228, 66))
"""Okabe and Ito, "Color Universal Design" (2008): told apart by the colour-blind as well."""
FILL = 0.45
LONGEST = 1280
"""Of the picture, in pixels."""


def record(segment: Segment, found: Everything) -> dict[str, Any]:
    """One mask as SAM's automatic mask generator describes it; `box_prompt` [x, y, w, h] takes the place of `point_coords` where a box asked."""
    prompt: dict[str, Any] = {"point_coords": [list(segment.click)] if segment.click else []}
    if segment.box:
        x0, y0, x1, y1 = segment.box
        prompt["box_prompt"] = [x0, y0, x1 - x0, y1 - y0]
    return {"segmentation": segment.rle, "bbox": segment.bbox, "area": segment.area, "predicted_iou": round(segment.predicted_iou, 6),
            "stability_score": round(segment.stability_score, 6), **prompt, "crop_box": [0, 0, found.width, found.height]}


def save_everything(found: Everything, path: str | Path, *, image: np.ndarray | None = None) -> Path:
    """Write the JSON list, atomically, and with `image` (H, W, 3) uint8 the picture beside it (the same name with .png).

    Raises:
        UsageError: the file cannot be written.
    """
    path = Path(path)
    try:
        write_atomic(path, json.dumps([record(s, found) for s in found], indent=1) + "\n")
        if image is not None:
            with atomic_path(path.with_suffix(".png")) as temp, open(temp, "wb") as file:
                draw(image, found).save(file, format="PNG")
    except OSError as e:
        raise UsageError(f"the masks cannot be written: {e.strerror or e}", where=path, hint="name another file with --output") from e
    return path


def draw(image: np.ndarray, found: Everything) -> Image.Image:
    """The photo, at most `LONGEST` wide or high, with every mask filled and outlined, small ones on top of large ones."""
    scale = min(1.0, LONGEST / max(found.height, found.width))
    size = (max(1, round(found.width * scale)), max(1, round(found.height * scale)))
    photo = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR), dtype=np.float32)
    canvas = photo.copy()
    for i, segment in enumerate(sorted(found, key=lambda s: -s.area)):
        mask = np.asarray(Image.fromarray(segment.mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)) > 127
        colour = np.asarray(COLOURS[i % len(COLOURS)], dtype=np.float32)
        canvas[mask] = photo[mask] * (1 - FILL) + colour * FILL  # not on top of the larger mask's colour: the photo stays visible
        canvas[_edge(mask)] = colour * 0.6
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8))


def _edge(mask: np.ndarray) -> np.ndarray:
    """(h, w) bool: the mask's pixels with a 4-neighbour outside it; the picture's border is not an edge."""
    wide = np.pad(mask, 1, mode="edge")
    return mask & ~(wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:])


def everything_file(model: Promptable, photo: str | Path, output: str | Path, *, mode: Mode = "auto", settings: Settings | None = None) -> Everything:
    """`everything` on a file, saved with its picture beside it; the masks have the size of the photo as it is shown.

    Raises:
        UsageError: no such photo, a mode that the model does not have, or an output that cannot be written.
        ImageError: the photo cannot be read.
    """
    if not Path(photo).is_file():
        raise UsageError("there is no such photo", where=photo)
    if Path(output).suffix.lower() != ".json":
        raise UsageError(f"the masks are written as JSON, and '{Path(output).name}' does not end with .json", where=output, hint="give --output all.json")
    image = read_image(photo)
    found = everything(model, image, mode=mode, settings=settings)
    save_everything(found, output, image=image)
    return found
