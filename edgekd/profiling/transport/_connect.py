"""Connecting to a board over ssh: host keys always checked, keys or an agent and never a password, jump hosts and proxies, tries again with back-off."""
from __future__ import annotations

import os
import shlex
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from edgekd import console
from edgekd.errors import EdgekdError, first_line
from edgekd.profiling.transport._route import Hop

TRIES = 3
PATIENCE_S = 22.0
"""No further try is started after this, so that a dead board is told within half a minute."""
BACKOFF_S = (0.5, 1.5)
KEEPALIVE_S = 5
USUAL_KEYS = ("id_rsa", "id_ecdsa", "id_ed25519")


def library() -> Any:
    """paramiko, quiet: what it logs is told by our own errors.

    Raises:
        EdgekdError: it is not installed.
    """
    try:
        import logging

        import paramiko
    except ImportError as e:
        raise EdgekdError("boards are reached by paramiko, which is not installed", hint="pip install 'edgekd[devices]'") from e
    logging.getLogger("paramiko").addHandler(logging.NullHandler())
    return paramiko


class Line:
    """A live connection to the last of several hosts, with all that has to be closed after it."""

    def __init__(self, hops: Sequence[Hop]) -> None:
        self._open: list[Any] = []
        self.transport: Any = None
        sock: Any = None
        try:
            for i, hop in enumerate(hops):
                if hop.proxy:
                    proxy = Proxy(hop.proxy)
                    self._open.append(proxy)
                    sock = proxy.sock
                client = _client(hop, sock, through=i > 0 or hop.proxy is not None)
                self._open.append(client)
                self.transport = client.get_transport()
                self.transport.set_keepalive(KEEPALIVE_S)
                if i + 1 < len(hops):
                    after = hops[i + 1]
                    with deadline(self.transport, after.timeout_s):
                        sock = self.transport.open_channel("direct-tcpip", (after.host, after.port), ("127.0.0.1", 0), timeout=after.timeout_s)
        except BaseException:
            self.close()
            raise

    @property
    def alive(self) -> bool:
        """Whether nothing has closed it yet; a board that has gone silent looks alive until something waits for it in vain."""
        return bool(self.transport is not None and self.transport.is_active())

    def close(self) -> None:
        """Hang up, the board first. Never raises."""
        for one in reversed(self._open):
            try:
                one.close()
            except Exception:
                pass  # it is being thrown away
        self._open = []


class Proxy:
    """A ProxyCommand: run by the user's shell, as OpenSSH does, with a socket as its input and output, so that its end is seen."""

    def __init__(self, command: str) -> None:
        self.sock, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(["/bin/sh", "-c", f"exec {command}"], stdin=theirs.fileno(), stdout=theirs.fileno(), stderr=subprocess.DEVNULL)

    def close(self) -> None:
        """End the command, which usually has ended with its socket."""
        self.sock.close()
        try:
            self.process.wait(1)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextmanager
def deadline(transport: Any, seconds: float) -> Iterator[None]:
    """Close the connection when the block takes longer: paramiko waits for some answers for ever, and for nothing on a closed one."""
    timer = threading.Timer(seconds, transport.close)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def connect(hops: Sequence[Hop], url: str, *, tries: int = TRIES, patience_s: float = PATIENCE_S) -> Line:
    """Connect, three times at most when nobody answers; refused keys are not tried again.

    Raises:
        EdgekdError: the board cannot be reached, does not take our keys, or its host key is not the known one.
    """
    paramiko = library()
    start = time.monotonic()
    for attempt in range(tries):
        try:
            return Line(hops)
        except EdgekdError:
            raise
        except socket.gaierror as e:
            raise EdgekdError(f"there is no host of this name: {e.strerror or e}", where=url, hint="look at the address, or at HostName in ~/.ssh/config") from e
        except (OSError, EOFError, paramiko.SSHException) as e:
            why = _reason(e)
            if attempt + 1 == tries or time.monotonic() - start > patience_s:
                raise EdgekdError(f"the board does not answer: {why}", where=url,
                                  hint=f"is it on, is the address right, does sshd run there? `{command(hops)}` says more") from e
            pause = BACKOFF_S[min(attempt, len(BACKOFF_S) - 1)]
            console.log(f"{url} does not answer ({why}); trying again in {pause:g} s")
            time.sleep(pause)
    raise AssertionError("unreachable")


def command(hops: Sequence[Hop], verbose: bool = True) -> str:
    """The same connection by OpenSSH, for a person to try."""
    last = hops[-1]
    jump = [] if len(hops) == 1 else ["-J", ",".join(f"{h.user}@{h.host}:{h.port}" for h in hops[:-1])]
    key = ["-i", last.keys[0]] if last.only and last.keys else []
    return shlex.join(["ssh", *(["-v"] if verbose else []), *jump, *key, *([] if last.port == 22 else ["-p", str(last.port)]), f"{last.user}@{last.host}"])


def _reason(error: BaseException) -> str:
    inner = getattr(error, "errors", None)
    if isinstance(inner, dict) and inner:
        error = next(iter(inner.values()))
    if isinstance(error, TimeoutError) or "No existing session" in str(error):
        return "no answer in time"
    return str(getattr(error, "strerror", None) or first_line(error))


def _client(hop: Hop, sock: Any, *, through: bool) -> Any:
    """Connect to one host and log in."""
    paramiko = library()
    client = paramiko.SSHClient()
    for file in hop.known:
        try:
            client.load_host_keys(str(file))
        except (OSError, UnicodeDecodeError) as e:
            raise EdgekdError(f"the known host keys cannot be read: {first_line(e)}", where=file) from e
        except paramiko.hostkeys.InvalidHostKey as e:
            raise EdgekdError("a line of the known host keys is damaged, so no host key can be checked", where=f"{file}: {str(e.line)[:80]}",
                              hint="mend or remove the line") from e
    client.set_missing_host_key_policy(_Unknown(hop, through))
    encrypted = [k for k in hop.keys if _encrypted(k)]
    try:
        client.connect(hop.host, hop.port, hop.user, key_filename=list(hop.keys), allow_agent=not hop.only or bool(encrypted), look_for_keys=not hop.only,
                       timeout=hop.timeout_s, banner_timeout=hop.timeout_s, auth_timeout=hop.timeout_s, channel_timeout=hop.timeout_s,
                       sock=sock, transport_factory=_factory(hop))
    except BaseException as e:
        here = client.get_transport()
        logging_in = isinstance(e, paramiko.AuthenticationException) or (here is not None and here.is_active() and here.initial_kex_done)
        client.close()
        if isinstance(e, paramiko.BadHostKeyException):
            raise _changed(hop, e) from e
        if isinstance(e, paramiko.SSHException) and logging_in and "timeout" not in str(e).lower():
            raise refused(hop, e) from e
        raise
    return client


def _factory(hop: Hop) -> Any:
    """Makes paramiko's connection one that never asks a person and knows revoked host keys."""
    paramiko = library()

    class Quiet(paramiko.Transport):  # type: ignore[misc, name-defined]
        def auth_interactive_dumb(self, *args: Any, **kwargs: Any) -> Any:
            raise paramiko.AuthenticationException("the board wants a password or code beside the key")

        def start_client(self, *args: Any, **kwargs: Any) -> None:
            super().start_client(*args, **kwargs)
            key = self.get_remote_server_key()
            for file in hop.known:
                for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
                    words = line.split()
                    if words[:1] == ["@revoked"] and len(words) > 3 and words[3] == key.get_base64():
                        raise EdgekdError(f"the host key of {hop.name} is revoked ({_shown(key)})", where=file, hint="do not connect before its owner has said why")

    return Quiet


class _Unknown:
    """What happens to a host key that no file has: it is refused."""

    def __init__(self, hop: Hop, through: bool) -> None:
        self.hop, self.through = hop, through

    def missing_host_key(self, client: Any, name: str, key: Any) -> None:
        hop = self.hop
        port = "" if hop.port == 22 else f"-p {hop.port} "
        file = next(iter(hop.known), None) or os.path.expanduser("~/.ssh/known_hosts")
        # ssh-keyscan knows no jump hosts
        add = command([hop], verbose=False) if self.through else f"ssh-keyscan {port}-t {_kind(key)} {hop.host} >> {shlex.quote(str(file))}"
        raise EdgekdError(f"the host key of {hop.name} is not known, so the board cannot be told from another machine", where=_shown(key),
                          hint=f"compare with `ssh-keygen -lf /etc/ssh/ssh_host_{_kind(key)}_key.pub` on the board itself; when it is the same, `{add}`")


def _changed(hop: Hop, error: Any) -> EdgekdError:
    files = " or ".join(str(f) for f in hop.known)
    return EdgekdError(f"the host key of {hop.name} is not the one that is known: {_shown(error.key)} instead of {_shown(error.expected_key)}", where=files,
                       hint=f"another machine may be answering; if the board was set up anew: `ssh-keygen -R {shlex.quote(hop.name)} -f {shlex.quote(files.split(' or ')[0])}`, "
                            "then add its new key")


def _shown(key: Any) -> str:
    return f"{key.get_name()} {key.fingerprint}"


def _kind(key: Any) -> str:
    name = str(key.get_name())
    return "ecdsa" if name.startswith("ecdsa") else name.removeprefix("ssh-")


def _encrypted(path: str) -> bool:
    """Whether a private key file needs a passphrase."""
    paramiko = library()
    try:
        paramiko.PKey.from_path(path)
    except (TypeError, paramiko.PasswordRequiredException):
        return True
    except Exception:
        return False  # not a key at all, or of an unknown kind: connecting says so
    return False


def refused(hop: Hop, error: BaseException) -> EdgekdError:
    """Why a board did not let us in, and what to do; nothing is ever asked for at a prompt."""
    usual = [] if hop.only else [p for k in USUAL_KEYS if os.path.isfile(p := os.path.expanduser(f"~/.ssh/{k}"))]
    tried = [*hop.keys, *usual]
    encrypted = [k for k in tried if _encrypted(k)]
    port = "" if hop.port == 22 else f"-p {hop.port} "
    if encrypted:
        return EdgekdError(f"the key {encrypted[0]} has a passphrase and no agent holds it, so {hop} cannot be logged in to", where=first_line(error),
                           hint=f"`ssh-add {shlex.quote(encrypted[0])}` once, then again; edgekd never asks for passphrases")
    if not tried and not os.environ.get("SSH_AUTH_SOCK"):
        return EdgekdError(f"there is no key to log in to {hop} with", where=first_line(error),
                           hint=f"make one with `ssh-keygen -t ed25519` and `ssh-copy-id {port}{hop.user}@{hop.host}`, or name one with --ssh-key")
    return EdgekdError(f"{hop} takes none of our keys", where=f"{first_line(error)}; tried {', '.join(tried) or 'the keys of the agent'}",
                       hint=f"`ssh-copy-id {port}{hop.user}@{hop.host}`, or name the right key with --ssh-key; edgekd never asks for passwords")
