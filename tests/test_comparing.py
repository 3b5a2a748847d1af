"""A precision against fp32: the verdict's rules, what counts as integer arithmetic, what is refused beforehand."""
from __future__ import annotations

import pytest

from edgekd import comparing, target
from edgekd.comparing import Comparison
from edgekd.errors import UsageError


@pytest.mark.parametrize(("size", "latency", "drop", "verdict", "said"), [
    (0.3, 0.6, 0.001, "accepted", "0.60 of fp32's time"),
    (0.3, 1.04, 0.0, "rejected", "not faster than fp32"),
    (0.3, 1.4, 0.0, "rejected", "not faster than fp32"),
    (0.3, 0.5, 0.05, "rejected", "loses 5.00 points"),
    (0.3, 1.4, 0.05, "rejected", "loses"),
    (0.3, None, 0.0, "unverified", "cannot be measured"),
    (0.3, None, 0.5, "rejected", "loses"),
    (0.6, 0.8, None, "accepted", "0.60 of its size"),
])
def test_verdict(size: float, latency: float | None, drop: float | None, verdict: str, said: str) -> None:
    found, reason = Comparison(size, latency, drop).verdict()
    assert found == verdict and said in reason


@pytest.mark.parametrize(("op", "integer"), [
    ("QLinearConv", True), ("MatMulIntegerToFloat", True), ("DynamicQuantizeMatMul", True), ("ConvInteger", True), ("QGemm", True),
    ("Convolution:i8", True), ("FullyConnected:u8", True), ("Convolution:f32", False), ("MatMul", False), ("QuantizeLinear", False),
    ("DequantizeLinear", False), ("DynamicQuantizeLinear", False), ("QLinearAdd", False),
    ("Convert:u8", False), ("Eltwise:u8", False), ("CONV_2D:i8", True), ("FULLY_CONNECTED:i8", True), ("Reorder:i8", False),
])
def test_is_integer__counts_arithmetic_only(op: str, integer: bool) -> None:
    assert comparing.is_integer(op) is integer


@pytest.mark.parametrize(("scheme", "format", "device", "said"), [
    ("bf16", "onnx", "host", r"cannot run scheme 'bf16'[\s\S]*fp32, w8a8_static"),
    ("fp32", "openvino", "jetson", r"no runtime for format 'openvino'[\s\S]*tensorrt"),
    ("fp23", "onnx", "host", "did you mean 'fp32'"),
    ("fp32", "onxx", "host", "did you mean 'onnx'"),
])
def test_check_runs__refuses_before_anything_starts(scheme: str, format: str, device: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        comparing.check_runs(scheme, format, target.resolve(device))


def test_check_runs__takes_what_works() -> None:
    comparing.check_runs("w8a8_static", "onnx", target.resolve("host"))
