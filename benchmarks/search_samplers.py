"""Which sampler proposes the better students where a space is too large to look at: TPE, NSGA-II, or chance. A part of benchmarks/search.py.

The space is 540 students, whose work and parameters are counted; their latencies and accuracies are not measured but follow from the benchmark's
table, by the regressions of the search itself. So this compares what samplers make of a smooth world in which what they are told is true.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from edgekd import students
from edgekd.search.declared import Option, Pair
from edgekd.search.estimate import accuracies
from edgekd.search.latencies import Point, guess
from edgekd.search.study import Study

BASES = ("repvit_xs", "repvit_m", "tinyvit_s", "nanosam", "efficient_sam_ti")
WIDTHS, DEPTHS, SIZES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5), (0.5, 1.0, 1.5), (96, 128, 160, 192, 224, 256)
TRIALS, WAVES, SEEDS = 48, 3, 10
KIND = "openvino fp32"


def world(rows: Sequence[dict[str, Any]], ms: dict[str, float]) -> tuple[list[Option], dict[Pair, tuple[float, float]]]:
    """The space, and (accuracy, ms) of every student in it."""
    space = [Option(base, WIDTHS, DEPTHS, SIZES) for base in BASES]
    everyone = [pair for option in space for pair in option]
    at = {name: students.describe(name, image_size=256) for name in dict.fromkeys(n for n, _ in everyone)}
    facts = [(at[n]["family"], at[n]["params_encoder"], at[n]["gmacs"] * (s / 256) ** 2, s) for n, s in everyone]
    known = [(r["family"], students.describe(r["student"], image_size=256)["params_encoder"], r["gmacs"], r["image_size"]) for r in rows]
    both = [*known, *facts]
    clues: dict[str, tuple[Sequence[float], float]] = {"parameters": ([math.log(f[1]) for f in both], 0.5), "work": ([math.log(f[2]) for f in both], 0.5),
                                                       "size": ([float(f[3]) for f in both], 0.5)}
    value = accuracies(clues, [f[0] for f in both], {i: r["full"] for i, r in enumerate(rows)}).mean
    points = [Point(str(i), f[0], KIND, f[2], f[3]) for i, f in enumerate(both)]
    measured = {str(i): ms[f"{r['student']}-{r['image_size']}-{KIND.replace(' ', '-')}"] for i, r in enumerate(rows)}
    took = guess(points, measured)
    return space, {pair: (float(value[len(rows) + i]), math.exp(took[str(len(rows) + i)].mean)) for i, pair in enumerate(everyone)}


def proposed(space: list[Option], truth: dict[Pair, tuple[float, float]], budget: float, kind: str, seed: int) -> list[Pair]:
    """The students that a sampler comes to look at."""
    if kind == "chance":
        everyone = list(truth)
        return [everyone[i] for i in np.random.default_rng(seed).permutation(len(everyone))[:TRIALS]]
    study, found = Study(space, sampler=kind, seed=seed), list[Pair]()  # type: ignore[arg-type]
    for _ in range(WAVES):
        found += (wave := study.propose(TRIALS // WAVES))
        study.tell({p: ([truth[p][0], -truth[p][1]], truth[p][1] / budget - 1) for p in wave})
    return found


def samplers(rows: Sequence[dict[str, Any]], ms: dict[str, float]) -> dict[str, Any]:
    """Mean and worst of what the best student proposed lacks to the best of the space, over budgets and seeds."""
    space, truth = world(rows, ms)
    budgets = [float(np.quantile([m for _, m in truth.values()], q)) for q in (0.1, 0.3, 0.5, 0.8)]
    found: dict[str, Any] = {"space": len(truth), "trials": TRIALS, "seeds": SEEDS, "budgets_ms": [round(b, 2) for b in budgets],
                             "world": "latencies and accuracies by regression from the table, not measured"}
    for kind in ("tpe", "nsga2", "chance"):
        lacks = []
        for budget in budgets:
            best = max(a for a, m in truth.values() if m <= budget)
            for seed in range(SEEDS):
                reached = max((truth[p][0] for p in proposed(space, truth, budget, kind, seed) if truth[p][1] <= budget), default=0.0)
                lacks.append((best - reached) / best)
        found[kind] = {"regret_mean": round(float(np.mean(lacks)), 5), "regret_worst": round(float(np.max(lacks)), 5)}
    return found
