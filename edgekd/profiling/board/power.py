"""Power while something is measured, where the board tells it: a Jetson's `tegrastats`, else its INA3221 sensors. Nothing elsewhere.

What counts is the power of the whole module: `VDD_IN` (Orin Nano, Orin NX, Xavier NX), `POM_5V_IN` (Nano); the AGX modules have no such rail, and the
ones that feed them are added up: `VDD_GPU_SOC`, `VDD_CPU_CV` and `VIN_SYS_5V0` (AGX Orin), `GPU`, `CPU`, `SOC`, `CV`, `VDDRQ` and `SYS5V` (AGX Xavier).
`VDDQ_VDD2_1V8AO` is fed by `VIN_SYS_5V0` and not counted twice.

Energy is power integrated over a stretch of uninterrupted use, less the idle power seen before anything ran, divided by the uses.
"""
from __future__ import annotations

import glob
import os
import re
import shutil
import statistics
import subprocess
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    Reading = tuple[float, float]
    """`time.monotonic()` and milliwatts"""

RAIL = re.compile(r"(?<![\w@])((?:VDD|VIN|POM|VDDQ|GPU|CPU|SOC|CV|SYS5V|VDDRQ)\w*) (-?\d+)(?:mW)?/(-?\d+)(?:mW)?(?:/-?\d+(?:mW)?)?(?!\d*MB)")
"""`VDD_IN 4046mW/4236mW` of JetPack 5 and 6, `POM_5V_IN 900/943` of JetPack 4: now and on average (with --readall also the peak)"""
WHOLE = ("VDD_IN", "POM_5V_IN")
FEEDING = (("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"), ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"))
INTERVAL_S = 0.1
IDLE_S = 2.0
"""seconds before anything runs whose median is the idle power"""
FEWEST = 5
"""readings in a stretch below which no energy is told"""
LABELS = "bus/i2c/drivers/ina3221*/*/hwmon/hwmon*/in*_label"


def rails(line: str) -> dict[str, float]:
    """Rail -> milliwatts now, of a line of tegrastats; nothing of a line that is none."""
    return {name: float(now) for name, now, _ in RAIL.findall(line)}


def whole(found: dict[str, float]) -> float | None:
    """Milliwatts of the whole module; None where its rails are not known."""
    for name in WHOLE:
        if name in found:
            return found[name]
    for names in FEEDING:
        if names[0] in found:
            return sum(found.get(name, 0.0) for name in names)
    return None


def sensors(sys: str = "/sys") -> dict[str, float]:
    """Rail -> milliwatts now, from INA3221 sensors: millivolts times milliamperes."""
    found = {}
    for label in sorted(glob.glob(os.path.join(sys, LABELS))):
        folder, channel = os.path.dirname(label), os.path.basename(label)[2:-len("_label")]
        try:
            name, volts, amperes = (_text(os.path.join(folder, f)) for f in (f"in{channel}_label", f"in{channel}_input", f"curr{channel}_input"))
            found[name] = float(volts) * float(amperes) / 1e3
        except (OSError, ValueError):
            continue  # a channel that nothing is connected to
    return found


def energy_mj(readings: Sequence[Reading], windows: Iterable[Sequence[float]], idle_mw: float) -> float | None:
    """Millijoules of one use above idle, from stretches [begun, ended, uses] whose energies add up to it; None where too little was read."""
    total, any_at_all = 0.0, False
    for begun, ended, uses in windows:
        if ended <= begun or uses <= 0 or sum(begun <= at <= ended for at, _ in readings) < FEWEST:
            return None
        total += (integrate(readings, begun, ended) - idle_mw * (ended - begun)) / uses
        any_at_all = True
    return total if any_at_all else None


def integrate(readings: Sequence[Reading], begun: float, ended: float) -> float:
    """Millijoules between two times: straight lines between readings, the nearest reading beyond the first and the last."""
    times = [begun, *(at for at, _ in readings if begun < at < ended), ended]
    powers = [_at(readings, at) for at in times]
    return sum((times[i + 1] - times[i]) * (powers[i] + powers[i + 1]) / 2 for i in range(len(times) - 1))


def _at(readings: Sequence[Reading], when: float) -> float:
    """Milliwatts at a time."""
    before = [r for r in readings if r[0] <= when]
    after = [r for r in readings if r[0] >= when]
    if not before or not after:
        return (before or after)[-1 if before else 0][1]
    (t0, p0), (t1, p1) = before[-1], after[0]
    return p0 if t1 == t0 else p0 + (p1 - p0) * (when - t0) / (t1 - t0)


class Meter:
    """Readings taken while it is open; `readings` grows."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.readings: list[Reading] = []
        self.idle_mw: float | None = None

    def settle(self, sleep: Callable[[float], object] = time.sleep) -> None:
        """Take the idle power: nothing may run meanwhile."""
        sleep(IDLE_S)
        if self.readings:
            self.idle_mw = statistics.median(mw for _, mw in self.readings)

    def energy(self, windows: Iterable[Sequence[float]]) -> tuple[float | None, str]:
        """Millijoules of one use, and the sentence that says how it was come by."""
        stretches = [list(w) for w in windows]
        if self.idle_mw is None or not stretches:
            return None, f"{self.source} told no power, so that no energy is known"
        found = energy_mj(self.readings, stretches, self.idle_mw)
        if found is None:
            return None, f"{self.source} told its power too seldom for an energy"
        seconds = sum(w[1] - w[0] for w in stretches)
        mean = sum(integrate(self.readings, w[0], w[1]) for w in stretches) / seconds
        return found, (f"energy is that above idle: {self.source} told {mean:.0f} mW on average over {seconds:.1f} s of use, and {self.idle_mw:.0f} mW idle "
                       "before, which is subtracted")

    def close(self) -> None:
        """Stop reading."""


class Tegrastats(Meter):
    """NVIDIA's own program, run beside the measurement."""

    def __init__(self, program: str) -> None:
        super().__init__("tegrastats")
        self._process = subprocess.Popen([program, "--interval", str(int(INTERVAL_S * 1000))], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                         stderr=subprocess.DEVNULL, text=True, errors="replace")
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            power = whole(rails(line))
            if power is not None:
                self.readings.append((time.monotonic(), power))

    def close(self) -> None:
        """End the program."""
        self._process.kill()
        self._process.wait()
        self._reader.join(5)


class Sensors(Meter):
    """The module's sensors, read by us."""

    def __init__(self, sys: str = "/sys") -> None:
        super().__init__("the INA3221 sensors")
        self._sys, self._done = sys, threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while not self._done.wait(INTERVAL_S):
            power = whole(sensors(self._sys))
            if power is not None:
                self.readings.append((time.monotonic(), power))

    def close(self) -> None:
        """Stop reading."""
        self._done.set()
        self._reader.join(5)


def meter(*, sys: str = "/sys", find: Callable[[str], str | None] = shutil.which) -> Meter | None:
    """What tells power here; None where nothing does."""
    program = find("tegrastats")
    if program:
        try:
            return Tegrastats(program)
        except OSError:
            pass  # not for this board
    return Sensors(sys) if whole(sensors(sys)) is not None else None


def _text(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as f:
        return f.read().strip()
