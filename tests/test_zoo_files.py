"""Weight files as people have them: every wrapper is taken off, and every bad file is one clear refusal. Nothing in a file ever runs."""
from __future__ import annotations

import io
import json
import os
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import official
import pytest
import torch
from torch import nn

from edgekd import resolve, teachers
from edgekd.errors import UsageError
from edgekd.zoo import files, loading

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.zeros(2, dtype=torch.float16)}


def refused(path: Path, said: str) -> None:
    with pytest.raises(UsageError, match=said) as e:
        files.read(path)
    assert e.value.hint and e.value.exit_code == 2
    assert str(path) in str(e.value) or path.name in str(e.value)


def same(found: dict[str, torch.Tensor]) -> bool:
    return set(found) == set(STATE) and all(torch.equal(found[k], v) for k, v in STATE.items())


# --- what can be read ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.bin", "w.ckpt", "w.weights"])
@pytest.mark.parametrize("legacy", [False, True])
def test_read__torch_files_of_any_name(tmp_path: Path, name: str, legacy: bool) -> None:
    torch.save(STATE, tmp_path / name, _use_new_zipfile_serialization=not legacy)
    assert same(files.read(tmp_path / name).tensors)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_read__safetensors_even_under_a_wrong_name(tmp_path: Path, name: str) -> None:
    from safetensors.torch import save_file

    save_file(STATE, tmp_path / name, metadata={"format": "pt"})
    found = files.read(tmp_path / name)
    assert same(found.tensors) and found.metadata == {"format": "pt"}


@pytest.mark.parametrize(("content", "wrapper", "prefix", "left"), [
    (STATE, (), "", ()), (OrderedDict(STATE), (), "", ()), ({"model": STATE}, ("model",), "", ()),
    ({"state_dict": STATE, "epoch": 3}, ("state_dict",), "", ("epoch",)), ({"model": {"state_dict": STATE}}, ("model", "state_dict"), "", ()),
    ({f"module.{k}": v for k, v in STATE.items()}, (), "module.", ()), ({"model": {f"module._orig_mod.{k}": v for k, v in STATE.items()}}, ("model",), "module._orig_mod.", ()),
    ({"model": STATE, "optimizer": {"state": {}}, "epoch": 1}, ("model",), "", ("optimizer", "epoch")), ({**STATE, "step": 4}, (), "", ("step",)),
], ids=range(9))
def test_read__takes_off_what_training_scripts_put_around(tmp_path: Path, content: Any, wrapper: tuple, prefix: str, left: tuple) -> None:
    torch.save(content, tmp_path / "w.pth")
    found = files.read(tmp_path / "w.pth")
    assert same(found.tensors) and (found.wrapper, found.prefix, found.left) == (wrapper, prefix, left)


def test_read__a_training_checkpoint_with_a_yacs_config_and_no_yacs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EdgeSAM's: the config is a dict subclass with attributes of its own."""
    module = types.ModuleType("yacs.config")
    node = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    module.CfgNode = node  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    config = node(DATA=node(BATCH=8))
    config.__dict__["__immutable__"] = True
    torch.save({"model": STATE, "optimizer": {}, "config": config}, tmp_path / "ckpt.pth")
    monkeypatch.delitem(sys.modules, "yacs.config")
    found = files.read(tmp_path / "ckpt.pth")
    assert same(found.tensors) and found.left == ("optimizer", "config")


def test_read__tensors_saved_on_a_gpu(tmp_path: Path) -> None:
    """The pickle says cuda:0 for every storage; here there is none."""
    torch.save(STATE, tmp_path / "cpu.pth")
    with zipfile.ZipFile(tmp_path / "cpu.pth") as old, zipfile.ZipFile(tmp_path / "gpu.pth", "w", zipfile.ZIP_STORED) as new:
        for entry in old.infolist():
            data = old.read(entry)
            if entry.filename.endswith("data.pkl"):
                assert b"X\x03\x00\x00\x00cpu" in data
                data = data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
            new.writestr(entry.filename, data)
    found = files.read(tmp_path / "gpu.pth").tensors
    assert same(found) and all(v.device.type == "cpu" for v in found.values())


@pytest.mark.parametrize("index", [False, True])
def test_read__hugging_face_folders_whole_and_in_parts(tmp_path: Path, index: bool) -> None:
    from safetensors.torch import save_file

    (tmp_path / "config.json").write_text('{"model_type": "sam"}')
    if index:
        for i, (key, value) in enumerate(STATE.items()):
            save_file({key: value}, tmp_path / f"model-{i}.safetensors")
        weight_map = {key: f"model-{i}.safetensors" for i, key in enumerate(STATE)}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        save_file(STATE, tmp_path / "model.safetensors")
    found = files.read(tmp_path)
    assert same(found.tensors) and found.config == {"model_type": "sam"} and len(found.files) == (2 if index else 1)
    if index:
        (tmp_path / "model-1.safetensors").unlink()
        refused(tmp_path, r"files that are not there: model-1\.safetensors")


# --- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("content", "said"), [
    (b"", "is empty"), (b"<!doctype html><html>404</html>", "web page"), (b"\n\n  <HTML lang='en'>", "web page"), (b"<?xml version='1.0'?><Error/>", "web page"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 40738791\n", "git-lfs pointer"), (b"hello", "no weight file"),
    (b"\x89PNG\r\n\x1a\n" + bytes(64), "no weight file"), (b"\x80\x02", "cut short"), (b"PK\x03\x04" + bytes(64), "cut short"), (bytes(200), "no weight file"),
    ((10**6).to_bytes(8, "little") + b'{"a":', "cut short"),
])
@pytest.mark.parametrize("name", ["mobile_sam.pt", "w.safetensors"])
def test_refused__by_what_it_is(tmp_path: Path, content: bytes, said: str, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, said)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("keep", [0.3, 0.6, 0.95])
def test_refused__cut_short_anywhere(tmp_path: Path, keep: float, legacy: bool) -> None:
    path = tmp_path / "w.pth"
    torch.save({f"{i}.weight": torch.randn(300) for i in range(30)}, path, _use_new_zipfile_serialization=not legacy)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    refused(path, "cut short")


def test_refused__safetensors_cut_short(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "w.safetensors"
    save_file(STATE, path)
    path.write_bytes(path.read_bytes()[:-5])
    refused(path, "cut short")


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("how", ["pickle", "pickle2", "torch", "legacy"])
def test_refused__code_is_named_and_does_not_run(tmp_path: Path, how: str) -> None:
    path, content = tmp_path / "evil.pth", {"model": Evil(tmp_path / "executed"), **STATE}
    if how.startswith("pickle"):
        path.write_bytes(pickle.dumps({"model": Evil(tmp_path / "executed")}, protocol=2 if how == "pickle2" else 4))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "torch")
    refused(path, r"pickled modules are refused: the file names (posix|nt)\.system")
    assert not (tmp_path / "executed").exists()


def test_refused__a_whole_pickled_module(tmp_path: Path) -> None:
    """What `tinysam_w8a8.pth` is."""
    torch.save(nn.Sequential(nn.Linear(2, 2)), tmp_path / "tinysam_w8a8.pth")
    refused(tmp_path / "tinysam_w8a8.pth", r"pickled modules are refused: the file names torch\.nn\.modules\.container\.Sequential")


def test_refused__torchscript_and_other_archives(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "t.pt", "w") as z:
        z.writestr("model/data.pkl", b"")
        z.writestr("model/constants.pkl", b"")
    refused(tmp_path / "t.pt", "TorchScript")
    with zipfile.ZipFile(tmp_path / "z.pth", "w") as z:
        z.writestr("readme.txt", b"x")
    refused(tmp_path / "z.pth", "not one that torch wrote")


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {}, torch.zeros(3), {"model": {"step": 1}}], ids=range(5))
def test_refused__no_state_dict_inside(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "w.pth")
    refused(tmp_path / "w.pth", "no state dict")


def test_refused__folders_and_nothing(tmp_path: Path) -> None:
    refused(tmp_path, "no weights in this folder")
    (tmp_path / "config.json").write_text("[")
    refused(tmp_path, "cannot be read")
    refused(tmp_path / "no.pth", "no such file")


def test_is_weights__by_name(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"")
    (tmp_path / "a.txt").write_bytes(b"")
    assert files.is_weights(tmp_path / "a.pt") and not files.is_weights(tmp_path / "a.txt") and not files.is_weights(tmp_path)


# --- files as models ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files")
    official.write("edge_sam", path / "edge_sam.pth")
    official.write("mobile_sam", path / "mobile_sam.pt")
    official.write("nanosam", path / "nano.pth", wrapper="model")
    return path


def test_expect__wrong_family_named_by_the_user(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"is 'edge_sam' .*not 'mobile_sam'"):
        loading.load(folder / "edge_sam.pth", expect="mobile_sam")
    with pytest.raises(UsageError, match="did you mean 'edge_sam'"):
        loading.load(folder / "edge_sam.pth", expect="edgesam")
    assert loading.load(folder / "mobile_sam.pt", expect="tinysam").name == "mobile_sam"


def test_corrupt__refused_by_its_key(folder: Path, tmp_path: Path) -> None:
    state = torch.load(folder / "edge_sam.pth", weights_only=True)
    key = "image_encoder.fuse_stage3.op_list.0.weight"
    torch.save({k: v for k, v in state.items() if k != key}, tmp_path / "missing.pth")
    with pytest.raises(UsageError, match=r"missing image_encoder\.fuse_stage3\.op_list\.0\.weight"):
        loading.load(tmp_path / "missing.pth")


def test_encoder_alone__needs_a_decoder_and_takes_one(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"encoder of 'nanosam' alone[\s\S]*mobile_sam"):
        loading.load(folder / "nano.pth")
    with pytest.raises(UsageError, match="no decoder for 'nanosam'"):
        loading.load(folder / "nano.pth", decoder=folder / "nano.pth")
    model = resolve.load_torch(f"{folder / 'nano.pth'}+{folder / 'mobile_sam.pt'}")
    decoder = torch.load(folder / "mobile_sam.pt", weights_only=True)
    assert model.name == "nanosam" and torch.equal(model.mask_decoder.iou_token.weight, decoder["mask_decoder.iou_token.weight"])


def test_phase_one_file__of_edgesam(folder: Path, tmp_path: Path) -> None:
    state = torch.load(folder / "edge_sam.pth", weights_only=True)
    encoder = {k.removeprefix("image_encoder."): v for k, v in state.items() if k.startswith("image_encoder.")}
    torch.save({"model": encoder, "optimizer": {}, "epoch": 9, "max_accuracy": 0.0}, tmp_path / "phase1.pth")
    model = loading.load(tmp_path / "phase1.pth", decoder=folder / "edge_sam.pth")
    assert torch.equal(model.encoder.fuse_stage3.weight, state["image_encoder.fuse_stage3.op_list.0.weight"])


@pytest.mark.parametrize("spelling", ["{}", "edge_sam={}"])
def test_teacher_and_model__take_the_file(folder: Path, spelling: str) -> None:
    reference = spelling.format(folder / "edge_sam.pth")
    teacher = teachers.load(reference)
    assert teacher.name == resolve.load_torch(reference).name == "edge_sam" and not any(p.requires_grad for p in teacher.parameters())


def test_teacher__named_and_another(folder: Path) -> None:
    with pytest.raises(UsageError, match="not 'sam_vit_b'"):
        teachers.load(f"sam_vit_b={folder / 'edge_sam.pth'}")


def test_bytes__of_a_mapped_file_are_not_kept(folder: Path, tmp_path: Path) -> None:
    buffer = io.BytesIO((folder / "edge_sam.pth").read_bytes())
    (tmp_path / "e.pth").write_bytes(buffer.getvalue())
    model = loading.load(tmp_path / "e.pth")
    before = model.mask_decoder.iou_token.weight.detach().clone()
    (tmp_path / "e.pth").write_bytes(bytes(len(buffer.getvalue())))
    assert torch.equal(model.mask_decoder.iou_token.weight, before)
