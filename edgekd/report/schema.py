"""`report.json`: everything a run found, as typed rows (schema `edgekd.report/1`).

Data only: this module imports no engine, so that the decision and the pipeline can speak in its rows. Optional fields that are
not known are absent from the file, never null; `chosen` alone is always there, null when nothing was chosen.

`python -m edgekd.report.schema` writes the JSON Schema that ships beside this file; a test keeps it current.
"""
from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import Self

from edgekd.errors import EdgekdError
from edgekd.measurement import Latency, Provenance
from edgekd.protocols import State
from edgekd.recipe import Budget as BudgetRow
from edgekd.workspace import write_atomic

SCHEMA = "edgekd.report/1"
JSON_SCHEMA = Path(__file__).with_name("report.schema.json")

Status = Literal["accepted", "rejected", "failed"]
Stage = Literal["plan", "train", "export", "profile", "evaluate", "decide"]
Verdict = Literal["met", "missed", "unverified"]


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class Agreement(_Row):
    """Mean IoU with the teacher's mask on the same prompt."""

    box: float | None = None
    center: float | None = None


class Accuracy(_Row):
    """Mean IoU by protocol, 0..1; the names say which prompt was given (design, "On disk")."""

    box_miou: float | None = None
    center_miou: float | None = None
    center_plus1_miou: float | None = None
    center_plus2_miou: float | None = None
    teacher_agreement: Agreement | None = None

    def value(self, metric: str) -> float | None:
        """The number named by a dotted path such as `teacher_agreement.box`; None when it was not measured."""
        found: Any = self
        for part in metric.split("."):
            found = getattr(found, part, None)
        return found if isinstance(found, float) else None


METRICS = {
    "teacher_agreement.box": "box agreement with the teacher",
    "teacher_agreement.center": "one-click agreement with the teacher",
    "box_miou": "box mIoU",
    "center_miou": "one-click mIoU",
    "center_plus1_miou": "two-click mIoU",
    "center_plus2_miou": "three-click mIoU",
}
"""Metric -> its name in a sentence."""


class ComponentRow(_Row):
    """One exported part of a candidate. `parity` compares the artifact with the student it came from."""

    latency_ms: Latency | None = None
    size_bytes: int | None = None
    parity: dict[str, Any] | None = None
    executed_precision: str | None = None
    executed_ops: dict[str, int] | None = None
    note: str | None = None
    """Why this part is not in the candidate's scheme, when it is not."""
    state: State = "ran"
    """Whether the file `ran` where it was exported, was `built` by its vendor's compiler, or its contents were `checked`."""
    stand_in: str | None = None
    """What computed parity and accuracy in the place of a runtime that is not there."""


class CandidateRow(_Row):
    """One (student, size, format, scheme) with all that is known of it. A row is accepted until something speaks against it."""

    id: str
    student: str
    image_size: int = Field(gt=0)
    scheme: str
    format: str
    status: Status = "accepted"
    reason: str = ""
    stage: Stage | None = None
    """Where it was rejected or failed."""
    parent: str | None = None
    """Id of the fp32 candidate of the same student, size and format."""
    trained: bool = False
    params: int | None = None
    components: dict[str, ComponentRow] = {}
    latency_ms: Latency | None = None
    """Encoder and decoder together, for the budget's number of prompts, one when it names none."""
    everything_ms: Latency | None = None
    """Segment everything on one photo, where the budget limits it."""
    energy_mj: float | None = None
    """Of one use, where the device tells its power."""
    peak_memory_bytes: int | None = None
    size_bytes: int | None = None
    accuracy: Accuracy | None = None

    @model_validator(mode="after")
    def _says_why(self) -> Self:
        if self.status != "accepted" and not self.reason:
            raise ValueError(f"candidate {self.id} is {self.status} without a reason")
        return self

    @property
    def accuracy_provenance(self) -> Provenance:
        """An accuracy that something else computed in the runtime's place is predicted for it."""
        return "predicted" if any(part.stand_in for part in self.components.values()) else "measured"

    def turned(self, status: Status, reason: str, stage: Stage | None) -> CandidateRow:
        """The same row with another status; this one stays as it is."""
        return self.model_copy(update={"status": status, "reason": reason, "stage": stage})


class Nearest(_Row):
    """When the budget was missed: the candidate that came nearest, and by how much it misses each limit that it misses."""

    id: str
    gap_ms: float | None = None
    gap_mb: float | None = None
    gap_memory_mb: float | None = None
    gap_accuracy: float | None = None
    gaps: dict[str, float] = {}
    """Limit of the budget -> by how much it is missed, all of them."""
    reason: str
    give: list[str] = []
    """What would have to give: for each limit that helps alone, how far it must be loosened and what would then be chosen."""


class Speedup(_Row):
    """How many times faster the chosen candidate is than `baseline`; `encoder` is the same for the encoder alone."""

    value: float = Field(gt=0)
    baseline: str
    provenance: Provenance
    encoder: float | None = None


class Teacher(_Row):
    """The model copied from. `components` holds its latencies part by part."""

    name: str
    params: int | None = None
    size_bytes: int | None = None
    image_size: int | None = None
    accuracy: Accuracy | None = None
    latency_ms: Latency | None = None
    components: dict[str, ComponentRow] = {}
    licence: str | None = None


class Protocol(_Row):
    """What the accuracy was measured on. `labels` says where the masks came from ('human', 'procedural', 'none: the teacher's masks')."""

    prompts: list[str]
    dataset: str
    images: int
    instances: int
    labels: str | None = None
    split: str | None = None
    skipped: list[str] = []


class Run(_Row):
    """The run itself: what was typed, when, and how long it took."""

    name: str
    command: str
    started: str
    seconds: float | None = None
    version: str | None = None
    recipe: str | None = None
    data: str | None = None


class Target(BaseModel):
    """The device. Keys that this version does not know are kept."""

    model_config = ConfigDict(extra="allow")
    name: str
    device: str | None = None
    transport: str | None = None
    threads: int | None = None


class Report(_Row):
    """A whole run. Ids are unique, and what is chosen is an accepted candidate."""

    schema_: Literal["edgekd.report/1"] = Field(default="edgekd.report/1", alias="schema")
    run: Run
    environment: dict[str, Any] = {}
    target: Target
    budget: BudgetRow = BudgetRow()
    protocol: Protocol
    teacher: Teacher
    candidates: list[CandidateRow]
    chosen: str | None = None
    verdict: Verdict
    reason: str
    """The decision in one sentence, with the rule it followed."""
    nearest: Nearest | None = None
    speedup: Speedup | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        ids = [c.id for c in self.candidates]
        if len(set(ids)) != len(ids):
            raise ValueError(f"candidate ids repeat: {sorted({i for i in ids if ids.count(i) > 1})}")
        if self.verdict == "missed" and self.chosen is not None:
            raise ValueError("a missed budget has no chosen candidate")
        if self.chosen is not None and (self.best is None or self.best.status != "accepted"):
            raise ValueError(f"chosen candidate {self.chosen!r} is not among the accepted ones")
        return self

    @property
    def best(self) -> CandidateRow | None:
        """The chosen candidate's row."""
        return self.row(self.chosen)

    @property
    def shown(self) -> CandidateRow | None:
        """The chosen candidate's row, or that of the nearest one when the budget was missed."""
        return self.best or self.row(self.nearest.id if self.nearest else None)

    def row(self, id: str | None) -> CandidateRow | None:
        """The candidate with this id."""
        return next((c for c in self.candidates if c.id == id), None)

    def document(self) -> dict[str, Any]:
        """The JSON document, as `report.json` holds it and `--json` prints it."""
        document = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        document["chosen"] = self.chosen
        return {name: document[name] for name in order() if name in document}


def order() -> list[str]:
    """The top-level keys of the document in their order."""
    return [field.alias or name for name, field in Report.model_fields.items()]


def dumps(report: Report) -> str:
    """The text of `report.json`."""
    return json.dumps(report.document(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def save(path: Path, report: Report) -> Path:
    """Write `report.json`, atomically."""
    return write_atomic(path, dumps(report))


def load(path: Path) -> Report:
    """Read a `report.json`.

    Raises:
        EdgekdError: there is none, or it is not one of this schema.
    """
    path = Path(path)
    if not path.is_file():
        raise EdgekdError("there is no report here", where=path, hint="finish the run first: the same `edgekd compress` command continues it")
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")))
    except (ValidationError, ValueError) as e:
        first = e.errors()[0] if isinstance(e, ValidationError) else None
        what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else str(e)
        raise EdgekdError(f"the report cannot be read: {what}", where=path, hint=f"this version reads schema {SCHEMA}") from e


def parse(document: Mapping[str, Any]) -> Report:
    """A report from its JSON document; raises pydantic's ValidationError."""
    return Report.model_validate(document)


def json_schema() -> str:
    """The JSON Schema text of this version, from the models."""
    return json.dumps({"$id": SCHEMA, **Report.model_json_schema(by_alias=True)}, indent=2) + "\n"


if __name__ == "__main__":
    write_atomic(JSON_SCHEMA, json_schema())
