"""What it buys to embed points on the host: the decoder with the signatures `batched` and `embedded`, each in 16 and 8 bits; JSON out.

    python benchmarks/decoder_signatures.py --output benchmarks/results/decoder-signatures-2026-11-21.json

Parity is that of the export gate: masks of the file against those of the student, on every kind of prompt, 1, 5 and 16 at a time. Beside what our
exporters write (which keep prompt tokens in float where they can) stand the two things that an NPU does: every operator in 16 bits, computed by torch,
and every operator in 8 bits, computed by onnxruntime, both with the fixed shapes that NPUs take. The bias of absent tokens is told, because it matters.
"""
from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnxruntime.quantization import QuantType, quantize_static

from edgekd import plugins, resolve
from edgekd.data.images import preprocess
from edgekd.data.scenes import Scenes
from edgekd.errors import EdgekdError
from edgekd.exporting import folded, signature
from edgekd.measurement import Circumstances
from edgekd.models.point_embedding import ABSENT_BIAS, FILE, PointEmbedding
from edgekd.models.prompt_encoder import FAR, PositionEmbedding, PromptEncoder
from edgekd.protocols import Component, Session, facts
from edgekd.quantization.calibration import DecoderCalibration, EncoderCalibration
from edgekd.runtime import Refitted, fitted
from edgekd.tasks.promptable.parity import Reference
from edgekd.workspace import write_json

ROOT = Path(__file__).resolve().parents[1]
FORMATS = ("onnx:fp16", "onnx:w8a8_static", "openvino:fp16", "openvino:w8a8_static", "litert:w8a8_static", "ethos_u:w8a8_static")
BIASES = (("qnn", "w8a8_static"), ("every product", "w8a8_static"), ("every operator", "w8a8_static"), ("every operator", "fp16"))
"""Measured with a far and a near bias of absent tokens. Fixed shapes: convolutions and linear layers with those of the prompt tokens, by our ONNX exporter; all that can be, by onnxruntime and by torch."""
KINDS = ("Conv", "ConvTranspose", "MatMul", "Gemm", "Add", "Mul", "Sub", "Div", "Softmax", "Concat", "Sin", "Cos", "Erf", "Relu", "LayerNormalization")
HARD = ("Sin", "Cos", "Equal", "GreaterOrEqual", "Where", "ReduceMax", "Cast", "Expand")
"""Operators of the batched decoder that NPUs commonly lack or run on the CPU."""


class Halves:
    """A component with every weight, input and operator in 16 bits, in torch."""

    executed_precision, executed_ops = "fp16", dict[str, int]()

    def __init__(self, part: Component) -> None:
        self._module, self._part = copy.deepcopy(part.module).half(), part
        for exact, halved in zip(part.module.modules(), self._module.modules(), strict=True):
            if isinstance(exact, PositionEmbedding):  # of the image's cells it is a constant in every file
                halved.grid = lambda height, width, exact=exact: exact.grid(height, width).half()  # type: ignore[assignment]

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `edgekd.protocols.Session`."""
        with torch.no_grad():
            out = self._module(*(torch.from_numpy(inputs[name]).half() for name in self._part.example))
        return {name: t.float().numpy() for name, t in zip(self._part.outputs, out, strict=True)}


def all_eight_bits(part: Component, samples: Any, folder: Path) -> Session:
    """A component with every operator in 8 bits that onnxruntime can quantize."""
    exporter, source, target = plugins.exporter("onnx"), folder / "float.onnx", folder / "eight.onnx"
    exporter.export(part, source, scheme="fp32")
    reader = type("Reader", (), {"left": iter(samples), "get_next": lambda self: next(self.left, None)})()
    quantize_static(str(source), str(target), reader, op_types_to_quantize=list(KINDS), per_channel=True, activation_type=QuantType.QInt8,
                    weight_type=QuantType.QInt8)
    return exporter.open(target, scheme="fp32")


def with_bias(part: Component, bias: float) -> Component:
    """A decoder whose absent tokens are told by another bias than its own."""
    if not part.host:
        module: Any = copy.deepcopy(part.module)
        module.model.prompt_encoder.absent_bias = bias
        return replace(part, module=module)
    told = replace(PointEmbedding.decode(part.host[FILE]), absent_bias=bias)
    return replace(part, host={FILE: told.encode()}, padding={"token_bias": bias})


def written(part: Component, how: tuple[str, str], samples: Any, folder: Path) -> tuple[Session | None, dict[str, Any]]:
    """A component in a precision, opened or what stands in for its runtime here, and what its vendor's compiler said."""
    exporter = plugins.exporter("onnx" if how[0].startswith("every") else how[0])
    known, (inputs, outputs) = facts(exporter), signature(part)
    still = known.fixed_shapes or how[0].startswith("every")
    fixed, taken = (dict(part.lengths), part.fixed()) if still else ({}, part)
    shown = Refitted(samples, inputs, fixed) if still else samples
    findings: dict[str, Any] = {}
    if how[0] == "every operator":
        session: Any = Halves(taken) if how[1] == "fp16" else all_eight_bits(taken, shown, folder)
    else:
        path = folder / f"decoder{exporter.suffix}"
        exporter.export(taken, path, scheme=how[1], calibration=shown)
        if exporter.availability().runs:
            session = exporter.open(path, scheme=how[1])
        else:
            found = known.check(taken, path, scheme=how[1])
            session, findings = known.stand_in(path, scheme=how[1]), {"precision": found.precision, **found.details}
    return fitted(session, inputs, outputs, fixed) if session is not None else None, findings


def row(part: Component, name: str, how: tuple[str, str], calibration: Any, reference: Reference, **told: Any) -> dict[str, Any]:
    """Parity of one decoder in one precision; or why there is none."""
    line: dict[str, Any] = {"signature": name, "computed_by": how[0], "scheme": how[1], **told, "provenance": "measured"}
    with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
        try:
            session, line["findings"] = written(part, how, list(reference.adapt(part, calibration)), Path(folder))
            if session is not None:
                parity, _ = reference.compare(part, session, how[1])
                line |= {"executed": session.executed_precision, "kept_fp32": sorted(getattr(session, "kept_fp32", {})), "mask_iou": parity["mask_iou"],
                         "iou_head_max_abs": parity["iou_head_max_abs"], "prompts": {k: v["mask_iou"] for k, v in parity["prompts"].items()}}
        except EdgekdError as e:
            line["failed"] = e.what
    print(json.dumps({k: line[k] for k in ("signature", "computed_by", "scheme", "absent_bias", "mask_iou", "failed") if k in line}), flush=True)
    return line


def operators(part: Component) -> dict[str, int]:
    """How many of each operator the float graph of fixed shapes has that NPUs lack, and how many there are of all."""
    with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
        plugins.exporter("onnx").export(part.fixed(), Path(folder) / "d.onnx", scheme="fp32")
        kinds = [n.op_type for n in onnx.load(Path(folder) / "d.onnx").graph.node]
    return {kind: kinds.count(kind) for kind in HARD} | {"all": len(kinds)}


def token_error(encoder: PromptEncoder, side: int) -> dict[str, float]:
    """Root mean square of the error of a point's Fourier features, each of mean square 1/2, for points in a square of `side` in fewer bits."""
    points = torch.rand(4096, 2, generator=torch.Generator().manual_seed(0)) * side
    layer, halves = encoder.pe_layer, points.half()
    exact = layer((points + 0.5) / side)
    matrix = layer.positional_encoding_gaussian_matrix
    angle = 2 * np.pi * ((2 * ((halves + 0.5) / side) - 1) @ matrix.half())
    sixteen = torch.cat([angle.sin(), angle.cos()], dim=-1).float()
    eight = layer(((points / side * 255).round() / 255 * side + 0.5) / side)
    return {"side": side, **{name: float((found - exact).square().mean().sqrt()) for name, found in (("16 bits", sixteen), ("8-bit coordinates", eight))}}


def main() -> None:
    """Measure and write the document."""
    parser = argparse.ArgumentParser(description="Points embedded on the host against points embedded in the file.")
    parser.add_argument("--output", type=Path, default=ROOT / f"benchmarks/results/decoder-signatures-{date.today().isoformat()}.json")
    parser.add_argument("--student", default="repvit_s")
    parser.add_argument("--photos", type=int, default=8, help="drawn photos that 8-bit ranges are found on")
    parser.add_argument("--formats", nargs="*", default=FORMATS, help="format:scheme")
    a = parser.parse_args()
    formats = [(format, scheme) for format, scheme in (f.split(":") for f in a.formats) if plugins.exporter(format).availability().ok]
    circumstances, student = Circumstances.capture(threads=torch.get_num_threads()), resolve.load_torch(a.student)
    shown = np.stack([preprocess(Scenes(5, 1)[0].image, student.preprocess)[0]])
    student = folded(student, shown)
    calibration = list(DecoderCalibration(EncoderCalibration(Scenes(9, a.photos), student.preprocess, limit=a.photos), student))
    reference, task = Reference(student, shown), plugins.task_of(student)

    def part(name: str) -> Component:
        return task.components(student, name)["decoder"]

    rows = [row(part(name), name, how, calibration, reference) for how in formats for name in ("batched", "embedded")]
    for how in BIASES:
        if how[0].startswith("every") or plugins.exporter(how[0]).availability().ok:
            rows += [row(with_bias(part(name), bias), name, how, calibration, reference, absent_bias=bias)
                     for name in ("batched", "embedded") for bias in (FAR, ABSENT_BIAS)
                     if (how, name, bias) != (("every operator", "fp16"), "batched", ABSENT_BIAS)]  # torch itself always takes the far one
    document = {"schema": "edgekd.benchmark.decoder_signatures/1", "circumstances": circumstances.model_dump(mode="json"), "student": a.student,
                "image_size": student.preprocess.image_size, "operators": {name: operators(part(name)) for name in ("batched", "embedded")},
                "token_error": [token_error(student.prompt_encoder, side) for side in (256, 1024)], "rows": rows}
    print(json.dumps({k: document[k] for k in ("operators", "token_error")}), flush=True)
    write_json(a.output, document)


if __name__ == "__main__":
    main()
