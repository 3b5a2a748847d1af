"""Atomic files, fingerprints and the lock of a run folder."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgekd.errors import EdgekdError, UsageError
from edgekd.workspace import atomic_path, fingerprint, run_lock, sha256, usable_folder, write_atomic


def test_atomic_path__a_failure_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = write_atomic(tmp_path / "a.txt", "old")
    with pytest.raises(RuntimeError), atomic_path(path) as temp:
        temp.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_write_atomic__makes_folders_and_is_readable(tmp_path: Path) -> None:
    path = write_atomic(tmp_path / "deep" / "er" / "a.bin", b"\0\1")
    assert path.read_bytes() == b"\0\1" and path.stat().st_mode & 0o777 == 0o644


def test_sha256__of_a_known_text(tmp_path: Path) -> None:
    assert sha256(write_atomic(tmp_path / "a", "abc")) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_fingerprint__order_of_keys_does_not_matter_values_do() -> None:
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1}) != fingerprint({"a": 1, "b": [3]})


def test_usable_folder__a_file_is_refused_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(UsageError, match="--output"):
        usable_folder(tmp_path / "f")
    with pytest.raises(UsageError, match="--output"):
        usable_folder(tmp_path / "f" / "below")


def test_run_lock__a_second_process_is_told(tmp_path: Path) -> None:
    code = "import sys, pathlib\nfrom edgekd.workspace import run_lock\nwith run_lock(pathlib.Path(sys.argv[1])): print('in')"
    with run_lock(tmp_path):
        other = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert other.returncode == 1 and "at work in this folder" in other.stderr and str(os.getpid()) in other.stderr
    after = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert after.stdout.strip() == "in", "the lock goes with its process"


def test_run_lock__is_freed_by_an_error(tmp_path: Path) -> None:
    with pytest.raises(EdgekdError), run_lock(tmp_path):
        raise EdgekdError("x")
    with run_lock(tmp_path):
        pass
