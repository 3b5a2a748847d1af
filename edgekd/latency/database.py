"""What has been measured on devices, kept as rows: what each operator took, and each model file as a whole.

Files of JSON lines, plain or gzipped: those shipped in `edgekd/latency/data/` and the user's own in `home()`, where `save` appends. A line is one of

    {"row": "at",    "at": ID, "key": {...}, "circumstances": {...}}                            where and when; the lines that name its ID follow
    {"row": "op",    "at": ID, "n": 3, "family": "none", "ms": 0.12, "times": 4, "op": "Conv", "in": ["1x64x32x32"], ...}
    {"row": "model", "at": ID, "id": "repvit_s-256", "family": "repvit", "ms": 8.2, "rounds": [8.1, 8.3], "ops": {"3": 4}, ...}

A model names its operators by their numbers and how often each occurs in it, so that everything can be fitted and checked from the rows alone.
A line that cannot be read is left out and told of in `notes`; nothing else is lost.
"""
from __future__ import annotations

import contextlib
import fcntl
import gzip
import json
import os
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.errors import EdgekdError
from edgekd.latency.keys import Key, key_of
from edgekd.latency.operators import Operator
from edgekd.measurement import Circumstances
from edgekd.workspace import fingerprint, usable_folder, write_atomic

if TYPE_CHECKING:
    from edgekd.profiling.bare import ModelFile
    from edgekd.profiling.profile import Profile
    from edgekd.target import Target

__all__ = ["NO_FAMILY", "SHIPPED", "Database", "Key", "ModelRow", "OperatorRow", "Writer", "home", "key_of", "open_database", "save"]

SHIPPED = Path(__file__).parent / "data"
OWN = "measured.jsonl"
"""Where `save` appends, in `home()`; other files there are read too."""
NO_FAMILY = "none"
"""Of networks that were drawn at random: what is learned from them holds for every family."""
OWN_FAMILY = "own"
"""Of what users measured: it could be anything."""
OLD_DAYS = 180


def home() -> Path:
    """Where the user's rows are: `$EDGEKD_HOME`, else `~/.local/share/edgekd`."""
    return Path(os.environ.get("EDGEKD_HOME") or Path.home() / ".local/share/edgekd").expanduser()


@dataclass(frozen=True)
class OperatorRow:
    """An operator and its median, in milliseconds."""

    key: Key
    operator: Operator
    family: str
    ms: float
    times: int
    date: str


@dataclass(frozen=True)
class ModelRow:
    """A model file measured untraced. `operators` are numbers into `Database.operators` with their counts; empty where its graph was not read."""

    key: Key
    id: str
    family: str
    ms: float
    date: str
    operators: tuple[tuple[int, int], ...] = ()
    rounds: tuple[float, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    own: bool = False
    """Whether the user measured it."""


@dataclass
class Database:
    """Rows with what they were measured under. `notes` says what was left out, and why."""

    operators: list[OperatorRow] = field(default_factory=list)
    models: list[ModelRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def counts(self) -> dict[Key, tuple[int, int]]:
        """key -> numbers of operators and of models."""
        ops, models = Counter(r.key for r in self.operators), Counter(r.key for r in self.models)
        return {key: (ops[key], models[key]) for key in dict.fromkeys([*ops, *models])}

    def select(self, keep: Iterable[Key]) -> Database:
        """The rows of these keys."""
        wanted = set(keep)
        numbers = [n for n, row in enumerate(self.operators) if row.key in wanted]
        return self._of(numbers, [m for m in self.models if m.key in wanted])

    def without(self, family: str) -> Database:
        """Nothing of one family: neither its models nor what its operators took."""
        return self._of([n for n, row in enumerate(self.operators) if row.family != family], [m for m in self.models if m.family != family])

    def _of(self, numbers: list[int], models: list[ModelRow]) -> Database:
        new = {old: n for n, old in enumerate(numbers)}
        return Database([self.operators[n] for n in numbers],
                        [replace(m, operators=tuple((new[n], count) for n, count in m.operators if n in new)) for m in models], list(self.notes))

    def warning(self, version: str | None = None, *, now: datetime | None = None) -> str | None:
        """What makes these rows doubtful today: their age, or another version of the runtime than `version`; None when nothing does."""
        dates = [*(r.date for r in self.operators), *(m.date for m in self.models)]
        if not dates:
            return None
        found = []
        age = (now or datetime.now(timezone.utc)) - _when(max(dates))
        if age.days > OLD_DAYS:
            found.append(f"the newest of these measurements is {age.days} days old")
        versions = sorted({key.version for key in self.counts()})
        if version is not None and version not in versions:
            found.append(f"they were made with {', '.join(versions)}, and {version} is installed")
        return "; ".join(found) + "; measure again with `edgekd profile --save`" if found else None


def _when(date: str) -> datetime:
    try:
        found = datetime.fromisoformat(date)
    except ValueError:
        return datetime.fromtimestamp(0, timezone.utc)
    return found if found.tzinfo else found.replace(tzinfo=timezone.utc)


# --- reading


def open_database(folder: Path | None = None, *, shipped: bool = True) -> Database:
    """The shipped rows and the user's own, which are those of `folder` (default `home()`)."""
    own = Path(folder) if folder is not None else home()
    database = Database()
    for path in sorted(SHIPPED.glob("*.jsonl*")) if shipped else []:
        read(path, database)
    for path in sorted(own.glob("*.jsonl*")) if own.is_dir() else []:
        read(path, database, own=True)
    return database


def read(path: Path, into: Database, *, own: bool = False) -> None:
    """Add the rows of one file; what cannot be read is noted."""
    at: dict[str, tuple[Key, str]] = {}
    numbers: dict[tuple[str, int], int] = {}
    bad = 0
    for line in _lines(path, into):
        try:
            row = json.loads(line)
            if row["row"] == "at":
                at[row["at"]] = (Key(**row["key"]), str(row["circumstances"]["date"]))
                continue
            key, date = at[row["at"]]
            if row["row"] == "op":
                numbers[row["at"], int(row["n"])] = len(into.operators)
                into.operators.append(OperatorRow(key, Operator.read(row), str(row["family"]), _positive(row["ms"], zero=True), int(row["times"]), date))
            else:
                used = tuple((numbers[row["at"], int(n)], int(count)) for n, count in row.get("ops", {}).items())
                facts = {k: v for k, v in row.items() if k not in ("row", "at", "id", "family", "ms", "rounds", "ops")}
                into.models.append(ModelRow(key, str(row["id"]), str(row["family"]), _positive(row["ms"]), date, used, tuple(row.get("rounds", ())), facts, own))
        except (ValueError, KeyError, TypeError, AttributeError):
            bad += 1
    if bad:
        into.notes.append(f"{path.name}: {bad} damaged {'line was' if bad == 1 else 'lines were'} left out")


def _lines(path: Path, into: Database) -> Iterator[str]:
    """Of a plain or gzipped file, as far as it can be read."""
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rt", encoding="utf-8", errors="replace") as packed:
                yield from (line for line in packed if line.strip())
        else:
            yield from (line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip())
    except (OSError, EOFError) as e:
        into.notes.append(f"{path.name}: the rest cannot be read ({e})")


def _positive(value: Any, *, zero: bool = False) -> float:
    number = float(value)
    if not (0 < number < 1e7 or (zero and number == 0)):
        raise ValueError("no time")
    return number


# --- writing


class Writer:
    """Gathers what was measured under one key: the same operator of one family becomes one row, the median of all of its."""

    def __init__(self, key: Key, circumstances: Circumstances) -> None:
        self.key, self._about = key, circumstances.model_dump(mode="json")
        self.at = fingerprint([asdict(key), self._about])[:8]
        self._seen: dict[tuple[str, str], tuple[int, dict[str, Any], list[float]]] = {}
        self._models: list[dict[str, Any]] = []

    def model(self, id: str, family: str, operators: Sequence[Operator], took: Sequence[float] | None, ms: float, *, rounds: Sequence[float] = (),
              **facts: Any) -> None:
        """One model: its operators in order, what each took in milliseconds (None: not measured one by one), and all of it untraced.

        Raises:
            ValueError: not as many times as operators.
        """
        used = self.parts(family, operators, took)
        self._models.append({"row": "model", "at": self.at, "id": id, "family": family, "ms": _round(ms), "rounds": [_round(r) for r in rounds], **facts,
                             "ops": {str(n): count for n, count in used.items()}})

    def parts(self, family: str, operators: Sequence[Operator], took: Sequence[float] | None) -> dict[int, int]:
        """The operators alone, of something whose time as a whole is not kept: their numbers, and how often each occurs.

        Raises:
            ValueError: not as many times as operators.
        """
        used: dict[int, int] = defaultdict(int)
        if took is not None and len(took) != len(operators):
            raise ValueError(f"{len(operators)} operators and {len(took)} times")
        for at, operator in enumerate(operators):
            told = operator.told()
            number, _, times = self._seen.setdefault((family, json.dumps(told, sort_keys=True)), (len(self._seen), told, []))
            used[number] += 1
            if took is not None:
                times.append(took[at])
        return dict(used)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """In the order in which they can be read. Operators that were not measured one by one have no time and are told by `times` 0."""
        return [{"row": "at", "at": self.at, "key": asdict(self.key), "circumstances": self._about},
                *({"row": "op", "at": self.at, "n": n, "family": family, "ms": _round(statistics.median(times)) if times else 0.0, "times": len(times)} | told
                  for (family, _), (n, told, times) in self._seen.items()),
                *self._models]

    def text(self) -> str:
        """JSON lines."""
        return "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in self.rows)

    def save(self, path: Path) -> Path:
        """The whole file anew, gzipped when it is named so, always the same bytes for the same rows."""
        data = self.text().encode()
        return write_atomic(path, gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)

    def append(self, folder: Path | None = None) -> Path:
        """Add to the user's rows, whole or not at all, also while another process does the same.

        Raises:
            UsageError: the folder cannot be written.
        """
        folder = usable_folder(folder if folder is not None else home())
        path = folder / OWN
        with _alone(folder):
            before = path.read_bytes() if path.exists() else b""
            return write_atomic(path, before + (b"\n" if before and not before.endswith(b"\n") else b"") + self.text().encode())


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with open(folder / f".{OWN}.lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _round(ms: float) -> float:
    """Five digits: clocks tell no more."""
    if ms < 0:
        raise EdgekdError(f"{ms} ms is no time")
    return float(f"{ms:.5g}")


def save(profile: Profile, target: str | Target, source: Path | ModelFile, *, folder: Path | None = None) -> Path:
    """Add what was measured to the user's rows: of every component its median and, where its runtime tells which those are, its operators.

    Args:
        source: the artifact's folder or the file that the profile is of.
        folder: in place of `home()`.

    Raises:
        EdgekdError: the artifact cannot be read, or the folder not be written.
    """
    from edgekd.latency import parts

    path = None
    for part in parts.of(source, prompts=profile.prompts):
        measured = profile.components.get(part.name)
        if measured is None:
            continue
        writer = Writer(key_of(profile.circumstances, target, part.format, part.scheme, profile.circumstances.threads), profile.circumstances)
        writer.model(f"{profile.id}/{part.name}", OWN_FAMILY, part.operators(), None, measured.latency_ms.p50, calls=part.calls, executed=measured.executed_precision)
        path = writer.append(folder)
    if path is None:
        raise EdgekdError("the profile has no component of this artifact", where=source, hint="save a profile together with the artifact that it is of")
    return path
