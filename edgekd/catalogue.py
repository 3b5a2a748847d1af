"""What there is, by kind: the rows of `edgekd list`. Every kind is read from its registry; nothing is listed twice."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from edgekd import plugins, recipe, target
from edgekd.errors import unknown
from edgekd.protocols import PROMPTABLE

Row = dict[str, Any]


def teachers() -> list[Row]:
    return _of_tasks("teachers")


def students() -> list[Row]:
    return _of_tasks("students")


def _of_tasks(kind: Literal["teachers", "students"]) -> list[Row]:
    from edgekd import tasks

    found = sorted(tasks.registry().values(), key=lambda task: task.name != PROMPTABLE)
    return [row for task in found for row in task.listed(kind)]


def models() -> list[Row]:
    """Everything that can be named where a model is expected, each once. The details of a student are counted on its network: `list students`."""
    from edgekd import students, zoo
    from edgekd.tasks.promptable import baselines

    rows = [{"name": r.pop("name"), "kind": "teacher", **r} for r in teachers()]
    for row in rows:
        if row["name"] in zoo.SPECS:
            row["kind"] = zoo.SPECS[row["name"]].kind
    named = {row["name"] for row in rows}
    return [*rows, *({"name": n, "kind": "student", "family": f.name} for f in students.families().values() for n in f.configs if n not in named),
            *({"name": n, "kind": "baseline"} for n in baselines.names())]


def targets() -> list[Row]:
    found = [target.resolve(name) for name in target.names()]
    return [{"name": t.name, "aliases": t.aliases, "description": t.description, "transport": t.device.transport, "formats": t.runs} for t in found]


def formats() -> list[Row]:
    from edgekd import doctor

    return doctor.formats()


def schemes() -> list[Row]:
    from edgekd import schemes as known

    offered = plugins.schemes()
    return [{"name": name, "summary": known.get(name).summary, "formats": offered.get(name, [])} for name in known.names()]


def objectives() -> list[Row]:
    from edgekd.distillation import points

    return points.everything()


def tasks() -> list[Row]:
    from edgekd import tasks

    return [{"name": t.name, "summary": t.summary, "gives": sorted(t.outputs), "parts": list(t.parts)} for t in tasks.registry().values()]


def recipes() -> list[Row]:
    return [{"name": r.name, "description": r.description, "teacher": r.teacher, "students": [s.name for s in r.students]}
            for r in map(recipe.resolve, recipe.names())]


def runs(folder: Path = Path("runs")) -> list[Row]:
    """The runs below a folder, newest first, with what each chose."""
    rows = []
    for path in sorted(folder.glob("*/report.json"), key=lambda p: -p.stat().st_mtime):
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            rows.append({"name": path.parent.name, "verdict": "unreadable report"})
            continue
        rows.append({"name": path.parent.name, "verdict": report.get("verdict"), "chosen": report.get("chosen"),
                     "target": report.get("target", {}).get("name"), "started": report.get("run", {}).get("started")})
    return rows


KINDS: dict[str, Callable[[], list[Row]]] = {
    "teachers": teachers, "students": students, "models": models, "targets": targets, "formats": formats, "schemes": schemes,
    "objectives": objectives, "tasks": tasks, "recipes": recipes, "runs": runs,
}


def rows(kind: str) -> list[Row]:
    """The rows of one kind.

    Raises:
        UsageError: no such kind, with the nearest one.
    """
    if kind not in KINDS:
        raise unknown("kind", kind, KINDS)
    return KINDS[kind]()
