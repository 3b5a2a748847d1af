"""Procedural scenes: the same everywhere, exact masks, clear errors."""
from __future__ import annotations

import numpy as np
import pytest

from edgekd.data import textures
from edgekd.data.scenes import Scenes
from edgekd.errors import UsageError


def test_parse__all_keys() -> None:
    scenes = Scenes.parse("scenes:seed=3,count=7,size=128")
    assert (scenes.seed, len(scenes), scenes.size) == (3, 7, 128)


def test_parse__bare_scheme_has_defaults() -> None:
    assert len(Scenes.parse("scenes:")) == 100


@pytest.mark.parametrize(("spec", "word"), [("scenes:sed=1", "did you mean 'seed'"), ("scenes:seed=x", "not a number"), ("scenes:count=0", "at least 1"),
                                            ("scenes:size=8", "at least 64"), ("scenes:seed=-1", "at least 0")])
def test_parse__what_is_wrong_is_named(spec: str, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        Scenes.parse(spec)


def test_scene__is_the_same_whatever_was_asked_before() -> None:
    first, again = Scenes(seed=5, count=4), Scenes(seed=5, count=900)
    _ = again[3]
    a, b = first[2], again[2]
    assert np.array_equal(a.image, b.image) and np.array_equal(a.masks, b.masks) and a.id == b.id


def test_scenes__differ_by_index_and_seed() -> None:
    images = [Scenes(seed=s, count=2, size=96)[i].image for s in (1, 2) for i in (0, 1)]
    assert len({im.tobytes() for im in images}) == 4


@pytest.mark.parametrize("index", range(12))
def test_scene__masks_are_exact_and_large_enough(index: int) -> None:
    sample = Scenes(seed=77, count=12)[index]
    height, width = sample.image.shape[:2]
    assert sample.image.dtype == np.uint8 and sample.image.shape[2] == 3 and max(height, width) == 320
    assert sample.masks is not None and sample.masks.dtype == bool and sample.masks.shape[1:] == (height, width)
    assert len(sample.masks) >= 1 and sample.masks.sum(0).max() == 1, "an instance is what is visible of it: masks never overlap"
    assert sample.masks.mean((1, 2)).min() >= 0.004


def test_scene__index_out_of_range() -> None:
    with pytest.raises(IndexError):
        Scenes(count=3)[3]


def test_fingerprint__changes_with_every_argument() -> None:
    prints = {Scenes(*a).fingerprint() for a in ((1, 5), (2, 5), (1, 6), (1, 5, 256), (1, 5, 320, "photos"), (1, 5, 320, "", "cutouts"))}
    assert len(prints) == 6 and Scenes(1, 5).fingerprint() in prints


def test_assets__are_shipped_and_usable() -> None:
    assert len(textures.load_photos()) >= 20
    assert len(textures.load_cutouts()) >= 100
    assert all(im.mode == "RGBA" for im in textures.load_cutouts())


def test_noise__fills_its_range() -> None:
    found = textures.noise(np.random.default_rng(0), 40, 60)
    assert found.shape == (40, 60) and found.min() == 0 and found.max() == pytest.approx(1)


@pytest.mark.parametrize("seed", range(20))
def test_shape__is_antialiased_and_not_empty(seed: int) -> None:
    found = textures.shape(np.random.default_rng(seed), 50, 70)
    assert found.shape == (50, 70) and found.min() >= 0 and found.max() <= 1 and (found > 0.5).mean() > 0.05
