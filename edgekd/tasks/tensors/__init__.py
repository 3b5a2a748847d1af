"""Arrays in, arrays out: anybody's network, of which nothing is known but its numbers. It is exported, checked, quantized and timed like any other;
what it is good for only its owner can say, so nothing here evaluates it, shows its answers or distils it."""
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from edgekd.errors import UsageError

if TYPE_CHECKING:
    from edgekd.artifact import Manifest
    from edgekd.protocols import Component, Dataset
    from edgekd.tasks.tensors.exported import ArtifactArrays
    from edgekd.tasks.tensors.parity import Reference


class Tensors:
    """Its models are `edgekd.tasks.tensors.model.Arrays`, made of users' own modules (`edgekd export --model module:factory --input SHAPE`)."""

    name = "tensors"
    summary = "arrays in, arrays out: users' own models, exported and measured only"
    outputs: frozenset[str] = frozenset()
    parts: tuple[str, ...] = ()
    photo_component = "model"
    compared_by = "cosine"

    # --- models: none by name, and nothing is learned

    def listed(self, kind: str) -> list[dict[str, Any]]:
        """None: every user has their own."""
        return []

    def knows(self, reference: str) -> bool:
        """Never: such a model is named together with its inputs."""
        return False

    def teacher(self, name: str) -> NoReturn:
        """Raises UsageError."""
        _numbers_only(name, "cannot be a teacher")

    def student(self, name: str, image_size: int, teacher: Any) -> NoReturn:
        """Raises UsageError."""
        _numbers_only(name, "cannot be a student")

    def student_name(self, name: str) -> NoReturn:
        """Raises UsageError."""
        _numbers_only(name, "cannot be a student")

    def labelled(self, dataset: Dataset, teacher: Any) -> NoReturn:
        """Raises UsageError."""
        _numbers_only("the task tensors", "has no labels")

    def header(self, model: Any) -> NoReturn:
        """Raises UsageError."""
        _numbers_only(model.name, "has no checkpoint")

    def build(self, meta: Any) -> NoReturn:
        """Raises UsageError."""
        _numbers_only(meta.name, "has no checkpoint")

    # --- artifacts

    def components(self, model: Any, signature: str = "batched") -> dict[str, Component]:
        """The whole as one part, `model`."""
        return {"model": model.component()}

    def answers(self, model: Any, images: Any) -> dict[str, Any]:
        """Every output for some calls' inputs, in one row."""
        import torch

        return {"outputs": torch.cat([torch.from_numpy(value).double().flatten() for one in images for value in model.run(one).values()])}

    def reference(self, model: Any, images: Any, signature: str = "batched") -> Reference:
        """The module's own answers."""
        from edgekd.tasks.tensors.parity import Reference

        return Reference(model)

    def open(self, folder: Path, manifest: Manifest, *, threads: int | None = None, stand_in: bool = False) -> ArtifactArrays:
        """An exported model of arrays."""
        from edgekd.tasks.tensors.exported import ArtifactArrays

        return ArtifactArrays(folder, manifest, threads=threads, stand_in=stand_in)

    # --- use

    def evaluate(self, model: Any, dataset: Dataset, *, teacher: Any = None, progress: Any = None, **options: Any) -> NoReturn:
        """Raises UsageError."""
        _numbers_only(model.name, "cannot be evaluated on photos")

    def predict(self, model: Any, image: Path, output: Path | None, **prompt: Any) -> NoReturn:
        """Raises UsageError."""
        _numbers_only(model.name, "has no answer that could be shown")

    def judge(self, source: Any, dataset: Dataset) -> NoReturn:
        """Raises UsageError."""
        _numbers_only(source.name, "cannot be compared on photos")


def _numbers_only(name: str, what: str) -> NoReturn:
    raise UsageError(f"'{name}' {what}: of a model of arrays only its numbers are known", hint="edgekd profile FOLDER times it; in code "
                     "edgekd.runtime.open_artifact(FOLDER).run({...}) gives its outputs")


task = Tensors()
