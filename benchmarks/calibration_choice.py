"""Which photos int8 ranges are found on: the error of the student's embedding on photos that were not seen, by how a few were chosen; JSON out.

    python benchmarks/calibration_choice.py --data examples/photos --output benchmarks/results/calibration-choice-2026-11-22.json

Each draw makes a skewed set as folders often are: 40 crops of one photo, almost the same, and 8 other photos, in random order; and, of data that has
enough, a set of 48 different photos. 8 of the 48 are shown to onnxruntime's static quantizer (u8s8): every sixth, random ones, or k-centre greedy over
embeddings (`edgekd.quantization.choosing`). The error is that of the embedding on photos that are not in the set, relative to its size (L2). Beside them
stand all 48, and of a skewed set each scene once.
"""
from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgekd import plugins, resolve
from edgekd.data import open_data
from edgekd.data.images import preprocess
from edgekd.exporting import folded
from edgekd.measurement import Circumstances
from edgekd.protocols import Component, Dataset, Sample
from edgekd.quantization.calibration import EncoderCalibration
from edgekd.quantization.choosing import representative, spread
from edgekd.workspace import fingerprint, write_json

ROOT = Path(__file__).resolve().parents[1]
SET, SHOWN, SKEWS = 48, 8, (40, 0)


class Skewed:
    """`alike` crops of photo `one` of a dataset, each of 85 to 95 % of its sides and of up to 5 % other brightness, and the photos `others`; shuffled."""

    skipped, has_masks = list[str](), False

    def __init__(self, source: Dataset, one: int, alike: int, others: Sequence[int], rng: np.random.Generator) -> None:
        self.name, self.source, self.one = f"{source[one].id} x {alike}", source, one
        crops = [(one, tuple(rng.uniform((0.85, 0.0, 0.0, 0.95), (0.95, 1.0, 1.0, 1.05)))) for _ in range(alike)]
        self.made: list[Any] = [crops[i] if i < alike else (others[i - alike], None) for i in rng.permutation(alike + len(others))]

    def __len__(self) -> int:
        return len(self.made)

    def __getitem__(self, index: int) -> Sample:
        photo, crop = self.made[index]
        image = self.source[photo].image
        if crop is not None:
            (share, down, right, light), (height, width) = crop, image.shape[:2]
            rows, columns = int(height * share), int(width * share)
            top, left = int((height - rows) * down), int((width - columns) * right)
            image = (image[top:top + rows, left:left + columns] * light).clip(0, 255).astype(np.uint8)
        return Sample(f"{index}", image)

    def fingerprint(self) -> str:
        return fingerprint([self.source.fingerprint(), self.made])


def error(part: Component, calibration: EncoderCalibration, images: Sequence[np.ndarray], exact: Sequence[np.ndarray]) -> list[float]:
    """Relative error (L2) of the int8 encoder's embedding of each image (1, 3, S, S)."""
    exporter = plugins.exporter("onnx")
    with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
        path = Path(folder) / "encoder.onnx"
        exporter.export(part, path, scheme="w8a8_static", calibration=calibration)
        session = exporter.open(path, scheme="w8a8_static")
        found = [session.run({"images": image})["image_embeddings"] for image in images]
    return [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(found, exact, strict=True)]


def draw(model: Any, part: Component, source: Dataset, alike: int, seed: int, held_out: int) -> list[dict[str, Any]]:
    """The rows of one set of which so many are alike."""
    rng = np.random.default_rng(seed)
    one, *rest = (int(i) for i in rng.permutation(len(source)))
    others, kept = rest[:SET - alike], rest[SET - alike:][:held_out]
    data = Skewed(source, one, alike, others, rng)
    same = {i for i, (_, crop) in enumerate(data.made) if crop is not None}
    images = [preprocess(source[i].image, model.preprocess)[0][None] for i in kept]
    with torch.no_grad():
        exact = [model.embed(torch.from_numpy(image)).numpy() for image in images]
    chosen = {"even": spread(len(data), SHOWN), "random": sorted(int(i) for i in rng.permutation(len(data))[:SHOWN]),
              "k-centre": representative(model, data, SHOWN), "all": list(range(len(data)))}
    if alike:
        chosen["each scene once"] = sorted([min(same), *(set(range(len(data))) - same)])
    rows = []
    for how, indices in chosen.items():
        found = error(part, EncoderCalibration(data, model.preprocess, indices=indices), images, exact)
        rows.append({"photos": source.name, "alike": alike, "seed": seed, "chosen": how, "shown": len(indices), "of_one_scene": len(same & set(indices)), "held_out": len(kept),
                     "relative_error": float(np.mean(found)), "worst": max(found), "provenance": "measured"})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def summed(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over the draws of one way to choose."""
    return {key: rows[0][key] for key in ("photos", "alike", "chosen", "shown")} | {"draws": len(rows)} | {
        key: float(np.mean([row[key] for row in rows])) for key in ("of_one_scene", "relative_error", "worst")} | {
        "largest": max(row["relative_error"] for row in rows), "worst_of_all": max(row["worst"] for row in rows)}


def main() -> None:
    """Measure and write the document."""
    parser = argparse.ArgumentParser(description="Calibration photos chosen evenly, at random and by k-centre greedy.")
    parser.add_argument("--output", type=Path, default=ROOT / f"benchmarks/results/calibration-choice-{date.today().isoformat()}.json")
    parser.add_argument("--student", default="repvit_s")
    parser.add_argument("--data", type=Path, nargs="+", default=[ROOT / "examples/photos"])
    parser.add_argument("--draws", type=int, default=6)
    parser.add_argument("--held-out", type=int, default=24, help="photos, at most, that the error is measured on")
    a = parser.parse_args()
    circumstances, student = Circumstances.capture(threads=torch.get_num_threads()), resolve.load_torch(a.student)
    sources = [open_data(path, masks=False) for path in a.data]
    model = folded(student, np.stack([preprocess(sources[0][0].image, student.preprocess)[0]]))
    part = plugins.task_of(model).components(model)["encoder"]
    rows, summary = [], []
    for source in sources:
        for alike in (n for n in SKEWS if len(source) > SET - n + 1):
            found = [row for seed in range(a.draws) for row in draw(model, part, source, alike, seed, a.held_out)]
            rows += found
            summary += [summed([row for row in found if row["chosen"] == how]) for how in dict.fromkeys(row["chosen"] for row in found)]
    for line in summary:
        print(json.dumps(line), flush=True)
    write_json(a.output, {"schema": "edgekd.benchmark.calibration_choice/1", "circumstances": circumstances.model_dump(mode="json"), "student": a.student,
                          "image_size": model.preprocess.image_size, "format": "onnx", "scheme": "w8a8_static", "set": SET,
                          "summary": summary, "rows": rows})


if __name__ == "__main__":
    main()
