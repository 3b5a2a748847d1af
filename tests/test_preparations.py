"""Prepared teachers: their outputs by hand, still the model they were, another cache, kept on disk, and a stage that learns from each."""
from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import plugin_samples
import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_sam
from torch import Tensor

from edgekd.checkpoint import weights_sha256
from edgekd.data.scenes import Scenes
from edgekd.distillation import points
from edgekd.distillation.batches import Batches, Source
from edgekd.distillation.cache import build_cache
from edgekd.distillation.preparations import _prepared, mcmi, ph_reg
from edgekd.distillation.preparations._prepared import View
from edgekd.distillation.taps import Taps, outputs
from edgekd.distillation.trainer import StageTrainer
from edgekd.errors import UsageError
from edgekd.models.sam import Sam
from edgekd.protocols import Sample
from edgekd.recipe import Stage
from edgekd.tasks import get

EACH = [("tta", {}), ("ph_reg", {"views": 3}), ("ph_reg", {"views": 3, "steps": 3})]


class Labelled:
    """Photos of two classes, light and dark, whose brightness differs within a class too."""

    name, skipped, has_masks, has_classes = "labelled", list[str](), False, True

    def __init__(self, count: int = 12) -> None:
        rng = np.random.default_rng(0)
        self.images = [np.clip(rng.normal(60 + 120 * (i % 2) + 10 * (i // 2), 25, (64, 64, 3)), 0, 255).astype(np.uint8) for i in range(count)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        return Sample(str(index), self.images[index])

    def classes_of(self, index: int) -> int | None:
        return None if index == 3 else index % 2

    def fingerprint(self) -> str:
        return f"labelled{len(self)}"


def scenes(count: int = 4) -> Scenes:
    return Scenes(seed=4, count=count, size=64)


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(5))


def prepared(name: str, teacher: Any, folder: Path, data: Any = None, **options: Any) -> Any:
    return points.build("preparation", name, options).prepare(teacher.eval().requires_grad_(False), data or scenes(), folder)


# --- the contract ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), EACH, ids=["tta", "ph_reg", "ph_reg-steps"])
def test_preparation__the_teacher_is_what_it_was_but_for_its_outputs(tmp_path: Path, name: str, options: dict) -> None:
    teacher = tiny_sam()
    made = prepared(name, teacher, tmp_path, **options)
    assert isinstance(made, Sam) and made.name == teacher.name and made.preprocess == teacher.preprocess and made.embed_dim == teacher.embed_dim
    assert not made.training and not any(p.requires_grad for p in made.parameters()) and set(made.parts) == set(teacher.parts)
    embedding = made.embed(images())
    assert torch.equal(embedding, outputs(made, images())["embedding"]) and not torch.allclose(embedding, teacher.embed(images()), atol=1e-4)
    masks, _ = made.decode(embedding[:1], torch.full((1, 1, 2), 30.0), torch.ones(1, 1))
    assert masks.shape == (1, 4, 16, 16)
    student, start = get("promptable_segmentation").student("repvit_xs", 64, made)
    assert torch.equal(student.mask_decoder.iou_token.weight, teacher.mask_decoder.iou_token.weight) and "teacher's own decoder" in start


@pytest.mark.parametrize(("name", "options"), EACH, ids=["tta", "ph_reg", "ph_reg-steps"])
def test_preparation__its_cache_is_another_one(tmp_path: Path, name: str, options: dict) -> None:
    teacher = tiny_sam()
    made = prepared(name, teacher, tmp_path, **options)
    assert weights_sha256(made) != weights_sha256(teacher)
    other = prepared(name, teacher, tmp_path, **(options | {"seed": 1} if name == "ph_reg" else {"flips": "both"}))
    assert weights_sha256(other) != weights_sha256(made)
    assert weights_sha256(prepared(name, teacher, tmp_path / "again", **options)) == weights_sha256(made)
    plain, changed = (build_cache(t, scenes(), tmp_path / n) for t, n in ((teacher, "plain"), (made, "changed")))
    assert plain.index["fingerprint"] != changed.index["fingerprint"]
    assert (plain.embedding(0) - changed.embedding(0)).abs().max() > 1e-3


def test_preparations__may_follow_each_other(tmp_path: Path) -> None:
    teacher = tiny_sam()
    first = prepared("tta", teacher, tmp_path)
    both = prepared("ph_reg", first, tmp_path, views=2, steps=2, lr=1e-2)
    assert len({weights_sha256(t) for t in (teacher, first, both)}) == 3
    x = images()
    assert torch.allclose(both.embed(x), both.embed(x.flip(-1)).flip(-1), atol=1e-5), "still averaged over mirror images"
    assert not torch.allclose(both.embed(x), first.embed(x), atol=1e-5), "and its last layers learned"


def test_preparation__taps_inside_are_those_of_the_photo(tmp_path: Path) -> None:
    teacher = tiny_sam()
    made = prepared("tta", teacher, tmp_path)
    inside = {"inside": "encoder.neck", "embedding": None}
    assert torch.allclose(Taps(made, inside).run(images())["inside"], Taps(teacher, inside).run(images())["inside"], atol=1e-6)


def test_preparation__moves_with_its_parts(tmp_path: Path) -> None:
    made = prepared("tta", tiny_sam(), tmp_path)
    assert made.to(torch.float64).embed(images().double()).dtype == torch.float64


# --- averages -------------------------------------------------------------------------------------------------------------------


def test_tta__is_the_mean_with_the_mirrored_one_mirrored_back(tmp_path: Path) -> None:
    teacher, x = tiny_sam(), images()
    made = prepared("tta", teacher, tmp_path)
    assert torch.allclose(made.embed(x), (teacher.embed(x) + teacher.embed(x.flip(-1)).flip(-1)) / 2, atol=1e-6)
    assert torch.allclose(made.embed(x.flip(-1)).flip(-1), made.embed(x), atol=1e-5)


def test_tta__classifiers_logits_are_averaged_too(tmp_path: Path) -> None:
    teacher, x = plugin_samples.Network(2).eval(), images()
    made = prepared("tta", teacher, tmp_path, flips="both")
    views = [x, x.flip(-1), x.flip(-2), x.flip(-1, -2)]
    wanted = torch.stack([teacher.outputs(v)["logits"] for v in views]).mean(0)
    assert torch.allclose(made.outputs(x)["logits"], wanted, atol=1e-5)


def test_tta__further_channels_of_a_foreign_teacher_stay(tmp_path: Path) -> None:
    class Wide(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.name, self.embed_dim, self.preprocess, self.inner = "wide", 32, tiny_sam().preprocess, tiny_sam()

        def embed(self, x: Tensor) -> Tensor:
            found = self.inner.embed(x)
            return torch.cat([found, found[:, :5] + 10], 1)

    teacher, x = Wide(), images()
    made = prepared("tta", teacher, tmp_path)
    assert torch.equal(made.embed(x)[:, 32:], teacher.embed(x)[:, 32:]) and not torch.allclose(made.embed(x)[:, :32], teacher.embed(x)[:, :32])


def test_view__there_and_back_is_where_it_was() -> None:
    x = images(1)
    cells = F.avg_pool2d(x, 16)
    for view in (View(), View(flip=True), View(down=1), View(right=-2), View(True, False, -1, 2), View(True, True, 1, 1)):
        back, shown = view.back(F.avg_pool2d(view.there(x, 16), 16))
        assert torch.allclose(back, cells * shown, atol=1e-6)
        assert shown.sum() == (4 - abs(view.down)) * (4 - abs(view.right))


def test_averaged__a_map_that_follows_the_photo_stays_as_it_is() -> None:
    views = [View(True, False, 1, -1), View(down=2), View(flip=True)]
    found = _prepared.averaged(lambda x: {"embedding": F.avg_pool2d(x, 16)}, images(), views, 16, None, True)
    assert torch.allclose(found["embedding"], F.avg_pool2d(images(), 16), atol=1e-5)


def artefacts(x: Tensor) -> dict[str, Tensor]:
    """An encoder with a pattern that stands still, whatever the photo."""
    return {"embedding": F.avg_pool2d(x, 16) + torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))}


def test_ph_reg__averages_away_what_stands_still() -> None:
    views = points.build("preparation", "ph_reg", {"views": 12}).views
    found, clean = _prepared.averaged(artefacts, images(), views, 16, None, False)["embedding"], F.avg_pool2d(images(), 16)
    assert (found - clean).square().mean() < 0.5 * (artefacts(images())["embedding"] - clean).square().mean()


def test_ph_reg__its_last_layers_learn_the_average(tmp_path: Path) -> None:
    teacher = tiny_sam()
    target, x = prepared("ph_reg", teacher, tmp_path, views=4), next(_prepared.photos_of(scenes(), teacher, 4, 4))
    made = prepared("ph_reg", teacher, tmp_path, views=4, steps=60, lr=3e-3)
    with torch.no_grad():
        before, after = ph_reg.gap(teacher.embed(x), target.embed(x)), ph_reg.gap(made.embed(x), target.embed(x))
    assert after < 0.8 * before
    changed = {k for k, v in made.state_dict().items() if not torch.equal(v, teacher.state_dict()[k])}
    assert changed and all(k.startswith("encoder.neck") for k in changed)


def test_ph_reg__what_it_learned_is_kept_and_damage_is_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, options = tiny_sam(), {"views": 2, "steps": 3}
    first = prepared("ph_reg", teacher, tmp_path, **options)
    (file,) = tmp_path.glob("ph_reg-*.safetensors")
    monkeypatch.setattr(ph_reg.PhReg, "_learn", lambda *_: pytest.fail("it was learned already"))
    assert weights_sha256(prepared("ph_reg", teacher, tmp_path, **options)) == weights_sha256(first)
    monkeypatch.undo()
    file.write_bytes(file.read_bytes()[:40])
    assert weights_sha256(prepared("ph_reg", teacher, tmp_path, **options)) == weights_sha256(first)


def test_last_layers__the_neck_or_the_last_that_has_weights() -> None:
    assert ph_reg.last_layers(tiny_sam(), []) == ["encoder.neck"]
    sequence = torch.nn.Module()
    sequence.encoder = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.Sequential(torch.nn.Conv2d(4, 4, 1), torch.nn.Conv2d(4, 4, 1)), torch.nn.ReLU())
    assert ph_reg.last_layers(sequence, []) == ["encoder.1.1"]
    with pytest.raises(UsageError, match=r"encoder\.nek"):
        ph_reg.last_layers(tiny_sam(), ["encoder.nek"])


# --- conditional mutual information -----------------------------------------------------------------------------------------------


def test_information__by_hand() -> None:
    p = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8]])
    found = mcmi.information(p.log(), torch.tensor([0, 0, 1]))
    q = torch.tensor([0.7, 0.3])
    wanted = [(p[i] * (p[i] / q).log()).sum().item() for i in (0, 1)]
    assert found.tolist() == pytest.approx([*wanted, 0.0], abs=1e-6)


def test_mcmi__photos_of_a_class_differ_more_and_are_still_right(tmp_path: Path) -> None:
    teacher, data = plugin_samples.Network(2).eval(), Labelled()
    features, classes = mcmi.head_inputs(teacher, data, mcmi.labels_of(data, 100))
    assert len(features) == 11, "the photo without a class is left out"
    plain, made = (prepared("mcmi", teacher, tmp_path, data, weight=w, steps=150, lr=1e-2) for w in (0.0, 10.0))
    with torch.no_grad():
        a, b = plain.head(features), made.head(features)
    assert mcmi.information(b, classes).mean() > 1.2 * mcmi.information(a, classes).mean()
    assert (b.argmax(1) == classes).float().mean() >= (a.argmax(1) == classes).float().mean() - 0.1 > 0.7
    assert weights_sha256(made) != weights_sha256(plain) and torch.equal(made.encoder.blocks[0].weight, teacher.encoder.blocks[0].weight)
    assert len(list(tmp_path.glob("mcmi-*.safetensors"))) == 2
    assert weights_sha256(prepared("mcmi", teacher, tmp_path, data, weight=10.0, steps=150, lr=1e-2)) == weights_sha256(made)


def test_mcmi__refuses_photos_without_classes_and_models_without_a_head(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="classes"):
        prepared("mcmi", plugin_samples.Network(2), tmp_path)
    with pytest.raises(UsageError, match="head"):
        prepared("mcmi", tiny_sam(), tmp_path, Labelled())


def test_mcmi__a_head_that_does_not_give_the_logits_is_refused(tmp_path: Path) -> None:
    class Scaled(plugin_samples.Network):
        def outputs(self, images: Tensor) -> dict[str, Tensor]:
            found = super().outputs(images)
            return found | {"logits": found["logits"] * 2}

    with pytest.raises(UsageError, match="not what its head gives"):
        prepared("mcmi", Scaled(2), tmp_path, Labelled())


@pytest.mark.parametrize(("name", "options"), [("tta", {"flips": "sideways"}), ("ph_reg", {"views": 0}), ("mcmi", {"steps": 0})])
def test_preparations__refuse_senseless_options(name: str, options: dict) -> None:
    with pytest.raises(UsageError, match=name):
        points.build("preparation", name, options)


# --- in a stage -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options", "kind"), [("tta", {}, "cached"), ("tta", {}, "live"), ("ph_reg", {"views": 2}, "cached"), ("mcmi", {"steps": 20}, "cached")])
def test_stage__learns_from_the_prepared_teacher(tmp_path: Path, name: str, options: dict, kind: str) -> None:
    classifier = name == "mcmi"
    data: Any = Labelled(8) if classifier else scenes(6)
    teacher = prepared(name, plugin_samples.Network(2) if classifier else tiny_sam(1), tmp_path, data, **options)
    student = plugin_samples.Network(1) if classifier else copy.deepcopy(tiny_sam(2))
    stage = Stage.model_validate({"name": "s", "objectives": [{"name": "feature_mse"}], "steps": 30, "batch_size": 3, "lr": 3e-3, "warmup": 2, "precision": "fp32",
                                  "teacher": kind})

    def batches(step: Any) -> Batches:
        source = Source(data, *([] if step.live else [build_cache(teacher, data, tmp_path / "cache")]))
        return Batches([source], student.preprocess, 3, 0, live={teacher.name: teacher.preprocess} if step.live else {})

    losses = [r["loss"] for r in StageTrainer(student, teacher, stage, batches, tmp_path / "state.pt").run().curve]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
