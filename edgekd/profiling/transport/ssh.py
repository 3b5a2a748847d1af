"""A board over ssh: `--device ssh://user@host:port`. Nothing is installed there and nothing is left.

A session has a folder of its own below `<folder or /tmp>/edgekd-<account>/` and holds that folder's lock (`lock.py`). Programs run in process groups of their
own, which are ended when they take too long, when the connection breaks, when Ctrl-C is pressed here, and by a watchdog on the board when the session's heartbeat
stops because this machine is gone. A broken connection is made again by the next call.
"""
from __future__ import annotations

import math
import secrets
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from typing_extensions import Self

from edgekd import console
from edgekd.errors import EdgekdError, UsageError
from edgekd.profiling.transport import Completed, Lost, _board, _connect, _probe, lock
from edgekd.profiling.transport._channel import Overdue, Shell, execute
from edgekd.profiling.transport._files import ANSWER_S, Files
from edgekd.profiling.transport._route import Address, Config, address_of
from edgekd.target import Target

SHORT_S = 30.0
"""Longest time of our own small commands."""
KILL_S = 20.0
IMPORT_S = 180.0
"""Longest time for a Python on a slow board to import its runtimes."""
T = TypeVar("T")


def connect(target: Target) -> Ssh:
    """The way to a target's board; `__enter__` connects.

    Raises:
        UsageError: its address, key or known_hosts cannot be used; nothing was contacted.
        EdgekdError: paramiko is not installed, or ~/.ssh/config cannot be read.
    """
    device = target.device
    address, config = address_of(device.url, device.ssh_key, device.known_hosts)
    _connect.library()
    return Ssh(address, config, device.url or "", folder=device.folder, python=device.python)


class Ssh:
    """See `edgekd.profiling.transport.Transport`."""

    name = "ssh"

    def __init__(self, address: Address, config: Config, url: str, *, folder: str | None = None, python: str | None = None,
                 wait_s: float = lock.WAIT_S, pace: lock.Pace | None = None) -> None:
        if any("\0" in (said or "") for said in (folder, python)):
            raise UsageError("a NUL character cannot be in `folder` or `python` of a device")
        self.hops, self.url = config.route(address), url
        self.wait_s, self.pace = wait_s, pace or lock.Pace()
        self._folder, self._python = folder or "", python
        self._line: _connect.Line | None = None
        self._sftp: Any = None
        self._shell: Shell | None = None
        self._exit = ExitStack()
        self._lock: lock.Lock | None = None
        self._session = self._root = ""
        self._files: Files | None = None
        self._runs = 0
        self._connecting = threading.RLock()
        self._info: dict[str, str] = {}

    # Connecting ---------------------------------------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        try:
            self._line = _connect.connect(self.hops, self.url)
            self._info = self._open()
            self._root = self._info["root"]
            self._lock = self._exit.enter_context(lock.held(self._short, self._root, wait_s=self.wait_s, pace=self.pace))
            session = f"session-{secrets.token_hex(8)}"
            self._checked(_board.BEGIN, [self._root, session], "no folder can be made for this session")
            self._session = f"{self._root}/{session}"
            bits = self._info.get("bits", "")
            self._files = Files(f"{self._session}/files", self._client, self._free, self._same, self._lost, self._remove,
                                arch=self._info.get("arch", ""), bits=int(bits) if bits.isdigit() else None)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Remove what was pushed, end what runs, free the lock, hang up. Never raises, and may be called twice."""
        session, self._session, self._files = self._session, "", None
        try:
            if session:
                self._tidy(session)
        except Exception as e:
            console.warn(f"{self.url}: the board could not be tidied up ({getattr(e, 'what', e)}); the next session there does it")
        try:
            self._exit.close()
        except Exception:
            pass  # the lock frees itself when its heartbeat stops
        self._lock = None
        self._hang_up()

    def _tidy(self, session: str) -> None:
        try:
            self._say(_board.END, [session], timeout_s=KILL_S)
        except Lost:
            # one more try, so that nothing is left; otherwise the watchdog and the next session see to it
            self._hang_up()
            self._line = _connect.connect(self.hops, self.url, tries=1)
            self._say(_board.END, [session], timeout_s=KILL_S)

    def _hang_up(self) -> None:
        line, self._line, self._sftp, self._shell = self._line, None, None, None
        if line:
            line.close()

    def _alive(self) -> None:
        """Make sure that there is a connection and that the board is still ours."""
        with self._connecting:
            if not self._session or self._lock is None:
                raise EdgekdError("the session with the board is closed", where=self.url)
            if not (self._line and self._line.alive):
                self._hang_up()
                self._line = _connect.connect(self.hops, self.url)
                if self._say(_board.STILL, [self._root, self._session.rpartition("/")[2], self._lock.id], timeout_s=SHORT_S).code:
                    self._lock.taken = True
                self._lock.check()
                self._lock.beat()
            self._lock.check()

    def _open(self) -> dict[str, str]:
        done = self._checked(_board.OPEN, [self._folder], "no folder for edgekd on the board")
        said, _, root = done.stdout.partition("root=")
        return dict(line.partition("=")[::2] for line in said.splitlines()) | {"root": root.removesuffix("\n")}

    # Commands -----------------------------------------------------------------------------------------------------------------------------------------

    def _say(self, script: _board.Script, words: Sequence[str], *, timeout_s: float) -> Completed:
        """One small script over the connection there is. A board that does not answer in time has its connection closed: it is silent."""
        line = self._line
        if line is None or not line.alive:
            raise Lost("there is no connection to the board", where=self.url)
        shell = self._shell
        if shell is None or shell.transport is not line.transport:
            shell = self._shell = Shell(line.transport)
        try:
            return shell.ask(script, words, timeout_s=timeout_s)
        except Overdue as e:
            line.transport.close()
            raise Lost(f"the board has been silent for {timeout_s:.0f} s", where=self.url, hint="is it still on, and on the network?") from e

    def _short(self, command: Sequence[str], *, timeout_s: float) -> Completed:
        return self._say(_board.BARE, list(command), timeout_s=timeout_s)

    def _checked(self, script: _board.Script, words: Sequence[str], what: str) -> Completed:
        done = self._say(script, words, timeout_s=SHORT_S)
        if done.code:
            raise EdgekdError(f"{what}: {done.stderr.strip()[-300:] or f'exit code {done.code}'}", where=self.url,
                              hint="name a folder that this account can write to: `folder` of the target's device")
        return done

    def run(self, command: Sequence[str], *, timeout_s: float) -> Completed:
        """A program in this session's folder, with these words as its arguments whatever is in them, and nothing on its standard input.

        Raises:
            Lost: the connection broke; the program was ended, by us after connecting again or else by the board's watchdog.
            EdgekdError: it took longer than `timeout_s` and was ended with all its children.
            UsageError: a word that cannot be an argument.
        """
        words = [str(w) for w in command]
        if not words or not words[0] or words[0].startswith("-"):
            raise UsageError("there is no program of this name", where=words[:1])
        self._alive()
        self._runs += 1
        number, step = str(self._runs), max(1, round(self.pace.orphan_s / 12))
        rounds = max(2, math.ceil(self.pace.orphan_s / step))
        try:
            if self._line is None:
                raise Lost("there is no connection to the board")
            done = execute(self._line.transport, _board.RUN, [self._session, number, f"{self._root}/lock/beat", str(step), str(rounds), *words],
                           timeout_s=timeout_s)
        except Lost as e:
            raise Lost(f"the connection broke while `{_brief(words)}` ran there; {self._end(number)}", where=self.url, hint="look at the network and the board's power, then start again") from e
        except Overdue as e:
            raise EdgekdError(f"no answer within {timeout_s:.0f} s from `{_brief(words)}`; {self._end(number)}", where=self.url,
                              hint="the board is slow or busy, or the model hangs: try fewer repeats or a smaller model") from e
        except EdgekdError:
            raise
        except BaseException:
            self._end(number)  # Ctrl-C
            raise
        return Completed(done.code, _text(done.stdout), _text(done.stderr))

    def _end(self, number: str) -> str:
        """End a program with its children, connecting again for it; says what became of it."""
        why = ""
        for _ in range(2):
            try:
                self._alive()
                self._say(_board.KILL, [self._session, number], timeout_s=KILL_S)
                return "the program was ended there, with its children"
            except Lost as e:
                why = e.what
            except EdgekdError as e:
                why = e.what
                break
        return f"the board could not be reached to end it ({why}), so its own watchdog ends the program within {self.pace.orphan_s * 1.2:.0f} s"

    # Files --------------------------------------------------------------------------------------------------------------------------------------------

    def push(self, path: Path) -> str:
        """See `Transport`. A file that is there already is not sent again; a broken connection is made again once."""
        return self._again(lambda files: files.push(path))

    def pull(self, path: str, local: Path) -> Path:
        """See `Transport`. A broken connection is made again once."""
        return self._again(lambda files: files.pull(path, local))

    def _again(self, what: Callable[[Files], T]) -> T:
        self._alive()
        assert self._files is not None
        try:
            return what(self._files)
        except Lost:
            console.log(f"{self.url}: the connection broke; connecting again")
        self._alive()
        return what(self._files)

    def _client(self) -> Any:
        """The SFTP client of the connection there is."""
        line = self._line
        if line is None or not line.alive:
            raise Lost("there is no connection to the board", where=self.url)
        if self._sftp is None or self._sftp.get_channel().closed:
            try:
                with _connect.deadline(line.transport, ANSWER_S):
                    self._sftp = line.transport.open_sftp_client()
                self._sftp.get_channel().settimeout(ANSWER_S)
            except Exception as e:
                if self._lost(e):
                    raise Lost("the connection to the board broke", where=self.url) from e
                raise EdgekdError(f"the board takes no files by SFTP: {e or type(e).__name__}", where=self.url,
                                  hint="its sshd needs `Subsystem sftp` (package openssh-sftp-server), and startup files of the account must not print anything") from e
        return self._sftp

    def _lost(self, error: BaseException) -> bool:
        """Whether an error means that the connection is gone. A board that does not answer in time is silent, and hung up on."""
        if isinstance(error, Lost):
            return True
        line = self._line
        if line and isinstance(error, TimeoutError):
            line.transport.close()
        for _ in range(6):
            if not (line and line.alive):
                return True
            time.sleep(0.05)
        return False

    def _free(self) -> int | None:
        done = self._say(_board.FREE, [f"{self._session}/files"], timeout_s=SHORT_S)
        return _probe.free_bytes((done.stdout.splitlines() or [""])[-1])

    def _same(self, there: str, path: str) -> bool:
        return self._say(_board.SAME, [there, path], timeout_s=SHORT_S).code == 0

    def _remove(self, path: str) -> None:
        self._short(["rm", "-rf", "--", path], timeout_s=SHORT_S)

    # What is there ------------------------------------------------------------------------------------------------------------------------------------

    def probe(self) -> dict[str, object]:
        """See `Transport`; also `soc`, `cores`, `memory_bytes`, `bits`, `python_path`, `pythons` (each with what it has) and `notes`."""
        self._alive()
        # the clock by itself: the rest of the script takes a while
        before = time.time()
        clock = self._short(["date", "+%s"], timeout_s=SHORT_S).stdout.strip()
        after = time.time()
        done = self.run(_probe.ask(self._python), timeout_s=IMPORT_S)
        found = _probe.read(f"{done.stdout}\nclock={clock}\n", (before, after))
        return {"url": self.url, **found}

    def python(self, needs: Sequence[str]) -> str:
        """The Python of the board that imports all of `needs`: the one that the target names, or else the first of the usual places.

        Raises:
            EdgekdError: there is none; says what was tried. Nothing is ever installed.
        """
        listed = self.run(["sh", "-c", _probe.LIST, "edgekd", self._python or "", sys.executable], timeout_s=SHORT_S)
        reasons: dict[str, str] = {}
        for path in dict.fromkeys(listed.stdout.splitlines()):
            try:
                found, why = _probe.tried(self.run([path, "-c", _probe.TRY, *needs], timeout_s=IMPORT_S).stdout)
            except Lost:
                raise
            except EdgekdError as e:  # one that hangs is no reason not to look at the next
                found, why = None, e.what
            if found:
                return found
            reasons[path] = why
        raise _probe.nothing(needs, reasons, self._python, self.url)


def _brief(words: Sequence[str]) -> str:
    shown = " ".join(words[:4])
    return (shown[:80] + " ...") if len(words) > 4 or len(shown) > 80 else shown


def _text(said: str) -> str:
    """Output for people and parsers: bytes that are no UTF-8 are shown as such."""
    return said.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
