"""Toolchains that abort, hang or print what they like, in a process of their own: a request in, an answer or a reason out, both JSON.

The child imports one function `module:function`, or runs one in a script that needs nothing of edgekd (for a Python environment that lacks it), calls
it with the request, and writes what it returns. Whatever it prints ends in the reason when it dies. Files are named in the request.

    answer = call("edgekd.export._litert:convert", {"program": "...", "output": "..."}, minutes=10, what="litert-torch")
"""
from __future__ import annotations

import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# nothing of edgekd above this line: as a script this file runs in environments without it
LINES = 3
"""Of what a child printed last, how many are told."""


def call(function: str, request: Mapping[str, Any], *, minutes: float, what: str, python: str | Path | None = None) -> dict[str, Any]:
    """What `function` returns for the request, computed in a fresh process.

    Args:
        function: `module:function`, or `path/to/script.py:function`.
        what: the toolchain, for error messages.
        python: the interpreter; this one when left out.

    Raises:
        EdgekdError: it failed, died or took longer than `minutes`; the reason is the toolchain's own last words.
    """
    from edgekd.errors import EdgekdError

    with tempfile.TemporaryDirectory(prefix="edgekd-child-") as folder:
        asked, answer, said = (Path(folder) / name for name in ("request.json", "answer.json", "output.txt"))
        asked.write_text(json.dumps({"function": function, "request": dict(request), "path": sys.path if python is None else []}), encoding="utf-8")
        with said.open("wb") as output:
            child = subprocess.Popen([str(python or sys.executable), __file__, str(asked), str(answer)], stdin=subprocess.DEVNULL, stdout=output,
                                     stderr=subprocess.STDOUT, start_new_session=True)
            try:
                code = child.wait(minutes * 60)
            except subprocess.TimeoutExpired:
                raise EdgekdError(f"{what} was stopped after {minutes:g} minutes", where=function, hint="a smaller input size, or another format") from None
            finally:
                _end(child)
        found = json.loads(answer.read_text(encoding="utf-8")) if answer.is_file() else None
        if found is None:
            died = f"died of signal {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise EdgekdError(f"{what} {died}: {_last_words(said)}", where=function)
        if "error" in found:
            raise EdgekdError(f"{what}: {found['error']}", where=function, hint=found.get("hint"))
        return dict(found["answer"])


def _end(child: subprocess.Popen[bytes]) -> None:
    """Nothing of the child's session stays behind, whatever it started."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    child.wait()


def _last_words(said: Path) -> str:
    lines = [line.strip() for line in said.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return " / ".join(lines[-LINES:])[:500] or "it said nothing"


def _serve(asked: str, answer: str) -> None:
    """The child's side: write {"answer": ...} or {"error": ...}, whole or not at all."""
    told = json.loads(Path(asked).read_text(encoding="utf-8"))
    sys.path[:] = told["path"] or [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]
    module, _, name = told["function"].rpartition(":")
    try:
        found: dict[str, Any] = {"answer": getattr(_load(module), name)(**told["request"])}
    except Exception as e:  # toolchains raise anything: all of it is the reason
        text = str(getattr(e, "what", None) or e).strip()
        found = {"error": (text.splitlines()[0][:500] if text else type(e).__name__), "hint": getattr(e, "hint", None)}
        import traceback

        traceback.print_exc()
    temporary = Path(f"{answer}.part")
    temporary.write_text(json.dumps(found), encoding="utf-8")
    os.replace(temporary, answer)


def _load(module: str) -> Any:
    if not module.endswith(".py"):
        return importlib.import_module(module)
    spec = importlib.util.spec_from_file_location(Path(module).stem, module)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


if __name__ == "__main__":
    _serve(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # toolchains that crash on their way out have answered already
