"""docs/formats.md from a committed run of `benchmarks/formats.py`.

    python benchmarks/formats_page.py benchmarks/results/formats-2026-11-21.json
"""
from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from edgekd.workspace import write_atomic

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/formats.md"
BEGIN, END = "<!-- matrix:begin -->", "<!-- matrix:end -->"
HEAD = ("| format | scheme | state | executes | mask IoU to the student: encoder | decoder | box mIoU | one click | MB | encoder ms | decoder ms | note |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |")


def table(document: dict[str, Any], student: str) -> list[str]:
    """The Markdown rows of one student."""
    return [*HEAD, *(line(row) for row in document["rows"] if row["student"] == student)]


def line(row: dict[str, Any]) -> str:
    """One row; what failed says why."""
    if row["status"] != "ok":
        return _cells([row["format"], row["scheme"], "failed", *[""] * 8, f"{row['reason']}"])
    parts, notes = row["components"], []
    for name, part in parts.items():
        if part["note"]:
            notes.append(f"{name} {part['note']}")
        if part["stand_in"]:
            notes.append(f"{name}'s numbers by {part['stand_in']}")
        elif part["state"] != "ran":
            notes.append(f"{name}: {part['findings']['how']}")
    state = "ran here" if row["ran_here"] else ", ".join(dict.fromkeys({"ran": "ran here", "built": "built, not run", "checked": "checked, not run"}[p["state"]]
                                                                       for p in parts.values()))
    overlap = [f"{p['parity']['mask_iou']:.4f}" if "mask_iou" in p["parity"] else "" for p in (parts["encoder"], parts["decoder"])]
    predicted = " (predicted)" if row.get("accuracy_provenance") == "predicted" else ""
    accuracy = [f"{row['accuracy'][n]:.3f}{predicted}" if "accuracy" in row else "" for n in ("box_miou", "center_miou")]
    latency = [f"{row['latency_ms'][n]['p50']:.1f}" if "latency_ms" in row else "" for n in ("encoder", "decoder")]
    executes = " / ".join(dict.fromkeys(p["executed_precision"] for p in parts.values()))
    return _cells([row["format"], row["scheme"], state, executes, *overlap, *accuracy, f"{row['size_bytes'] / 1e6:.2f}", *latency, "; ".join(dict.fromkeys(notes))])


def _cells(values: list[str]) -> str:
    return "| " + " | ".join(v.replace("|", "/").replace("\n", " ") for v in values) + " |"


def matrix(document: dict[str, Any], source: str) -> str:
    """The generated part of the page."""
    about, lines = document["circumstances"], []
    for student in dict.fromkeys(row["student"] for row in document["rows"]):
        lines += [f"### {student}", "", *table(document, student), ""]
    versions = ", ".join(f"{name} {version}" for name, version in document["toolchains"].items() if version)
    lines += [f"Measured on {about['device']}, {about['date'][:10]}, {document['threads']} thread, in turns; accuracy on {document['photos']} photos of "
              f"{document['data']}, {document['instances_per_photo']} masks a photo at most. {versions}. From `{source}`."]
    return "\n".join(lines)


def main() -> None:
    """Rewrite the generated part of the page."""
    source = Path(sys.argv[1])
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    made = matrix(json.loads(source.read_text(encoding="utf-8")), source.resolve().relative_to(ROOT).as_posix())
    write_atomic(PAGE, f"{before}{BEGIN}\n{made}\n{END}{after}")


if __name__ == "__main__":
    main()
