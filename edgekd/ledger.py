"""`ledger.jsonl`: every finished piece of work of a run, appended and never changed. It is the run's memory as well as its record.

A line is `{"at", "what", "id", "key", "result"}`: `what` was done (`export`, `profile`, `evaluate`, ...) for `id`; `key` is a
fingerprint of everything that the result depends on. Work whose key is found again is not done again. A line cut short by
`kill -9` is ignored, and so is one that was altered.
"""
from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

Result = dict[str, Any]


class Ledger:
    """The ledger of one run folder; one process at a time (see `workspace.run_lock`)."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._found: dict[tuple[str, str], Result] = {}
        self.reused = 0
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.exists() else []:
            try:
                row = json.loads(line)
                self._found[row["what"], row["key"]] = row["result"]
            except (ValueError, KeyError, TypeError):
                continue

    def known(self, what: str, key: str) -> Result | None:
        """The result of earlier work with this key."""
        return self._found.get((what, key))

    def record(self, what: str, id: str, key: str, result: Result) -> Result:
        """Append a line and make sure that it is on disk. After a line that was cut short, a new line is begun first."""
        self._found[what, key] = result
        row = {"at": datetime.now(timezone.utc).isoformat(timespec="seconds"), "what": what, "id": id, "key": key, "result": result}
        with open(self.path, "a+b") as f:
            if f.tell() and not _ends_line(f):
                f.write(b"\n")
            f.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            f.flush()
            os.fsync(f.fileno())
        return result

    def once(self, what: str, id: str, key: str, work: Callable[[], Result]) -> Result:
        """The result of `work`, done now or earlier."""
        found = self.known(what, key)
        if found is not None:
            self.reused += 1
            return found
        return self.record(what, id, key, work())


def _ends_line(f: Any) -> bool:
    f.seek(-1, os.SEEK_END)
    return f.read(1) == b"\n"
