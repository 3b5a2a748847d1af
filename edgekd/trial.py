"""What is done with one trained student: export its candidates, profile them against each other, evaluate each. Every step's result
goes through the ledger, so that nothing finished is done twice."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd import artifact, console, exporting, schemes
from edgekd.errors import EdgekdError
from edgekd.exporting import weights_sha256
from edgekd.ledger import Ledger, Result
from edgekd.measurement import Latency
from edgekd.models.sam import Sam
from edgekd.profiling.boards import Partly
from edgekd.profiling.everything import profile_everything
from edgekd.profiling.profile import Profile, profile_many
from edgekd.protocols import Dataset
from edgekd.quantization.calibration import calibrate
from edgekd.recipe import Recipe
from edgekd.report.schema import Accuracy, Agreement, CandidateRow, ComponentRow
from edgekd.runtime import open_artifact
from edgekd.search.space import Candidate
from edgekd.target import Target
from edgekd.tasks.promptable import scoring
from edgekd.tasks.promptable.predictor import Remembered
from edgekd.workspace import fingerprint

if TYPE_CHECKING:
    from edgekd.latency.predictor import Prediction


@dataclass(frozen=True)
class Bench:
    """What all trials of a run share. `labelled` holds the ids of evaluation images whose masks are not the teacher's own."""

    folder: Path
    ledger: Ledger
    recipe: Recipe
    target: Target
    teacher: Sam
    oracle: Remembered
    evaluation: Dataset
    labelled: frozenset[str]
    calibration: Dataset

    @cached_property
    def evaluation_key(self) -> list[Any]:
        """What an accuracy depends on besides the model: the images, the teacher's weights (its masks may be the labels), the settings."""
        return [self.evaluation.fingerprint(), weights_sha256(self.teacher), self.recipe.evaluation.model_dump()]

    def artifact(self, id: str) -> Path:
        """Where a candidate's files are."""
        return self.folder / "artifacts" / id

    @property
    def prompts(self) -> int:
        """Prompts of a photo that a latency is for."""
        return self.recipe.budget.prompts or self.recipe.profile.prompts

    @property
    def threads(self) -> int | None:
        return self.recipe.profile.threads or self.target.limits.threads


def build_row(candidate: Candidate, student: Sam, *, trained: bool) -> CandidateRow:
    """A row of which nothing is known yet."""
    params = sum(p.numel() for p in student.encoder.parameters()) + sum(p.numel() for p in student.mask_decoder.parameters())
    return CandidateRow(id=candidate.id, student=candidate.student, image_size=candidate.image_size, scheme=candidate.scheme, format=candidate.format,
                        parent=candidate.parent, trained=trained, params=params)


def export(bench: Bench, row: CandidateRow, student: Sam, source: str) -> CandidateRow:
    """The row with its artifact's facts, or failed with the reason. An artifact that is there and whole is kept.

    Args:
        source: digest of the student's weights; an artifact made from others is made again.
    """
    folder = bench.artifact(row.id)
    needs = schemes.parse(row.scheme).looks_at_inputs
    key = fingerprint([source, row.id, row.trained, bench.target.qdq(row.format), [bench.calibration.fingerprint(), bench.recipe.quantization.calibration_images] if needs else None])
    known = bench.ledger.known("export", key)
    if known and (known["status"] == "failed" or _whole(folder)):
        bench.ledger.reused += 1
    else:
        console.log(f"export {row.id}" + ("" if row.trained else " (untrained)"))
        known = bench.ledger.record("export", row.id, key, _export(bench, row, student, folder))
    if known["status"] == "failed":
        return row.turned("failed", known["reason"], "export")
    return _with_manifest(row, artifact.Manifest.load(folder))


def _whole(folder: Path) -> bool:
    try:
        artifact.verify(folder)
    except EdgekdError:
        return False
    return True


def _export(bench: Bench, row: CandidateRow, student: Sam, folder: Path) -> Result:
    calibration = calibrate(student, bench.calibration, limit=bench.recipe.quantization.calibration_images, choose=row.trained) \
        if schemes.parse(row.scheme).looks_at_inputs else None
    try:
        exporting.export_model(student, folder, format=row.format, scheme=row.scheme, name=row.id, teacher=bench.teacher.name, calibration=calibration,
                               threads=bench.threads, qdq=bench.target.qdq(row.format), gate=row.trained)
    except EdgekdError as e:
        return {"status": "failed", "reason": e.what}
    return {"status": "ok", "files": [f.model_dump() for f in artifact.Manifest.load(folder).files]}


def _with_manifest(row: CandidateRow, manifest: artifact.Manifest) -> CandidateRow:
    sizes = {f.path: f.size_bytes for f in manifest.files}
    parts = {
        name: ComponentRow(size_bytes=sum(sizes.get(f, 0) for f in part.files), parity=part.parity, executed_precision=part.executed_precision,
                           executed_ops=part.executed_ops, note=part.note, state=part.state, stand_in=part.stand_in)
        for name, part in manifest.components.items()
    }
    return row.model_copy(update={"components": parts, "size_bytes": manifest.size_bytes})


def profile(bench: Bench, rows: Sequence[CandidateRow], beside: Sequence[str] = (), *, memory: bool = True) -> tuple[list[CandidateRow], dict[str, Profile]]:
    """The rows with latencies, measured in turns in one process with the artifacts `beside` (the teacher); failed rows stay as they are.

    On a target that cannot be reached nothing is measured, and the latencies are predicted.
    """
    ids = [*(r.id for r in rows if r.status != "failed"), *beside]
    if not bench.target.reachable or not ids:
        return [predicted(bench, row) for row in rows], {}
    settings = bench.recipe.profile
    made = [fingerprint([f.model_dump() for f in artifact.Manifest.load(bench.artifact(i)).files]) for i in ids]

    def work() -> Result:
        console.log(f"profile {len(ids)} artifacts against each other")
        failed: dict[str, str] = {}
        try:
            found = profile_many([bench.artifact(i) for i in ids], target=bench.target, warmup=settings.warmup, repeats=settings.repeats,
                                 threads=bench.threads, prompts=bench.prompts, memory=memory)
        except Partly as e:
            if not e.errors:
                raise
            found, failed = e.profiles, e.errors
        return {"profiles": {p.id: p.model_dump(mode="json", by_alias=True) for p in found}, "failed": failed}

    result = bench.ledger.once("profile", ",".join(ids), fingerprint([made, settings.model_dump(), bench.prompts, bench.threads, memory, bench.target.device.url]), work)
    profiles = {i: Profile.model_validate(p) for i, p in result["profiles"].items()}
    for id, one in profiles.items():
        one.save(bench.folder / "profiles" / f"{id}.json")
    for id, why in result["failed"].items():
        console.warn(f"{id} does not run on {bench.target.name}: {why}")
    return [_timed(bench, row, profiles, result["failed"]) for row in rows], profiles


def _timed(bench: Bench, row: CandidateRow, profiles: Mapping[str, Profile], failed: Mapping[str, str]) -> CandidateRow:
    if row.id in failed:
        return row.turned("failed", f"it does not run on the device: {failed[row.id]}", "profile")
    return segmenting(bench, with_profile(row, profiles[row.id])) if row.id in profiles else row


def predicted(bench: Bench, row: CandidateRow) -> CandidateRow:
    """The row with latencies that nobody measured, marked so; without them where nothing is known of the device or of files of this format."""
    if row.status == "failed" or not row.components:
        return row
    from edgekd.latency import predictor

    try:
        found = predictor.predict(bench.artifact(row.id), bench.target, threads=bench.threads, prompts=bench.prompts)
    except EdgekdError as e:
        console.log(f"{row.id}: no prediction ({e.what})")
        return row
    parts = {name: part.model_copy(update={"latency_ms": _guess(found.parts[name])}) if name in found.parts else part for name, part in row.components.items()}
    return row.model_copy(update={"components": parts, "latency_ms": _guess(found)})


def _guess(found: Prediction) -> Latency:
    """A prediction as a latency whose quantiles are its interval."""
    return Latency(p50=found.ms, p90=found.high, p99=found.high, mean=found.ms, min=found.low, n=0, provenance="predicted")


def with_profile(row: CandidateRow, profile: Profile) -> CandidateRow:
    """The row with what was measured of it."""
    parts = {name: part.model_copy(update={"latency_ms": profile.components[name].latency_ms, "executed_precision": profile.components[name].executed_precision})
             for name, part in row.components.items()}
    return row.model_copy(update={"components": parts, "latency_ms": profile.latency_ms, "peak_memory_bytes": profile.peak_memory_bytes,
                                  "energy_mj": profile.energy_mj})


def segmenting(bench: Bench, row: CandidateRow) -> CandidateRow:
    """The row with what segmenting everything on one photo takes, where the budget limits it."""
    if bench.recipe.budget.everything_ms is None or row.status == "failed" or not bench.target.reachable:
        return row
    folder = bench.artifact(row.id)

    def work() -> Result:
        console.log(f"segment everything with {row.id}")
        mode = "proposals" if "proposer" in row.components else "hierarchical"
        found = profile_everything([folder], bench.target, modes=[mode], threads=bench.threads)[0]
        return {"latency_ms": found.latency_ms.model_dump(mode="json")}

    key = fingerprint([[f.model_dump() for f in artifact.Manifest.load(folder).files], bench.threads])
    return row.model_copy(update={"everything_ms": Latency.model_validate(bench.ledger.once("everything", row.id, key, work)["latency_ms"])})


def evaluate(bench: Bench, row: CandidateRow) -> CandidateRow:
    """The row with its accuracy, that of the exported files on their runtime; where that is not here, on what computes them in its place
    (`ComponentRow.stand_in`), and without an accuracy where nothing does."""
    if row.status == "failed" or any(part.state != "ran" and part.stand_in is None for part in row.components.values()):
        return row
    folder = bench.artifact(row.id)
    made = [f.model_dump() for f in artifact.Manifest.load(folder).files]

    def work() -> Result:
        console.log(f"evaluate {row.id}")
        return measure(bench, open_artifact(folder, threads=bench.threads, stand_in=True))

    key = fingerprint([made, bench.evaluation_key])
    return row.model_copy(update={"accuracy": accuracy(bench.ledger.once("evaluate", row.id, key, work))})


def measure(bench: Bench, model: Any) -> Result:
    """Evaluate any model as the candidates are: the mIoUs on images with labels of their own, the agreement on all."""
    found = scoring.evaluate(model, bench.evaluation, teacher=bench.oracle, max_instances=bench.recipe.evaluation.max_instances)
    return {"per_image": found.per_image, "protocol": found.protocol, "images": found.images, "instances": found.instances,
            "labelled": sorted(bench.labelled)}


def accuracy(result: Mapping[str, Any]) -> Accuracy:
    """Means over instances: of the labelled images for what is compared with labels, of all images for the agreement."""
    labelled = set(result["labelled"])

    def mean(metric: str, only_labelled: bool) -> float | None:
        rows = [r for r in result["per_image"] if metric in r and (r["id"] in labelled or not only_labelled)]
        total = sum(r["instances"] for r in rows)
        return sum(r[metric] * r["instances"] for r in rows) / total if total else None

    agreement = Agreement(box=mean("teacher_agreement.box", False), center=mean("teacher_agreement.center", False))
    return Accuracy(**{m: mean(m, True) for m in scoring.METRICS}, teacher_agreement=agreement)

