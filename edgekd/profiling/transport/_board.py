r"""What is said to a board's shell: POSIX sh and nothing more, given to `sh` by its standard input, so that whatever login shell there is sees one word.

Every value is one quoted word of the script's `$@`. No name of a file, target or program is ever read by a shell as anything else.
What runs carries `EDGEKD_RUN=session-….N.` in its environment: on Linux its descendants are found by that even when they have left its process group.
"""
from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from edgekd.errors import UsageError


@dataclass(frozen=True)
class Script:
    """Functions of sh with a `main`."""

    text: str

    def said(self, words: Sequence[str], mark: str) -> bytes:
        """The bytes for a shell of its own. `mark` is printed on both outputs first, so that what startup files print is told from ours.

        Raises:
            UsageError: a word that no program can be given: NUL ends every argument, and half a surrogate pair is no text.
        """
        return self._bytes(words, f"printf '%s\\n' {mark}; printf '%s\\n' {mark} >&2", "exit $?")

    def asked(self, words: Sequence[str], mark: str) -> bytes:
        """The bytes for a shell that goes on afterwards: `mark` before each output, then a line of `mark` and the exit code after it. Raises as `said`."""
        before = f"printf '%s\\n' {mark}; printf '%s\\n' {mark} >&2; ("
        return self._bytes(words, before, f") </dev/null; printf '\\n%s %s\\n' {mark} $?; printf '\\n%s 0\\n' {mark} >&2")

    def _bytes(self, words: Sequence[str], before: str, after: str) -> bytes:
        if any("\0" in w for w in words):
            raise UsageError("a NUL character cannot be in a command or file name", where=next(repr(w) for w in words if "\0" in w))
        try:
            return f'{before}\nset -- {shlex.join(words)}\n{COMMON}{self.text}main "$@"\n{after}\n'.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError as e:
            raise UsageError("a command or file name has half a surrogate pair in it, which is no text", where=repr(e.object[e.start:e.end])) from e


COMMON = r"""
CDPATH=; cd / || exit 125
nap() { sleep 0.2 2>/dev/null || sleep 1; }
there() { [ -n "$1" ] && kill -s 0 -- "-$1" 2>/dev/null; }
marked() { grep -l "EDGEKD_RUN=$1" /proc/[0-9]*/environ 2>/dev/null | sed 's/[^0-9]//g'; }
signal() {  # $1 which, $2 leader of a group or nothing, $3 mark
  [ -z "$2" ] || kill -s "$1" -- "-$2" 2>/dev/null
  for p in $(marked "$3"); do kill -s "$1" "$p" 2>/dev/null; done
}
stop() {  # a group and all with its mark: asked first, and after two seconds not
  there "$1" || [ -n "$(marked "$2")" ] || return 0
  signal TERM "$1" "$2"
  n=0
  while [ $n -lt 10 ] && { there "$1" || [ -n "$(marked "$2")" ]; }; do nap; n=$((n + 1)); done
  signal KILL "$1" "$2"
}
stop_all() {  # every program of the session folder $1, whose name is its mark
  for f in "$1"/run-*; do
    g=; { read -r g _ < "$f"; } 2>/dev/null
    # the number may be another program's by now: after a restart of the board, or when it ended long ago
    case $g in ''|*[!0-9]*) g= ;; *) [ ! -r /proc/self/environ ] || grep -q "EDGEKD_RUN=${1##*/}" "/proc/$g/environ" 2>/dev/null || g= ;; esac
    stop "$g" "${1##*/}"
    rm -f "$f"
  done
  stop '' "${1##*/}"
}
"""

BARE = Script('main() { "$@" </dev/null; }\n')
"""A short command, its exit code and nothing around it."""

OPEN = Script(r"""
# $1 a folder, or nothing: the folder of this account, made where it is missing
main() {
  umask 077
  case $1 in
    '') for base in /tmp "$TMPDIR" "$HOME"; do [ -n "$base" ] && [ -d "$base" ] && [ -w "$base" ] && break; done ;;
    '~') base=$HOME ;;
    '~/'*) base=$HOME/${1#??} ;;
    /*) base=$1 ;;
    *) base=$HOME/$1 ;;
  esac
  cd "$base" 2>/dev/null || { echo "there is no folder $base" >&2; return 3; }
  base=$(pwd -P; echo .); base=${base%??}
  user=$(id -un 2>/dev/null); case $user in ''|.*|*[!A-Za-z0-9._-]*) user=$(id -u) ;; esac
  root=${base%/}/edgekd-$user
  mkdir "$root" 2>/dev/null
  # a folder that somebody else made beforehand could be looked into and changed
  if [ -L "$root" ] || [ ! -d "$root" ]; then echo "$root cannot be made" >&2; return 4; fi
  set -- $(ls -ldn "$root" | { read -r _ _ owner _; echo "$owner"; })
  [ "$1" = "$(id -u)" ] || { echo "$root is not ours" >&2; return 5; }
  # others may pass, to see whether the board is taken, but not look around; sessions are 700
  chmod 711 "$root" || return 6
  printf 'arch=%s\nbits=%s\nroot=%s\n' "$(uname -m)" "$(getconf LONG_BIT 2>/dev/null)" "$root"
}
""")

BEGIN = Script(r"""
# $1 folder of this account, $2 name of the new session. We hold the lock: any other session is of somebody who is gone
main() {
  umask 077
  for old in "$1"/session-*; do
    [ -d "$old" ] || continue
    stop_all "$old"; rm -rf "$old"
  done
  mkdir "$1/$2" "$1/$2/files" "$1/$2/tmp"
}
""")

STILL = Script(r"""
# $1 folder of this account, $2 session, $3 who must hold the lock
main() {
  id=; { read -r id < "$1/lock/id"; } 2>/dev/null
  [ "$id" = "$3" ] && [ -d "$1/$2/files" ]
}
""")

RUN = Script(r"""
# $1 session folder, $2 number of this run, $3 heartbeat, $4 seconds a round, $5 rounds without a heartbeat, then the program and its words
watch() {  # by content, not by time: this board's clock may jump
  trap 'kill "$z" 2>/dev/null; exit 0' TERM
  n=0 last=
  while [ $n -lt "$rounds" ]; do
    sleep "$step" & z=$!
    wait $z
    now=; { read -r now < "$beat"; } 2>/dev/null
    if [ "$now" = "$last" ]; then n=$((n + 1)); else n=0 last=$now; fi
  done
  stop "$g" "$id"
}
main() {
  s=$1 id=${1##*/}.$2. beat=$3 step=$4 rounds=$5 file=$1/run-$2; shift 5
  cd "$s" || return 125
  TMPDIR=$s/tmp; export TMPDIR
  # a session, so a group, of its own; this shell is in another group, so setsid(1) does not fork and $! is the program
  if command -v setsid >/dev/null 2>&1; then
    EDGEKD_RUN=$id setsid sh -c 'exec "$@"' sh "$@" </dev/null &
  else
    set -m 2>/dev/null
    EDGEKD_RUN=$id sh -c 'exec "$@"' sh "$@" </dev/null &
    set +m 2>/dev/null
  fi
  g=$!
  echo "$g" > "$file"
  watch </dev/null >/dev/null 2>&1 & w=$!
  wait $g; c=$?
  kill "$w" 2>/dev/null; wait $w 2>/dev/null
  stop "$g" "$id"
  rm -f "$file"
  return $c
}
""")

KILL = Script(r"""
# $1 session folder, $2 number of the run
main() {
  g=; { read -r g < "$1/run-$2"; } 2>/dev/null
  stop "$g" "${1##*/}.$2."
  rm -f "$1/run-$2"
}
""")

END = Script('main() { stop_all "$1"; rm -rf "$1"; }\n')
"""$1 session folder."""

FREE = Script('main() { df -Pk "$1"; }\n')

SAME = Script(r"""
# $1 a file that is there already, $2 where it is needed once more
main() { rm -f "$2.part"; { ln "$1" "$2.part" 2>/dev/null || cp "$1" "$2.part"; } && mv -f "$2.part" "$2"; }
""")
