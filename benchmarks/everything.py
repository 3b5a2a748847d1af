"""Segment everything three ways on exported models: what the decoder costs and how many of the annotated masks are found. JSON out.

    python benchmarks/everything.py --output benchmarks/results/everything-2026-11-21.json

Each model is exported to ONNX Runtime and asked photo by photo, grid, hierarchical and proposals in turns in one process (the order reversed
from photo to photo), so that the ratios of decoder time are fair. Recall is COCO's average recall (IoU 0.5:0.95, class-agnostic) on
`scenes:seed=77001,count=40` (never trained on) and, where the data pack lies beside the checkout, on photos whose regions people drew.
"""
from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from edgekd.data import open_data
from edgekd.exporting import export_model, open_artifact
from edgekd.measurement import Circumstances
from edgekd.protocols import Dataset
from edgekd.resolve import load_torch
from edgekd.tasks.promptable.everything import Everything, Settings, everything
from edgekd.tasks.promptable.exported import ArtifactModel
from edgekd.tasks.promptable.predictor import ModelPredictor
from edgekd.tasks.promptable.proposing import has_proposer
from edgekd.tasks.promptable.recall import instances, recall
from edgekd.workspace import write_json

ROOT = Path(__file__).resolve().parents[1]
PACK = ROOT.parent / "shared/data/bsds500"
SCENES = "scenes:seed=77001,count=40"
MODES = ("grid", "hierarchical", "proposals")
GOALS = {"proposals": 16.0, "hierarchical": 1.8}
"""Times less decoder time than the grid, at no more than one point of recall."""
AT = "everything_ar100"


def ask(model: ArtifactModel, data: Dataset, modes: list[str], settings: Settings) -> dict[str, list[dict[str, Any]]]:
    """Mode -> one row a photo: seconds, prompts, masks, and the recall sums of `edgekd.tasks.promptable.recall`."""
    predictor = ModelPredictor(model)
    everything(predictor, data[0].image, mode="grid", settings=settings)  # nothing cold is timed
    rows: dict[str, list[dict[str, Any]]] = {m: [] for m in modes}
    for index in range(len(data)):
        sample = data[index]
        truth = instances(data, index, sample)
        for mode in modes if index % 2 else reversed(modes):
            found = everything(predictor, sample.image, mode=mode, settings=settings)  # type: ignore[arg-type]
            rows[mode].append(_row(found, truth))
    return rows


def _row(found: Everything, truth: list[dict[str, Any]]) -> dict[str, Any]:
    masks = [{"segmentation": s.rle, "area": s.area, "score": s.predicted_iou * s.stability_score} for s in found]
    return {"seconds": found.work.seconds, "prompts": found.work.prompts, "masks": len(masks), "recall": recall(truth, masks) if truth else {}}


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over photos of the costs, and average recall over all instances."""
    parts = {f"{part}_ms": round(statistics.median(r["seconds"][part] for r in rows) * 1e3, 2) for part in rows[0]["seconds"]}
    counts: dict[str, list[tuple[float, int]]] = {}
    for row in rows:
        for name, value in row["recall"].items():
            counts.setdefault(name, []).append(value)
    scores = {name: round(sum(v[0] for v in values) / sum(v[1] for v in values), 4) for name, values in sorted(counts.items())}
    return {**parts, "decoder_ms_sum": round(sum(r["seconds"]["decoder"] for r in rows) * 1e3, 1), "prompts": round(statistics.mean(r["prompts"] for r in rows), 1),
            "masks": round(statistics.mean(r["masks"] for r in rows), 1), "photos": len(rows), **scores}


def compared(name: str, data: str, found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a mode, with its decoder time and recall against the grid's."""
    grid, rows = found["grid"], []
    for mode, values in found.items():
        row = {"model": name, "data": data, "mode": mode, "provenance": "measured", **values}
        if mode != "grid":
            row |= {"times_less_decoder": round(grid["decoder_ms_sum"] / values["decoder_ms_sum"], 2), "recall_points": round(100 * (values[AT] - grid[AT]), 2),
                    "goal_times_less": GOALS[mode]}
            row["met"] = row["times_less_decoder"] >= GOALS[mode] and row["recall_points"] >= -1
        rows.append(row)
    return rows


def main() -> None:
    """Export, ask, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / f"benchmarks/results/everything-{date.today()}.json")
    parser.add_argument("--models", default="sam_nano,repvit_s")
    parser.add_argument("--limit", type=int, help="the first so many photos of each dataset only")
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    datasets = [(SCENES, open_data(SCENES, limit=given.limit))]
    if PACK.is_dir():
        datasets.append(("bsds500 val", open_data(PACK, split="val", limit=given.limit or 24)))
    settings, table = Settings(), list[dict[str, Any]]()
    for name in given.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            export_model(load_torch(name), Path(folder) / "artifact", format="onnx", scheme="fp32")
            opened = open_artifact(Path(folder) / "artifact", threads=given.threads)
            modes = [m for m in MODES if m != "proposals" or has_proposer(opened)]
            for label, data in datasets:
                rows = ask(opened, data, modes, settings)
                table += compared(name, label, {mode: summarise(rows[mode]) for mode in modes})
                for row in table[-len(modes):]:
                    print(json.dumps({k: row.get(k) for k in ("model", "data", "mode", "decoder_ms", "prompts", "masks", AT, "times_less_decoder", "recall_points", "met")}),
                          flush=True)
    write_json(given.output, {"benchmark": "everything", "circumstances": Circumstances.capture(threads=given.threads).model_dump(mode="json"),
                              "format": "onnx", "settings": asdict(settings), "rows": table})


if __name__ == "__main__":
    main()
