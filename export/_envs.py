"""Python environments of their own, for toolchains that pin other versions of torch than this one has: made on request, called by subprocess.

    edgekd doctor --install rknn     -> $EDGEKD_HOME/envs/rknn (by default ~/.cache/edgekd/envs/rknn)

An environment is built in a folder beside and gets its name only after what it is for could be imported: there is none that half works. Python
environments do not like to be moved: what is called in one is `bin/python`, never a script of a package, which would name the old folder.
"""
from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekd.errors import EdgekdError, UsageError, first_line, unknown

GB = 1e9
WHILE_BUILT = 1.6
"""Disk needed while it is made, as a multiple of what stays: downloads lie beside what is unpacked from them."""
LINES = 3
"""Of what pip said last, how many are told."""
MADE = "edgekd.json"
"""The file that says what an environment was made of; written last."""
SCRATCH = "tmp"
MINUTES_TO_PROBE = 5.0

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Environment:
    """What is installed into an environment.

    Args:
        what: what it is for, in a clause.
        packages: pip requirements, with their versions.
        probe: Python code that fails unless the environment works.
        pythons: first and last (major, minor) that the packages exist for.
        machines: `platform.machine()` of those, on Linux; empty: any.
        disk: bytes it takes, as measured.
        minutes: after how long its installation is stopped.
    """

    what: str
    packages: tuple[str, ...]
    probe: str
    pythons: tuple[tuple[int, int], tuple[int, int]]
    machines: tuple[str, ...] = ()
    disk: float = 0.0
    minutes: float = 60.0


ENVIRONMENTS: Mapping[str, Environment] = {
    "rknn": Environment("files for Rockchip NPUs, and their simulator", ("rknn-toolkit2==2.5.0",), "from rknn.api import RKNN",
                        pythons=((3, 8), (3, 12)), machines=("x86_64",), disk=5.7 * GB),
    "modelopt": Environment("int8 for TensorRT by NVIDIA's Model Optimizer", ("nvidia-modelopt[onnx]==0.47.0", "torch==2.13.0"),
                            "from modelopt.onnx.quantization import quantize", pythons=((3, 10), (3, 13)), machines=("x86_64",), disk=2.1 * GB),
}


def home() -> Path:
    """The folder of all environments."""
    given = os.environ.get("EDGEKD_HOME")
    return (Path(given) if given else Path.home() / ".cache" / "edgekd") / "envs"


def python_of(name: str) -> Path | None:
    """The interpreter of an environment that was installed whole from today's list of packages, or None."""
    python = _python(home() / name)
    return python if python.exists() and _made(name).get("packages") == list(known(name).packages) else None


def known(name: str) -> Environment:
    """Raises UsageError with the nearest name when there is no such environment."""
    if name not in ENVIRONMENTS:
        raise unknown("environment", name, ENVIRONMENTS)
    return ENVIRONMENTS[name]


def states() -> list[dict[str, Any]]:
    """Every environment: whether it is there, and the command that makes it."""
    rows = []
    for name, spec in ENVIRONMENTS.items():
        python, size = python_of(name), f"{spec.disk / GB:.1f} GB"
        reason = None if python else "made for other versions" if _made(name) else f"not installed; {size} on the disk"
        rows.append({"name": name, "what": spec.what, "ok": python is not None, "packages": list(spec.packages), "python": str(python) if python else None,
                     "reason": reason, "fix": None if python else command(name)})
    return rows


def command(name: str) -> str:
    """The command line that installs an environment."""
    return f"edgekd doctor --install {name}"


def install(name: str, progress: Progress | None = None) -> Path:
    """Make an environment, unless it is there; its interpreter.

    Args:
        progress: is told what is being done, line by line.

    Raises:
        UsageError: no environment of that name.
        EdgekdError: no fitting Python, not enough disk, or a step fails (with pip's last words); nothing is left behind.
    """
    spec, say = known(name), progress or (lambda line: None)
    folder = home() / name
    if (there := python_of(name)) is not None:
        return there
    base = _interpreter(name, spec)
    _writable(folder.parent)
    _room(folder.parent, name, spec)
    with _alone(folder):
        for stale in folder.parent.glob(f".{name}.*.part"):  # of an installation that was killed
            shutil.rmtree(stale, ignore_errors=True)
        temp = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".part", dir=folder.parent))
        try:
            _build(base, temp, name, spec, say)
            shutil.rmtree(folder, ignore_errors=True)  # one that was made for other versions
            os.chmod(temp, 0o755)
            os.replace(temp, folder)
        finally:
            shutil.rmtree(temp, ignore_errors=True)
    return _python(folder)


def _build(base: str, temp: Path, name: str, spec: Environment, say: Progress) -> None:
    """Make the environment in `temp`, try it, and say in it what it is made of."""
    begun = time.monotonic()
    say(f"making a Python environment in {temp.parent}")
    _run([base, "-m", "venv", *([] if spec.packages else ["--without-pip"]), str(temp)], temp, name, spec.minutes, say,
         hint="the module venv is missing; on Debian: apt-get install python3-venv")
    if spec.packages:
        options = ["--no-cache-dir", "--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
        _run([str(_python(temp)), "-m", "pip", "install", *options, *spec.packages], temp, name, spec.minutes, say,
             hint=f"look at the network and the package index, then again: {command(name)}")
    say("trying it")
    _run([str(_python(temp)), "-c", spec.probe], temp, name, MINUTES_TO_PROBE, say,
         hint="its packages were installed and do not work here; the line above names what is missing")
    shutil.rmtree(temp / SCRATCH, ignore_errors=True)
    about = {"packages": list(spec.packages), "base": base, "seconds": round(time.monotonic() - begun)}
    (temp / MADE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _run(command_line: Sequence[str], temp: Path, name: str, minutes: float, say: Progress, *, hint: str) -> None:
    """Run a step; its lines go to `say`, its last ones into the error. Nothing of it outlives this call."""
    scratch = temp / SCRATCH  # downloads lie where there is room, and vanish with the folder
    scratch.mkdir(exist_ok=True)
    said, deadline = scratch / "said.txt", time.monotonic() + minutes * 60
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")} | {"TMPDIR": str(scratch)}
    with said.open("w+b") as output:
        child = subprocess.Popen(command_line, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=clean)
        told = 0
        try:
            while child.poll() is None and time.monotonic() < deadline:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(0.5)
                told = _tell(said, told, say)
            stopped = child.poll() is None
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            code = child.wait()
    lines = [line.strip() for line in said.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    last = " / ".join(lines[-LINES:])[:500] or "it said nothing"
    if stopped:
        raise EdgekdError(f"the environment '{name}' could not be made: stopped after {minutes:g} minutes: {last}", hint=hint)
    if code:
        raise EdgekdError(f"the environment '{name}' could not be made: {last}", hint=hint)


def _tell(said: Path, start: int, say: Progress) -> int:
    """Pass on whole lines from `start`; where the next begins."""
    new = said.read_bytes()[start:]
    whole = new[: new.rfind(b"\n") + 1]
    for line in whole.decode("utf-8", errors="replace").splitlines():
        if line.strip():
            say(line.strip()[:200])
    return start + len(whole)


def _interpreter(name: str, spec: Environment) -> str:
    """A Python that the packages exist for: this one, or another that is installed."""
    if spec.machines and (sys.platform != "linux" or platform.machine() not in spec.machines):
        raise EdgekdError(f"the environment '{name}' exists for Linux on {', '.join(spec.machines)} only, and this is {sys.platform} on {platform.machine()}",
                          hint="export on such a machine, or use another format")
    first, last = spec.pythons
    if first <= sys.version_info[:2] <= last:
        return getattr(sys, "_base_executable", sys.executable)
    for minor in range(last[1], first[1] - 1, -1):
        if found := shutil.which(f"python{last[0]}.{minor}"):
            return found
    raise EdgekdError(f"the environment '{name}' needs Python {first[0]}.{first[1]} to {last[0]}.{last[1]}, and this is {platform.python_version()}",
                      hint=f"install python{last[0]}.{last[1]} beside it")


def _writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise UsageError(f"the folder of environments cannot be written: {e.strerror or first_line(e)}", where=folder,
                         hint="set EDGEKD_HOME to another folder") from e


def _room(folder: Path, name: str, spec: Environment) -> None:
    free, needed = shutil.disk_usage(folder).free, spec.disk * WHILE_BUILT
    if free < needed:
        raise EdgekdError(f"the environment '{name}' takes {spec.disk / GB:.1f} GB, and {needed / GB:.1f} GB while it is made; {free / GB:.1f} GB are free",
                          where=folder, hint="make room, or set EDGEKD_HOME to a folder on another disk")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One installation of a name at a time; the kernel drops the lock with the process."""
    with open(folder.with_name(f".{folder.name}.lock"), "w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise EdgekdError(f"the environment '{folder.name}' is being installed by another process", where=folder, hint="wait for it") from e
        yield


def _made(name: str) -> dict[str, Any]:
    """What an environment was made of; empty when it is not there or not whole."""
    try:
        return dict(json.loads((home() / name / MADE).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"
