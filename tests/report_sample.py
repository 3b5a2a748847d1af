"""A report as a run would make it, for the tests of the report. The numbers are invented: this is no result of anything."""
from __future__ import annotations

import math

import numpy as np

from edgekd.measurement import Latency
from edgekd.report.figures import Curve, Overlay
from edgekd.report.overlays import compare
from edgekd.report.schema import (
    Accuracy,
    Agreement,
    BudgetRow,
    CandidateRow,
    ComponentRow,
    Protocol,
    Report,
    Run,
    Speedup,
    Target,
    Teacher,
)

SPACE = [
    # student, params, format, scheme, encoder ms, decoder ms, MB, box agreement, executed
    ("repvit_m1", 4_900_000, "onnx", "fp32", 7.92, 1.61, 22.8, 0.884, "fp32"),
    ("repvit_m1", 4_900_000, "onnx", "w8a8_static", 11.30, 1.98, 6.6, 0.861, "int8"),
    ("repvit_m1", 4_900_000, "onnx", "w8_dynamic", 29.40, 2.12, 6.4, 0.879, "int8"),
    ("repvit_m1", 4_900_000, "openvino", "fp32", 6.10, 1.22, 22.9, 0.884, "fp32"),
    ("repvit_m1", 4_900_000, "openvino", "bf16", 3.18, 0.81, 22.9, 0.883, "bf16"),
    ("repvit_m1", 4_900_000, "openvino", "w8a8_static", 2.71, 0.88, 6.9, 0.831, "int8"),
    ("tinyvit_5m", 5_400_000, "onnx", "fp32", 14.90, 1.60, 24.4, 0.891, "fp32"),
    ("tinyvit_5m", 5_400_000, "onnx", "w8a8_static", 19.70, 1.97, 7.1, 0.742, "int8"),
    ("tinyvit_5m", 5_400_000, "openvino", "fp32", 12.20, 1.21, 24.6, 0.891, "fp32"),
    ("tinyvit_5m", 5_400_000, "openvino", "bf16", 7.74, 0.83, 24.6, 0.890, "bf16"),
    ("repvit_nano", 1_100_000, "onnx", "fp32", 2.60, 1.62, 7.7, 0.842, "fp32"),
    ("repvit_nano", 1_100_000, "openvino", "fp32", 2.05, 1.22, 7.8, 0.842, "fp32"),
    ("repvit_nano", 1_100_000, "openvino", "bf16", 1.34, 0.82, 7.8, 0.840, "bf16"),
]


def latency(p50: float, n: int = 60, provenance: str = "measured") -> Latency:
    return Latency(p50=p50, p90=p50 * 1.06, p99=p50 * 1.19, mean=p50 * 1.015, min=p50 * 0.96, n=n, provenance=provenance)


def row(id: str = "m-256-onnx-fp32", took: float | None = 4.0, box: float | None = 0.9, *, mb: float = 20.0, memory: float | None = None, trained: bool = True,
        provenance: str = "measured", params: int | None = None, executed: str | None = None, **more: object) -> CandidateRow:
    """One candidate by its id, measured and trained unless told otherwise."""
    student, size, format, scheme = id.rsplit("-", 3)
    fields = {
        "id": id, "student": student, "image_size": int(size), "scheme": scheme, "format": format, "trained": trained, "params": params,
        "parent": None if scheme == "fp32" else f"{student}-{size}-{format}-fp32", "size_bytes": round(mb * 1e6),
        "peak_memory_bytes": None if memory is None else round(memory * 1e6),
        "latency_ms": None if took is None else latency(took, provenance=provenance),
        "accuracy": None if box is None else Accuracy(box_miou=box - 0.1, teacher_agreement=Agreement(box=box)),
        "components": {"encoder": ComponentRow(executed_precision=executed), "decoder": ComponentRow(executed_precision=executed)}}
    return CandidateRow.model_validate(fields | more)


def rows() -> list[CandidateRow]:
    """The candidates before they are judged."""
    found = []
    for student, params, format, scheme, enc, dec, mb, box, executed in SPACE:
        parity = {"mask_iou": 0.9991, "cosine": 0.999997, "passed": True}
        found.append(CandidateRow(
            id=f"{student}-256-{format}-{scheme}", student=student, image_size=256, scheme=scheme, format=format, trained=True, params=params,
            parent=None if scheme == "fp32" else f"{student}-256-{format}-fp32", size_bytes=round(mb * 1e6), peak_memory_bytes=round((92 + 2.4 * mb) * 1e6),
            components={"encoder": ComponentRow(latency_ms=latency(enc), size_bytes=round(mb * 0.75e6), parity=parity, executed_precision=executed, executed_ops={"Convolution": 61}),
                        "decoder": ComponentRow(latency_ms=latency(dec), size_bytes=round(mb * 0.25e6), parity=parity, executed_precision="bf16" if executed == "bf16" else "fp32")},
            latency_ms=latency(enc + dec),
            accuracy=Accuracy(box_miou=box - 0.09, center_miou=box - 0.24, center_plus2_miou=box - 0.15, teacher_agreement=Agreement(box=box, center=box - 0.11))))
    failed = CandidateRow(id="repvit_nano-256-onnx-w8a8_static", student="repvit_nano", image_size=256, scheme="w8a8_static", format="onnx", status="failed", stage="export",
                          reason="encoder: the mask IoU with the student is 0.61, the gate is 0.90", trained=True, parent="repvit_nano-256-onnx-fp32")
    planned = CandidateRow(id="repvit_m2-256-onnx-fp32", student="repvit_m2", image_size=256, scheme="fp32", format="onnx", latency_ms=latency(21.2), size_bytes=33_000_000,
                           components={"encoder": ComponentRow(latency_ms=latency(19.6)), "decoder": ComponentRow(latency_ms=latency(1.6))})
    return [*found, failed, planned]


def report(budget: BudgetRow | None = None, *, name: str = "sam_nano-host", dataset: str = "photos: 12 images of examples/photos", skipped: tuple[str, ...] = ()) -> Report:
    """The judged report of the rows above."""
    from edgekd.decision import choose, judge

    budget = budget or BudgetRow(latency_ms=8.0)
    judged = judge(rows(), budget, teacher_ms=48.7)
    decision = choose(judged, budget)
    best = next((r for r in judged if r.id == decision.chosen), None)
    return Report(
        run=Run(name=name, command=f"edgekd compress --teacher sam_nano --target host --data examples/photos --budget-ms {budget.latency_ms or ''}".strip(),
                started="2026-11-21T13:05:12+00:00", seconds=161.4, version="0.1.0", recipe="default", data="examples/photos"),
        environment={"os": "Linux 6.1", "python": "3.11.7", "versions": {"torch": "2.13.0", "onnxruntime": "1.27.0", "openvino": "2026.1.0"}, "cpu_flags": ["avx2", "avx512f", "amx_bf16"]},
        target=Target(name="host", device="Xeon Platinum 8481C (2 cores)", transport="local", threads=2), budget=budget,
        protocol=Protocol(prompts=["box", "center click", "2 more clicks in the error region"], dataset=dataset, images=12, instances=96, labels="the teacher's masks", skipped=list(skipped)),
        teacher=Teacher(name="sam_nano", params=11_800_000, size_bytes=24_100_000, image_size=256, latency_ms=latency(48.7), licence="Apache-2.0",
                        components={"encoder": ComponentRow(latency_ms=latency(46.9), executed_precision="fp32"), "decoder": ComponentRow(latency_ms=latency(1.8), executed_precision="fp32")},
                        accuracy=Accuracy(box_miou=0.824, center_miou=0.661, center_plus2_miou=0.772, teacher_agreement=Agreement(box=1.0, center=1.0))),
        candidates=judged, chosen=decision.chosen, verdict=decision.verdict, reason=decision.reason, nearest=decision.nearest,
        speedup=Speedup(value=48.7 / best.latency_ms.p50, baseline="sam_nano (onnx fp32)", provenance="measured", encoder=14.7) if best and best.latency_ms else None)


def curves() -> list[Curve]:
    steps = tuple(range(0, 600, 10))
    return [Curve(s, stage, steps, tuple(lo + (hi - lo) * math.exp(-i / t) + 0.02 * hi * math.sin(i * 1.7) ** 2 for i in steps))
            for s, stage, hi, lo, t in (("repvit_m1-256", "encoder", 0.9, 0.05, 120), ("repvit_m1-256", "prompts", 0.31, 0.18, 200), ("tinyvit_5m-256", "encoder", 0.8, 0.06, 150))]


def photo(height: int = 120, width: int = 160, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A disc on a gradient: image (H, W, 3) uint8 and its mask (H, W) bool."""
    y, x = np.mgrid[:height, :width]
    mask = (x - width * 0.45) ** 2 + (y - height * (0.5 + 0.03 * seed)) ** 2 < (height * 0.3) ** 2
    image = np.stack([x * 200 / width, y * 200 / height, np.full_like(x, 90)], -1)
    image[mask] = (220, 170, 60)
    return image.astype(np.uint8), mask


def overlays(titles: tuple[str, ...] = ("coffee.jpg", "cat.png")) -> list[Overlay]:
    found = []
    for i, title in enumerate(titles):
        image, mask = photo(seed=i)
        student = np.roll(mask, 4, axis=1)
        points = np.asarray([[[72.0, 60.0]]], np.float32)
        found.append(compare(image, mask[None], student[None], points, np.ones((1, 1), np.float32), title=title, names=("sam_nano", "repvit_m1"), width=160))
    return found
