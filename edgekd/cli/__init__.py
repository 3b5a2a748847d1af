"""The command line. A verb reads its flags, calls the function of the same name in `edgekd.api` and shows the result.

Data goes to stdout (one JSON document with `--json`), progress and messages to stderr. Exit codes: 0 done, 1 failed or budget
missed, 2 wrong usage. Nothing heavy is imported before a verb runs, so that `--help` is instant.
"""
from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from edgekd import __version__
from edgekd.cli.options import app, command_line
from edgekd.errors import EdgekdError

__all__ = ["app", "main"]

for _verbs in ("loop", "pruning", "artifacts", "about"):  # registers them, in the order of --help
    importlib.import_module(f"edgekd.cli.{_verbs}")

INTERRUPTED = 130
# The parser's own errors, whichever click this typer is built on (its own copy, or the package).
ParserError: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Never use the network; hub ids come from the local cache. Also after the verb.")] = False,
) -> None:
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    if version:
        print(f"edgekd {__version__}")
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave with its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--offline" in given:
        given = ["--offline", *(a for a in given if a != "--offline")]
    from edgekd import console

    if "--json" in given:
        console.plain()
    sys.exit(console.one_voice(lambda: _alone(given) or _run(given)))


def _alone(given: Sequence[str]) -> int:
    """2 for a verb that several processes would run against each other, else 0."""
    from edgekd import console

    if console.place().world == 1 or not set(given[:1]) & {"compress", "train"}:
        return 0
    print(f"error: {given[0]} runs in one process\n  hint: of several, edgekd distill and edgekd cache make use (docs/scale.md)", file=sys.stderr)
    return 2


def _run(given: list[str]) -> int:
    try:
        code = app(args=given, prog_name="edgekd", standalone_mode=False)
    except EdgekdError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    except ParserError as e:  # unknown options, missing values
        if type(e).__name__ == "NoArgsIsHelpError":
            print(getattr(e, "message", ""), file=sys.stderr)
        else:
            print(f"error: {e.format_message()}\n  hint: edgekd {_verb(given)}--help", file=sys.stderr)  # type: ignore[attr-defined]
        return 2
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:  # the reader of our stdout went away (`edgekd list | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as e:
        if os.environ.get("EDGEKD_DEBUG") == "1":
            raise
        print(f"error: {type(e).__name__}: {e}\n  hint: this is a fault of edgekd; {_traceback()}", file=sys.stderr)
        return 1
    if code == INTERRUPTED:  # some versions of the parser turn Ctrl-C into this code themselves
        print("stopped; the same command continues where it was", file=sys.stderr)
    return code if isinstance(code, int) else 0


def _verb(given: Sequence[str]) -> str:
    first = given[0] if given else ""
    return f"{first} " if first in {c.name or (c.callback.__name__ if c.callback else "") for c in app.registered_commands} else ""


def _traceback() -> str:
    """Keep the traceback in a file and say where."""
    import tempfile
    import traceback

    try:
        with tempfile.NamedTemporaryFile("w", prefix="edgekd-error-", suffix=".log", delete=False) as f:
            f.write(f"{command_line()}\n\n{traceback.format_exc()}")
    except OSError:
        return "EDGEKD_DEBUG=1 shows the traceback"
    return f"the traceback is in {f.name} (EDGEKD_DEBUG=1 shows it here)"
