"""adb as it is spoken to adb's own server on this machine: which devices there are, scripts on one of them, files to it and back.

The server is the adb that adbutils brings; it is started quietly where none runs, and stopped at the end where we started it. Formats are those of
AOSP's packages/modules/adb: SERVICES.TXT, SYNC.TXT and shell_protocol.h.
"""
from __future__ import annotations

import contextlib
import os
import secrets
import socket
import stat
import struct
import subprocess
import time
from collections.abc import Sequence
from types import SimpleNamespace, TracebackType
from typing import Any, BinaryIO

from typing_extensions import Self

from edgekd.errors import EdgekdError, first_line
from edgekd.profiling.transport import Completed, Lost
from edgekd.profiling.transport._board import BARE, Script
from edgekd.profiling.transport._channel import Kept, Overdue

ANSWER_S = 20.0
"""Longest wait for an answer of the server, or for the next piece of a file."""
PIECE = 1 << 16
"""Bytes of a DATA packet at most, by SYNC.TXT."""
STDIN, STDOUT, STDERR, EXIT, CLOSE_STDIN = 0, 1, 2, 3, 4
GONE = ("offline", "not found", "closed", "disconnect", "no devices", "unauthorized", "authorizing", "connecting")
"""Words of the server's refusals that mean that the device is not there (now)."""


def library() -> Any:
    """adbutils. Raises EdgekdError where it is not installed."""
    try:
        import adbutils
    except ImportError as e:
        raise EdgekdError("the package adbutils is missing, which speaks to Android devices", hint='pip install "edgekd[devices]"') from e
    return adbutils


def start_server() -> bool:
    """Make sure that adb's server runs; whether it was us who started it.

    Raises:
        EdgekdError: it does not start.
    """
    adbutils = library()
    client = adbutils.AdbClient()
    try:
        socket.create_connection((client.host, client.port), timeout=2).close()
        return False
    except OSError:
        pass
    adb = adbutils.adb_path()
    try:
        subprocess.run([adb, "-P", str(client.port), "start-server"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                       timeout=30, check=True, start_new_session=True)
    except (OSError, subprocess.SubprocessError) as e:
        said = (getattr(e, "stderr", None) or b"").decode(errors="replace").strip().splitlines()
        raise EdgekdError(f"adb's server does not start: {said[-1] if said else first_line(e)}", where=adb, hint="start it by hand: adb start-server") from e
    return True


def stop_server() -> None:
    """End it. Never raises."""
    with contextlib.suppress(Exception):
        library().AdbClient().server_kill()


def ask(command: str, *, timeout_s: float = ANSWER_S) -> str:
    """What the server answers to a `host:` command.

    Raises:
        EdgekdError: it refuses, or does not answer.
    """
    try:
        with _connection(timeout_s) as c:
            c.send_command(command)
            c.check_okay()
            return str(c.read_string_block())
    except (OSError, library().AdbError) as e:
        raise EdgekdError(f"adb's server says: {first_line(e)}", where=command, hint="adb kill-server && adb start-server") from e


def devices() -> dict[str, str]:
    """serial -> state: `device`, `offline`, `unauthorized`, ..."""
    rows = (line.split("\t", 1) for line in ask("host:devices").splitlines())
    return {row[0].strip(): row[1].strip() for row in rows if len(row) == 2}


def _connection(timeout_s: float) -> Any:
    """A fresh connection to the server, on which `timeout_s` is the longest silence."""
    made = library().AdbClient().make_connection(timeout=timeout_s)
    made.conn.settimeout(timeout_s)
    return made


class Wire:
    """One device."""

    def __init__(self, serial: str) -> None:
        self.serial, self._features = serial, frozenset[str]()

    def open(self, service: str, *, timeout_s: float = ANSWER_S) -> socket.socket:
        """A service of the device: a socket on which it answers.

        Raises:
            Lost: the device is not there.
            EdgekdError: it has no such service, or the server does not answer.
        """
        try:
            c = _connection(timeout_s)
        except (OSError, library().AdbError) as e:
            raise Lost(f"adb's server does not answer: {first_line(e)}", where=self.serial, hint="adb start-server") from e
        try:
            for command in (f"host:transport:{self.serial}", service):
                c.send_command(command)
                c.check_okay()
            found: socket.socket = c.conn
            return found
        except (OSError, library().AdbError) as e:
            c.close()
            said = first_line(e)
            # a server that hangs up in the middle says nothing: the device went away
            if isinstance(e, OSError) or said.startswith("Unknown data") or any(word in said for word in GONE):
                raise Lost(f"the device is not there: {said}", where=self.serial, hint="look at its cable and at `adb devices`") from e
            raise EdgekdError(f"the device refuses `{service.partition(':')[0]}`: {said}", where=self.serial) from e

    @property
    def has_shell_v2(self) -> bool:
        """Whether its shell tells exit codes and keeps both outputs apart: since Android 7."""
        if not self._features:
            self._features = frozenset(ask(f"host-serial:{self.serial}:features").split(",")) | {""}
        return "shell_v2" in self._features

    def script(self, script: Script, words: Sequence[str], *, timeout_s: float) -> Completed:
        """Run a script with these words to its end.

        Raises:
            Overdue: it takes longer than `timeout_s`; it is not ended here.
            Lost: the device went away.
        """
        mark = f"edgekd-{secrets.token_hex(8)}"
        said, until = script.said(words, mark), time.monotonic() + timeout_s
        out, err = Kept(), Kept()
        code = self._new(said, out, err, until) if self.has_shell_v2 else self._old(said, mark, out, err, until)
        printed, complained = out.after(mark), err.after(mark)
        if printed is None:
            last = (bytes(out.head) + bytes(err.head)).decode(errors="replace").strip()[-200:]
            raise EdgekdError(f"the device runs no commands: {last or 'its shell says nothing'}", where=self.serial, hint="does `adb shell id` work?")
        return Completed(code, printed.decode("utf-8", "surrogateescape"), (complained or b"").decode("utf-8", "surrogateescape"))

    def _new(self, said: bytes, out: Kept, err: Kept, until: float) -> int:
        """By the shell protocol: packets of (kind, length, bytes) both ways."""
        with _closing(self.open("shell,v2,raw:exec sh")) as s:
            try:
                for at in range(0, len(said), PIECE):
                    s.sendall(struct.pack("<BI", STDIN, len(said[at:at + PIECE])) + said[at:at + PIECE])
                s.sendall(struct.pack("<BI", CLOSE_STDIN, 0))
            except OSError as e:
                raise self._lost(e) from e
            while True:
                kind, length = struct.unpack("<BI", self._exactly(s, 5, until))
                data = self._exactly(s, length, until) if length else b""
                if kind == EXIT:
                    return data[0] if data else 255
                if kind in (STDOUT, STDERR):
                    (out if kind == STDOUT else err).add(data)

    def _old(self, said: bytes, mark: str, out: Kept, err: Kept, until: float) -> int:
        """Before Android 7: one stream for both outputs and no exit code, so the script is a file, and so is what it complains of."""
        file = f"/data/local/tmp/{mark}.sh"
        with Put(self, file) as f:
            f.write(said)
        whole = Kept()
        with _closing(self.open(f"shell:sh {file} </dev/null 2>{file}.err; c=$?; echo; echo {mark}-end $c; cat {file}.err; rm -f {file} {file}.err")) as s:
            while piece := self._some(s, PIECE, until):
                whole.add(piece)
        text = bytes(whole.head) + bytes(whole.tail)
        text = text.replace(b"\r\n", b"\n")  # a terminal of its own
        printed, ended, rest = text.rpartition(f"\n{mark}-end ".encode())
        code, _, complained = rest.partition(b"\n")
        if not ended or not code.strip().isdigit():
            raise Lost("the device went away while a command ran", where=self.serial)
        out.add(printed)
        err.add(complained)
        return int(code)

    def bare(self, *words: str, timeout_s: float = ANSWER_S) -> Completed:
        """A short command."""
        return self.script(BARE, words, timeout_s=timeout_s)

    def _some(self, s: socket.socket, most: int, until: float) -> bytes:
        """What comes next, nothing at its end."""
        left = until - time.monotonic()
        if left <= 0:
            raise Overdue("no answer in time")
        s.settimeout(left)
        try:
            return s.recv(most)
        except TimeoutError as e:
            raise Overdue("no answer in time") from e
        except OSError as e:
            raise self._lost(e) from e

    def _exactly(self, s: socket.socket, length: int, until: float) -> bytes:
        found = bytearray()
        while len(found) < length:
            piece = self._some(s, length - len(found), until)
            if not piece:
                raise self._lost(None)
            found += piece
        return bytes(found)

    def _lost(self, error: OSError | None) -> Lost:
        return Lost(f"the device went away{f' ({first_line(error)})' if error else ''}", where=self.serial, hint="look at its cable and at `adb devices`")

    # Files ------------------------------------------------------------------------------------------------------------------------------------------

    def sync(self, request: bytes, path: bytes) -> socket.socket:
        """A file service with its first request sent."""
        s = self.open("sync:")
        try:
            s.sendall(request + struct.pack("<I", len(path)) + path)
        except OSError as e:
            s.close()
            raise self._lost(e) from e
        return s

    def answer(self, s: socket.socket, length: int) -> bytes:
        """So many bytes of a file service. Raises Lost where they do not come within `ANSWER_S`."""
        try:
            return self._exactly(s, length, time.monotonic() + ANSWER_S)
        except Overdue as e:
            raise Lost(f"the device has been silent for {ANSWER_S:.0f} s", where=self.serial) from e

    def refused(self, s: socket.socket) -> OSError:
        """What a FAIL packet says."""
        (length,) = struct.unpack("<I", self.answer(s, 4))
        return OSError(self.answer(s, min(length, 4096)).decode("utf-8", "replace"))


class Put:
    """A file that is written on the device; OSError, in the device's words, where it refuses."""

    def __init__(self, wire: Wire, path: bytes | str) -> None:
        path = os.fsencode(path)
        self._wire, self._socket = wire, wire.sync(b"SEND", path + b",%d" % (stat.S_IFREG | 0o600))

    def set_pipelined(self, pipelined: bool) -> None:
        """It always is."""

    def write(self, data: bytes) -> None:
        """The next bytes."""
        for at in range(0, len(data), PIECE):
            piece = data[at:at + PIECE]
            self._send(b"DATA" + struct.pack("<I", len(piece)) + piece)

    def _send(self, data: bytes) -> None:
        try:
            self._socket.settimeout(ANSWER_S)
            self._socket.sendall(data)
        except OSError as e:
            # it may have said why before it hung up
            try:
                if self._wire.answer(self._socket, 4) == b"FAIL":
                    raise self._wire.refused(self._socket) from e
            except Lost:
                pass
            raise self._wire._lost(e) from e

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with _closing(self._socket):
            if error is not None:
                return
            self._send(b"DONE" + struct.pack("<I", int(time.time())))
            answer = self._wire.answer(self._socket, 4)
            if answer == b"FAIL":
                raise self._wire.refused(self._socket)
            if answer != b"OKAY":
                raise OSError(f"the device answers {answer!r} to a file")


class Sftp:
    """The device's files under the names that `_files.Files` knows them by."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def open(self, path: bytes, mode: str) -> Put:
        """To be written."""
        return Put(self._wire, path)

    def getfo(self, path: bytes, file: BinaryIO, **_: Any) -> None:
        """Read a whole file, and compare what came with the size it has. Raises OSError."""
        size, came = self.stat(path).st_size, 0
        with _closing(self._wire.sync(b"RECV", path)) as s:
            while True:
                kind = self._wire.answer(s, 4)
                if kind == b"DATA":
                    (length,) = struct.unpack("<I", self._wire.answer(s, 4))
                    came += length
                    file.write(self._wire.answer(s, length))
                elif kind == b"DONE":
                    break
                elif kind == b"FAIL":
                    raise self._wire.refused(s)
                else:
                    raise OSError(f"the device answers {kind!r} to a file")
        if came % (1 << 32) != size:
            raise OSError(f"{came} of {size} bytes came")

    def stat(self, path: bytes) -> SimpleNamespace:
        """Its size, modulo 2^32. Raises FileNotFoundError."""
        with _closing(self._wire.sync(b"STAT", path)) as s:
            kind, mode, size, _ = struct.unpack("<4sIII", self._wire.answer(s, 16))
        if kind != b"STAT":
            raise OSError(f"the device answers {kind!r} to a question about a file")
        if mode == 0:
            raise FileNotFoundError(f"there is no {os.fsdecode(path)}")
        return SimpleNamespace(st_size=size, st_mode=mode)

    def mkdir(self, path: bytes, mode: int) -> None:
        """Raises OSError."""
        self._do("mkdir", "-m", f"{mode:o}", "--", os.fsdecode(path))

    def chmod(self, path: bytes, mode: int) -> None:
        """Raises OSError."""
        self._do("chmod", f"{mode:o}", os.fsdecode(path))

    def posix_rename(self, path: bytes, new: bytes) -> None:
        """Raises OSError."""
        self._do("mv", "-f", "--", os.fsdecode(path), os.fsdecode(new))

    def _do(self, *words: str) -> None:
        done = self._wire.bare(*words)
        if done.code:
            raise OSError(done.stderr.strip() or done.stdout.strip() or f"{words[0]}: exit code {done.code}")


class _closing:
    """A socket that is closed at the end of a block, and shut down before: adb's server looks at nothing else."""

    def __init__(self, s: socket.socket) -> None:
        self._socket = s

    def __enter__(self) -> socket.socket:
        return self._socket

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
