"""What works on this machine, and the exact command that mends what does not. Changes nothing unless told to `install`, and loads no toolchain it
need not."""
from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edgekd import console, plugins
from edgekd.errors import EdgekdError, UsageError
from edgekd.export import _envs
from edgekd.measurement import PACKAGES, cpu, installed

GB = 1e9
LITTLE_DISK, LITTLE_MEMORY = 5 * GB, 4 * GB
TRANSPORTS = ("local", "ssh", "adb", "browser")
DEVICES = 'pip install "edgekd[devices]"'


def examine(folder: Path = Path()) -> dict[str, Any]:
    """Everything `edgekd doctor` shows, as one JSON document; `folder` is where runs would be written."""
    device, flags = cpu()
    return {
        "edgekd": installed(("edgekd",)).get("edgekd", "not installed"),
        "python": {"version": platform.python_version(), "executable": sys.executable, "ok": sys.version_info >= (3, 10)},
        "os": platform.platform(terse=True),
        "cpu": {"name": device, "cores": os.cpu_count(), "flags": flags, "hints": hints(flags)},
        "memory": memory(),
        "disk": disk(folder),
        "packages": installed(PACKAGES),
        "formats": formats(),
        "environments": _envs.states(),
        "transports": transports(),
        "plugins": [{"name": b.name, "origin": b.origin, "reason": b.reason} for b in plugins.broken()],
    }


def install(name: str) -> Path:
    """Make the Python environment of a toolchain that cannot share this one (its interpreter is returned), or, of the name `browser`, bring
    onnxruntime-web (its folder). What is being done is logged.

    Raises:
        UsageError: no environment of that name.
        EdgekdError: no fitting Python or no npm, too little disk, or a step fails; nothing is left behind.
    """
    from edgekd.teachers.huggingface import forbidden  # loads torch

    if forbidden():
        raise UsageError("nothing is installed offline", hint="leave --offline away")
    if name == "browser":
        from edgekd.profiling.transport import _ort_web

        return _ort_web.install(console.log)
    return _envs.install(name, console.log)


def formats() -> list[dict[str, Any]]:
    """Every format: whether it can be written and run here, and what mends it when not."""
    rows = []
    for name, exporter in plugins.exporters().items():
        try:
            found = exporter.availability()
        except Exception as e:  # a toolchain that dies while being looked at is unavailable, not fatal
            rows.append({"name": name, "ok": False, "runs": False, "version": None, "reason": f"{type(e).__name__}: {e}", "fix": _install(exporter.extra),
                         "schemes": list(exporter.schemes)})
            continue
        fix = found.fix or (None if found.ok else _install(exporter.extra))
        rows.append({"name": name, "ok": found.ok, "runs": found.runs, "version": found.version, "reason": found.reason, "fix": fix, "schemes": list(exporter.schemes)})
    return rows


def _install(extra: str | None) -> str:
    return f'pip install "edgekd[{extra}]"' if extra else "pip install --force-reinstall edgekd"


def hints(flags: list[str]) -> list[str]:
    """What the CPU's instruction sets mean for precisions."""
    said = []
    if "amx_bf16" in flags or "avx512_bf16" in flags or "bf16" in flags:
        said.append("bf16 runs in hardware, and may well beat int8")
    if not {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"} & set(flags):
        said.append("no integer dot product instructions: int8 will hardly be faster than fp32")
    return said


def memory() -> dict[str, Any]:
    """Total and free memory in bytes."""
    try:
        import psutil
    except ImportError as e:
        raise EdgekdError("the package psutil is missing", hint="pip install psutil") from e
    found = psutil.virtual_memory()
    return {"total_bytes": found.total, "available_bytes": found.available, "ok": found.available >= LITTLE_MEMORY}


def disk(folder: Path) -> dict[str, Any]:
    """Free space where runs would be written, in bytes."""
    usage = shutil.disk_usage(folder)
    return {"folder": str(Path(folder).resolve()), "free_bytes": usage.free, "ok": usage.free >= LITTLE_DISK}


def transports() -> list[dict[str, Any]]:
    """The ways to a device: whether each can be gone from here, by which program, and what mends it where not."""
    found = {"local": {"ok": True, "tool": None, "note": "this machine", "fix": None}, "ssh": _ssh(), "adb": _adb(), "browser": _browser()}
    return [{"name": name, **found[name]} for name in TRANSPORTS]


def _ssh() -> dict[str, Any]:
    version = installed(("paramiko",)).get("paramiko")
    note = f"paramiko {version}: --device ssh://user@host" if version else "the package paramiko is missing"
    return {"ok": version is not None, "tool": None, "note": note, "fix": None if version else DEVICES}


def _adb() -> dict[str, Any]:
    version = installed(("adbutils",)).get("adbutils")
    spec = find_spec("adbutils") if version else None
    own = next((str(p) for folder in (spec.submodule_search_locations or [] if spec else []) if (p := Path(folder) / "binaries/adb").is_file()), None)
    tool = shutil.which("adb") or own
    ok = version is not None and tool is not None
    note = f"adbutils {version}: --device adb://SERIAL" if ok else "the package adbutils is missing" if version is None else "adbutils has no adb program for this machine"
    return {"ok": ok, "tool": tool, "note": note, "fix": None if ok else DEVICES if version is None else "apt-get install adb"}


def _browser() -> dict[str, Any]:
    from edgekd.profiling.transport import _chromium, _ort_web

    tool: str | None = None
    try:
        tool = _chromium.find()
        if (ort := _ort_web.find()) is None:
            return {"ok": False, "tool": tool, "note": f"onnxruntime-web {_ort_web.version()} is missing", "fix": _ort_web.INSTALL}
    except EdgekdError as e:
        return {"ok": False, "tool": tool, "note": e.what, "fix": e.hint}
    return {"ok": True, "tool": tool, "note": f"onnxruntime-web {_ort_web.version()} in {ort.parent}", "fix": None}
