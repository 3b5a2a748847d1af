"""Latency of every encoder at its own input size, as edgekd exports it; JSON out, and the table of docs/encoders.md.

    python benchmarks/encoders.py --output benchmarks/results/encoders-2026-11-21.json

Weights do not matter for latency: every encoder is drawn from a seed, re-parameterised and exported. Within one block (a runtime and
precision) all encoders are open at once and take turns, so that a ratio compares runs made under the same conditions; blocks follow each other,
so that milliseconds of different blocks compare less well. Beside ours stands EdgeSAM's encoder as its own repository exports it: branches not
merged, upsampled bilinearly, layer norm spelled out, the TorchScript exporter at opset 11 (which folds batch norms by itself).
"""
from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgekd import plugins, students, zoo
from edgekd.measurement import Circumstances, Latency
from edgekd.models.blocks import LayerNorm2d
from edgekd.models.fold import fold
from edgekd.models.repvit import CONFIGS, RepViT
from edgekd.profiling.latency import interleave
from edgekd.protocols import Component, Session
from edgekd.workspace import write_atomic, write_json

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/encoders.md"
BLOCKS = (("onnx", "fp32"), ("openvino", "fp32"), ("openvino", "bf16"))
BASE, THEIRS = "sam_vit_b", "edge_sam (as its repository exports it)"
OURS = ("repvit_xs", "repvit_s", "repvit_m", "tinyvit_xs", "tinyvit_s")
LEFT_OUT = {"sam_vit_l": "three times ViT-B", "sam_vit_h": "six times ViT-B"}
BILINEAR = "edge_sam, bilinear"
GOALS = (("best student / ViT-B", "onnx fp32", 40.0), ("ours / theirs", "onnx fp32", 1.05), ("ours / theirs", "openvino fp32", 1.16))
EMBED = 256


class PlainNorm(nn.Module):
    """The reference's layer norm over channels, written as means and squares."""

    def __init__(self, norm: LayerNorm2d) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        centred = x - x.mean(1, keepdim=True)
        return self.weight[:, None, None] * (centred / torch.sqrt(centred.pow(2).mean(1, keepdim=True) + self.eps)) + self.bias[:, None, None]


def bilinear() -> RepViT:
    """EdgeSAM's encoder with the upsampling that its exporters bake in."""
    return RepViT(replace(CONFIGS["edge_sam"], upsample="bilinear"), EMBED)


def theirs(path: Path) -> None:
    """EdgeSAM's encoder the way its repository writes it."""
    model = bilinear().eval()
    model.neck[1], model.neck[3] = PlainNorm(model.neck[1]), PlainNorm(model.neck[3])  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (torch.randn(1, 3, 1024, 1024),), str(path), dynamo=False, opset_version=11, input_names=["images"], output_names=["image_embeddings"])


def encoders() -> dict[str, tuple[Callable[[], nn.Module], int]]:
    """name -> (builder, image size): all published ones but the two largest, and our own students at SAM's size and embedding."""
    found: dict[str, tuple[Callable[[], nn.Module], int]] = {
        name: (spec.encoder, spec.preprocess.image_size) for name, spec in zoo.SPECS.items() if name not in LEFT_OUT}
    found[BILINEAR] = (bilinear, 1024)
    return found | {name: ((lambda name=name: students.encoder(name, EMBED)), 1024) for name in OURS}


def exported(names: list[str], folder: Path) -> dict[str, dict[str, Any]]:
    """Write every encoder in every block's format; name -> files and facts."""
    rows: dict[str, dict[str, Any]] = {}
    for number, (name, (build, size)) in enumerate((n, e) for n, e in encoders().items() if n in names):
        torch.manual_seed(0)
        module = build().eval()
        rows[name] = {"image_size": size, "params": sum(p.numel() for p in module.parameters()), "files": {}}
        part = Component("encoder", fold(module), {"images": torch.randn(1, 3, size, size)}, ("image_embeddings",))
        for format, scheme in BLOCKS:
            exporter = plugins.exporter(format)
            path = folder / f"{number}-{scheme}{exporter.suffix}"
            exporter.export(part, path, scheme=scheme)
            rows[name]["files"][f"{format} {scheme}"] = path
        print(f"exported {name}", flush=True)
    if "edge_sam" in rows:
        torch.manual_seed(0)
        path = folder / "theirs.onnx"
        theirs(path)
        rows[THEIRS] = rows["edge_sam"] | {"files": {f"{f} {s}": path for f, s in BLOCKS}}
    return rows


def opened(path: Path, format: str, scheme: str, threads: int | None) -> Session:
    """A session on a file; OpenVINO reads ONNX files as they are."""
    return plugins.exporter(format).open(path, scheme=scheme, threads=threads)


def measure(rows: dict[str, dict[str, Any]], repeats: int, threads: int | None) -> None:
    """Fill in `latency_ms` by block."""
    for format, scheme in BLOCKS:
        block = f"{format} {scheme}"
        sessions = {name: opened(row["files"][block], format, scheme, threads) for name, row in rows.items()}
        images = {size: {"images": torch.randn(1, 3, size, size).numpy()} for size in {r["image_size"] for r in rows.values()}}
        calls = {name: (lambda s=s, x=images[rows[name]["image_size"]]: s.run(x)) for name, s in sessions.items()}
        for name, samples in interleave(calls, warmup=1, repeats=repeats, max_seconds=20.0).items():
            rows[name].setdefault("latency_ms", {})[block] = Latency.from_samples(samples.values).model_dump(mode="json")
            rows[name].setdefault("executed_precision", {})[block] = sessions[name].executed_precision
            print(f"{block:14} {name:44} {rows[name]['latency_ms'][block]['p50']:9.1f} ms", flush=True)


def summary(rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row an encoder, with its ratios (by medians) to ViT-B and to the reference's export."""
    table = []
    for name, row in rows.items():
        speed = {base: {block: rows[base]["latency_ms"][block]["p50"] / latency["p50"] for block, latency in row["latency_ms"].items()}
                 for base in (BASE, THEIRS) if base in rows}
        table.append({"encoder": name, "provenance": "measured", **{k: v for k, v in row.items() if k != "files"}, "times_as_fast_as": speed})
    return table


def goals(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the project asks of itself, and what was reached."""
    def speed(name: str, base: str, block: str) -> float:
        return next(r["times_as_fast_as"][base][block] for r in table if r["encoder"] == name)

    found = []
    for what, block, least in GOALS:
        value = max(speed(n, BASE, block) for n in OURS) if what.startswith("best") else speed(BILINEAR, THEIRS, block)
        found.append({"goal": what, "block": block, "least": least, "measured": value, "met": value >= least})
    return found


def page(document: dict[str, Any], source: str) -> str:
    """The Markdown page of the result."""
    blocks = [f"{f} {s}" for f, s in BLOCKS]
    lines = ["# Encoders, measured", "", "Median milliseconds of one image, in brackets how many times as fast as SAM ViT-B in the same block.",
             "At 1024 px (EfficientViT-SAM L at its own 512); untrained weights, which change nothing here; re-parameterised as `edgekd export` does.", "",
             f"| encoder | input | M params | {' | '.join(blocks)} |", "| --- | ---: | ---: |" + " ---: |" * len(blocks)]
    for row in sorted(document["rows"], key=lambda r: r["latency_ms"][blocks[0]]["p50"]):
        cells = [f"{row['latency_ms'][b]['p50']:.0f} ({row['times_as_fast_as'][BASE][b]:.1f}x)" for b in blocks]
        lines.append(f"| {row['encoder']} | {row['image_size']} | {row['params'] / 1e6:.1f} | {' | '.join(cells)} |")
    about = document["circumstances"]
    versions = ", ".join(f"{k} {about['versions'][k]}" for k in ("torch", "onnxruntime", "openvino"))
    reached = "; ".join(f"{g['goal']} in {g['block']} {g['measured']:.2f} (goal {g['least']:g})" for g in document["goals"])
    left = "; ".join(f"{n}: {why}" for n, why in LEFT_OUT.items())
    return "\n".join([*lines, "", f"Measured on {about['device']}, {about['date'][:10]}, {versions}, {document['threads']} threads. From `{source}`.", "",
                      f"Ours against the reference's export of the same network is `{BILINEAR}` against `{THEIRS}`: {reached}.", "", f"Not in the table: {left}.", ""])


def main() -> None:
    """Export, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / f"benchmarks/results/encoders-{date.today()}.json")
    parser.add_argument("--only", help="names with commas between (a trial run, not a result)")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    names = given.only.split(",") if given.only else list(encoders())
    with tempfile.TemporaryDirectory(prefix="edgekd-") as folder, torch.no_grad():
        rows = exported(names, Path(folder))
        about = Circumstances.capture(threads=given.threads, repeats=given.repeats).model_dump(mode="json")
        measure(rows, given.repeats, given.threads)
    table = summary(rows)
    document = {"benchmark": "encoders", "circumstances": about, "threads": given.threads, "rows": table, "goals": [] if given.only else goals(table)}
    write_json(given.output, document)
    if not given.only:
        write_atomic(PAGE, page(document, given.output.resolve().relative_to(ROOT).as_posix()))
    for goal in document["goals"]:
        print(json.dumps(goal))


if __name__ == "__main__":
    main()
