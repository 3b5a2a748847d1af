"""What a model can be made to do, one folder a task, each with a module-level `task` (`edgekd.protocols.Task`). The folder is the registry;
another package joins by an entry point of the group `edgekd.tasks`.

Importing a task loads no torch: everything else is imported in its methods.
"""
from __future__ import annotations

import importlib
from functools import cache

from edgekd import plugins
from edgekd.errors import unknown
from edgekd.protocols import PROMPTABLE, Task


@cache
def registry() -> dict[str, Task]:
    """name -> task."""
    modules = (importlib.import_module(f"{__name__}.{name}") for name in plugins.submodules(__name__))
    found: dict[str, Task] = {m.task.name: m.task for m in modules if hasattr(m, "task")}
    return {**plugins.entry_points("edgekd.tasks"), **found}


def names() -> list[str]:
    """The tasks there are."""
    return sorted(registry())


def get(name: str) -> Task:
    """A task by its name.

    Raises:
        UsageError: no such task, with the nearest name.
    """
    if name not in registry():
        raise unknown("task", name, registry())
    return registry()[name]


def knowing(reference: str) -> Task | None:
    """The task that a reference is a teacher of, where its form or description says so. The SAM family is asked last: it takes any file of weights."""
    return next((t for _, t in sorted(registry().items(), key=lambda item: item[0] == PROMPTABLE) if t.knows(reference)), None)
