"""What procedural scenes are painted with: shapes, textures, and the photos and cut-outs that the wheel ships."""
from __future__ import annotations

import functools
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

Rng = np.random.Generator
ASSETS = resources.files("edgekd.data") / "assets"
CELL, COLUMNS, CELLS = 80, 12, 144
"""the sprite sheet: 12 x 12 cut-outs of 80 px"""


@functools.lru_cache(maxsize=4)
def load_photos(folder: str = "") -> list[Image.Image]:
    """RGB photos of `folder`, or the ones the wheel ships."""
    root = Path(folder) if folder else Path(str(ASSETS)) / "photos"
    return [_in_memory(Image.open(p).convert("RGB"), 640) for p in sorted(root.glob("*.jpg"))]


@functools.lru_cache(maxsize=4)
def load_cutouts(folder: str = "") -> list[Image.Image]:
    """RGBA cut-outs of `folder`, or the ones the wheel ships; each cropped to what is visible."""
    if folder:
        images = [_in_memory(Image.open(p).convert("RGBA"), 200) for p in sorted(Path(folder).glob("*.png"))]
    else:
        sheet = Image.open(Path(str(ASSETS)) / "cutouts.webp").convert("RGBA")
        corners = [(i % COLUMNS * CELL, i // COLUMNS * CELL) for i in range(CELLS)]
        images = [sheet.crop((x, y, x + CELL, y + CELL)) for x, y in corners]
    cropped = [im.crop(box) for im in images if (box := im.getchannel("A").point(lambda a: 255 if a > 127 else 0).getbbox())]
    return [im for im in cropped if min(im.size) >= 12]


def _in_memory(image: Image.Image, long_side: int) -> Image.Image:
    image.thumbnail((long_side, long_side), Image.Resampling.BILINEAR)
    return image


def color(rng: Rng) -> np.ndarray:
    """(3,) a random colour, float 0..255."""
    return rng.uniform(0, 255, 3)


def noise(rng: Rng, height: int, width: int, octaves: int = 4) -> np.ndarray:
    """(H, W) float 0..1: octaves of smooth noise with a random roughness."""
    total, weight, roughness = np.zeros((height, width), np.float32), 0.0, rng.uniform(0.35, 0.9)
    first = int(rng.integers(2, 7))
    for octave in range(octaves):
        cells = min(first * 2**octave, max(height, width))
        grid = Image.fromarray(rng.random((cells, cells), np.float32))
        total += roughness**octave * np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC))
        weight += roughness**octave
    total /= weight
    low, high = float(total.min()), float(total.max())
    return (total - low) / max(high - low, 1e-6)


def noise_texture(rng: Rng, height: int, width: int) -> np.ndarray:
    """(H, W, 3) float: two or three colours mixed by smooth noise."""
    t = noise(rng, height, width)[..., None]
    a, b, c = color(rng), color(rng), color(rng)
    spread = rng.uniform(0.15, 1.0)  # low spread: nearly plain surfaces, as walls and skies are
    b, c = a + spread * (b - a), a + spread * (c - a)
    return np.where(t < 0.5, a + (b - a) * 2 * t, b + (c - b) * (2 * t - 1))


def stripes(rng: Rng, height: int, width: int) -> np.ndarray:
    """(H, W, 3) float: stripes or checks at a random angle."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    angle, period = rng.uniform(0, np.pi), rng.uniform(5, 40)
    u = np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / period)
    if rng.random() < 0.4:
        u = u * np.sin(2 * np.pi * (y * np.cos(angle) - x * np.sin(angle)) / period)
    t = (np.clip(u * rng.uniform(1, 8), -1, 1) * 0.5 + 0.5)[..., None]
    return color(rng) * (1 - t) + color(rng) * t


def photo_texture(rng: Rng, height: int, width: int, photos: list[Image.Image], zoom: float = 1.0) -> np.ndarray:
    """(H, W, 3) float: a random crop of a photo, flipped at random; `zoom` > 1 takes smaller crops."""
    photo = photos[int(rng.integers(len(photos)))]
    scale = max(width / photo.width, height / photo.height)
    share = min(1.0, rng.uniform(0.5, 1.0) / zoom)
    w, h = max(8, width / scale * share), max(8, height / scale * share)
    x, y = rng.uniform(0, max(photo.width - w, 1e-3)), rng.uniform(0, max(photo.height - h, 1e-3))
    crop = photo.resize((width, height), Image.Resampling.BILINEAR, box=(x, y, min(x + w, photo.width), min(y + h, photo.height)))
    array = np.asarray(crop, np.float32)
    return array[:, ::-1] if rng.random() < 0.5 else array


def jitter(rng: Rng, image: np.ndarray, strength: float = 1.0) -> np.ndarray:
    """Brightness, contrast, saturation and colour cast, float in and out."""
    grey = image.mean(axis=-1, keepdims=True)
    image = grey + (image - grey) * (1 + strength * rng.uniform(-0.6, 0.4))
    image = image.mean() + (image - image.mean()) * (1 + strength * rng.uniform(-0.4, 0.4))
    return image * (1 + strength * rng.uniform(-0.15, 0.15, 3)) + strength * rng.uniform(-40, 40)


def fill(rng: Rng, height: int, width: int, photos: list[Image.Image]) -> np.ndarray:
    """(H, W, 3) float: the surface of a shape."""
    kind = rng.random()
    if kind < 0.40 and photos:
        surface = jitter(rng, photo_texture(rng, height, width, photos, zoom=2.5))
    elif kind < 0.62:
        surface = noise_texture(rng, height, width)
    elif kind < 0.75:
        surface = stripes(rng, height, width)
    else:
        surface = np.broadcast_to(color(rng), (height, width, 3))
    if rng.random() < 0.6:  # shading from one side
        y, x = np.mgrid[:height, :width]
        angle = rng.uniform(0, 2 * np.pi)
        ramp = (x / width - 0.5) * np.cos(angle) + (y / height - 0.5) * np.sin(angle)
        surface = surface + ramp[..., None] * rng.uniform(20, 110)
    return surface


def shape(rng: Rng, height: int, width: int) -> np.ndarray:
    """(H, W) float 0..1: an anti-aliased ellipse, polygon, star, blob, box or ring that fills the rectangle."""
    k = 2  # drawn at double size, then reduced
    image = Image.new("L", (width * k, height * k))
    draw, box = ImageDraw.Draw(image), (0, 0, width * k - 1, height * k - 1)
    kind = rng.random()
    if kind < 0.15:
        draw.ellipse(box, fill=255)
    elif kind < 0.28:
        draw.rounded_rectangle(box, radius=rng.uniform(0, 0.4) * min(image.size), fill=255)
    elif kind < 0.36:
        draw.ellipse(box, fill=255)
        inset = rng.uniform(0.18, 0.32)
        draw.ellipse((box[2] * inset, box[3] * inset, box[2] * (1 - inset), box[3] * (1 - inset)), fill=0)
    else:
        draw.polygon(_outline(rng, kind, image.size), fill=255)
    image = image.rotate(rng.uniform(0, 360), Image.Resampling.BILINEAR) if rng.random() < 0.5 else image
    return np.asarray(image.resize((width, height), Image.Resampling.BOX), np.float32) / 255


def _outline(rng: Rng, kind: float, size: tuple[int, int]) -> list[tuple[float, float]]:
    """Polygon, star or smooth blob: radius as a function of the angle."""
    if kind < 0.52:
        angles = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(3, 9))))
        radius = rng.uniform(0.6, 1.0, len(angles))
    elif kind < 0.60:
        angles = np.linspace(0, 2 * np.pi, 2 * int(rng.integers(4, 9)), endpoint=False)
        radius = np.where(np.arange(len(angles)) % 2, rng.uniform(0.35, 0.65), 1.0)
    else:
        angles = np.linspace(0, 2 * np.pi, 72, endpoint=False)
        waves = sum(rng.normal(0, 0.28 / order) * np.cos(order * angles + rng.uniform(0, 6.3)) for order in range(1, 7))
        radius = np.clip(1 + waves, 0.3, None)
    radius = radius / radius.max()
    w, h = size
    return [((0.5 + 0.5 * r * np.cos(a)) * w, (0.5 + 0.5 * r * np.sin(a)) * h) for a, r in zip(angles, radius, strict=True)]
