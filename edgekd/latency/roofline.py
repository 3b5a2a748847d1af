"""What a network would take on a device at best, and about: arithmetic and traffic against what the device's data sheet promises.

Nothing is fitted. Each operator takes the longer of its arithmetic, at a share (`efficiency`) of the peak, and of its memory traffic, at `STREAMED` of
the bandwidth; operators that every compiler joins to the one before them count nothing. Good for ordering networks and for the order of magnitude: the interval is a factor of
`FACTOR` both ways, and no more should be read into it.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgekd.latency.keys import GENERIC
from edgekd.latency.operators import BYTES, Operator, elements

if TYPE_CHECKING:
    from edgekd.target import Roofline, Target

FACTOR = 3.0
STREAMED = 0.75
"""of its bandwidth a memory gives to long copies, about"""
JOINED = {"Relu", "Gelu", "FastGelu", "QuickGelu", "BiasGelu", "Sigmoid", "HardSigmoid", "HardSwish", "Swish", "Silu", "Clip", "Tanh", "Erf", "Add", "Sum", "Mul",
          "Div", "Sub", "Sqrt", "Pow", "BatchNormalization", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout", "Cast", "Constant", "Shape",
          "QuantizeLinear", "DequantizeLinear", "ReorderInput", "ReorderOutput", "Reorder"}
SIZES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}
PER_CYCLE = (("amx", 64), ("avx512", 32), ("avx2", 32), ("avx", 16), ("sve", 16), ("asimd", 16))
"""Instruction set -> fp32 operations a cycle of a core, a multiply-add counting as two."""
GHZ, CORE_GB_PER_S = 2.5, 10.0


def precision_of(scheme: str) -> str:
    """What a scheme computes in: `fp32`, `fp16` (also bf16, which has its rate) or `int8`."""
    head = scheme.split("_")[0].split(":")[0].split("+")[0]
    return "int8" if scheme.startswith(("w8a8", "w4a8", "w8_dynamic")) else "fp16" if head in ("fp16", "bf16") else "fp32"


def of_cpu(device: str, threads: int) -> Roofline:
    """The nominal roofline of a class of CPU (`edgekd.latency.keys.cpu_class`) on some of its cores."""
    from edgekd.target import Roofline

    sets = set(device.split("+"))
    fp32 = next((rate for name, rate in PER_CYCLE if name in sets), 8) * GHZ * threads
    half, int8 = (8, 16) if "amx" in sets else (2 if {"bf16", "asimd"} & sets else 1, 4 if {"vnni", "dot", "i8mm"} & sets else 2)
    return Roofline(unit=f"{threads} core{'s' if threads > 1 else ''} of a CPU", gflops={"fp32": fp32, "fp16": fp32 * half, "int8": fp32 * int8},
                    gb_per_s=CORE_GB_PER_S * threads, efficiency=0.5, source="nominal: operations a cycle of its instruction sets at 2.5 GHz")


def of_target(target: Target, device: str, format: str, threads: int) -> Roofline | None:
    """The target's own, of a target that names no device that of its CPU; None where nothing is known of what runs this format."""
    if target.roofline is not None:
        return target.roofline if not target.roofline.formats or format in target.roofline.formats else None
    return of_cpu(device, threads) if target.name in GENERIC else None


def predict_ms(operators: Sequence[Operator], roofline: Roofline, precision: str = "fp32") -> float:
    """Milliseconds of all operators one after the other."""
    rates: dict[str, float] = dict(roofline.gflops)  # type: ignore[arg-type]
    rate = rates.get(precision) or (rates.get("fp16") if precision == "int8" else None) or max(rates.values())
    return sum(_ms(o, rate * roofline.efficiency, roofline.gb_per_s * STREAMED, SIZES[precision]) for o in operators)


def _ms(operator: Operator, gflops: float, gb_per_s: float, size: int) -> float:
    if operator.op in JOINED and not operator.macs:
        return 0.0
    numbers = sum(elements(s) for s in (*operator.inputs, *operator.weights, *operator.outputs))
    size = size if operator.type in ("f32", "f16", "bf16") else BYTES.get(operator.type, size)
    return max(2 * operator.macs / gflops, numbers * size / gb_per_s) / 1e6
