"""Images a second of a distillation step, against the step of EdgeSAM's public training code (`reference_step.py`); JSON out.

    python benchmarks/distill.py                       # 512 and 1024 px, half an hour on two idle cores; writes benchmarks/results/distill-DATE.json
    python benchmarks/distill.py --quick --json        # smaller, minutes; one JSON document on stdout, no file

Both train the same student (RepViT-M1 as EdgeSAM has it) from the same weights on the same photos, in turns within one process: a reference
step, one of ours, a reference step, ... A ratio is the median over such pairs of the reference's time to ours. Photos are procedural scenes
written as JPEGs of 1024 px, each with its instances listed again and again up to 100 of them, about what SA-1B has. The teacher is a
random patch embedding under SAM's decoder (256 wide) with random weights: weights change no speed here. Ours is a `StageTrainer` as recipes
run it, with its cache, its prefetching and the precision that it chooses by itself.

`outside_fraction` is the share of our step outside the student's forward and backward; the part of it that the teacher's own decoding takes
in the second phase is told beside it. `loss_gap` compares losses after K steps with those of the reference on the same photos, and in the
second phase on the very prompts and clicks that ours drew: the relative difference of the means over the last quarter of the steps.
"""
from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from reference_step import IGNORED, Files, Prompts, ReferenceStep
from torch import Tensor, nn

from edgekd.data.images import read_image
from edgekd.data.scenes import Scenes
from edgekd.distillation.batches import Ahead, Batches, Source
from edgekd.distillation.cache import TeacherCache, build_cache
from edgekd.distillation.trainer import StageTrainer
from edgekd.measurement import Circumstances
from edgekd.models.prompt_encoder import DecoderShape
from edgekd.models.repvit import CONFIGS, RepViT
from edgekd.models.sam import Sam
from edgekd.protocols import ABSENT, BOX_TOP_LEFT, Preprocess, Sample
from edgekd.recipe import Stage
from edgekd.workspace import write_json

ROOT = Path(__file__).resolve().parents[1]
STUDENT, SCENE_SIDE, LISTED, INSTANCES = "edge_sam", 1024, 100, 16
GOALS = {"phase1_ratio": 2.0, "phase2_ratio": 2.5}
MOST_OUTSIDE, MOST_GAP = 0.10, 0.02


@dataclass(frozen=True)
class Plan:
    """What is measured: (phase, side, photos a step) with the number of pairs, and the runs whose losses are compared."""

    speed: tuple[tuple[int, int, int], ...]
    repeats: int
    losses: tuple[tuple[int, int, int], ...]
    steps: int


FULL = Plan(((1, 512, 4), (1, 1024, 4), (2, 512, 2), (2, 1024, 1)), 7, ((1, 512, 4), (2, 256, 2)), 40)
QUICK = Plan(((1, 512, 2), (2, 384, 2)), 5, ((1, 256, 4), (2, 128, 2)), 24)


# --- what both are given -------------------------------------------------------------------------------------------------


class Photos:
    """Scenes as JPEG files, with their masks in memory."""

    has_masks = True

    def __init__(self, folder: Path, count: int) -> None:
        self.name, self.skipped, self.folder = "benchmark", list[str](), folder
        self.masks: list[np.ndarray] = []
        for number, scene in enumerate(Scenes(seed=11, count=count, size=SCENE_SIDE)):
            assert scene.masks is not None
            Image.fromarray(scene.image).save(self.path(number), quality=92)
            self.masks.append(scene.masks)
            self.path(number).with_suffix(".json").write_text(json.dumps({"annotations": (described(scene.masks) * LISTED)[:LISTED]}))

    def path(self, number: int) -> Path:
        """The JPEG; its annotations lie beside it."""
        return self.folder / f"{number}.jpg"

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, index: int) -> Sample:
        return Sample(str(index), read_image(self.path(index)), self.masks[index])

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def fingerprint(self) -> str:
        """Of the generator."""
        return f"benchmark {len(self)} {SCENE_SIDE}"


def described(masks: np.ndarray) -> list[dict[str, Any]]:
    """Box and a point of each mask, as SA-1B writes them."""
    found = []
    for mask in masks:
        y, x = np.nonzero(mask)
        middle = len(x) // 2
        found.append({"bbox": [int(x.min()), int(y.min()), int(np.ptp(x)) + 1, int(np.ptp(y)) + 1], "point_coords": [[int(x[middle]), int(y[middle])]],
                      "area": len(x)})
    return found


def models(size: int) -> tuple[Sam, Sam]:
    """The teacher, and a student with its decoder."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(3, 64, 16, 16), nn.GELU(), nn.Conv2d(64, 256, 1), nn.BatchNorm2d(256, affine=False, momentum=None))
    with torch.no_grad():
        encoder(torch.randn(2, 3, size, size))  # the norm learns the scale of random weights
    teacher = Sam("random", encoder, DecoderShape(), Preprocess(size)).eval().requires_grad_(False)
    student = Sam(STUDENT, RepViT(CONFIGS[STUDENT], 256), DecoderShape(), Preprocess(size))
    student.prompt_encoder.load_state_dict(teacher.prompt_encoder.state_dict())
    student.mask_decoder.load_state_dict(teacher.mask_decoder.state_dict())
    return teacher, student


def raw_embeddings(cache: TeacherCache, path: Path) -> Path:
    """The cache's embeddings as the reference stores them: fp16 with four bytes before each."""
    with open(path, "wb") as file:
        for index in range(len(cache)):
            file.write(b"\0" * 4 + cache.embedding(index).half().numpy().tobytes())
    return path


def stage(phase: int, batch: int, steps: int) -> Stage:
    """EdgeSAM's settings with rates for so small a batch; gradients are clipped at 1 in the second phase, where it clips at 0.01."""
    common = {"name": f"phase{phase}", "steps": steps, "batch_size": batch, "warmup": 0, "schedule": "constant"}
    if phase == 1:
        return Stage.model_validate(common | {"objectives": [{"name": "feature_mse"}], "lr": 1e-3, "weight_decay": 0.01, "clip": 5.0})
    prompts = {"box_share": 0.5, "coin": "batch", "jitter": 0.0, "central": 0.0, "fewest_errors": 10}
    return Stage.model_validate(common | {"objectives": [{"name": "prompt_masks"}], "trainable": ["encoder", "decoder"], "lr": 1e-4, "weight_decay": 0.05,
                                          "clip": 1.0, "instances": INSTANCES, "decode_iters": 1, "mask_feedback": 0.0, "prompts": prompts})


@contextmanager
def both(phase: int, size: int, batch: int, steps: int) -> Iterator[tuple[ReferenceStep, StageTrainer]]:
    """The two trainers of one student on 8 photos."""
    with tempfile.TemporaryDirectory(prefix="edgekd-") as name:
        folder = Path(name)
        photos, (teacher, student) = Photos(folder, 8), models(size)
        cache, settings = build_cache(teacher, photos, folder / "cache"), stage(phase, batch, steps)
        paths = [photos.path(i) for i in range(len(photos))]
        files = Files(paths, [p.with_suffix(".json") for p in paths], raw_embeddings(cache, folder / "embeddings.bin"), tuple(cache.embedding(0).shape))  # type: ignore[arg-type]
        reference = ReferenceStep(student, teacher, CONFIGS[STUDENT], files, lr=settings.lr, weight_decay=settings.weight_decay, clip=settings.clip,
                                  prompts=INSTANCES if phase == 2 else 0)
        ours = StageTrainer(student, teacher, settings, Batches([Source(photos, cache)], student.preprocess, batch, 0), folder / "state.pt")
        ours.start()
        ours.set_modes()
        with Ahead(ours.batches) as ours.ahead:
            yield reference, ours


# --- speed ---------------------------------------------------------------------------------------------------------------


class Watch:
    """Seconds within the parts of the steps taken by `step`."""

    def __init__(self, trainer: StageTrainer) -> None:
        self.trainer, self.on = trainer, False
        self.seconds = dict.fromkeys(("student_forward", "student_backward", "teacher_decode"), 0.0)
        for owner, name, part in ((trainer.student, "embed", "student_forward"), (trainer.student, "decode", "student_forward"),
                                  (trainer.step_module.teacher, "decode", "teacher_decode")):
            setattr(owner, name, self._timed(getattr(owner, name), part))
        self._backward = Tensor.backward
        Tensor.backward = self._timed(Tensor.backward, "student_backward")  # type: ignore[method-assign]

    def _timed(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*given: Any, **options: Any) -> Any:
            begun = time.perf_counter()
            try:
                return call(*given, **options)
            finally:
                self.seconds[part] += self.on * (time.perf_counter() - begun)
        return timed

    def step(self) -> float:
        """Seconds of one step of the trainer."""
        self.on = True
        try:
            return seconds(self.trainer.train_step)
        finally:
            self.on = False

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        Tensor.backward = self._backward  # type: ignore[method-assign]


def speed(phase: int, size: int, batch: int, repeats: int) -> dict[str, Any]:
    """One row of the result: both steps in turns."""
    with both(phase, size, batch, 10_000) as (reference, ours):
        photos = len(ours.batches)
        theirs_s, ours_s = list[float](), list[float]()
        reference.step(range(batch))  # both once to warm up; the first step of ours also decodes
        for _ in range(-(-photos // batch)):
            ours.train_step()
        with Watch(ours) as watch:
            for number in range(repeats):
                theirs_s.append(seconds(lambda n=number: reference.step([(n * batch + i) % photos for i in range(batch)])))  # type: ignore[misc]
                ours_s.append(watch.step())
        total = sum(ours_s)
        inside = watch.seconds["student_forward"] + watch.seconds["student_backward"]
        row = {"phase": phase, "image_size": size, "batch": batch, "repeats": repeats, "precision": "bf16" if ours.bf16 else "fp32",
               "ratio": statistics.median(a / b for a, b in zip(theirs_s, ours_s, strict=True)), "ratios": [a / b for a, b in zip(theirs_s, ours_s, strict=True)],
               "images_per_s": {"reference": batch / statistics.median(theirs_s), "ours": batch / statistics.median(ours_s)},
               "outside_fraction": 1 - inside / total, "teacher_fraction": watch.seconds["teacher_decode"] / total,
               "parts": {name: s / total for name, s in watch.seconds.items()}}
    say(f"phase {phase} at {size} px, {batch} photos a step: {row['ratio']:.2f} x; outside the student {row['outside_fraction']:.1%}, "
        f"of it the teacher {row['teacher_fraction']:.1%}")
    return row


def seconds(call: Callable[[], Any]) -> float:
    """Of one call."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


# --- losses --------------------------------------------------------------------------------------------------------------


def losses(phase: int, size: int, batch: int, steps: int) -> dict[str, Any]:
    """Both curves: ours first, which draws the prompts, then the reference's on the same photos and prompts."""
    with both(phase, size, batch, steps) as (reference, ours):
        drawn: list[list[Prompts]] = []
        loop = ours.step_module.loop
        if loop is not None:
            decode = loop.decode

            def recorded(one: Any, other: Any, points: Tensor, labels: Tensor, *rest: Any) -> Any:
                drawn[-1].append(as_reference(points, labels))
                return decode(one, other, points, labels, *rest)

            loop.decode = recorded  # type: ignore[method-assign, assignment]
        mine = []
        for _ in range(steps):
            drawn.append([])
            mine.append(ours.train_step()["loss"])
        theirs = [reference.step([ours.batches.place(n) for n in range(k * batch, (k + 1) * batch)], drawn[k]) for k in range(steps)]
    last = max(1, steps // 4)
    means = [statistics.mean(curve[-last:]) for curve in (mine, theirs)]
    found = {"phase": phase, "image_size": size, "batch": batch, "steps": steps, "gap": abs(means[0] - means[1]) / means[1],
             "largest_gap_of_a_step": max(abs(a - b) / b for a, b in zip(mine, theirs, strict=True)), "ours": mine, "reference": theirs}
    say(f"phase {phase}: loss after {steps} steps {means[0]:.4g}, reference {means[1]:.4g}: {found['gap']:.2%} apart")
    return found


def as_reference(points: Tensor, labels: Tensor) -> Prompts:
    """Prompts of one kind as the reference takes them."""
    labels = torch.where(labels == ABSENT, float(IGNORED), labels)
    if labels[0, 0] == BOX_TOP_LEFT:
        further = points.shape[1] > 2
        return points[:, 2:] if further else None, labels[:, 2:] if further else None, points[:, :2].flatten(1)
    keep = [0, *range(2, points.shape[1])]  # a click leaves the second place of a box empty
    return points[:, keep], labels[:, keep], None


# --- the whole -----------------------------------------------------------------------------------------------------------


def say(line: str) -> None:
    """To stderr: stdout is the document's."""
    print(line, file=sys.stderr, flush=True)


def document(plan: Plan, quick: bool) -> dict[str, Any]:
    """Everything measured, and what of it was asked for."""
    threads = max(2, torch.get_num_threads())  # with one, torch takes another kernel for the reference's 1 x 1 convolutions, a slow one
    torch.set_num_threads(threads)
    begun = time.monotonic()
    about = Circumstances.capture(threads=threads, repeats=plan.repeats).model_dump(mode="json")
    rows = [speed(*case, plan.repeats) for case in plan.speed]
    curves = [losses(*case, plan.steps) for case in plan.losses]
    of = {f"phase{p}": [r for r in rows if r["phase"] == p] for p in (1, 2)}
    found: dict[str, Any] = {"benchmark": "distill", "quick": quick, "student": STUDENT, "teacher": "random weights, SAM's decoder (256 wide)", "provenance": "measured",
                             **{f"{name}_ratio": min(r["ratio"] for r in each) for name, each in of.items()},
                             "outside_fraction": {name: max(r["outside_fraction"] for r in each) for name, each in of.items()},
                             "outside_without_teacher": {name: max(r["outside_fraction"] - r["teacher_fraction"] for r in each) for name, each in of.items()},
                             "loss_gap": max(c["gap"] for c in curves), "loss_gaps": {f"phase{c['phase']}": c["gap"] for c in curves},
                             "sizes": {name: [r["image_size"] for r in each] for name, each in of.items()}, "cpus": os.cpu_count()}
    goals = [{"goal": name, "least": least, "measured": found[name], "met": found[name] >= least} for name, least in GOALS.items()]
    goals += [{"goal": f"outside_fraction {name}", "most": MOST_OUTSIDE, "measured": value, "met": value <= MOST_OUTSIDE} for name, value in found["outside_fraction"].items()]
    goals.append({"goal": "loss_gap", "most": MOST_GAP, "measured": found["loss_gap"], "met": found["loss_gap"] <= MOST_GAP})
    return found | {"goals": goals, "rows": rows, "losses": curves, "seconds": time.monotonic() - begun, "circumstances": about}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller photos, fewer repeats")
    parser.add_argument("--json", action="store_true", help="the document on stdout")
    parser.add_argument("--output", type=Path, help="where to write it (a full run: benchmarks/results/distill-DATE.json)")
    parser.add_argument("--repeats", type=int, help="pairs of steps")
    given = parser.parse_args()
    plan = QUICK if given.quick else FULL
    found = document(replace(plan, repeats=given.repeats or plan.repeats), given.quick)
    output = given.output or (None if given.quick else ROOT / f"benchmarks/results/distill-{date.today()}.json")
    if output is not None:
        write_json(output, found)
    for goal in found["goals"]:
        say(json.dumps(goal))
    if given.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
