"""Classification: a photo in, its class out. Teachers and students give `embedding`, `pooled` and `logits`; labels are needed by no objective but those
that say so (SSLD, arXiv 2103.05959, learns from the teacher's logits alone)."""
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from edgekd.artifact import Manifest
    from edgekd.checkpoint import Meta
    from edgekd.protocols import Component, Dataset
    from edgekd.tasks.classification.exported import ArtifactClassifier
    from edgekd.tasks.classification.parity import Reference
    from edgekd.tasks.classification.predict import Classes
    from edgekd.tasks.evaluation import Evaluation, Judge

PHOTOS = 64
"""Photos that a precision's classes are compared on."""


class Classification:
    """Its models are `edgekd.models.classifier.Classifier`, or `Taken` from others."""

    name = "classification"
    summary = "a photo in, its class out"
    outputs = frozenset({"embedding", "logits", "pooled", "classes", "feats", "attention", "images", "teachers"})
    parts = ("encoder", "head")
    photo_component = "classifier"
    compared_by = "top1_agreement"

    # --- models

    def listed(self, kind: str) -> list[dict[str, Any]]:
        """EfficientNet-Lite, and the students that are classifiers only; any other student can be one too."""
        from edgekd.tasks.classification import students, teachers

        if kind == "teachers":
            return [{"name": name, "task": self.name, **teachers.describe(name)} for name in teachers.names()]
        return [{"name": name, "task": self.name, **students.describe(name)} for name in students.CONFIGS]

    def knows(self, reference: str) -> bool:
        """See `edgekd.tasks.classification.teachers.knows`."""
        from edgekd.tasks.classification import teachers

        return teachers.knows(reference)

    def teacher(self, name: str) -> Any:
        """See `edgekd.tasks.classification.teachers`."""
        from edgekd.tasks.classification import teachers

        return teachers.load(name)

    def student(self, name: str, image_size: int, teacher: Any) -> tuple[Any, str]:
        """An untrained student with the teacher's classes."""
        from edgekd.tasks.classification import students

        model = students.build(name, image_size=image_size, classes=teacher.classes, labels=teacher.labels, preprocess=teacher.preprocess)
        return model, "random weights"

    def student_name(self, name: str) -> str:
        """The canonical spelling of a student's name."""
        from edgekd.tasks.classification import students

        return students.canonical(name)

    def labelled(self, dataset: Dataset, teacher: Any) -> Dataset:
        """The data with its classes in the teacher's numbering, and without any where that cannot be told. A teacher that does not name its
        classes takes the names of data with as many, so that its students know them."""
        from edgekd.tasks.classification.labels import Renumbered, numbering

        names = list(getattr(dataset, "class_names", []))
        if not teacher.labels and len(names) == teacher.classes:
            teacher.labels = tuple(names)
        return Renumbered(dataset, numbering(dataset, teacher.classes, teacher.labels), teacher.labels)

    # --- checkpoints

    def header(self, model: Any) -> dict[str, Any]:
        """The number of classes and their names."""
        return {"shape": {"classes": model.classes}, "labels": list(model.labels)}

    def build(self, meta: Meta) -> Any:
        """The untrained model that a header describes."""
        from edgekd.tasks.classification import students, teachers

        if meta.name in teachers.names():
            return teachers.untrained_lite(meta.name)
        return students.build(meta.name, image_size=meta.image_size, classes=meta.shape["classes"], labels=meta.labels, preprocess=meta.preprocess)

    # --- artifacts

    def components(self, model: Any, signature: str = "batched") -> dict[str, Component]:
        """The whole as one part, `classifier`."""
        from edgekd.models.classifier import components

        return components(model)

    def answers(self, model: Any, images: Any) -> dict[str, Any]:
        """The logits."""
        return {"logits": model(images)}

    def reference(self, model: Any, images: np.ndarray, signature: str = "batched") -> Reference:
        """The model's own logits."""
        from edgekd.tasks.classification.parity import Reference

        return Reference(model, images)

    def open(self, folder: Path, manifest: Manifest, *, threads: int | None = None, stand_in: bool = False) -> ArtifactClassifier:
        """An exported classifier."""
        from edgekd.tasks.classification.exported import ArtifactClassifier

        return ArtifactClassifier(folder, manifest, threads=threads, stand_in=stand_in)

    # --- use

    def evaluate(self, model: Any, dataset: Dataset, *, teacher: Any = None, progress: Any = None, **options: Any) -> Evaluation:
        """See `edgekd.tasks.classification.scoring`. Raises UsageError for options of other tasks."""
        from edgekd.tasks.classification import scoring
        from edgekd.tasks.evaluation import refuse

        refuse(options, self.name)
        return scoring.evaluate(model, dataset, teacher=teacher, progress=progress)

    def predict(self, model: Any, image: Path, output: Path | None, **prompt: Any) -> Classes:
        """The likeliest classes."""
        from edgekd.tasks.classification.predict import predict_file

        return predict_file(model, image, output, **prompt)

    def judge(self, source: Any, dataset: Dataset) -> Judge:
        """Share of the photos for which the source's own class is found likeliest; labels or not."""
        from edgekd.data import Subset
        from edgekd.tasks.classification import scoring
        from edgekd.tasks.evaluation import Judge

        photos = dataset if len(dataset) <= PHOTOS else Subset(dataset, range(PHOTOS))

        def same(model: Any) -> float:
            return (scoring.evaluate(model, photos, teacher=source).teacher_agreement or {})["top1"]

        return Judge(same, same, len(photos), len(photos), "share of photos with the same likeliest class")


task = Classification()
