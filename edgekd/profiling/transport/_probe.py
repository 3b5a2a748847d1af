"""What a board is and offers, asked by one script of POSIX sh and read without trust: a board's answer is text like any other."""
from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from typing import Any

from edgekd.errors import EdgekdError

RUNTIMES = ("onnxruntime", "openvino", "ai_edge_litert", "tflite_runtime", "ncnn", "executorch", "tensorrt", "numpy")
OLDEST = (3, 8)
"""Python that the runner needs."""
SKEW_S = 60
"""Difference of clocks worth a note."""

LOOK = r"""
import json, sys
from importlib import util
try:
    from importlib import metadata
except ImportError:
    metadata = None
found = {}
for name in sys.argv[1:]:
    try:
        if util.find_spec(name) is None:
            continue
    except Exception:
        continue
    version = ""
    for package in (name, name.replace("_", "-"), name + "-gpu"):
        try:
            version = version or metadata.version(package)
        except Exception:
            pass
    found[name] = version
print(json.dumps({"executable": sys.executable, "version": list(sys.version_info[:3]), "modules": found}))
"""
"""What a Python has, without importing it: that takes seconds, and `TRY` does it for the one that is chosen."""

TRY = r"""
import importlib, json, sys
missing = {}
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except BaseException as e:
        missing[name] = "%s: %s" % (type(e).__name__, str(e).split("\n")[0][:160])
print("\nedgekd:" + json.dumps({"executable": sys.executable, "version": list(sys.version_info[:3]), "missing": missing}))
"""

PYTHONS = r"""
pythons() {  # $1 the one that the target names, or nothing; $2 this machine's own, should it be there as well
  if [ -n "$1" ]; then
    case $1 in '~/'*) c=$HOME/${1#??} ;; *) c=$1 ;; esac
    p=$(command -v -- "$c" 2>/dev/null) && [ -x "$p" ] && printf '%s\n' "$p"
    return
  fi
  for c in python3 python "$2" "$HOME/.venv/bin/python" "$HOME/venv/bin/python" /opt/*/bin/python3; do
    p=$(command -v -- "$c" 2>/dev/null) && [ -x "$p" ] && printf '%s\n' "$p"
  done
}
"""
LIST = PYTHONS + 'pythons "$1" "$2"\n'

ASK = PYTHONS + r"""
say() { printf '%s=%s\n' "$1" "$(printf '%s' "$2" | tr -d '\000' | tr '\n' ' ')"; }
say clock "$(date +%s)"
say os "$(uname -sr)"
say arch "$(uname -m)"
say bits "$(getconf LONG_BIT 2>/dev/null)"
say distribution "$( [ -r /etc/os-release ] && . /etc/os-release && echo "$PRETTY_NAME")"
say model "$(tr -d '\000' < /proc/device-tree/model 2>/dev/null)"
say cpu "$(sed -n 's/^model name[^:]*: *//p; s/^Hardware[^:]*: *//p; s/^Model[^:]*: *//p; s/^uarch[^:]*: *//p' /proc/cpuinfo 2>/dev/null | head -n 1)"
say cores "$(getconf _NPROCESSORS_ONLN 2>/dev/null || grep -c '^processor' /proc/cpuinfo 2>/dev/null)"
say memory_kb "$(sed -n 's/^MemTotal: *\([0-9]*\).*/\1/p' /proc/meminfo 2>/dev/null)"
say free "$(df -Pk . 2>/dev/null | tail -n 1)"
look=$3 named=$1 ours=$2; shift 3
pythons "$named" "$ours" | while IFS= read -r p; do
  answer=$("$p" -c "$look" "$@" </dev/null 2>/dev/null | tail -n 1)
  printf 'found=%s\n%s\n' "$p" "$answer"
done
"""


def ask(python: str | None) -> list[str]:
    """The command that prints what `read` reads; run in a folder on the disk that files will lie on."""
    return ["sh", "-c", ASK, "edgekd", python or "", sys.executable, LOOK, *RUNTIMES]


def read(text: str, host_clock: tuple[float, float]) -> dict[str, object]:
    """The board's answer as `Transport.probe` gives it. What it does not say is left out.

    Args:
        host_clock: seconds since the epoch here, before and after the board looked at its own clock.
    """
    said, pythons = _lines(text)
    found: dict[str, object] = {}
    for key, value in (("device", said.get("model") or said.get("cpu")), ("soc", said.get("cpu") or said.get("model")), ("arch", said.get("arch")),
                       ("os", " ".join(filter(None, (said.get("distribution"), said.get("os")))))):
        if value:
            found[key] = re.sub(r"[^\x20-\x7e]", "?", value)
    for key, name, unit in (("bits", "bits", 1), ("cores", "cores", 1), ("memory_bytes", "memory_kb", 1024)):
        if said.get(name, "").isdigit():
            found[key] = int(said[name]) * unit
    free = free_bytes(said.get("free", ""))
    if free is not None:
        found["free_bytes"] = free
    notes = []
    if said.get("clock", "").isdigit():
        skew = clock_skew(int(said["clock"]), host_clock)
        found["clock_skew_s"] = skew
        if abs(skew) > SKEW_S:
            notes.append(f"the board's clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} this machine's; times are taken from this machine")
    if found.get("bits") == 32 and str(found.get("arch")) in ("aarch64", "x86_64"):
        notes.append(f"a 64-bit kernel ({found['arch']}) with a 32-bit system: programs and wheels have to be 32-bit ones")
    chosen = next((p for p in pythons if set(p["modules"]) - {"numpy"}), pythons[0] if pythons else None)
    if chosen:
        found |= {"python": ".".join(map(str, chosen["version"])), "python_path": chosen["path"], "versions": chosen["modules"]}
    return found | {"pythons": pythons, "notes": notes}


def _lines(text: str) -> tuple[dict[str, str], list[dict[str, Any]]]:
    said: dict[str, str] = {}
    pythons: list[dict[str, Any]] = []
    lines = iter(text.splitlines())
    for line in lines:
        key, _, value = line.partition("=")
        if key != "found":
            said[key] = value.strip()
            continue
        try:
            answer = json.loads(next(lines, ""))
            one = {"path": value, "version": [int(n) for n in answer["version"]], "modules": {str(k): str(v) for k, v in answer["modules"].items()}}
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # not a Python that answers
        if value not in [p["path"] for p in pythons]:
            pythons.append(one)
    return said, pythons


def clock_skew(board: int, host: tuple[float, float]) -> float:
    """Seconds that the board's clock is ahead of the host's, 0.0 when the difference is less than its whole seconds and the way there can tell."""
    before, after = host
    if before - 1 <= board <= after:
        return 0.0
    return round(board - before if board < before else board - after, 1)


def free_bytes(line: str) -> int | None:
    """Free bytes that the last line of `df -Pk` tells."""
    match = re.search(r"\s(\d+)\s+(\d+)\s+(-?\d+)\s+\d+%", line)
    return max(0, int(match.group(3)) * 1024) if match else None


def tried(text: str) -> tuple[str | None, str]:
    """(path, "") of a Python that answered `TRY` and lacks nothing, else (None, why not)."""
    try:
        answer = json.loads(text.rpartition("\nedgekd:")[2])
        missing, version, path = dict(answer["missing"]), tuple(answer["version"]), str(answer["executable"])
    except (ValueError, KeyError, TypeError):
        return None, "it does not answer"
    if version < OLDEST:
        return None, f"it is {'.'.join(map(str, version))}, and the runner needs {'.'.join(map(str, OLDEST))}"
    if missing:
        return None, "; ".join(f"no {name} ({why})" if "ModuleNotFoundError" not in why else f"no {name}" for name, why in missing.items())
    return path, ""


def nothing(needs: Sequence[str], reasons: dict[str, str], named: str | None, where: str) -> EdgekdError:
    """The error for a board without a Python that imports what is needed."""
    what = " and ".join(needs) or "the standard library"
    if named and not reasons:
        return EdgekdError(f"the Python that was named for the board is not there: {named}", where=where, hint="look at --board-python, or `python` of the target's device")
    said = "; ".join(f"{path}: {why}" for path, why in reasons.items()) or "there is no python3 or python"
    return EdgekdError(f"no Python on the board imports {what}", where=f"{where}; {said}",
                       hint=f"edgekd installs nothing there. On the board: `python3 -m venv ~/venv && ~/venv/bin/pip install {' '.join(n.replace('_', '-') for n in needs)}`, "
                            "or name the Python that has it with --board-python")
