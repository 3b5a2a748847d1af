"""Scripts on a board over ssh channels. `execute` gives a program a channel of its own and drains both outputs as they come, within limits; a `Shell` takes
one small script after the other, so that a heartbeat starts no login shell with its startup files beside what is being measured."""
from __future__ import annotations

import re
import secrets
import select
import threading
import time
from collections.abc import Sequence
from typing import Any

from edgekd.errors import EdgekdError
from edgekd.profiling.transport import Completed, Lost
from edgekd.profiling.transport._board import Script
from edgekd.profiling.transport._connect import deadline

OPEN_S = 20.0
"""Longest wait for a channel and for its shell to take a script."""
KEEP = 4 << 20
"""Bytes of an output kept of its beginning, and as many of its end."""
PIECE = 1 << 16


class Overdue(EdgekdError):
    """A script did not end in time. It still runs."""


class Kept:
    """An output within limits: its first and its last bytes, and how many there were in between."""

    def __init__(self, keep: int = KEEP) -> None:
        self.keep, self.total = keep, 0
        self.head, self.tail = bytearray(), bytearray()

    def add(self, piece: bytes) -> None:
        """More of it."""
        self.total += len(piece)
        room = self.keep - len(self.head)
        self.head += piece[:room]
        self.tail += piece[room:] if room < len(piece) else b""
        if len(self.tail) > 2 * self.keep:
            del self.tail[:-self.keep]

    def after(self, mark: str) -> bytes | None:
        """All that came after the first line that is `mark`; None when it never came."""
        _, found, rest = bytes(self.head).partition(f"{mark}\n".encode())
        if not found:
            return None
        tail = bytes(self.tail[-self.keep:])
        lost = self.total - len(self.head) - len(tail)
        return rest + (f"\n... {lost} bytes left out ...\n".encode() if lost else b"") + tail


def execute(transport: Any, script: Script, words: Sequence[str], *, timeout_s: float) -> Completed:
    """Run a script to its end. Bytes of its output that are no UTF-8 are kept as surrogates.

    Raises:
        Overdue: it takes longer than `timeout_s`; it is not ended here.
        Lost: the connection broke, or the board is silent.
        EdgekdError: the account has no shell.
    """
    mark = f"edgekd-{secrets.token_hex(8)}"
    said = script.said(words, mark)
    out, err = Kept(), Kept()
    channel = _shell(transport, said)
    channel.shutdown_write()
    try:
        _drain(channel, out, err, time.monotonic() + timeout_s)
    finally:
        channel.close()
    code = int(channel.recv_exit_status()) if channel.exit_status_ready() else -1
    if code == -1 and not _settled(transport):
        raise Lost("the connection to the board broke")
    printed, complained = out.after(mark), err.after(mark)
    if printed is None:
        raise _no_shell(bytes(out.head) + bytes(err.head))
    return Completed(code, printed.decode("utf-8", "surrogateescape"), (complained or b"").decode("utf-8", "surrogateescape"))


def _drain(channel: Any, out: Kept, err: Kept, until: float) -> None:
    """Read both outputs until the program has ended and closed them, or has ended and been silent for a second (a stray child holds them open)."""
    quiet_since: float | None = None
    while True:
        moved = False
        while channel.recv_ready():
            out.add(channel.recv(PIECE))
            moved = True
        while channel.recv_stderr_ready():
            err.add(channel.recv_stderr(PIECE))
            moved = True
        if channel.closed or (channel.exit_status_ready() and channel.eof_received):
            if not (channel.recv_ready() or channel.recv_stderr_ready()):
                return
            continue
        now = time.monotonic()
        if channel.exit_status_ready():
            quiet_since = now if moved or quiet_since is None else quiet_since
            if now - quiet_since > 1.0:
                return
        if now > until:
            raise Overdue("no answer in time")
        if not moved:
            # an exit code alone wakes nobody
            select.select([channel], [], [], min(0.2, max(0.0, until - now) + 0.01))


def _shell(transport: Any, said: bytes) -> Any:
    """A channel whose shell has been given the beginning of a script."""
    try:
        with deadline(transport, OPEN_S):
            channel = transport.open_session(timeout=OPEN_S)
            channel.settimeout(OPEN_S)
            channel.exec_command("exec sh")
            channel.sendall(said)
            return channel
    except Exception as e:
        raise _broken(transport, e) from e


def _no_shell(said: bytes) -> EdgekdError:
    return EdgekdError("the account on the board runs no commands", where=said.decode(errors="replace").strip()[-200:] or None,
                       hint="it needs sh as a login shell or beneath one; a forced command or nologin keeps edgekd out")


class Shell:
    """A shell that stays, for small scripts one after the other. Threads take turns."""

    def __init__(self, transport: Any) -> None:
        self.transport, self._turn = transport, threading.Lock()
        self._channel: Any = None

    def ask(self, script: Script, words: Sequence[str], *, timeout_s: float) -> Completed:
        """As `execute`, for scripts that print little."""
        mark = f"edgekd-{secrets.token_hex(8)}"
        said = script.asked(words, mark)
        until = time.monotonic() + timeout_s
        if not self._turn.acquire(timeout=timeout_s):
            raise Overdue("no answer in time")
        try:
            if self._channel is None or self._channel.closed:
                self._channel = _shell(self.transport, said)
            else:
                self._channel.settimeout(max(0.1, timeout_s))
                self._channel.sendall(said)
            return self._answer(mark.encode(), until)
        except Exception as e:
            raise _broken(self.transport, e) from e
        finally:
            self._turn.release()

    def _answer(self, mark: bytes, until: float) -> Completed:
        out, err, channel = bytearray(), bytearray(), self._channel
        ends = [re.compile(rb"%s\n(.*)\n%s (\d+)\n" % (mark, mark), re.DOTALL)] * 2
        while True:
            for ready, read, kept in ((channel.recv_ready, channel.recv, out), (channel.recv_stderr_ready, channel.recv_stderr, err)):
                while ready():
                    kept += read(PIECE)
            found = [end.search(kept) for end, kept in zip(ends, (out, err), strict=True)]
            if found[0] and found[1]:
                return Completed(int(found[0][2]), found[0][1].decode("utf-8", "surrogateescape"), found[1][1].decode("utf-8", "surrogateescape"))
            if channel.closed or channel.eof_received:
                if not _settled(self.transport):
                    raise Lost("the connection to the board broke")
                raise _no_shell(bytes(out) + bytes(err))
            if time.monotonic() > until:
                raise Overdue("no answer in time")
            select.select([channel], [], [], 0.2)


def _settled(transport: Any) -> bool:
    """Whether the connection is still there once its own thread has seen what happened."""
    for _ in range(10):
        if not transport.is_active():
            return False
        time.sleep(0.05)
    return True


def _broken(transport: Any, error: Exception) -> EdgekdError:
    if isinstance(error, EdgekdError):
        return error
    if isinstance(error, TimeoutError):
        transport.close()  # silent
    if not _settled(transport):
        return Lost(f"the connection to the board broke ({error or type(error).__name__})")
    return EdgekdError(f"the board opens no channel: {error or type(error).__name__}", hint="its sshd may limit sessions (MaxSessions)")
