"""How a measuring module is called on a device, and what comes back: flags in, one JSON document out. Both sides of it are here."""
from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from edgekd.errors import EdgekdError


def flags(*, threads: int | None, **timing: float) -> list[str]:
    """The caller's side: what `parser` reads, of `warmup`, `repeats` and `max_seconds` those that are given."""
    return [*(x for name, value in timing.items() for x in (f"--{name.replace('_', '-')}", str(value))), *(["--threads", str(threads)] if threads else [])]


def parser(module: str, description: str, *, warmup: int, repeats: int) -> argparse.ArgumentParser:
    """The device's side: artifact folders, threads and timing."""
    found = argparse.ArgumentParser(prog=module, description=description)
    found.add_argument("folders", nargs="+", metavar="FOLDER")
    found.add_argument("--threads", type=int)
    found.add_argument("--warmup", type=int, default=warmup)
    found.add_argument("--repeats", type=int, default=repeats)
    found.add_argument("--max-seconds", type=float, default=8.0, help="per timed call; at least 10 samples are taken")
    return found


def refusal(stdout: str, stderr: str, code: int) -> tuple[str, str | None]:
    """Why it failed, and a hint: what `answer` said, or of a crash the last words."""
    try:
        told = json.loads(stdout)
        return str(told["error"]), told["hint"]
    except (ValueError, KeyError, TypeError):
        last = stderr.strip().splitlines()[-12:]
        return "\n".join(last) if last else f"exit code {code}", None


def answer(work: Callable[[], Any]) -> int:
    """Do it and print the result; of an error what it says, which stderr has too among all that runtimes write there. The exit code."""
    try:
        out = work()
    except EdgekdError as e:
        print(e, file=sys.stderr)
        print(json.dumps({"error": f"{e.what}{'' if e.where is None else f' ({e.where})'}", "hint": e.hint}))
        return 1
    print(json.dumps(out))
    return 0
