"""A device that is out of reach from here: what its owner carries to it, and what comes back.

`write` leaves `run_on_device.sh` and the folder `board/` (the one-file runner, the job, the candidates' files) in a run's folder; on the board the script
writes `measured.json`; `merge` takes that back into the report, where the candidates are judged again, now by what was measured.
"""
from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgekd import report as reports
from edgekd import target as targets
from edgekd import trial
from edgekd.decision import choose, judge
from edgekd.errors import EdgekdError
from edgekd.profiling import boards
from edgekd.profiling.profile import Profile
from edgekd.report import schema
from edgekd.report.schema import CandidateRow, Report
from edgekd.target import Target
from edgekd.workspace import write_atomic

SCRIPT, FOLDER, RESULT = "run_on_device.sh", "board", "measured.json"
MEASURED_AT = ("profile", "evaluate")
"""Stages of a rejection that is found anew once latencies are known."""

TEXT = """#!/bin/sh
# Measures the models in board/ where it is run, installs nothing, and writes {result} beside itself. From the machine that made it:
#   scp -r {script} {folder} USER@BOARD:edgekd/ && ssh USER@BOARD sh edgekd/{script} && scp USER@BOARD:edgekd/{result} .
#   edgekd report RUN --merge {result}
# EDGEKD_PYTHON names the Python that has the runtime, where python3 has not.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
python=${{EDGEKD_PYTHON:-}}
if [ -z "$python" ]; then
    for one in python3 python "$HOME/.venv/bin/python" "$HOME/venv/bin/python"; do
        if command -v "$one" >/dev/null 2>&1; then python=$one; break; fi
    done
fi
if [ -z "$python" ]; then
    echo "error: there is no Python here" >&2
    echo "  hint: name one with EDGEKD_PYTHON=/path/to/python3 sh $0" >&2
    exit 1
fi
cd "$here/{folder}"
"$python" {runner} job.json --output "$here/{result}" >/dev/null
echo "written: $here/{result}" >&2
"""


def write(run: Path, rows: Sequence[CandidateRow], asked: boards.Asked, target: Target) -> Path | None:
    """What a board needs to measure the candidates of a run; None when there is none to be measured. What an earlier call left is replaced."""
    folders = [run / "artifacts" / row.id for row in rows if row.status != "failed" and row.trained and row.components]
    if not folders:
        return None
    fresh = run / f".{FOLDER}.{os.getpid()}"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        boards.stage(folders, asked, target, fresh)
        boards.bundle(fresh / boards.RUNNER)
        shutil.rmtree(run / FOLDER, ignore_errors=True)
        fresh.rename(run / FOLDER)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    script = write_atomic(run / SCRIPT, TEXT.format(result=RESULT, script=SCRIPT, folder=FOLDER, runner=boards.RUNNER))
    script.chmod(0o755)
    return script


def merge(run: Path, measured: Path) -> Report:
    """The report of a run with what a board measured: every candidate that came back is judged again, and the report is written.

    Raises:
        EdgekdError: no such run, it was not made for a board, or the file is not one that its script wrote.
    """
    before, job = schema.load(run / "report.json"), _document(run / FOLDER / "job.json", "the run has no job for a board", "let `edgekd compress` finish first")
    result = _document(measured, "this is not what a board measured", f"give the {RESULT} that {SCRIPT} wrote")
    target = targets.resolve(run / "target.resolved.yaml")
    wrong = {m.get("id") for m in result.get("models", [])} - {m["id"] for m in job["models"]}
    if result.get("schema") != boards.RESULT or wrong:
        raise EdgekdError(f"the file does not belong to this run{': it has ' + ', '.join(sorted(map(str, wrong))) if wrong else ''}", where=measured,
                          hint=f"give the {RESULT} that {SCRIPT} of this run wrote")
    profiles = {p.id: p for p in boards.profiles(job, result, [run / "artifacts" / m["id"] for m in job["models"]], target, "by hand")}
    for id, profile in profiles.items():
        profile.save(run / "profiles" / f"{id}.json")
    found = merged(before, profiles, {m["id"]: m["error"]["what"] for m in result["models"] if m.get("error")})
    schema.save(run / "report.json", found)
    reports.rebuild(run)
    return found


def merged(before: Report, profiles: dict[str, Profile], failed: dict[str, str]) -> Report:
    """The report with these measurements, judged and chosen anew."""
    rows = []
    for row in before.candidates:
        open_again = row.turned("accepted", "", None) if row.status == "rejected" and row.stage in MEASURED_AT else row
        if row.id in failed and row.id not in profiles:
            rows.append(open_again.turned("failed", f"on the board: {failed[row.id]}", "profile"))
        else:
            rows.append(trial.with_profile(open_again, profiles[row.id]) if row.id in profiles else open_again)
    value = before.teacher.accuracy.value(before.budget.metric) if before.teacher.accuracy else None
    judged = judge(rows, before.budget, value)
    decision = choose(judged, before.budget, value)
    environment = next((p.circumstances.model_dump(mode="json", exclude_none=True) for p in profiles.values()), before.environment)
    return before.model_copy(update={"candidates": judged, "chosen": decision.chosen, "verdict": decision.verdict, "reason": decision.reason,
                                     "nearest": decision.nearest, "environment": environment})


def _document(path: Path, what: str, hint: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise EdgekdError(what, where=path, hint=hint) from e
    if not isinstance(found, dict):
        raise EdgekdError(what, where=path, hint=hint)
    return found
