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
    output: Path | None = None
    """A folder for `layers.html`, of a profile with layers."""


def profile(asked: Request) -> dict[str, Any]:
    """Measure, and say it as a document; `save` adds it to the user's database of latencies."""
    if asked.output is not None and not asked.layers:
        raise UsageError("the page that --output writes is of single layers", hint="add --layers, or leave --output out")
    folder = subject(asked)
    found = profile_artifact(folder, asked.target, prompts=asked.prompts, threads=asked.threads, warmup=asked.warmup, repeats=asked.repeats, layers=asked.layers)
    document = found.model_dump(mode="json", by_alias=True, exclude_none=True)
    if found.layers is not None:
        document |= _explained(found, asked)
    if asked.save:
        document["saved"] = str(_saved(found, folder, asked.target))
    return document


def _explained(found: Profile, asked: Request) -> dict[str, Any]:
    """What layers add to the document: sums, advice, and the page where one is wanted."""
    from edgekd.profiling.advice import advise
    from edgekd.report import layers as pages

    advice = advise(found.layers or [], {name: part.latency_ms.p50 for name, part in found.components.items()}, prompts=found.prompts)
    page = {"page": str(pages.page(asked.output / "layers.html", found, advice))} if asked.output is not None else {}
    return {**pages.document(found, advice), **page}


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


def _saved(found: Profile, folder: Path | bare.ModelFile, target: Target) -> Path:
    from edgekd.latency import database

    return database.save(found, target, folder)
