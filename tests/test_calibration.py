from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from tiny import tiny_sam

from edgekd.data.images import preprocess
from edgekd.errors import UsageError
from edgekd.probes import COUNTS, KINDS, pictures, probe
from edgekd.protocols import BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, Preprocess, Sample
from edgekd.quantization.calibration import DecoderCalibration, EncoderCalibration


class Photos:
    """Photos made when asked for; remembers which were."""

    name, skipped, has_masks = "photos", [], False

    def __init__(self, count: int, side: int = 40) -> None:
        self.count, self.side, self.asked = count, side, []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        self.asked.append(index)
        return Sample(str(index), np.random.default_rng(index).integers(0, 256, (self.side, self.side * 2, 3), dtype=np.uint8))


SPEC = Preprocess(64)


def test_every_sample_is_one_preprocessed_photo():
    photos = Photos(3)
    found = list(EncoderCalibration(photos, SPEC))
    assert [s["images"].shape for s in found] == [(1, 3, 64, 64)] * 3
    np.testing.assert_array_equal(found[1]["images"][0], preprocess(Photos(3)[1].image, SPEC)[0])


def test_a_limit_spreads_over_the_data():
    photos = Photos(100)
    calibration = EncoderCalibration(photos, SPEC, limit=4)
    assert len(list(calibration)) == len(calibration) == 4
    assert photos.asked == [0, 25, 50, 75]


def test_it_can_be_iterated_again_and_gives_the_same():
    calibration = EncoderCalibration(Photos(5), SPEC)
    for a, b in zip(calibration, calibration, strict=True):
        np.testing.assert_array_equal(a["images"], b["images"])


def test_it_streams():
    """Nothing is read before it is asked for, and nothing is kept: memory does not grow with the number of photos."""
    photos = Photos(1000)
    calibration = EncoderCalibration(photos, SPEC, limit=1000)
    assert photos.asked == []
    next(iter(calibration))
    assert len(photos.asked) == 1
    peaks = []
    for count in (10, 200):
        tracemalloc.start()
        for _ in EncoderCalibration(Photos(count), SPEC, limit=count):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_no_images_is_one_clear_error():
    with pytest.raises(UsageError, match="image"):
        EncoderCalibration(Photos(0), SPEC)


def test_the_decoder_sees_every_kind_of_prompt():
    calibration = DecoderCalibration(EncoderCalibration(Photos(2), SPEC), tiny_sam(), prompts=3)
    found = list(calibration)
    assert len(found) == len(calibration) == 2 * len(KINDS)
    first = found[: len(KINDS)]
    assert {s["point_coords"].shape[1] for s in first} == {1, 2, 3}
    assert any(BOX_TOP_LEFT in s["point_labels"] and BOX_BOTTOM_RIGHT in s["point_labels"] for s in first)
    assert sorted(float(s["has_mask"].max()) for s in first) == [0, 0, 0, 0, 1]
    assert all(s["image_embeddings"].shape == (1, 32, 4, 4) and len(s["point_coords"]) == 3 for s in found)
    assert not np.array_equal(found[0]["image_embeddings"], found[-1]["image_embeddings"])


def test_decoder_passes_repeat():
    calibration = DecoderCalibration(EncoderCalibration(Photos(1), SPEC), tiny_sam())
    for a, b in zip(calibration, calibration, strict=True):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", COUNTS)
def test_probes_lie_inside_the_image_and_have_the_right_form(kind, count):
    p = probe(kind, count, 128, np.random.default_rng(0))
    n = {"point": 1, "points": 3, "box": 2, "point_box": 3, "mask": 1}[kind]
    assert p.points.shape == (count, n, 2) and p.labels.shape == (count, n)
    assert p.mask_input.shape == (count, 1, 32, 32) and p.has_mask.shape == (count,)
    assert {a.dtype for a in (p.points, p.labels, p.mask_input, p.has_mask)} == {np.dtype("float32")}
    assert p.points.min() >= 0 and p.points.max() <= 128
    assert (p.has_mask == (kind == "mask")).all() and (np.abs(p.mask_input).max() > 0) == (kind == "mask")
    if kind == "mask":
        assert 0.005 < (p.mask_input > 0).mean() < 0.5


def test_pictures_look_like_normalised_photos():
    images = pictures(3, 64, np.random.default_rng(0))
    assert images.shape == (3, 3, 64, 64) and images.dtype == np.float32
    assert 0.3 < images.std() < 3 and np.abs(images).max() < 4
    assert not np.array_equal(images[0], images[1])
