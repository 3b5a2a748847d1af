"""The `search:` section of a recipe: how much the loop may spend on looking, and, to explore, the space that it looks through.

    search:
      strategy: explore
      space:
        students: [repvit_xs, {name: nanosam, width: [0.25, 0.5]}]     # or families: [repvit, tinyvit]
        width: {low: 0.5, high: 1.0, step: 0.25}                       # or a list, or one number
        image_sizes: [192, 256]
      trials: 48
"""
from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator
from typing_extensions import Self

from edgekd.config import Settings
from edgekd.errors import closest

RANGE = ("low", "high", "step")
LIMITS = (0.25, 4.0)
"""Of widths and depths, those of `edgekd.students`."""


def check_sizes(sizes: list[int]) -> list[int]:
    """Input sizes as they are. Raises ValueError for one that no student takes."""
    wrong = [s for s in sizes if s < 32 or s % 32]
    if wrong:
        raise ValueError(f"image sizes are multiples of 32, not {', '.join(map(str, wrong))}")
    return sizes


def _factors(value: Any) -> Any:
    """A number, a list of numbers or {low, high, step} -> the factors, in ascending order."""
    if isinstance(value, Mapping):
        for key in value:
            if key not in RANGE:
                near = closest(str(key), RANGE)
                raise ValueError(f"'{key}' is no part of a range" + (f", did you mean '{near}'?" if near else " (low, high, step)"))
        if missing := [k for k in RANGE if k not in value]:
            raise ValueError(f"a range needs {', '.join(RANGE)}; {', '.join(missing)} is missing")
        low, high, step = (value[k] for k in RANGE)
        if not all(_number(v) for v in (low, high, step)) or step <= 0 or high < low:
            raise ValueError(f"a range goes from low up to high in steps above 0, not low={low}, high={high}, step={step}")
        value = [round(low + i * step, 6) for i in range(math.floor((high - low) / step + 1e-9) + 1)]
    value = [value] if _number(value) else value
    if not isinstance(value, list) or not value or not all(_number(v) for v in value):
        raise ValueError(f"it should be a number, a list of numbers or {{low, high, step}}, not {value!r}")
    if wrong := [v for v in value if not LIMITS[0] <= v <= LIMITS[1]]:
        raise ValueError(f"widths and depths are from {LIMITS[0]:g} to {LIMITS[1]:g}, not {', '.join(f'{v:g}' for v in wrong)}")
    return sorted({float(v) for v in value})


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


Factors = Annotated[list[float], BeforeValidator(_factors)]


class SpaceStudent(Settings):
    """A student to explore; what is left out is the space's."""

    name: str
    width: Factors | None = None
    depth: Factors | None = None
    image_sizes: list[int] | None = Field(default=None, min_length=1)

    @field_validator("image_sizes")
    @classmethod
    def _stride(cls, sizes: list[int] | None) -> list[int] | None:
        return sizes if sizes is None else check_sizes(sizes)


class SpaceSection(Settings):
    """Every combination of a student, a width, a depth and an input size. Formats and schemes are those of the recipe."""

    families: list[str] = []
    """Architectures, of which every student is meant: `repvit`, `tinyvit` (`edgekd list students`)."""
    students: list[Annotated[SpaceStudent, BeforeValidator(_named)]] = []
    width: Factors = [1.0]
    """Of the channels, as factors."""
    depth: Factors = [1.0]
    """Of the number of blocks, as factors."""
    image_sizes: list[int] = Field(default=[256], min_length=1)

    @field_validator("image_sizes")
    @classmethod
    def _stride(cls, sizes: list[int]) -> list[int]:
        return check_sizes(sizes)

    @model_validator(mode="after")
    def _somebody(self) -> Self:
        if not (self.families or self.students):
            raise ValueError("a space needs 'students' or 'families'")
        names = [s.name for s in self.students]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise ValueError(f"student '{twice[0]}' is given twice; list all its widths, depths and sizes in one place")
        return self


class SearchSection(Settings):
    """How much the loop may spend on looking."""

    strategy: Literal["listed", "explore"] = "listed"
    """listed: the students of the recipe, one after another. explore: the space, from cheap evidence to dear (docs/search.md)."""
    max_trained: int = Field(default=2, ge=1)
    """Students trained at most."""
    space: SpaceSection | None = None
    """What to explore beside the recipe's `students`; without one those alone."""
    trials: int = Field(default=48, ge=1)
    """Students looked at, at most."""
    max_short: int = Field(default=8, ge=1)
    """Students trained for a share of the steps, at most."""
    share: float = Field(default=0.125, gt=0, lt=1)
    """That share, of every stage."""
    sampler: Literal["tpe", "nsga2"] = "tpe"
    """What proposes students where the space is larger than the trials (docs/search.md has the comparison)."""
    seed: int = 0

    @model_validator(mode="after")
    def _explores(self) -> Self:
        if self.space is not None and self.strategy != "explore":
            raise ValueError("a space is only looked through with 'strategy: explore'")
        return self
