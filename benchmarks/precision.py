"""What precision pays: students x runtimes x schemes, the library's own int8 beside edgekd's choice; JSON out, and docs/precision.md.

    python benchmarks/precision.py --output benchmarks/results/precision-2026-11-22.json

For every model and format: fp32 and the other float schemes; `naive`, static int8 as the quantizing library does it by itself; `plain`, edgekd's int8
without a search; and `edgekd`, what `edgekd quantize --scheme auto` takes. Ranges are found and candidates are judged on the photos in examples/; the drops
of the table are taken on other photos, with masks drawn by people where the data pack lies beside the checkout (else drawn scenes). All files of a model
in a format are timed in turns in one process, on one thread and on all.
With `--work DIR` what is finished is kept, and the same command goes on.
"""
from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from edgekd import comparing, console, mixing, plugins, schemes
from edgekd import target as targets
from edgekd.artifact import Manifest
from edgekd.data import open_data
from edgekd.errors import EdgekdError
from edgekd.measurement import Circumstances, installed
from edgekd.profiling import profile_many
from edgekd.quantization.sensitivity import Sensitivity
from edgekd.runtime import open_artifact
from edgekd.tasks.promptable import scoring
from edgekd.workspace import write_json

ROOT = Path(__file__).resolve().parents[1]
PACK = ROOT.parent / "shared/data/bsds500"
CALIBRATION = ROOT / "examples/photos"
FORMATS = ("onnx", "openvino", "litert", "executorch")
PHOTOS, INSTANCES = 24, 6
MAX_DROP = 0.3
EXPORTS = {"executorch": 6}
"""Format -> precisions tried at most, where lowering one takes a minute."""
NAIVE = "w8a8_static[naive]"
Row = dict[str, Any]


def searched(model: str, format: str, folder: Path, ranks: dict[str, Sensitivity], most: int) -> list[Row]:
    """All precisions of one model in one format: paths, schemes and methods; a row that failed has its reason."""
    bench = comparing.bench(model, format, targets.resolve("host"), open_data(CALIBRATION), folder, 32)
    if model not in ranks:
        ranks[model] = mixing.ranked(bench)  # of torch modules: the same for every format
    found = mixing.search(bench, ranks[model], mixing.Budget(MAX_DROP), most=min(most, EXPORTS.get(format, most)))
    rows = [{"method": "float" if schemes.parse(r["scheme"]).scheme.is_float else "plain" if r["scheme"] == mixing.INTEGER else "tried"} | r for r in found["candidates"]]
    rows += [{"scheme": text, "method": "tried", "status": "failed", "reason": why} for text, why in found["failed"].items()]
    rows.append(next(r for r in rows if r.get("id") == found["id"]) | {"method": "edgekd", "verdict": found["verdict"], "reason": found["reason"],
                                                                      "kept_float": found["kept_float"]})
    try:
        naive = bench.export(schemes.parse(NAIVE))
        rows.append({"method": "naive", **bench.rows([Manifest.load(Path(rows[0]["path"])), naive])[-1]})
    except EdgekdError as e:
        rows.append({"scheme": NAIVE, "method": "naive", "status": "failed", "reason": e.what})
    return [{"student": model, "format": format, "status": "ok"} | r for r in rows]


def with_figures(rows: Sequence[Row], data: Any) -> list[Row]:
    """The rows with accuracy on held-out photos and latencies in turns, all against the first (fp32)."""
    paths = {r["id"]: Path(r["path"]) for r in rows if r["status"] == "ok" and r["method"] != "tried"}
    scores = {name: scoring.evaluate(open_artifact(path), data, metrics=("box", "center"), max_instances=INSTANCES).metrics for name, path in paths.items()}
    timed = {n: dict(zip(paths, profile_many(list(paths.values()), threads=n, warmup=3, repeats=30, max_seconds=3.0, memory=False), strict=True)) for n in (1, None)}
    first = rows[0]["id"]
    return [r | _figures(r["id"], first, scores, timed) if r.get("id") in paths else r for r in rows]


def _figures(name: str, first: str, scores: Mapping[str, Mapping[str, float]], timed: Mapping[Any, Mapping[str, Any]]) -> Row:
    def p50(threads: int | None, which: str) -> dict[str, float]:
        part: Any = lambda p: p.components["encoder"].latency_ms if which == "encoder" else p.latency_ms
        mine, theirs = part(timed[threads][name]).p50, part(timed[threads][first]).p50
        return {"p50_ms": mine, "ratio": mine / theirs}

    drops = {f"{metric}_drop": 100 * (scores[first][metric] - value) for metric, value in scores[name].items()}
    return {**scores[name], **drops, "latency": {f"{which}_{'one_thread' if threads else 'all_threads'}": p50(threads, which)
                                                 for threads in (1, None) for which in ("encoder", "together")}}


def measured(models: Sequence[str], formats: Sequence[str], work: Path, data: Any, most: int) -> list[Row]:
    """All rows, those of a model in a format kept in `work` when they are finished."""
    kept, ranks, rows = work / "rows.json", dict[str, Sensitivity](), list[Row]()
    known: dict[str, list[Row]] = json.loads(kept.read_text()) if kept.is_file() else {}
    for model in models:
        for format in formats:
            key = f"{model} {format}"
            if key not in known:
                begun = time.monotonic()
                try:
                    known[key] = with_figures(searched(model, format, work / Path(model).stem / format, ranks, most), data)
                except EdgekdError as e:  # the others are worth having; the same command tries this one again
                    console.warn(f"{key}: {e}")
                    continue
                write_json(kept, known)
                console.log(f"{key}: {time.monotonic() - begun:.0f} s")
            rows += known[key]
    return [{k: v for k, v in r.items() if k not in ("path", "executed_ops")} | {"student": Path(r["student"]).stem} for r in rows]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / f"benchmarks/results/precision-{date.today()}.json")
    parser.add_argument("--models", default="repvit_s,sam_nano", help="names or checkpoints, with commas between")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--work", type=Path, help="where artifacts and finished rows are kept")
    parser.add_argument("--exports", type=int, default=mixing.MOST_EXPORTS, help="precisions that are tried for a model in a format, at most")
    given = parser.parse_args()
    name = f"{PACK.name} val" if PACK.is_dir() else "scenes:seed=77001,count=40"
    data = open_data(str(PACK), split="val", limit=PHOTOS) if PACK.is_dir() else open_data(name, limit=PHOTOS)
    with tempfile.TemporaryDirectory() as temporary:
        work = given.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        rows = measured(given.models.split(","), given.formats.split(","), work, data, given.exports)
    write_json(given.output, {"benchmark": "precision", "data": name, "photos": PHOTOS, "instances_per_photo": INSTANCES, "max_drop": MAX_DROP, "rows": rows,
                              "toolchains": {n: plugins.exporter(n).availability().version for n in given.formats.split(",")}, "versions": installed(),
                              "circumstances": Circumstances.capture().model_dump(mode="json")})


if __name__ == "__main__":
    main()
