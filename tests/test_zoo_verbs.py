"""`inspect` says what a name or file is; `convert` writes it in another layout, bit by bit the same, and never over its source."""
from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import official
import pytest
import torch

from edgekd import checkpoint, converting, inspecting, students, zoo
from edgekd.errors import UsageError
from edgekd.models.sam import Sam
from edgekd.models.sam_vit import SamVit, VitShape
from edgekd.zoo import layouts, loading
from edgekd.zoo.files import read


def vit(side: int = 64) -> zoo.Spec:
    return zoo.sam_spec(VitShape(side, 32, 2, 2, 3, (1,), 32, 2.0), "tiny", "t", shape=zoo.DecoderShape(32, heads=1, mlp_dim=64, mask_channels=8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SAM in Meta's layout and an EdgeSAM in its authors'."""
    path = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    own = zoo.assemble(vit()).state_dict()
    torch.save({layouts.by_name("meta").table.right(k): v for k, v in own.items()}, path / "meta.pth")
    official.write("edge_sam", path / "edge_sam.pth")
    return path


# --- inspect ------------------------------------------------------------------------------------------------------------

# Encoder parameters in millions, GMACs, image size: counted on the authors' classes.
SIZES = {
    "sam_vit_h": (637.03, 2980.5, 1024), "sam_vit_l": (308.28, 1492.8, 1024), "sam_vit_b": (89.67, 486.0, 1024), "mobile_sam": (5.74, 38.8, 1024), "edge_sam": (5.52, 20.05, 1024),
    "repvit_sam": (23.16, 113.3, 1024), "efficient_sam_ti": (6.16, 102.3, 1024), "efficient_sam_s": (22.35, 245.6, 1024), "efficientvit_sam_l0": (30.7, 34.8, 512),
    "efficientvit_sam_l1": (43.6, 49.0, 512), "efficientvit_sam_l2": (57.3, 68.6, 512), "efficientvit_sam_xl0": (112.9, 184.8, 1024), "efficientvit_sam_xl1": (199.3, 321.9, 1024)}


@pytest.mark.parametrize("name", SIZES)
def test_inspect__a_published_name(name: str) -> None:
    found, (params, gmacs, size) = inspecting.inspect(name), SIZES[name]
    assert found["encoder"]["params"] / 1e6 == pytest.approx(params, rel=0.005) and found["encoder"]["gmacs"] == pytest.approx(gmacs, rel=0.005)
    assert found["encoder"]["image_size"] == size and found["preprocess"]["prompt_size"] == 1024 and found["encoder"]["embedding"] == [256, 64, 64]
    assert found["decoder"]["params"] == pytest.approx(4.06e6, rel=0.01) and found["problems"] == []
    assert found["licence"] and found["paper"] and found["source"]


@pytest.mark.parametrize(("name", "family"), [("sam_nano", "sam_nano"), ("repvit_s", "repvit"), ("tinyvit_xs:width=0.5", "tinyvit"), ("tinysam", "mobile_sam")])
def test_inspect__other_names(name: str, family: str) -> None:
    found = inspecting.inspect(name)
    assert found["family"] == family and found["encoder"]["params"] > 1e5 and found["encoder"]["gmacs"] > 0


def test_inspect__unknown_name() -> None:
    with pytest.raises(UsageError, match="did you mean 'edge_sam'"):
        inspecting.inspect("edgesam")
    with pytest.raises(UsageError, match="width"):
        inspecting.inspect("repvit_s:width=99")


def test_inspect__a_file(folder: Path) -> None:
    found = inspecting.inspect(folder / "edge_sam.pth", strict=True)
    assert (found["name"], found["family"], found["variant"], found["layout"]) == ("edge_sam", "edge_sam", "repvit_m1", "edge_sam")
    data = (folder / "edge_sam.pth").read_bytes()
    assert found["file"] == {"path": str(folder / "edge_sam.pth"), "size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert set(found["dropped"]) == set(official.UNUSED["edge_sam"]) and found["dtype"].startswith("float32") and found["tensors"] == 823
    assert found["encoder"]["params"] == zoo.SPECS["edge_sam"].encoder_params and found["problems"] == []


def test_inspect__a_sam_of_other_sizes_is_reported(folder: Path) -> None:
    found = inspecting.inspect(folder / "meta.pth")
    assert (found["name"], found["variant"], found["encoder"]["image_size"]) == ("sam_vit", "vit_32x2", 64)


def changed(folder: Path, path: Path, **tensors: Any) -> Path:
    state = torch.load(folder / "meta.pth", weights_only=True)
    key = "mask_decoder.iou_token.weight"
    if tensors.get("drop"):
        del state[key]
    state |= {k.replace("__", "."): v for k, v in tensors.items() if k != "drop"}
    torch.save(state, path)
    return path


@pytest.mark.parametrize(("tensors", "said"), [
    ({"drop": True}, "missing mask_decoder.iou_token.weight"), ({"mask_decoder__surprise__weight": torch.zeros(1)}, "unknown mask_decoder.surprise.weight"),
    ({"mask_decoder__iou_token__weight": torch.zeros(2, 32)}, "mask_decoder.iou_token.weight is (2, 32) instead of (1, 32)"),
    ({"mask_decoder__iou_token__weight": torch.full((1, 32), float("nan"))}, "mask_decoder.iou_token.weight holds NaN or infinity"),
])
def test_inspect__problems_are_listed_and_strict_refuses(folder: Path, tmp_path: Path, tensors: dict[str, Any], said: str) -> None:
    path = changed(folder, tmp_path / "bad.pth", **tensors)
    assert inspecting.inspect(path)["problems"] == [said]
    with pytest.raises(UsageError) as e:
        inspecting.inspect(path, strict=True)
    assert said in str(e.value) and e.value.exit_code == 2


def test_inspect__our_checkpoint(tmp_path: Path) -> None:
    model = students.build("repvit_xs:width=0.25,depth=0.25", image_size=64, embed_dim=32)
    path = checkpoint.save(model, tmp_path / "s.safetensors", teacher="sam_nano", history={"recipe": "r"})
    found = inspecting.inspect(path, strict=True)
    assert (found["layout"], found["teacher"], found["history"], found["encoder"]["image_size"]) == ("edgekd", "sam_nano", {"recipe": "r"}, 64)
    assert found["encoder"]["params"] == sum(p.numel() for p in model.encoder.parameters())
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UsageError, match="cannot be read"):
        inspecting.inspect(path)


def test_inspect__a_folder_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "model.safetensors").write_bytes(b"x")
    found = inspecting.inspect(tmp_path)
    assert found["family"] == "bert" and "cannot be a teacher" in found["problems"][0]
    with pytest.raises(UsageError, match="bert"):
        inspecting.inspect(tmp_path, strict=True)


# --- convert ------------------------------------------------------------------------------------------------------------


def same(a: Path, b: Path) -> bool:
    x, y = read(a).tensors, read(b).tensors
    return set(x) == set(y) and all(torch.equal(x[k], y[k]) and x[k].dtype == y[k].dtype for k in x)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin"])
def test_convert__there_and_back_is_bit_identical(folder: Path, tmp_path: Path, suffix: str) -> None:
    there = converting.convert(folder / "meta.pth", to="hf", output=tmp_path / f"hf{suffix}")
    back = converting.convert(tmp_path / f"hf{suffix}", to="meta", output=tmp_path / f"meta{suffix}")
    assert (there["from"], there["to"], back["from"], back["to"]) == ("meta", "hf", "hf", "meta")
    assert there["tensors"] == back["tensors"] + 1 and same(folder / "meta.pth", tmp_path / f"meta{suffix}")
    assert there["sha256"] == hashlib.sha256((tmp_path / f"hf{suffix}").read_bytes()).hexdigest()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([f"hf{suffix}", f"meta{suffix}"]), "nothing temporary stays"


def test_convert__half_precision_stays_half(folder: Path, tmp_path: Path) -> None:
    torch.save({k: v.half() for k, v in torch.load(folder / "meta.pth", weights_only=True).items()}, tmp_path / "half.pth")
    converting.convert(tmp_path / "half.pth", to="hf", output=tmp_path / "hf.safetensors")
    assert {v.dtype for v in read(tmp_path / "hf.safetensors").tensors.values()} == {torch.float16}


def test_convert__a_published_student_to_ours_and_back(folder: Path, tmp_path: Path) -> None:
    converting.convert(folder / "edge_sam.pth", to="edgekd", output=tmp_path / "ours.safetensors")
    ours, direct = checkpoint.load(tmp_path / "ours.safetensors"), loading.load(folder / "edge_sam.pth")
    assert ours.name == "edge_sam" and ours.preprocess == direct.preprocess and checkpoint.weights_sha256(ours) == checkpoint.weights_sha256(direct)
    converting.convert(tmp_path / "ours.safetensors", to="meta", output=tmp_path / "authors.pth")
    before = {k: v for k, v in read(folder / "edge_sam.pth").tensors.items() if k not in official.UNUSED["edge_sam"]}
    after = read(tmp_path / "authors.pth").tensors
    assert set(before) == set(after) and all(torch.equal(before[k], after[k]) for k in before)


def test_convert__a_sam_checkpoint_of_ours_to_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for ViT-B; a small network stands for it, so that nothing large is written."""
    spec = zoo.sam_spec(VitShape(64, 32, 2, 2, 3, (1,), 256, 2.0), "sam_vit_b", "vit_b")
    monkeypatch.setitem(zoo.SPECS, "sam_vit_b", spec)
    model = Sam("sam_vit_b", SamVit(spec.vit), spec.shape, spec.preprocess)
    checkpoint.save(model, tmp_path / "ours.safetensors", kind="teacher")
    assert torch.equal(checkpoint.load(tmp_path / "ours.safetensors").encoder.pos_embed, model.encoder.pos_embed)
    converting.convert(tmp_path / "ours.safetensors", to="hf", output=tmp_path / "folder")
    again = loading.load(tmp_path / "folder")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


def refused(said: str, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(UsageError, match=said):
        converting.convert(*args, **kwargs)


def test_convert__what_makes_no_sense_is_refused(folder: Path, tmp_path: Path) -> None:
    refused("did you mean 'meta'", folder / "meta.pth", to="metta", output=tmp_path / "x.pth")
    refused("no class for 'edge_sam'", folder / "edge_sam.pth", to="hf", output=tmp_path / "x.pth")
    refused("no name of a weight file", folder / "meta.pth", to="meta", output=tmp_path / "x")
    refused("safetensors files", folder / "edge_sam.pth", to="edgekd", output=tmp_path / "x.pth")
    refused("other sizes", folder / "meta.pth", to="edgekd", output=tmp_path / "x.safetensors")
    refused("no such file", folder / "none.pth", to="hf", output=tmp_path / "x.pth")
    assert list(tmp_path.iterdir()) == []


def test_convert__never_over_its_source(folder: Path, tmp_path: Path) -> None:
    before = (folder / "meta.pth").read_bytes()
    refused("never overwritten", folder / "meta.pth", to="hf", output=folder / "meta.pth")
    (tmp_path / "link.pth").symlink_to(folder / "meta.pth")
    refused("never overwritten", folder / "meta.pth", to="hf", output=tmp_path / "link.pth")
    assert (folder / "meta.pth").read_bytes() == before


def test_convert__a_damaged_source_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    path = changed(folder, tmp_path / "bad.pth", drop=True)
    refused(r"missing mask_decoder\.iou_token\.weight", path, to="hf", output=tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_convert__a_student_of_ours_has_no_other_layout(tmp_path: Path) -> None:
    model = students.build("repvit_xs:width=0.25,depth=0.25", image_size=64, embed_dim=32)
    path = checkpoint.save(model, tmp_path / "s.safetensors")
    refused("network of its own", path, to="meta", output=tmp_path / "x.pth")
    refused("checkpoint of ours already", path, to="edgekd", output=tmp_path / "x.safetensors")
