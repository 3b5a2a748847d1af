"""The claims of the field, rerun on a scale that anybody can: what a prompt loop, an IoU head and each objective bring at equal steps. JSON out.

    python benchmarks/claims.py --output benchmarks/results/claims-2026-11-21.json        (about two hours on two cores; goes on where it stopped)
    python benchmarks/claims.py --section league --quick

Teacher `sam_nano`, student `repvit_xs` at 160 px from random weights, trained on procedural scenes and the example photos, measured on scenes
that were never trained on and, where the data pack lies beside the checkout, on people's regions of real photos. Every arm of a comparison has the same
images, batches, steps and start; only what is compared differs. Differences are means over seeds with 95 % intervals from drawing the photos
again (`paired_interval`), and the difference of every seed on its own; all in points of mIoU.

Sections: `loop` (encoder only, masks with no, one corrective click, with the IoU head distilled), `small` (the same on few images), `league`
(one objective each on the embedding, alone or beside the plain feature loss).
"""
from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from edgekd import checkpoint, recipe, students, teachers
from edgekd.data import open_data
from edgekd.distillation import points
from edgekd.distillation.material import TrainingData, open_training_data
from edgekd.distillation.trainer import train_stages
from edgekd.measurement import Circumstances
from edgekd.recipe import Stage
from edgekd.tasks.promptable import scoring
from edgekd.tasks.promptable.metrics import paired_interval, weight
from edgekd.workspace import fingerprint, write_json

ROOT = Path(__file__).resolve().parents[1]
REGIONS = ROOT.parent / "shared/data/bsds500"
STUDENT, SIZE, TEACHER, BATCH = "repvit_xs", 160, "sam_nano", 8
SCENES = "scenes:seed=4001,count={count}"
GROUPS = ("box", "center", "clicks", "oracle")
METRICS = ("box_miou", "center_miou", "center_plus1_miou", "center_plus2_miou")
HEAD = ("box_iou_head_miou", "center_iou_head_miou", "center_iou_head_gap")
PAPER = {"prompt_loop_vs_encoder_only": {"box_miou": 1.0, "center_miou": 2.9, "center_plus2_miou": 2.8, "source": "EdgeSAM (arXiv 2312.06660), SA-1K"},
         "one_loop_vs_none": {"box_miou": -0.1, "center_plus2_miou": 6.6, "source": "EdgeSAM, loops 0 and 1: box 83.1 / 83.0, centre + 2 72.4 / 79.0"}}
Rows = list[dict[str, Any]]

FEATURE = {"name": "feature_mse"}
ALONE = ("feature_mse", "feature_l1", "feature_huber", "feature_cosine", "cwd", "perceptual")
BESIDE = ("attention_transfer", "rkd", "token_relations", "affinity", "mask_graph", "crd", "correspondence", "mgd", "dmae", "vkd", "scalekd", "hint", "region_pixel")
"""Objectives that say nothing of the embedding's own values need the plain loss beside them, for the teacher's decoder to read the student."""


@dataclass(frozen=True)
class Scale:
    """How much is trained and looked at."""

    seeds: int = 3
    base: int = 300
    more: int = 150
    league: int = 150
    images: int = 400
    small: tuple[int, ...] = (40,)
    scenes: int = 60
    photos: int = 40
    instances: int = 6


QUICK = Scale(seeds=2, base=6, more=4, league=4, images=12, small=(6,), scenes=3, photos=2, instances=3)


@dataclass(frozen=True)
class Arm:
    """One training: its name, the stages after the start, and what it starts from (None: random weights)."""

    name: str
    stages: tuple[Stage, ...]
    start: str | None = None


def stage(name: str, objectives: Sequence[dict[str, Any]], steps: int, seed: int, **more: Any) -> Stage:
    """A stage with the settings that all arms share."""
    given = {"name": name, "objectives": list(objectives), "steps": steps, "batch_size": BATCH, "seed": seed, "lr": 2e-3, "min_lr": 2e-5,
             "warmup": min(20, steps // 2), "weight_decay": 0.01, "clip": 1.0}
    return Stage.model_validate(given | more)


def loop_arms(scale: Scale, seed: int) -> list[Arm]:
    """A start that only saw embeddings, and what to go on with: the embedding again, or masks of the same prompts."""
    prompts = {"trainable": ["encoder", "decoder"], "lr": 5e-4, "instances": scale.instances}
    masks, head = {"name": "prompt_masks"}, {"name": "iou_head"}

    def masks_arm(name: str, objectives: Sequence[dict[str, Any]], clicks: int) -> Arm:
        return Arm(name, (stage(name, objectives, scale.more, seed, decode_iters=clicks, **prompts),), "base")

    return [Arm("base", (stage("base", [FEATURE], scale.base, seed),)),
            Arm("encoder_only", (stage("encoder_only", [FEATURE], scale.more, seed, lr=5e-4),), "base"),
            masks_arm("no_loop", [masks], 0), masks_arm("one_loop", [masks], 1), masks_arm("one_loop_iou", [masks, head], 1)]


def league_arms(scale: Scale, seed: int) -> list[Arm]:
    """One objective each from the same random start. Beside the plain loss an objective's weight makes both equally large on the first batch."""
    def arm(title: str, name: str, *before: dict[str, Any]) -> Arm:
        tapped = points.registry("objective")[name].needs & {"feats"}
        return Arm(title, (stage(name, [*before, {"name": name, "taps": [("embedding", "embedding")] if tapped else []}], scale.league, seed),))

    return [arm(name, name) for name in ALONE] + [arm(f"feature_mse + {name}", name, FEATURE) for name in BESIDE]


class Bench:
    """Trains and measures arms; whatever is finished is kept in `work` under a fingerprint of all that it was made from."""

    def __init__(self, scale: Scale, work: Path) -> None:
        self.scale, self.work = scale, work
        self.teacher = teachers.load(TEACHER)
        self.sets = {"scenes": open_data(f"scenes:seed=77001,count={scale.scenes}")}
        if REGIONS.is_dir():
            self.sets["photos"] = open_data(REGIONS, split="val", limit=scale.photos)

    def data(self, images: int) -> TrainingData:
        """So many scenes, and the example photos."""
        given = recipe.resolve("default", [f"data.extra=['{SCENES.format(count=images)}']", "data.val_fraction=0", "stages.0.objectives=[{name: feature_mse}]"])
        return open_training_data(given, str(ROOT / "examples/photos"), {self.teacher.name: self.teacher}, self.work / f"cache-{images}",
                                  [stage("cache", [FEATURE], 1, 0)])

    def start(self, seed: int, path: Path | None) -> Any:
        """The student: random weights of the seed under the teacher's own decoder, or a checkpoint."""
        if path is not None:
            return checkpoint.load(path)
        student = students.build(STUDENT, image_size=SIZE, shape=self.teacher.shape, preprocess=self.teacher.preprocess, seed=seed)
        student.prompt_encoder.load_state_dict(self.teacher.prompt_encoder.state_dict())
        student.mask_decoder.load_state_dict(self.teacher.mask_decoder.state_dict())
        return student

    def run(self, section: str, arms: Sequence[Arm], images: int, seed: int) -> dict[str, dict[str, Any]]:
        """Name -> losses, seconds and the rows of every photo, of each arm."""
        found: dict[str, dict[str, Any]] = {}
        data = self.data(images)
        keys: dict[str, str] = {}
        for arm in arms:
            key = fingerprint([[s.model_dump(exclude_defaults=True) for s in arm.stages], keys.get(arm.start or ""), seed, images, STUDENT, SIZE, self.scale.scenes, self.scale.photos])
            keys[arm.name] = key
            kept, weights = self.work / f"{key}.json", self.work / f"{key}.safetensors"
            if not kept.is_file() or not weights.is_file():
                student = self.start(seed, self.work / f"{keys[arm.start]}.safetensors" if arm.start else None)
                clock = time.monotonic()
                self.balance(arm, student, data)
                curve = [row["loss"] for result in train_stages(student, self.teacher, arm.stages, data.batches, self.work / "stages" / key) for row in result.curve]
                seconds = time.monotonic() - clock
                checkpoint.save(student, weights, teacher=self.teacher.name)
                rows = {name: scoring.evaluate(student.eval(), one, metrics=GROUPS, teacher=self.teacher, max_instances=self.scale.instances).per_image
                        for name, one in self.sets.items()}
                write_json(kept, {"section": section, "arm": arm.name, "seed": seed, "images": images, "seconds": seconds,
                                  "loss": {"first": sum(curve[:5]) / 5, "last": sum(curve[-5:]) / 5}, "rows": rows})
            found[arm.name] = json.loads(kept.read_text())
            print(f"{section} {images} seed {seed} {arm.name}: {found[arm.name]['seconds']:.0f} s, "
                  + ", ".join(f"{m} {100 * mean(found[arm.name]['rows']['scenes'], m):.1f}" for m in METRICS), flush=True)
        return found

    def balance(self, arm: Arm, student: Any, data: TrainingData) -> None:
        """Give every objective beside the first a weight that makes it as large as the first on the first batch."""
        for one in arm.stages:
            if not arm.name.startswith("feature_mse + "):
                continue
            from edgekd.distillation.trainer import StageTrainer

            trainer = StageTrainer(student, self.teacher, one, data.batches, self.work / "unused.pt")
            trainer.set_modes()
            with torch.no_grad():
                losses = [float(v.mean()) for v in trainer.losses(trainer.batches[0], torch.Generator().manual_seed(0)).values()]
            one.objectives[1] = one.objectives[1].model_copy(update={"weight": losses[0] / max(losses[1], 1e-6)})


# --- numbers --------------------------------------------------------------------------------------------------------------


def mean(rows: Rows, metric: str) -> float:
    """Over instances."""
    with_it = [r for r in rows if metric in r]
    return sum(r[metric] * weight(r, metric) for r in with_it) / sum(weight(r, metric) for r in with_it)


def pooled(seeds: Sequence[Rows]) -> Rows:
    """One row a photo, the mean over seeds: what is drawn again are photos."""
    first = {r["id"]: dict(r) for r in seeds[0]}
    for id, row in first.items():
        for metric in [k for k in row if k not in ("id", "instances", "counts")]:
            row[metric] = sum(next(r for r in rows if r["id"] == id)[metric] for rows in seeds) / len(seeds)
    return list(first.values())


def compare(runs: Sequence[dict[str, dict[str, Any]]], first: str, second: str, metrics: Sequence[str] = METRICS) -> dict[str, Any]:
    """`first` minus `second` in points, on every set of images: the mean over seeds with its interval, and each seed."""
    result: dict[str, Any] = {"first": first, "second": second, "seeds": len(runs), "unit": "points of mIoU"}
    for name in runs[0][first]["rows"]:
        a, b = [r[first]["rows"][name] for r in runs], [r[second]["rows"][name] for r in runs]
        found = {}
        for metric in metrics:
            interval = paired_interval(pooled(a), pooled(b), metric)
            found[metric] = {"mean": 100 * interval["difference"], "low": 100 * interval["low"], "high": 100 * interval["high"],
                             "per_seed": [100 * (mean(x, metric) - mean(y, metric)) for x, y in zip(a, b, strict=True)]}
        result["difference" if name == "scenes" else f"difference_{name}"] = found
    return result


def levels(runs: Sequence[dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Every arm's own numbers: means over seeds, the spread of the seeds, seconds."""
    table = []
    for arm in runs[0]:
        row: dict[str, Any] = {"arm": arm, "seeds": len(runs), "seconds": sum(r[arm]["seconds"] for r in runs) / len(runs),
                               "loss_first": sum(r[arm]["loss"]["first"] for r in runs) / len(runs), "loss_last": sum(r[arm]["loss"]["last"] for r in runs) / len(runs)}
        for name in runs[0][arm]["rows"]:
            for metric in (*METRICS, *HEAD, "teacher_agreement.box"):
                each = [100 * mean(r[arm]["rows"][name], metric) for r in runs]
                row[f"{name}.{metric}"] = {"mean": sum(each) / len(each), "low": min(each), "high": max(each)}
        table.append(row)
    return table


def league(runs: Sequence[dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """The arms by centre and box together, best first, each with its difference to the plain feature loss."""
    table = []
    for row in levels(runs):
        against = compare(runs, row["arm"], "feature_mse", ("box_miou", "center_miou"))
        table.append({**row, "against_feature_mse": {k: v for k, v in against.items() if k.startswith("difference")}})
    return sorted(table, key=lambda r: -(r["scenes.box_miou"]["mean"] + r["scenes.center_miou"]["mean"]))


def main() -> None:
    """Train what is missing, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / f"benchmarks/results/claims-{date.today()}.json")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/claims", help="where finished arms are kept")
    parser.add_argument("--section", action="append", choices=["loop", "small", "league"], help="only this one (may be repeated)")
    parser.add_argument("--quick", action="store_true", help="a few steps on a few images: shows that it runs, means nothing")
    given = parser.parse_args()
    scale, sections = QUICK if given.quick else Scale(), given.section or ["loop", "small", "league"]
    given.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(scale, given.work)
    document: dict[str, Any] = {"benchmark": "claims", "provenance": "measured", "teacher": TEACHER, "student": f"{STUDENT} at {SIZE} px", "scale": scale.__dict__,
                                "batch": BATCH, "paper": PAPER, "circumstances": Circumstances.capture().model_dump(mode="json")}
    seeds = range(scale.seeds)
    if "loop" in sections:
        runs = [bench.run("loop", loop_arms(scale, s), scale.images, s) for s in seeds]
        document |= {"loop": levels(runs), "prompt_loop_vs_encoder_only": compare(runs, "one_loop", "encoder_only"),
                     "one_loop_vs_none": compare(runs, "one_loop", "no_loop"), "iou_head_distilled_vs_not": compare(runs, "one_loop_iou", "one_loop", (*METRICS, *HEAD))}
    if "small" in sections:
        document["small_data"] = []
        for images in scale.small:
            runs = [bench.run("small", [a for a in loop_arms(scale, s) if a.name in ("base", "encoder_only", "one_loop")], images, s) for s in seeds]
            document["small_data"].append({"scenes": images, "arms": levels(runs), "prompt_loop_vs_encoder_only": compare(runs, "one_loop", "encoder_only")})
    if "league" in sections:
        document["league"] = league([bench.run("league", league_arms(scale, s), scale.images, s) for s in seeds])
    write_json(given.output, document)
    print(given.output)


if __name__ == "__main__":
    main()
