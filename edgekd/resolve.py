"""Wherever a model is expected: a teacher or student name, a checkpoint, a published weight file, an exported artifact, a run, a
baseline, a Hugging Face folder or hub id, or `module:factory`.
"""
from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from edgekd import artifact, checkpoint, plugins, tasks
from edgekd.errors import EdgekdError, UsageError, unknown
from edgekd.protocols import PROMPTABLE

KINDS = ("a teacher or student (edgekd list models), a checkpoint, a published weight file (.pth, .pt, .safetensors), an artifact or run folder, "
         "baseline/disc, a Hugging Face folder or hub id, or module:factory")


def load_model(reference: str | Path, *, threads: int | None = None, task: str | None = None) -> Any:
    """The model that a user means, ready for `evaluate` and `predict` (a `Promptable`, a baseline's `Predictor`, a model of another task).

    Args:
        task: what it must be able to do, where the reference alone does not say; None: whatever it is.

    Raises:
        UsageError: nothing is known by that name, with the nearest name.
        EdgekdError: it is known but its files are missing or damaged.
    """
    text = str(reference)
    if text.startswith("baseline/"):
        from edgekd.tasks.promptable import baselines

        return baselines.load(text)
    path = Path(reference).expanduser()
    folder = artifact_folder(path)
    if folder is not None:
        from edgekd.runtime import open_artifact

        return open_artifact(folder, threads=threads, stand_in=True)
    return load_torch(reference, task=task)


def load_torch(reference: str | Path, *, task: str | None = None) -> Any:
    """The torch model that a user means, for the verbs that export or quantize.

    Raises:
        UsageError: nothing is known by that name, or it is not a torch model (an artifact).
    """
    from edgekd import students, teachers
    from edgekd.teachers import huggingface
    from edgekd.zoo.files import SUFFIXES

    text, path = str(reference), Path(reference).expanduser()
    if checkpoint.is_checkpoint(path):
        return checkpoint.load(path)
    if task is not None and task != PROMPTABLE:
        return tasks.get(task).teacher(text)
    if (knowing := tasks.knowing(text)) is not None and knowing.name != PROMPTABLE:
        return knowing.teacher(text)
    if teachers.is_weights(text):
        return teachers.load(text)
    if path.exists():
        if artifact_folder(path) is not None:
            raise UsageError("this is an exported artifact, and the verb needs a model with weights", where=path,
                             hint="name the checkpoint it was made from; a run keeps it in checkpoints/")
        raise UsageError("this is no model", where=path, hint=f"a model is {KINDS}")
    base = re.split(r"[:-]", text)[0]
    if base in students.names() and (text not in teachers.names() or students.weights_path(text, 256) is not None):
        return shipped_student(text)
    if text in teachers.names():
        return teachers.load(text)
    if re.fullmatch(r"[\w.]+:\w+", text):
        return plugins.factory(text)()
    if text.startswith((".", "/", "~")) or (text.endswith(SUFFIXES) and text.count("/") < 2):
        raise UsageError(f"there is no model at {text}", hint=f"a model is {KINDS}")
    if huggingface.is_hub(text):
        brought = huggingface.locate(text, offline=huggingface.forbidden())
        found = tasks.knowing(str(brought))
        return teachers.load(text) if found is None else found.teacher(text)
    raise unknown("model", text, {*teachers.names(), *students.names(), *_baselines()})


def shipped_student(name: str, image_size: int = 256) -> Any:
    """A student with the weights that come with edgekd.

    Raises:
        UsageError: none are shipped for it.
    """
    from edgekd import students

    path = students.weights_path(name, image_size)
    if path is None:
        raise UsageError(f"no weights are shipped for the student '{name}'", hint="distil it first (edgekd distill), then name the checkpoint")
    return checkpoint.load(path)


def artifact_folder(path: Path) -> Path | None:
    """The artifact that a path means: its folder, its manifest, the run that chose it, or the one that `edgekd export` wrote below it.
    None when it is none of these."""
    if artifact.is_artifact(path):
        return artifact.manifest_path(path).parent
    report = path / "report.json"
    if path.is_dir() and report.is_file():
        try:
            chosen = json.loads(report.read_text(encoding="utf-8")).get("chosen")
        except ValueError as e:
            raise EdgekdError("the run's report cannot be read", where=report, hint="run the same command again") from e
        if chosen is None:
            raise UsageError("this run chose no candidate", where=path, hint="name one of its artifacts/ folders")
        return path / "artifacts" / chosen
    inside = sorted(p for p in path.iterdir() if p.is_dir() and artifact.is_artifact(p)) if path.is_dir() else []
    if len(inside) > 1:
        raise UsageError(f"this folder holds {len(inside)} artifacts", where=path, hint=f"name one of them: {', '.join(p.name for p in inside)}")
    return inside[0] if inside else None


def teacher_of(reference: str | Path) -> str | None:
    """Name of the teacher that a checkpoint or artifact was distilled from, when it says so."""
    path = Path(reference).expanduser()
    folder = artifact_folder(path)
    if folder is not None:
        return artifact.Manifest.load(folder).teacher
    if checkpoint.is_checkpoint(path):
        return checkpoint.read_meta(path).teacher
    return None


def _baselines() -> list[str]:
    from edgekd.tasks.promptable import baselines

    return baselines.names()
