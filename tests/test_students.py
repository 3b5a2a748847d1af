"""The registry of students: every name keeps the contract; names parse, scale and fail well."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from edgekd import plugins, students
from edgekd.errors import UsageError
from edgekd.models.repvit import RepViT, RepViTConfig
from edgekd.models.sam import DecoderShape, Sam
from edgekd.protocols import Preprocess, Promptable

# name -> image size, parameters in millions and tensors of the state, GMACs: measured with the authors' classes. MobileSAM's
# file has four tensors (0.32 M parameters) more, those of an unused classifier. Parameters and GMACs are shown rounded.
PUBLISHED = {
    "mobile_sam": (1024, 6.07 - 0.3217, 298, 38.8),
    "edge_sam": (1024, 5.52, 684, 20.05),
    "repvit_sam": (1024, 23.16, 1461, 113.3),
    "efficientvit_sam_l0": (512, 30.7, 272, 34.8),
    "efficientvit_sam_l1": (512, 43.6, 378, 49.0),
    "efficientvit_sam_l2": (512, 57.3, 508, 68.6),
    "efficientvit_sam_xl0": (1024, 112.9, 318, 184.8),
    "efficientvit_sam_xl1": (1024, 199.3, 564, 321.9),
}


@pytest.fixture
def fresh() -> Iterator[None]:
    """The registry is read once per process; tests that change what it finds read it again."""
    students.families.cache_clear()
    yield
    students.families.cache_clear()


def test_names() -> None:
    found = students.names()
    assert len(found) == len(set(found)) and {"repvit_xs", "repvit_s", "repvit_m", "tinyvit_xs", "tinyvit_s", *PUBLISHED} <= set(found)
    assert set(students.families()) >= {"repvit", "tinyvit", "efficientvit", "nanosam"}


@pytest.mark.parametrize("name", students.names())
def test_every_student_describes_itself(name: str) -> None:
    facts = students.describe(name)
    assert facts["name"] == name and facts["family"] in students.families() and facts["paper"].startswith("arXiv ")
    assert 0.3e6 < facts["params_encoder"] < 250e6 and 0.05 < facts["gmacs"] < 25
    assert all(s % 32 == 0 for s in facts["sizes"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    """Parameters and multiply-adds within 0.5 %, tensors exactly."""
    size, params, tensors, gmacs = PUBLISHED[name]
    with torch.device("meta"), torch.no_grad():
        model = students.encoder(name, 256).eval()
        with FlopCounterMode(display=False) as counter:
            embedding = model(torch.zeros(1, 3, size, size))
    assert embedding.shape == (1, 256, 64, 64)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(params, rel=0.005)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs, rel=0.005)
    assert len(model.state_dict()) == tensors


@pytest.mark.parametrize("name,params,gmacs", [
    ("repvit_xs", 808_032, 0.1729), ("repvit_s", 1_525_400, 0.3555), ("repvit_m", 3_381_584, 0.7663),
    ("tinyvit_xs", 972_224, 0.3482), ("tinyvit_s", 2_282_752, 0.8461),
])
def test_sizes_are_stable(name: str, params: int, gmacs: float) -> None:
    facts = students.describe(name)
    assert (facts["params_encoder"], facts["gmacs"]) == (params, gmacs)


@pytest.mark.parametrize("name", ["repvit_xs", "tinyvit_xs"])
def test_build_is_promptable(name: str) -> None:
    model = students.build(name, image_size=64).eval()
    assert isinstance(model, Sam) and isinstance(model, Promptable)
    assert (model.name, model.embed_dim, model.preprocess.image_size) == (name, 128, 64)
    with torch.no_grad():
        embedding = model.embed(torch.randn(1, 3, 64, 64))
        masks, iou = model.decode(embedding, torch.rand(2, 1, 2) * 64, torch.ones(2, 1))
    assert embedding.shape == (1, 128, 4, 4) and masks.shape == (2, 4, 16, 16) and iou.shape == (2, 4)


@pytest.mark.parametrize("name", students.names())
def test_every_student_keeps_the_embedding_contract(name: str) -> None:
    with torch.device("meta"), torch.no_grad():
        encoder = students.encoder(name, 64).eval()
        side = 192 // getattr(getattr(encoder, "config", None), "stride", 16)
        assert encoder(torch.zeros(2, 3, 192, 192)).shape == (2, 64, side, side)


def test_prompts_of_a_finer_embedding_are_in_a_larger_square() -> None:
    """EfficientViT-SAM L embeds at stride 8: 128 px behave as 256."""
    model = students.build("efficientvit_sam_l0:width=0.25,depth=0.25", image_size=128, embed_dim=32)
    assert (model.preprocess.image_size, model.preprocess.side) == (128, 256)
    assert students.build("efficientvit_sam_xl0:width=0.25,depth=0.25", image_size=128, embed_dim=32).preprocess.side == 128


@pytest.mark.parametrize("name", students.names())
def test_scaled_by_one_is_the_same(name: str) -> None:
    (config,) = (family.configs[name] for family in students.families().values() if name in family.configs)
    assert config.scaled() == config


def test_the_seed_decides_and_nothing_else() -> None:
    def weights(seed: int) -> list[torch.Tensor]:
        return list(students.build("repvit_xs", seed=seed).state_dict().values())

    torch.manual_seed(5)
    one = weights(0)
    state = torch.get_rng_state()
    two = weights(0)
    assert torch.equal(state, torch.get_rng_state())  # the caller's generator is left alone
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, weights(1), strict=True))


def test_decoder_and_preprocessing_follow_the_teacher() -> None:
    shape = DecoderShape(64, heads=2, mlp_dim=96)
    model = students.build("repvit_xs", image_size=96, shape=shape, preprocess=Preprocess(1024, mean=(1.0, 2.0, 3.0)))
    assert model.shape == shape and model.embed_dim == 64
    assert model.preprocess == Preprocess(96, mean=(1.0, 2.0, 3.0))
    assert students.decoder_shape(256) == DecoderShape()


@pytest.mark.parametrize("text,canonical", [
    ("repvit_s", "repvit_s"),
    ("repvit_s:width=0.75", "repvit_s-width0.75"),
    ("repvit_s:depth=0.5, width=.75", "repvit_s-width0.75-depth0.5"),
    ("repvit_s:width=1.0", "repvit_s"),
    ("repvit_s:act=relu", "repvit_s"),
    ("repvit_s:act=gelu", "repvit_s-actgelu"),
    ("tinyvit_xs-width2-acthardswish", "tinyvit_xs-width2-acthardswish"),
])
def test_names_have_one_canonical_spelling(text: str, canonical: str) -> None:
    assert str(students.parse(text)) == canonical
    assert str(students.parse(canonical)) == canonical
    assert students.describe(text)["name"] == canonical


def test_multipliers_change_size() -> None:
    base, narrow, shallow = (students.describe(n) for n in ("repvit_s", "repvit_s:width=0.5", "repvit_s:depth=0.5"))
    assert narrow["gmacs"] < shallow["gmacs"] < base["gmacs"]
    assert students.describe("repvit_s:act=gelu")["params_encoder"] == base["params_encoder"]
    assert students.build("repvit_s:width=0.5", image_size=64).name == "repvit_s-width0.5"


@pytest.mark.parametrize("name,message,hint", [
    ("repvitt_s", "unknown student 'repvitt_s'", "did you mean 'repvit_s'?"),
    ("resnet:width=2", "unknown student 'resnet'", "repvit_s, "),
    ("repvit_s:widht=2", "unknown student setting 'widht'", "did you mean 'width'?"),
    ("repvit_s:act=gelo", "unknown activation 'gelo'", "did you mean 'gelu'?"),
    ("repvit_s:width=9", "from 0.25 to 4, not '9'", ""),
    ("repvit_s:width=wide", "from 0.25 to 4, not 'wide'", ""),
    ("repvit_s:depth=nan", "not 'nan'", ""),
    ("repvit_s:", "'' is no setting of a student", "NAME:width=0.75"),
    ("repvit_s-w2", "'w2' is no setting of a student", "NAME:width=0.75"),
    ("", "unknown student ''", "students:"),
])
def test_bad_names(name: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        students.build(name)
    assert message in str(caught.value) and hint in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("sizes,message", [({"image_size": 250}, "nearest: 256"), ({"image_size": 0}, "nearest: 32"), ({"embed_dim": 100}, "nearest: 96")])
def test_bad_sizes(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        students.build("repvit_xs", **sizes)
    assert message in str(caught.value)


def test_shipped_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(students, "WEIGHTS", tmp_path)
    assert students.weights_path("repvit_s", 256) is None
    general, special = tmp_path / "repvit_s.safetensors", tmp_path / "repvit_s-192.safetensors"
    general.touch()
    assert students.weights_path("repvit_s", 256) == general
    assert students.weights_path("repvit_s:width=0.5", 256) is None
    assert students.describe("repvit_s")["weights"] is True
    special.touch()
    assert students.weights_path("repvit_s", 192) == special and students.weights_path("repvit_s", 256) == general


def test_a_family_of_another_package_joins(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    mine = students.Family("mine", "arXiv 0000.00000", {"mine_s": RepViTConfig((8, 16, 24, 32), (1, 1, 1, 1), act="relu")}, RepViT)
    usurper = students.Family("repvit", "nowhere", {}, RepViT)
    monkeypatch.setattr(plugins, "entry_points", lambda group: {"mine": mine, "other": usurper} if group == "edgekd.students" else {})
    assert "mine_s" in students.names() and "repvit_s" in students.names()
    assert students.describe("mine_s:width=2")["family"] == "mine"
    assert students.build("mine_s", image_size=64).name == "mine_s"
