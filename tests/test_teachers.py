"""Teachers by name: the shipped one works, the published ones say where their weights are, Hugging Face folders and hub ids load."""
from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest
import torch
from test_sam import reference

from edgekd import catalogue, teachers, zoo
from edgekd.errors import EdgekdError, UsageError
from edgekd.models.efficientnet_lite import TAPS, EfficientNetLite0, SameConv, read_pretrained
from edgekd.models.sam_vit import SamVit
from edgekd.teachers import huggingface


def test_sam_nano__is_frozen_and_keeps_the_contract() -> None:
    model = teachers.load("sam_nano")
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        embedding = model.embed(torch.zeros(1, 3, 256, 256))
        masks, iou = model.decode(embedding, torch.tensor([[[100.0, 100.0]]]), torch.ones(1, 1))
    assert embedding.shape == (1, 128, 16, 16) and masks.shape == (1, 4, 64, 64) and iou.shape == (1, 4)
    assert next(model.parameters()).dtype == torch.float32, "shipped in half precision, used in full"


def test_sam_nano__weights_are_small_enough_for_the_wheel() -> None:
    path = teachers.shipped("sam_nano")
    assert path is not None and path.stat().st_size <= 25_000_000


@pytest.mark.parametrize("name", zoo.names())
def test_published__described_without_loading(name: str) -> None:
    found = teachers.describe(name)
    assert found["family"] == zoo.SPECS[name].family and found["params_m"] > 3 and found["image_size"] in (512, 1024) and found["weights"]
    assert teachers.licence(name)


def test_names__list_every_model_once() -> None:
    assert len(teachers.names()) == len(set(teachers.names())) and set(zoo.names()) < set(teachers.names())
    rows = catalogue.models()
    assert [r["name"] for r in rows if r["name"] in zoo.SPECS] == zoo.names() and len(rows) == len({r["name"] for r in rows})
    official = {r["name"]: r for r in rows if r["name"] in zoo.SPECS}
    assert all({"kind", "family", "params_m", "image_size"} <= set(r) for r in official.values())
    assert official["sam_vit_h"]["kind"] == "teacher" and official["edge_sam"]["kind"] == "student"


@pytest.mark.parametrize("name", zoo.names())
def test_load__published_without_weights_says_where_they_are_and_that_a_file_works(name: str) -> None:
    with pytest.raises(UsageError) as e:
        teachers.load(name, offline=True)
    assert zoo.SPECS[name].source in str(e.value) and "--dry-run" in str(e.value) and "file" in str(e.value)


def test_load__unknown_name() -> None:
    with pytest.raises(UsageError, match="did you mean 'sam_nano'"):
        teachers.load("sam_nanoo")


def test_load__folder_of_hugging_face_files(tmp_path: Path) -> None:
    library = reference(5)
    library.save_pretrained(tmp_path / "tiny-sam")
    ours = teachers.load(str(tmp_path / "tiny-sam"), offline=True)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(ours.embed(images), library.get_image_embeddings(images), atol=1e-6)
    assert ours.preprocess.image_size == 64 and ours.embed_dim == 32
    assert isinstance(ours.encoder, SamVit), "SAM runs on our own network"


def test_load__folder_of_another_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UsageError, match="type 'bert' cannot be a teacher"):
        teachers.load(str(tmp_path), offline=True)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(EdgekdError, match="cannot be read"):
        teachers.load(str(tmp_path), offline=True)


def test_convert__a_key_too_many_is_named() -> None:
    library = reference(6)
    library.mask_decoder.register_parameter("surprise", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(EdgekdError, match=r"unknown mask_decoder\.surprise"):
        huggingface.convert(library, "odd")


def test_convert__a_shape_that_does_not_fit_is_named() -> None:
    library = reference(7)
    library.mask_decoder.iou_token = torch.nn.Embedding(1, 16)
    with pytest.raises(EdgekdError, match=r"mask_decoder\.iou_token\.weight is"):
        huggingface.convert(library, "odd")


# --- the hub --------------------------------------------------------------------------------------------------------------


class Hub:
    """Stands for huggingface_hub: says what it was asked and gives what is in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, list[tuple]()

    def snapshot_download(self, repo: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        self.asked.append((repo, tuple(allow_patterns), local_files_only))
        return str(self.folder)

    def hf_hub_download(self, repo: str, file: str, *, local_files_only: bool) -> str:
        self.asked.append((repo, file, local_files_only))
        return str(self.folder / file)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    reference(5).save_pretrained(tmp_path)
    found = Hub(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", found)  # type: ignore[arg-type]
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return found


def test_hub_id__fetches_no_pickles_and_shows_the_checksum(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert teachers.load("someone/tiny-sam").name == "tiny-sam"
    (repo, patterns, offline), = hub.asked
    assert repo == "someone/tiny-sam" and not offline
    assert all(p.endswith((".json", ".safetensors")) for p in patterns)
    said = capsys.readouterr().err
    assert hashlib.sha256((hub.folder / "model.safetensors").read_bytes()).hexdigest() in said and "model.safetensors" in said


@pytest.mark.parametrize(("variable", "argument", "expected"), [(None, False, False), (None, True, True), ("1", False, True), ("true", False, True), ("0", False, False)])
def test_hub_id__offline_is_respected(hub: Hub, monkeypatch: pytest.MonkeyPatch, variable: str | None, argument: bool, expected: bool) -> None:
    if variable is not None:
        monkeypatch.setenv("HF_HUB_OFFLINE", variable)
    teachers.load("someone/tiny-sam", offline=argument)
    assert hub.asked[0][2] is expected


def test_hub_file__is_fetched_alone(hub: Hub) -> None:
    teachers.load("someone/tiny-sam/model.safetensors")
    assert hub.asked == [("someone/tiny-sam", "model.safetensors", False)]


def test_published_name__comes_from_its_authors_hub(hub: Hub) -> None:
    teachers.load("sam_vit_b")
    with pytest.raises(UsageError, match="are not here"):
        teachers.load("efficientvit_sam_l0")
    assert [a[0] for a in hub.asked] == ["facebook/sam-vit-base", "mit-han-lab/efficientvit-sam"]
    assert hub.asked[1][1] == "efficientvit_sam_l0.pt"


def test_hub_id__out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EdgekdError, match=r"neither here nor a hub id[\s\S]*switched off"):
        teachers.load("someone/not-here", offline=True)


# --- sam_nano's stem ------------------------------------------------------------------------------------------------------


def test_same_conv__pads_as_tensorflow_does() -> None:
    """At stride 2 and kernel 3 on an even side, SAME puts the one padding pixel at the right and bottom."""
    conv = SameConv(1, 1, 3, 2, bias=False)
    conv.weight.data.zero_()
    conv.weight.data[0, 0, 0, 0] = 1  # the window's top-left tap shows where windows start
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert conv(x).flatten().tolist() == [0, 2, 8, 10]


def test_trunk__strides_and_channels() -> None:
    with torch.no_grad():
        maps = EfficientNetLite0().eval()(torch.zeros(1, 3, 64, 64))
    assert {s: tuple(m.shape[1:]) for s, m in maps.items()} == {s: (c, 64 // s, 64 // s) for s, c in TAPS.items()}


def test_read_pretrained__folds_batch_norm_exactly() -> None:
    torch.manual_seed(0)
    trunk, state = EfficientNetLite0(), {}

    def norm(name: str, channels: int) -> None:
        state.update({f"{name}.weight": torch.rand(channels) + 0.5, f"{name}.bias": torch.randn(channels), f"{name}.running_mean": torch.randn(channels),
                      f"{name}.running_var": torch.rand(channels) + 0.5})

    state["_conv_stem.weight"] = torch.randn_like(trunk.stem.weight)
    norm("_bn0", 32)
    for i, block in enumerate(trunk.blocks):
        for part, conv, bn in (("expand", "_expand_conv", "_bn0"), ("depthwise", "_depthwise_conv", "_bn1"), ("project", "_project_conv", "_bn2")):
            layer = getattr(block, part)
            if layer is not None:
                state[f"_blocks.{i}.{conv}.weight"] = torch.randn_like(layer.weight) * 0.1
                norm(f"_blocks.{i}.{bn}", layer.out_channels)
    read_pretrained(trunk, state)
    x = torch.randn(1, 3, 32, 32)
    plain = SameConv(3, 32, 3, 2, bias=False)
    plain.weight.data = state["_conv_stem.weight"]
    expected = torch.nn.functional.batch_norm(plain(x), state["_bn0.running_mean"], state["_bn0.running_var"], state["_bn0.weight"], state["_bn0.bias"], eps=1e-3)
    assert torch.allclose(trunk.stem(x), expected, atol=1e-4)


def test_read_pretrained__another_network() -> None:
    with pytest.raises(KeyError):
        read_pretrained(EfficientNetLite0(), {})
