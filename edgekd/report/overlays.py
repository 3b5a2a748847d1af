"""Pictures of what the masks look like: photo with its prompts | the teacher's masks | the student's. numpy and Pillow only."""
from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from edgekd.protocols import BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, NEGATIVE, POSITIVE
from edgekd.report.figures import Overlay, Panel

Colour: TypeAlias = tuple[int, int, int]

# Told apart by the colour-blind as well (Okabe and Ito, "Color Universal Design", 2008), in an order that starts apart.
PALETTE: tuple[Colour, ...] = ((0, 158, 115), (230, 159, 0), (86, 180, 233), (204, 121, 167), (213, 94, 0), (0, 114, 178), (240, 228, 66))
FILL = 0.42
SMOOTH = 2  # drawn this much larger, then reduced: Pillow's lines have hard edges


def compare(image: NDArray[np.uint8], teacher: NDArray[np.bool_], student: NDArray[np.bool_], points: NDArray[np.float32],
            labels: NDArray[np.float32], *, title: str, names: tuple[str, str] = ("teacher", "student"), width: int = 480) -> Overlay:
    """One photo, prompted P times: three panels and the IoU between the two masks of each prompt as the caption.

    Args:
        image: (H, W, 3) uint8.
        teacher: (P, H, W) bool.
        student: (P, H, W) bool.
        points: (P, N, 2) x, y in pixels of the photo.
        labels: (P, N) SAM point labels: 1 and 0 clicks, 2 and 3 box corners, negative ones are not drawn.
        title: usually the file's name.
        names: what the two models are called.
        width: of a panel, in pixels.
    """
    if teacher.shape != student.shape or teacher.shape[1:] != image.shape[:2] or len(points) != len(teacher):
        raise ValueError(f"shapes do not match: image {image.shape}, teacher {teacher.shape}, student {student.shape}, points {points.shape}")
    empty = np.zeros_like(teacher)
    drawn = zip(("photo", *names), (empty, teacher, student), strict=True)
    agree = [iou(t, s) for t, s in zip(teacher, student, strict=True)]
    caption = f"agreement {np.mean(agree):.2f}" + (f" over {len(agree)} prompts" if len(agree) > 1 else "") if agree else "no prompts"
    return Overlay(title, caption, tuple(Panel(name, jpeg(draw(image, masks, points, labels, width=width))) for name, masks in drawn))


def draw(image: NDArray[np.uint8], masks: NDArray[np.bool_], points: NDArray[np.float32], labels: NDArray[np.float32], *,
         width: int = 480) -> Image.Image:
    """The photo with each mask filled and outlined in its colour, and its prompt on top.

    Args:
        image: (H, W, 3) uint8.
        masks: (P, H, W) bool.
        points: (P, N, 2) x, y in pixels of the photo.
        labels: (P, N).
        width: of the result; its height keeps the photo's shape.
    """
    height = max(1, round(image.shape[0] * width / image.shape[1]))
    size = (width * SMOOTH, height * SMOOTH)
    canvas = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC), np.float32)  # (h, w, 3)
    for i, mask in enumerate(masks):
        canvas = _paint(canvas, _resized(mask, size), np.asarray(PALETTE[i % len(PALETTE)], np.float32))
    picture = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for i, (xy, label) in enumerate(zip(np.asarray(points, float), np.asarray(labels), strict=True)):
        _prompt(pen, xy * (size[0] / image.shape[1]), label, PALETTE[i % len(PALETTE)])
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def iou(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    """Intersection over union of two masks (H, W); two empty masks agree."""
    union = int(np.logical_or(a, b).sum())
    return int(np.logical_and(a, b).sum()) / union if union else 1.0


def jpeg(picture: Image.Image, quality: int = 84) -> bytes:
    """JPEG bytes, the same for the same picture."""
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=quality, optimize=True, subsampling=0)
    return out.getvalue()


def _resized(mask: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    grey = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)
    return np.asarray(grey) > 127


def _paint(canvas: NDArray[np.float32], mask: NDArray[np.bool_], colour: NDArray[np.float32]) -> NDArray[np.float32]:
    """Fill (h, w) lightly, and draw its edge in full colour with a white hairline around it, which shows on any photo."""
    inner, outer = _eroded(mask, 2 * SMOOTH), ~_eroded(~mask, SMOOTH)
    fill = mask[..., None]
    painted = np.where(fill, canvas * (1 - FILL) + colour * FILL, canvas)
    painted = np.where((outer & ~mask)[..., None], np.float32(255), painted)
    return np.where((mask & ~inner)[..., None], colour, painted).astype(np.float32)


def _eroded(mask: NDArray[np.bool_], by: int) -> NDArray[np.bool_]:
    """The mask without its `by` outermost pixels (4-neighbours); the border of the picture is not an edge."""
    for _ in range(by):
        wide = np.pad(mask, 1, mode="edge")
        mask = mask & wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:]
    return mask


def _prompt(pen: ImageDraw.ImageDraw, xy: NDArray[np.float64], labels: NDArray[np.float32], colour: Colour) -> None:
    corners = {int(label): tuple(p) for p, label in zip(xy, labels, strict=True)}
    if BOX_TOP_LEFT in corners and BOX_BOTTOM_RIGHT in corners:
        (x0, y0), (x1, y1) = corners[BOX_TOP_LEFT], corners[BOX_BOTTOM_RIGHT]
        box = (min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))
        pen.rectangle(box, outline=(255, 255, 255), width=4 * SMOOTH)
        inset = (box[0] + SMOOTH, box[1] + SMOOTH, max(box[2] - SMOOTH, box[0] + SMOOTH), max(box[3] - SMOOTH, box[1] + SMOOTH))
        pen.rectangle(inset, outline=colour, width=2 * SMOOTH)
    for (x, y), label in zip(xy, labels, strict=True):
        if label in (POSITIVE, NEGATIVE):
            _click(pen, float(x), float(y), colour if label == POSITIVE else (200, 40, 40), plus=label == POSITIVE)


def _click(pen: ImageDraw.ImageDraw, x: float, y: float, colour: Colour, *, plus: bool) -> None:
    """A disc with + or -, so that the sign does not hang on the colour."""
    r, arm = 10 * SMOOTH, 5 * SMOOTH
    pen.ellipse((x - r, y - r, x + r, y + r), fill=colour, outline=(255, 255, 255), width=2 * SMOOTH)
    strokes: Sequence[tuple[float, float, float, float]] = [(x - arm, y, x + arm, y)] + ([(x, y - arm, x, y + arm)] if plus else [])
    for stroke in strokes:
        pen.line(stroke, fill=(255, 255, 255), width=2 * SMOOTH)
