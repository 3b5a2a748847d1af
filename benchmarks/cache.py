"""What coding a teacher's outputs costs: bits, error, speed, and what a student that learns from the coded cache loses. JSON out.

    python benchmarks/cache.py --output benchmarks/results/cache-2026-11-21.json       (about 15 minutes of one core; goes on where it stopped)
    python benchmarks/cache.py --quick                                                (a trial of every part, not a result)

* `codecs`: every codec on maps of `sam_nano` over the example photos: its embedding, the residual stream of its last transformer block
  (what a plain ViT caches) and two convolutional stages. Speeds are of one thread and of its processor time, against raw fp16 bytes.
* `steps`: rate and distortion of `packed` over its one parameter, with the masks that the teacher's decoder makes of the coded embedding.
* `distilled`: `repvit_xs` from random weights, encoder only, on the photos and procedural scenes, with equal seeds from raw fp16 and from each
  coded cache; measured on scenes never trained on. Differences are paired by seed, in points of mIoU, with a 95 % t-interval over seeds.
"""
from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from edgekd import tasks, teachers
from edgekd.data import open_data
from edgekd.data.images import preprocess
from edgekd.distillation.batches import Batches, Source
from edgekd.distillation.cache import build_cache, codec
from edgekd.distillation.step import teacher_taps
from edgekd.distillation.taps import Taps
from edgekd.distillation.trainer import StageTrainer
from edgekd.measurement import Circumstances
from edgekd.recipe import CACHE_CODECS, Stage
from edgekd.tasks.promptable.scoring import evaluate
from edgekd.workspace import write_json

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = str(ROOT / "examples/photos")
STUDENT, SIZE = "repvit_xs", 128
TRAINED_ON, JUDGED_ON = "scenes:seed=4001,count={scenes}", "scenes:seed=77001,count={judged}"
METRICS = ("box_miou", "center_miou")
OUTPUTS = {"embedding": "embedding", "block21": "residual stream after the last transformer block", "block10": "convolutional block", "block2": "convolutional block"}
STEPS = (1 / 24, 1 / 16, 1 / 12, 1 / 8, 1 / 4, 1 / 2, 1.0)


def seconds(call: Callable[[], Any], least: float = 0.3) -> float:
    """Processor seconds of one call, after one that is not counted."""
    call()
    begun, calls = time.process_time(), 0
    while time.process_time() - begun < least:
        call()
        calls += 1
    return (time.process_time() - begun) / calls


def maps(teacher: Any) -> dict[str, Tensor]:
    """The outputs of the example photos, (n, C, h, w) float16 by name."""
    photos = open_data(PHOTOS, masks=False)
    frames = torch.stack([torch.from_numpy(preprocess(photos[i].image, teacher.preprocess)[0]) for i in range(len(photos))])
    taps = teacher_taps(teacher)
    with torch.inference_mode():
        seen = Taps(teacher, {n: taps.get(n) for n in OUTPUTS}).run(frames)
    return {n: seen[n].half().clone() for n in OUTPUTS}


def measured(values: Tensor, name: codec.CacheCodec) -> dict[str, Any]:
    """Bits, error and speed of one codec on maps of one output."""
    coded = codec.encode(values, name)
    decode = codec.Decoder(coded.shared, tuple(values.shape[1:]))
    records = [r if r.dtype != "int8" else r.reshape(values.shape[1], -1) for r in coded.records]
    error = torch.stack([decode(r).float() for r in records]) - values.float()
    size = sum(a.nbytes for a in coded.shared.values()) + sum(r.nbytes for r in coded.records)
    raw = 2 * values.numel()
    each = (error.square().mean((0, 2, 3)) / values.float().var((0, 2, 3))).sqrt()
    signal = (values.float() - values.float().mean((0, 2, 3), keepdim=True)).square().mean()
    speeds: dict[str, float | None] = dict.fromkeys(("encode_mb_s", "decode_mb_s", "decode_ms_per_image"))
    if name != "fp16":  # nothing is computed
        reading = seconds(lambda: [decode(r) for r in records])
        speeds = {"encode_mb_s": round(raw / 1e6 / seconds(lambda: codec.encode(values, name)), 1), "decode_mb_s": round(raw / 1e6 / reading, 1),
                  "decode_ms_per_image": round(1e3 * reading / len(records), 3)}
    return {"codec": name, "shape": list(values.shape), "bits_per_value": round(8 * size / values.numel(), 3), "ratio_to_fp16": round(size / raw, 4),
            "records_alone_ratio": round(sum(r.nbytes for r in coded.records) / raw, 4), "rotated": "basis" in coded.shared, "step": coded.step,
            "snr_db": round(float(10 * (signal / error.square().mean()).log10()), 2) if name != "fp16" else None,
            "worst_channel_relative_error": round(float(each.max()), 4), **speeds}


def by_step(teacher: Any, embedding: Tensor) -> list[dict[str, Any]]:
    """`packed` with other steps: rate, distortion, and the teacher's own masks (16 clicks and boxes a photo) from what was coded."""
    side = teacher.preprocess.side
    grid = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1).reshape(-1, 2) * side / 4 + side / 8
    clicks, boxes = grid[:, None], torch.stack([grid - side / 8, grid + side / 8], 1)
    asked = [(clicks, torch.ones(16, 1)), (boxes, torch.tensor([[2.0, 3.0]]).repeat(16, 1))]

    def masks(one: Tensor) -> Tensor:
        with torch.inference_mode():
            return torch.cat([teacher.decode(one[None].float(), points, labels)[0][:, 0] > 0 for points, labels in asked])

    truth = [masks(e) for e in embedding]
    found, usual, most = [], codec.STEP, codec.MOST_BITS
    try:
        codec.MOST_BITS = 16.0
        for step in STEPS:
            codec.STEP = step
            coded = codec.encode(embedding, "packed")
            decode = codec.Decoder(coded.shared, tuple(embedding.shape[1:]))
            given = [masks(decode(r)) for r in coded.records]
            ious = torch.cat([(a & b).sum((1, 2)) / (a | b).sum((1, 2)).clamp(min=1) for a, b in zip(given, truth, strict=True)])
            filled = torch.cat([t.any(-1).any(-1) for t in truth])
            found.append({**coded.facts(), "step": round(step, 4), "teacher_mask_iou": round(float(ious[filled].mean()), 5)})
    finally:
        codec.STEP, codec.MOST_BITS = usual, most
    return found


def share_of_step(teacher: Any, decode_ms: float) -> dict[str, Any]:
    """Decoding against a training step of `repvit_s` at 256 px: processor time of one thread, an image."""
    photos = open_data(PHOTOS, masks=False)
    with tempfile.TemporaryDirectory() as folder:
        source = Source(photos, build_cache(teacher, photos, Path(folder)))
        student = tasks.get("promptable_segmentation").student("repvit_s", 256, teacher)[0]
        stage = Stage(name="encoder", objectives=[{"name": "feature_mse"}], steps=1000, batch_size=8)  # type: ignore[list-item]
        trainer = StageTrainer(student, teacher, stage, Batches([source], student.preprocess, 8, 0), Path(folder) / "state.pt")
        trainer.set_modes()
        step = 1e3 * seconds(trainer.train_step, 6.0) / 8
        read = 1e3 * seconds(lambda: [source.cache.outputs(i) for i in range(len(photos))]) / len(photos)
    return {"student": "repvit_s", "image_size": 256, "step_ms_per_image": round(step, 2), "bf16": trainer.bf16, "decode_ms_per_image": decode_ms,
            "read_and_decode_ms_per_image": round(read, 3), "share": round(read / step, 4)}


def distilled(teacher: Any, given: argparse.Namespace, known: dict[str, Any], keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Train one student a seed and arm; their accuracies, and the differences to raw fp16. Rows that are `known` are not trained again; each new one is kept."""
    judged, task = open_data(JUDGED_ON.format(judged=given.judged)), tasks.get("promptable_segmentation")
    data = [open_data(spec, masks=False) for spec in (PHOTOS, TRAINED_ON.format(scenes=given.scenes))]
    stage = Stage(name="encoder", objectives=[{"name": "feature_mse"}], steps=given.steps, batch_size=8, lr=2e-3, warmup=20, precision="fp32")  # type: ignore[list-item]
    about = {"student": STUDENT, "image_size": SIZE, "steps": given.steps, "batch_size": 8, "trained_on": [d.name for d in data], "judged_on": judged.name}
    rows: list[dict[str, Any]] = known.get("rows", []) if all(known.get(k) == v for k, v in about.items()) else []
    with tempfile.TemporaryDirectory() as folder:
        order = [(s, a) for s in range(given.seeds) for a in ("fp16", "packed")] + [(s, "int8") for s in range(given.seeds)]
        for seed, arm in order:
            if any((r["seed"], r["arm"]) == (seed, arm) for r in rows):
                continue
            sources = [Source(d, build_cache(teacher, d, Path(folder) / f"{arm}{n}", codec=arm)) for n, d in enumerate(data)]  # type: ignore[arg-type]
            ratio = sum(s.cache.bytes for s in sources) / sum(s.cache.raw_bytes_per_image * len(s) for s in sources)
            torch.manual_seed(seed)
            student = task.student(STUDENT, SIZE, teacher)[0]
            one = stage.model_copy(update={"seed": seed})
            begun = time.process_time()
            trainer = StageTrainer(student, teacher, one, Batches(sources, student.preprocess, 8, seed), Path(folder) / f"{arm}-{seed}.pt")
            curve = trainer.run().curve
            found = evaluate(student, judged, metrics=("box", "center"), max_instances=6).to_dict(per_image=False)
            rows.append({"arm": arm, "seed": seed, "cache_ratio": round(ratio, 4), "cpu_seconds": round(time.process_time() - begun, 1),
                         "first_loss": curve[0]["loss"], "last_loss": statistics.fmean(r["loss"] for r in curve[-20:]), **{m: found[m] for m in METRICS}})
            print(json.dumps(rows[-1]), flush=True)
            keep({**about, "rows": rows, "differences": {a: differences(rows, a) for a in ("packed", "int8")}})
    untrained = evaluate(task.student(STUDENT, SIZE, teacher)[0], judged, metrics=("box", "center"), max_instances=6).to_dict(per_image=False)
    return {**about, "untrained": {m: untrained[m] for m in METRICS}, "rows": rows, "differences": {arm: differences(rows, arm) for arm in ("packed", "int8")}}


def differences(rows: list[dict[str, Any]], arm: str) -> dict[str, Any]:
    """An arm minus raw fp16, paired by seed, in points; `seed_spread` is the standard deviation of fp16 over seeds."""
    found: dict[str, Any] = {}
    for metric in METRICS:
        of = {a: {r["seed"]: 100 * r[metric] for r in rows if r["arm"] == a} for a in ("fp16", arm)}
        pairs = [of[arm][s] - of["fp16"][s] for s in sorted(of["fp16"].keys() & of[arm].keys())]
        if not pairs:
            continue
        n, mean, spread = len(pairs), statistics.fmean(pairs), statistics.stdev(pairs) if len(pairs) > 1 else 0.0
        half = float(stats.t.ppf(0.975, n - 1)) * spread / n**0.5 if n > 1 else None
        found[metric] = {"mean": round(mean, 3), "each": [round(p, 3) for p in pairs], "interval_95": None if half is None else [round(mean - half, 3), round(mean + half, 3)],
                         "seeds": n, "seed_spread": round(statistics.stdev(of["fp16"].values()), 3) if n > 1 else None}
    return found


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / f"benchmarks/results/cache-{date.today()}.json")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--scenes", type=int, default=114)
    parser.add_argument("--judged", type=int, default=100)
    parser.add_argument("--only", help="sections to measure, separated by commas; the others are kept as they are in the output file")
    parser.add_argument("--quick", action="store_true", help="a trial run, not a result: nothing is written")
    given = parser.parse_args()
    if given.quick:
        given.seeds, given.steps, given.scenes, given.judged = 2, 4, 8, 4
    torch.set_num_threads(1)
    teacher = teachers.load("sam_nano")
    found = maps(teacher)
    document: dict[str, Any] = {"benchmark": "cache", "provenance": "measured", "teacher": "sam_nano", "photos": len(found["embedding"]), "circumstances": {}}
    if given.output.exists() and not given.quick:
        document |= json.loads(given.output.read_text())
    def keep(name: str, value: Any) -> None:
        document[name] = value
        if not given.quick:
            write_json(given.output, document)

    sections: dict[str, Callable[[], Any]] = {
        "codecs": lambda: [{"output": n, "what": OUTPUTS[n], **measured(values, name)} for n, values in found.items() for name in CACHE_CODECS],
        "share_of_step": lambda: share_of_step(teacher, next(r["decode_ms_per_image"] for r in document["codecs"] if r["codec"] == "packed")),
        "steps": lambda: by_step(teacher, found["embedding"]),
        "distilled": lambda: distilled(teacher, given, document.get("distilled", {}), lambda value: keep("distilled", value))}
    for name in given.only.split(",") if given.only else sections:
        document["circumstances"][name] = Circumstances.capture(threads=1).model_dump(mode="json")
        keep(name, sections[name]())
    for row in [*document.get("codecs", ()), *document.get("steps", ())]:
        print(json.dumps(row))
    print(json.dumps({"share_of_step": document.get("share_of_step"), "differences": document.get("distilled", {}).get("differences")}, indent=2))


if __name__ == "__main__":
    main()
