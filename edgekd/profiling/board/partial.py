"""What a board has finished, kept line by line in `result.partial.jsonl`: a power cut loses the model in work and no more.

    {"job": KEY, "begun": {...}}          circumstances when the job was begun
    {"job": KEY, "started": ID}           written before a model is measured: three of them without an answer mean that it takes the board down
    {"job": KEY, "stopped": ID}           it was told to stop: that start does not count
    {"job": KEY, "finished": {...}}       a model of the result, complete or with its error

Lines of another job, and a last line that was cut short, count for nothing.
"""
from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from .job import PARTIAL, Trouble

if TYPE_CHECKING:
    from collections.abc import Iterator

TRIES = 3


class Partial:
    """The file of one job, read when opened."""

    def __init__(self, folder: str, key: str) -> None:
        self.path, self.key = os.path.join(folder, PARTIAL), key
        self.begun: dict[str, Any] | None = None
        self.starts: dict[str, int] = {}
        self.finished: dict[str, dict[str, Any]] = {}
        for line in self._lines():
            if "begun" in line:
                self.begun = self.begun or line["begun"]
            elif "started" in line:
                self.starts[line["started"]] = self.starts.get(line["started"], 0) + 1
            elif "stopped" in line:
                self.starts[line["stopped"]] = self.starts.get(line["stopped"], 1) - 1
            elif "finished" in line:
                self.finished[line["finished"]["id"]] = line["finished"]

    def begin(self, circumstances: dict[str, Any]) -> dict[str, Any]:
        """Circumstances at the very beginning: those of before where the job goes on."""
        if self.begun is None:
            self._append({"begun": circumstances})
            self.begun = circumstances
        return self.begun

    def start(self, name: str) -> None:
        """A model is about to be measured. Raises Trouble where it was begun `TRIES` times and never ended."""
        if self.starts.get(name, 0) >= TRIES:
            raise Trouble(f"it was begun {TRIES} times, and every time the board stopped answering before it was done", "try it on the board by hand, or "
                          "a smaller one: it may take more memory than the board has")
        self._append({"started": name})
        self.starts[name] = self.starts.get(name, 0) + 1

    def stop(self, name: str) -> None:
        """The model begun last is given up because somebody said so, not because of anything it did."""
        self._append({"stopped": name})

    def finish(self, found: dict[str, Any]) -> None:
        """A model is done."""
        self._append({"finished": found})
        self.finished[found["id"]] = found

    def _lines(self) -> Iterator[dict[str, Any]]:
        try:
            with open(self.path, encoding="utf-8") as f:
                for text in f:
                    try:
                        line = json.loads(text)
                    except ValueError:
                        continue  # cut short when the board went down
                    if isinstance(line, dict) and line.get("job") == self.key:
                        yield line
        except OSError:
            return

    def _append(self, line: dict[str, Any]) -> None:
        data = (json.dumps({"job": self.key, **line}) + "\n").encode()
        try:
            fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                if os.fstat(fd).st_size and not _ends_line(self.path):
                    os.write(fd, b"\n")
                if os.write(fd, data) < len(data):
                    raise OSError("no space left")
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as e:
            raise Trouble(f"the board cannot keep results: {e.strerror or e} ({self.path})", "make room there, or name another folder in the target's "
                          "device.folder") from e


def _ends_line(path: str) -> bool:
    with open(path, "rb") as f:
        f.seek(-1, os.SEEK_END)
        return f.read(1) == b"\n"
