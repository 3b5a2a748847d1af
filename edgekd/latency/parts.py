"""The files of an artifact, or a file alone, as what is predicted and saved: which part, in what format and precision, called how often."""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from edgekd.errors import EdgekdError
from edgekd.latency import graphs
from edgekd.latency.operators import Operator

if TYPE_CHECKING:
    from edgekd.artifact import ArtifactComponent
    from edgekd.profiling.bare import ModelFile

NOT_TOGETHER = {"proposer"}
"""Components that one use of an artifact does not call."""


@dataclass(frozen=True)
class Part:
    """One file. `calls`: of one use; `lengths`: of its axes of any length, by symbol; `shapes`: of its inputs, with those."""

    name: str
    file: Path
    format: str
    scheme: str
    lengths: Mapping[str, int] = field(default_factory=dict)
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    calls: int = 1
    together: bool = True

    def operators(self) -> list[Operator]:
        """As its runtime executes it; of an ONNX file for a runtime that is not here as exported; none of files that cannot be read here.

        Raises:
            EdgekdError: the file is damaged.
        """
        if self.format in graphs.RUNTIMES:
            return graphs.executed(self.file, self.format, scheme=self.scheme, lengths=self.lengths, shapes=self.shapes)
        return graphs.plain(self.file, self.lengths) if self.file.suffix == ".onnx" else []


def of(source: Path | ModelFile, *, prompts: int = 1, format: str | None = None, scheme: str | None = None, lengths: Mapping[str, int] | None = None) -> list[Part]:
    """The parts of an artifact's folder, or the one part of a file; `format` and `scheme` are of a file whose name does not say them.

    Raises:
        EdgekdError: there is no such artifact or file.
    """
    from edgekd.artifact import Manifest
    from edgekd.profiling.bare import PART, ModelFile, is_model_file, model_file

    if not isinstance(source, ModelFile):
        path = Path(source)
        if not is_model_file(path):
            manifest = Manifest.load(path)
            return [_part(name, part, path, part.format or manifest.format, manifest.decoder_signature == "sam", prompts)
                    for name, part in manifest.components.items()]
        source = model_file(path, format=format, scheme=scheme, lengths=lengths)
    if not source.path.exists():
        raise EdgekdError("there is no such file", where=source.path)
    return [Part(PART, source.path, source.format, source.scheme, source.lengths)]


def _part(name: str, part: ArtifactComponent, folder: Path, format: str, single: bool, prompts: int) -> Part:
    """Of an axis of any length the first is that of prompts, which go through together; all others count one, as one click does."""
    rows = {i.shape[0] for i in part.inputs if i.shape and isinstance(i.shape[0], str)}
    symbols = {s for i in part.inputs for s in i.shape if isinstance(s, str)}
    lengths = {s: part.fixed.get(s, prompts if s in rows else 2 if single else 1) for s in symbols}  # SAM's signature adds a point that is none
    calls = prompts if single and rows | symbols else max([math.ceil(prompts / part.fixed[r]) for r in rows if r in part.fixed], default=1)
    shapes = {i.name: [lengths[s] if isinstance(s, str) else s for s in i.shape] for i in part.inputs}
    return Part(name, folder / part.file, format, part.scheme, lengths, shapes, calls, name not in NOT_TOGETHER)
