"""Wherever a model is expected: what each way of naming one gives, and what nothing gives."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import fake_artifact

from edgekd import checkpoint, resolve, students
from edgekd.errors import EdgekdError, UsageError
from edgekd.models.sam import Sam

TINY = "repvit_xs:width=0.25,depth=0.25"



@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = students.build(TINY, image_size=64, embed_dim=32)
    return checkpoint.save(model, tmp_path_factory.mktemp("c") / "tiny.safetensors", teacher="sam_nano")


def test_checkpoint(saved: Path) -> None:
    model = resolve.load_model(saved)
    assert isinstance(model, Sam) and model.preprocess.image_size == 64
    assert resolve.teacher_of(saved) == "sam_nano"


def test_baseline() -> None:
    assert resolve.load_model("baseline/disc").name == "baseline/disc"


def test_factory() -> None:
    assert resolve.load_model("collections:OrderedDict") == {}


@pytest.mark.parametrize(("reference", "said"), [
    ("sam_nanoo", "did you mean 'sam_nano'"), ("baseline/disk", "did you mean 'baseline/disc'"), ("repvit_sx", "did you mean"),
    ("./nothing.safetensors", "no model at"), ("/no/such/folder", "no model at"), ("mobile_sam.pt", "no model at"), ("weights/edge_sam.pth", "no model at"),
    ("mobile_sam", r"weights of 'mobile_sam' are not here[\s\S]*MobileSAM"),
])
def test_unknown__is_a_usage_error(reference: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        resolve.load_model(reference)


def test_student_without_weights__says_what_to_do() -> None:
    with pytest.raises(UsageError, match=r"no weights are shipped[\s\S]*distill"):
        resolve.load_model(TINY)


def test_other_file__is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("x")
    with pytest.raises(UsageError, match="this is no model"):
        resolve.load_model(path)
    assert resolve.teacher_of(path) is None


def test_weight_file__that_is_none_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "page.pth").write_text("<!doctype html><html>404</html>")
    with pytest.raises(UsageError, match="web page"):
        resolve.load_model(tmp_path / "page.pth")


def test_run__is_the_artifact_it_chose(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps({"chosen": "a-64-onnx-fp32"}))
    assert resolve.artifact_folder(tmp_path) == tmp_path / "artifacts/a-64-onnx-fp32"


def test_run__that_chose_nothing_or_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps({"chosen": None}))
    with pytest.raises(UsageError, match="chose no candidate"):
        resolve.artifact_folder(tmp_path)
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(EdgekdError, match="cannot be read"):
        resolve.artifact_folder(tmp_path)


def test_artifact__is_refused_where_weights_are_needed(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    assert resolve.artifact_folder(tmp_path) == resolve.artifact_folder(tmp_path / "manifest.json") == tmp_path
    with pytest.raises(UsageError, match="exported artifact"):
        resolve.load_torch(tmp_path)


def test_the_one_artifact_below_a_folder_is_meant(tmp_path: Path) -> None:
    """`edgekd export --output out` writes `out/<id>`; `out` is enough to name it, until a second one lies beside it."""
    for name in ("a-64-onnx-fp32", "b-64-onnx-fp32"):
        (tmp_path / name).mkdir()
    fake_artifact(tmp_path / "a-64-onnx-fp32")
    (tmp_path / "notes.txt").write_text("mine")
    assert resolve.artifact_folder(tmp_path) == tmp_path / "a-64-onnx-fp32"
    fake_artifact(tmp_path / "b-64-onnx-fp32")
    with pytest.raises(UsageError, match=r"2 artifacts[\s\S]*a-64-onnx-fp32, b-64-onnx-fp32"):
        resolve.artifact_folder(tmp_path)
