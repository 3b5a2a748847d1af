"""Milliseconds of an encoder on a target, from the file that would ship. Latency asks no weights, so a cut is measured before it is trained."""
from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from edgekd import plugins
from edgekd.models.fold import fold
from edgekd.models.rounding import layers
from edgekd.profiling import ModelFile, profile_many
from edgekd.protocols import Component, facts

if TYPE_CHECKING:
    import numpy as np

    from edgekd.schemes import Precision
    from edgekd.target import Target


class Meter:
    """Exports the encoder alone in a format and precision, and runs it on the target."""

    def __init__(self, part: Component, target: Target, format: str, precision: Precision, *, threads: int | None = None,
                 calibration: Iterable[Mapping[str, np.ndarray]] | None = None) -> None:
        """`part` is the encoder as a component; its module is replaced by what is measured."""
        self.part, self.target, self.exporter, self.threads = part, target, plugins.exporter(format), threads
        self.asked = precision.parts({part.name: list(layers(part.module))})[part.name]
        self.calibration = calibration if precision.looks_at_inputs else None

    def __call__(self, encoder: nn.Module) -> float:
        """The median of a call, in milliseconds.

        Raises:
            EdgekdError: it cannot be exported, or does not run there.
        """
        tuned: dict[str, Any] = {"tuning": self.asked.tuning} if facts(self.exporter).tunes else {}
        with tempfile.TemporaryDirectory(prefix="edgekd-prune-") as folder:
            path = Path(folder) / f"{self.part.name}{self.exporter.suffix}"
            component = replace(self.part, module=fold(encoder).eval())
            self.exporter.export(component, path, scheme=self.asked.scheme, qdq=self.target.qdq(self.exporter.format), calibration=self.calibration, **tuned)
            file = ModelFile(path, self.exporter.format, self.asked.scheme)
            return profile_many([file], self.target, threads=self.threads, memory=False)[0].latency_ms.p50
