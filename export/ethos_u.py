"""Arm Ethos-U NPUs (microcontrollers and small Linux boards): an int8 `.tflite`, compiled by vela.

    w8a8_static    integers wherever an operator has them; float32 in and out, which the CPU beside the NPU converts

Nothing of it runs here. The int8 file from before compilation is kept beside the compiled one: LiteRT's interpreter computes the same integers, and
parity and accuracy are those. Cycles, time and memory are vela's estimates for one accelerator, system and memory mode, marked `predicted`; the time of
operators that vela leaves to the CPU is in none of them.

    EDGEKD_ETHOS_U=ethos-u65-512 edgekd export ... --to ethos_u        # or accelerator,system-config,memory-mode
"""
from __future__ import annotations

import csv
import os
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekd.export._child import call
from edgekd.export._litert_graph import ARITHMETIC, Graph, precision, tag
from edgekd.export.litert import RUNTIME, WRITERS, LitertSession, write

from edgekd.errors import CannotTake, EdgekdError, UsageError, unknown
from edgekd.protocols import Availability, Check, Component, Facts, package_version

FIX = 'pip install "edgekd[ethos-u]"'
COMPILER = "ethos-u-vela"
VARIABLE = "EDGEKD_ETHOS_U"
MINUTES = 10.0
COMMAND_STREAM = "CUSTOM"
"""The operator that stands for all that one stretch of the NPU does."""

ON_CPU = " (on the CPU)"
LEFT_OUT = "the time of the operators left to the CPU"
SYSTEMS = {"ethos-u55": ("Ethos_U55_High_End_Embedded", "Shared_Sram"), "ethos-u65": ("Ethos_U65_High_End", "Dedicated_Sram"),
           "ethos-u85": ("Ethos_U85_SYS_DRAM_Mid", "Dedicated_Sram_384KB")}
"""Family -> vela's system configuration and memory mode, where none is asked for. Its own defaults differ from chip to chip."""


@dataclass(frozen=True)
class Npu:
    """What vela compiles for, in its own words."""

    accelerator: str = "ethos-u85-512"
    system: str = SYSTEMS["ethos-u85"][0]
    memory: str = SYSTEMS["ethos-u85"][1]

    @classmethod
    def parse(cls, text: str) -> Npu:
        """`accelerator` or `accelerator,system-config,memory-mode`.

        Raises:
            UsageError: neither, or an accelerator of no known family.
        """
        parts = [p.strip() for p in text.split(",")]
        family = parts[0].rpartition("-")[0]
        if family not in SYSTEMS:
            raise unknown("Ethos-U accelerator family", family or parts[0], SYSTEMS)
        if len(parts) not in (1, 3):
            raise UsageError(f"{VARIABLE} is an accelerator, or accelerator,system-config,memory-mode", where=text)
        return cls(parts[0], *(parts[1:] or SYSTEMS[family]))


class Uncalibrated(CannotTake, UsageError):
    """A component without calibration inputs, in a format that has nothing but integers: the CPU beside the NPU takes it, or the user gives some."""


class EthosUExporter(Facts):
    """See `edgekd.protocols.Exporter`. `npu` is what is compiled for; the environment variable `EDGEKD_ETHOS_U` comes before it."""

    format = "ethos_u"
    suffix = "_vela.tflite"
    extra: str | None = "ethos-u"
    schemes: tuple[str, ...] = ("w8a8_static",)
    fixed_shapes = True
    beside = "litert"
    npu = Npu()

    def target(self) -> Npu:
        """What is compiled for now."""
        asked = os.environ.get(VARIABLE)
        return Npu.parse(asked) if asked else self.npu

    def availability(self) -> Availability:
        """Whether vela and LiteRT's toolchain are installed. Compiled files run on the device alone."""
        missing = [p for p in (*WRITERS, RUNTIME, COMPILER) if not package_version(p)]
        if missing:
            return Availability(False, reason=f"not installed: {', '.join(missing)}", fix=FIX, runs=False)
        return Availability(True, f"vela {package_version(COMPILER)}", "compiled files run on an Ethos-U only", runs=False)

    def export(self, component: Component, path: Path, *, scheme: str, calibration: Any = None, qdq: str = "u8s8") -> list[Path]:
        """Write `NAME_vela.tflite`, and beside it `NAME.tflite`, the int8 file that was compiled, and `NAME_vela.csv`, vela's estimates."""
        if scheme not in self.schemes:
            raise unknown("ethos_u scheme", scheme, self.schemes)
        if calibration is None:
            raise Uncalibrated(f"{scheme} needs calibration images", where=component.name, hint="give a folder of images with --data")
        path, npu = Path(path), self.target()
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.stem}.", dir=path.parent) as folder:
            integers = Path(folder) / _integers(path).name
            write(component, integers, scheme, calibration, whole=True)
            made = _compile(component, integers, Path(folder), npu)
            # the compiled file, which makes it a model, last
            for file, final in ((integers, _integers(path)), (made["table"], _table(path)), (made["compiled"], path)):
                os.replace(file, final)
        return [path, _integers(path), _table(path)]

    def open(self, path: Path, *, scheme: str, threads: int | None = None) -> LitertSession:
        """Raises EdgekdError: it runs on the device alone."""
        raise EdgekdError("files compiled for an Ethos-U run on the device only", where=path, hint="the .tflite beside it runs in LiteRT")

    def check(self, component: Component, path: Path, *, scheme: str) -> Check:
        """What vela put on the NPU and what it left to the CPU, read from the compiled file; and its estimates."""
        ops, left = _placed(Graph(str(_integers(path))), Graph(str(path)))
        details = _estimates(_table(Path(path))) | {"cpu_operators": left, "not_included": LEFT_OUT}
        if not ops.get(f"{COMMAND_STREAM}:npu"):
            raise EdgekdError("vela put nothing on the NPU", where=component.name, hint="the component has no operator that it takes")
        count = sum(left.values())
        how = (f"compiled by vela {package_version(COMPILER)} for {details['accelerator']} ({details['system_config']}, {details['memory_mode']}); "
               f"{count} operators left to the CPU, whose time is in no estimate")
        tags = [t for op, n in ops.items() for kind, _, t in [op.partition(":")] if kind.removesuffix(ON_CPU) in ARITHMETIC for _ in range(n)]
        return Check(state="built", how=how, precision=precision(tags), ops=ops, details=details)

    def stand_in(self, path: Path, *, scheme: str, threads: int | None = None) -> Int8Session:
        """The int8 file in LiteRT's interpreter."""
        return Int8Session(_integers(Path(path)), threads)


class Int8Session(LitertSession):
    """What vela was given, computed by LiteRT."""

    stand_in_for = "LiteRT's interpreter on the int8 file that vela compiled"


def _integers(path: Path) -> Path:
    """The int8 file beside a compiled one."""
    path = Path(path)
    return path.with_name(path.name.removesuffix(EthosUExporter.suffix) + ".tflite")


def _table(path: Path) -> Path:
    return path.with_suffix(".csv")


def _compile(component: Component, integers: Path, folder: Path, npu: Npu) -> dict[str, Path]:
    request = {"source": str(integers), "folder": str(folder), "accelerator": npu.accelerator, "system": npu.system, "memory": npu.memory}
    try:
        made = call("edgekd.export._vela:compile", request, minutes=MINUTES, what="vela")
    except EdgekdError as e:
        raise EdgekdError(e.what, where=component.name, hint=e.hint) from e
    return {name: folder / file for name, file in made.items()}


def _placed(before: Graph, after: Graph) -> tuple[dict[str, int], dict[str, int]]:
    """`operator:type` -> count of all that is computed, with what the CPU computes marked; and the operators left to the CPU by kind.

    What vela keeps of the int8 graph is the CPU's; all the rest became its command streams, counted as `CUSTOM:npu`.
    """
    def operators(graph: Graph) -> Counter[str]:
        return Counter(f"{kind}:{tag(kind, *graph.types(i))}" for i, kind in enumerate(graph.kinds) if kind != COMMAND_STREAM)

    everything, kept = operators(before), operators(after)
    streams = sum(kind == COMMAND_STREAM for kind in after.kinds)
    found = Counter({name: n - kept[name] for name, n in everything.items() if n > kept[name]})
    found.update({f"{kind}{ON_CPU}:{t}": n for name, n in kept.items() for kind, _, t in [name.partition(":")]})
    if streams:
        found[f"{COMMAND_STREAM}:npu"] = streams
    left = Counter(kind for kind in after.kinds if kind != COMMAND_STREAM)
    return dict(found.most_common()), dict(left.most_common())


def _estimates(table: Path) -> dict[str, Any]:
    """Vela's own estimates, as JSON. Raises EdgekdError when the table is not vela's."""
    try:
        with table.open(newline="", encoding="utf-8") as file:
            row = next(csv.DictReader(file))
        number = {name: float(row[name]) for name in (
            "core_clock", "inference_time", "cycles_total", "cycles_npu", "nn_macs", "sram_memory_used", "dram_memory_used",
            "on_chip_flash_memory_used", "off_chip_flash_memory_used")}
        return {
            "provenance": "predicted", "accelerator": row["accelerator_configuration"], "system_config": row["system_config"],
            "memory_mode": row["memory_mode"], "core_clock_hz": number["core_clock"], "inference_ms": number["inference_time"] * 1e3,
            "cycles_total": int(number["cycles_total"]), "cycles_npu": int(number["cycles_npu"]), "macs": int(number["nn_macs"]),
            "sram_kib": number["sram_memory_used"], "dram_kib": number["dram_memory_used"],
            "on_chip_flash_kib": number["on_chip_flash_memory_used"], "off_chip_flash_kib": number["off_chip_flash_memory_used"]}
    except (OSError, StopIteration, KeyError, ValueError) as e:
        raise EdgekdError(f"vela's table of estimates cannot be read: {type(e).__name__} {e}", where=table, hint="export the model again") from e


exporter = EthosUExporter()
