"""Every format and precision of the shipped models: is it the same model, how accurate, how large, how fast here; JSON out, and docs/formats.md.

    python benchmarks/formats.py --output benchmarks/results/formats-2026-11-21.json

Each row is one `edgekd export`: gated on what its runtime answers for every kind of prompt, or, where that runtime is not here, on what stands in for it
(which the row names). Accuracy is that of the files, on real photos with masks drawn by people where the data pack lies beside the checkout, else on
drawn scenes. What runs here is timed in turns in one process, on one thread, so that ratios are fair; what does not has no latency.
A row that failed keeps its reason. With `--work DIR` what is finished is kept, and the same command goes on.
"""
from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from edgekd import api, console, plugins
from edgekd.artifact import Manifest
from edgekd.data import open_data
from edgekd.errors import EdgekdError
from edgekd.measurement import Circumstances, installed
from edgekd.profiling import profile_many
from edgekd.runtime import open_artifact
from edgekd.tasks.promptable import scoring
from edgekd.workspace import write_json

ROOT = Path(__file__).resolve().parents[1]
PACK = ROOT.parent / "shared/data/bsds500"
CALIBRATION = ROOT / "examples/photos"
MODELS = ("repvit_s", "sam_nano")
"""The shipped student, whose encoder is convolutions, and its teacher, whose encoder attends."""
FEWER = {"sam_nano": (("onnx", "openvino", "litert", "tensorrt", "ncnn"), ("fp32", "fp16", "w8a8_static"))}
"""Model -> formats and precisions that it alone is tried in, to keep the run within an hour."""
SLOW = ("w6_weight_only", "w4_weight_only")
"""Precisions left out unless asked for: clustering the weights takes minutes a file."""
PHOTOS, INSTANCES = 12, 4
"""Photos that accuracy is measured on, and masks asked for on each, at most."""
Row = dict[str, Any]


def one(model: str, format: str, scheme: str, folder: Path) -> Row:
    """Export one file set; the row with its parity, or with the reason."""
    begun = time.monotonic()
    try:
        done: Row = api.export(model=model, to=[format], scheme=scheme, data=CALIBRATION, output=folder)["exports"][0]
    except EdgekdError as e:
        done = {"format": format, "scheme": scheme, "status": "failed", "reason": e.what, "hint": e.hint}
    return {"student": model, **done, "seconds": round(time.monotonic() - begun, 1)}


def with_accuracy(row: Row, data: Any) -> Row:
    """Mean IoU of the written files, on their runtime or on what stands in for it; without one where neither is here."""
    if row["status"] != "ok" or any(c["state"] != "ran" and c["stand_in"] is None for c in row["components"].values()):
        return row
    try:
        found = scoring.evaluate(open_artifact(Path(row["path"]), stand_in=True), data, max_instances=INSTANCES).to_dict(per_image=False)
    except EdgekdError as e:
        return row | {"accuracy_failed": e.what}
    names = ("box_miou", "center_miou", "center_plus2_miou", "images", "instances")
    return row | {"accuracy": {n: found[n] for n in names}, "accuracy_provenance": "measured" if row["ran_here"] else "predicted"}


def with_latency(rows: Sequence[Row]) -> list[Row]:
    """The rows of one student that ran here, timed against each other."""
    timed = [r for r in rows if r.get("ran_here")]
    profiles = dict(zip([r["id"] for r in timed], profile_many([Path(r["path"]) for r in timed], threads=1, warmup=2, repeats=20, memory=False), strict=True))
    return [r | {"latency_ms": {n: c.latency_ms.model_dump() for n, c in profiles[r["id"]].components.items()}
                 | {"together": profiles[r["id"]].latency_ms.model_dump()}} if r.get("id") in profiles else r for r in rows]


def tried(model: str, formats: Sequence[str], schemes: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of format and precision for one model."""
    own_formats, own_schemes = FEWER.get(model, (formats, schemes))
    return [(f, s) for f in formats if f in own_formats for s in plugins.exporter(f).schemes if s in own_schemes and s in schemes]


def measured(models: Sequence[str], formats: Sequence[str], schemes: Sequence[str], work: Path, data: Any) -> list[Row]:
    """All rows, each kept in `work` when it is finished."""
    kept, found = work / "rows.json", list[Row]()
    known = {(r["student"], r["format"], r["scheme"]): r for r in json.loads(kept.read_text())} if kept.is_file() else {}
    for model in models:
        mine = []
        for format, scheme in tried(model, formats, schemes):
            key = (model, format, scheme)
            if key not in known:
                known[key] = with_accuracy(one(model, format, scheme, work / model), data)
                write_json(kept, list(known.values()))
            mine.append(known[key])
            console.log(json.dumps({k: mine[-1].get(k) for k in ("student", "format", "scheme", "status", "seconds", "reason")}))
        found += with_latency(mine)
    return [without_paths(r, work) for r in found]


def without_paths(row: Row, work: Path) -> Row:
    """The row with the operators of its parts, and without where it lay on this machine."""
    if row["status"] != "ok":
        return row
    manifest = Manifest.load(Path(row["path"]))
    parts = {n: c | {"size_bytes": sum(f.size_bytes for f in manifest.files if f.path in manifest.components[n].files)} for n, c in row["components"].items()}
    return {k: v for k, v in row.items() if k != "path"} | {"components": parts, "versions": manifest.versions}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / f"benchmarks/results/formats-{date.today()}.json")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--formats", default=",".join(plugins.exporters()))
    parser.add_argument("--schemes", default=",".join(s for s in plugins.schemes() if s not in SLOW))
    parser.add_argument("--work", type=Path, help="where artifacts and finished rows are kept")
    given = parser.parse_args()
    name = f"{PACK.name} val" if PACK.is_dir() else "scenes:seed=77001,count=40"
    data = open_data(str(PACK), split="val", limit=PHOTOS) if PACK.is_dir() else open_data(name, limit=PHOTOS)
    with tempfile.TemporaryDirectory() as temporary:
        work = given.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        rows = measured(given.models.split(","), given.formats.split(","), given.schemes.split(","), work, data)
    write_json(given.output, {"benchmark": "formats", "data": name, "photos": PHOTOS, "instances_per_photo": INSTANCES, "threads": 1, "rows": rows,
                              "toolchains": {n: e.availability().version for n, e in plugins.exporters().items()}, "versions": installed(),
                              "circumstances": Circumstances.capture().model_dump(mode="json")})


if __name__ == "__main__":
    main()
