"""Many prompts in one call of the decoder against one call each; JSON out.

    python benchmarks/decoder_prompts.py --output benchmarks/results/decoder-prompts-2026-11-21.json

Weights do not matter for latency: the decoder is drawn from a seed. Three ways to answer P clicks on one photo take turns: our decoder once
with P prompts, our decoder P times with one, and the decoder with SAM's own six-input signature P times, the only way it has.
"""
from __future__ import annotations

import argparse
import json
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgekd import plugins
from edgekd.measurement import Circumstances, Latency
from edgekd.models.official_decoder import official_component
from edgekd.models.sam import DecoderShape, Sam, components
from edgekd.probes import probe
from edgekd.profiling.latency import Call, interleave
from edgekd.protocols import Component, Preprocess, Session
from edgekd.tasks.promptable.exported import official_inputs
from edgekd.workspace import write_json

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"SAM's decoder at 1024 px": (DecoderShape(), 1024), "SAM's decoder at 512 px": (DecoderShape(), 512),
         "sam_nano's decoder at 256 px": (DecoderShape(embed_dim=128, heads=4, mlp_dim=512), 256)}
FORMATS = ("onnx", "openvino")
GOAL = 0.7
"""one call with 16 prompts over 16 calls"""


def opened(part: Component, format: str, folder: Path, threads: int) -> Session:
    """A component in fp32, on its runtime."""
    exporter = plugins.exporter(format)
    path = folder / f"{part.outputs[1]}{exporter.suffix}"
    exporter.export(part, path, scheme="fp32")
    return exporter.open(path, scheme="fp32", threads=threads)


def ways(model: Sam, format: str, folder: Path, prompts: int, threads: int) -> dict[str, Call]:
    """The three ways to answer `prompts` clicks."""
    ours, theirs = opened(components(model)["decoder"], format, folder, threads), opened(official_component(model), format, folder, threads)
    side = model.preprocess.side
    embedding = np.random.default_rng(0).standard_normal((1, model.embed_dim, side // 16, side // 16)).astype(np.float32)
    p = probe("point", prompts, side, np.random.default_rng(1))
    together = p.inputs(embedding)
    singly = [{k: v if k == "image_embeddings" else v[i:i + 1] for k, v in together.items()} for i in range(prompts)]
    official = list(official_inputs(embedding, p.points, p.labels, p.mask_input, p.has_mask, (side * 3 // 4, side)))
    return {"one call": lambda: ours.run(together), "calls of one prompt": lambda: [ours.run(one) for one in singly],
            "SAM's signature": lambda: [theirs.run(one) for one in official]}


def row(name: str, format: str, *, prompts: int, threads: int, repeats: int, max_seconds: float) -> dict[str, Any]:
    """Latency of the ways and their ratios, for one decoder on one runtime."""
    shape, size = SIZES[name]
    torch.manual_seed(0)
    model = Sam("seeded", nn.Identity(), shape, Preprocess(size)).eval()
    with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
        found = interleave(ways(model, format, Path(folder), prompts, threads), warmup=2, repeats=repeats, max_seconds=max_seconds)
    best = {way: min(s.values) for way, s in found.items()}
    ratios = {f"one call / {way}": best["one call"] / ms for way, ms in best.items() if way != "one call"}
    line = {"decoder": name, "format": format, "scheme": "fp32", "prompts": prompts, "provenance": "measured", "ratios_of_minima": ratios,
            "goal": GOAL, "met": ratios["one call / calls of one prompt"] <= GOAL,
            "latency_ms": {way: Latency.from_samples(s.values).model_dump(mode="json") | {"min": best[way]} for way, s in found.items()}}
    print(json.dumps({k: line[k] for k in ("decoder", "format", "ratios_of_minima", "met")}), flush=True)
    return line


def main() -> None:
    """Measure every decoder on every runtime that works here and write the document."""
    parser = argparse.ArgumentParser(description="One decoder call with many prompts against many calls.")
    parser.add_argument("--output", type=Path, default=ROOT / f"benchmarks/results/decoder-prompts-{date.today().isoformat()}.json")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--max-seconds", type=float, default=20.0, help="per way; at least 10 samples are taken")
    parser.add_argument("--decoders", nargs="*", default=list(SIZES), choices=list(SIZES))
    a = parser.parse_args()
    circumstances = Circumstances.capture(threads=a.threads, repeats=a.repeats)
    rows = [row(name, format, prompts=a.prompts, threads=a.threads, repeats=a.repeats, max_seconds=a.max_seconds)
            for name in a.decoders for format in FORMATS if plugins.exporter(format).availability().ok]
    write_json(a.output, {"schema": "edgekd.benchmark.decoder_prompts/1", "circumstances": circumstances.model_dump(mode="json"), "rows": rows})


if __name__ == "__main__":
    main()
