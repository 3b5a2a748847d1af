"""What goes wrong with a board over ssh, made to happen to a real sshd on loopback: lost and silent connections, hung programs, full disks, two users."""
from __future__ import annotations

import _thread
import os
import secrets
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import sshd

from edgekd.errors import EdgekdError
from edgekd.profiling.transport import Completed, Lost, _connect, _files, local, lock, ssh

BOARD_DATE = '#!/bin/sh\n[ "$1" = +%s ] && exec echo $(($(/bin/date +%s) + {skew}))\nexec /bin/date "$@"\n'


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sshd.Board]:
    with sshd.running(tmp_path_factory.mktemp("sshd")) as running:
        yield running


@pytest.fixture
def proxy(board: sshd.Board) -> Iterator[sshd.Proxy]:
    made = sshd.Proxy(board.port)
    board.trust(made.port)
    yield made
    made.close()


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[str]:
    """A word on the command line of what must be gone in the end."""
    word = f"edgekd-test-{secrets.token_hex(6)}"
    yield word
    assert not (tmp_path / "seen").exists() or int((tmp_path / "seen").read_text()) >= 2, "ps saw it and its child while they ran"
    assert sshd.gone_within(word, 8), f"left running: {sshd.processes(word)}"


def later(seconds: float, what: Callable[[], object]) -> None:
    threading.Timer(seconds, what).start()


def when_started(tmp_path: Path, mark: str, what: Callable[[], object]) -> None:
    """Do `what` once `program` runs, and ps sees it."""
    def wait() -> None:
        until = time.monotonic() + 30
        while not ((tmp_path / "started").exists() and sshd.processes(mark)) and time.monotonic() < until:
            time.sleep(0.02)
        (tmp_path / "seen").write_text(str(len(sshd.processes(mark))))
        what()

    threading.Thread(target=wait, daemon=True).start()


def program(mark: str, started: Path, partial: str = "") -> Sequence[str]:
    """A program that writes a line to `partial`, says on the disk that it runs, and goes on for ever with a child."""
    code = (f"import subprocess, sys, time; open({partial or '/dev/null'!r}, 'w').write('half\\n'); "
            "c = subprocess.Popen(['sh', '-c', 'while :; do sleep 1; done', sys.argv[1]]); "
            f"open({str(started)!r}, 'w'); time.sleep(86400)")
    return [sys.executable, "-S", "-c", code, mark]


# Lost and silent connections --------------------------------------------------------------------------------------------------------------------------------

def test_connection_dropped_mid_run__ends_the_program_and_keeps_what_it_wrote(board: sshd.Board, proxy: sshd.Proxy, tmp_path: Path, mark: str) -> None:
    with board.connect(proxy.port, folder=str(tmp_path)) as way:
        partial = way.run(["sh", "-c", "echo $PWD/partial"], timeout_s=10).stdout.strip()
        when_started(tmp_path, mark, proxy.cut)
        with pytest.raises(Lost, match="was ended there, with its children"):
            way.run(program(mark, tmp_path / "started", partial), timeout_s=60)
        assert not sshd.processes(mark)
        assert way.pull(partial, tmp_path / "back").read_text() == "half\n"
        assert way.run(["echo", "goes on"], timeout_s=10).stdout == "goes on\n"


def test_silent_connection__is_noticed_by_its_heartbeat(board: sshd.Board, proxy: sshd.Proxy, tmp_path: Path, mark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "ANSWER_S", 1.0)

    def stall() -> None:
        proxy.stalled = True
        later(2.5, lambda: (proxy.cut(), setattr(proxy, "stalled", False)))

    with board.connect(proxy.port, folder=str(tmp_path)) as way:
        when_started(tmp_path, mark, stall)
        start = time.monotonic()
        with pytest.raises(Lost, match="was ended there"):
            way.run(program(mark, tmp_path / "started"), timeout_s=60)
        assert time.monotonic() - start < 20


def test_board_out_of_reach__has_a_watchdog_of_its_own(board: sshd.Board, proxy: sshd.Proxy, tmp_path: Path, mark: str) -> None:
    with board.connect(proxy.port, folder=str(tmp_path)) as way:
        when_started(tmp_path, mark, lambda: (setattr(proxy, "closed", True), proxy.cut()))
        with pytest.raises(Lost, match="watchdog"):
            way.run(program(mark, tmp_path / "started"), timeout_s=60)
        assert sshd.gone_within(mark, sshd.QUICK.orphan_s * 1.2 + 4)
    proxy.closed = False
    with board.connect(proxy.port, folder=str(tmp_path)):
        pass
    assert not list(tmp_path.rglob("session-*")), "the next session tidied up"


def test_host_that_dies__leaves_nothing_running_and_the_next_one_tidies_up(board: sshd.Board, tmp_path: Path, mark: str) -> None:
    code = textwrap.dedent(f"""
        import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
        import test_ssh_faults as t, sshd
        from pathlib import Path
        from edgekd.profiling.transport import ssh
        way = ssh.connect(sshd.Board(Path({str(board.keys)!r}), {board.port}, None).target(folder={str(tmp_path)!r}))
        way.pace = sshd.QUICK
        with way:
            way.run(t.program({mark!r}, Path({str(tmp_path / "started")!r})), timeout_s=600)
    """)
    host = subprocess.Popen([sys.executable, "-c", code])
    try:
        until = time.monotonic() + 30
        while not (tmp_path / "started").exists() and time.monotonic() < until:
            time.sleep(0.05)
        assert len(sshd.processes(mark)) >= 2
    finally:
        host.kill()
        host.wait()
    start = time.monotonic()
    with board.connect(folder=str(tmp_path), pace=lock.Pace(beat_s=0.4, orphan_s=60, stale_s=60, poll_s=0.2)) as way:
        assert time.monotonic() - start < 8, "its owner was a process of this machine that has ended: no need to wait for the heartbeat to grow old"
        assert not sshd.processes(mark)
        assert [p.name for p in tmp_path.glob("edgekd-*/session-*")] == [Path(way.run(["pwd"], timeout_s=9).stdout.strip()).name]


def test_connection_dropped_mid_push__is_made_again(board: sshd.Board, proxy: sshd.Proxy, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    for i in range(4):
        (tmp_path / "m" / f"{i}.bin").write_bytes(os.urandom(300_000))
    with board.connect(proxy.port, folder=str(tmp_path)) as way:
        proxy.after_bytes = 700_000
        at = way.push(tmp_path / "m")
        assert proxy.connections == 2
        for i in range(4):
            assert way.pull(f"{at}/{i}.bin", tmp_path / "back").read_bytes() == (tmp_path / "m" / f"{i}.bin").read_bytes()
        assert not list(tmp_path.rglob("*.part"))


def test_connection_lost_mid_push__leaves_no_half_file(board: sshd.Board, proxy: sshd.Proxy, tmp_path: Path) -> None:
    (tmp_path / "big.bin").write_bytes(os.urandom(1_000_000))
    with board.connect(proxy.port, folder=str(tmp_path)) as way:
        cut = proxy.cut

        def cut_and_close() -> None:
            proxy.closed = True
            cut()

        proxy.cut = cut_and_close  # type: ignore[method-assign]
        proxy.after_bytes = 500_000
        with pytest.raises(EdgekdError, match="does not answer"):
            way.push(tmp_path / "big.bin")
        assert not list(tmp_path.glob("edgekd-*/session-*/files/*/big.bin")), "only a whole file has its name"
        proxy.closed, proxy.after_bytes = False, None
        assert way.pull(way.push(tmp_path / "big.bin"), tmp_path / "back").read_bytes() == (tmp_path / "big.bin").read_bytes()
        assert not list(tmp_path.rglob("*.part"))


def test_connection_dropped_mid_pull__is_made_again_and_nothing_half_is_here(board: sshd.Board, proxy: sshd.Proxy, tmp_path: Path) -> None:
    (tmp_path / "big.bin").write_bytes(os.urandom(2_000_000))
    with board.connect(proxy.port, folder=str(tmp_path / "")) as way:
        at = way.push(tmp_path / "big.bin")
        proxy.delay_s = 0.01
        later(0.15, proxy.cut)
        assert way.pull(at, tmp_path / "here/back").read_bytes() == (tmp_path / "big.bin").read_bytes()
        assert [p.name for p in (tmp_path / "here").iterdir()] == ["back"]


def test_close__after_a_lost_connection_tidies_up(board: sshd.Board, proxy: sshd.Proxy, tmp_path: Path) -> None:
    with board.connect(proxy.port, folder=str(tmp_path)) as way:
        way.push(Path(__file__))
        proxy.cut()
    assert [p.name[:7] for p in tmp_path.rglob("*")] == ["edgekd-"]


def test_close__never_raises(board: sshd.Board, proxy: sshd.Proxy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with board.connect(proxy.port, folder=str(tmp_path)) as way:
        proxy.closed = True
        proxy.cut()
    way.close()
    assert "could not be tidied up" in capsys.readouterr().err


# Boards that do not answer ------------------------------------------------------------------------------------------------------------------------------------

def test_dead_board__is_a_clear_error_after_three_tries(board: sshd.Board, capsys: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    with pytest.raises(EdgekdError, match=r"does not answer: Connection refused[\s\S]*hint: .*ssh -v"), board.connect(sshd.free_port()):
        pass
    assert capsys.readouterr().err.count("trying again") == 2 and time.monotonic() - start < 10


def test_board_that_comes_back__is_tried_again(board: sshd.Board, proxy: sshd.Proxy, tmp_path: Path) -> None:
    proxy.closed = True

    def open_after_the_first() -> None:
        while not proxy.connections:
            time.sleep(0.02)
        proxy.closed = False

    threading.Thread(target=open_after_the_first, daemon=True).start()
    with board.connect(proxy.port, folder=str(tmp_path)) as way:
        assert way.run(["echo", "back"], timeout_s=10).stdout == "back\n" and proxy.connections > 1


@pytest.mark.parametrize("after", ["", "SSH-2.0-stuck\r\n"], ids=["no banner", "no key exchange"])
def test_mute_board__is_given_up(board: sshd.Board, after: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mute = socket.create_server(("127.0.0.1", 0))
    open_ones = []

    def serve() -> None:
        while True:
            try:
                one, _ = mute.accept()
                one.sendall(after.encode())
            except OSError:
                return
            open_ones.append(one)

    threading.Thread(target=serve, daemon=True).start()
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh/config").write_text("ConnectTimeout 1\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    start = time.monotonic()
    try:
        with pytest.raises(EdgekdError, match="does not answer"), board.connect(mute.getsockname()[1]):
            pass
        assert len(open_ones) == 3 and time.monotonic() - start < 15
    finally:
        mute.close()
        for one in open_ones:
            one.close()


def test_patience__ends_within_half_a_minute() -> None:
    from edgekd.profiling.transport._route import CONNECT_S

    worst = _connect.TRIES * CONNECT_S + sum(_connect.BACKOFF_S)
    assert worst <= 30 and _connect.PATIENCE_S + CONNECT_S <= 30


def test_unknown_host__is_not_tried_again(board: sshd.Board, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(EdgekdError, match="no host of this name"), ssh.connect(board.target(url="ssh://no-such-host.invalid")):
        pass
    assert "again" not in capsys.readouterr().err


# Hung programs ------------------------------------------------------------------------------------------------------------------------------------------------

def test_hung_program__is_ended_with_all_its_children(board: sshd.Board, tmp_path: Path, mark: str) -> None:
    stubborn = f"trap '' TERM; setsid sh -c 'while :; do sleep 1; done' {mark} & sh -c 'trap \"\" TERM; while :; do sleep 1; done' {mark} & echo up; while :; do sleep 1; done"
    with board.connect(folder=str(tmp_path)) as way:
        start = time.monotonic()
        with pytest.raises(EdgekdError, match=r"no answer within 1 s.*ended there"):
            way.run(["sh", "-c", stubborn, mark], timeout_s=1.0)
        assert time.monotonic() - start < 12
        assert not sshd.processes(mark), "ended before the error is told"
        assert way.run(["echo", "goes on"], timeout_s=10).stdout == "goes on\n"


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A process that was started in the background ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c__ends_the_program_on_the_board(board: sshd.Board, tmp_path: Path, mark: str) -> None:
    with board.connect(folder=str(tmp_path)) as way:
        when_started(tmp_path, mark, lambda: _thread.interrupt_main(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            way.run(program(mark, tmp_path / "started"), timeout_s=60)
        assert not sshd.processes(mark)


def test_close__ends_what_still_runs(board: sshd.Board, tmp_path: Path, mark: str) -> None:
    with board.connect(folder=str(tmp_path)) as way:
        # as if another thread were measuring when the session is closed
        thread = threading.Thread(target=lambda: _ignored(lambda: way.run(program(mark, tmp_path / "started"), timeout_s=60)))
        thread.start()
        until = time.monotonic() + 20
        while not (tmp_path / "started").exists() and time.monotonic() < until:
            time.sleep(0.02)
        assert sshd.processes(mark)
    assert not sshd.processes(mark) and not list(tmp_path.rglob("session-*"))
    thread.join(20)
    assert not thread.is_alive()


def _ignored(what: Callable[[], object]) -> None:
    try:
        what()
    except EdgekdError:
        pass


# Full disks -----------------------------------------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of four megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a small disk needs root and the right to mount: sudo, or a container with --cap-add SYS_ADMIN")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_full_disk__is_seen_before_anything_is_sent(board: sshd.Board, small_disk: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/small").write_bytes(b"x")
    (tmp_path / "model/weights.bin").write_bytes(os.urandom(5_000_000))
    with board.connect(folder=str(small_disk)) as way:
        with pytest.raises(EdgekdError, match=r"no room: model needs 5\.0 MB and [34]\.\d MB are free[\s\S]*hint: .*folder"):
            way.push(tmp_path / "model")
        assert [p.name for p in small_disk.glob("edgekd-*/session-*/files/*")] == []
        (tmp_path / "model/weights.bin").write_bytes(os.urandom(1_000_000))
        assert way.push(tmp_path / "model"), "what fits is pushed afterwards"


def test_disk_that_fills_up_midway__leaves_nothing_of_the_push(board: sshd.Board, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_files.Files, "_room", lambda *_: None)  # as if somebody else filled it after we had looked
    (tmp_path / "model").mkdir()
    (tmp_path / "model/a.bin").write_bytes(os.urandom(1_000_000))
    (tmp_path / "model/b.bin").write_bytes(os.urandom(4_000_000))
    with board.connect(folder=str(small_disk)) as way:
        with pytest.raises(EdgekdError, match=r"no room: b\.bin needs 4\.0 MB and the disk is full"):
            way.push(tmp_path / "model")
        assert [p.name for p in small_disk.glob("edgekd-*/session-*/files/*")] == []
        assert way.run(["echo", "goes on"], timeout_s=10).stdout == "goes on\n"


def test_folder_that_cannot_be_written__is_a_clear_error(board: sshd.Board, tmp_path: Path) -> None:
    with pytest.raises(EdgekdError, match=r"no folder for edgekd[\s\S]*hint: .*folder"), board.connect(folder="/proc"):
        pass


# Two users ------------------------------------------------------------------------------------------------------------------------------------------------------

def test_second_user__waits_and_is_told_who_has_the_board(board: sshd.Board, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with board.connect(folder=str(tmp_path)) as first:
        assert first.run(["true"], timeout_s=9).code == 0
        with pytest.raises(EdgekdError, match=rf"in use by \S+ on \S+ \(process {os.getpid()}\) since \d+ s ago[\s\S]*hint"), board.connect(folder=str(tmp_path), wait_s=4.0):
            pass
        assert "waiting for the board" in capsys.readouterr().err
        assert first.run(["true"], timeout_s=9).code == 0, "and keeps its session, though it was held for longer than a lock stays fresh without a heartbeat"


def test_second_user__goes_on_when_the_first_is_done(board: sshd.Board, tmp_path: Path) -> None:
    order = []
    first = board.connect(folder=str(tmp_path)).__enter__()

    def wait() -> None:
        with board.connect(folder=str(tmp_path)) as second:
            order.append(second.run(["echo", "second"], timeout_s=9).stdout)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.8)
    order.append(first.run(["echo", "first"], timeout_s=9).stdout)
    first.close()
    thread.join(20)
    assert order == ["first\n", "second\n"]


def test_other_account__is_seen_by_its_heartbeat(board: sshd.Board, tmp_path: Path) -> None:
    theirs = tmp_path / "edgekd-anna/lock"
    theirs.mkdir(parents=True)
    (theirs / "owner").write_text("anna laptop 7 x\x1b[2J\n")
    (theirs / "since").write_text(f"{int(time.time()) - 30}\n")
    (theirs / "beat").write_text(f"{int(time.time()) + 2}\n")
    with pytest.raises(EdgekdError, match=r"in use by anna on laptop \(process 7\)"), board.connect(folder=str(tmp_path), wait_s=0.5):
        pass
    assert not list(tmp_path.glob("edgekd-[!a]*/lock"))
    (theirs / "beat").write_text("$(touch pwned) a[$(touch pwned)]\n")
    with board.connect(folder=str(tmp_path)) as way:
        assert way.run(["true"], timeout_s=9).code == 0
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize("skew", [0, 40_000_000, -40_000_000], ids=["same clock", "board ahead by a year", "board behind by a year"])
def test_stale_lock__is_taken_over_by_the_boards_own_clock(skew: int, tmp_path: Path) -> None:
    """Through any transport's run: here the local one, with a board's `date`."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/date").write_text(BOARD_DATE.format(skew=skew))
    (tmp_path / "bin/date").chmod(0o755)

    def run(command: Sequence[str], *, timeout_s: float) -> Completed:
        return local.Local().run(["env", f"PATH={tmp_path}/bin:{os.environ['PATH']}", *command], timeout_s=timeout_s)

    folder = str(tmp_path / "edgekd-me")
    os.mkdir(folder)
    pace = lock.Pace(beat_s=0.3, stale_s=2, poll_s=0.1)
    with lock.held(run, folder, "anna elsewhere 1 a.b.c", 5, pace) as first:
        assert abs(int(Path(folder, "lock/beat").read_text()) - time.time() - skew) < 10
        time.sleep(2.5)
        with pytest.raises(EdgekdError, match="in use by anna on elsewhere"), lock.held(run, folder, None, 0.2, pace):
            pass
        first.taken = True  # ends its heartbeat, as when its machine is cut off
        start = time.monotonic()
        with lock.held(run, folder, None, 5.0, pace) as second:
            waited = time.monotonic() - start
            assert second.id == Path(folder, "lock/id").read_text().strip() and waited < 8
            first.taken = False
            first.beat()
            assert first.taken
            with pytest.raises(EdgekdError, match="somebody else"):
                first.check()
            first.free()
            assert Path(folder, "lock").is_dir(), "a lock is freed by its holder alone"
    assert not os.listdir(folder)


def test_board_taken_meanwhile__is_told_and_not_used(board: sshd.Board, proxy: sshd.Proxy, tmp_path: Path) -> None:
    with board.connect(proxy.port, folder=str(tmp_path)) as way:
        way.push(Path(__file__))
        [held] = tmp_path.glob("edgekd-*/lock")
        (held / "id").write_text("0123456789abcdef\n")
        proxy.cut()
        with pytest.raises(EdgekdError, match="given to somebody else"):
            way.run(["true"], timeout_s=9)
    assert held.is_dir(), "theirs is left alone"


def test_owner__is_known_to_be_gone_on_this_machine_only() -> None:
    user, host, _, identity = lock.me().split()
    ended = subprocess.Popen(["true"])
    ended.wait()
    assert not lock.gone(lock.me())
    assert lock.gone(f"{user} {host} {ended.pid} {identity.rpartition('.')[0]}.1")
    assert lock.gone(f"{user} {host} {os.getpid()} {identity.rpartition('.')[0]}.1"), "the number is another process's now"
    for other in (f"{user} elsewhere {ended.pid} {identity}", f"{user} {host} {ended.pid} 00000000.1.1", f"{user} {host} {ended.pid} -", "somebody", ""):
        assert not lock.gone(other)


def test_guard_left_behind__is_removed(board: sshd.Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "GUARD_S", 0.5)
    with board.connect(folder=str(tmp_path)):
        [root] = tmp_path.glob("edgekd-*")
    (root / "guard").mkdir()
    with board.connect(folder=str(tmp_path)) as way:
        assert way.run(["true"], timeout_s=9).code == 0 and not (root / "guard").exists()


def test_lock__many_at_once_never_overlap(tmp_path: Path) -> None:
    folder = str(tmp_path / "edgekd-me")
    os.mkdir(folder)
    inside, most, done = [0], [0], []
    pace = lock.Pace(beat_s=0.5, stale_s=20, poll_s=0.05)

    def one() -> None:
        with lock.held(local.Local().run, folder, None, 30, pace):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.05)
            inside[0] -= 1
            done.append(1)

    threads = [threading.Thread(target=one) for _ in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(40)
    assert len(done) == 6 and most[0] == 1
