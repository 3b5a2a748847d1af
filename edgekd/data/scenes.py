"""Procedural scenes with exact instance masks: shapes and cut-outs composited on photos, noise or a patchwork of regions.

`scenes:seed=1,count=100` is the same set of images everywhere (scene i of a seed depends on nothing else), needs no files
beyond the wheel, and may be redistributed with whatever is trained on it. Seeds from 70000 on are for testing only.
"""
from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageFilter

from edgekd.data import textures as tx
from edgekd.errors import UsageError, unknown
from edgekd.protocols import Sample
from edgekd.workspace import fingerprint

TEST_SEEDS = 70_000
VERSION = 1  # of the pictures: any change to them changes every fingerprint
Rng = np.random.Generator


class Scenes:
    """`count` scenes of long side `size`; `photos` and `cutouts` are folders used beside the shipped pictures."""

    def __init__(self, seed: int = 0, count: int = 100, size: int = 320, photos: str = "", cutouts: str = "") -> None:
        self.seed, self.count, self.size, self.photos, self.cutouts = seed, count, size, photos, cutouts
        self.name = f"scenes:seed={seed},count={count}" + (f",size={size}" if size != 320 else "")
        self.skipped: list[str] = []

    @classmethod
    def parse(cls, spec: str) -> Scenes:
        """From `scenes:seed=1,count=100[,size=320,photos=FOLDER,cutouts=FOLDER]`.

        Raises:
            UsageError: an unknown key, or a value that is no number.
        """
        kinds = {"seed": int, "count": int, "size": int, "photos": str, "cutouts": str}
        values: dict[str, int | str] = {}
        for part in filter(None, spec.removeprefix("scenes:").split(",")):
            key, _, value = part.partition("=")
            if key not in kinds:
                raise unknown("scenes key", key, kinds)
            try:
                values[key] = kinds[key](value)
            except ValueError as e:
                raise UsageError(f"'{value}' is not a number", where=f"{key} in {spec}", hint="scenes:seed=1,count=100") from e
        for key, low in (("count", 1), ("size", 64), ("seed", 0)):
            if int(values.get(key, low)) < low:
                raise UsageError(f"{key} must be at least {low}", where=spec)
        return cls(**values)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    @property
    def has_masks(self) -> bool:
        """Every scene has exact masks."""
        return True

    def fingerprint(self) -> str:
        """Of the generator's version and its arguments."""
        return fingerprint([VERSION, self.seed, self.count, self.size, self.photos, self.cutouts])

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.count:
            raise IndexError(index)
        rng = np.random.default_rng([self.seed, index])
        image, masks = paint(rng, self.size, self.photos, self.cutouts)
        return Sample(f"{self.seed}-{index:05d}", image, masks)


def paint(rng: Rng, size: int, photo_folder: str = "", cutout_folder: str = "") -> tuple[np.ndarray, np.ndarray]:
    """One scene: image (H, W, 3) uint8 and masks (K, H, W) bool of what is visible of each instance, K >= 1."""
    ratio = rng.uniform(0.62, 1.0)
    width, height = (size, round(size * ratio)) if rng.random() < 0.7 else (round(size * ratio), size)
    photos = tx.load_photos(photo_folder) if photo_folder and rng.random() < 0.8 else tx.load_photos()
    cutouts = tx.load_cutouts(cutout_folder) if cutout_folder and rng.random() < 0.8 else tx.load_cutouts()
    labels = np.zeros((height, width), np.int32)  # 0 is what nobody asks for
    kind = rng.random()
    if kind < 0.22:
        image, labels = patchwork(rng, height, width, photos)
        amount = int(rng.integers(0, 6))
    else:
        image = tx.photo_texture(rng, height, width, photos) if kind < 0.80 else tx.noise_texture(rng, height, width)
        image = tx.jitter(rng, image, 0.5)
        amount = int(rng.integers(3, 10))
    image = np.array(image, np.float32)
    drawn = np.bincount(labels.ravel(), minlength=1)
    areas = list(drawn)
    for _ in range(amount):
        areas.append(place(rng, image, labels, len(areas), photos, cutouts))
    visible = np.bincount(labels.ravel(), minlength=len(areas))
    # an instance counts when enough of it is left to see: 0.4 % of the image and 30 % of itself
    keep = [i for i in range(1, len(areas)) if visible[i] >= 0.004 * labels.size and visible[i] >= 0.3 * areas[i]]
    if not keep:
        return paint(rng, size, photo_folder, cutout_folder)
    return finish(rng, image), np.stack([labels == i for i in keep])


def patchwork(rng: Rng, height: int, width: int, photos: list[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
    """The image cut into 3 to 8 regions with wavy borders, each its own surface: (H, W, 3) float, labels (H, W) from 1."""
    count = int(rng.integers(3, 9))
    y, x = np.mgrid[:height, :width].astype(np.float32)
    wave = rng.uniform(5, 45)
    y, x = y + wave * (tx.noise(rng, height, width) - 0.5), x + wave * (tx.noise(rng, height, width) - 0.5)
    centres = rng.uniform(0, 1, (count, 2)) * (height, width)
    stretch = rng.uniform(0.5, 2.0)  # wide regions, as sky, field and road are, or tall ones
    distance = np.stack([(y - cy) ** 2 * stretch + (x - cx) ** 2 / stretch for cy, cx in centres])
    owner = distance.argmin(axis=0)
    image = np.zeros((height, width, 3), np.float32)
    for i in range(count):
        surface = tx.noise_texture(rng, height, width) if rng.random() < 0.4 else tx.fill(rng, height, width, photos)
        image[owner == i] = np.broadcast_to(surface, image.shape)[owner == i]
    return image, (owner + 1).astype(np.int32)


def place(rng: Rng, image: np.ndarray, labels: np.ndarray, label: int, photos: list[Image.Image], cutouts: list[Image.Image]) -> int:
    """Paint one object into `image` and `labels` (both changed); returns the pixels it covers before anything hides it."""
    height, width = labels.shape
    side = float(np.exp(rng.uniform(np.log(0.13), np.log(0.62)))) * max(height, width)
    aspect = float(np.exp(rng.uniform(-0.5, 0.5)))
    w, h = max(8, round(side * aspect**0.5)), max(8, round(side / aspect**0.5))
    if rng.random() < 0.5:
        surface, alpha = cut_out(rng, cutouts, round(side))
    else:
        alpha = tx.shape(rng, h, w)
        surface = np.broadcast_to(tx.fill(rng, h, w, photos), (h, w, 3))
    h, w = alpha.shape
    top, left = int(rng.uniform(-0.25 * h, height - 0.75 * h)), int(rng.uniform(-0.25 * w, width - 0.75 * w))
    y0, x0, y1, x1 = max(top, 0), max(left, 0), min(top + h, height), min(left + w, width)
    if y1 <= y0 or x1 <= x0:
        return 0
    if rng.random() < 0.25:  # a soft shadow, which belongs to nobody
        cast_shadow(rng, image, alpha, top, left)
    a = alpha[y0 - top : y1 - top, x0 - left : x1 - left, None]
    part = surface[y0 - top : y1 - top, x0 - left : x1 - left]
    image[y0:y1, x0:x1] = image[y0:y1, x0:x1] * (1 - a) + part * a
    solid = a[..., 0] >= 0.5
    labels[y0:y1, x0:x1][solid] = label
    return int(solid.sum())


def cut_out(rng: Rng, cutouts: list[Image.Image], side: int) -> tuple[np.ndarray, np.ndarray]:
    """A cut-out scaled to `side`, mirrored and turned at random: surface (h, w, 3), alpha (h, w) 0..1."""
    picture = cutouts[int(rng.integers(len(cutouts)))]
    scale = side / max(picture.size)
    picture = picture.resize((max(8, round(picture.width * scale)), max(8, round(picture.height * scale))), Image.Resampling.BILINEAR)
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.6:
        picture = picture.rotate(rng.normal(0, 25), Image.Resampling.BILINEAR, expand=True)
    array = np.asarray(picture, np.float32)
    return tx.jitter(rng, array[..., :3], rng.uniform(0, 1)), array[..., 3] / 255


def cast_shadow(rng: Rng, image: np.ndarray, alpha: np.ndarray, top: int, left: int) -> None:
    """Darken `image` (changed) beside an object."""
    canvas = Image.new("L", (image.shape[1], image.shape[0]))
    shift = rng.integers(-12, 13, 2)
    canvas.paste(Image.fromarray((alpha * 255).astype(np.uint8)), (left + int(shift[0]), top + int(shift[1])))
    shadow = np.asarray(canvas.filter(ImageFilter.BoxBlur(float(rng.uniform(2, 6)))), np.float32) / 255
    image *= 1 - rng.uniform(0.2, 0.6) * shadow[..., None]


def finish(rng: Rng, image: np.ndarray) -> np.ndarray:
    """What a camera adds: light, a little blur, noise and JPEG; float -> uint8."""
    image = tx.jitter(rng, image, 0.3)
    if rng.random() < 0.5:
        image = image + rng.normal(0, rng.uniform(1, 9), image.shape).astype(np.float32)
    picture = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
    if rng.random() < 0.4:
        picture = picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 1.3))))
    if rng.random() < 0.4:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=int(rng.integers(45, 92)))
        picture = Image.open(buffer).convert("RGB")
    return np.asarray(picture)
