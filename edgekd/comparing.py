"""`edgekd quantize`: a model in a precision against itself in fp32, on the same runtime. A precision that is no gain is called that.

Drops are in points (0..100): of `miou_drop` the accuracy a task is judged by, of `disagreement` the overlap with the float model's own answers.
"""
from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd import console, exporting, plugins, resolve, schemes
from edgekd.data import open_data
from edgekd.decision import RULES
from edgekd.errors import UsageError
from edgekd.profiling import profile_many
from edgekd.quantization.calibration import EncoderCalibration, calibrate
from edgekd.recipe import REFERENCE_SCHEME
from edgekd.runtime import open_artifact
from edgekd.workspace import usable_folder

if TYPE_CHECKING:
    import numpy as np

    from edgekd.artifact import Manifest
    from edgekd.protocols import Dataset
    from edgekd.schemes import Precision
    from edgekd.target import Target
    from edgekd.tasks.evaluation import Judge


@dataclass(frozen=True)
class Comparison:
    """A precision relative to fp32: `size_ratio` and `latency_ratio` below 1 are gains, `drop` (0..1) is what it costs in `metric`.
    What could not be measured is None."""

    size_ratio: float
    latency_ratio: float | None
    drop: float | None
    metric: str = "miou"

    def verdict(self, most: float = RULES.parent_drop) -> tuple[str, str]:
        """`accepted`, `rejected`, or `unverified` where latency cannot be measured; and why, in words. `most`: the drop (0..1) that is allowed."""
        if self.drop is not None and self.drop > most:
            return "rejected", f"it loses {100 * self.drop:.2f} points of its {self.metric} to fp32, more than {100 * most:g}"
        if self.latency_ratio is None:
            return "unverified", f"{self.size_ratio:.2f} of the size; its latency cannot be measured from here"
        if self.latency_ratio > 1 - RULES.faster:
            return "rejected", f"it is not faster than fp32: {self.latency_ratio:.2f} of its time on this machine"
        return "accepted", f"{self.latency_ratio:.2f} of fp32's time and {self.size_ratio:.2f} of its size"


@dataclass(frozen=True)
class Bench:
    """One model, one format, one target: where its precisions are exported, judged and timed against each other."""

    model: str
    source: Any
    format: str
    target: Target
    dataset: Dataset | None
    folder: Path
    limit: int
    known: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)

    @cached_property
    def judge(self) -> Judge | None:
        """What answers are judged by; None without photos."""
        return None if self.dataset is None else plugins.task_of(self.source).judge(self.source, self.dataset)

    @cached_property
    def calibration(self) -> dict[str, Any] | None:
        """What static precisions are shown."""
        return None if self.dataset is None else calibrate(self.source, self.dataset, limit=self.limit)

    def export(self, precision: Precision) -> Manifest:
        """The model's files in a precision, below the folder. Raises as `exporting.export_model` does."""
        name = exporting.candidate_id(self.source.name, self.source.preprocess.image_size, self.format, precision.text)
        console.log(f"export {name}")
        return exporting.export_model(self.source, self.folder / name, format=self.format, scheme=precision.text, teacher=resolve.teacher_of(self.model),
                                      calibration=self.calibration if precision.looks_at_inputs else None, examples=examples(self.source, self.dataset),
                                      qdq=self.target.qdq(self.format))

    def path(self, manifest: Manifest) -> Path:
        """Where it was exported to."""
        return self.folder / manifest.id

    def rows(self, manifests: Sequence[Manifest], *, most: float = RULES.parent_drop) -> list[dict[str, Any]]:
        """What became of each precision; the first is the reference. Latencies are taken in turns, in one process.

        Args:
            most: the drop (0..1) that is allowed.
        """
        latencies: list[Any] = [None] * len(manifests)
        if self.target.reachable:
            latencies = [p.latency_ms for p in profile_many([self.path(m) for m in manifests], self.target, memory=False)]
        judged = [self.scored(m) for m in manifests]
        return [self._row(m, manifests[0], latency, latencies[0], scores, judged[0], most) for m, latency, scores in zip(manifests, latencies, judged, strict=True)]

    def scored(self, manifest: Manifest) -> tuple[float | None, float | None]:
        """Score and agreement of an artifact on its runtime; None without photos. Found once."""
        if manifest.id not in self.known:
            opened = open_artifact(self.path(manifest))
            self.known[manifest.id] = (None, None) if self.judge is None else (self.judge.score(opened), self.judge.agreement(opened))
        return self.known[manifest.id]

    def _row(self, found: Manifest, parent: Manifest, latency: Any, before: Any, scores: tuple[float | None, float | None],
             reference: tuple[float | None, float | None], most: float) -> dict[str, Any]:
        metric = plugins.task_of(self.source).compared_by
        (score, agreement), (base, _) = scores, reference
        drop = None if score is None or base is None else base - score
        compared = Comparison(found.size_bytes / parent.size_bytes, latency.p50 / before.p50 if latency else None, drop, metric)
        verdict, reason = compared.verdict(most)
        executed = {name: part.executed_ops for name, part in found.components.items()}
        return {"id": found.id, "path": str(self.path(found)), "format": found.format, "scheme": found.scheme, "target": self.target.name,
                "size_bytes": found.size_bytes, "size_ratio": compared.size_ratio, "latency_ratio": compared.latency_ratio,
                "latency_ms": latency.model_dump(mode="json") if latency else None, f"{metric}_drop": None if drop is None else 100 * drop,
                "disagreement": None if agreement is None else 100 * (1 - agreement), "drop_unit": "points (0..100)",
                "executed_integer_ops": sum(n for ops in executed.values() for op, n in ops.items() if is_integer(op)),
                "executed_precision": {name: part.executed_precision for name, part in found.components.items()}, "executed_ops": executed,
                "kept_float": kept_float(found), "verdict": verdict, "reason": reason}


def quantize(model: str | Path, *, scheme: str, format: str, target: Target, data: str | Path | None, output: Path, limit: int) -> dict[str, Any]:
    """Export in fp32 and in `scheme` below `output`, measure both in turns, compare what they answer on the photos.

    Raises:
        UsageError: unknown names, a scheme that the target does not run in this format, or no calibration images.
    """
    precision = check_runs(scheme, format, target)
    dataset = open_data(data) if data is not None else None
    if dataset is None and precision.needs_calibration:
        raise UsageError(f"{scheme} needs calibration images", hint="give a folder of images with --data")
    found = bench(model, format, target, dataset, output, limit)
    reference = schemes.parse(REFERENCE_SCHEME)
    rows = found.rows([found.export(each) for each in ([reference] if precision == reference else [reference, precision])])
    return rows[-1] | ({"judged_on": judged_on(found.judge)} if found.judge else {})


def bench(model: str | Path, format: str, target: Target, dataset: Dataset | None, output: Path, limit: int) -> Bench:
    """The bench of a model of ours. Raises UsageError for one of the user's own, which has no photos to be judged on."""
    source = resolve.load_torch(model)
    if not hasattr(source, "preprocess"):
        raise UsageError(f"'{model}' is a {type(source).__name__} whose inputs are not known",
                         hint=f"edgekd export --model {model} --input 1x3x224x224 --to onnx --output DIR, then edgekd quantize the .onnx file")
    return Bench(str(model), source, format, target, dataset, usable_folder(output), limit)


def judged_on(judge: Judge) -> dict[str, Any]:
    """What a document says of its judge."""
    return {"photos": judge.photos, "instances": judge.instances, "disagreement": judge.measure}


def check_runs(scheme: str, format: str, target: Target) -> Precision:
    """The precision that a text says. Refuse one that the exporter does not write or the target does not run, naming those that it does.

    Raises:
        UsageError: it is not the grammar's, or not to be had there.
    """
    precision = schemes.parse(scheme)
    exporter = plugins.exporter(format)
    if format not in target.runs:
        raise UsageError(f"target '{target.name}' has no runtime for format '{format}'", hint=f"it runs {', '.join(target.runs)}")
    possible = [s for s in exporter.schemes if schemes.get(s).runs_as in target.runs[format]]
    for name in dict.fromkeys((precision.scheme.name, *(v for v in precision.exceptions.values() if v not in schemes.FLOATS))):
        if name not in possible:
            raise UsageError(f"target '{target.name}' cannot run scheme '{name}' in format '{format}'", hint=f"there it runs {', '.join(possible)}")
    schemes.refuse(exporter, precision)
    return precision


def kept_float(found: Manifest) -> dict[str, str]:
    """Components and layers that are not in the scheme asked for -> why."""
    told = {name: part.note for name, part in found.components.items() if part.note}
    return told | {f"{name}.{layer}": f"asked for in {precision}" for name, part in found.components.items()
                   for layer, precision in part.tuning.get("keep", {}).items()}


def is_integer(op: str) -> bool:
    """Whether an executed operator is integer arithmetic: onnxruntime tells it by the name, others as `Convolution:i8`, where masks and shapes are whole
    numbers too, so that only what multiplies matrices counts."""
    kind, _, precision = op.partition(":")
    if precision:
        return precision in ("i8", "u8", "i16", "u16") and re.search(r"conv(?!ert)|matmul|fully_?connected|gemm|linear|attention", kind, re.IGNORECASE) is not None
    return re.match(r"QLinear(Conv|MatMul)|QGemm|QAttention|ConvInteger|MatMulInteger|DynamicQuantize(MatMul|LSTM)", kind) is not None


def examples(model: Any, dataset: Dataset | None, *, limit: int = 16) -> np.ndarray | None:
    """(n, 3, S, S) photos for the parity check: what 8 bits do to a classifier shows on photos only. None for promptable models, whose seeded
    pictures and prompts do."""
    if dataset is None or hasattr(model, "decode"):
        return None
    import numpy as np

    return np.concatenate([one["images"] for one in EncoderCalibration(dataset, model.preprocess, limit=limit)])
