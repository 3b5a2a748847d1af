"""Profiles of "segment everything": one photo from its pixels to all its masks, with the decoder inside, several ways against each other."""
from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from edgekd.data.images import read_image
from edgekd.data.scenes import Scenes
from edgekd.errors import UsageError
from edgekd.measurement import Circumstances, Latency
from edgekd.profiling import door
from edgekd.profiling.latency import interleave
from edgekd.profiling.profile import ask
from edgekd.profiling.transport import reach
from edgekd.runtime import open_artifact
from edgekd.tasks.promptable.everything import Settings, Work, everything, resolve_mode
from edgekd.tasks.promptable.predictor import ModelPredictor
from edgekd.tasks.promptable.proposing import has_proposer

if TYPE_CHECKING:
    from edgekd.profiling.transport import Transport
    from edgekd.target import Target

MODULE = "edgekd.profiling.everything"
PARTS = ("encoder", "proposer", "decoder", "rest")
FIXED_SCENE = 70_010
"""Seed of the picture that is segmented where none is given: how many clicks `hierarchical` needs depends on what is to be seen."""


class EverythingProfile(BaseModel):
    """One artifact and one way to segment everything. `parts_ms` are encoder, proposer, all decoder calls, and the rest on the host
    (filters, suppression, masks at the photo's size); a part that does not run is left out."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    schema_: Literal["edgekd.everything-profile/1"] = Field(default="edgekd.everything-profile/1", alias="schema")
    id: str
    target: str
    mode: str
    photo: str
    latency_ms: Latency
    parts_ms: dict[str, Latency]
    prompts: int
    decoder_calls: int
    masks: int
    circumstances: Circumstances


def profile_everything(
    folders: Sequence[Path], target: str | Target = "host", *, modes: Sequence[str] = (), photo: Path | None = None, transport: Transport | None = None,
    warmup: int = 1, repeats: int = 10, threads: int | None = None, max_seconds: float = 8.0,
) -> list[EverythingProfile]:
    """Profile artifacts in the ways that `modes` names (default: all that each has), all in turns in one fresh process of the device.

    Raises:
        UsageError: the target cannot be reached from here.
        EdgekdError: an artifact is damaged, its runtime is missing, or it does not have the mode; the device's last words are given.
    """
    device = transport or reach(target)
    if device.name != "local":
        raise UsageError(f"segment everything is not measured by {device.name}", hint="the parts on the host need edgekd itself: run it on the device with --device local")
    if threads is None and not isinstance(target, str):
        threads = target.limits.threads
    arguments = [*(device.push(Path(f)) for f in folders), *door.flags(threads=threads, warmup=warmup, repeats=repeats, max_seconds=max_seconds)]
    arguments += [*(x for m in modes for x in ("--mode", m)), *(["--photo", str(photo)] if photo else [])]
    found = ask(device, MODULE, arguments, 300 + 30 * max_seconds * len(folders) * max(3, len(modes)))
    name = target if isinstance(target, str) else target.name
    return [EverythingProfile(
        id=row["id"], target=name, mode=row["mode"], photo=found["photo"], prompts=row["prompts"], decoder_calls=row["calls"], masks=row["masks"],
        latency_ms=Latency.from_samples(row["total_ms"]), circumstances=Circumstances(**found["circumstances"]),
        parts_ms={part: Latency.from_samples(samples) for part, samples in row["parts_ms"].items()}) for row in found["rows"]]


def measure(folders: Sequence[str], *, modes: Sequence[str], photo: str | None, threads: int | None, warmup: int, repeats: int,
            max_seconds: float) -> dict[str, Any]:
    """On the device: samples of every artifact in every mode, taken in turns in this process."""
    image = read_image(photo) if photo else Scenes(FIXED_SCENE, 1)[0].image
    todo = {}
    for i, folder in enumerate(folders):
        model = open_artifact(Path(folder), threads=threads)
        for mode in modes or ["grid", "hierarchical", *(["proposals"] if has_proposer(model) else [])]:
            todo[f"{i} {mode}"] = Run(ModelPredictor(model), resolve_mode(model, mode), image)
    samples = interleave(todo, warmup=warmup, repeats=repeats, max_seconds=max_seconds)
    rows = []
    for key, run in todo.items():
        work = run.work[samples[key].warmup:]  # further runs than the timed ones: those that begin a turn are not timed
        parts = {part: [w.seconds[part] * 1e3 for w in work] for part in PARTS}
        rows.append({"id": run.predictor.name, "mode": run.mode, "total_ms": samples[key].values, "prompts": work[-1].prompts, "calls": work[-1].calls,
                     "masks": run.masks, "parts_ms": {part: values for part, values in parts.items() if min(values) > 0}})
    return {"photo": Path(photo).name if photo else f"scenes:seed={FIXED_SCENE},count=1", "rows": rows,
            "circumstances": Circumstances.capture(threads=threads, warmup=warmup, repeats=repeats).model_dump(mode="json")}


class Run:
    """Segment everything in one way; what every run cost is kept."""

    def __init__(self, predictor: ModelPredictor, mode: str, image: np.ndarray, settings: Settings | None = None) -> None:
        self.predictor, self.mode, self.image, self.settings = predictor, mode, image, settings
        self.work, self.masks = list[Work](), 0

    def __call__(self) -> None:
        found = everything(self.predictor, self.image, mode=self.mode, settings=self.settings)  # type: ignore[arg-type]
        self.work.append(found.work)
        self.masks = len(found)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, print one JSON document. Errors go to stderr with exit code 1."""
    parser = door.parser(MODULE, "Segment everything with artifacts here and print what was measured as JSON.", warmup=1, repeats=10)
    parser.add_argument("--mode", action="append", default=[])
    parser.add_argument("--photo")
    a = parser.parse_args(arguments)
    return door.answer(lambda: measure(a.folders, modes=a.mode, photo=a.photo, threads=a.threads, warmup=a.warmup, repeats=a.repeats,
                                       max_seconds=a.max_seconds))


if __name__ == "__main__":
    sys.exit(main())
