"""A headless Chromium of our own: found, started with a throw-away profile on one address, and killed with all its children."""
from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from edgekd.errors import EdgekdError

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless=new", "--no-first-run", "--no-default-browser-check", "--mute-audio", "--hide-scrollbars", "--password-store=basic", "--use-mock-keychain",
    # nothing of its own accord: neither network nor work beside the page's
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions", "--disable-default-apps", "--no-pings",
    "--disable-domain-reliability", "--disable-breakpad", "--disable-crash-reporter", "--disable-features=OptimizationHints,MediaRouter,Translate",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    # a page that nobody sees is slowed down otherwise
    "--disable-background-timer-throttling", "--disable-renderer-backgrounding", "--disable-backgrounding-occluded-windows",
    # its memory is measured when asked, not with the next garbage collection
    "--enable-blink-features=ForceEagerMeasureMemory",
    "--enable-logging=stderr", "--v=0")
LITTLE_SHM = 256 << 20
"""Bytes of /dev/shm below which large tensors crash the page (containers have 64 MiB)."""
NOISE = re.compile(r"dbus|object_proxy|vaapi|gpu_process|viz_main|idle_linux|unexpected operator|DEPRECATED_ENDPOINT|gcm|Vulkan|libva|libEGL|gl_|angle", re.I)
CONSOLE = re.compile(r"^\[[^\]]*:CONSOLE[^\]]*\]\s*")
LINES = 8
"""Of what it said last, how many are told."""


def find(given: str | None = None) -> str:
    """The program: the one that is named here or by EDGEKD_CHROME, else the first of `NAMES`.

    Raises:
        EdgekdError: there is none.
    """
    named = given or os.environ.get("EDGEKD_CHROME")
    for name in (named,) if named else NAMES:
        if found := shutil.which(name):
            return found
    raise EdgekdError(f"there is no browser at '{named}'" if named else "no Chromium was found, which models are measured in",
                      hint="apt-get install chromium, or name another with EDGEKD_CHROME=/path/to/chrome")


def version(program: str) -> str:
    """What it says of itself: `156.0.8078.79`; "unknown" where it says nothing."""
    try:
        said = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL).stdout
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    found = re.search(r"\d+(\.\d+)+", said)
    return found.group() if found else "unknown"


class Chromium:
    """One that runs. `unguarded` says why its sandbox is off, where it is."""

    def __init__(self, program: str, address: str, extra: Sequence[str] = ()) -> None:
        self._home = Path(tempfile.mkdtemp(prefix="edgekd-chromium-"))
        self._said = open(self._home / "said.txt", "w+b")  # noqa: SIM115  closed with the browser
        flags = [*FLAGS, *extra]
        self.unguarded: str | None = None
        if hasattr(os, "geteuid") and os.geteuid() == 0:  # it refuses to start as root otherwise
            self.unguarded = "Chromium ran without its sandbox: it has none for root"
            flags.append("--no-sandbox")
        if _shared_memory() < LITTLE_SHM:
            flags.append("--disable-dev-shm-usage")
        environment = {**os.environ, "HOME": str(self._home), "XDG_CONFIG_HOME": str(self._home), "XDG_CACHE_HOME": str(self._home)}
        try:
            self._process = subprocess.Popen([program, *flags, f"--user-data-dir={self._home / 'profile'}", address], stdin=subprocess.DEVNULL,
                                             stdout=self._said, stderr=subprocess.STDOUT, start_new_session=True, env=environment)
        except OSError as e:
            self._said.close()
            shutil.rmtree(self._home, ignore_errors=True)
            raise EdgekdError(f"the browser cannot be started: {e.strerror or e}", where=program, hint="apt-get install chromium") from e

    @property
    def code(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.poll()

    def console(self) -> str:
        """The last lines that the page or the browser wrote, its chatter about itself left out; at most 2000 characters."""
        if self._said.closed:
            return ""
        lines = (Path(self._said.name)).read_text(encoding="utf-8", errors="replace").splitlines()
        told = [CONSOLE.sub("", line).strip() for line in lines if line.strip() and (CONSOLE.match(line) or not NOISE.search(line))]
        return "\n".join(told[-LINES:])[-2000:]

    def close(self) -> None:
        """Kill it and every process it started, and remove its folder. May be called twice."""
        if self._said.closed:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        _kill(_ours(str(self._home)))  # what left the group
        self._process.wait()
        self._said.close()
        shutil.rmtree(self._home, ignore_errors=True)


def _shared_memory() -> int:
    try:
        return shutil.disk_usage("/dev/shm").free
    except OSError:
        return 0


def _ours(home: str) -> list[int]:
    """Processes that name our random folder on their command line."""
    import psutil

    found = []
    for process in psutil.process_iter(["cmdline"]):
        if process.pid != os.getpid() and any(home in word for word in process.info["cmdline"] or ()):
            found.append(process.pid)
    return found


def _kill(processes: Iterable[int]) -> None:
    for pid in processes:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
