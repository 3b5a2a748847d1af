"""Names to objects: files in the side folders and entry points of other people's packages.

The folder is the registry: `export/<format>.py` with a module-level `exporter` is a format, and nothing lists it twice.
Another package joins by an entry point (`edgekd.exporters`, `edgekd.objectives`, `edgekd.students`, `edgekd.teachers`,
`edgekd.targets`). One that fails to load is reported by name and left out; it never ends a run.
"""
from __future__ import annotations

import importlib
import pkgutil
import sys
from dataclasses import dataclass
from functools import cache
from importlib import metadata, resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edgekd import console
from edgekd.errors import EdgekdError, unknown
from edgekd.protocols import PROMPTABLE

if TYPE_CHECKING:
    from edgekd.protocols import Exporter, Task

EXPORTER_FACTS = ("format", "suffix", "extra", "schemes", "availability", "export", "open")


@dataclass(frozen=True)
class Broken:
    """A plug-in that could not be loaded."""

    name: str
    origin: str
    reason: str


_broken: dict[tuple[str, str], Broken] = {}


def broken() -> list[Broken]:
    """Every plug-in that failed to load so far in this process (`doctor` shows them)."""
    return list(_broken.values())


def _report(name: str, origin: str, error: Exception) -> None:
    key = (name, origin)
    if key not in _broken:
        _broken[key] = Broken(name, origin, f"{type(error).__name__}: {error}")
        console.warn(f"plug-in '{name}' of {origin} was left out: {_broken[key].reason}")


@cache
def entry_points(group: str) -> dict[str, Any]:
    """Objects that installed packages offer under an entry-point group, by name; broken ones are reported and left out."""
    found = {}
    for point in metadata.entry_points(group=group):
        origin = point.dist.name if point.dist else point.value
        try:
            found[point.name] = point.load()
        except Exception as e:  # third-party code may raise anything, and must not end a run
            _report(point.name, origin, e)
    return found


def submodules(package: str) -> list[str]:
    """Names of the public modules of a package, in order, without importing them."""
    found = importlib.import_module(package)
    return sorted(m.name for m in pkgutil.iter_modules(found.__path__) if not m.name.startswith("_"))


@cache
def exporters() -> dict[str, Exporter]:
    """format -> exporter, from `export/*.py` and the entry points. Importing them loads no toolchain."""
    found: dict[str, Exporter] = {}
    for name in submodules("edgekd.export"):
        module = importlib.import_module(f"edgekd.export.{name}")
        if hasattr(module, "exporter"):
            found[module.exporter.format] = module.exporter
    for name, exporter in entry_points("edgekd.exporters").items():
        missing = [fact for fact in EXPORTER_FACTS if not hasattr(exporter, fact)]
        if missing:
            _report(name, "its package", TypeError(f"the exporter lacks {', '.join(missing)}"))
        else:
            found.setdefault(exporter.format, cast("Exporter", exporter))
    return found


def exporter(name: str) -> Exporter:
    """The exporter of one format.

    Raises:
        UsageError: no such format, with the nearest name.
    """
    known = exporters()
    if name not in known:
        raise unknown("format", name, known)
    return known[name]


def writers() -> dict[str, Exporter]:
    """The exporters whose toolchain is installed, by format."""
    return {name: one for name, one in exporters().items() if one.availability().ok}


def schemes() -> dict[str, list[str]]:
    """scheme -> the formats whose exporter offers it."""
    found: dict[str, list[str]] = {}
    for name, one in exporters().items():
        for scheme in one.schemes:
            found.setdefault(scheme, []).append(name)
    return found


def task(name: str) -> Task:
    """A task by its name. Checkpoints, artifacts and verbs reach a task this way only, so that none of them depends on any.

    Raises:
        UsageError: no such task, with the nearest name.
    """
    return importlib.import_module("edgekd.tasks").get(name)


def task_of(model: Any) -> Task:
    """The task of a model, which names it; those that do not are promptable."""
    return task(getattr(model, "task", PROMPTABLE))


def yaml_files(package: str) -> dict[str, Traversable]:
    """name -> file for the YAML files shipped in a side folder (`edgekd.recipes`, `edgekd.profiles`)."""
    files = [f for f in resources.files(package).iterdir() if f.name.endswith(".yaml")]
    return {f.name.removesuffix(".yaml"): f for f in sorted(files, key=lambda f: f.name)}


def factory(reference: str) -> Any:
    """The object that `module:name` names; the module may lie in the working directory, as for `python -m`.

    Raises:
        EdgekdError: the module cannot be imported or has no such name.
    """
    module, _, name = reference.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:  # the console script, unlike `python -m`, leaves it out
        sys.path.append(str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as e:
        raise EdgekdError(f"'{reference}' cannot be loaded: {e}", hint="write it as module:name, importable from here") from e
