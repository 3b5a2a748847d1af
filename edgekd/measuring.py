"""The body of the profile verb: what is given to whom is measured where, and what is kept of it."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgekd import resolve
from edgekd.errors import UsageError
from edgekd.profiling import bare, profile_artifact
from edgekd.profiling.profile import Profile
from edgekd.target import Target


@dataclass(frozen=True)
class Request:
    """What `edgekd profile` is told. `format`, `scheme` and `lengths` are of a model file alone."""

    artifact: str
    target: Target
    threads: int | None = None
    warmup: int = 3
    repeats: int = 30
    prompts: int = 1
    format: str | None = None
    scheme: str | None = None
    lengths: Mapping[str, int] = field(default_factory=dict)
    layers: bool = False
    save: bool = False


def profile(asked: Request) -> dict[str, Any]:
    """Measure, and say it as a document; `save` adds it to the user's database of latencies."""
    folder = subject(asked)
    found = profile_artifact(folder, asked.target, prompts=asked.prompts, threads=asked.threads, warmup=asked.warmup, repeats=asked.repeats, layers=asked.layers)
    document = found.model_dump(mode="json", by_alias=True, exclude_none=True)
    if asked.save:
        document["saved"] = str(_saved(found, folder))
    return document


def subject(asked: Request) -> Path | bare.ModelFile:
    """The artifact's folder, or the file.

    Raises:
        UsageError: there is no such thing, or it is told what its manifest says.
    """
    path = Path(asked.artifact).expanduser()
    folder = resolve.artifact_folder(path)
    if folder is None and bare.is_model_file(path):
        file = bare.model_file(path, format=asked.format, scheme=asked.scheme, lengths=asked.lengths)
        if asked.target.device.transport == "local":
            bare.require_runtime(file)
        return file
    if folder is None:
        raise UsageError(f"there is no artifact at {asked.artifact}", hint="name a folder that `edgekd export` or `edgekd compress` wrote")
    if asked.format or asked.scheme or asked.lengths:
        raise UsageError("--format, --scheme and --length of `profile` are for a model file alone", where=folder, hint="leave them out: the manifest says it")
    return folder


def _saved(found: Profile, folder: Path | bare.ModelFile) -> Path:
    from edgekd.latency import database

    if isinstance(folder, bare.ModelFile):
        raise UsageError("--save keeps what artifacts take, and this is a file alone", where=folder.path, hint="export it with edgekd, or leave --save out")
    return database.save(found, folder)
