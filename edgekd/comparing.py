"""`edgekd quantize`: a model in a precision against itself in fp32, on the same runtime. A precision that is no gain is called that."""
from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd import console, exporting, plugins, resolve, schemes
from edgekd.data import open_data
from edgekd.decision import RULES
from edgekd.errors import UsageError
from edgekd.profiling import profile_many
from edgekd.quantization.calibration import DecoderCalibration, EncoderCalibration
from edgekd.recipe import REFERENCE_SCHEME
from edgekd.runtime import open_artifact
from edgekd.workspace import usable_folder

if TYPE_CHECKING:
    import numpy as np

    from edgekd.artifact import Manifest
    from edgekd.protocols import Dataset
    from edgekd.target import Target

@dataclass(frozen=True)
class Comparison:
    """A precision relative to fp32: `size_ratio` and `latency_ratio` below 1 are gains, `drop` (0..1) is what it costs in `metric`.
    What could not be measured is None."""

    size_ratio: float
    latency_ratio: float | None
    drop: float | None
    metric: str = "miou"

    def verdict(self) -> tuple[str, str]:
        """`accepted`, `rejected`, or `unverified` where latency cannot be measured; and why, in words."""
        if self.drop is not None and self.drop > RULES.parent_drop:
            return "rejected", f"it loses {self.drop:.3f} of its {self.metric} to fp32, more than {RULES.parent_drop:g}"
        if self.latency_ratio is None:
            return "unverified", f"{self.size_ratio:.2f} of the size; its latency cannot be measured from here"
        if self.latency_ratio > 1 - RULES.faster:
            return "rejected", f"it is not faster than fp32: {self.latency_ratio:.2f} of its time on this machine"
        return "accepted", f"{self.latency_ratio:.2f} of fp32's time and {self.size_ratio:.2f} of its size"


def quantize(model: str | Path, *, scheme: str, format: str, target: Target, data: str | Path | None, output: Path, limit: int) -> dict[str, Any]:
    """Export in fp32 and in `scheme` below `output`, measure both in turns, compare what they answer on the photos.

    Raises:
        UsageError: unknown names, a scheme that the target does not run in this format, or no calibration images.
    """
    check_runs(scheme, format, target)
    dataset = open_data(data, masks=False) if data is not None else None
    if dataset is None and schemes.get(scheme).needs_calibration:
        raise UsageError(f"{scheme} needs calibration images", hint="give a folder of images with --data")
    source, teacher = resolve.load_torch(model), resolve.teacher_of(model)
    if not hasattr(source, "preprocess"):
        raise UsageError(f"'{model}' is a {type(source).__name__} whose inputs are not known",
                         hint=f"edgekd export --model {model} --input 1x3x224x224 --to onnx --output DIR, then edgekd quantize the .onnx file")
    folder = usable_folder(output)
    manifests: list[Manifest] = []
    for each in dict.fromkeys((REFERENCE_SCHEME, scheme)):
        name = exporting.candidate_id(source.name, source.preprocess.image_size, format, each)
        console.log(f"export {name}")
        calibration = calibrate(source, dataset, limit=limit) if dataset is not None and schemes.get(each).looks_at_inputs else None
        manifests.append(exporting.export_model(source, folder / name, format=format, scheme=each, teacher=teacher, calibration=calibration,
                                                examples=examples(source, dataset), qdq=target.qdq(format)))
    return _report(manifests[0], manifests[-1], folder, target, source, dataset)


def check_runs(scheme: str, format: str, target: Target) -> None:
    """Refuse a scheme that the exporter does not write or the target does not run, naming those that it does."""
    schemes.get(scheme)
    offered = plugins.exporter(format).schemes
    if format not in target.runs:
        raise UsageError(f"target '{target.name}' has no runtime for format '{format}'", hint=f"it runs {', '.join(target.runs)}")
    possible = [s for s in target.runs[format] if s in offered]
    if scheme not in possible:
        raise UsageError(f"target '{target.name}' cannot run scheme '{scheme}' in format '{format}'", hint=f"there it runs {', '.join(possible)}")


def _report(reference: Manifest, found: Manifest, folder: Path, target: Target, source: Any, dataset: Dataset | None) -> dict[str, Any]:
    paths = [folder / m.id for m in (reference, found)]
    latencies: list[Any] = [None, None]
    if target.reachable:
        latencies = [p.latency_ms for p in profile_many(paths, target, memory=False)]
    task, drop = plugins.task_of(source), None
    metric = task.compared_by
    if dataset is not None:
        scores = task.compare(source, [open_artifact(path) for path in paths], dataset)
        drop = scores[0] - scores[1]
    compared = Comparison(found.size_bytes / reference.size_bytes, latencies[1].p50 / latencies[0].p50 if latencies[0] else None, drop, metric)
    verdict, reason = compared.verdict()
    integer = sum(n for part in found.components.values() for op, n in part.executed_ops.items() if is_integer(op))
    return {"id": found.id, "path": str(folder / found.id), "format": found.format, "scheme": found.scheme, "target": target.name,
            "size_bytes": found.size_bytes, "size_ratio": compared.size_ratio, "latency_ratio": compared.latency_ratio,
            "latency_ms": latencies[1].model_dump(mode="json") if latencies[1] else None, f"{metric}_drop": drop,
            "executed_integer_ops": integer, "kept_float": {name: part.note for name, part in found.components.items() if part.note}, "verdict": verdict, "reason": reason}


def is_integer(op: str) -> bool:
    """Whether an executed operator is integer arithmetic: onnxruntime tells it by the name, OpenVINO as `Convolution:i8`."""
    kind, _, precision = op.partition(":")
    return precision in ("i8", "u8", "i16", "u16") or re.match(r"QLinear(Conv|MatMul)|QGemm|QAttention|ConvInteger|MatMulInteger|DynamicQuantize(MatMul|LSTM)", kind) is not None


def calibrate(model: Any, dataset: Dataset, *, limit: int) -> dict[str, Any]:
    """Calibration inputs of every component, streamed from at most `limit` photos."""
    task, photos = plugins.task_of(model), EncoderCalibration(dataset, model.preprocess, limit=limit)
    return {task.photo_component: photos} | ({"decoder": DecoderCalibration(photos, model)} if hasattr(model, "decode") else {})


def examples(model: Any, dataset: Dataset | None, *, limit: int = 16) -> np.ndarray | None:
    """(n, 3, S, S) photos for the parity check: what 8 bits do to a classifier shows on photos only. None for promptable models, whose seeded
    pictures and prompts do."""
    if dataset is None or hasattr(model, "decode"):
        return None
    import numpy as np

    return np.concatenate([one["images"] for one in EncoderCalibration(dataset, model.preprocess, limit=limit)])
