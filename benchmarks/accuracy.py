"""Accuracy of the shipped teacher, students and the baselines, by the protocol of `edgekd evaluate`; JSON out,
and the table of the model card.

    python benchmarks/accuracy.py --output benchmarks/results/accuracy-2026-11-21.json

On `scenes:seed=77001,count=120` (never trained on) and, where the data pack lies beside the checkout, on real photos whose people-drawn
regions were never trained on either. Every row is measured here and says on what; `floors` repeats what the project asks of itself.
"""
from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path
from typing import Any

from edgekd import api, students
from edgekd.measurement import Circumstances
from edgekd.workspace import write_atomic, write_json

ROOT = Path(__file__).resolve().parents[1]
PACK = ROOT.parent / "shared/data"
SCENES = "scenes:seed=77001,count=120"
CARD = ROOT / "edgekd/teachers/weights/MODEL_CARD.md"
BEGIN, END = "<!-- accuracy:begin -->", "<!-- accuracy:end -->"
MODELS = ("sam_nano", "repvit_s", "baseline/disc", "baseline/box_fill", "baseline/grabcut")


def rows(models: list[str], limit: int | None) -> list[dict[str, Any]]:
    """One row a model and dataset."""
    data: list[tuple[str, str | None]] = [(SCENES, None)]
    data += [(str(PACK / name), "val") for name in ("bsds500", "nuclei") if (PACK / name).is_dir()]
    found = []
    for spec, split in data:
        for model in models:
            teacher = "sam_nano" if model in students.names() else None
            document = api.evaluate(model=model, data=spec, split=split, teacher=teacher, limit=limit).to_dict(per_image=False)
            name = spec if spec.startswith("scenes") else f"{Path(spec).name} {split}"
            found.append({"model": model, "data": name, "provenance": "measured", **{k: v for k, v in document.items() if k != "model"}})
            print(json.dumps({k: found[-1].get(k) for k in ("model", "data", "box_miou", "center_miou", "center_plus2_miou", "teacher_agreement")}), flush=True)
    return found


def floors(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What sam_nano has to reach, and by how much it does."""
    def value(model: str, data: str, metric: str) -> float | None:
        return next((r[metric] for r in table if r["model"] == model and r["data"].startswith(data)), None)

    disc, fill = value("baseline/disc", "bsds500", "center_miou"), value("baseline/box_fill", "bsds500", "box_miou")
    asked = [("scenes", "box_miou", 0.75), ("scenes", "center_miou", 0.55), ("scenes", "center_plus2_miou", value("sam_nano", "scenes", "center_miou")),
             ("bsds500", "center_miou", None if disc is None else disc + 0.08), ("bsds500", "box_miou", fill)]
    return [{"data": d, "metric": m, "floor": least, "measured": got, "margin": got - least}
            for d, m, least in asked if (got := value("sam_nano", d, m)) is not None and least is not None]


def card_table(document: dict[str, Any], source: str) -> str:
    """The Markdown table of the model card."""
    lines = ["| data | model | box | one click | + 1 | + 2 | agreement (box) | instances |", "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for row in document["rows"]:
        agreement = (row.get("teacher_agreement") or {}).get("box")
        numbers = [row[f"{m}_miou"] for m in ("box", "center", "center_plus1", "center_plus2")]
        cells = [f"{v:.3f}" for v in numbers] + ["" if agreement is None else f"{agreement:.3f}"]
        lines.append(f"| {row['data']} | {row['model']} | {' | '.join(cells)} | {row['instances']} |")
    about = document["circumstances"]
    return "\n".join([*lines, "", f"Mean IoU, measured on {about['device']}, {about['date'][:10]}, torch {about['versions']['torch']}. From `{source}`."])


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / f"benchmarks/results/accuracy-{date.today()}.json")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--limit", type=int, help="the first so many images only (a trial run, not a result)")
    given = parser.parse_args()
    table = rows(given.models.split(","), given.limit)
    document = {"benchmark": "accuracy", "circumstances": Circumstances.capture().model_dump(mode="json"), "rows": table, "floors": floors(table)}
    write_json(given.output, document)
    if given.limit is None:
        head, rest = CARD.read_text().split(BEGIN)
        write_atomic(CARD, f"{head}{BEGIN}\n{card_table(document, given.output.resolve().relative_to(ROOT).as_posix())}\n{END}{rest.split(END)[1]}")
    for row in document["floors"]:
        print(f"{row['data']} {row['metric']}: {row['measured']:.3f}, floor {row['floor']:.3f}, margin {row['margin']:+.3f}")


if __name__ == "__main__":
    main()
