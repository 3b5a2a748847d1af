"""What a model can be made to do, one folder a task, each with a module-level `task` (`edgekd.protocols.Task`). The folder is the registry."""
from __future__ import annotations

import importlib
from functools import cache

from edgekd import plugins
from edgekd.errors import unknown
from edgekd.protocols import Task


@cache
def registry() -> dict[str, Task]:
    """name -> task."""
    modules = (importlib.import_module(f"{__name__}.{name}") for name in plugins.submodules(__name__))
    return {m.task.name: m.task for m in modules if hasattr(m, "task")}


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
