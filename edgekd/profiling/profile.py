"""Profiles of artifacts on a device: latency apart and together, memory, size and the precision really executed."""
from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from edgekd.artifact import Manifest
from edgekd.errors import EdgekdError
from edgekd.measurement import Circumstances, Latency
from edgekd.profiling import door
from edgekd.profiling.bare import PART, ModelFile
from edgekd.profiling.footprint import folder_bytes
from edgekd.profiling.transport import Transport, reach
from edgekd.workspace import write_json

if TYPE_CHECKING:
    from edgekd.target import Target

RUNNER = "edgekd.profiling.runner"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class ComponentProfile(_Model):
    """One component alone."""

    latency_ms: Latency
    load_ms: float
    size_bytes: int
    executed_precision: str
    executed_ops: dict[str, int]


class Layer(_Model):
    """One operator as the runtime ran it. `name` is that of the module in the network, where the file tells it, else the runtime's own."""

    component: str
    name: str
    op: str
    ms: float
    """Of one run, the mean of the middle half of those timed: runtimes count in whole microseconds."""
    share: float
    """Of its component, 0..1."""
    precision: str | None = None


class Profile(_Model):
    """One artifact on one device. `latency_ms` is encoder + decoder run one after the other, for `prompts` prompts."""

    schema_: Literal["edgekd.profile/1"] = Field(default="edgekd.profile/1", alias="schema")
    id: str
    target: str
    prompts: int
    components: dict[str, ComponentProfile]
    latency_ms: Latency
    load_ms: float
    peak_memory_bytes: int | None
    size_bytes: int
    executed_precision: str
    circumstances: Circumstances
    transport: str = "local"
    layers: list[Layer] | None = None
    """Where it was asked for: what every operator of every component took, in the order of execution."""
    energy_mj: float | None = None
    """Of one use, measured where the board tells its power."""
    fell_back: dict[str, list[str]] = {}
    """Component -> operators that did not run where, or in the precision, they were meant to, with what they ran on."""
    answers: dict[str, float] | None = None
    """Of a board: component -> relative error (root mean square) of its answers to those of the same file here."""
    inputs: dict[str, str] | None = None
    """Of a model file alone, which has no manifest: what it was run on, name -> `1x3x224x224:float32`."""

    def save(self, path: Path) -> Path:
        """Write as JSON, atomically."""
        return write_json(Path(path), self.model_dump(mode="json", by_alias=True))

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Read what `save` wrote. Raises EdgekdError when it is not a profile."""
        try:
            return cls.model_validate(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError) as e:
            raise EdgekdError("this is not a profile", where=path, hint="profile the artifact again") from e


def profile_artifact(
    folder: Path | ModelFile, target: str | Target = "host", *, transport: Transport | None = None, warmup: int = 3, repeats: int = 30,
    threads: int | None = None, prompts: int = 1, max_seconds: float = 8.0, memory: bool = True, layers: bool = False,
) -> Profile:
    """Profile one artifact or file (see `profile_many`)."""
    return profile_many([folder], target, transport=transport, warmup=warmup, repeats=repeats, threads=threads, prompts=prompts,
                        max_seconds=max_seconds, memory=memory, layers=layers)[0]


def profile_many(
    folders: Sequence[Path | ModelFile], target: str | Target = "host", *, transport: Transport | None = None, warmup: int = 3, repeats: int = 30,
    threads: int | None = None, prompts: int = 1, max_seconds: float = 8.0, memory: bool = True, layers: bool = False,
) -> list[Profile]:
    """Profile artifacts, or model files alone, against each other: one fresh process measures all of them in turns, so that ratios are fair.

    Peak memory takes one more fresh process each (`memory=False` leaves it out). A teacher is profiled like any other once it is exported.

    `threads` defaults to the target's limit, else to the runtime's own choice.

    Raises:
        UsageError: the target cannot be reached from here.
        EdgekdError: an artifact is damaged, or its runtime is missing or crashes; the device's last words are given.
    """
    device = transport or reach(target)
    if threads is None and not isinstance(target, str):
        threads = target.limits.threads
    with device:
        if device.name != "local":
            from edgekd.profiling import boards

            asked = boards.Asked(warmup=warmup, repeats=repeats, threads=threads, prompts=prompts, max_seconds=max_seconds, memory=memory, layers=layers)
            return boards.profile_many(device, folders, target, asked)
        if layers:
            from edgekd.profiling.layers import require

            for folder in folders:
                require(folder)
        there = [f.told(device.push(f.path)) if isinstance(f, ModelFile) else device.push(Path(f)) for f in folders]
        shared = ["--prompts", str(prompts), *door.flags(threads=threads)]
        timing = door.flags(threads=None, warmup=warmup, repeats=repeats, max_seconds=max_seconds)
        limit = 120 + 10 * max_seconds * 3 * len(there)  # three timed calls each; generous, since a machine may be busy
        names = [f.path if isinstance(f, ModelFile) else Path(f) for f in folders]
        found = ask(device, RUNNER, [*there, *shared, *timing], limit, where=names[0])
        peaks = [ask(device, RUNNER, [f, "--footprint", *shared], 180, where=n)["peak_memory_bytes"] if memory else None
                 for f, n in zip(there, names, strict=True)]
        told = [ask(device, RUNNER, [f, "--layers", *shared, *timing], limit, where=n)["layers"] if layers else None for f, n in zip(there, names, strict=True)]
    shown = target if isinstance(target, str) else target.name
    return [_profile(folder if isinstance(folder, ModelFile) else Path(folder), one, found["circumstances"], shown, prompts, peak).model_copy(
        update={"layers": None if rows is None else [Layer.model_validate(row) for row in rows]})
            for folder, one, peak, rows in zip(folders, found["artifacts"], peaks, told, strict=True)]


def ask(device: Transport, module: str, arguments: list[str], timeout_s: float, *, where: Path | None = None) -> Any:
    """The JSON document that a module of ours prints on the device; `where` is what it is asked about.

    Raises:
        EdgekdError: it failed; its last words are given.
    """
    done = device.run([sys.executable, "-m", module, *arguments], timeout_s=timeout_s)
    if done.code:
        said, hint = door.refusal(done.stdout, done.stderr, done.code)
        what = "artifact" if where is None or ModelFile.of(arguments[0]) is None else "file"
        raise EdgekdError(f"the {what} does not run on '{device.name}': {said}", hint=hint,
                          where=None if where is not None and str(where.resolve()) in said else where or arguments[0])
    return json.loads(done.stdout)


def _profile(folder: Path | ModelFile, found: dict[str, Any], circumstances: dict[str, Any], target: str, prompts: int, peak: int | None) -> Profile:
    sizes, total = _sizes(folder)
    parts = {name: ComponentProfile(
        latency_ms=Latency.from_samples(p["samples_ms"]), load_ms=p["load_ms"], executed_precision=p["executed_precision"],
        executed_ops=p["executed_ops"], size_bytes=sizes[name]) for name, p in found["components"].items()}
    precision = " / ".join(dict.fromkeys(p.executed_precision for p in parts.values()))
    return Profile(
        id=found["id"], target=target, prompts=prompts, components=parts, latency_ms=Latency.from_samples(found["together_ms"]),
        load_ms=sum(p.load_ms for p in parts.values()), peak_memory_bytes=peak, size_bytes=total, executed_precision=precision, inputs=found.get("inputs"),
        circumstances=Circumstances(**(circumstances | {"precision_executed": precision})))


def _sizes(folder: Path | ModelFile) -> tuple[dict[str, int], int]:
    """Bytes of each component, and of everything."""
    if isinstance(folder, ModelFile):
        return {PART: folder.size_bytes}, folder.size_bytes
    manifest = Manifest.load(folder)
    sizes = {f.path: f.size_bytes for f in manifest.files}
    return {name: sum(sizes[f] for f in part.files) for name, part in manifest.components.items()}, folder_bytes(folder)
