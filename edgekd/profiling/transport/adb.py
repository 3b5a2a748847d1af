"""An Android device by adb: `--device adb://SERIAL`, `adb://HOST:PORT`, or `adb://` for the only one attached. Nothing is installed on it.

A session has a folder of its own below /data/local/tmp/edgekd-shell/ and holds that folder's lock, as on any board (`lock.py`, `_board.py`): programs run
in process groups of their own, which are ended when they take too long, when the device goes away and comes back, on Ctrl-C, and by a watchdog on the
device when this machine is gone. What a phone runs is the user's (`drivers/tools.py`): there is no Python on it.
"""
from __future__ import annotations

import math
import re
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from typing_extensions import Self

from edgekd import console
from edgekd.errors import EdgekdError, UsageError
from edgekd.profiling.transport import Completed, Lost, _adb_wire, _board, _probe, lock
from edgekd.profiling.transport._adb_wire import Sftp, Wire
from edgekd.profiling.transport._android import LOOK, Look
from edgekd.profiling.transport._channel import Overdue
from edgekd.profiling.transport._files import Files

if TYPE_CHECKING:
    from edgekd.target import Target

PLACE = "/data/local/tmp"
"""The one folder of a phone that files can be written to and run from."""
SHORT_S, KILL_S = 30.0, 20.0
BACK_S = 15.0
"""How long a device may be away before it is lost: a USB hub that resets, a phone that changes its network."""
ADDRESS = re.compile(r"(\[[0-9a-fA-F:]+\]|[\w.-]+):(\d{1,5})")
T = TypeVar("T")


def connect(target: Target) -> Adb:
    """The way to a target's device; `__enter__` connects.

    Raises:
        UsageError: its address cannot be one.
        EdgekdError: adbutils is not installed.
    """
    url = target.device.url or "adb://"
    serial = url.partition("://")[2].rstrip("/")
    if re.search(r"[\s\0/?#]", serial):
        raise UsageError(f"'{serial}' is no serial number and no HOST:PORT", where=url, hint="adb://SERIAL as `adb devices` shows it, or adb://HOST:PORT")
    _adb_wire.library()
    return Adb(serial, folder=target.device.folder)


class Adb:
    """See `edgekd.profiling.transport.Transport`."""

    name = "adb"

    def __init__(self, serial: str = "", *, folder: str | None = None, wait_s: float = lock.WAIT_S, pace: lock.Pace | None = None) -> None:
        self.serial, self.wait_s, self.pace = serial, wait_s, pace or lock.Pace()
        self._folder = folder or PLACE
        self._wire: Wire | None = None
        self._exit = ExitStack()
        self._lock: lock.Lock | None = None
        self._root = self._session = ""
        self._files: Files | None = None
        self._runs, self._mended = 0, threading.RLock()

    # Connecting ---------------------------------------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        try:
            if _adb_wire.start_server():
                self._exit.callback(_adb_wire.stop_server)
            self.serial = find(self.serial, self._exit)
            wire = self._wire = Wire(self.serial)
            opened = self._checked(_board.OPEN, [self._folder], "no folder for edgekd on the device")
            self._root = opened.stdout.partition("root=")[2].removesuffix("\n")
            self._lock = self._exit.enter_context(lock.held(self._short, self._root, wait_s=self.wait_s, pace=self.pace))
            session = f"session-{secrets.token_hex(8)}"
            self._checked(_board.BEGIN, [self._root, session], "no folder can be made for this session")
            self._session = f"{self._root}/{session}"
            arch, bits = self.look().arch
            self._files = Files(f"{self._session}/files", lambda: Sftp(wire), self._free, self._same, lambda e: isinstance(e, Lost), self._remove, arch=arch, bits=bits)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Remove what was pushed, end what runs, free the lock; stop adb's server where we started it."""
        session, self._session, self._files = self._session, "", None
        if session:
            try:
                self._say(_board.END, [session], timeout_s=KILL_S)
            except Exception as e:
                console.warn(f"{self.serial}: the device could not be tidied up ({e}); the next session there does it")
        try:
            self._exit.close()
        except Exception:
            pass  # the lock frees itself when its heartbeat stops
        self._lock = self._wire = None

    def _say(self, script: _board.Script, words: Sequence[str], *, timeout_s: float) -> Completed:
        """One small script. Raises Lost where the device does not answer in time."""
        if self._wire is None:
            raise EdgekdError("the session with the device is closed", where=self.serial)
        try:
            return self._wire.script(script, words, timeout_s=timeout_s)
        except Overdue as e:
            raise Lost(f"the device has been silent for {timeout_s:.0f} s", where=self.serial, hint="is it awake? look at `adb devices`") from e

    def _short(self, command: Sequence[str], *, timeout_s: float) -> Completed:
        return self._say(_board.BARE, list(command), timeout_s=timeout_s)

    def _checked(self, script: _board.Script, words: Sequence[str], what: str) -> Completed:
        done = self._say(script, words, timeout_s=SHORT_S)
        if done.code:
            raise EdgekdError(f"{what}: {done.stderr.strip()[-300:] or f'exit code {done.code}'}", where=self.serial,
                              hint="name a folder that `adb shell` can write to: `folder` of the target's device")
        return done

    def _alive(self) -> None:
        """Make sure that the device is there, waiting for it a little, and that it is still ours."""
        with self._mended:
            if not self._session or self._lock is None:
                raise EdgekdError("the session with the device is closed", where=self.serial)
            until = time.monotonic() + BACK_S
            while (state := _adb_wire.devices().get(self.serial)) != "device":
                if time.monotonic() > until:
                    raise Lost(f"the device is {state or 'gone'}", where=self.serial, hint="look at its cable and at `adb devices`")
                if ADDRESS.fullmatch(self.serial):
                    _adb_wire.ask(f"host:connect:{self.serial}")
                time.sleep(0.5)
            self._lock.check()

    # Commands -----------------------------------------------------------------------------------------------------------------------------------------

    def run(self, command: Sequence[str], *, timeout_s: float) -> Completed:
        """A program in this session's folder, with these words as its arguments whatever is in them, and nothing on its standard input.

        Raises:
            Lost: the device went away; the program was ended, by us when it came back or else by the watchdog there.
            EdgekdError: it took longer than `timeout_s` and was ended with all its children.
            UsageError: a word that cannot be an argument.
        """
        words = [str(w) for w in command]
        if not words or not words[0] or words[0].startswith("-"):
            raise UsageError("there is no program of this name", where=words[:1])
        self._alive()
        assert self._wire is not None
        self._runs += 1
        number, step = str(self._runs), max(1, round(self.pace.orphan_s / 12))
        rounds = max(2, math.ceil(self.pace.orphan_s / step))
        try:
            done = self._wire.script(_board.RUN, [self._session, number, f"{self._root}/lock/beat", str(step), str(rounds), *words], timeout_s=timeout_s)
        except Lost as e:
            raise Lost(f"{e.what} while `{words[0]}` ran there; {self._end(number)}", where=self.serial, hint="look at the cable, then start again") from e
        except Overdue as e:
            raise EdgekdError(f"no answer within {timeout_s:.0f} s from `{' '.join(words[:3])} ...`; {self._end(number)}", where=self.serial,
                              hint="the device is slow or busy, or the model hangs: try fewer repeats or a smaller model") from e
        except EdgekdError:
            raise
        except BaseException:
            self._end(number)  # Ctrl-C
            raise
        return Completed(done.code, *(said.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for said in (done.stdout, done.stderr)))

    def _end(self, number: str) -> str:
        """End a program with its children; says what became of it."""
        try:
            self._alive()
            self._say(_board.KILL, [self._session, number], timeout_s=KILL_S)
            return "the program was ended there, with its children"
        except EdgekdError as e:
            return f"the device could not be reached to end it ({e.what}), so the watchdog there ends it within {self.pace.orphan_s * 1.2:.0f} s"

    # Files --------------------------------------------------------------------------------------------------------------------------------------------

    def push(self, path: Path) -> str:
        """See `Transport`. A file that is there already is not sent again; once the device comes back, a copy that broke off is gone on with."""
        return self._again(lambda files: files.push(path))

    def pull(self, path: str, local: Path) -> Path:
        """See `Transport`."""
        return self._again(lambda files: files.pull(path, local))

    def _again(self, what: Callable[[Files], T]) -> T:
        self._alive()
        assert self._files is not None
        try:
            return what(self._files)
        except Lost as e:
            console.log(f"{self.serial}: {e.what}; waiting for it")
        self._alive()
        return what(self._files)

    def _free(self) -> int | None:
        done = self._say(_board.FREE, [f"{self._session}/files"], timeout_s=SHORT_S)
        return _probe.free_bytes((done.stdout.splitlines() or [""])[-1])

    def _same(self, there: str, path: str) -> bool:
        return self._say(_board.SAME, [there, path], timeout_s=SHORT_S).code == 0

    def _remove(self, path: str) -> None:
        self._short(["rm", "-rf", "--", path], timeout_s=SHORT_S)

    # What is there ------------------------------------------------------------------------------------------------------------------------------------

    def look(self) -> Look:
        """The device as it is now: its clock, heat, and what limits it."""
        return Look(self._say(LOOK, [self._root or self._folder], timeout_s=SHORT_S).stdout)

    def probe(self) -> dict[str, object]:
        """See `Transport`; also `abi`, `soc`, `cores`, `memory_bytes`, `battery_percent`, `temperature_c` and `governor`."""
        before = time.time()
        look = self.look()
        return {"url": f"adb://{self.serial}", **look.told((before, time.time()))}


def find(serial: str, exit: ExitStack | None = None) -> str:
    """The serial number of a device that is there and lets us in: the one of that name, the one at that address, or the only one.

    Raises:
        EdgekdError: there is none, there are several, or it is not ready; says what to do.
    """
    known = _adb_wire.devices()
    if ADDRESS.fullmatch(serial) and known.get(serial) != "device":
        said = _adb_wire.ask(f"host:connect:{serial}", timeout_s=60)
        if "connected to" not in said and "authenticate" not in said:
            raise EdgekdError(f"adb cannot connect: {said.strip()}", where=f"adb://{serial}",
                              hint="on the device: Developer options, Wireless debugging; pair it first with `adb pair HOST:PORT`")
        if exit is not None and serial not in known:
            exit.callback(_disconnect, serial)
        known = _settled(serial)
    if not serial:
        if len(known) != 1:
            listed = ", ".join(f"{name} ({state})" for name, state in known.items())
            raise EdgekdError(f"there are {len(known)} Android devices" if known else "no Android device is attached", where=listed or None,
                              hint="name one: --device adb://SERIAL" if known else "plug it in, switch on USB debugging (Developer options), look at `adb devices`")
        serial = next(iter(known))
    state = known.get(serial)
    if state != "device":
        raise EdgekdError(f"the device {serial} {'is ' + state if state else 'is not attached'}", where=f"adb://{serial}", hint=TODO.get(
            state or "", f"attached are {', '.join(known)}" if known and not state else "unplug it and plug it in again; look at `adb devices`"))
    return serial


TODO = {"unauthorized": "unlock it and allow USB debugging for this computer; if it does not ask: Developer options, Revoke USB debugging authorisations",
        "authorizing": "unlock it and allow USB debugging for this computer", "offline": "unplug it and plug it in again, or `adb reconnect`",
        "no permissions": "let your account use it: udev rules for Android (package android-sdk-platform-tools-common), then plug it in again",
        "recovery": "start it normally: adb reboot", "sideload": "start it normally: adb reboot", "bootloader": "start it normally: fastboot reboot"}
"""State of a device -> what its owner has to do."""


def _settled(serial: str) -> dict[str, str]:
    """All devices, once this one is past saying hello."""
    until = time.monotonic() + 10
    while (known := _adb_wire.devices()).get(serial) in (None, "offline", "connecting", "authorizing") and time.monotonic() < until:
        time.sleep(0.2)
    return known


def _disconnect(serial: str) -> None:
    _adb_wire.ask(f"host:disconnect:{serial}")
