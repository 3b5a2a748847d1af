"""What earlier runs and benchmarks of this checkout say: reports in `runs/`, and the rerun claims in `benchmarks/results/`."""
from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Run:
    """One student of an earlier run. `kept`: its accuracy as a share of the teacher's, the best of its fp32 candidates."""

    folder: str
    recipe: str
    teacher: str
    student: str
    image_size: int
    kept: float
    objectives: tuple[str, ...]
    steps: int
    images: int
    """Photos it was measured on."""


@dataclass(frozen=True)
class Claim:
    """An objective, or several together, against the plain feature loss at equal steps: points of the metric, with its interval."""

    objectives: tuple[str, ...]
    mean: float
    low: float
    high: float
    seeds: int
    file: str


def runs(folder: Path, metric: str) -> list[Run]:
    """Trained students of every report below `folder`; a report that cannot be read is left out."""
    found: list[Run] = []
    for path in sorted(Path(folder).glob("*/report.json")):
        try:
            found += _of_report(json.loads(path.read_text(encoding="utf-8")), path.parent, metric)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return found


def _of_report(report: dict[str, Any], folder: Path, metric: str) -> Iterator[Run]:
    full = value(report["teacher"].get("accuracy") or {}, metric)
    best: dict[tuple[str, int], float] = {}
    for row in report["candidates"]:
        got = value(row.get("accuracy") or {}, metric)
        if row.get("trained") and row["scheme"] == "fp32" and got is not None:
            key = row["student"], row["image_size"]
            best[key] = max(got, best.get(key, 0.0))
    objectives, steps = _stages(folder / "recipe.resolved.yaml")
    for (student, size), got in best.items() if full else ():
        assert full is not None
        yield Run(folder.name, report["run"]["recipe"], report["teacher"]["name"], student, size, got / full, objectives, steps, report["protocol"]["images"])


def _stages(path: Path) -> tuple[tuple[str, ...], int]:
    """Names of all objectives of a resolved recipe, and its steps."""
    try:
        stages = yaml.safe_load(path.read_text(encoding="utf-8"))["stages"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return (), 0
    return tuple(dict.fromkeys(o["name"] for s in stages for o in s["objectives"])), sum(int(s["steps"]) for s in stages)


def value(accuracy: dict[str, Any], metric: str) -> float | None:
    """`box_miou`, or `teacher_agreement.box` of nested numbers; None where it was not measured."""
    found: Any = accuracy
    for part in metric.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return float(found) if isinstance(found, (int, float)) else None


def claims(folder: Path, metric: str) -> list[Claim]:
    """The league of the newest `claims*.json` that has one; the plain feature loss itself is not in it."""
    for path in sorted(Path(folder).glob("claims*.json"), reverse=True):
        try:
            league = json.loads(path.read_text(encoding="utf-8"))["league"]
            found = [Claim(tuple(row["arm"].split(" + ")), d["mean"], d["low"], d["high"], int(row["seeds"]), path.name)
                     for row in league if (d := row["against_feature_mse"]["difference"].get(metric)) and row["arm"] != "feature_mse"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        if found:
            return found
    return []


def students_of(found: list[Run], student: str, size: int, teacher: str) -> tuple[list[Run], str]:
    """The runs that say most about a student at a size: its own, else those of the student at any size, else of its family, else none."""
    base = student.partition(":")[0].partition("-")[0]
    mine = [r for r in found if r.teacher == teacher]
    for kept, words in (([r for r in mine if (r.student, r.image_size) == (student, size)], "measured"),
                        ([r for r in mine if r.student == student], "measured at another size"),
                        ([r for r in mine if r.student.partition("-")[0] == base], "measured at another width or depth")):
        if kept:
            return kept, words
    return [], "no earlier run"
