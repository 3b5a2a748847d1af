"""The space of candidates: student x image size x format x scheme, kept to what the target can run.

A candidate's id is its name everywhere, from the folder of its artifact to the rows of the report:

    repvit_m0-256-openvino-bf16
    └ student ┘ │     │      └ scheme
            image size └ format

A scheme may have options and exceptions (`edgekd.schemes`), of which the id holds a short form.
"""
from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from edgekd import schemes as grammar
from edgekd.errors import UsageError, unknown

REFERENCE = "fp32"
_WORD = re.compile(r"[A-Za-z0-9_.]+")
_ID = re.compile(r"(?P<student>.+)-(?P<size>[1-9][0-9]*)-(?P<format>[A-Za-z0-9_.]+)-(?P<scheme>[A-Za-z0-9_.]+)")


@dataclass(frozen=True, order=True)
class Candidate:
    """One point of the space."""

    student: str
    image_size: int
    format: str
    scheme: str

    @property
    def id(self) -> str:
        return f"{self.student}-{self.image_size}-{self.format}-{grammar.parse(self.scheme).slug}"

    @property
    def parent(self) -> str | None:
        """Id of the float candidate that this one must beat; None for that one itself."""
        return None if self.scheme == REFERENCE else Candidate(self.student, self.image_size, self.format, REFERENCE).id


def parse(id: str) -> Candidate:
    """The candidate that an id names.

    Raises:
        UsageError: it does not follow the grammar.
    """
    found = _ID.fullmatch(id)
    if not found:
        raise UsageError(f"'{id}' is not a candidate id", hint="ids look like repvit_m0-256-onnx-fp32: student-size-format-scheme")
    return Candidate(found["student"], int(found["size"]), found["format"], found["scheme"])


def candidates(students: Mapping[str, Sequence[int]], formats: Sequence[str], schemes: Sequence[str], *,
               runs: Mapping[str, Sequence[str]], exports: Mapping[str, Sequence[str]], target: str) -> list[Candidate]:
    """Every candidate that the recipe asks for and the target can run, floats before what is derived from them.

    A scheme need not exist in every format (bf16 is OpenVINO's alone): it is taken where it runs. One that runs in none of the
    formats asked for is refused, as is a format the target has no runtime for, so that a typo never shrinks a search in silence.

    Args:
        students: name -> input sizes in pixels to try it at.
        formats: formats wanted.
        schemes: schemes wanted; fp32 is added, since every other scheme is judged against it.
        runs: format -> schemes that the target runs.
        exports: format -> schemes that the exporter writes.
        target: the target's name, for messages.

    Raises:
        UsageError: a name cannot be used; the message lists what can.
    """
    _names(students)
    possible = {f: _possible(f, runs, exports, target) for f in dict.fromkeys(formats)}
    for scheme in schemes:
        if not any(_takes(able, scheme) for able in possible.values()):
            if (name := grammar.parse(scheme).scheme.name) not in {s for known in exports.values() for s in known}:
                raise unknown("scheme", name, sorted({s for able in possible.values() for s in able}))
            raise UsageError(f"target '{target}' cannot run scheme '{scheme}' in {_list(possible)}",
                             hint="; ".join(f"{f} runs {', '.join(able)}" for f, able in possible.items()))
    wanted = list(dict.fromkeys([REFERENCE, *schemes]))
    found = [Candidate(student, size, format, scheme) for student, sizes in students.items() for size in dict.fromkeys(sizes)
             for format in possible for scheme in wanted if _takes(possible[format], scheme)]
    if not found:
        raise UsageError("the recipe leaves nothing to try", hint="name at least one student, one image size and one format")
    return found


def _takes(able: Sequence[str], scheme: str) -> bool:
    """Whether a format runs a scheme, and those of its exceptions that are components'."""
    precision = grammar.parse(scheme)
    return all(one.runs_as in able for one in (precision.scheme, *(s for s in precision.schemes if s.name not in grammar.FLOATS)))


def _possible(format: str, runs: Mapping[str, Sequence[str]], exports: Mapping[str, Sequence[str]], target: str) -> list[str]:
    """Schemes of a format that the exporter writes and the target runs."""
    if format not in exports:
        raise unknown("format", format, exports)
    if format not in runs:
        raise UsageError(f"target '{target}' has no runtime for format '{format}'", hint=f"it runs {_list(runs) or 'nothing yet'}")
    able = [s for s in exports[format] if s in runs[format]]
    if not able:
        raise UsageError(f"target '{target}' runs no scheme that the {format} exporter writes",
                         hint=f"the target runs {_list(runs[format])}; the exporter writes {_list(exports[format])}")
    return able


def _names(students: Iterable[str]) -> None:
    for name in students:
        if not _WORD.fullmatch(name.replace("-", "_")):
            raise UsageError(f"'{name}' cannot be part of a candidate id", hint="use letters, digits, '_', '.' and '-'")


def _list(names: Sequence[str] | Mapping[str, object]) -> str:
    return ", ".join(names)
