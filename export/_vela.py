"""Arm's compiler for Ethos-U, as `_child.call` runs it."""
from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from edgekd.errors import EdgekdError


def compile(source: str, folder: str, accelerator: str, system: str, memory: str) -> dict[str, Any]:
    """Compile an int8 `.tflite`: the names of the compiled file and of the table of estimates, both in `folder`.

    Raises:
        EdgekdError: vela refuses the file or its options.
    """
    from ethosu.vela.vela import main

    options = ["--config", "Arm/vela.ini", "--accelerator-config", accelerator, "--system-config", system, "--memory-mode", memory, "--output-dir", folder]
    try:
        code = main([source, *options])
    except SystemExit as e:  # an option that its parser does not know
        code = e.code
    made, tables = sorted(Path(folder).glob("*_vela.tflite")), sorted(Path(folder).glob("*_summary_*.csv"))
    if code or not made or not tables:
        sys.stdout.flush()
        raise EdgekdError(f"it ended with {code or 'no file'} for {accelerator}, {system}, {memory}",
                          hint="vela --help lists accelerators; vela --list-configs Arm/vela.ini lists system configurations and memory modes")
    return {"compiled": made[0].name, "table": tables[0].name}
