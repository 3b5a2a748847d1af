"""Fill the README's demo table from the newest `benchmarks/results/demo-*.json`, so that no number in it is typed by hand.

    python benchmarks/readme_table.py           write it between the markers
    python benchmarks/readme_table.py --check   exit 1 when the README shows something else

A result file is the `report.json` of the demo's run; the newest is the last by name, which holds the date.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

from edgekd.budget import accuracy
from edgekd.decision import words
from edgekd.report import schema
from edgekd.report import words as say
from edgekd.report.html import ordered
from edgekd.report.schema import CandidateRow, Report
from edgekd.workspace import write_atomic

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- demo:begin -->", "<!-- demo:end -->"


def newest(results: Path) -> Path | None:
    """The last demo result by name."""
    return max(results.glob("demo-*.json"), default=None, key=lambda p: p.name)


def table(report: Report, source: str) -> str:
    """The Markdown between the markers."""
    lines = [f"| candidate | encoder + decoder, ms | total p50, ms | faster than `{report.teacher.name}` | MB | {words(report.budget.metric)} | verdict |",
             "| --- | ---: | ---: | ---: | ---: | ---: | --- |", *(_line(row, report) for row in ordered(report))]
    threads = f", {report.target.threads} threads" if report.target.threads else ""
    where = f"{say.device(report)}{threads}, {report.run.started[:10]}"
    how = sorted({r.latency_ms.provenance for r in report.candidates if r.latency_ms})
    note = f"{' and '.join(how).capitalize()} on {where}; accuracy on {report.protocol.instances} instances of {report.protocol.images} images. From `{source}`."
    return "\n".join([*lines, "", note])


def fill(readme: str, body: str) -> str:
    """The README with `body` between its markers.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"the README needs {BEGIN} and, after it, {END}, once each")
    head, rest = readme.split(BEGIN)
    return f"{head}{BEGIN}\n{body}\n{END}{rest.split(END)[1]}"


def main(argv: list[str] | None = None) -> int:
    """Write or check; the exit code."""
    parser = argparse.ArgumentParser(description="fill the README's demo table")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when the README is out of date")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    args = parser.parse_args(argv)
    found = newest(args.results)
    if found is None:
        print(f"no demo-*.json in {args.results}: nothing to show", file=sys.stderr)
        return 1
    before = args.readme.read_text(encoding="utf-8")
    after = fill(before, table(schema.load(found), f"benchmarks/results/{found.name}"))
    if args.check:
        if before != after:
            print(f"{args.readme} does not show {found.name}; run: python benchmarks/readme_table.py", file=sys.stderr)
        return int(before != after)
    write_atomic(args.readme, after)
    return 0


def _line(row: CandidateRow, report: Report) -> str:
    parts = [row.components[n].latency_ms if n in row.components else None for n in ("encoder", "decoder")]
    split = " + ".join(say.number_ms(p.p50) for p in parts if p) or say.DASH
    status = "**chosen**" if row.id == report.chosen else row.status + (f": {row.reason.split('; ')[0]}" if row.status != "accepted" else "")
    total = say.number_ms(row.latency_ms.p50 if row.latency_ms else None)
    cells = [f"`{row.id}`", split, total, say.times(say.ratio(row, report)), say.megabytes(row.size_bytes), say.score(accuracy(row, report.budget.metric)),
             status.replace("|", "/")]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
