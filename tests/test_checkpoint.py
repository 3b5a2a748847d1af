"""Checkpoints: whole or refused, never a pickle, rebuilt to the same numbers."""
from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path

import pytest
import torch

from edgekd import checkpoint, students
from edgekd.errors import EdgekdError
from edgekd.models.proposer import BoxProposer
from edgekd.models.sam import Sam
from edgekd.protocols import Preprocess


@pytest.fixture(scope="module")
def student() -> Sam:
    return students.build("repvit_xs:width=0.25,depth=0.25", image_size=64, embed_dim=32, preprocess=Preprocess(64, mean=(1.0, 2.0, 3.0))).eval()


@pytest.fixture
def saved(student: Sam, tmp_path: Path) -> Path:
    return checkpoint.save(student, tmp_path / "deep/s.safetensors", teacher="sam_nano", history={"recipe": "smoke"})


def test_load__is_the_same_model(student: Sam, saved: Path) -> None:
    again = checkpoint.load(saved)
    assert again.name == student.name and again.preprocess == student.preprocess and again.shape == student.shape and not again.training
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again.embed(image), student.embed(image))
    assert checkpoint.weights_sha256(again) == checkpoint.weights_sha256(student)


def test_meta__is_read_without_the_weights(saved: Path) -> None:
    meta = checkpoint.read_meta(saved)
    assert (meta.kind, meta.teacher, meta.image_size, meta.history) == ("student", "sam_nano", 64, {"recipe": "smoke"})
    assert meta.mean == (1.0, 2.0, 3.0) and meta.shape["embed_dim"] == 32


def test_save__leaves_no_temporary_file(saved: Path) -> None:
    assert [p.name for p in saved.parent.iterdir()] == ["s.safetensors"]


@pytest.mark.parametrize("at", [0.3, 0.6, 0.999])
def test_flipped_bit__is_refused(saved: Path, at: float) -> None:
    data = bytearray(saved.read_bytes())
    start = 8 + struct.unpack("<Q", data[:8])[0]
    data[start + int((len(data) - start) * at)] ^= 0x10
    saved.write_bytes(data)
    with pytest.raises(EdgekdError, match="damaged"):
        checkpoint.load(saved)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.99])
def test_cut_short__is_refused(saved: Path, keep: float) -> None:
    data = saved.read_bytes()
    saved.write_bytes(data[: int(keep if keep > 1 else keep * len(data))])
    with pytest.raises(EdgekdError, match=r"cannot be read|does not describe"):
        checkpoint.load(saved)


@pytest.mark.parametrize("content", [b"", b"<!doctype html><html>404</html>", pickle.dumps({"a": 1}), b"\xff" * 64])
def test_other_files__are_refused_and_nothing_runs(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(EdgekdError, match="cannot be read"):
        checkpoint.load(path)


def test_foreign_safetensors__is_told_apart(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(EdgekdError, match="does not describe a model"):
        checkpoint.read_meta(tmp_path / "x.safetensors")


def test_header_of_another_schema__is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors", metadata={checkpoint.HEADER: json.dumps({"schema_": "edgekd.checkpoint/9"})})
    with pytest.raises(EdgekdError, match="description cannot be read"):
        checkpoint.read_meta(tmp_path / "x.safetensors")


def test_load_into__names_what_does_not_fit(saved: Path) -> None:
    other = students.build("repvit_xs:width=0.25,depth=0.25", image_size=64, embed_dim=64)
    with pytest.raises(EdgekdError, match=r"do not fit .* is \(\d"):
        checkpoint.load_into(other, saved)
    wider = students.build("tinyvit_xs:width=0.25,depth=0.25", image_size=64, embed_dim=32)
    with pytest.raises(EdgekdError, match=r"missing|unknown"):
        checkpoint.load_into(wider, saved)


def test_is_checkpoint__ours_even_damaged_and_nobody_elses(saved: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    save_file({"a": torch.zeros(2)}, tmp_path / "plain.safetensors")
    assert checkpoint.is_checkpoint(saved)
    assert not any(checkpoint.is_checkpoint(tmp_path / n) for n in (".", "no.safetensors", "theirs.safetensors", "plain.safetensors"))
    saved.write_bytes(saved.read_bytes()[:100])
    assert checkpoint.is_checkpoint(saved), "so that it is refused as a damaged one"


def test_proposer__is_kept_and_added_where_there_is_none(tmp_path: Path) -> None:
    def build() -> Sam:
        return students.build("repvit_xs:width=0.25,depth=0.25", image_size=64, embed_dim=32).eval()

    model = build()
    model.proposer = BoxProposer(32, width=16, depth=1)
    path = checkpoint.save(model.eval(), tmp_path / "p.safetensors")
    embedding, empty = torch.randn(1, 32, 4, 4), build()
    checkpoint.load_into(empty, path)
    for again in (checkpoint.load(path), empty):
        assert again.proposer is not None
        with torch.no_grad():
            assert all(torch.equal(a, b) for a, b in zip(again.proposer(embedding), model.proposer(embedding), strict=True))
    assert checkpoint.load(checkpoint.save(build(), tmp_path / "q.safetensors")).proposer is None
