"""Every odd kind of image file, made here, and the geometry between photo and model."""
from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from edgekd.data import images
from edgekd.data.images import Frame, ImageError, preprocess, read_image
from edgekd.errors import EdgekdError
from edgekd.protocols import Preprocess

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def quarters(width: int = 40, height: int = 20) -> Image.Image:
    """Red top left, green top right, blue bottom left, white bottom right."""
    image = Image.new("RGB", (width, height), WHITE)
    image.paste(RED, (0, 0, width // 2, height // 2))
    image.paste(GREEN, (width // 2, 0, width, height // 2))
    image.paste(BLUE, (0, height // 2, width // 2, height))
    return image


def near(pixel: np.ndarray, colour: tuple[int, int, int], tolerance: int = 40) -> bool:
    return bool(np.abs(pixel.astype(int) - colour).max() <= tolerance)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif"])
def test_plain_formats(tmp_path: Path, suffix: str) -> None:
    quarters().save(tmp_path / f"a.{suffix}", quality=95)
    image = read_image(tmp_path / f"a.{suffix}")
    assert image.shape == (20, 40, 3) and image.dtype == np.uint8
    assert near(image[2, 2], RED) and near(image[2, -3], GREEN) and near(image[-3, 2], BLUE) and near(image[-3, -3], WHITE)
    image[0, 0] = 0  # a copy of its own, not a view of somebody's buffer


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_exif_orientation_turns_the_photo_upright(tmp_path: Path, orientation: int, suffix: str) -> None:
    undo = {1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}[orientation]
    stored = quarters() if undo is None else quarters().transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"a.{suffix}", exif=exif, quality=95)
    image = read_image(tmp_path / f"a.{suffix}")
    assert image.shape == (20, 40, 3)
    assert near(image[2, 2], RED) and near(image[2, -3], GREEN) and near(image[-3, 2], BLUE)
    assert read_image(tmp_path / f"a.{suffix}", orient=False).shape == (stored.height, stored.width, 3)


def test_a_nonsense_orientation_is_no_orientation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 99
    quarters().save(tmp_path / "a.jpg", exif=exif, quality=95)
    assert near(read_image(tmp_path / "a.jpg")[2, 2], RED)


def test_grey_and_two_level(tmp_path: Path) -> None:
    Image.fromarray(np.full((5, 7), 130, np.uint8)).save(tmp_path / "l.png")
    Image.fromarray(np.eye(6, dtype=bool)).save(tmp_path / "1.png")
    assert (read_image(tmp_path / "l.png") == 130).all()
    two = read_image(tmp_path / "1.png")
    assert two.shape == (6, 6, 3) and set(np.unique(two)) == {0, 255} and (two[0, 0] == 255).all()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_keeps_the_upper_8_bits(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 255, 256], [32768, 65535, 4096]], np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    assert (read_image(tmp_path / f"a.{suffix}")[..., 0] == values >> 8).all()


def test_floating_point_and_32_bit(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 0.5, 1.0, np.nan]], np.float32)).save(tmp_path / "unit.tif")
    Image.fromarray(np.array([[0, 100, 255, 300]], np.float32)).save(tmp_path / "byte.tif")
    Image.fromarray(np.array([[0, 7, 200, 255]], np.int32)).save(tmp_path / "int.tif")
    assert read_image(tmp_path / "unit.tif")[0, :, 0].tolist() == [0, 128, 255, 0]
    assert read_image(tmp_path / "byte.tif")[0, :, 0].tolist() == [0, 100, 255, 255]
    assert read_image(tmp_path / "int.tif")[0, :, 0].tolist() == [0, 7, 200, 255]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_composited_on_white(tmp_path: Path, mode: str) -> None:
    channels = {"RGBA": 4, "LA": 2}[mode]
    values = np.zeros((2, 3, channels), np.uint8)  # black everywhere
    values[:, :, -1] = [255, 0, 128]
    Image.fromarray(values, mode).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png")[0, :, 0].tolist() == [0, 255, 127]


def test_palettes_with_and_without_transparency(tmp_path: Path) -> None:
    palette = quarters().quantize(4)
    palette.save(tmp_path / "p.png")
    assert near(read_image(tmp_path / "p.png")[2, 2], RED, 8)
    palette.save(tmp_path / "t.png", transparency=palette.getpixel((2, 2)))
    assert near(read_image(tmp_path / "t.png")[2, 2], WHITE, 0) and near(read_image(tmp_path / "t.png")[2, -3], GREEN, 8)


def test_cmyk(tmp_path: Path) -> None:
    quarters().convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    quarters().convert("CMYK").save(tmp_path / "a.tif")
    for name in ("a.jpg", "a.tif"):
        image = read_image(tmp_path / name)
        assert near(image[2, 2], RED) and near(image[-3, -3], WHITE)


def test_lab_is_not_mistaken_for_transparency(tmp_path: Path) -> None:
    Image.new("LAB", (4, 3), (200, 128, 128)).save(tmp_path / "a.tif")
    assert read_image(tmp_path / "a.tif").shape == (3, 4, 3)


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    Image.new("RGB", (6, 4), RED).save(tmp_path / "a.webp", save_all=True, append_images=[Image.new("RGB", (6, 4), BLUE)], lossless=True)
    assert near(read_image(tmp_path / "a.webp")[0, 0], RED, 8)


def test_one_pixel(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), GREEN).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert image.shape == (1, 1, 3)
    pixels, frame = preprocess(image, Preprocess(64))
    assert pixels.shape == (3, 64, 64) and frame.resized == (64, 64)
    assert frame.mask_to_image(np.ones((16, 16))).shape == (1, 1)


def test_a_photo_as_large_as_phones_make_is_read_and_can_be_read_smaller(tmp_path: Path) -> None:
    Image.new("RGB", (12000, 8500), RED).save(tmp_path / "a.jpg", quality=30)  # above Pillow's own warning at 89 million
    small = read_image(tmp_path / "a.jpg", max_side=1024)
    assert small.shape == (725, 1024, 3) and near(small[5, 5], RED)
    assert Image.MAX_IMAGE_PIXELS is not None  # other people's protection is left alone


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_max_side_counts_after_turning_and_never_enlarges(tmp_path: Path, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    quarters(400, 200).save(tmp_path / f"a.{suffix}", exif=exif)
    assert read_image(tmp_path / f"a.{suffix}", max_side=50).shape == (50, 25, 3)
    assert read_image(tmp_path / f"a.{suffix}", max_side=9999).shape == (400, 200, 3)


def test_a_decompression_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))
    with pytest.raises(ImageError, match=r"60000 x 60000.*million") as e:
        read_image(tmp_path / "bomb.png", max_side=64)
    assert "bomb.png" in str(e.value) and "hint:" in str(e.value)


def _noise_file(suffix: str) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (120, 120, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, {"jpg": "JPEG"}.get(suffix, suffix.upper()))
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("max_side", [None, 16])
def test_truncated_files_raise_and_are_named(tmp_path: Path, suffix: str, max_side: int | None) -> None:
    data = _noise_file(suffix)
    for keep in (0.9, 0.5, 0.02):
        (tmp_path / f"cut.{suffix}").write_bytes(data[: int(len(data) * keep)])
        with pytest.raises(ImageError, match="cannot be read") as e:
            read_image(tmp_path / f"cut.{suffix}", max_side=max_side)
        assert f"cut.{suffix}" in str(e.value)


@pytest.mark.parametrize("data", [b"", b"hello", b"\xff\xd8\xff" + bytes(range(256)) * 2, b"\x89PNG\r\n\x1a\n" + bytes(50), b"II*\0" + bytes(40)])
def test_rubbish_raises_our_error_only(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "broken.jpg").write_bytes(data)
    with pytest.raises(ImageError) as e:
        read_image(tmp_path / "broken.jpg")
    assert isinstance(e.value, EdgekdError) and "broken.jpg" in str(e.value) and "\n" not in e.value.what


def test_random_damage_never_escapes(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for suffix in ("jpg", "png", "webp"):
        good = np.frombuffer(_noise_file(suffix), np.uint8)
        for _ in range(15):
            bad = good.copy()
            bad[rng.integers(0, len(bad), 20)] = rng.integers(0, 256, 20)
            (tmp_path / f"x.{suffix}").write_bytes(bad.tobytes())
            try:
                assert read_image(tmp_path / f"x.{suffix}").dtype == np.uint8
            except ImageError:
                pass


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="does not exist"):
        read_image(tmp_path / "none.png")
    with pytest.raises(ImageError):
        read_image(tmp_path)


def test_preprocess_places_normalises_and_pads() -> None:
    image = np.full((30, 60, 3), (10, 20, 30), np.uint8)
    spec = Preprocess(32, mean=(10, 10, 10), std=(1, 2, 4))
    pixels, frame = preprocess(image, spec)
    assert pixels.shape == (3, 32, 32) and pixels.dtype == np.float32 and frame.resized == (16, 32)
    assert np.allclose(pixels[:, :16], np.array([0, 5, 5])[:, None, None])
    assert (pixels[:, 16:] == 0).all()


@pytest.mark.parametrize("bad", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)])
def test_preprocess_refuses_what_is_no_rgb_photo(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected"):
        preprocess(bad, Preprocess(32))


def test_extreme_shapes_keep_at_least_a_pixel() -> None:
    pixels, frame = preprocess(np.zeros((2, 3000, 3), np.uint8), Preprocess(64))
    assert frame.resized == (1, 64) and pixels.shape == (3, 64, 64)
    assert frame.mask_to_image(np.zeros((16, 16))).shape == (2, 3000)


def test_points_follow_the_photo_to_the_half_pixel() -> None:
    frame = Frame(height=100, width=200, side=50)
    assert frame.scale == 0.25
    # a prompt encoder adds 0.5 and divides by S: the corners of the photo come to lie on the corners of its part of the frame
    assert ((frame.to_model([[0, 0], [200, 100]]) + 0.5) / 50).tolist() == [[0, 0], [1, 0.5]]
    odd = Frame(height=101, width=200, side=50)  # 25.25 rows become 25
    assert odd.to_model([0, 101])[1] == pytest.approx(24.5)
    assert frame.to_model(np.zeros((3, 4, 2))).shape == (3, 4, 2)


@pytest.mark.parametrize(("height", "width", "size"), [(321, 481, 256), (481, 321, 256), (100, 100, 64), (31, 17, 64), (700, 1000, 128), (1, 90, 32)])
def test_mask_to_image_is_torch_interpolate_twice(height: int, width: int, size: int) -> None:
    frame = Frame(height, width, size)
    logits = np.random.default_rng(0).normal(size=(2, size // 4, size // 4)).astype(np.float32)
    h, w = frame.resized
    large = F.interpolate(torch.from_numpy(logits)[None], (size, size), mode="bilinear", align_corners=False)[..., :h, :w]
    expected = F.interpolate(large, (height, width), mode="bilinear", align_corners=False)[0].numpy()
    assert np.allclose(frame.mask_to_image(logits), expected, atol=1e-4)
    assert np.allclose(frame.mask_to_image(logits[0]), expected[0], atol=1e-4)


def test_a_mask_comes_back_where_it_was() -> None:
    frame = Frame(200, 300, 256)
    truth = np.zeros((200, 300, 3), np.uint8)
    truth[40:120, 90:210] = 255
    pixels, _ = preprocess(truth, Preprocess(256, mean=(127.5,) * 3, std=(1.0,) * 3))
    back = frame.mask_to_image(pixels[0].reshape(64, 4, 64, 4).mean((1, 3))) > 0
    assert (back == (truth[..., 0] > 0)).mean() > 0.995


def test_reading_is_safe_from_threads(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    limit = Image.MAX_IMAGE_PIXELS
    quarters(300, 200).save(tmp_path / "a.png")
    with ThreadPoolExecutor(8) as pool:
        shapes = set(pool.map(lambda _: read_image(tmp_path / "a.png").shape, range(50)))
    assert shapes == {(200, 300, 3)} and limit == Image.MAX_IMAGE_PIXELS
    assert images.MAX_PIXELS > 200_000_000
