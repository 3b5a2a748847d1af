"""Under what something is measured: the board, its clock, its heat, and whether it slowed itself down. Files of the kernel are read, nothing is set.

`Watch` looks before, again and again while a model is under load, and after. Throttling is told in words, by what is seen of it:

    counters   the CPU's own (x86 `thermal_throttle`), a Jetson's over-current events
    limits     a cooling device of the kernel that limits the clock; bits of a Raspberry Pi's firmware (`vcgencmd get_throttled`)
    the clock  under load, the fastest core runs `DROP` below the fastest it was seen to run under load
"""
from __future__ import annotations

import glob
import os
import platform
import re
import shutil
import subprocess
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

DROP = 0.85
"""share of the fastest clock seen under load below which it has dropped; turbo clocks move by less"""
TELLING_FLAGS = ("avx", "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "amx_tile",
                 "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve")
"""instruction sets that decide which kernels a runtime picks"""
PI_NOW = {0: "under-voltage", 1: "its clock is capped", 2: "throttled", 3: "at its soft limit of temperature"}
PI_SINCE_BOOT = 16
"""bits from here on say the same of the time since it was started"""
SENSIBLE = (-20.0, 150.0)
"""Degrees Celsius: sensors that are switched off tell -256 or such"""


class Board:
    """What is read of a board, from below `root` (another one in tests), and by programs that `run` answers for."""

    def __init__(self, root: str = "/", run: Callable[[Sequence[str]], str | None] | None = None) -> None:
        self._root, self._run = root, run or output

    def text(self, path: str) -> str | None:
        """A file below the root without blanks and NULs around; None where it cannot be read."""
        try:
            with open(os.path.join(self._root, path), encoding="utf-8", errors="replace") as f:
                return f.read().strip().strip("\0").strip()
        except OSError:
            return None

    def all(self, pattern: str) -> dict[str, str]:
        """path below the root -> contents, of everything that fits and can be read."""
        found = {os.path.relpath(p, self._root): "" for p in sorted(glob.glob(os.path.join(glob.escape(self._root), pattern)))}
        told = {path: self.text(path) for path in found}
        return {path: text for path, text in told.items() if text is not None}

    def numbers(self, pattern: str) -> dict[str, float]:
        """The same of files that hold one number."""
        found = {}
        for path, text in self.all(pattern).items():
            try:
                found[path] = float(text)
            except ValueError:
                continue
        return found

    def cpu(self) -> tuple[str, list[str]]:
        """The processor's name with its core count, and its telling instruction sets."""
        name, flags, cores = platform.processor() or platform.machine(), set(), 0
        for line in (self.text("proc/cpuinfo") or "").splitlines():
            key, _, value = (part.strip() for part in line.partition(":"))
            cores += key == "processor"
            if key in ("model name", "Model"):
                name = value
            elif key in ("flags", "Features"):
                flags = set(value.split())
        return f"{name} ({cores or os.cpu_count()} cores)", [f for f in TELLING_FLAGS if f in flags]

    def soc(self) -> str | None:
        """The board and its chip: `NVIDIA Jetson Orin Nano Developer Kit (nvidia,tegra234)`."""
        model = self.text("proc/device-tree/model") or self.text("sys/firmware/devicetree/base/model")
        compatible = (self.text("proc/device-tree/compatible") or self.text("sys/firmware/devicetree/base/compatible") or "").split("\0")
        chip = self.text("sys/devices/soc0/soc_id") or self.text("sys/devices/soc0/machine")
        last = compatible[-1] if compatible[-1] else chip
        return f"{model} ({last})" if model and last and last != model else model or last or None

    def system(self) -> str:
        """Distribution, kernel and architecture."""
        named = re.search(r'^PRETTY_NAME="?([^"\n]+)"?', self.text("etc/os-release") or "", re.MULTILINE)
        kernel = f"{platform.system()} {platform.release()} {platform.machine()}"
        return f"{named.group(1)}, {kernel}" if named else kernel

    def governor(self) -> str | None:
        """Of the clock; all of them where cores differ."""
        found = sorted(set(self.all("sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor").values()))
        return ", ".join(found) or None

    def clock_mhz(self) -> float | None:
        """Of the fastest core, now."""
        found = self.numbers("sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq")
        if found:
            return max(found.values()) / 1e3
        told = re.findall(r"^cpu MHz\s*:\s*([\d.]+)", self.text("proc/cpuinfo") or "", re.MULTILINE)
        return max(map(float, told)) if told else None

    def temperature_c(self) -> float | None:
        """Of the hottest sensor, now."""
        found = [n / 1e3 for n in self.numbers("sys/class/thermal/thermal_zone*/temp").values()]
        found += [n / 1e3 for n in self.numbers("sys/class/hwmon/hwmon*/temp*_input").values()]
        sensible = [n for n in found if SENSIBLE[0] < n < SENSIBLE[1]]
        return max(sensible) if sensible else None

    def power_mode(self) -> str | None:
        """Of a Jetson."""
        told = re.search(r"NV Power Mode:\s*(\S+)", self._run(["nvpmodel", "-q"]) or "")
        return told.group(1) if told else None

    def counters(self) -> dict[str, float]:
        """What counts throttling since the board was started."""
        return {**self.numbers("sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/*_throttle_count"), **self.numbers("sys/class/hwmon/hwmon*/oc*_event_cnt")}

    def limits(self) -> set[str]:
        """What limits the clock now, in words."""
        found = set()
        for path, state in self.numbers("sys/class/thermal/cooling_device*/cur_state").items():
            folder = os.path.dirname(path)
            kind, most = self.text(f"{folder}/type") or "", self.text(f"{folder}/max_state")
            if state > 0 and re.search(r"cpufreq|devfreq|gpufreq|^Processor$|throttle-alert|balanced", kind):
                found.add(f"{kind} limits the clock ({state:.0f} of {most})")
        bits = self.pi_bits()
        return found | {f"the Raspberry Pi is {words}" if bit != 1 else f"the Raspberry Pi says that {words}" for bit, words in PI_NOW.items() if bits >> bit & 1}

    def pi_bits(self) -> int:
        """What a Raspberry Pi's firmware says; 0 elsewhere."""
        told = re.search(r"throttled=0x([0-9a-fA-F]+)", self._run(["vcgencmd", "get_throttled"]) or "")
        return int(told.group(1), 16) if told else 0


class Watch:
    """See the module. `look` is called while a model is measured."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self._before: dict[str, Any] = self.state()
        self._loaded: list[float] = []
        self._seen: set[str] = set()

    def state(self) -> dict[str, Any]:
        """What changes while the board works, as it is now: kept in the partial results, so that a job that goes on knows how it began."""
        return {"clock_mhz": self.board.clock_mhz(), "temperature_c": self.board.temperature_c(), "counters": self.board.counters(),
                "pi_bits": self.board.pi_bits(), "load_average": round(os.getloadavg()[0], 2)}

    def resume(self, before: dict[str, Any]) -> None:
        """It began earlier, like this."""
        self._before = before

    def look(self, *, load: bool) -> None:
        """Look at the clock and what limits it. `load`: a model is being timed, so that the clock ought to be at its highest."""
        clock = self.board.clock_mhz() if load else None
        if clock:
            self._loaded.append(clock)
        self._seen |= self.board.limits() if load else set()

    def throttled(self) -> list[str]:
        """What slowed the board down, in words."""
        found = sorted(self._seen | self.board.limits())
        if self._loaded and min(self._loaded) < DROP * max(self._loaded):
            found.append(f"the clock fell from {max(self._loaded):.0f} to {min(self._loaded):.0f} MHz under load")
        before = self._before.get("counters", {})
        grown = {path: n - before.get(path, 0) for path, n in self.board.counters().items() if n > before.get(path, 0)}
        for words, part in (("the CPU counted {:.0f} times that it throttled itself for heat", "_throttle_count"), ("{:.0f} over-current events", "_event_cnt")):
            most = max((n for path, n in grown.items() if path.endswith(part)), default=0)
            found += [words.format(most)] if most else []
        new = self.board.pi_bits() & ~int(self._before.get("pi_bits", 0))
        return found + [f"since it began, the Raspberry Pi was once {words}" for bit, words in PI_NOW.items() if new >> (bit + PI_SINCE_BOOT) & 1]

    def told(self, *, threads: int | None, warmup: int, repeats: int, versions: dict[str, str]) -> dict[str, Any]:
        """The fields of `edgekd.measurement.Circumstances`."""
        name, flags = self.board.cpu()
        now = self.state()
        return {"device": name, "cpu_flags": flags, "os": self.board.system(), "python": platform.python_version(), "versions": versions, "threads": threads,
                "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "load_average": self._before.get("load_average"),
                "warmup": warmup, "repeats": repeats, "soc": self.board.soc(), "governor": self.board.governor(),
                "clock_mhz": _pair(self._before.get("clock_mhz"), now["clock_mhz"]), "power_mode": self.board.power_mode(),
                "temperature_c": _pair(self._before.get("temperature_c"), now["temperature_c"]), "throttled": self.throttled()}


def output(command: Sequence[str]) -> str | None:
    """What a program prints; None where it is not here or fails."""
    program = shutil.which(command[0])
    if program is None:
        return None
    try:
        done = subprocess.run([program, *command[1:]], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None


def _pair(before: float | None, after: float | None) -> list[float] | None:
    return [round(before, 1), round(after, 1)] if before is not None and after is not None else None
