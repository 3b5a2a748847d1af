from __future__ import annotations

import json

import pytest
from pydantic import ValidationError
from tiny import fake_artifact

from edgekd.artifact import File, Manifest, is_artifact, verify
from edgekd.errors import EdgekdError


def test_manifest_round_trips(tmp_path):
    manifest = fake_artifact(tmp_path / "a")
    assert Manifest.load(tmp_path / "a") == manifest == Manifest.load(tmp_path / "a" / "manifest.json")
    assert json.loads((tmp_path / "a" / "manifest.json").read_text())["schema"] == "edgekd.artifact/1"
    assert manifest.size_bytes == 700 + 70


def test_verify_accepts_what_was_written(tmp_path):
    assert verify(fake_artifact(tmp_path) and tmp_path).id == "tiny-64-onnx-fp32"


@pytest.mark.parametrize("name", ["encoder.onnx", "decoder.onnx"])
def test_a_flipped_byte_is_found_and_the_file_named(tmp_path, name):
    fake_artifact(tmp_path)
    data = bytearray((tmp_path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / name).write_bytes(data)
    with pytest.raises(EdgekdError, match=name) as e:
        verify(tmp_path)
    assert "export" in (e.value.hint or "")


def test_a_cut_file_is_found(tmp_path):
    fake_artifact(tmp_path)
    (tmp_path / "decoder.onnx").write_bytes(b"decoder")
    with pytest.raises(EdgekdError, match=r"damaged: decoder.onnx"):
        verify(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    fake_artifact(tmp_path)
    (tmp_path / "encoder.onnx").unlink()
    with pytest.raises(EdgekdError, match=r"missing: encoder.onnx"):
        verify(tmp_path)


def test_a_folder_without_manifest_is_no_artifact(tmp_path):
    assert not is_artifact(tmp_path)
    with pytest.raises(EdgekdError, match="not an artifact"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": "edgekd.artifact/1"}', '{"schema": "other/9"}'])
def test_a_broken_manifest_is_one_clear_error(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(EdgekdError, match="manifest cannot be read") as e:
        Manifest.load(tmp_path)
    assert "\n" not in e.value.what


def test_a_manifest_of_another_schema_is_refused(tmp_path):
    fake_artifact(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace("edgekd.artifact/1", "edgekd.artifact/2"))
    with pytest.raises(EdgekdError):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "a/../../b"])
def test_files_outside_the_folder_are_refused(path):
    with pytest.raises(ValidationError, match="leaves"):
        File(path=path, sha256="0", size_bytes=0)


def test_saving_again_replaces_whole(tmp_path):
    fake_artifact(tmp_path, teacher="one")
    fake_artifact(tmp_path, teacher="two")
    assert Manifest.load(tmp_path).teacher == "two"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["decoder.onnx", "encoder.onnx", "manifest.json"]


def test_manifests_from_before_other_decoder_signatures_still_load(tmp_path):
    fake_artifact(tmp_path)
    path = tmp_path / "manifest.json"
    document = json.loads(path.read_text())
    del document["decoder_signature"], document["components"]["encoder"]["kept_fp32"]
    path.write_text(json.dumps(document))
    assert Manifest.load(tmp_path).decoder_signature == "batched" and Manifest.load(tmp_path).components["encoder"].kept_fp32 == {}
    path.write_text(json.dumps(document | {"decoder_signature": "samx"}))
    with pytest.raises(EdgekdError, match="manifest cannot be read"):
        Manifest.load(tmp_path)
