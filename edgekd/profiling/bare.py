"""A model file alone, of any format and from anywhere: no manifest says what it takes, so its runtime is asked, and seeded arrays are what it is run on."""
from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgekd import plugins
from edgekd.errors import EdgekdError, UsageError, first_line, unknown
from edgekd.protocols import Exporter, Session, facts
from edgekd.runtime import TOGETHER
from edgekd.tasks.tensors.inputs import Input, draw, lengths_of, of_ports

PART = "model"


@dataclass(frozen=True)
class ModelFile:
    """A file and how it is opened. `lengths` are of axes of any length; the others of these are 1."""

    path: Path
    format: str
    scheme: str
    lengths: Mapping[str, int] = field(default_factory=dict)

    @property
    def files(self) -> list[Path]:
        """All that belong to it."""
        return list(facts(plugins.exporter(self.format)).files(self.path))

    @property
    def size_bytes(self) -> int:
        """Of all of them."""
        return sum(f.stat().st_size for f in self.files if f.is_file())

    def told(self, path: str) -> str:
        """As a measuring module is told of it, by its path on the device."""
        return json.dumps({"path": path, "format": self.format, "scheme": self.scheme, "lengths": dict(self.lengths)})

    @classmethod
    def of(cls, text: str) -> ModelFile | None:
        """The way back; None for the path of an artifact."""
        if not text.startswith("{"):
            return None
        told = json.loads(text)
        return cls(Path(told["path"]), told["format"], told["scheme"], told["lengths"])


def model_file(path: Path, *, format: str | None = None, scheme: str | None = None, lengths: Mapping[str, int] | None = None) -> ModelFile:
    """A file of the format that its suffix says, or that is named, in the precision named.

    Raises:
        UsageError: there is no such file, no format has its suffix, or the format has no such scheme.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UsageError(f"there is no file at {path}")
    exporter = plugins.exporter(format) if format is not None else _by_suffix(path)
    if scheme is not None and scheme not in exporter.schemes:
        raise unknown(f"{exporter.format} scheme", scheme, exporter.schemes)
    return ModelFile(path, exporter.format, scheme or ("fp32" if "fp32" in exporter.schemes else exporter.schemes[0]), dict(lengths or {}))


def is_model_file(path: Path) -> bool:
    """Whether a path is to be read as one: any file, and a folder that a format writes (`.mlpackage`)."""
    return path.is_file() or (path.is_dir() and any(path.name.endswith(e.suffix) for e in plugins.exporters().values()))


def _by_suffix(path: Path) -> Exporter:
    """The format with the longest suffix that fits; of several with one suffix the one that runs here."""
    fitting = [e for e in plugins.exporters().values() if path.name.lower().endswith(e.suffix)]
    if not fitting:
        known = ", ".join(dict.fromkeys(e.suffix for e in plugins.exporters().values()))
        raise UsageError(f"no format has files like {path.name}", where=path, hint=f"known are {known}; an artifact's folder is profiled too")
    longest = max(len(e.suffix) for e in fitting)
    same = [e for e in fitting if len(e.suffix) == longest]
    return next((e for e in same if e.availability().ok and e.availability().runs), same[0])


def require_runtime(file: ModelFile) -> None:
    """Raises EdgekdError, with what to install, where files of this format do not run here."""
    found = plugins.exporter(file.format).availability()
    if not (found.ok and found.runs):
        raise EdgekdError(f"the runtime of '{file.format}' is missing here: {found.reason}", where=file.path, hint=found.fix)


class OpenedFile:
    """A model file on its runtime, for the clock: what `edgekd.runtime.Opened` is for an artifact."""

    parts = (PART,)

    def __init__(self, file: ModelFile, *, threads: int | None = None) -> None:
        self.file, self.threads, self.name = file, threads, file.path.name
        self._session: Session | None = None

    def session(self, part: str) -> Session:
        """The opened file. Raises EdgekdError when its runtime is missing or refuses it."""
        if self._session is None:
            require_runtime(self.file)
            try:
                self._session = plugins.exporter(self.file.format).open(self.file.path, scheme=self.file.scheme, threads=self.threads)
            except EdgekdError as e:
                raise EdgekdError(e.what, where=self.file.path, hint=f"the file is damaged, or no {self.file.format} model") from e
            except Exception as e:  # runtimes share no kind of error
                raise EdgekdError(f"{self.file.format} cannot open the file: {first_line(e)}", where=self.file.path,
                                  hint="it is damaged, or of another format") from e
        return self._session

    @property
    def inputs(self) -> list[Input]:
        """What the file says that it takes."""
        return of_ports(self.session(PART).inputs)

    def sample(self) -> dict[str, np.ndarray]:
        """Seeded arrays that the file takes: whole numbers are 0 where it refuses others, being indices of something small.

        Raises:
            EdgekdError: it takes neither, or an input that is no array of numbers.
        """
        inputs = self.inputs
        try:
            drawn = draw(inputs, lengths_of(inputs, self.file.lengths, least=True), seed=0)
        except TypeError as e:
            raise EdgekdError(f"an input of the file is no array of numbers: {first_line(e)}", where=self.file.path) from e
        zeros = {name: value if value.dtype.kind == "f" else np.zeros_like(value) for name, value in drawn.items()}
        for last, one in ((False, drawn), (True, zeros)):
            try:
                self.session(PART).run(one)
                return one
            except Exception as e:  # runtimes share no kind of error
                if last:
                    raise EdgekdError(f"the file does not run on {', '.join(f'{n} {v.shape}' for n, v in drawn.items())}: {first_line(e)}", where=self.file.path,
                                      hint=f"give axes of any length with --length AXIS=N; it takes {', '.join(i.words() for i in inputs)}") from e
        raise AssertionError("unreachable")

    def calls(self, prompts: int) -> dict[str, Callable[[], object]]:
        """One call."""
        session, sample = self.session(PART), self.sample()
        return {PART: lambda: session.run(sample), TOGETHER: lambda: session.run(sample)}

    def described(self) -> dict[str, Any]:
        """What it was run on: `{"images": "1x3x224x224:float32"}`."""
        return {n: f"{'x'.join(map(str, v.shape))}:{v.dtype}" for n, v in self.sample().items()}
