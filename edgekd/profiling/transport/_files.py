"""Files to a board and back over SFTP: never half-written, never twice, and room looked at first."""
from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgekd import console, workspace
from edgekd.errors import EdgekdError, first_line
from edgekd.profiling.transport import Lost
from edgekd.profiling.transport._elf import check_arch

CHUNK = 1 << 15
ANSWER_S = 20.0
SPARE = 1 << 20
"""Bytes that are left free on the board."""
TELL = 20_000_000
"""Bytes from which on a copy is announced."""


@dataclass(frozen=True)
class Piece:
    """One file of what is pushed."""

    local: Path
    remote: str
    size: int
    program: bool
    sha: str


@dataclass
class Files:
    """The files of one session.

    `sftp()` gives an open client, `free()` the bytes free there, `same(a, b)` makes `b` of `a` on the board, `lost(error)` says whether an error means that the
    connection is gone, `remove(path)` removes a file or folder.
    """

    folder: str
    sftp: Callable[[], Any]
    free: Callable[[], int | None]
    same: Callable[[str, str], bool]
    lost: Callable[[BaseException], bool]
    remove: Callable[[str], None]
    arch: str = ""
    bits: int | None = None
    places: dict[Path, str] = field(default_factory=dict)
    there: dict[str, str] = field(default_factory=dict)
    """Path on the board -> SHA-256 of what was put there."""
    count: int = 0

    def push(self, path: Path) -> str:
        """Copy a file or folder; its path on the board.

        Raises:
            Lost: the connection broke. Files that were finished are not sent again by the next call.
            EdgekdError: there is nothing to push, no room for it, or a program for another processor.
        """
        path = Path(path)
        if not path.exists():
            raise EdgekdError("there is nothing to push", where=path)
        source = Path(os.path.abspath(path))
        fresh = source not in self.places
        self.count += fresh
        remote = self.places.get(source) or f"{self.folder}/{self.count}/{source.name}"
        pieces, folders = self._look(source, remote)
        self.places[source] = remote
        todo = [p for p in pieces if self.there.get(p.remote) != p.sha]
        known = set(self.there.values())
        need = sum({p.sha: p.size for p in todo if p.sha not in known}.values())
        try:
            self._room(need, path)
            if need > TELL:
                console.log(f"copying {need / 1e6:.0f} MB to the board")
            self._folders([os.path.dirname(remote), *folders])
            for piece in todo:
                self._put(piece)
        except Lost:
            raise
        except BaseException:
            if fresh:
                self._undo(remote, source)
            raise
        return remote

    def pull(self, path: str, local: Path) -> Path:
        """Copy a file of the board here, atomically. Raises as `push`."""
        local = Path(local)
        try:
            with workspace.atomic_path(local) as temp, open(temp, "wb") as f:
                self.sftp().getfo(_raw(path), f, max_concurrent_prefetch_requests=64)
        except Exception as e:
            raise self._told(e, f"the board's file {path} cannot be read") from e
        return local

    def _look(self, source: Path, remote: str) -> tuple[list[Piece], list[str]]:
        """All files with their places, and the folders to make, outer ones first."""
        if not source.is_dir():
            return [self._piece(source, remote)], []
        pieces, folders = [], [remote]
        for at, names, files in os.walk(source):
            names.sort()
            below = os.path.relpath(at, source)
            here = remote if below == "." else f"{remote}/{below}"
            folders += [f"{here}/{n}" for n in names]
            pieces += [self._piece(Path(at) / f, f"{here}/{f}") for f in sorted(files)]
        return pieces, folders

    def _piece(self, local: Path, remote: str) -> Piece:
        if not local.is_file():
            raise EdgekdError("only files and folders can be pushed", where=local)
        found = local.stat()
        program = bool(found.st_mode & stat.S_IXUSR)
        if program and self.arch:
            check_arch(local, self.arch, self.bits)
        return Piece(local, remote, found.st_size, program, workspace.sha256(local))

    def _room(self, need: int, what: Path) -> None:
        free = self.free()
        if need and free is not None and need + SPARE > free:
            raise EdgekdError(f"the board has no room: {what.name} needs {need / 1e6:.1f} MB and {free / 1e6:.1f} MB are free", where=self.folder,
                              hint="free some room there, or name a folder on a larger disk: `folder` of the target's device")

    def _folders(self, folders: list[str]) -> None:
        for folder in folders:
            try:
                self.sftp().mkdir(_raw(folder), 0o700)
            except Exception as e:
                if self.lost(e):
                    raise self._told(e, "") from e
                try:
                    self.sftp().stat(_raw(folder))
                except Exception:
                    raise self._told(e, f"the folder {folder} cannot be made on the board") from e

    def _put(self, piece: Piece) -> None:
        twin = next((at for at, sha in self.there.items() if sha == piece.sha and at != piece.remote), None)
        if twin is None or not self.same(twin, piece.remote):
            self._send(piece)
        self.there[piece.remote] = piece.sha

    def _send(self, piece: Piece) -> None:
        part = f"{piece.remote}.part"
        try:
            sftp = self.sftp()
            with open(piece.local, "rb") as f, sftp.open(_raw(part), "wb") as out:
                out.set_pipelined(True)
                for chunk in _chunks(f):
                    out.write(chunk)
            wrote = sftp.stat(_raw(part)).st_size
            if wrote != piece.size:
                raise OSError(f"{wrote} of {piece.size} bytes arrived")
            if piece.program:
                sftp.chmod(_raw(part), 0o700)
            sftp.posix_rename(_raw(part), _raw(piece.remote))
        except Exception as e:
            told = self._told(e, f"{piece.local.name} cannot be written on the board")
            if not isinstance(told, Lost):
                # SFTP says no more than "Failure" when a disk is full; what is left of the part tells
                free = self.free()
                self.remove(part)
                if free is not None and free < SPARE:
                    told = EdgekdError(f"the board has no room: {piece.local.name} needs {piece.size / 1e6:.1f} MB and the disk is full ({free / 1e6:.1f} MB are free)",
                                       where=self.folder, hint="free some room there, or name a folder on a larger disk: `folder` of the target's device")
            raise told from e

    def _undo(self, remote: str, source: Path) -> None:
        self.places.pop(source, None)
        self.there = {at: sha for at, sha in self.there.items() if at != remote and not at.startswith(f"{remote}/")}
        try:
            self.remove(os.path.dirname(remote))
        except Exception:
            pass  # the session's folder is removed in the end

    def _told(self, error: BaseException, what: str) -> EdgekdError:
        if isinstance(error, EdgekdError):
            return error
        if self.lost(error):
            return Lost("the connection to the board broke while a file was copied")
        return EdgekdError(f"{what}: {getattr(error, 'strerror', None) or first_line(error)}", where=self.folder)


def _chunks(file: Any) -> Iterator[bytes]:
    while chunk := file.read(CHUNK):
        yield chunk


def _raw(path: str) -> bytes:
    """A path as bytes: names on disks need not be UTF-8."""
    return os.fsencode(path)
