"""What the verbs share: the application they register with, the options that mean the same everywhere, and how a result is shown."""
from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from edgekd.errors import UsageError

app = typer.Typer(name="edgekd", add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
                  help="From a large vision model and a device to the best small model that runs there within a budget.")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout; messages stay on stderr.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.")]
Data = Annotated[str, typer.Option("--data", help="A folder of photos, a COCO or LVIS json, SA-1B tars, a data pack, or scenes:seed=1,count=100.")]
MaybeData = Annotated[str | None, typer.Option("--data", help="A folder of photos, a COCO or LVIS json, SA-1B tars, a data pack, or scenes:seed=1,count=100.")]
Split = Annotated[str | None, typer.Option("--split", help="Which split of the data.")]
Limit = Annotated[int | None, typer.Option("--limit", help="The first so many images only.")]
Teacher = Annotated[str | None, typer.Option("--teacher", help="The model to copy from; the recipe's when left out.")]
RecipeName = Annotated[str, typer.Option("--recipe", help="A recipe by name (edgekd list recipes) or a YAML file.")]
TargetName = Annotated[str, typer.Option("--target", help="A device by name (edgekd list targets) or a YAML file.")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one value of the recipe: stages.0.steps=100. Repeatable.")]
Threads = Annotated[int | None, typer.Option("--threads", help="CPU threads of the runtime.")]

DeviceUrl = Annotated[str | None, typer.Option("--device", metavar="URL", help="Where the device is: ssh://user@host:port, adb://SERIAL, browser, local.")]
SshKey = Annotated[Path | None, typer.Option("--ssh-key", help="The private key for ssh; otherwise the agent's and those of ~/.ssh.")]
KnownHosts = Annotated[Path | None, typer.Option("--known-hosts", help="Host keys to trust, instead of ~/.ssh/known_hosts.")]
BoardPython = Annotated[str | None, typer.Option("--board-python", help="The Python on the board that has its runtime; searched for when left out.")]


def board(url: str | None, ssh_key: Path | None, known_hosts: Path | None, python: str | None) -> dict[str, Any]:
    """What was said of the device, for the `device` of `edgekd.api`'s functions."""
    for flag, file in (("--ssh-key", ssh_key), ("--known-hosts", known_hosts)):
        if file is not None and not file.expanduser().is_file():
            raise UsageError(f"{flag} names no file", where=file)
    return {"url": url, "ssh_key": ssh_key, "known_hosts": known_hosts, "python": python}


def show(document: dict[str, Any], json: bool) -> int:
    """A result: the JSON document, or one `key: value` line each."""
    from edgekd import console

    if json:
        console.emit(document)
    else:
        for key, value in document.items():
            print(f"{key}: {words(value)}")
    return 0


def words(value: Any) -> Any:
    if isinstance(value, dict):
        return "; ".join(f"{k}: {words(v)}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value


def numbers(text: str, counts: tuple[int, ...], usage: str, hint: str = "pixels from the top left corner of the photo, for instance --point 120,80") -> list[float]:
    try:
        values = [float(v) for v in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in counts:
        raise UsageError(f"{usage}, not '{text}'", hint=hint)
    return values


def lengths(given: list[str]) -> dict[str, int]:
    """`prompts=16` of every --length."""
    found = {}
    for text in given:
        symbol, _, number = text.partition("=")
        if not symbol or not number.isdigit() or int(number) < 1:
            raise UsageError(f"--length takes AXIS=N, not '{text}'", hint="for instance --length prompts=16 --length points=4")
        found[symbol] = int(number)
    return found


def command_line() -> str:
    import shlex

    return shlex.join(["edgekd", *sys.argv[1:]])
