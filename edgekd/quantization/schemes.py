"""The precisions a component can be exported in. A name is a grammar:

    fp32 | fp16 | bf16          weights and activations in that float type
    w<bits>_weight_only         integer weights, arithmetic in float
    w<bits>a<bits>_static       integer weights and activations; activation ranges fixed beforehand from calibration images
    fp<bits>_static             floats of few bits with scales fixed beforehand
    w<bits>_dynamic             integer weights; activations quantized at run time from what they are

A scheme says what is asked for. What a runtime really executed is read back from it and recorded beside the scheme.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgekd import plugins
from edgekd.errors import unknown


@dataclass(frozen=True)
class Scheme:
    """One precision: bits of weights and activations, when activation ranges are found, and what that needs."""

    name: str
    weight_bits: int
    activation_bits: int
    ranges: Literal["float", "static", "dynamic"]
    summary: str
    needs: tuple[str, ...] = ()

    @property
    def is_float(self) -> bool:
        """Whether no integer arithmetic is asked for."""
        return self.ranges == "float" and self.weight_bits >= 16

    @property
    def needs_calibration(self) -> bool:
        """Whether sample inputs must be shown before export."""
        return "calibration" in self.needs

    @property
    def looks_at_inputs(self) -> bool:
        """Whether export looks at sample inputs where there are any: static ranges, and what overflows fp16."""
        return self.needs_calibration or self.name == "fp16"

    @property
    def formats(self) -> tuple[str, ...]:
        """Formats whose exporter offers this scheme."""
        return tuple(plugins.schemes().get(self.name, ()))


SCHEMES = {s.name: s for s in (
    Scheme("fp32", 32, 32, "float", "the reference: weights as trained"),
    Scheme("fp16", 16, 16, "float", "half the size; layers that leave fp16's range on real inputs are found, kept in fp32 and named"),
    Scheme("bf16", 16, 16, "float", "half the traffic, fp32's range; fast where the CPU has bf16 units (AMX, AVX512-BF16)"),
    Scheme("w8a8_static", 8, 8, "static", "integer arithmetic throughout; a quarter of the size", needs=("calibration",)),
    Scheme("w8a16_static", 8, 16, "static", "16-bit activations: near fp32, for NPUs that have them", needs=("calibration",)),
    Scheme("fp8_static", 8, 8, "static", "8-bit floats (E4M3) with scales fixed beforehand: GPUs from Ada and Hopper on", needs=("calibration",)),
    Scheme("w8_weight_only", 8, 32, "float", "8-bit weights, arithmetic in float: a quarter of the size, no faster arithmetic"),
    Scheme("w6_weight_only", 6, 32, "float", "6-bit weights from a palette, arithmetic in float"),
    Scheme("w4_weight_only", 4, 32, "float", "4-bit weights from a palette, arithmetic in float: an eighth of the size"),
    Scheme("w8_dynamic", 8, 32, "dynamic", "8-bit weights of linear layers, activations quantized on the fly; no effect on convolutions"),
)}


def names() -> list[str]:
    """Every scheme, the reference first."""
    return list(SCHEMES)


def get(name: str) -> Scheme:
    """The scheme of this name.

    Raises:
        UsageError: there is none; the nearest name is offered.
    """
    if name not in SCHEMES:
        raise unknown("scheme", name, SCHEMES)
    return SCHEMES[name]
