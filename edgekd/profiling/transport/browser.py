"""A browser of this machine as the device: the files are served to it from here, and the one program it has is the measuring page.

`run(["measure", JOB])` opens the page on a job.json that was pushed, in a fresh headless Chromium, and gives what the page said, one JSON document a
line; what models answered lies beside the job (docs/devices.md). Nothing leaves the machine: the server listens on 127.0.0.1, and the browser is told
that no other host exists.
"""
from __future__ import annotations

import json
import os
import platform
import queue
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from typing_extensions import Self

from edgekd.errors import EdgekdError, UsageError
from edgekd.measurement import Circumstances
from edgekd.profiling.transport import Completed, _chromium, _ort_web
from edgekd.profiling.transport._chromium import Chromium
from edgekd.profiling.transport._site import Site
from edgekd.workspace import atomic_path

if TYPE_CHECKING:
    from edgekd.target import Target

SILENT_S, STARTING_S = 45.0, 120.0
"""Seconds after which a page that says nothing is dead: its worker speaks every second, whatever the page computes. And until it speaks first."""
PROGRAM = "measure"
GONE = 3
"""Exit code of `run` when the page died: a model may have taken all its memory."""


def connect(target: Target) -> Browser:
    """See `edgekd.profiling.transport.reach`. Of the target's tools, `chrome` names another program, `flags` gives it more words."""
    tools = target.device.tools
    return Browser(chrome=tools.get("chrome"), flags=tools.get("flags", "").split())


class Browser:
    """See `edgekd.profiling.transport.Transport`."""

    name = "browser"

    def __init__(self, *, chrome: str | None = None, flags: Sequence[str] = ()) -> None:
        self._chrome, self._flags = chrome, list(flags)
        self._folder: Path | None = None
        self._site: Site | None = None
        self._running: Chromium | None = None
        self.unguarded: str | None = None
        """Why the browser ran without its sandbox, where it did."""

    def __enter__(self) -> Self:
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")  # as edgekd.teachers.huggingface reads it, without torch
        self.program = _chromium.find(self._chrome)
        ort = _ort_web.require(offline=offline)
        self._folder = Path(tempfile.mkdtemp(prefix="edgekd-browser-"))
        self._site = Site({"page": _ort_web.PAGE, "ort": ort, "files": self._folder})
        return self

    def probe(self) -> dict[str, object]:
        """This machine, with its browser."""
        about = Circumstances.capture(packages=("edgekd",))
        program = _chromium.find(self._chrome)
        return {"device": about.device, "os": about.os, "arch": platform.machine(), "python": None, "clock_skew_s": 0.0,
                "versions": {**about.versions, "chromium": _chromium.version(program), _ort_web.PACKAGE: _ort_web.version()},
                "free_bytes": shutil.disk_usage(tempfile.gettempdir()).free}

    def push(self, path: Path) -> str:
        """A copy in this session's folder, from which the page is served."""
        folder, path = self._open(), Path(path)
        if not path.exists():
            raise EdgekdError("there is nothing to push", where=path)
        place = Path(tempfile.mkdtemp(dir=folder))
        try:
            shutil.copytree(path, place / path.name) if path.is_dir() else shutil.copyfile(path, place / path.name)
        except OSError as e:
            shutil.rmtree(place, ignore_errors=True)
            raise EdgekdError(f"the files cannot be copied for the browser: {e.strerror or e}", where=folder, hint="make room in the temporary folder") from e
        return f"{place.name}/{path.name}"

    def run(self, command: Sequence[str], *, timeout_s: float) -> Completed:
        """`measure JOB` and nothing else: what the page said, a line each, and its console. Code 0 when it came to its end, 1 when it failed as a whole,
        `GONE` when it died on the way."""
        words = list(command)
        if len(words) != 2 or words[0] != PROGRAM:
            raise UsageError(f"a browser has one program, `{PROGRAM} JOB`, and is asked for `{' '.join(words)}`")
        self._open()
        assert self._site is not None
        self._site.said, self._site.heard = queue.Queue(), time.monotonic()
        self._running = Chromium(self.program, f"{self._site.address}page/index.html?job={quote(words[1], safe='/')}", self._flags)
        self.unguarded = self._running.unguarded
        try:
            said, code = self._listen(self._site, self._running, timeout_s)
            return Completed(code, "".join(json.dumps(one) + "\n" for one in said), self._running.console())
        finally:
            self._running.close()
            self._running = None

    def _listen(self, site: Site, browser: Chromium, timeout_s: float) -> tuple[list[dict[str, Any]], int]:
        """What the page says until it is done, failed or dead, and the exit code."""
        said: list[dict[str, Any]] = []
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                said.append(site.said.get(timeout=0.2))
            except queue.Empty:
                if browser.code is not None:
                    self._never_spoke(said, browser, f"the browser ended with code {browser.code}")
                    return said, GONE
                if time.monotonic() > deadline:
                    raise EdgekdError(f"no answer within {timeout_s:.0f} s from the browser{_doing(said)}{_last(browser)}", where=self.name,
                                      hint="the machine is busy or a model hangs: try fewer repeats or a smaller model") from None
                if time.monotonic() - site.heard > (SILENT_S if said else STARTING_S):
                    self._never_spoke(said, browser, "the browser shows no page")
                    return said, GONE
                continue
            if said[-1].get("kind") in ("done", "fatal"):
                return said, int(said[-1]["kind"] == "fatal")

    def _never_spoke(self, said: list[dict[str, Any]], browser: Chromium, what: str) -> None:
        if not said:
            raise EdgekdError(f"{what}{_last(browser)}", where=self.program, hint="start it by hand, or name another with EDGEKD_CHROME=/path/to/chrome")

    def pull(self, path: str, local: Path) -> Path:
        """A copy of a file that was pushed or that the page wrote."""
        source = self._open() / path
        if ".." in Path(path).parts or Path(path).is_absolute() or not source.is_file():
            raise EdgekdError("the browser has no such file", where=path)
        with atomic_path(local) as temp:
            shutil.copyfile(source, temp)
        return Path(local)

    def _open(self) -> Path:
        if self._folder is None:
            raise EdgekdError("the browser is not open", where=self.name, hint="use it in a `with` block")
        return self._folder

    def close(self) -> None:
        """Kill the browser, stop the server, remove the files."""
        if self._running is not None:
            self._running.close()
            self._running = None
        if self._site is not None:
            self._site.close()
            self._site = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _doing(said: Sequence[dict[str, Any]]) -> str:
    """What the page was at, where it said so."""
    stage = next((one for one in reversed(said) if one.get("kind") == "stage"), None)
    if stage is None:
        return ""
    return f", which was {stage['doing']}" + (f" of {stage['model']}" if stage.get("model") else "")


def _last(browser: Chromium) -> str:
    console = browser.console()
    return f"; its console says:\n{console}" if console else ""
