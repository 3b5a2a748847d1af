"""What an Android device is and how it is doing: asked by one script, read without trust. Nothing is set."""
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from edgekd.profiling.board.circumstances import SENSIBLE
from edgekd.profiling.transport._board import Script
from edgekd.profiling.transport._probe import clock_skew, free_bytes

PROPERTIES = ("ro.product.manufacturer", "ro.product.model", "ro.soc.manufacturer", "ro.soc.model", "ro.board.platform", "ro.build.version.release",
              "ro.build.version.sdk", "ro.product.cpu.abilist", "ro.product.cpu.abi")
THERMAL = ("none", "light", "moderate", "severe", "critical", "emergency", "shutdown")
"""PowerManager.THERMAL_STATUS_*; from 1 on the system slows itself down."""
ABIS = {"arm64-v8a": ("aarch64", 64), "armeabi-v7a": ("arm", 32), "armeabi": ("arm", 32), "x86_64": ("x86_64", 64), "x86": ("i386", 32), "riscv64": ("riscv", 64)}
"""Android's name of what programs are built for -> that of `uname -m`, and bits."""
CPU_SENSORS = re.compile(r"cpu|soc|big|little|mid|ap\b|tsens|cluster", re.I)

LOOK = Script(r"""
# $1 a folder on the disk that files will lie on
say() { printf '%s=%s\n' "$1" "$(printf '%s' "$2" | tr '\n' ' ')"; }
main() {
  say clock "$(date +%s)"
  for p in """ + " ".join(PROPERTIES) + r"""; do say "$p" "$(getprop $p 2>/dev/null)"; done
  say kernel "$(uname -r)"
  say arch "$(uname -m)"
  say free "$(df -Pk "$1" 2>/dev/null | tail -n 1)"
  say load "$(cut -d ' ' -f 1 /proc/loadavg 2>/dev/null)"
  say cores "$(grep -c '^processor' /proc/cpuinfo 2>/dev/null)"
  say memory_kb "$(sed -n 's/^MemTotal: *\([0-9]*\).*/\1/p' /proc/meminfo 2>/dev/null)"
  for c in /sys/devices/system/cpu/cpu[0-9]*/cpufreq; do
    [ -r "$c/scaling_governor" ] || continue
    cat "$c/scaling_governor" "$c/scaling_cur_freq" "$c/scaling_max_freq" "$c/cpuinfo_max_freq" 2>/dev/null | tr '\n' ' ' | sed 's/^/core=/'; echo
  done
  for z in /sys/class/thermal/thermal_zone*; do
    [ -r "$z/temp" ] && printf 'zone=%s %s\n' "$(cat "$z/temp" 2>/dev/null)" "$(cat "$z/type" 2>/dev/null)"
  done
  say battery "$(dumpsys battery 2>/dev/null | sed -n 's/^ *temperature: *\(-*[0-9]*\).*/\1/p')"
  say charge "$(dumpsys battery 2>/dev/null | sed -n 's/^ *level: *\([0-9]*\).*/\1/p')"
  say saver "$(settings get global low_power 2>/dev/null)"
  say thermal "$(dumpsys thermalservice 2>/dev/null | sed -n 's/^ *Thermal Status: *\([0-9]*\).*/\1/p')"
  return 0
}
""")


class Look:
    """One look at a device. What it did not say is None or empty."""

    def __init__(self, text: str) -> None:
        self._said: dict[str, str] = {}
        self._cores: list[list[str]] = []
        self._zones: list[tuple[float, str]] = []
        for line in text.splitlines():
            key, _, value = line.partition("=")
            value = re.sub(r"[^\x20-\x7e]", "?", value).strip()[:300]
            if key == "core":
                self._cores.append(value.split())
            elif key == "zone":
                number, _, kind = value.partition(" ")
                if re.fullmatch(r"-?\d+", number):
                    degrees = int(number) / (1000 if abs(int(number)) > 1000 else 1)  # some kernels say degrees, most thousandths
                    self._zones.append((degrees, kind))
            else:
                self._said[key] = value

    def number(self, key: str) -> int | None:
        """One that it said."""
        said = self._said.get(key, "").split(" ")[0]
        return int(said) if re.fullmatch(r"-?\d{1,15}", said) else None

    @property
    def abi(self) -> str:
        """What its programs are built for, the best first: `arm64-v8a`; empty where it is no Android."""
        return (self._said.get("ro.product.cpu.abilist") or self._said.get("ro.product.cpu.abi", "")).split(",")[0]

    @property
    def arch(self) -> tuple[str, int | None]:
        """The same as `uname -m` names it, with the bits of its programs."""
        return ABIS.get(self.abi, (self._said.get("arch", ""), None))

    @property
    def device(self) -> str:
        """`Google Pixel 8`."""
        return " ".join(filter(None, (self._said.get(f"ro.product.{p}", "") for p in ("manufacturer", "model")))) or "an Android device"

    @property
    def soc(self) -> str | None:
        """`Google Tensor G3`, else the name of its platform."""
        return " ".join(filter(None, (self._said.get(f"ro.soc.{p}", "") for p in ("manufacturer", "model")))) or self._said.get("ro.board.platform") or None

    @property
    def os(self) -> str:
        """`Android 14 (API 34), Linux 5.15.110`."""
        release, sdk = self._said.get("ro.build.version.release"), self._said.get("ro.build.version.sdk")
        return f"Android {release or '(version unknown)'}{f' (API {sdk})' if sdk else ''}, Linux {self._said.get('kernel', '')}".rstrip()

    @property
    def governor(self) -> str | None:
        """Of the clock; all of them where cores differ."""
        return ", ".join(sorted({c[0] for c in self._cores if c})) or None

    @property
    def clock_mhz(self) -> float | None:
        """Of the fastest core, now."""
        found = [int(c[1]) / 1e3 for c in self._cores if len(c) > 1 and c[1].isdigit()]
        return max(found) if found else None

    @property
    def temperature_c(self) -> float | None:
        """Of its hottest sensor near the processor, else of its battery."""
        sensible = [(t, kind) for t, kind in self._zones if SENSIBLE[0] < t < SENSIBLE[1]]
        near = [t for t, kind in sensible if CPU_SENSORS.search(kind)] or [t for t, _ in sensible]
        battery = self.number("battery")
        return max(near) if near else battery / 10 if battery is not None else None

    def limits(self) -> list[str]:
        """What slows it down, in words."""
        status = self.number("thermal") or 0
        found = [f"Android's thermal status is {THERMAL[min(status, len(THERMAL) - 1)]} ({status})"] if status > 0 else []
        capped = [(int(c[2]) / 1e3, int(c[3]) / 1e3) for c in self._cores if len(c) > 3 and c[2].isdigit() and c[3].isdigit() and int(c[2]) < int(c[3])]
        if capped:
            now, most = max(capped, key=lambda c: c[1])
            found.append(f"{len(capped)} cores are limited, the fastest of them to {now:.0f} of {most:.0f} MHz")
        return found + (["battery saver is on"] if self.number("saver") == 1 else [])

    def told(self, clock: tuple[float, float]) -> dict[str, object]:
        """As `Transport.probe` gives it. `clock`: seconds since the epoch here, before and after it was asked."""
        found: dict[str, object] = {"device": self.device, "os": self.os, "arch": self.arch[0], "abi": self.abi, "python": None, "versions": {}}
        for key, value in (("soc", self.soc), ("cores", self.number("cores")), ("free_bytes", free_bytes(self._said.get("free", ""))),
                           ("battery_percent", self.number("charge")), ("temperature_c", self.temperature_c), ("governor", self.governor)):
            if value is not None:
                found[key] = value
        if (memory := self.number("memory_kb")) is not None:
            found["memory_bytes"] = memory * 1024
        if (now := self.number("clock")) is not None:
            found["clock_skew_s"] = clock_skew(now, clock)
        return found

    @property
    def load(self) -> float | None:
        """Average over a minute."""
        try:
            return float(self._said.get("load", ""))
        except ValueError:
            return None


def circumstances(before: Look, after: Look, seen: Sequence[str], job: Mapping[str, Any], versions: Mapping[str, str]) -> dict[str, Any]:
    """The fields of `edgekd.measurement.Circumstances`. `seen`: limits noticed in between."""
    pair = [(a, b) for a, b in ((before.clock_mhz, after.clock_mhz), (before.temperature_c, after.temperature_c))]
    clock, heat = ([round(a, 1), round(b, 1)] if a is not None and b is not None else None for a, b in pair)
    return {"device": f"{before.device}{f' ({before.soc})' if before.soc else ''}", "cpu_flags": [], "os": before.os, "python": "none: an Android device",
            "versions": dict(versions), "threads": job.get("threads"), "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "load_average": before.load, "warmup": job.get("warmup"), "repeats": job.get("repeats"), "soc": before.soc, "governor": before.governor,
            "clock_mhz": clock, "power_mode": None, "temperature_c": heat, "throttled": list(dict.fromkeys([*before.limits(), *seen, *after.limits()]))}
