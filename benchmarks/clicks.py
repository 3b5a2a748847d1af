"""Clicks into the wrong regions of 64 masks of 256 x 256 cells: all at once, against the mask-by-mask loop of EdgeSAM's training; JSON out.

    python benchmarks/clicks.py                        # a minute; writes benchmarks/results/clicks-DATE.json
    python benchmarks/clicks.py --json                 # the document on stdout, no file

The two take turns; the ratio is the median over such pairs. That both draw from the same distribution is tested in `tests/test_clicks.py`.
The masks are discs and what is left of them after a shift, so that a tenth to a half of each is wrong, as between student and teacher.
"""
from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from reference_step import error_clicks
from torch import Tensor

from edgekd.distillation.clicks import error_click
from edgekd.measurement import Circumstances
from edgekd.workspace import write_json

ROOT = Path(__file__).resolve().parents[1]
MASKS, SIDE, FEWEST, GOAL = 64, 256, 10, 10.0


def discs() -> tuple[Tensor, Tensor]:
    """Answers and truth (P, h, w) bool."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    centre = SIDE * (0.25 + 0.5 * torch.rand(MASKS, 2, generator=generator))
    radius = SIDE * (0.05 + 0.2 * torch.rand(MASKS, generator=generator))
    shift = radius[:, None] * (0.1 + 0.3 * torch.rand(MASKS, 2, generator=generator))

    def inside(at: Tensor) -> Tensor:
        return (x - at[:, :1, None]) ** 2 + (y - at[:, 1:, None]) ** 2 < radius[:, None, None] ** 2

    return inside(centre + shift), inside(centre)


def measure(repeats: int) -> dict[str, Any]:
    """Both in turns."""
    ours, theirs = discs()
    ours_01, theirs_01 = ours.float(), theirs.float()  # the loop is given what thresholding and masking leaves: floats
    generator = torch.Generator().manual_seed(0)
    calls: dict[str, Callable[[], Any]] = {"loop": lambda: error_clicks(ours_01, theirs_01), "at_once": lambda: error_click(ours, theirs, None, generator, fewest=FEWEST)}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(repeats + 3):
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            if number >= 3:
                taken[name].append(time.perf_counter() - begun)
    ratio = statistics.median(a / b for a, b in zip(taken["loop"], taken["at_once"], strict=True))
    return {"benchmark": "clicks", "provenance": "measured", "masks": MASKS, "side": SIDE, "wrong_share": float((ours ^ theirs).float().mean()), "ratio": ratio,
            "ms": {name: 1e3 * statistics.median(each) for name, each in taken.items()}, "goals": [{"goal": "ratio", "least": GOAL, "measured": ratio, "met": ratio >= GOAL}],
            "circumstances": Circumstances.capture(threads=torch.get_num_threads(), warmup=3, repeats=repeats).model_dump(mode="json")}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="the document on stdout, no file")
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--output", type=Path, default=ROOT / f"benchmarks/results/clicks-{date.today()}.json")
    given = parser.parse_args()
    found = measure(given.repeats)
    if not given.json:
        write_json(given.output, found)
    print(json.dumps(found if given.json else {k: found[k] for k in ("ratio", "ms", "goals")}))


if __name__ == "__main__":
    main()
