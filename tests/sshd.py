"""A board for tests: Debian's sshd on loopback with keys of its own, and a proxy before it that can cut, stall or delay the connection."""
from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from edgekd.profiling.transport import ssh
from edgekd.profiling.transport.lock import Pace
from edgekd.target import Device, Support, Target

QUICK = Pace(beat_s=0.4, orphan_s=4.0, stale_s=3.0, poll_s=0.2)
"""Heartbeats fast enough for tests."""


def program() -> str:
    """The path of sshd; the test is skipped where it is not installed."""
    found = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
    if not found or not shutil.which("ssh-keygen"):
        pytest.skip("no ssh server here: apt-get install openssh-server")
    return found


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@dataclass
class Board:
    """A running sshd. `port` is where tests connect, which may be a proxy's."""

    keys: Path
    port: int
    process: subprocess.Popen[bytes]
    options: tuple[str, ...] = ()
    known: Path = field(init=False)

    def __post_init__(self) -> None:
        self.known = self.keys / "known"
        self.trust(self.port)

    def trust(self, port: int) -> None:
        """Let known_hosts hold this board's key at a port."""
        line = f"[127.0.0.1]:{port} {(self.keys / 'host.pub').read_text()}"
        self.known.write_text((self.known.read_text() if self.known.exists() else "") + line)

    @property
    def key(self) -> Path:
        """The private key that logs in."""
        return self.keys / "user"

    def url(self, port: int | None = None) -> str:
        """Its address."""
        return f"ssh://{getpass.getuser()}@127.0.0.1:{port or self.port}"

    def target(self, port: int | None = None, **device: object) -> Target:
        """A target at this board."""
        told = {"transport": "ssh", "how": "a test", "url": self.url(port), "ssh_key": self.key, "known_hosts": self.known, **device}
        return Target(name="board", description="a test", device=Device.model_validate(told), formats={"onnx": Support(schemes=["fp32"])})

    def connect(self, port: int | None = None, wait_s: float = 20, pace: Pace = QUICK, **device: object) -> ssh.Ssh:
        """A session that is not entered yet."""
        way = ssh.connect(self.target(port, **device))
        way.pace, way.wait_s = pace, wait_s
        return way

    def stop(self) -> None:
        """End sshd and every process below it."""
        below = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        self.process.terminate()
        self.process.wait()
        for child in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


def make_keys(folder: Path) -> Path:
    """A host key, a user key that the host takes, and the authorized file."""
    program()
    folder.mkdir(mode=0o700, exist_ok=True, parents=True)
    for name in ("host", "user"):
        if not (folder / name).exists():
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "authorized").write_text((folder / "user.pub").read_text())
    return folder


def start(folder: Path, *options: str, port: int | None = None) -> Board:
    """Start sshd with its keys in `folder`; `options` are lines of sshd_config."""
    sshd, keys, port = program(), make_keys(folder), port or free_port()
    with contextlib.suppress(OSError):  # privilege separation wants it, and only root can make it
        os.makedirs("/run/sshd", exist_ok=True)
    said = ["AuthorizedKeysFile=" + str(keys / "authorized"), "UsePAM=no", "StrictModes=no", "ListenAddress=127.0.0.1", "PidFile=none",
            "Subsystem=sftp internal-sftp", "PasswordAuthentication=no", "KbdInteractiveAuthentication=no", "MaxStartups=100"]
    # the first value of an option wins; bash reads no startup files below another shell, which makes tests quick
    said = [*options, *said, "SetEnv=SHLVL=3"]
    command = [sshd, "-D", "-e", "-p", str(port), "-h", str(keys / "host"), "-f", "/dev/null", *(w for o in said for w in ("-o", o))]
    process = subprocess.Popen(command, stderr=open(keys / "log", "ab"))  # noqa: SIM115
    _answering(port, process, keys / "log")
    return Board(keys, port, process, options)


def _answering(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(200):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        if process.poll() is not None:
            pytest.fail(f"sshd did not start: {log.read_text()}")
        time.sleep(0.02)
    pytest.fail("sshd does not answer")


@contextlib.contextmanager
def running(folder: Path, *options: str) -> Iterator[Board]:
    """`start` for a block."""
    board = start(folder, *options)
    try:
        yield board
    finally:
        board.stop()


class Proxy:
    """A TCP proxy to a port, with faults: `cut` breaks all connections, `stall` lets them hang, `closed` refuses new ones, `after_bytes` cuts by itself."""

    def __init__(self, port: int) -> None:
        self.behind = port
        self.stalled = self.closed = False
        self.after_bytes: int | None = None
        self.delay_s = 0.0
        self.connections = 0
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                one, _ = self._server.accept()
            except OSError:
                return
            self.connections += 1
            if self.closed:
                _reset(one)
                continue
            try:
                other = socket.create_connection(("127.0.0.1", self.behind))
            except OSError:
                _reset(one)
                continue
            self._pairs.append((one, other))
            for a, b, outwards in ((one, other, True), (other, one, False)):
                threading.Thread(target=self._copy, args=(a, b, outwards), daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket, outwards: bool) -> None:
        try:
            while data := source.recv(1 << 15):
                while self.stalled:
                    time.sleep(0.02)
                if self.delay_s:
                    time.sleep(self.delay_s)
                if outwards and self.after_bytes is not None:
                    self.after_bytes -= len(data)
                    if self.after_bytes < 0:
                        self.after_bytes = None
                        self.cut()
                        return
                sink.sendall(data)
        except OSError:
            pass
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """Break every connection, as a pulled plug and its reset do."""
        pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for one in pair:
                _reset(one)

    def close(self) -> None:
        """Stop listening and break everything."""
        self.stalled = False
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self.cut()


def _reset(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()


def processes(mark: str) -> list[str]:
    """Command lines of all running processes that have `mark` in them, by ps."""
    listed = subprocess.run(["ps", "-eww", "-o", "pid=,stat=,args="], capture_output=True, text=True, check=True).stdout.splitlines()
    found = [line for line in listed if mark in line and str(os.getpid()) != line.split()[0]]
    return [line for line in found if not line.split()[1].startswith("Z")]


def gone_within(mark: str, seconds: float) -> bool:
    """Whether no process with `mark` is left, at the latest after `seconds`."""
    until = time.monotonic() + seconds
    while processes(mark):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def words_of(*words: object) -> Sequence[str]:
    """Words of a command as text."""
    return [str(w) for w in words]
