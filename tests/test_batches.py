"""The stream of batches: what is kept, what is made ahead and in which thread, what happens to errors."""
from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgekd.data.images import preprocess
from edgekd.data.scenes import Scenes
from edgekd.distillation import batches as module
from edgekd.distillation.batches import Ahead, Batch, Batches, Source
from edgekd.distillation.cache import build_cache
from edgekd.distillation.points import Policy
from edgekd.distillation.trainer import StageTrainer
from edgekd.errors import EdgekdError
from edgekd.models.sam import DecoderShape, Sam
from edgekd.protocols import Preprocess, Sample
from edgekd.recipe import Stage

SIZE, COUNT = 64, 6


@pytest.fixture(scope="module")
def teacher() -> Sam:
    torch.manual_seed(0)
    return model().eval().requires_grad_(False)


def model() -> Sam:
    return Sam("tiny", nn.Conv2d(3, 32, 16, 16), DecoderShape(embed_dim=32, heads=2, mlp_dim=32), Preprocess(SIZE))


@pytest.fixture(scope="module")
def source(teacher: Sam, tmp_path_factory: pytest.TempPathFactory) -> Source:
    scenes = Scenes(seed=4, count=COUNT, size=SIZE)
    return Source(scenes, build_cache(teacher, scenes, tmp_path_factory.mktemp("cache")))


class Watched:
    """Scenes that note which thread asked for which; photo `broken` cannot be read."""

    has_masks = True

    def __init__(self, broken: int | None = None, asks_model: bool = False) -> None:
        self.scenes, self.broken, self.asks_model = Scenes(seed=4, count=COUNT, size=SIZE), broken, asks_model
        self.name, self.skipped, self.asked = "watched", list[str](), list[tuple[int, str]]()

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Sample:
        self.asked.append((index, threading.current_thread().name))
        if index == self.broken:
            raise EdgekdError("the photo cannot be read", where=f"photo {index}", hint="take it out")
        return self.scenes[index]

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(COUNT))

    def fingerprint(self) -> str:
        return self.scenes.fingerprint()


class Brightened(Policy):
    """A view that is another one every time, and an order that depends on what was seen."""

    name, family, paper, live = "brightened", "data", "", True

    def view(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return Sample(sample.id, (sample.image * rng.uniform(0.5, 1.0)).astype(np.uint8), sample.masks)


def stream(source: Source, live: dict[str, Preprocess] | None = None, policies: tuple[Policy, ...] = ()) -> Batches:
    return Batches([source], Preprocess(SIZE), 2, seed=3, live=live, policies=policies)


def tensors(batch: Batch) -> list[Tensor]:
    found = []
    for value in (getattr(batch, f.name) for f in fields(batch)):
        for one in value.values() if isinstance(value, dict) else [value]:
            found += list(one.values()) if isinstance(one, dict) else [one]
    return [t for t in found if isinstance(t, Tensor)]


def same(one: Batch, other: Batch) -> bool:
    a, b = tensors(one), tensors(other)
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# --- batches -------------------------------------------------------------------------------------------------------------


def test_batch__is_what_preprocessing_gives_up_to_whole_bytes(source: Source) -> None:
    batch = stream(source)[0]
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    for image, inside, place in zip(batch.images, batch.valid[:, 0], batch.places.tolist(), strict=True):
        wanted, frame = preprocess(source.dataset[place].image, Preprocess(SIZE))
        assert np.abs(image.numpy() - wanted).max() < 0.51 / 57
        height, width = frame.resized
        assert not image[:, height:].any() and not image[:, :, width:].any(), "padding is 0 after normalising"
        share = (torch.arange(SIZE) < height).float().view(-1, 4).mean(1)[:, None] * (torch.arange(SIZE) < width).float().view(-1, 4).mean(1)
        assert torch.equal(inside, (share > 0.5).float())


def test_batch__prompts_in_a_larger_square_than_the_photo(teacher: Sam, source: Source) -> None:
    """EfficientViT-SAM: 512 px are seen, prompts are given in 1024."""
    wide = Batches([source], Preprocess(SIZE, prompt_size=2 * SIZE), COUNT, seed=3)[0]
    narrow = Batches([source], Preprocess(SIZE), COUNT, seed=3)[0]
    assert wide.labels.shape[-1] == 2 * SIZE and wide.valid.shape[-1] == SIZE // 2
    assert torch.equal(wide.images, narrow.images)


def test_batch__what_was_decoded_is_kept_and_the_same_in_the_next_epoch(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = Watched()
    batches = stream(Source(dataset, *source.caches))
    first = {int(p): image for k in range(3) for p, image in zip(batches[k].places, batches[k].images, strict=True)}
    again = {int(p): image for k in range(3, 6) for p, image in zip(batches[k].places, batches[k].images, strict=True)}
    assert len(dataset.asked) == COUNT and all(torch.equal(first[p], again[p]) for p in range(COUNT))
    monkeypatch.setattr(module, "KEEP_BYTES", batches._kept[0].nbytes * 2)
    small = stream(Source(dataset, *source.caches))
    assert same(small[4], batches[4]) and [len(small[k].places) for k in range(6)] == [2] * 6
    assert len(small._kept) == 2 and len(dataset.asked) > 2 * COUNT, "beyond the limit photos are decoded again"


def test_batch__cached_outputs_are_those_of_the_cache(source: Source) -> None:
    batch = stream(source)[1]
    for row, place in zip(batch.cached["tiny"]["embedding"], batch.places.tolist(), strict=True):
        assert torch.equal(row, source.cache.embedding(place).float())


# --- ahead ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("live", [False, True], ids=["cached", "live"])
def test_ahead__the_same_batches_in_the_same_order(source: Source, live: bool) -> None:
    asked = {"tiny": Preprocess(SIZE)} if live else None
    policies = (Brightened(),) if live else ()
    numbers = [range(k, k + 2) for k in range(0, 20, 2)]
    with Ahead(stream(source, asked, policies)) as ahead:
        found = [ahead.batch(now, then) for now, then in zip(numbers, [*numbers[1:], range(0)], strict=True)]
    plain = stream(source, asked, policies)
    assert all(same(one, plain.batch(now)) for one, now in zip(found, numbers, strict=True))
    views = [{int(p): image for batch in found[k : k + 3] for p, image in zip(batch.places, batch.images, strict=True)} for k in (0, 3)]
    assert all(torch.equal(views[0][p], views[1][p]) is not live for p in range(COUNT)), "a view of each epoch"


def test_ahead__works_in_a_thread_of_its_own_and_leaves_none(source: Source) -> None:
    dataset, threads = Watched(), torch.get_num_threads()
    with Ahead(stream(Source(dataset, *source.caches))) as ahead:
        ahead.batch(range(2), range(2, 4))
        ahead.batch(range(2, 4), range(4, 6))
    makers = [name for _, name in dataset.asked]
    assert makers[:2] == ["MainThread"] * 2 and all(name.startswith("batches") for name in makers[2:]) and len(makers) == COUNT
    assert not [t for t in threading.enumerate() if t.name.startswith("batches")]
    seen: list[int] = []
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert seen == [threads] and torch.get_num_threads() == threads


def test_ahead__a_batch_that_was_not_expected_is_made_all_the_same(source: Source) -> None:
    with Ahead(stream(source)) as ahead:
        ahead.batch(range(2), range(2, 4))
        assert same(ahead.batch(range(4, 6), range(0)), stream(source).batch(range(4, 6)))
        assert same(ahead.batch(range(2, 4), range(0)), stream(source).batch(range(2, 4)))


def test_ahead__an_error_is_raised_where_the_batch_is_asked_for(source: Source) -> None:
    order = stream(source)
    broken = order.place(3)
    with Ahead(stream(Source(Watched(broken), *source.caches))) as ahead:
        ahead.batch(range(2), range(2, 4))
        with pytest.raises(EdgekdError, match="cannot be read"):
            ahead.batch(range(2, 4), range(4, 6))
        assert same(ahead.batch(range(4, 6), range(0)), order.batch(range(4, 6))), "and the stream goes on where there is something to go on with"


def test_ahead__waits_for_policies_to_choose_and_for_models_in_use(source: Source) -> None:
    chosen = stream(source, policies=(Brightened(),))
    assert not chosen.settled(range(2)), "no order of this epoch was asked for yet"
    chosen.batch(range(2))
    assert chosen.settled(range(2, 4)) and not chosen.settled(range(4, 8)) and not chosen.settled(range(0))
    pseudo = stream(Source(Watched(asks_model=True), *source.caches))
    assert not pseudo.settled(range(2))
    pseudo.batch(range(2))
    assert pseudo.settled(range(2)) and not pseudo.settled(range(2, 4)), "what is kept already needs no model"


def test_stage__trains_on_the_same_batches_with_and_without_a_thread(teacher: Sam, source: Source, tmp_path: Path) -> None:
    given: dict[str, Any] = {"name": "s", "objectives": [{"name": "feature_mse"}], "steps": 5, "accumulate": 2, "batch_size": 2, "precision": "fp32"}

    def trained(ahead: bool) -> list[float]:
        torch.manual_seed(1)
        student = model()
        one = StageTrainer(student, teacher, Stage.model_validate(given), stream(source), tmp_path / f"{ahead}.pt")
        if ahead:
            return [row["loss"] for row in one.run().curve]
        one.set_modes()
        return [one.train_step()["loss"] for _ in range(5)]

    assert trained(True) == trained(False)
    assert not [t for t in threading.enumerate() if t.name.startswith("batches")]


def test_stage__a_photo_that_breaks_during_training_ends_it_with_its_name(teacher: Sam, source: Source, tmp_path: Path) -> None:
    broken = stream(source).place(3)
    student = model()
    stage = Stage.model_validate({"name": "s", "objectives": [{"name": "feature_mse"}], "steps": 5, "batch_size": 2})
    one = StageTrainer(student, teacher, stage, stream(Source(Watched(broken), *source.caches)), tmp_path / "s.pt")
    with pytest.raises(EdgekdError, match="cannot be read"):
        one.run()
    assert one.ahead is None and not [t for t in threading.enumerate() if t.name.startswith("batches")]
