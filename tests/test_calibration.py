from __future__ import annotations

import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from tiny import tiny_sam

from edgekd.data.folder import Folder
from edgekd.data.images import preprocess
from edgekd.errors import EdgekdError, UsageError
from edgekd.models.embedded_decoder import embedded_component
from edgekd.models.official_decoder import official_component
from edgekd.models.proposer import BoxProposer
from edgekd.models.sam import components
from edgekd.probes import COUNTS, KINDS, pictures, probe
from edgekd.protocols import BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, Preprocess, Sample
from edgekd.quantization import choosing
from edgekd.quantization.calibration import DecoderCalibration, EncoderCalibration, ProposerCalibration, calibrate, refuse_blank
from edgekd.quantization.choosing import k_centres, representative
from edgekd.runtime import Refitted
from edgekd.tasks.promptable.parity import Reference


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


def test_k_centres_are_far_from_each_other_and_cover_the_rest():
    """A crowd around (0, 0) and three points far off: the first is the middle, then the far ones, whatever the crowd's size."""
    crowd = np.random.default_rng(0).normal(0, 0.01, (40, 2))
    vectors = np.concatenate([crowd[:20], [[5, 0]], crowd[20:], [[0, 7], [-4, -4]]])
    taken = k_centres(vectors, 4)
    assert taken[1:] == [41, 42, 20] and np.linalg.norm(vectors[taken[0]]) < 0.05
    gap = np.linalg.norm(vectors[:, None] - vectors[taken], axis=-1).min(axis=1)
    assert gap.max() < 0.1 and k_centres(vectors, 4) == taken


def test_of_photos_that_are_all_the_same_each_is_taken_once():
    assert k_centres(np.ones((5, 3)), 3) == [0, 1, 2] and k_centres(np.ones((2, 3)), 9) == [0, 1]


class Coloured(Photos):
    """Noise of one seed for all photos but those in `other`, whose seed is their own; those in `flat` are of one colour."""

    def __init__(self, count: int, other: Sequence[int] = (), flat: Sequence[int] = ()) -> None:
        super().__init__(count)
        self.other, self.flat = other, flat

    def __getitem__(self, index: int) -> Sample:
        self.asked.append(index)
        if index in self.flat:
            return Sample(str(index), np.full((40, 80, 3), index, np.uint8))
        seed = index if index in self.other else 10**6
        return Sample(str(index), (np.random.default_rng(seed).integers(0, 256, (40, 80, 3)) // (1 + seed % 3)).astype(np.uint8))

    def fingerprint(self) -> str:
        return f"{self.count} {self.other} {self.flat}"


def test_of_photos_that_are_alike_few_are_taken():
    photos, model = Coloured(30, other=(3, 11, 28)), tiny_sam()
    chosen = representative(model, photos, 4)
    assert {3, 11, 28} < set(chosen) and chosen == sorted(chosen)
    asked = len(photos.asked)
    assert representative(model, photos, 4) == chosen and len(photos.asked) == asked == 30, "looked at once"
    assert representative(tiny_sam(1), photos, 4) and len(photos.asked) == 60, "another model looks for itself"


def test_where_there_are_no_more_than_wanted_all_are_taken_without_a_look():
    photos = Coloured(5)
    assert representative(tiny_sam(), photos, 5) == representative(tiny_sam(), photos, 9) == [0, 1, 2, 3, 4] and not photos.asked


def test_of_a_large_folder_some_are_looked_at(monkeypatch):
    monkeypatch.setattr(choosing, "CANDIDATES", 10)
    photos = Coloured(1000)
    assert len(set(representative(tiny_sam(), photos, 3))) == 3 and photos.asked == list(range(0, 1000, 100))


def test_photos_of_one_colour_are_passed_over():
    photos = Coloured(12, other=(1, 2), flat=(0, 5, 7))
    assert not set(representative(tiny_sam(), photos, 4)) & {0, 5, 7}
    assert representative(tiny_sam(), Coloured(4, flat=(0, 1, 2)), 3) == [3]


def test_photos_of_one_colour_alone_are_refused_before_anything_else():
    for photos in (Coloured(3, flat=range(3)), Coloured(60, flat=range(60))):
        with pytest.raises(UsageError, match="of one colour") as e:
            calibrate(tiny_sam(), photos, limit=8)
        assert e.value.hint and e.value.where == "photos"
    good = Coloured(60, other=(7,), flat=(0, 1))
    refuse_blank(good)
    assert good.asked == [0, 1, 2], "up to the first that will do"
    with pytest.raises(UsageError, match="holds none"):
        calibrate(tiny_sam(), Coloured(0))


def test_no_photo_can_be_read(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no photo")
    with pytest.raises(UsageError, match="can be read"):
        calibrate(tiny_sam(), Folder(tmp_path))


def test_a_limit_of_nothing_is_refused():
    with pytest.raises(UsageError, match="limit is 0"):
        EncoderCalibration(Photos(3), SPEC, limit=0)


def test_a_photo_or_embedding_that_is_not_finite_is_named():
    with pytest.raises(EdgekdError, match="photo '0' holds NaN"):
        list(EncoderCalibration(Photos(2), Preprocess(64, std=(58.0, 0.0, 57.0))))
    broken = tiny_sam()
    with torch.no_grad():
        broken.encoder.neck.weight[0, 0] = float("nan")
    for calibration in (DecoderCalibration, ProposerCalibration):
        with pytest.raises(EdgekdError, match="embedding of the photo '0'"):
            list(calibration(EncoderCalibration(Photos(2), SPEC), broken))
    with pytest.raises(EdgekdError, match="embedding of the photo"):
        representative(broken, Coloured(9), 2)


def test_every_component_gets_inputs():
    model, photos = tiny_sam(), Coloured(6, other=range(6))
    assert list(calibrate(model, photos, limit=3)) == ["encoder", "decoder"]
    model.proposer = BoxProposer(model.embed_dim, width=16, depth=1).eval()
    found = calibrate(model, photos, limit=3)
    assert list(found) == ["encoder", "decoder", "proposer"] == list(components(model))
    for name, samples in found.items():
        first = next(iter(samples))
        wanted = components(model)[name].example
        assert set(first) == set(wanted) and first["images" if name == "encoder" else "image_embeddings"].shape[1:] == next(iter(wanted.values())).shape[1:]
    assert len(list(found["proposer"])) == len(found["proposer"]) == 3
    even = calibrate(model, photos, limit=3, choose=False)
    assert even["encoder"].indices == [0, 2, 4]


def test_fingerprints_change_with_what_is_yielded():
    photos, model = Coloured(6), tiny_sam()
    first = EncoderCalibration(photos, SPEC, limit=3)
    same, fewer = EncoderCalibration(Coloured(6), SPEC, limit=3), EncoderCalibration(photos, SPEC, indices=[0, 2])
    assert first.fingerprint() == same.fingerprint() != fewer.fingerprint()
    others = (EncoderCalibration(Coloured(7), SPEC, indices=first.indices), EncoderCalibration(photos, Preprocess(64, fit="stretch"), limit=3))
    assert len({first.fingerprint(), *(o.fingerprint() for o in others)}) == 3
    decoder = DecoderCalibration(first, model)
    assert decoder.fingerprint() == DecoderCalibration(same, tiny_sam()).fingerprint()
    changed = [DecoderCalibration(fewer, model), DecoderCalibration(first, tiny_sam(1)), DecoderCalibration(first, model, prompts=2),
               DecoderCalibration(first, model, seed=1), ProposerCalibration(first, model)]
    assert len({decoder.fingerprint(), *(c.fingerprint() for c in changed)}) == 6


def test_what_wraps_calibration_inputs_has_a_fingerprint_of_its_own():
    model = tiny_sam()
    inner = DecoderCalibration(EncoderCalibration(Coloured(6), SPEC, limit=2), model)
    fixed = Refitted(inner, [], {"prompts": 1})
    reference = Reference(model, pictures(1, 64, np.random.default_rng(0)))
    wrapped = [reference.adapt(part, inner) for part in (official_component(model), embedded_component(model))]
    assert len({s.fingerprint() for s in (inner, fixed, Refitted(inner, [], {"prompts": 2}), *wrapped)}) == 5
    assert Refitted([], [], {}).fingerprint() is None and all(reference.adapt(part, []).fingerprint() is None for part in
                                                              (official_component(model), embedded_component(model)))
