"""Errors that a user can act on: what is wrong, where, and `hint:` with what to do about it.

Exit codes of the command line: 1 for something that failed (`EdgekdError`), 2 for wrong usage (`UsageError`).
"""
from __future__ import annotations

import difflib
from collections.abc import Iterable


class EdgekdError(Exception):
    """Something failed. `what` is one sentence, `where` the file, key or component, `hint` a command or a fix."""

    exit_code = 1

    def __init__(self, what: str, *, where: object = None, hint: str | None = None) -> None:
        super().__init__(what)
        self.what, self.where, self.hint = what, where, hint

    def __str__(self) -> str:
        where = f" ({self.where})" if self.where is not None else ""
        hint = f"\n  hint: {self.hint}" if self.hint else ""
        return f"{self.what}{where}{hint}"


class UsageError(EdgekdError):
    """The command, recipe or data given cannot be used as they are; nothing was started."""

    exit_code = 2


class CannotTake(EdgekdError):
    """A format can never hold this component, whatever the toolchain's version: another format may take it in its place."""


def closest(name: str, options: Iterable[str]) -> str | None:
    """The option most like `name`, or None when nothing is near."""
    found = difflib.get_close_matches(name, list(options), n=1, cutoff=0.5)
    return found[0] if found else None


def unknown(kind: str, name: str, options: Iterable[str]) -> UsageError:
    """The error for a name that no registry of this `kind` knows, with the nearest name and the whole list."""
    options = sorted(options)
    near = closest(name, options)
    mean = f"did you mean '{near}'? " if near else ""
    return UsageError(f"unknown {kind} '{name}'", hint=f"{mean}{kind}s: {', '.join(options)}")


def first_line(error: BaseException) -> str:
    """What a library's error says, cut to what fits in a reason."""
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
