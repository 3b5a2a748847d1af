"""Latencies that others have published, with their sources, beside what the roofline says of the same networks: `quoted`, never measured by us.

They are the only check there is of rooflines of devices that we cannot reach. Nothing was fitted to them. The operators of the networks, read from our own
implementations at the published input sizes, are in `data/quoted.json` (`benchmarks/predictor.py --networks` writes it).
"""
from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from edgekd.errors import EdgekdError
from edgekd.latency import roofline
from edgekd.latency.database import SHIPPED
from edgekd.latency.operators import Operator

if TYPE_CHECKING:
    from edgekd.target import Roofline

FILE = SHIPPED / "quoted.json"
EDGESAM, NANOSAM = "EdgeSAM, README and arXiv 2312.06660 table 1", "NVIDIA NanoSAM, README, table of performance"
EFFICIENTVIT, REPVIT = "EfficientViT-SAM, README of applications/efficientvit_sam", "RepViT-SAM, README of sam/"


@dataclass(frozen=True)
class Quoted:
    """A published figure. `covers`: whether it is of the `encoder`, or of the `encoder+decoder`."""

    network: str
    image_size: int
    device: str
    runtime: str
    precision: str
    ms: float
    covers: str
    source: str
    note: str = ""

    @property
    def networks(self) -> list[str]:
        """Keys of the networks in `data/quoted.json`."""
        return [f"{self.network}-{self.image_size}", *(["sam_decoder"] if self.covers == "encoder+decoder" else [])]


ROWS = (
    Quoted("edge_sam", 1024, "iphone_14", "coreml", "fp16", 1000 / 38.7, "encoder+decoder", EDGESAM, "38.7 FPS"),
    Quoted("edge_sam", 1024, "iphone_14", "coreml", "fp16", 14.0, "encoder", EDGESAM, "the RepViT-M1 encoder alone"),
    Quoted("mobile_sam", 1024, "iphone_14", "coreml", "fp16", 1000 / 4.9, "encoder+decoder", EDGESAM, "4.9 FPS"),
    Quoted("repvit_sam", 1024, "iphone_12", "coreml", "fp16", 48.9, "encoder", REPVIT),
    Quoted("nanosam", 1024, "jetson_orin_nano", "tensorrt", "fp16", 27.0, "encoder+decoder", NANOSAM, "decoder in fp32"),
    Quoted("mobile_sam", 1024, "jetson_orin_nano", "tensorrt", "fp32", 146.0, "encoder+decoder", NANOSAM),
    Quoted("nanosam", 1024, "jetson_agx_orin", "tensorrt", "fp16", 4.2, "encoder", NANOSAM),
    Quoted("nanosam", 1024, "jetson_agx_orin", "tensorrt", "fp16", 8.1, "encoder+decoder", NANOSAM, "decoder in fp32"),
    Quoted("mobile_sam", 1024, "jetson_agx_orin", "tensorrt", "fp32", 35.0, "encoder", NANOSAM),
    Quoted("mobile_sam", 1024, "jetson_agx_orin", "tensorrt", "fp32", 39.0, "encoder+decoder", NANOSAM),
    Quoted("efficientvit_sam_l0", 512, "jetson_agx_orin", "tensorrt", "fp16", 8.2, "encoder", EFFICIENTVIT, "the engine command printed has no fp16 flag"),
    Quoted("efficientvit_sam_l1", 512, "jetson_agx_orin", "tensorrt", "fp16", 10.2, "encoder", EFFICIENTVIT, "the engine command printed has no fp16 flag"),
    Quoted("efficientvit_sam_l2", 512, "jetson_agx_orin", "tensorrt", "fp16", 12.9, "encoder", EFFICIENTVIT, "the engine command printed has no fp16 flag"),
    Quoted("efficientvit_sam_xl0", 1024, "jetson_agx_orin", "tensorrt", "fp16", 22.5, "encoder", EFFICIENTVIT, "the engine command printed has no fp16 flag"),
    Quoted("efficientvit_sam_xl1", 1024, "jetson_agx_orin", "tensorrt", "fp16", 37.2, "encoder", EFFICIENTVIT, "the engine command printed has no fp16 flag"),
)


def rooflines() -> dict[str, Roofline]:
    """Of the devices above: from the targets' profiles, and of phones that none describes."""
    from edgekd import target
    from edgekd.target import Roofline

    phones = {
        "iphone_14": Roofline(unit="Neural Engine", gflops={"fp16": 15800}, gb_per_s=34.1,
                              source="Apple, A15 Bionic announcement (15.8 trillion operations a second); 64-bit LPDDR4X-4266"),
        "iphone_12": Roofline(unit="Neural Engine", gflops={"fp16": 11000}, gb_per_s=34.1,
                              source="Apple, A14 Bionic announcement (11 trillion operations a second); 64-bit LPDDR4X-4266"),
    }
    known = {name: target.resolve(name).roofline for name in {r.device for r in ROWS} - set(phones)}
    return phones | {name: roof for name, roof in known.items() if roof is not None}


def compare() -> list[dict[str, Any]]:
    """Every row with the roofline's prediction, its interval, and its error (predicted / quoted - 1)."""
    found = []
    for row in ROWS:
        roof = rooflines()[row.device]
        ms = sum(roofline.predict_ms(networks()[name], roof, "fp32" if name == "sam_decoder" and row.runtime == "tensorrt" else row.precision) for name in row.networks)
        found.append({"network": row.network, "image_size": row.image_size, "device": row.device, "runtime": row.runtime, "precision": row.precision,
                      "covers": row.covers, "quoted_ms": round(row.ms, 3), "provenance": "quoted", "source": row.source, "note": row.note,
                      "predicted_ms": round(ms, 3), "low_ms": round(ms / roofline.FACTOR, 3), "high_ms": round(ms * roofline.FACTOR, 3),
                      "error": round(ms / row.ms - 1, 4), "inside": ms / roofline.FACTOR <= row.ms <= ms * roofline.FACTOR, "roofline": roof.source})
    return found


@cache
def networks() -> dict[str, list[Operator]]:
    """name-size -> operators.

    Raises:
        EdgekdError: the shipped file is damaged.
    """
    try:
        told = json.loads(FILE.read_text(encoding="utf-8"))
        return {name: [Operator.read(row) for row in rows for _ in range(row["count"])] for name, rows in told.items()}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise EdgekdError("the operators of the quoted networks cannot be read", where=FILE, hint="install edgekd again") from e


def told(operators: Sequence[Operator]) -> list[dict[str, Any]]:
    """Operators as rows of that file, those that are the same joined."""
    counted = Counter(json.dumps(o.told(), sort_keys=True) for o in operators)
    return [json.loads(text) | {"count": count} for text, count in counted.items()]
