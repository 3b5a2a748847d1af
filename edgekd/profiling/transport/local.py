"""This machine as the device: nothing is copied, commands run in a fresh process."""
from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from typing_extensions import Self

from edgekd.errors import EdgekdError
from edgekd.measurement import Circumstances
from edgekd.profiling.transport import Completed


class Local:
    """See `edgekd.profiling.transport.Transport`."""

    name = "local"
    python = sys.executable

    def probe(self) -> dict[str, object]:
        """The machine's own circumstances."""
        return Circumstances.capture().model_dump(mode="json")

    def push(self, path: Path) -> str:
        """It is already here."""
        if not Path(path).exists():
            raise EdgekdError("there is nothing to push", where=path)
        return str(Path(path).resolve())

    def run(self, command: Sequence[str], *, timeout_s: float) -> Completed:
        """A fresh process, so that its memory and threads are its own; killed with its children when it takes too long."""
        process = subprocess.Popen(list(command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
        try:
            out, said = process.communicate(timeout=timeout_s)
        except BaseException as e:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(e, subprocess.TimeoutExpired):
                raise
            raise EdgekdError(f"no answer within {timeout_s:.0f} s from `{' '.join(command[1:4])} ...`", where=self.name,
                              hint="the machine is busy or the model hangs: try fewer repeats or a smaller model") from e
        return Completed(process.returncode, out, said)

    def pull(self, path: str, local: Path) -> Path:
        """A plain copy."""
        if Path(path).resolve() != Path(local).resolve():
            shutil.copyfile(path, local)
        return Path(local)

    def close(self) -> None:
        """There is nothing to give back."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
