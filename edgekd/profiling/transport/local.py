"""This machine as the device: nothing is copied, commands run in a fresh process of the same Python."""
from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from edgekd.errors import EdgekdError
from edgekd.measurement import Circumstances
from edgekd.profiling.transport import Completed


class Local:
    """See `edgekd.profiling.transport.Transport`."""

    name = "local"

    def probe(self) -> dict[str, object]:
        """The machine's own circumstances."""
        return Circumstances.capture().model_dump(mode="json")

    def push(self, folder: Path) -> str:
        """The folder is already here."""
        if not Path(folder).exists():
            raise EdgekdError("there is nothing to push", where=folder)
        return str(Path(folder).resolve())

    def run(self, module: str, arguments: Sequence[str], *, timeout_s: float) -> Completed:
        """A fresh process, so that its memory and threads are its own."""
        command = [sys.executable, "-m", module, *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
        except subprocess.TimeoutExpired as e:
            raise EdgekdError(f"no answer within {timeout_s:.0f} s from `{' '.join(command[1:4])} ...`", where=self.name,
                              hint="the machine is busy or the model hangs: try fewer repeats or a smaller model") from e
        return Completed(done.returncode, done.stdout, done.stderr)

    def pull(self, path: str, local: Path) -> Path:
        """A plain copy."""
        if Path(path).resolve() != Path(local).resolve():
            shutil.copyfile(path, local)
        return Path(local)
