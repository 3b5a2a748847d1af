"""What the formats of ExecuTorch share: a component to a torch program, that to a `.pte` file in a child process.

The order of a file's inputs and outputs is the component's; a `.pte` has no names for them, so a constant method of it answers with those
(`_executorch_file.NAMES`).
"""
from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.export import _child
from edgekd.export._executorch_file import Contents, read
from edgekd.export._program import program, quiet, without_aliases

from edgekd.errors import EdgekdError, UsageError, first_line, unknown
from edgekd.protocols import Availability, Check, Component, Facts, package_version
from edgekd.tuning import PLAIN, Tuning

if TYPE_CHECKING:
    import torch

FIX = 'pip install "edgekd[executorch]"'
MINUTES = 30.0
"""What a lowering may take; a decoder takes one or two."""


class PteExporter(Facts):
    """See `edgekd.protocols.Exporter`. The file is for one backend; what that does not take stays outside of it, in ExecuTorch's own kernels."""

    format: str
    suffix = ".pte"
    extra: str | None = "executorch"
    schemes: tuple[str, ...]
    fixed_shapes = True

    backend: str
    """in `_executorch_lower.PARTITIONERS`"""

    delegate: str
    """its name in a file"""

    runs: str | None = None
    """Why a file of this format cannot run here; None: it can."""

    def availability(self) -> Availability:
        """Whether executorch is installed."""
        missing = [p for p in ("executorch", "torchao") if not package_version(p)]
        if missing:
            return Availability(False, reason=f"not installed: {', '.join(missing)}", runs=False,
                                fix=f"{FIX}  (wheels: Linux x86-64 and arm64, macOS on Apple silicon, Windows x86-64)")
        return Availability(True, version=f"executorch {package_version('executorch')}", runs=self.runs is None, reason=self.runs)

    def export(self, component: Component, path: Path, *, scheme: str, calibration: Any = None, qdq: str = "u8s8", tuning: Tuning = PLAIN) -> list[Path]:
        """Write `path` (see `edgekd.protocols.Exporter.export`). ExecuTorch has a QDQ style of its own."""
        if scheme not in self.schemes:
            raise unknown(f"{self.format} scheme", scheme, self.schemes)
        if scheme.endswith("_static") and calibration is None:
            raise UsageError(f"{scheme} needs calibration images", where=component.name, hint="give a folder of images with --data")
        available = self.availability()
        if not available.ok:
            raise EdgekdError(f"ExecuTorch is missing: {available.reason}", where=component.name, hint=available.fix)
        made, path = self.captured(component, scheme, calibration, tuning), Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.stem}.", dir=path.parent) as folder:
            captured, lowered = Path(folder) / "program.pt2", Path(folder) / path.name
            try:
                _save(made, captured)
                _child.call("edgekd.export._executorch_lower:lower", {
                    "program": str(captured), "output": str(lowered), "backend": self.backend, "options": self.options(scheme),
                    "names": {"inputs": list(component.example), "outputs": list(component.outputs)}}, minutes=MINUTES, what="ExecuTorch")
            except EdgekdError as e:
                raise EdgekdError(f"ExecuTorch cannot take the component: {e.what}", where=component.name,
                                  hint=e.hint or "`edgekd list formats` names others") from e
            except OSError as e:
                raise EdgekdError(f"the file cannot be written: {first_line(e)}", where=path, hint="free some space, or another folder") from e
            os.replace(lowered, path)
        return [path]

    def captured(self, component: Component, scheme: str, calibration: Any, tuning: Tuning = PLAIN) -> torch.export.ExportedProgram:
        """What is lowered."""
        return program(component)

    def options(self, scheme: str) -> dict[str, Any]:
        """What the backend's partitioner is told, as JSON."""
        return {}

    def open(self, path: Path, *, scheme: str, threads: int | None = None) -> Any:
        """There is no runtime of these here."""
        raise EdgekdError(f"a file of {self.format} cannot run here: {self.runs}", where=path)

    def check(self, component: Component, path: Path, *, scheme: str) -> Check:
        """The delegates of the written file, and what is left outside of them."""
        found = read(path)
        if not found.delegates.get(self.delegate):
            raise EdgekdError(f"{self.delegate} takes nothing of the component: all of it would run in portable kernels", where=component.name,
                              hint="the format executorch runs on every CPU")
        return Check("built", how=f"{self.availability().version} lowered it for {self.delegate} and the file was read back: {described(found)}",
                     precision=found.precision, ops=found.ops,
                     details={"delegates": found.delegates, "inside": sum(found.inside.values()), "outside": found.outside})


def described(found: Contents) -> str:
    """How much of a file its delegates hold, in words."""
    pieces, left = sum(found.delegates.values()), sum(found.outside.values())
    names = f" ({', '.join(found.outside)})" if found.outside else ""
    return f"{sum(found.inside.values())} operators in {pieces} delegated {'piece' if pieces == 1 else 'pieces'}, {left} left outside{names}"


def recaptured(graph: torch.fx.GraphModule, component: Component) -> torch.export.ExportedProgram:
    """A graph that was changed, as a program again.

    Raises:
        EdgekdError: torch cannot capture it.
    """
    import torch

    try:
        with quiet(), torch.no_grad():
            example = tuple(t.contiguous() for t in component.example.values())
            return without_aliases(torch.export.export(graph, example, strict=False).run_decompositions({}))
    except Exception as e:  # torch raises dozens of kinds
        raise EdgekdError(f"the component cannot be captured by torch.export: {first_line(e)}", where=component.name) from e


def _save(made: torch.export.ExportedProgram, path: Path) -> None:
    import torch

    with quiet():
        torch.export.save(made, path)
