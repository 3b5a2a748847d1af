"""QDQ graphs as Qualcomm's HTP wants them: onnxruntime's own recipe for it, with two things kept out that break silently.

    prompts        what depends on no picture stays in float: coordinates, labels compared for equality, the mask of absent points. All of
                   it quantized makes masks useless, also at 16 bits, and it is no work to speak of
    per channel    weights of convolutions only. 16-bit activations on MatMul weights of a scale a channel compute something else on the HTP than the same
                   graph says (seen in the simulator), and it takes no signed weights of LayerNormalization
"""
from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.errors import EdgekdError, first_line

if TYPE_CHECKING:
    import onnx

CHANNELS = {"Conv": 0, "ConvTranspose": 1}
"""operator -> the axis of its weights' output channels"""
DELICATE = ("Softmax", "LayerNormalization")
"""What 8-bit activations wreck in attention models; the HTP computes it in fp16."""


def quantize(source: Path, target: Path, samples: Iterable[Mapping[str, Any]], *, bits: int, where: str) -> None:
    """Write the QDQ form of the float graph in `source`, 8-bit weights and activations of `bits` 8 or 16.

    Raises:
        EdgekdError: there is nothing to quantize, or onnxruntime's quantizer fails.
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.execution_providers.qnn import get_qnn_qdq_config, qnn_preprocess_model

    prepared = target.with_name("prepared.onnx")
    try:
        if qnn_preprocess_model(str(source), str(prepared)):
            source = prepared
        graph = onnx.load(source)
        float_nodes = without_pictures(graph.graph)
        chosen = [n for n in graph.graph.node if n.name not in float_nodes]
        constant = {t.name for t in graph.graph.initializer}
        signed = {"quant_type": quantization.QuantType.QInt8, "symmetric": True}
        weights = {n.input[1]: [signed | {"axis": CHANNELS[n.op_type]}] for n in chosen if n.op_type in CHANNELS and n.input[1] in constant}
        if not any(n.op_type in (*CHANNELS, "MatMul", "Gemm") for n in chosen):
            raise EdgekdError("nothing to quantize: it has no Conv, MatMul or Gemm that sees a picture", where=where, hint="use fp16")
        if bits == 8:
            float_nodes += [n.name for n in chosen if n.op_type in DELICATE]
        activation = quantization.QuantType.QUInt8 if bits == 8 else quantization.QuantType.QUInt16
        with _quiet():
            quantization.quantize(str(source), str(target), get_qnn_qdq_config(
                source, _Reader(samples), activation_type=activation, weight_type=quantization.QuantType.QUInt8, init_overrides=weights or None,
                nodes_to_exclude=float_nodes or None))
    except EdgekdError:
        raise
    except Exception as e:  # the quantizer raises ValueError, RuntimeError, KeyError and onnxruntime's own
        raise EdgekdError(f"onnxruntime cannot quantize the component for QNN: {first_line(e)}", where=where, hint="use fp16") from e
    finally:
        prepared.unlink(missing_ok=True)


def without_pictures(graph: onnx.GraphProto) -> list[str]:
    """Names of the nodes that depend on no input of four axes; none where no input has four."""
    seen = {i.name for i in graph.input if len(i.type.tensor_type.shape.dim) == 4}
    if not seen:
        return []
    found = []
    for node in graph.node:
        if seen & set(node.input):
            seen.update(node.output)
        else:
            found.append(node.name)
    return found


def multiplications(graph: onnx.GraphProto) -> int:
    """Multiply-adds of a float graph of fixed shapes, of its convolutions and matrix products."""
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in [*graph.value_info, *graph.input, *graph.output]}
    shapes |= {t.name: list(t.dims) for t in graph.initializer}
    total = 0
    for node in graph.node:
        if node.op_type not in (*CHANNELS, "MatMul", "Gemm"):
            continue
        a, b, out = (shapes.get(name, []) for name in (node.input[0], node.input[1], node.output[0]))
        if not a or not b or not out:
            continue
        if node.op_type == "ConvTranspose":
            total += _product(a) * _product(b[1:])
        else:
            turned = node.op_type == "Gemm" and any(x.name == "transA" and x.i for x in node.attribute)
            total += _product(out) * (_product(b[1:]) if node.op_type == "Conv" else a[-2 if turned else -1])
    return total


def _product(numbers: list[int]) -> int:
    total = 1
    for n in numbers:
        total *= n
    return total


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the quantizer's advice, which it gives to the root logger; failures still raise."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(before)


class _Reader:
    """Calibration inputs one by one, from the beginning as often as onnxruntime asks."""

    def __init__(self, samples: Iterable[Mapping[str, Any]]) -> None:
        self._samples = samples
        self.rewind()

    def get_next(self) -> dict[str, Any] | None:
        sample = next(self._iterator, None)
        return None if sample is None else dict(sample)

    def rewind(self) -> None:
        self._iterator: Iterator[Mapping[str, Any]] = iter(self._samples)
