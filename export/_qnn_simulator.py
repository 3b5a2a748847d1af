"""A compiled file in the vendor's simulator of the HTP, which lives in a process of its own as long as the session does."""
from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.export import _child
from edgekd.export._qnn import receive, send

from edgekd.errors import EdgekdError
from edgekd.protocols import Port

if TYPE_CHECKING:
    import numpy as np

MINUTES = 5.0
"""of one call, the first of which opens the file"""
START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from edgekd.export._qnn import serve; serve(sys.argv[2])"
TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16"}


class Simulator:
    """A compiled file on the HTP's simulator. `precision` and `ops` are its compiler's."""

    stand_in_for = "the vendor's HTP simulator running the compiled file"

    def __init__(self, path: Path, precision: str, ops: Mapping[str, int]) -> None:
        self._path, self.executed_precision, self.executed_ops = path, precision, dict(ops)
        found = _child.call("edgekd.export._qnn:load", {"context": str(path)}, minutes=MINUTES, what="the HTP simulator")
        self.inputs = [Port(name, tuple(shape), TYPES.get(type, type)) for name, (shape, type) in found["inputs"].items()]
        self._child: subprocess.Popen[bytes] | None = None

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What the file does not take is left out.

        Raises:
            EdgekdError: the simulator died, or took longer than `MINUTES`.
        """
        import numpy as np

        if self._child is None or self._child.poll() is not None:
            self._start()
        child = self._child
        assert child is not None and child.stdin is not None and child.stdout is not None
        late = threading.Timer(MINUTES * 60, child.kill)
        late.start()
        try:
            send(child.stdin, {port.name: np.ascontiguousarray(inputs[port.name], dtype=port.dtype) for port in self.inputs})
            found = receive(child.stdout)
        except BrokenPipeError:
            found = None
        finally:
            late.cancel()
        if found is None:
            code = child.wait()
            raise EdgekdError(f"the HTP simulator ended with exit code {code}: {self._last_words()}", where=self._path, hint=f"one call may take {MINUTES:g} minutes")
        return found

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="edgekd-")
        with self._said().open("wb") as said:
            self._child = subprocess.Popen([sys.executable, "-c", START, json.dumps(sys.path), str(self._path)], stdin=subprocess.PIPE,
                                           stdout=subprocess.PIPE, stderr=said)
        weakref.finalize(self, _end, self._child)

    def _said(self) -> Path:
        return Path(self._folder.name) / "output.txt"

    def _last_words(self) -> str:
        lines = [line.strip() for line in self._said().read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return " / ".join(lines[-3:])[:500] or "it said nothing"


def _end(child: Any) -> None:
    """The child goes with its session, also when this process ends."""
    child.kill()
    child.wait()
    for stream in (child.stdin, child.stdout):
        stream.close()
