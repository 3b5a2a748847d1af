"""A board over ssh, against a real sshd on loopback: addresses, keys, ~/.ssh/config, commands, files, what is there. Faults are in test_ssh_faults."""
from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sshd
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekd.errors import EdgekdError, UsageError
from edgekd.profiling.transport import Completed, _board, _probe, reach, ssh
from edgekd.profiling.transport._elf import check_arch, machine_of
from edgekd.profiling.transport._route import Address, Config
from edgekd.target import Device

RELAY = """
import socket, sys, threading
s = socket.create_connection((sys.argv[1], int(sys.argv[2])))
def out():
    while data := s.recv(65536):
        sys.stdout.buffer.write(data); sys.stdout.buffer.flush()
    sys.stdout.close()
threading.Thread(target=out, daemon=True).start()
while data := sys.stdin.buffer.read1(65536):
    s.sendall(data)
"""
ECHO = "import json, os, sys; print(json.dumps([os.fsencode(a).hex() for a in sys.argv[1:]]))"


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sshd.Board]:
    with sshd.running(tmp_path_factory.mktemp("sshd")) as running:
        yield running


@pytest.fixture(scope="module")
def session(board: sshd.Board, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ssh.Ssh]:
    with board.connect(folder=str(tmp_path_factory.mktemp("board"))) as way:
        yield way


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with an empty .ssh and no agent."""
    (tmp_path / "home/.ssh").mkdir(parents=True, mode=0o700)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return tmp_path / "home"


# Addresses ------------------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("url", "said"), [("ssh://pi@board:2222", ("board", "pi", 2222)), ("ssh://Jetson", ("Jetson", None, None)),
                                           ("ssh://a.b@[::1]:22/", ("::1", "a.b", 22)), ("ssh://pi%2Bx@192.168.0.7", ("192.168.0.7", "pi+x", None))])
def test_address__is_read(url: str, said: tuple[object, ...]) -> None:
    at = Address.parse(url)
    assert (at.host, at.user, at.port) == said


@pytest.mark.parametrize("url", ["ssh://", "ssh://@", "board", "http://board", "ssh://board:port", "ssh://board:70000", "ssh://board:0", "ssh://board/tmp", "ssh://board?x=1",
                                 "ssh://-oProxyCommand=x", "ssh://a b", "ssh://$(touch x)@board", "ssh://x;y", "ssh://-l@board", "ssh://pi:secret@board", "ssh://`x`", "ssh://b\nUser x"])
def test_malformed_address__is_wrong_usage(url: str, board: sshd.Board) -> None:
    with pytest.raises(UsageError, match="address"):
        ssh.connect(board.target(url=url))


def test_missing_files__are_wrong_usage_before_anything_is_contacted(board: sshd.Board, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="ssh key"):
        ssh.connect(board.target(ssh_key=tmp_path / "none"))
    with pytest.raises(UsageError, match="host keys"):
        ssh.connect(board.target(known_hosts=tmp_path / "none"))
    with pytest.raises(UsageError, match="public half"):
        ssh.connect(board.target(ssh_key=board.keys / "user.pub"))


def test_missing_paramiko__says_what_to_install(board: sshd.Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "paramiko", None)
    with pytest.raises(EdgekdError, match=r"pip install 'edgekd\[devices\]'"):
        ssh.connect(board.target())


def test_reach__leads_to_ssh(board: sshd.Board) -> None:
    assert reach(board.target()).name == "ssh"


# ~/.ssh/config ---------------------------------------------------------------------------------------------------------------------------------------------

def test_config__tells_host_user_port_key_and_known_hosts(board: sshd.Board, home: Path, tmp_path: Path) -> None:
    (home / ".ssh/more").write_text(f"Host nano\n  HostName 127.0.0.1\n  Port {board.port}\n  IdentityFile {board.key}\n  UserKnownHostsFile {board.known}\n  ConnectTimeout 3\n")
    (home / ".ssh/config").write_text("Include more\nHost *\n  ConnectTimeout 90\n")
    target = board.target(url="ssh://nano", ssh_key=None, known_hosts=None, folder=str(tmp_path))
    with reach(target) as way:
        assert isinstance(way, ssh.Ssh) and way.hops[-1].timeout_s == 3
        assert way.run(["echo", "through the config"], timeout_s=10).stdout == "through the config\n"


def test_config__address_goes_before_it(home: Path) -> None:
    (home / ".ssh/config").write_text("Host b\n  User config\n  Port 1\n  ProxyCommand relay %h %p %r\n")
    [hop] = Config().route(Address("b", "me", 7))
    assert (hop.user, hop.port, hop.proxy) == ("me", 7, "relay b 7 me")


def test_config__jump_hosts_follow_each_other(home: Path) -> None:
    (home / ".ssh/config").write_text("Host board\n ProxyJump a,root@b:33\nHost a\n HostName gate.example\n User anna\n ProxyJump outer\nHost outer\n Port 99\n")
    assert [str(h) for h in Config().route(Address("board", "pi"))] == [f"{os.environ.get('USER') or 'root'}@[outer]:99", "anna@gate.example", "root@[b]:33", "pi@board"]


def test_config__jump_hosts_in_a_circle_are_an_error(home: Path) -> None:
    (home / ".ssh/config").write_text("Host a\n ProxyJump b\nHost b\n ProxyJump a\n")
    with pytest.raises(EdgekdError, match="circle"):
        Config().route(Address("a"))


def test_config__unreadable_is_an_error(home: Path) -> None:
    (home / ".ssh/config").write_text("Host a\n!!\n")
    with pytest.raises(EdgekdError, match="ssh configuration"):
        Config().route(Address("a"))


def test_jump_hosts__are_gone_through_with_their_own_host_keys_checked(board: sshd.Board, home: Path, tmp_path: Path) -> None:
    with sshd.running(tmp_path / "gate") as gate, sshd.running(tmp_path / "inner") as inner:
        known = "".join(b.known.read_text() for b in (gate, inner))
        (home / ".ssh/known_hosts").write_text(known)
        (home / ".ssh/config").write_text(f"Host gate\n HostName 127.0.0.1\n Port {gate.port}\n IdentityFile {gate.key}\n"
                                          f"Host inner\n HostName 127.0.0.1\n Port {inner.port}\n IdentityFile {inner.key}\n"
                                          f"Host far\n HostName 127.0.0.1\n Port {board.port}\n ProxyJump gate,inner\n")
        target = board.target(url="ssh://far", folder=str(tmp_path))
        with reach(target) as way:
            seen = way.run(["sh", "-c", "echo $SSH_CONNECTION"], timeout_s=10).stdout.split()
            assert seen[3] == str(board.port) and isinstance(way, ssh.Ssh) and len(way.hops) == 3
        (home / ".ssh/known_hosts").write_text(gate.known.read_text())
        with pytest.raises(EdgekdError, match=rf"host key of \[127.0.0.1\]:{inner.port} is not known"), reach(target):
            pass


def test_proxy_command__is_run_by_the_shell(board: sshd.Board, home: Path, tmp_path: Path) -> None:
    (tmp_path / "relay.py").write_text(RELAY)
    (home / ".ssh/config").write_text(f"Host far\n HostName 127.0.0.1\n Port {board.port}\n ProxyCommand {sys.executable} '{tmp_path}/relay.py' %h %p 2>/dev/null\n")
    with reach(board.target(url="ssh://far", folder=str(tmp_path))) as way:
        assert way.run(["echo", "relayed"], timeout_s=10).stdout == "relayed\n"
    assert sshd.gone_within(f"{tmp_path}/relay.py", 3)


# Keys -----------------------------------------------------------------------------------------------------------------------------------------------------

def test_unknown_host_key__is_refused_with_its_fingerprint_and_the_command_to_add_it(board: sshd.Board, tmp_path: Path) -> None:
    empty = tmp_path / "known hosts"
    empty.write_text("")
    with pytest.raises(EdgekdError) as told, reach(board.target(known_hosts=empty, folder=str(tmp_path))):
        pass
    printed = subprocess.run(["ssh-keygen", "-lf", board.keys / "host.pub"], capture_output=True, text=True).stdout.split()[1]
    assert "host key" in str(told.value) and printed in str(told.value)
    add = str(told.value.hint).rpartition("same, `")[2].rstrip("`")
    assert add.startswith("ssh-keyscan -p")
    subprocess.run(["sh", "-c", add], check=True, capture_output=True)
    with reach(board.target(known_hosts=empty, folder=str(tmp_path))) as way:
        assert way.run(["true"], timeout_s=10).code == 0


def test_changed_host_key__is_refused(board: sshd.Board, tmp_path: Path) -> None:
    proxy = sshd.Proxy(board.port)
    wrong = tmp_path / "wrong"
    wrong.write_text(f"[127.0.0.1]:{proxy.port} ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl\n")
    try:
        with pytest.raises(EdgekdError, match=r"host key.*\n.*ssh-keygen -R") as told, reach(board.target(proxy.port, known_hosts=wrong)):
            pass
        assert told.value.exit_code == 1 and proxy.connections == 1, "never tried again"
    finally:
        proxy.close()


def test_hashed_known_hosts__are_read(board: sshd.Board, tmp_path: Path) -> None:
    known = tmp_path / "known"
    known.write_text(board.known.read_text())
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", known], check=True, capture_output=True)
    assert "127.0.0.1" not in known.read_text()
    with reach(board.target(known_hosts=known, folder=str(tmp_path))) as way:
        assert way.run(["true"], timeout_s=10).code == 0


def test_revoked_host_key__is_refused_though_known(board: sshd.Board, tmp_path: Path) -> None:
    known = tmp_path / "known"
    known.write_text(board.known.read_text() + "@revoked * " + (board.keys / "host.pub").read_text())
    with pytest.raises(EdgekdError, match="revoked"), reach(board.target(known_hosts=known)):
        pass


def test_damaged_known_hosts__is_an_error(board: sshd.Board, tmp_path: Path) -> None:
    known = tmp_path / "known"
    known.write_text(f"[127.0.0.1]:{board.port} ssh-ed25519 A\n")
    with pytest.raises(EdgekdError, match="host key"), reach(board.target(known_hosts=known)):
        pass


def test_refused_key__is_tried_once_and_nothing_is_asked(board: sshd.Board, tmp_path: Path, home: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "other"], check=True)
    proxy = sshd.Proxy(board.port)
    board.trust(proxy.port)
    try:
        with pytest.raises(EdgekdError, match=r"none of our keys.*\n.*ssh-copy-id"), reach(board.target(proxy.port, ssh_key=tmp_path / "other")):
            pass
        assert proxy.connections == 1
    finally:
        proxy.close()


def test_no_key_at_all__says_how_to_make_one(board: sshd.Board, home: Path) -> None:
    with pytest.raises(EdgekdError, match="ssh-keygen -t ed25519"), reach(board.target(ssh_key=None)):
        pass


def test_second_factor__is_an_error_and_no_prompt(tmp_path: Path, home: Path) -> None:
    with sshd.running(tmp_path / "two", "AuthenticationMethods=publickey,password", "PasswordAuthentication=yes") as strict, \
            pytest.raises(EdgekdError, match="password or code"), reach(strict.target()):
        pass


def test_encrypted_key__needs_an_agent_and_uses_it(board: sshd.Board, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = tmp_path / "locked"
    shutil.copyfile(board.key, locked)
    locked.chmod(0o600)
    subprocess.run(["ssh-keygen", "-q", "-p", "-P", "", "-N", "a secret", "-f", locked], check=True, capture_output=True)
    target = board.target(ssh_key=locked, folder=str(tmp_path))
    with pytest.raises(EdgekdError, match=r"passphrase.*\n.*ssh-add"), reach(target):
        pass
    ask = tmp_path / "ask"
    ask.write_text("#!/bin/sh\necho a secret\n")
    ask.chmod(0o700)
    said = subprocess.run(["ssh-agent", "-s", "-a", str(tmp_path / "agent")], capture_output=True, text=True, check=True).stdout
    pid = int(said.partition("SSH_AGENT_PID=")[2].partition(";")[0])
    try:
        monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "agent"))
        subprocess.run(["ssh-add", "-q", locked], check=True, env={**os.environ, "SSH_ASKPASS": str(ask), "SSH_ASKPASS_REQUIRE": "force"}, stdin=subprocess.DEVNULL)
        with reach(target) as way:
            assert way.run(["echo", "in"], timeout_s=10).stdout == "in\n"
    finally:
        os.kill(pid, signal.SIGTERM)


# Commands -------------------------------------------------------------------------------------------------------------------------------------------------

def test_run__gives_exit_code_and_both_outputs(session: ssh.Ssh) -> None:
    assert session.run(["sh", "-c", "echo out; echo err >&2; cat; exit 7"], timeout_s=10) == Completed(7, "out\n", "err\n")
    assert session.run(["no-such-program-here"], timeout_s=10).code == 127
    assert session.run(["sh", "-c", "kill -9 $$"], timeout_s=10).code == 137
    assert session.run(["printf", "no end of line"], timeout_s=10).stdout == "no end of line"


def test_run__large_output_on_both_does_not_hang_and_is_limited(session: ssh.Ssh) -> None:
    code = "import os\nfor i in range(300):\n    os.write(1, b'o' * 65536); os.write(2, b'e' * 65536)\nos.write(1, b'END')"
    done = session.run([sys.executable, "-c", code], timeout_s=60)
    assert done.code == 0 and done.stdout.endswith("END") and "bytes left out" in done.stderr
    assert 8 << 20 <= len(done.stdout) < 9 << 20


def test_run__ends_what_a_program_leaves_behind(session: ssh.Ssh) -> None:
    start = time.monotonic()
    done = session.run(["sh", "-c", "sleep 86311 & setsid sleep 86312 & echo started"], timeout_s=30)
    assert done.stdout == "started\n" and time.monotonic() - start < 15
    assert sshd.gone_within("sleep 8631", 2)


def test_startup_files_that_print__do_not_reach_the_output(tmp_path: Path) -> None:
    noisy = 'ForceCommand=printf "welcome, no newline"; echo noise >&2; eval "$SSH_ORIGINAL_COMMAND"'
    with sshd.running(tmp_path / "keys", noisy) as board, board.connect(folder=str(tmp_path)) as way:
        assert way.run(["echo", "mine"], timeout_s=10) == Completed(0, "mine\n", "")
        with pytest.raises(EdgekdError, match=r"SFTP"):
            way.push(Path(__file__))


def test_account_without_a_shell__is_a_clear_error(tmp_path: Path) -> None:
    with sshd.running(tmp_path / "keys", "ForceCommand=echo This account is not available.; exit 1") as board, \
            pytest.raises(EdgekdError, match=r"runs no commands.*not available"), board.connect(folder=str(tmp_path)):
        pass


@pytest.mark.parametrize("shell", [["dash"], ["bash", "--posix"], ["busybox", "sh"]], ids=lambda s: s[0])
@pytest.mark.parametrize("setsid", [True, False], ids=["setsid", "no setsid"])
def test_scripts__need_no_more_than_posix_sh(shell: list[str], setsid: bool, tmp_path: Path) -> None:
    if not shutil.which(shell[0]):
        pytest.skip(f"apt-get install {shell[0]}")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ["sleep", "rm", "grep", "sed", "sh", "echo", "true", "touch", *(["setsid"] if setsid else [])]:
        os.symlink(shutil.which(name) or "", tools / name)
    folder = tmp_path / "session-0123"
    (folder / "tmp").mkdir(parents=True)
    (tmp_path / "beat").write_text("1\n")

    def say(script: _board.Script, *words: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run([shutil.which(shell[0]) or "", *shell[1:]], input=script.said(words, "mark"), capture_output=True, env={"PATH": str(tools)}, start_new_session=True, timeout=30)

    done = say(_board.RUN, str(folder), "1", str(tmp_path / "beat"), "1", "20", "sh", "-c", "echo $0 $1; exit 5", "a b", "$c")
    assert (done.returncode, done.stdout) == (5, b"mark\na b $c\n"), done.stderr
    mark = f"sleep {86400 + os.getpid() % 1000}.{len(shell)}{setsid:d}"
    start = time.monotonic()
    done = say(_board.RUN, str(folder), "2", str(tmp_path / "beat"), "1", "2", "sh", "-c", f"trap '' TERM; echo up; {mark} & {mark} & wait; wait")
    assert done.returncode == 137 and b"up" in done.stdout, "its watchdog saw no heartbeat"
    assert time.monotonic() - start < 15 and not sshd.processes(mark)
    assert [p.name for p in folder.iterdir()] == ["tmp"]


# No shell ever reads a name ----------------------------------------------------------------------------------------------------------------------------------

WORDS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40)
NASTY = st.sampled_from(["$(touch pwned)", "`touch pwned`", "; touch pwned", "' ; touch pwned ; '", '"; touch pwned; "', "a\nb", "-rf", "--", "*", "~", "!!", "\\", "'", '"', "\\'",
                         "%s", "$HOME", "&", "|", "\r", "\x1b[2J", "\udc80\udcff", "{a,b}", "#", "a b", "", "é", "名前", "🦀", "mark", "EOF\nexit 9\n"])
NAMES = st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=30).filter(
    lambda n: n not in (".", "..") and len(n.encode()) < 200) | NASTY.filter(lambda n: n != "" and "/" not in n)
QUIET = settings(max_examples=25, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@QUIET
@given(words=st.lists(WORDS | NASTY, max_size=6))
def test_run__words_arrive_as_they_are(session: ssh.Ssh, words: list[str]) -> None:
    done = session.run([sys.executable, "-S", "-c", ECHO, *words], timeout_s=30)
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout) == [os.fsencode(w).hex() for w in words]


@QUIET
@given(name=NAMES, inner=NAMES, text=st.binary(max_size=50))
def test_push__names_arrive_as_they_are(session: ssh.Ssh, tmp_path_factory: pytest.TempPathFactory, name: str, inner: str, text: bytes) -> None:
    here = tmp_path_factory.mktemp("named")
    (here / name).mkdir()
    (here / name / inner).write_bytes(text)
    at = session.push(here / name)
    assert at.endswith(f"/{name}")
    code = "import json, os, sys; print(json.dumps([[os.fsencode(n).hex(), open(os.path.join(sys.argv[1], n), 'rb').read().hex()] for n in os.listdir(sys.argv[1])]))"
    done = session.run([sys.executable, "-S", "-c", code, at], timeout_s=30)
    assert json.loads(done.stdout) == [[os.fsencode(inner).hex(), text.hex()]], done.stderr
    assert session.pull(f"{at}/{inner}", here / "back").read_bytes() == text


def test_words_that_no_program_can_get__are_wrong_usage(session: ssh.Ssh) -> None:
    for word in ("a\0b", "\ud800"):
        with pytest.raises(UsageError):
            session.run(["echo", word], timeout_s=10)
    for words in ([], [""], ["-x"]):
        with pytest.raises(UsageError, match="no program"):
            session.run(words, timeout_s=10)


@pytest.mark.parametrize("value", ["$(touch {m})", "`touch {m}`", "x; touch {m}", "x' ; touch {m} ; '", "x\ntouch {m}\n", "-c touch {m}", "a b"])
def test_target_values__cannot_inject(board: sshd.Board, tmp_path: Path, value: str) -> None:
    value = value.format(m=tmp_path / "pwned")
    odd = tmp_path / value.replace("/", "_").strip("\n")
    odd.mkdir()
    with board.connect(folder=str(odd), python=value) as way:
        assert way.run(["pwd"], timeout_s=10).stdout.startswith(f"{odd}/edgekd-")
        assert way.run(["cat", way.push(Path(__file__))], timeout_s=10).stdout == Path(__file__).read_text()
        assert way.probe()["pythons"] == []
        with pytest.raises(EdgekdError, match="not there"):
            way.python(["json"])
    with pytest.raises(EdgekdError, match="no folder"), board.connect(folder=value if not value.startswith("a") else "x y", python=value):
        pass
    assert not (tmp_path / "pwned").exists() and [p.name[:7] for p in odd.iterdir()] == ["edgekd-"]


# Files ----------------------------------------------------------------------------------------------------------------------------------------------------

def test_push__copies_a_folder_and_nothing_twice(session: ssh.Ssh, tmp_path: Path) -> None:
    for name, text in (("a/b/one", "1" * 200_000), ("a/two", ""), ("a/three", "1" * 200_000), ("a/go.sh", "#!/bin/sh\necho ran\n")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "a/go.sh").chmod(0o755)
    (tmp_path / "a/empty").mkdir()
    at = session.push(tmp_path / "a")
    assert session.run([f"{at}/go.sh"], timeout_s=10).stdout == "ran\n"
    listing = session.run(["sh", "-c", 'cd "$1" && find . -type f -exec ls -i {} + | sort; ls -d empty', "sh", at], timeout_s=10).stdout
    assert listing.endswith("empty\n") and "./b/one" in listing and ".part" not in listing
    (tmp_path / "a/two").write_text("new")
    assert session.push(tmp_path / "a") == at
    again = session.run(["sh", "-c", 'cd "$1" && find . -type f -exec ls -i {} + | sort; ls -d empty', "sh", at], timeout_s=10).stdout
    same = [(x.split()[0], x.split()[-1]) for x in listing.splitlines() if "two" not in x]
    assert same == [(x.split()[0], x.split()[-1]) for x in again.splitlines() if "two" not in x], "files that did not change were not written again"
    assert session.pull(f"{at}/two", tmp_path / "back").read_text() == "new"
    inodes = {x.split()[-1]: x.split()[0] for x in listing.splitlines() if "/" in x}
    assert inodes["./b/one"] == inodes["./three"], "the same bytes travel once"


def test_push__two_files_of_one_name_do_not_meet(session: ssh.Ssh, tmp_path: Path) -> None:
    for side in "ab":
        (tmp_path / side).mkdir()
        (tmp_path / side / "m.onnx").write_text(side)
    one, two = (session.push(tmp_path / side / "m.onnx") for side in "ab")
    assert session.run(["cat", one, two], timeout_s=10).stdout == "ab"


def test_push_and_pull__say_what_is_missing(session: ssh.Ssh, tmp_path: Path) -> None:
    with pytest.raises(EdgekdError, match="nothing to push"):
        session.push(tmp_path / "none")
    with pytest.raises(EdgekdError, match="cannot be read"):
        session.pull("/no/such/file", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_session__leaves_nothing(board: sshd.Board, tmp_path: Path) -> None:
    with board.connect(folder=str(tmp_path)) as way:
        way.push(Path(__file__))
        root = next(tmp_path.glob("edgekd-*"))
        assert root.stat().st_mode & 0o777 == 0o711 and next(root.glob("session-*")).stat().st_mode & 0o777 == 0o700
    assert [p for p in tmp_path.rglob("*") if p != root] == []
    way.close()
    with pytest.raises(EdgekdError, match="closed"):
        way.run(["true"], timeout_s=5)


def test_folder_of_somebody_else__is_not_used(board: sshd.Board, tmp_path: Path) -> None:
    if os.getuid():
        pytest.skip("only root can give a folder away")
    theirs = tmp_path / "edgekd-root"
    theirs.mkdir()
    os.chown(theirs, 12345, 12345)
    with pytest.raises(EdgekdError, match="not ours"), board.connect(folder=str(tmp_path)):
        pass
    theirs.rmdir()
    theirs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EdgekdError, match="cannot be made"), board.connect(folder=str(tmp_path)):
        pass


# What is there ----------------------------------------------------------------------------------------------------------------------------------------------

def test_probe__says_what_the_board_is(session: ssh.Ssh) -> None:
    found = session.probe()
    assert found["arch"] == os.uname().machine and "Linux" in str(found["os"]) and found["cores"] == os.cpu_count()
    assert found["clock_skew_s"] == 0.0 and found["notes"] == [] and int(str(found["free_bytes"])) > 0 and int(str(found["memory_bytes"])) > 1e8
    assert isinstance(found["pythons"], list) and "onnxruntime" in dict(next(p for p in found["pythons"] if p["path"] == sys.executable)["modules"])
    assert json.dumps(found)


def test_python__is_the_one_that_imports_what_is_needed(session: ssh.Ssh) -> None:
    assert session.python(["json", "numpy"]) == sys.executable or session.run([session.python(["numpy"]), "-c", "import numpy"], timeout_s=60).code == 0
    with pytest.raises(EdgekdError) as told:
        session.python(["no_such_runtime"])
    assert "no_such_runtime" in told.value.what and sys.executable in str(told.value.where) and "pip install no-such-runtime" in str(told.value.hint)


def test_python__named_by_the_target_is_the_only_one(board: sshd.Board, tmp_path: Path) -> None:
    own = tmp_path / "my python"
    own.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    own.chmod(0o755)
    with board.connect(folder=str(tmp_path), python=str(own)) as way:
        assert way.run([way.python(["json"]), "-c", "print(1)"], timeout_s=20).stdout == "1\n"
        with pytest.raises(EdgekdError, match="my python"):
            way.python(["no_such_runtime"])


def test_clock_skew__is_measured_and_noted(tmp_path: Path) -> None:
    fake = tmp_path / "bin"
    fake.mkdir()
    (fake / "date").write_text('#!/bin/sh\n[ "$1" = +%s ] && exec echo $(($(/bin/date +%s) - 7200))\nexec /bin/date "$@"\n')
    (fake / "date").chmod(0o755)
    with sshd.running(tmp_path / "keys", f"SetEnv=SHLVL=3 PATH={fake}:/usr/bin:/bin") as board, board.connect(folder=str(tmp_path)) as way:
        found = way.probe()
    assert abs(float(str(found["clock_skew_s"])) + 7200) < 5
    assert any("7" in note and "behind" in note for note in found["notes"])  # type: ignore[attr-defined]


def test_probe__reads_hostile_answers_without_trust() -> None:
    text = "clock=abc\nos=\x1b[2Jx\narch=aarch64\nbits=32\ncores=-1\nmemory_kb=1e9\nfree=none\nfound=/p\n{\"version\": 3}\nfound=/q\nnot json\nfound"
    found = _probe.read(text, (0.0, 0.0))
    assert found["pythons"] == [] and "clock_skew_s" not in found and "\x1b" not in str(found["os"]) and "memory_bytes" not in found
    assert any("32-bit" in n for n in found["notes"])  # type: ignore[attr-defined]
    assert _probe.clock_skew(1000, (1000.4, 1001.0)) == 0.0 and _probe.clock_skew(1100, (1000.0, 1001.0)) == 99.0 and _probe.clock_skew(900, (1000.0, 1001.0)) == -100.0
    assert _probe.free_bytes("/dev/with space 100 20 80 20% /mnt/a b") == 80 * 1024 and _probe.free_bytes("nothing") is None


def _elf(path: Path, machine: int, bits: int = 64, big: bool = False) -> Path:
    order = "big" if big else "little"
    path.write_bytes(b"\x7fELF" + bytes([2 if bits == 64 else 1, 2 if big else 1, 1]) + bytes(9) + (2).to_bytes(2, order) + machine.to_bytes(2, order) + bytes(44))
    path.chmod(0o755)
    return path


def test_arch__is_read_from_elf_headers(tmp_path: Path) -> None:
    assert machine_of(Path(sys.executable)) == (os.uname().machine, 64)
    arm64, arm, big = _elf(tmp_path / "a", 183), _elf(tmp_path / "b", 40, bits=32), _elf(tmp_path / "c", 20, bits=32, big=True)
    for path, arch, bits in ((arm64, "aarch64", 64), (arm, "armv7l", 32), (arm, "aarch64", 64), (big, "ppc", 32), (Path(__file__), "aarch64", 64), (arm64, "unheard-of", None)):
        check_arch(path, arch, bits)
    for path, arch, bits in ((arm64, "x86_64", 64), (arm, "x86_64", 64), (arm64, "armv7l", 32), (arm64, "aarch64", 32), (big, "mips", 32)):
        with pytest.raises(EdgekdError, match=r"built for|32 bits"):
            check_arch(path, arch, bits)
    (tmp_path / "m").write_bytes(b"\xcf\xfa\xed\xfe")
    with pytest.raises(EdgekdError, match="macOS"):
        check_arch(tmp_path / "m", "x86_64")


def test_push__refuses_a_program_for_another_processor(session: ssh.Ssh, tmp_path: Path) -> None:
    program = _elf(tmp_path / "benchmark_model", 183 if os.uname().machine != "aarch64" else 62)
    with pytest.raises(EdgekdError, match="built for"):
        session.push(program)
    program.chmod(0o644)
    assert session.push(program), "a library or data file of any kind passes"


def test_device__takes_what_a_target_file_says() -> None:
    assert Device(transport="ssh", how="x", url="ssh://a", ssh_key="~/k", folder="/data", python="/p").folder == "/data"  # type: ignore[arg-type]


@pytest.mark.slow
def test_arm64_board__does_all_of_it(tmp_path: Path) -> None:
    """On a remote arm64 device, or an emulated one. Opt-in: EDGEKD_ARM64_SSH=ssh://root@127.0.0.1:2200, EDGEKD_ARM64_KEY, EDGEKD_ARM64_KNOWN_HOSTS.

    To make an emulated one, as root, in the minutes that the download takes (debootstrap's second stage, which runs emulated, is not needed)::

        apt-get install qemu-user-static debootstrap openssh-server
        mount -t binfmt_misc none /proc/sys/fs/binfmt_misc
        cat /usr/lib/binfmt.d/qemu-aarch64.conf > /proc/sys/fs/binfmt_misc/register
        debootstrap --foreign --arch=arm64 --variant=minbase --include=python3,openssh-server,libgomp1 bookworm ROOT
        for d in ROOT/var/cache/apt/archives/*.deb; do dpkg-deb --fsys-tarfile $d | tar -x -C ROOT --keep-directory-symlink; done
        cp ROOT/usr/share/base-passwd/passwd.master ROOT/etc/passwd; cp ROOT/usr/share/base-passwd/group.master ROOT/etc/group
        echo 'sshd:x:110:65534::/run/sshd:/usr/sbin/nologin' >> ROOT/etc/passwd
        mkdir -p ROOT/run/sshd ROOT/root/.ssh; cp key.pub ROOT/root/.ssh/authorized_keys; cp host_key ROOT/root/host_key
        QEMU_CPU=cortex-a72 chroot ROOT /usr/sbin/sshd -D -p 2200 -h /root/host_key -o UsePAM=no -o StrictModes=no \\
            -o "Subsystem=sftp internal-sftp" -f /dev/null     # without /proc: onnxruntime crashes with the host's
        echo "[127.0.0.1]:2200 $(cat host_key.pub)" > known_hosts
    """
    url = os.environ.get("EDGEKD_ARM64_SSH")
    if not url:
        pytest.skip("EDGEKD_ARM64_SSH names no board; this test's docstring says how to make one")
    told = {"transport": "ssh", "how": "", "url": url, "ssh_key": os.environ.get("EDGEKD_ARM64_KEY"), "known_hosts": os.environ.get("EDGEKD_ARM64_KNOWN_HOSTS")}
    from edgekd.target import Support, Target

    target = Target(name="arm64", description="", device=Device.model_validate(told), formats={"onnx": Support(schemes=["fp32"])})
    with ssh.connect(target) as way:
        found = way.probe()
        assert found["arch"] == "aarch64"
        (tmp_path / "sent").write_bytes(os.urandom(300_000))
        at = way.push(tmp_path / "sent")
        assert way.pull(at, tmp_path / "back").read_bytes() == (tmp_path / "sent").read_bytes()
        assert way.run([way.python(["json"]), "-c", "import platform; print(platform.machine())"], timeout_s=120).stdout == "aarch64\n"
        with pytest.raises(EdgekdError, match="built for x86_64"):
            way.push(_elf(tmp_path / "x86", 62))
        with pytest.raises(EdgekdError, match="no answer within"):
            way.run(["sleep", "86499"], timeout_s=3)
        assert sshd.gone_within("sleep 86499", 10) or "127.0.0.1" not in url
