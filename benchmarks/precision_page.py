"""The tables of docs/precision.md from a committed run of `benchmarks/precision.py`.

    python benchmarks/precision_page.py benchmarks/results/precision-2026-11-22.json
"""
from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from edgekd.workspace import write_atomic

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/precision.md"
BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"
HEAD = ("| format | method | scheme | box drop | click drop | disagreement | encoder, of fp32's time | encoder + prompt | all threads | size | integer operators |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
SHOWN = {"float": "float", "naive": "library's default", "plain": "edgekd, no search", "edgekd": "**edgekd's choice**"}


def line(row: dict[str, Any]) -> str:
    """One row; what failed says why."""
    if row["status"] != "ok":
        return _cells([row["format"], SHOWN[row["method"]], row["scheme"], f"failed: {row['reason']}", *[""] * 7])
    latency = [f"{row['latency'][k]['ratio']:.2f}" for k in ("encoder_one_thread", "together_one_thread", "together_all_threads")]
    return _cells([row["format"], SHOWN[row["method"]], f"`{shortened(row['scheme'])}`", f"{row['box_miou_drop']:.2f}", f"{row['center_miou_drop']:.2f}",
                   f"{row['disagreement']:.2f}", *latency, f"{row['size_ratio']:.2f}", str(row["executed_integer_ops"])])


def shortened(scheme: str) -> str:
    """A scheme without the names of its layers, of which there may be dozens."""
    head, plus, exceptions = scheme.partition(" + {")
    kept = exceptions.rstrip("}").split(", ") if plus else []
    named = [one for one in kept if one.split(":")[0] in ("encoder", "decoder", "proposer", "rest")]
    layers = len(kept) - len(named)
    return " + ".join([head, *named, *([f"{layers} layer{'s' * (layers > 1)} in float"] if layers else [])])


def _cells(values: list[str]) -> str:
    return "| " + " | ".join(v.replace("|", "/").replace("\n", " ") for v in values) + " |"


def tables(document: dict[str, Any], source: str) -> str:
    """The generated part of the page."""
    about, lines = document["circumstances"], []
    for student in dict.fromkeys(row["student"] for row in document["rows"]):
        lines += [f"### {student}", "", *HEAD, *(line(row) for row in document["rows"] if row["student"] == student and row["method"] in SHOWN), ""]
    versions = ", ".join(f"{name} {version}" for name, version in document["toolchains"].items() if version)
    lines += [f"Measured on {about['device']}, {about['date'][:10]}; latencies in turns in one process, one thread unless said, ratios of p50; drops in points of mIoU on "
              f"{document['photos']} photos of {document['data']} ({document['instances_per_photo']} masks each at most) that no range was found on; disagreement on the photos in "
              f"examples/. edgekd's choice may lose {document['max_drop']} points there. {versions}. From `{source}`, which also has everything that was tried."]
    return "\n".join(lines)


def main() -> None:
    """Rewrite the generated part of the page."""
    source = Path(sys.argv[1])
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    made = tables(json.loads(source.read_text(encoding="utf-8")), source.resolve().relative_to(ROOT).as_posix())
    write_atomic(PAGE, f"{before}{BEGIN}\n{made}\n{END}{after}")


if __name__ == "__main__":
    main()
