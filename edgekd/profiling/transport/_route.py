"""The way to a board that an address and ~/.ssh/config tell: which hosts are gone through, as whom, with which keys. Nothing is contacted here.

OpenSSH's rules: the address goes before the config, a jump host is looked up in the config as well, and the first jump host may have jump hosts of its own.
"""
from __future__ import annotations

import getpass
import glob
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from edgekd.errors import EdgekdError, UsageError

CONNECT_S = 8.0
"""Longest wait for a host to answer, unless ~/.ssh/config has a ConnectTimeout."""
INCLUDES = 8
"""How deep Include may nest, and how many jump hosts may follow each other."""
HOST = re.compile(r"[A-Za-z0-9_:][A-Za-z0-9_.:%-]*")
USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]*")
EXAMPLE = "ssh://user@host or ssh://user@host:port"


@dataclass(frozen=True)
class Hop:
    """A host on the way; the last one is the board."""

    host: str
    port: int
    user: str
    keys: tuple[str, ...]
    """Private key files, tried before the agent's and the usual ones."""
    known: tuple[Path, ...]
    """Files of host keys, those that exist."""
    only: bool = False
    """No other keys than `keys` (IdentitiesOnly, or a key that the user named)."""
    proxy: str | None = None
    """A command whose standard input and output are the connection (ProxyCommand)."""
    timeout_s: float = CONNECT_S

    @property
    def name(self) -> str:
        """As known_hosts writes it: `host`, or `[host]:port` where the port is not 22."""
        return self.host if self.port == 22 else f"[{self.host}]:{self.port}"

    def __str__(self) -> str:
        return f"{self.user}@{self.name}"


@dataclass(frozen=True)
class Address:
    """What `ssh://user@host:port` says; None is left to ~/.ssh/config."""

    host: str
    user: str | None = None
    port: int | None = None

    @classmethod
    def parse(cls, url: str) -> Address:
        """Read an address.

        Raises:
            UsageError: it is none, or has what no host or user is called. A shell may see both (ProxyCommand), so nothing that means anything to one passes.
        """
        wrong = UsageError(f"'{url}' is not the address of a board", hint=f"write it as {EXAMPLE}")
        try:
            parts = urlsplit(url)
            host, port, user = parts.hostname, parts.port, parts.username
        except ValueError:
            raise wrong from None
        if parts.scheme != "ssh" or parts.path not in ("", "/") or parts.query or parts.fragment or any(c.isspace() for c in url):
            raise wrong
        if parts.password is not None:
            raise UsageError("an address of ssh has no password in it: it would be seen in logs and process lists",
                             hint=f"write it as {EXAMPLE}, and use a key (--ssh-key) or an agent")
        # urlsplit makes hosts lower case, and names of ~/.ssh/config may not be
        host = _as_written(parts.netloc, host)
        if host is None or not HOST.fullmatch(host) or port == 0:
            raise wrong
        if user is not None and not USER.fullmatch(user := unquote(user)):
            raise wrong
        return cls(host, user, port)

    @classmethod
    def jump(cls, text: str) -> Address:
        """One host of a ProxyJump: `[user@]host[:port]`, or an address."""
        return cls.parse(text if text.startswith("ssh://") else f"ssh://{text}")


def _as_written(netloc: str, lowered: str | None) -> str | None:
    found = None if lowered is None else re.search(re.escape(lowered), netloc.rpartition("@")[2], re.IGNORECASE)
    return found.group(0) if found else lowered


@dataclass
class Config:
    """~/.ssh/config and what the target says beside it."""

    key: Path | None = None
    known_hosts: Path | None = None
    folder: Path = field(default_factory=lambda: Path(os.path.expanduser("~/.ssh")))

    def route(self, address: Address) -> list[Hop]:
        """All hosts to go through, the board last.

        Raises:
            EdgekdError: ~/.ssh/config cannot be read, or its jump hosts go round in a circle.
        """
        return self._route(address, 0)

    def _route(self, address: Address, depth: int) -> list[Hop]:
        if depth > INCLUDES:
            raise EdgekdError(f"the jump hosts to {address.host} go round in a circle", where=self.folder / "config", hint="look at its ProxyJump lines")
        told = self._lookup(address)
        jumps = [j.strip() for j in (told.get("proxyjump") or "none").split(",")]
        before: list[Hop] = []
        if jumps != ["none"]:
            try:
                hosts = [Address.jump(j) for j in jumps]
            except UsageError as e:
                raise EdgekdError(f"ProxyJump {','.join(jumps)} cannot be read", where=self.folder / "config", hint="write user@host:port,host2") from e
            # only the first has a way of its own: each of the others is reached through the one before
            before = [*self._route(hosts[0], depth + 1), *(self._hop(h, self._lookup(h), last=False) for h in hosts[1:])]
        hop = self._hop(address, told, last=depth == 0, proxy=not before)
        return [*before, hop]

    def _lookup(self, address: Address) -> dict[str, Any]:
        import paramiko

        # what the address says comes first, and the first value wins; so %r and %p of a ProxyCommand are right as well
        said = "".join(f"{word} {value}\n" for word, value in (("User", address.user), ("Port", address.port)) if value is not None)
        path = self.folder / "config"
        try:
            text = _with_includes(path, self.folder) if path.is_file() else ""
            return dict(paramiko.SSHConfig.from_text(f"Host *\n{said}{text}").lookup(address.host))
        except (OSError, UnicodeDecodeError, ImportError, ValueError, KeyError, paramiko.SSHException) as e:
            raise EdgekdError(f"the ssh configuration cannot be read: {e}", where=path,
                              hint="`Match exec` needs the package invoke; give --device with the host's own name to see which line it is") from e

    def _hop(self, address: Address, told: dict[str, Any], *, last: bool, proxy: bool = False) -> Hop:
        files = [] if last and self.known_hosts else [Path(os.path.expanduser(f)) for f in (told.get("userknownhostsfile") or "").split() if f != "none"]
        usual = [] if (last and self.known_hosts) else [*(files or [self.folder / "known_hosts"]), Path("/etc/ssh/ssh_known_hosts")]
        known = [*([self.known_hosts] if self.known_hosts else []), *usual]
        keys = [str(self.key)] if self.key and last else [*([str(self.key)] if self.key else []), *map(os.path.expanduser, told.get("identityfile", []))]
        host, port, user = told.get("hostname") or address.host, int(told.get("port", 22)), told.get("user") or getpass.getuser()
        try:
            timeout = float(told.get("connecttimeout", CONNECT_S))
        except ValueError:
            timeout = CONNECT_S
        only = str(told.get("identitiesonly", "no")).lower() == "yes" or (last and self.key is not None)
        return Hop(host, port, user, tuple(k for k in keys if os.path.isfile(k)), tuple(f for f in known if f.is_file()), only,
                   told.get("proxycommand") if proxy else None, timeout)


def _with_includes(path: Path, folder: Path, depth: int = 0) -> str:
    """A config file with its Include lines replaced by what they name, which paramiko leaves out."""
    if depth > INCLUDES:
        return ""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        word, _, names = line.strip().replace("=", " ", 1).partition(" ")
        if word.lower() != "include":
            lines.append(line)
            continue
        for name in names.split():
            pattern = os.path.expanduser(name.strip('"'))
            found = sorted(glob.glob(pattern if os.path.isabs(pattern) else str(folder / pattern)))
            lines += [_with_includes(Path(f), folder, depth + 1) for f in found if os.path.isfile(f)]
    return "\n".join(lines) + "\n"


def address_of(url: str | None, key: Path | None, known_hosts: Path | None) -> tuple[Address, Config]:
    """What a target says of its board, checked before anything is contacted.

    Raises:
        UsageError: no address, a malformed one, or a key or known_hosts file that is not there.
    """
    if url is None:
        raise UsageError("there is no address of the board", hint=f"give --device {EXAMPLE}")
    address = Address.parse(url)
    key, known_hosts = (None if path is None else Path(os.path.expanduser(path)) for path in (key, known_hosts))
    for what, path in (("the ssh key", key), ("the file of known host keys", known_hosts)):
        if path is not None and not path.is_file():
            raise UsageError(f"{what} is not there", where=path, hint="look at --ssh-key and --known-hosts, or at ssh_key and known_hosts of the target")
    if key is not None and key.suffix == ".pub":
        raise UsageError("this is the public half of a key, and ssh signs with the private one", where=key, hint=f"give {key.with_suffix('')}")
    return address, Config(key, known_hosts)
