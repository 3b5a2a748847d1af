"""Dense features: a photo in, a map of features out, such as a foundation model's (DINOv2) or the image encoder of a SAM. What is built on top, a
segmenter, a matcher or a search, is the user's."""
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from edgekd.artifact import Manifest
    from edgekd.checkpoint import Meta
    from edgekd.protocols import Component, Dataset
    from edgekd.tasks.dense_features.exported import ArtifactFeatures
    from edgekd.tasks.dense_features.parity import Reference
    from edgekd.tasks.evaluation import Evaluation, Judge

PHOTOS = 32
"""Photos that a precision's features are compared on."""


class DenseFeatureMaps:
    """Students are `edgekd.models.features.DenseFeatures`; teachers are anything with an embedding."""

    name = "dense_features"
    summary = "a photo in, a map of features out"
    outputs = frozenset({"embedding", "feats", "attention", "images", "teachers"})
    parts = ("encoder", "head")
    photo_component = "encoder"
    compared_by = "cosine"

    # --- models

    def listed(self, kind: str) -> list[dict[str, Any]]:
        """None of its own: teachers and students are those of the other tasks, and others' networks."""
        return []

    def knows(self, reference: str) -> bool:
        """See `edgekd.tasks.dense_features.teachers.knows`."""
        from edgekd.tasks.dense_features import teachers

        return teachers.knows(reference)

    def teacher(self, name: str) -> Any:
        """See `edgekd.tasks.dense_features.teachers`."""
        from edgekd.tasks.dense_features import teachers

        return teachers.load(name)

    def student(self, name: str, image_size: int, teacher: Any) -> tuple[Any, str]:
        """An untrained student of the teacher's width, and of its grid in proportion to the image size."""
        from edgekd.tasks.dense_features import students, teachers

        embed_dim, grid = teachers.shape_of(teacher)
        own = max(1, round(grid * image_size / teacher.preprocess.image_size))
        return students.build(name, image_size=image_size, embed_dim=embed_dim, grid=own, preprocess=teacher.preprocess), "random weights"

    def student_name(self, name: str) -> str:
        """The canonical spelling of a student's name."""
        from edgekd.tasks.classification.students import canonical

        return canonical(name)

    def labelled(self, dataset: Dataset, teacher: Any) -> Dataset:
        """The data as it is: nothing is learned from but the teacher."""
        return dataset

    # --- checkpoints

    def header(self, model: Any) -> dict[str, Any]:
        """Width and side of the embedding."""
        return {"shape": {"embed_dim": model.embed_dim, "grid": model.grid}}

    def build(self, meta: Meta) -> Any:
        """The untrained model that a header describes."""
        from edgekd.tasks.dense_features import students

        return students.build(meta.name, image_size=meta.image_size, embed_dim=meta.shape["embed_dim"], grid=meta.shape["grid"], preprocess=meta.preprocess)

    # --- artifacts

    def components(self, model: Any, signature: str = "batched") -> dict[str, Component]:
        """The whole as one part, `encoder`."""
        from edgekd.models.features import components

        return components(model)

    def answers(self, model: Any, images: Any) -> dict[str, Any]:
        """The embedding."""
        return {"embedding": model.embed(images)}

    def reference(self, model: Any, images: np.ndarray, signature: str = "batched") -> Reference:
        """The model's own features."""
        from edgekd.tasks.dense_features.parity import Reference

        return Reference(model, images)

    def open(self, folder: Path, manifest: Manifest, *, threads: int | None = None, stand_in: bool = False) -> ArtifactFeatures:
        """An exported model of features."""
        from edgekd.tasks.dense_features.exported import ArtifactFeatures

        return ArtifactFeatures(folder, manifest, threads=threads, stand_in=stand_in)

    # --- use

    def evaluate(self, model: Any, dataset: Dataset, *, teacher: Any = None, progress: Any = None, **options: Any) -> Evaluation:
        """See `edgekd.tasks.dense_features.scoring`. Raises UsageError for options of other tasks."""
        from edgekd.tasks.dense_features import scoring
        from edgekd.tasks.evaluation import refuse

        refuse(options, self.name)
        return scoring.evaluate(model, dataset, teacher=teacher, progress=progress)

    def predict(self, model: Any, image: Path, output: Path | None, **prompt: Any) -> Any:
        """Raises UsageError: features are nothing that could be shown."""
        from edgekd.errors import UsageError

        raise UsageError(f"'{model.name}' gives features, {model.embed_dim} a cell, and no answer that could be shown",
                         hint="evaluate it against its teacher (edgekd evaluate), or open it in code: edgekd.runtime.open_artifact(FOLDER).embed(images)")

    def judge(self, source: Any, dataset: Dataset) -> Judge:
        """Mean cosine of the features with the source's own."""
        from edgekd.data import Subset
        from edgekd.tasks.dense_features import scoring
        from edgekd.tasks.evaluation import Judge

        photos = dataset if len(dataset) <= PHOTOS else Subset(dataset, range(PHOTOS))

        def cosine(model: Any) -> float:
            return float(scoring.evaluate(model, photos, teacher=source).metrics["cosine"])

        return Judge(cosine, cosine, len(photos), len(photos), "mean cosine of the features")


task = DenseFeatureMaps()
