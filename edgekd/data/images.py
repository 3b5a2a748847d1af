"""Photos in and masks out: read any ordinary image file as RGB, bring it to a model's frame, bring masks back.

Coordinates are continuous everywhere: x runs from 0 (left edge of the photo) to W (right edge), so the centre of pixel
(column c, row r) is (c + 0.5, r + 0.5) and a box (x0, y0, x1, y1) covers columns x0 .. x1 - 1.
"""
from __future__ import annotations

import functools
import io
import math
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edgekd.errors import EdgekdError
from edgekd.protocols import Preprocess

MAX_PIXELS = 400_000_000
"""The largest image that is decoded: twice the largest phone sensor (200 MP). RGB of that size takes 1.2 GB."""

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
_open_lock = threading.Lock()
_TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
          6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}
"""EXIF orientation -> what turns the photo upright."""


class ImageError(EdgekdError):
    """An image file that cannot be read; `where` names it."""


def read_image(path: str | Path, *, max_side: int | None = None, orient: bool = True, data: bytes | None = None) -> np.ndarray:
    """Read an image file as (H, W, 3) uint8 RGB, turned upright by its EXIF orientation (unless `orient` is False).

    - 16-bit grey keeps its upper 8 bits: a fixed rule, because stretching the contrast of each image would make one
      bright pixel change all others.
    - Transparency is composited on white: the colours under transparent pixels are arbitrary (dropping alpha shows
      them), and cut-outs and icons are drawn for a white page.
    - CMYK (also Adobe's inverted kind), palette, two-level, floating-point (0..1 or 0..255) and grey become RGB. Colour
      profiles are not applied. Of animations, the first frame.
    - `max_side`: shrink so that the longer side is at most this; JPEGs are then decoded at a fraction of the cost.
    - `data`: the file's content, when it lies inside another file (a tar); `path` then only names it.

    Raises:
        ImageError: missing, truncated, not an image, or more than `MAX_PIXELS` pixels.
    """
    path = Path(path)
    try:
        with _open(path if data is None else io.BytesIO(data)) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ImageError(f"the image has {width} x {height} pixels, more than the {MAX_PIXELS // 10**6} million that are decoded",
                                 where=path, hint="shrink it first, or check that it is not a decompression bomb")
            ratio = min(1.0, max_side / max(width, height)) if max_side else 1.0
            if ratio < 1:  # JPEG only: decode at 1/2, 1/4 or 1/8, never below the size wanted
                image.draft(None, (math.ceil(width * ratio), math.ceil(height * ratio)))
            image.load()
            size = (max(1, round(width * ratio)), max(1, round(height * ratio)))
            rgb = _to_rgb(image)
            if ratio < 1:
                rgb = rgb.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
            return np.array(_upright(rgb, image) if orient else rgb)
    except ImageError:
        raise
    except FileNotFoundError as e:
        raise ImageError("the image does not exist", where=path) from e
    except Exception as e:  # Pillow's readers raise OSError, SyntaxError, ValueError, struct.error, zlib.error ... on bad bytes
        reason = str(e).replace(f" '{path}'", "").replace(repr(str(path)), "") or type(e).__name__
        raise ImageError(f"the image cannot be read: {reason}", where=path) from e


def _open(path: Path | io.BytesIO) -> Image.Image:
    """Open (header only) without Pillow's own, lower, pixel limit: a global, so it is lifted for this one call."""
    with _open_lock:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(path)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _upright(rgb: Image.Image, original: Image.Image) -> Image.Image:
    """Apply the EXIF orientation of `original`; unreadable EXIF counts as none."""
    try:
        orientation = original.getexif().get(0x0112, 1)
    except Exception:  # damaged metadata says nothing about the pixels
        return rgb
    return rgb.transpose(_TURNS[orientation]) if orientation in _TURNS else rgb


def _to_rgb(image: Image.Image) -> Image.Image:
    """A loaded image of any Pillow mode as RGB."""
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_8_bit(np.asarray(image))).convert("RGB")
    if "A" in image.mode.upper().replace("LAB", "") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    return image.convert("RGB")


def _to_8_bit(values: np.ndarray) -> np.ndarray:
    """(H, W) uint16, int32 or float -> uint8. Integers above 255 are taken as 16-bit, floats up to 1 as 0..1."""
    if values.dtype.kind == "f":
        values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
        values = values * 255 if values.size and values.max() <= 1 else values
        return np.clip(np.rint(values), 0, 255).astype(np.uint8)
    sixteen_bit = values.dtype.itemsize == 2 or (values.size > 0 and values.max() > 255)
    return (np.clip(values, 0, 65535) >> 8 if sixteen_bit else np.clip(values, 0, 255)).astype(np.uint8)


@dataclass(frozen=True)
class Frame:
    """How a photo of `height` x `width` lies in a square of `side` pixels: long side = `side`, at the top left, or stretched to fill it, or
    with its middle (`crop` of the short side) only."""

    height: int
    width: int
    side: int
    stretch: bool = False
    crop: float | None = None

    @property
    def window(self) -> tuple[int, int, int, int]:
        """(top, left, height, width) of what is seen of the photo, in its pixels."""
        if self.crop is None:
            return 0, 0, self.height, self.width
        side = max(1, int(min(self.height, self.width) * self.crop + 0.5))
        return (self.height - side) // 2, (self.width - side) // 2, side, side

    @property
    def scale(self) -> float:
        """Pixels of the square per photo pixel along the long side."""
        return self.side / max(self.height, self.width)

    @property
    def resized(self) -> tuple[int, int]:
        """(height, width) of the photo inside the square; the rest is padding."""
        if self.stretch or self.crop is not None:
            return self.side, self.side
        return max(1, int(self.height * self.scale + 0.5)), max(1, int(self.width * self.scale + 0.5))

    @property
    def ratio(self) -> np.ndarray:
        """(2,) xy: pixels of the square per photo pixel, exact for each axis, since the short side was rounded to whole pixels."""
        (height, width), (_, _, seen_height, seen_width) = self.resized, self.window
        return np.array([width / seen_width, height / seen_height])

    def to_model(self, points: Any) -> np.ndarray:
        """(..., 2) xy in the photo -> (..., 2) float32 xy as prompt encoders take them.

        SAM's prompt encoder counts pixel centres from 0 and adds half a pixel itself, hence - 0.5: a click and a box edge end up
        exactly where they are.
        """
        top, left, _, _ = self.window
        return ((np.asarray(points, dtype=np.float64) - [left, top]) * self.ratio - 0.5).astype(np.float32)

    def mask_to_image(self, logits: np.ndarray) -> np.ndarray:
        """(..., s, s) logits covering the whole square -> (..., H, W) float32 over the photo.

        Exactly SAM's post-processing (`interpolate` to the square, crop the padding, `interpolate` to H x W; both bilinear
        with align_corners=False). Both steps are linear and work per axis, so here they are one small matrix per axis.
        """
        if self.crop is not None:
            raise ValueError("a model that sees the middle of a photo only gives no masks of all of it")
        logits = np.asarray(logits, dtype=np.float32)
        height, width = self.resized
        rows = _upsampling(logits.shape[-2], self.side, height, self.height)
        columns = _upsampling(logits.shape[-1], self.side, width, self.width)
        return (rows @ logits) @ columns.T


def _interpolation(size_in: int, size_out: int) -> np.ndarray:
    """(size_out, size_in): `interpolate(mode="bilinear", align_corners=False)` along one axis, as a matrix."""
    source = np.maximum((np.arange(size_out) + 0.5) * (size_in / size_out) - 0.5, 0.0)
    low = np.minimum(source.astype(int), size_in - 1)
    high = np.minimum(low + 1, size_in - 1)
    matrix = np.zeros((size_out, size_in))
    index = np.arange(size_out)
    np.add.at(matrix, (index, low), 1 - (source - low))
    np.add.at(matrix, (index, high), source - low)
    return matrix


@functools.lru_cache(maxsize=64)
def _upsampling(mask_size: int, side: int, resized: int, original: int) -> np.ndarray:
    """(original, mask_size) float32: mask grid -> square -> cropped -> photo, along one axis."""
    to_input = _interpolation(mask_size, side)[:resized]
    return (_interpolation(resized, original) @ to_input).astype(np.float32)


def preprocess(image: np.ndarray, spec: Preprocess) -> tuple[np.ndarray, Frame]:
    """(H, W, 3) uint8 RGB -> (3, S, S) float32 model input and the frame that maps prompts and masks (`spec.side` wide).

    Pillow's bilinear filter (antialiased when shrinking, as in SAM), then normalisation, then zero padding at the right
    and bottom: padding is 0 *after* normalisation, i.e. the mean colour. A middle crop is cut out first, in whole pixels, and then resized.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"expected a (H, W, 3) uint8 image, not {image.shape} {image.dtype}")
    inner = Frame(image.shape[0], image.shape[1], spec.image_size, spec.fit == "stretch", spec.crop if spec.fit == "crop" else None)
    (height, width), (top, left, seen_height, seen_width) = inner.resized, inner.window
    seen = Image.fromarray(image[top:top + seen_height, left:left + seen_width])
    small = np.asarray(seen.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32)
    normal = (small - np.asarray(spec.mean, dtype=np.float32)) / np.asarray(spec.std, dtype=np.float32)
    out = np.zeros((3, spec.image_size, spec.image_size), dtype=np.float32)
    out[:, :height, :width] = normal.transpose(2, 0, 1)
    return out, replace(inner, side=spec.side)
