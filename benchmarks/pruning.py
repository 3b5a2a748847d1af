"""repvit_s pruned, recovered by a short distillation, against the same shape from random weights with equal steps; JSON out.

    python benchmarks/pruning.py --data pool/regions            # about 12 minutes on 2 cores; writes benchmarks/results/pruning-DATE.json
    python benchmarks/pruning.py --data pool/regions --steps 50 --json

Both are distilled by stage 1 of recipe `pruned_recover` alone (the embedding, masked MSE), from one cache, in the same order of photos, and judged on
scenes that no training sees (seed 90001): cosine of the embedding with the teacher's, and mIoU of box prompts with the teacher's masks. The parent's
figures stand beside them; it had 2250 steps. Latencies of the exported encoders are taken in turns, in one process.
"""
from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

from edgekd import api, checkpoint, exporting, students, teachers
from edgekd.data import open_data
from edgekd.models.blocks import ConvBN, initialise
from edgekd.models.pruned import shrink
from edgekd.profiling import profile_many
from edgekd.pruning import surgery
from edgekd.quantization.calibration import EncoderCalibration
from edgekd.tasks.promptable import scoring
from edgekd.workspace import write_json

ROOT = Path(__file__).resolve().parents[1]
PARENT, TEACHER, TEST = "repvit_s", "sam_nano", "scenes:seed=90001,count=12"


class Judge:
    """Cosine of embeddings and mIoU of box prompts, both with the teacher's."""

    def __init__(self) -> None:
        self.teacher, self.data = teachers.load(TEACHER), open_data(TEST)
        self.photos = [torch.from_numpy(one["images"]) for one in EncoderCalibration(self.data, self.teacher.preprocess, limit=len(self.data))]
        with torch.no_grad():
            self.wanted = [self.teacher.embed(photo) for photo in self.photos]

    def __call__(self, model: Any) -> dict[str, float]:
        found = scoring.evaluate(model, self.data, teacher=self.teacher, metrics=("box",), max_instances=6)
        return {"embedding_cosine": round(surgery.cosine(model.encoder, self.photos, self.wanted), 4),
                "box_agreement": round((found.teacher_agreement or {})["box"], 4), "box_miou": round(found.metrics["box_miou"], 4)}


def random_twin(pruned: Path, folder: Path) -> Path:
    """The same shape with an encoder drawn anew, the decoder as it is."""
    model = checkpoint.load(pruned)
    fresh = shrink(students.build(PARENT, image_size=model.preprocess.image_size, shape=model.shape, seed=1).encoder, model.pruned)
    initialise(fresh)
    for module in fresh.modules():
        if isinstance(module, ConvBN):
            module.bn.reset_running_stats()
    model.encoder = fresh
    return checkpoint.save(model, folder / "random.safetensors", teacher=TEACHER, history={"start": "random weights"})


def latencies(models: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Milliseconds of the exported encoders, in turns."""
    for name, model in models.items():
        exporting.export_model(model, folder / name, format="onnx", scheme="fp32", gate=False)
    found = profile_many([folder / name for name in models], "host", threads=1, memory=False, repeats=100, warmup=5)
    ms = {name: p.components["encoder"].latency_ms.p50 for name, p in zip(models, found, strict=True)}
    return {"encoder_ms_p50": ms, "circumstances": found[0].circumstances.model_dump(mode="json")}


def trained(start: Path, data: str, folder: Path, given: argparse.Namespace) -> Path:
    """Stage 1 of the recipe, from a checkpoint."""
    sets = [f"stages.0.steps={given.steps}", f"stages.0.batch_size={given.batch}", f"data.limit={given.images}", "data.extra=[]"]
    one = folder.with_suffix(".yaml")
    one.write_text("extends: pruned_recover\nname: pruned_recover_embedding\ndescription: stage 1 alone\nstages:\n  - {name: encoder, objectives: [{name: feature_mse}], "
                   "trainable: [encoder], steps: 600, batch_size: 16, lr: 1.0e-3, min_lr: 1.0e-5, warmup: 30, weight_decay: 0.01, clip: 5.0, ema: 0.99}\n", encoding="utf-8")
    found = api.distill(data=data, output=folder, checkpoint=start, recipe=one, sets=sets)
    return Path(found["checkpoint"])


def measure(given: argparse.Namespace, work: Path, note: Callable[[str], None]) -> dict[str, Any]:
    """All of it."""
    begun, judge = time.perf_counter(), Judge()
    before: dict[str, Any] = {}
    for importance in ("magnitude", "taylor"):
        made = api.prune(model=PARENT, ratio=given.ratio, data=given.data, output=work / importance, importance=importance)
        before[importance] = {"cosine_with_parent": round(made["embedding_cosine"], 4), **judge(checkpoint.load(Path(made["checkpoint"])))}
        note(f"{importance}: {before[importance]}")
    pruned = Path(made["checkpoint"])
    arms = {"inherited": pruned, "random": random_twin(pruned, work)}
    models = {"parent": checkpoint.load(students.weights_path(PARENT, 256) or Path()), "pruned": checkpoint.load(pruned)}
    timed = latencies(models, work / "artifacts")
    note(str(timed["encoder_ms_p50"]))
    after = {}
    for name, start in arms.items():
        after[name] = judge(checkpoint.load(trained(start, given.data, work / f"run-{name}", given)))
        note(f"{name}: {after[name]}")
    return {"benchmark": "pruning", "provenance": "measured", "parent": PARENT, "teacher": TEACHER, "ratio": given.ratio, "data": Path(given.data).name, "test": TEST,
            "steps": given.steps, "batch": given.batch, "images": given.images, "parent_steps": 2250, "params": [made["parent_params"], made["params"]],
            "macs": [made["parent_macs"], made["macs"]], **timed, "parent_accuracy": judge(models["parent"]), "before": before, "after": after,
            "seconds": round(time.perf_counter() - begun),
            "goals": [{"goal": f"inherited weights win: {key}", "measured": after["inherited"][key] - after["random"][key],
                       "met": after["inherited"][key] > after["random"][key]} for key in ("embedding_cosine", "box_agreement")]}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="photos to learn from")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--json", action="store_true", help="the document on stdout, no file")
    parser.add_argument("--output", type=Path, default=ROOT / f"benchmarks/results/pruning-{date.today()}.json")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        found = measure(given, Path(work), lambda text: print(text, flush=True))
    if not given.json:
        write_json(given.output, found)
    print(json.dumps(found if given.json else {k: found[k] for k in ("before", "after", "goals")}))


if __name__ == "__main__":
    main()
