"""Names of parameters from one layout to another, by a table of templates that is read in both directions.

A template matches a whole name. `{n}` and `{k}` are numbers, `{p}` is whatever follows. The first row that matches decides, so a
name is renamed once and never by a rule for a longer name: the transformer's `layers.1` is safe from the head's `layers.1`.
"""
from __future__ import annotations

import re
from collections.abc import Sequence

_FIELD = re.compile(r"\{(\w)\}")
_PATTERN = {"n": r"\d+", "k": r"\d+", "p": r".+"}


class Table:
    """Rows of (left template, right template)."""

    def __init__(self, rows: Sequence[tuple[str, str]]) -> None:
        self._to_right = [(_compile(left), right) for left, right in rows]
        self._to_left = [(_compile(right), left) for left, right in rows]

    def right(self, name: str) -> str:
        """A left name in its right spelling; a name that no row knows stays as it is."""
        return _rename(self._to_right, name)

    def left(self, name: str) -> str:
        """A right name in its left spelling."""
        return _rename(self._to_left, name)


def _compile(template: str) -> re.Pattern[str]:
    pieces = _FIELD.split(template)  # text, field, text, field, ...
    return re.compile("".join(re.escape(p) if i % 2 == 0 else f"(?P<{p}>{_PATTERN[p]})" for i, p in enumerate(pieces)))


def _rename(rules: Sequence[tuple[re.Pattern[str], str]], name: str) -> str:
    for pattern, template in rules:
        match = pattern.fullmatch(name)
        if match:
            return template.format(**match.groupdict())
    return name
