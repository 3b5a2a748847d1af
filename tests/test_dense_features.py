"""Dense features: teachers of every kind, the metrics by hand, and the way from a recipe to an artifact that is held against its teacher."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_tasks
import torch
from tiny import tiny_sam
from tiny_tasks import SIDE
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from edgekd import api, checkpoint, resolve, tasks
from edgekd.data import open_data
from edgekd.data.images import Frame
from edgekd.errors import UsageError
from edgekd.models.fold import fold
from edgekd.protocols import Preprocess, package_version
from edgekd.students import backbones
from edgekd.tasks.dense_features import scoring, students, teachers

TASK = tasks.get("dense_features")


# --- networks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "grid"), [("mobilenet_v3_large:width=0.25", 5), ("resnet50_d:width=0.25,depth=0.25", 2), ("repvit_xs:width=0.25,depth=0.25", 4)])
def test_student__has_the_teachers_width_and_grid(name: str, grid: int) -> None:
    model = students.build(name, image_size=SIDE, embed_dim=24, grid=grid).eval()
    images = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        found = model.embed(images)
    assert found.shape == (2, 24, grid, grid) and set(model.parts) == {"encoder", "head"} and counted.get_total_flops() > 0
    with torch.no_grad():
        assert torch.allclose(fold(model).eval().embed(images), found, atol=1e-4)


def test_student__a_size_that_cannot_be_built_is_refused() -> None:
    with pytest.raises(UsageError, match="multiple of 32, not 100"):
        students.build("repvit_xs", image_size=100, embed_dim=24, grid=4)


@pytest.mark.parametrize(("size", "grid"), [(64, 5), (128, 10), (32, 2)])
def test_student__of_another_size_has_the_grid_in_proportion(size: int, grid: int) -> None:
    model, start = TASK.student("mobilenet_v3_large:width=0.25", size, tiny_tasks.features())
    assert model.grid == grid and model.embed_dim == 24 and model.preprocess.image_size == size and start == "random weights"


# --- teachers -------------------------------------------------------------------------------------------------------------


def test_teacher__a_promptable_model_lends_its_encoder() -> None:
    sam = tiny_sam()
    assert teachers.shape_of(sam) == (32, 4)
    assert TASK.student("repvit_xs:width=0.25,depth=0.25", 64, sam)[0].embed(torch.zeros(1, 3, 64, 64)).shape == (1, 32, 4, 4)


def test_teacher__a_classifier_lends_its_map() -> None:
    assert teachers.shape_of(tiny_tasks.classifier()) == (32, 4)


def test_teacher__a_factorys_network() -> None:
    found = TASK.teacher("tiny_tasks:map_only")
    assert (found.embed_dim, found.grid) == (10, 7) and not found.training and not any(p.requires_grad for p in found.parameters())
    images = torch.randn(1, 3, 224, 224)
    assert torch.equal(found.outputs(images)["embedding"], found.model(images).permute(0, 3, 1, 2))


def test_teacher__without_a_map_is_refused() -> None:
    with pytest.raises(UsageError, match="no square map"):
        teachers.Seen("x", nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4)), Preprocess(32))


@pytest.mark.parametrize("registers", [0, 4])
def test_teacher__dinov2_leaves_class_and_register_tokens_out(registers: int, tmp_path: Path) -> None:
    backbones.mend_torchvision()
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 2, "image_size": 56, "patch_size": 14}
    if registers:
        model = transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**sizes, num_register_tokens=registers)).eval()
    else:
        model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({
        "size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}))
    found = TASK.teacher(str(tmp_path))
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        tokens = model(images).last_hidden_state[:, 1 + registers:]
        embedding = found.outputs(images)["embedding"]
    assert torch.allclose(embedding.flatten(2).transpose(1, 2), tokens, atol=1e-5) and embedding.shape == (2, 16, 4, 4)
    assert found.preprocess == Preprocess(56, (127.5,) * 3, (127.5,) * 3, "crop", crop=0.875)
    assert resolve.load_torch(str(tmp_path)).grid == 4


def test_teacher__timm(tmp_path: Path) -> None:
    if package_version("timm") is None:
        pytest.skip('timm is not installed: pip install "edgekd[timm]"')
    found = teachers.from_timm("timm/vit_tiny_patch16_224", pretrained=False)
    assert (found.embed_dim, found.grid) == (192, 14)


# --- metrics --------------------------------------------------------------------------------------------------------------


def test_metrics__are_one_for_the_teacher_itself() -> None:
    x = np.random.default_rng(0).standard_normal((20, 6))
    assert scoring.compare(x, x) == {"cosine": pytest.approx(1), "cka": pytest.approx(1), "nearest_patch": 1.0}


def test_cka__by_hand_and_whatever_the_rotation() -> None:
    a, b = np.array([[1.0], [-1.0], [0.0]]), np.array([[1.0, 0], [-1.0, 1], [0.0, -1]])
    centred = b - b.mean(0)
    expected = np.linalg.norm(centred.T @ a) ** 2 / (np.linalg.norm(a.T @ a) * np.linalg.norm(centred.T @ centred))
    assert scoring.linear_cka(a, b) == pytest.approx(expected) and 0 < expected < 1
    rng = np.random.default_rng(0)
    x, turn = rng.standard_normal((30, 5)), np.linalg.qr(rng.standard_normal((5, 5)))[0]
    assert scoring.linear_cka(x, 3 * x @ turn + 2) == pytest.approx(1) and scoring.linear_cka(x, rng.standard_normal((30, 5))) < 0.5


def test_cosine_and_nearest_patch__by_hand() -> None:
    ours, theirs = np.array([[1.0, 0], [0.9, 0.1], [0, 1.0]]), np.array([[1.0, 0], [0, 1.0], [0.1, 0.9]])
    found = scoring.compare(ours, theirs)
    assert found["cosine"] == pytest.approx((1 + 0.1 / np.hypot(0.9, 0.1) + 0.9 / np.hypot(0.1, 0.9)) / 3)
    assert found["nearest_patch"] == pytest.approx(1 / 3)  # rows 0 and 1 are each other's nearest in ours, rows 1 and 2 in theirs; row 2's is 1 in both


def test_valid_cells__leave_padding_out() -> None:
    assert scoring.valid_cells(Frame(50, 100, 64), Preprocess(64), 4).tolist() == [[True] * 4] * 2 + [[False] * 4] * 2
    assert scoring.valid_cells(Frame(50, 100, 64, crop=0.875), Preprocess(64, fit="crop"), 4).all()
    assert scoring.valid_cells(Frame(1, 100, 64), Preprocess(64), 4).sum() == 1


def test_evaluate__the_teacher_against_itself_and_without(make_photos: Callable[..., Path]) -> None:
    data, model = open_data(make_photos()), tiny_tasks.features()
    found = TASK.evaluate(model, data, teacher=model)
    assert found.metrics == {"cosine": pytest.approx(1), "cka": pytest.approx(1), "nearest_patch": 1.0} and found.images == 3
    assert found.protocol["teacher"] == "tiny_features" and set(found.protocol["metrics"]) == set(found.metrics) == set(found.interval95)
    with pytest.raises(UsageError, match="only its teacher can judge"):
        TASK.evaluate(model, data)
    with pytest.raises(UsageError, match="24 features a cell and the teacher 'tiny' 32"):
        TASK.evaluate(model, data, teacher=tiny_sam())


def test_evaluate__padding_does_not_count(make_photos: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    data, model = open_data(make_photos(size=(80, 30))), tiny_tasks.features()

    def spoilt(one: Any, images: np.ndarray) -> np.ndarray:
        found = honest(one, images).copy()
        found[:, :, 3:] *= -1 if one is model else 1  # rows below the photo
        return found

    honest = scoring.embed
    monkeypatch.setattr(scoring, "embed", spoilt)
    assert TASK.evaluate(model, data, teacher=tiny_tasks.features()).metrics["cosine"] == pytest.approx(1)


# --- from a recipe to an artifact -----------------------------------------------------------------------------------------


RECIPE = """
name: tiny
task: dense_features
teacher: "tiny_tasks:features"
students: [{name: "mobilenet_v3_large:width=0.25", image_sizes: [64]}]
data: {val_fraction: 0.25}
stages:
  - {name: features, objectives: [{name: OBJECTIVE}], trainable: [encoder, head], steps: 30, batch_size: 4, lr: 3.0e-3, warmup: 3, precision: fp32}
"""


def recipe(folder: Path, objective: str = "feature_mse") -> Path:
    (folder / "tiny.yaml").write_text(RECIPE.replace("OBJECTIVE", objective))
    return folder / "tiny.yaml"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(rng.integers(0, 255, (5, 6, 3), dtype=np.uint8)).resize((90, 70), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def distilled(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("distilled")
    return api.distill(data=photos, output=folder / "run", recipe=recipe(folder))


def test_distill__brings_the_features_nearer(distilled: dict[str, Any], photos: Path) -> None:
    assert distilled["loss"]["last"] < 0.7 * distilled["loss"]["first"]
    meta = checkpoint.read_meta(Path(distilled["checkpoint"]))
    assert meta.task == "dense_features" and meta.shape == {"embed_dim": 24, "grid": 5} and meta.teacher == "tiny_tasks:features"
    fresh = TASK.student("mobilenet_v3_large:width=0.25", 64, tiny_tasks.features())[0].eval()
    before = TASK.evaluate(fresh, open_data(photos), teacher=tiny_tasks.features()).metrics["cosine"]
    assert api.evaluate(model=distilled["checkpoint"], data=photos).metrics["cosine"] > before + 0.1


def test_distill__cosine_alone_reaches_the_head(photos: Path, tmp_path: Path) -> None:
    found = api.distill(data=photos, output=tmp_path / "run", recipe=recipe(tmp_path, "feature_cosine"))
    assert found["loss"]["last"] < found["loss"]["first"]


def test_distill__what_needs_logits_is_refused(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs logits, which the task dense_features does not give"):
        api.distill(data=photos, output=tmp_path / "run", recipe=recipe(tmp_path, "kd"))


@pytest.mark.parametrize(("format", "scheme"), [("onnx", "fp32"), ("openvino", "fp32"), ("onnx", "w8a8_static"), ("openvino", "w8a8_static")])
def test_export__is_held_against_its_teacher(format: str, scheme: str, distilled: dict[str, Any], photos: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino" if format == "openvino" else "onnxruntime", reason='pip install "edgekd[openvino]"')
    data = photos if scheme != "fp32" else None
    rows = api.export(model=distilled["checkpoint"], to=[format], output=tmp_path, scheme=scheme, data=data, threads=1)["exports"]
    assert rows[0]["status"] == "ok", rows
    part = rows[0]["components"]["encoder"]
    assert part["scheme"] == scheme and part["parity"]["passed"]
    ours, theirs = (api.evaluate(model=m, data=photos, threads=1).metrics["cosine"] for m in (distilled["checkpoint"], rows[0]["path"]))
    assert theirs == pytest.approx(ours, abs=1e-4 if scheme == "fp32" else 0.2) and (scheme == "fp32") == (part["parity"]["cosine"] > 0.99999)


def test_quantize_and_profile(distilled: dict[str, Any], photos: Path, tmp_path: Path) -> None:
    found = api.quantize(model=distilled["checkpoint"], scheme="w8a8_static", data=photos, output=tmp_path)
    assert 0 <= found["cosine_drop"] < 0.5 and found["size_ratio"] < 0.5
    profile = api.profile(artifact=found["path"], threads=1, warmup=1, repeats=10)
    assert set(profile["components"]) == {"encoder"} and profile["latency_ms"]["p50"] > 0


def test_predict__is_refused_with_what_to_do(distilled: dict[str, Any], photos: Path) -> None:
    with pytest.raises(UsageError, match=r"gives features, 24 a cell[\s\S]*open_artifact"):
        api.predict(model=distilled["checkpoint"], image=photos / "0.png")


def test_inspect__tells_the_parts(distilled: dict[str, Any]) -> None:
    found = api.inspect(model=distilled["checkpoint"])
    assert found["task"] == "dense_features" and found["outputs"] == {"embedding": [24, 5, 5]} and found["head"]["params"] > 0
