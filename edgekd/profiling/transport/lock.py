"""A board is measured by one at a time: a lock on the board itself, by `mkdir`, with a heartbeat. Works through any transport's `run`.

`<folder>/lock/` holds `id` (who), `owner` (in words), `since` and `beat` (seconds by the BOARD's clock, so the host's does not matter). A lock is stale when
its owner was a process of this machine that has ended, or when its heartbeat is old by the board's clock and is seen not to move for longer than a beat, so that
a board whose clock jumps loses nobody his lock. `<folder>/guard/` is held for the moment in which one script looks and decides.
Folders of other accounts beside this one (`edgekd-*`) are looked at too: their fresh heartbeats mean that the board is taken.
"""
from __future__ import annotations

import getpass
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edgekd import console
from edgekd.errors import EdgekdError
from edgekd.profiling.transport import Completed

WAIT_S = 300.0
ANSWER_S = 30.0
"""Longest wait for the answer of a heartbeat; a board that takes longer has gone silent."""
GUARD_S = 10.0
"""A guard lives for milliseconds. One that is seen for longer was left by a script that was killed."""


@dataclass(frozen=True)
class Pace:
    """Seconds between heartbeats, until a program without one is ended on the board, until a lock without one is stale, and between two looks at it."""

    beat_s: float = 10.0
    orphan_s: float = 75.0
    stale_s: float = 100.0
    poll_s: float = 2.0


class Run(Protocol):
    """`Transport.run`."""

    def __call__(self, command: Sequence[str], *, timeout_s: float) -> Completed: ...


YOUNG = r"""
young() {  # the heartbeat in $1 is at most $limit seconds old by this board's clock, or as much ahead of it
  at=; { read -r at < "$1/beat"; } 2>/dev/null
  case $at in ''|0*|*[!0-9]*) return 1 ;; esac
  age=$((now - at)); [ $age -ge 0 ] || age=$((-age))
  [ $age -le $limit ]
}
show() {  # $1 a word, $2 a lock
  id= at= since= who=
  { read -r id < "$2/id"; read -r at < "$2/beat"; read -r since < "$2/since"; read -r who < "$2/owner"; } 2>/dev/null
  printf '%s\n%s\n%s\n%s\n%s\n%s\n' "$1" "$id" "$at" "$since" "$now" "$who"
}
"""
TAKE = YOUNG + r"""
umask 022
d=$1 me=$2 limit=$3 owner=$4 gone=$5
now=$(date +%s)
[ "$6" = unguard ] && rmdir "$d/guard" 2>/dev/null
tries=0
until mkdir "$d/guard" 2>/dev/null; do
  [ -d "$d/guard" ] && echo guarded && exit 0
  # it may have been removed between the two
  tries=$((tries + 1))
  if [ $tries -gt 9 ]; then echo "no folder can be made in $d" >&2; exit 1; fi
done
trap 'rmdir "$d/guard"' EXIT
if [ -d "$d/lock" ]; then
  id= at=
  { read -r id < "$d/lock/id"; } 2>/dev/null
  { read -r at < "$d/lock/beat"; } 2>/dev/null
  if [ "$id" = "$me" ]; then echo held; exit 0; fi
  if [ -n "$id" ] && [ "$id $at" != "$gone" ]; then
    if young "$d/lock"; then show busy "$d/lock"; else show stale "$d/lock"; fi
    exit 0
  fi
  rm -rf "$d/lock"
fi
mkdir "$d/lock" && echo "$now" > "$d/lock/beat" && echo "$now" > "$d/lock/since" && printf '%s\n' "$owner" > "$d/lock/owner" && echo "$me" > "$d/lock/id" || exit 1
# ours is there first, then we look: of two accounts at least one sees the other
for other in "${d%/*}"/edgekd-*/lock; do
  [ "$other" = "$d/lock" ] && continue
  if young "$other"; then rm -rf "$d/lock"; show elsewhere "$other"; exit 0; fi
done
echo held
"""
BEAT = r"""
id=; { read -r id < "$1/lock/id"; } 2>/dev/null
[ "$id" = "$2" ] || { echo taken; exit 0; }
date +%s > "$1/lock/beat" && echo ours
"""
FREE = r"""
id=; { read -r id < "$1/lock/id"; } 2>/dev/null
[ "$id" = "$2" ] && rm -rf "$1/lock"
exit 0
"""


def me() -> str:
    """This process for others: user, host, process, and what tells it from a later one of the same number. Letters that mean nothing to any shell."""
    words = (getpass.getuser(), socket.gethostname(), str(os.getpid()), _identity(os.getpid()) or "-")
    return " ".join(re.sub(r"[^A-Za-z0-9_.@:-]", "_", w) for w in words)


def gone(owner: str) -> bool:
    """Whether `owner` (of `me`) was a process of this machine that has ended. Owners on other machines are never known to be gone."""
    words = owner.split(" ")
    if len(words) != 4 or words[1] != me().split(" ")[1] or not words[2].isdigit() or words[3].count(".") != 2:
        return False
    here = (_identity(os.getpid()) or "-").rpartition(".")[0]
    return words[3].rpartition(".")[0] == here and _identity(int(words[2])) != words[3]


def _identity(pid: int) -> str | None:
    """`boot.namespace.start` of a process on Linux; None where it is not running or cannot be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
        space = os.stat("/proc/self/ns/pid").st_ino
        start = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
    return f"{boot}.{space}.{start}"


class Lock:
    """A held lock."""

    def __init__(self, run: Run, folder: str) -> None:
        self.run, self.folder, self.id = run, folder, secrets.token_hex(8)
        self.taken = False

    def beat(self) -> None:
        """Say that we are still here. Raises what `run` raises."""
        if self._say(BEAT).stdout.strip() == "taken":
            self.taken = True

    def check(self) -> None:
        """Raises EdgekdError when somebody else took the board, because we were silent for too long."""
        if self.taken:
            raise EdgekdError("the board was restarted, or given to somebody else, while this machine was silent (asleep, or cut off)", where=self.folder,
                              hint="start again")

    def free(self) -> None:
        """Give it back."""
        self._say(FREE)

    def _say(self, script: str, *words: str) -> Completed:
        return self.run(["sh", "-c", script, "edgekd", self.folder, self.id, *words], timeout_s=ANSWER_S)


@contextmanager
def held(run: Run, folder: str, owner: str | None = None, wait_s: float = WAIT_S, pace: Pace = Pace()) -> Iterator[Lock]:
    """Hold a board's lock while the block runs; a thread keeps its heartbeat.

    Args:
        run: runs a command there; called from the heartbeat's thread too. Short commands only, and no retries needed.
        folder: an existing folder on the board that only this account can write to.
        owner: who we are, in words on one line; `me()` when left out.
        wait_s: how long to wait while somebody else holds it.

    Raises:
        EdgekdError: it is still held after `wait_s`; says by whom and since when.
    """
    lock = Lock(run, folder)
    _take(lock, owner or me(), wait_s, pace)
    over = threading.Event()
    thread = threading.Thread(target=_keep, args=(lock, over, pace), name="edgekd-heartbeat", daemon=True)
    thread.start()
    try:
        yield lock
    finally:
        over.set()
        thread.join(ANSWER_S)
        try:
            lock.free()
        except Exception:
            pass  # out of reach: it will be found stale


def _keep(lock: Lock, over: threading.Event, pace: Pace) -> None:
    while not over.wait(pace.beat_s) and not lock.taken:
        try:
            lock.beat()
        except Exception:
            continue  # out of reach for now; whoever uses the board says so, and connects again


def _take(lock: Lock, owner: str, wait_s: float, pace: Pace) -> None:
    start = time.monotonic()
    dead, unguard, told = "", "", False
    seen: tuple[str, float] | None = None
    guarded: float | None = None
    while True:
        done = lock._say(TAKE, str(int(pace.stale_s)), owner, dead, unguard)
        state, *said = done.stdout.splitlines() or [""]
        if state == "held":
            return
        now = time.monotonic()
        dead = unguard = ""
        if state == "guarded":
            guarded = guarded or now
            unguard = "unguard" if now - guarded > GUARD_S else ""
        elif state in ("busy", "stale", "elsewhere") and len(said) == 5:
            guarded = None
            key = f"{said[0]} {said[1]}"
            seen = seen if seen and seen[0] == key else (key, now)
            if state != "elsewhere" and (gone(said[4]) or (state == "stale" and now - seen[1] > 1.2 * pace.beat_s)):
                dead = key
                continue
            if now - start > wait_s and state != "stale":
                raise EdgekdError(f"the board is in use by {_words(said)}", where=lock.folder, hint="wait until it is free, or ask its user; it is set free by itself when "
                                                                                              f"its heartbeat stops for {pace.stale_s:.0f} s")
            if not told:
                told = True
                console.log(f"waiting for the board: in use by {_words(said)}")
        else:
            raise EdgekdError(f"the board's lock cannot be taken: {(done.stderr or done.stdout).strip()[-200:] or f'exit code {done.code}'}", where=lock.folder,
                              hint="is there room, and does the folder belong to this account?")
        time.sleep(pace.poll_s + secrets.randbelow(100) / 100 * pace.poll_s / 2)


def _words(said: Sequence[str]) -> str:
    """Who and since when, from what a lock shows. What other accounts wrote is cut to harmless letters."""
    _, _, since, now, owner = (re.sub(r"[^\x20-\x7e]", "?", s)[:120] for s in said)
    words = owner.split(" ")
    who = f"{words[0]} on {words[1]} (process {words[2]})" if len(words) == 4 else owner or "somebody"
    ago = int(now) - int(since) if since.isdigit() and now.isdigit() else None
    return f"{who} since {console.duration(ago)} ago" if ago is not None else who
