"""An Android device that is none: adb's wire protocol over TCP (AOSP packages/modules/adb: protocol.txt, SERVICES.TXT, SYNC.TXT, shell_protocol.h), behind
a real adb server. Commands run in /bin/sh here, with fake `getprop` and the like first on their PATH; /data/local/tmp is a folder of the test's.

What can go wrong is a field of `Faults`, changed while it runs.
"""
from __future__ import annotations

import contextlib
import os
import queue
import secrets
import socket
import struct
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CNXN, AUTH, OPEN, OKAY, WRTE, CLSE = (int.from_bytes(n, "little") for n in (b"CNXN", b"AUTH", b"OPEN", b"OKAY", b"WRTE", b"CLSE"))
VERSION = 0x01000001  # from which on nobody looks at checksums
MOST = 1 << 18
PLACE = b"/data/local/tmp"


@dataclass
class Faults:
    """What is wrong with the device."""

    unauthorized: bool = False
    """It asks who is there and is never content."""
    hangs_up: bool = False
    """It takes the connection and drops it at the first word."""
    damaged: bool = False
    """The heads of the packets with its answers have a wrong check word."""
    features: str = "shell_v2,cmd"
    gone_after_bytes: int | None = None
    """Of files: then the connection breaks, once."""
    gone_in_shell: str | None = None
    """A word in a script: the connection breaks when one with it has begun, once."""
    full_after_bytes: int | None = None
    """Of files: then there is no room."""
    lies: int = 0
    """Bytes that the size of a file is told wrong by."""
    short_stat: bool = False
    """Half an answer to a question about a file, and the stream is closed."""
    short_recv: int = 0
    """Bytes that are missing at the end of a file that is read."""


class FakePhone:
    """Listens on 127.0.0.1 at `port`. `root` stands for /data/local/tmp; `programs`, first on the PATH of commands, is filled by whoever makes it."""

    def __init__(self, folder: Path, faults: Faults | None = None) -> None:
        self.root, self.programs, self.faults = folder / "phone", folder / "bin", faults or Faults()
        for made in (self.root, self.programs):
            made.mkdir(parents=True)
        self.came = 0
        """Bytes of files so far."""
        self.services: list[str] = []
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self.serial = f"127.0.0.1:{self.port}"
        self._lines: list[_Line] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def program(self, name: str, text: str) -> Path:
        """Write a script that commands of the device find."""
        path = self.programs / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def _listen(self) -> None:
        while True:
            try:
                peer, _ = self._listening.accept()
            except OSError:
                return
            line = _Line(self, peer)
            self._lines.append(line)
            threading.Thread(target=line.serve, daemon=True).start()

    def hang_up(self) -> None:
        """The cable is out."""
        for line in self._lines:
            line.close()
        self._lines.clear()

    def close(self) -> None:
        """Gone for good, with everything that it runs."""
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self.hang_up()


class _Line:
    """A connection of adb's server."""

    def __init__(self, phone: FakePhone, peer: socket.socket) -> None:
        self.phone, self.peer = phone, peer
        self._turn, self._streams, self._next = threading.Lock(), dict[int, _Stream](), 1

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.peer.shutdown(socket.SHUT_RDWR)
        self.peer.close()
        for stream in list(self._streams.values()):
            stream.end()

    def send(self, command: int, first: int, second: int, data: bytes = b"") -> None:
        check = command ^ (0xFFFF0FFF if self.phone.faults.damaged and command == WRTE else 0xFFFFFFFF)
        head = struct.pack("<6I", command, first, second, len(data), sum(data) & 0xFFFFFFFF, check)
        with self._turn, contextlib.suppress(OSError):
            self.peer.sendall(head + data)

    def _exactly(self, length: int) -> bytes:
        found = b""
        while len(found) < length:
            piece = self.peer.recv(length - len(found))
            if not piece:
                raise EOFError
            found += piece
        return found

    def serve(self) -> None:
        try:
            while True:
                command, first, second, length, _, magic = struct.unpack("<6I", self._exactly(24))
                assert magic == command ^ 0xFFFFFFFF
                self._take(command, first, second, self._exactly(length) if length else b"")
        except (EOFError, OSError):
            self.close()

    def _take(self, command: int, first: int, second: int, data: bytes) -> None:
        faults = self.phone.faults
        if command == CNXN:
            if faults.hangs_up:
                raise EOFError
            if faults.unauthorized:
                return self.send(AUTH, 1, 0, secrets.token_bytes(20))
            banner = f"device::ro.product.name=fake;ro.product.model=Fake;ro.product.device=fake;features={faults.features}"
            self.send(CNXN, VERSION, MOST, banner.encode())
        elif command == AUTH and first == 2:  # a signature: of no key that it knows
            self.send(AUTH, 1, 0, secrets.token_bytes(20))
        elif command == OPEN:
            service = data.rstrip(b"\0").replace(PLACE, os.fsencode(self.phone.root)).decode()
            self.phone.services.append(service)
            stream = _Stream(self, self._next, first)
            self._streams[self._next] = stream
            self._next += 1
            self.send(OKAY, stream.own, stream.other)
            threading.Thread(target=stream.serve, args=(service,), daemon=True).start()
        elif command in (WRTE, OKAY, CLSE) and second in self._streams:
            stream = self._streams[second]
            if command == WRTE:
                stream.coming.put(data)
                self.send(OKAY, stream.own, stream.other)
            elif command == OKAY:
                stream.taken.release()
            else:
                stream.end()
                self.send(CLSE, stream.own, stream.other)
                self._streams.pop(second, None)


class _Stream:
    """One service in use."""

    def __init__(self, line: _Line, own: int, other: int) -> None:
        self.line, self.own, self.other = line, own, other
        self.coming: queue.Queue[bytes | None] = queue.Queue()
        self.taken, self._rest, self.over = threading.Semaphore(0), b"", False

    def end(self) -> None:
        self.over = True
        self.coming.put(None)
        self.taken.release()

    def write(self, data: bytes) -> None:
        for at in range(0, len(data), MOST):
            if self.over:
                return
            self.line.send(WRTE, self.own, self.other, data[at:at + MOST])
            self.taken.acquire()

    def some(self) -> bytes:
        """Whatever came, nothing at the end."""
        if self._rest:
            found, self._rest = self._rest, b""
            return found
        return self.coming.get() or b""

    def exactly(self, length: int) -> bytes:
        while len(self._rest) < length:
            piece = self.coming.get()
            if not piece:
                raise EOFError
            self._rest += piece
        found, self._rest = self._rest[:length], self._rest[length:]
        return found

    def serve(self, service: str) -> None:
        kind, _, command = service.partition(":")
        try:
            if kind == "sync":
                while _sync(self):
                    pass
            elif kind.split(",")[0] == "shell":
                _shell(self, command, v2="v2" in kind.split(","))
        except EOFError:
            pass
        if not self.over:
            self.line.send(CLSE, self.own, self.other)


# --- files

def _sync(stream: _Stream) -> bool:
    """One request of a file service; whether there may be another."""
    phone = stream.line.phone
    kind, length = struct.unpack("<4sI", stream.exactly(8))
    if kind == b"QUIT":
        return False
    path = stream.exactly(length).replace(PLACE, os.fsencode(phone.root))
    if kind == b"STAT":
        found = Path(os.fsdecode(path))
        there = found.exists()
        answer = struct.pack("<4sIII", b"STAT", found.stat().st_mode if there else 0, found.stat().st_size + phone.faults.lies if there else 0, 1)
        stream.write(answer[:7] if phone.faults.short_stat else answer)
        return not phone.faults.short_stat
    if kind == b"SEND":
        return _take_file(stream, phone, path)
    if kind == b"RECV":
        try:
            data = Path(os.fsdecode(path)).read_bytes()
        except OSError as e:
            return _fail(stream, f"open failed: {e.strerror}")
        data = data[:len(data) - phone.faults.short_recv]
        for at in range(0, len(data), 1 << 16):
            piece = data[at:at + (1 << 16)]
            stream.write(b"DATA" + struct.pack("<I", len(piece)) + piece)
        stream.write(b"DONE" + struct.pack("<I", 0))
        return True
    return _fail(stream, f"unknown request {kind!r}")


def _take_file(stream: _Stream, phone: FakePhone, path: bytes) -> bool:
    faults = phone.faults
    name, _, mode = path.rpartition(b",")
    try:
        file: Any = open(name, "wb")  # noqa: SIM115  it may be closed in the middle of anything
    except OSError as e:
        return _fail(stream, f"couldn't create file: {e.strerror}")
    with file:
        while True:
            kind, length = struct.unpack("<4sI", stream.exactly(8))
            if kind == b"DONE":
                break
            file.write(stream.exactly(length))
            phone.came += length
            if faults.gone_after_bytes is not None and phone.came > faults.gone_after_bytes:
                faults.gone_after_bytes = None
                stream.line.close()
                raise EOFError
            if faults.full_after_bytes is not None and phone.came > faults.full_after_bytes:
                os.unlink(name)
                return _fail(stream, "write failed: No space left on device")
    os.chmod(name, int(mode) & 0o777)
    stream.write(b"OKAY" + struct.pack("<I", 0))
    return True


def _fail(stream: _Stream, why: str) -> bool:
    stream.write(b"FAIL" + struct.pack("<I", len(why)) + why.encode())
    return False


# --- commands

def _shell(stream: _Stream, command: str, *, v2: bool) -> None:
    phone = stream.line.phone
    environment = {**os.environ, "PATH": f"{phone.programs}:{os.environ['PATH']}", "HOME": "/"}
    process = subprocess.Popen(["/bin/sh", "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE if v2 else subprocess.STDOUT,
                               start_new_session=True, env=environment, cwd="/")
    assert process.stdin and process.stdout
    threading.Thread(target=_feed, args=(stream, process, v2), daemon=True).start()
    pumps = [threading.Thread(target=_pump, args=(stream, pipe, kind if v2 else None), daemon=True)
             for pipe, kind in ((process.stdout, 1), (process.stderr, 2)) if pipe]
    for pump in pumps:
        pump.start()
    for pump in pumps:
        pump.join()
    code = process.wait()
    if v2:
        stream.write(struct.pack("<BIB", 3, 1, code & 0xFF))


def _feed(stream: _Stream, process: subprocess.Popen[bytes], v2: bool) -> None:
    """What the other end writes, to the program's input."""
    phone, given = stream.line.phone, b""
    assert process.stdin
    with contextlib.suppress(EOFError, OSError), process.stdin as pipe:
        while v2:
            kind, length = struct.unpack("<BI", stream.exactly(5))
            data = stream.exactly(length)
            if kind == 4:
                break
            data = data.replace(PLACE, os.fsencode(phone.root))
            given += data
            pipe.write(data)
            pipe.flush()
        while not v2 and (data := stream.some()):
            pipe.write(data)
            pipe.flush()
    word = phone.faults.gone_in_shell
    if word is not None and word.encode() in given:
        phone.faults.gone_in_shell = None
        threading.Timer(0.6, phone.hang_up).start()


def _pump(stream: _Stream, pipe: Any, kind: int | None) -> None:
    with pipe:
        while data := pipe.read1(1 << 15):
            stream.write(data if kind is None else struct.pack("<BI", kind, len(data)) + data)
