"""How well latency is predicted for families of networks that the predictor has never seen; JSON out. Takes no clock: everything is in the database.

    python benchmarks/predictor.py --output benchmarks/results/predictor-2026-11-22.json     every family held out in turn (minutes)
    python benchmarks/predictor.py --ship                                                    also what was learned, into edgekd/latency/data
    python benchmarks/predictor.py --networks                                                the operators of the networks of quoted figures

For each runtime and each family of students: the predictor is fitted from nothing to the rows of all others (their operators, their networks and the
networks drawn at random, which belong to no family), then asked about the encoders of the one left out. Nothing of that family is seen: not its
networks, not the times of its operators, not in the choice of lengths, and not in the interval, which is calibrated by leaving out a second family.
Errors are |predicted - measured| / measured of whole encoders, measured untraced. Two simple rules are fitted to the same rows to compare with.
"""
from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

from edgekd.latency import quoted, roofline
from edgekd.latency.database import NO_FAMILY, SHIPPED, Database, Key, ModelRow, open_database
from edgekd.latency.fitting import Fitted, expanded
from edgekd.measurement import Circumstances, quantile
from edgekd.workspace import write_atomic, write_json

ROOT = Path(__file__).resolve().parents[1]
BAR = {"median_error": 0.08, "p90_error": 0.20}
GOAL = {"median_error": 0.05, "p90_error": 0.12}


class Rows:
    """The rows of one key, and the models fitted to what is left of them without some families."""

    def __init__(self, rows: Database) -> None:
        self.rows = rows
        self.families = sorted({m.family for m in rows.models} - {NO_FAMILY})
        self._fitted: dict[frozenset[str], Fitted] = {}

    def fitted(self, without: frozenset[str]) -> Fitted:
        """Fitted from nothing."""
        if without not in self._fitted:
            rest = self.rows
            for family in without:
                rest = rest.without(family)
            assert not without & ({m.family for m in rest.models} | {o.family for o in rest.operators})
            self._fitted[without] = Fitted.of(rest)
            print(f"  fitted without {', '.join(sorted(without)) or 'nothing'}", flush=True)
        return self._fitted[without]

    def of(self, family: str) -> list[ModelRow]:
        """Its encoders."""
        return [m for m in self.rows.models if m.family == family]

    def unseen(self, family: str, without: frozenset[str] = frozenset()) -> list[tuple[float, float]]:
        """The uncorrected errors of a family left out beside others."""
        return self.fitted(without | {family}).errors_of(self.of(family), self.rows)

    def predictor(self, family: str | None = None) -> Fitted:
        """As it ships, of all rows but those of a family: corrected, and with an interval, by leaving out a second one in turn."""
        without = frozenset({family}) if family else frozenset[str]()
        fitted = self.fitted(without)
        fitted.errors = {other: self.unseen(other, without) for other in self.families if other != family}
        return fitted


def held_out(rows: Rows) -> list[dict[str, Any]]:
    """A row for every encoder of every family."""
    found = []
    for family in rows.families:
        fitted = rows.predictor(family)
        assert fitted.spread is not None
        spread = math.exp(fitted.spread)
        for model in rows.of(family):
            ms = fitted.ms(expanded(model, rows.rows))[0]
            found.append({"encoder": model.id, "family": family, "measured_ms": model.ms, "rounds_ms": list(model.rounds), "predicted_ms": round(ms, 4),
                          "low_ms": round(ms / spread, 4), "high_ms": round(ms * spread, 4), "error": round(abs(ms / model.ms - 1), 4),
                          "inside": ms / spread <= model.ms <= ms * spread})
    return found


def compared(rows: Rows) -> dict[str, dict[str, float]]:
    """What two simple rules reach when fitted to the other families: time in proportion to multiply-adds, and to the roofline."""
    roof = roofline.of_cpu(rows.rows.models[0].key.device, rows.rows.models[0].key.threads)
    rules = {"multiply-adds": lambda m: float(sum(o.macs for o in expanded(m, rows.rows))), "roofline": lambda m: roofline.predict_ms(expanded(m, rows.rows), roof)}
    found = {}
    for name, rule in rules.items():
        errors = []
        for family in rows.families:
            scale = statistics.median(m.ms / rule(m) for m in rows.rows.models if m.family != family)
            errors += [abs(scale * rule(m) / m.ms - 1) for m in rows.of(family)]
        found[name] = summary(errors)
    return found


def summary(errors: list[float]) -> dict[str, float]:
    """Median and p90."""
    ordered = sorted(errors)
    return {"median_error": round(quantile(ordered, 0.5), 4), "p90_error": round(quantile(ordered, 0.9), 4)}


def noise(rows: Rows) -> float:
    """The median over encoders of how far the rounds of a measurement lie apart from its median: below this nothing can be predicted."""
    return round(statistics.median(statistics.median(abs(r / m.ms - 1) for r in m.rounds) for f in rows.families for m in rows.of(f) if m.rounds), 4)


def runtime(key: Key, rows: Rows) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The line of a runtime, and its encoders."""
    print(f"{key.slug}: {len(rows.rows.operators)} operators, {sum(len(rows.of(f)) for f in rows.families)} encoders of {len(rows.families)} families", flush=True)
    encoders = held_out(rows)
    line = {"runtime": key.runtime, "version": key.version, "device": key.device, "scheme": key.scheme, "threads": key.threads,
            **summary([e["error"] for e in encoders]), "coverage": round(statistics.fmean(e["inside"] for e in encoders), 4), "held_out": rows.families,
            "models": len(encoders), "operators": len(rows.rows.operators),
            "families": {f: summary([e["error"] for e in encoders if e["family"] == f]) | {"models": sum(e["family"] == f for e in encoders),
                         "coverage": round(statistics.fmean(e["inside"] for e in encoders if e["family"] == f), 4)} for f in rows.families},
            "spread_of_rounds": noise(rows), "compared": compared(rows)}
    line["met"] = {"bar": all(line[k] <= v for k, v in BAR.items()), "goal": all(line[k] <= v for k, v in GOAL.items())}
    print(json.dumps({k: line[k] for k in ("runtime", "scheme", "median_error", "p90_error", "coverage", "families", "compared", "spread_of_rounds")}), flush=True)
    return line, [{"runtime": key.runtime, "scheme": key.scheme, **e} for e in encoders]


def ship(key: Key, rows: Rows) -> None:
    """What was learned from all rows, and the errors that give the interval."""
    told = json.dumps(rows.predictor().told(), separators=(",", ":"))
    print(write_atomic(SHIPPED / f"{key.slug}.learned.json", told + "\n"), flush=True)


def networks() -> None:
    """Write `data/quoted.json`."""
    import torch

    from edgekd import plugins, students
    from edgekd.latency import graphs
    from edgekd.models.fold import fold
    from edgekd.models.sam import Sam
    from edgekd.protocols import Component

    found = {}
    wanted = sorted({(r.network, r.image_size) for r in quoted.ROWS})
    with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
        for name, size in wanted:
            path = Path(folder) / f"{name}.onnx"
            torch.manual_seed(0)
            part = Component("encoder", fold(students.encoder(name, 256).eval()), {"images": torch.randn(1, 3, size, size)}, ("image_embeddings",))
            plugins.exporter("onnx").export(part, path, scheme="fp32")
            found[f"{name}-{size}"] = quoted.told(graphs.plain(path))
            for file in plugins.exporter("onnx").files(path):  # type: ignore[attr-defined]
                file.unlink()
            print(name, size, len(found[f"{name}-{size}"]), flush=True)
        model = students.build("repvit_xs", image_size=1024, embed_dim=256).eval()
        assert isinstance(model, Sam)
        part = plugins.task("promptable_segmentation").components(model)["decoder"]
        path = Path(folder) / "decoder.onnx"
        plugins.exporter("onnx").export(part, path, scheme="fp32")
        found["sam_decoder"] = quoted.told(graphs.plain(path))
    print(write_atomic(quoted.FILE, json.dumps(found, separators=(",", ":")) + "\n"))


def main() -> None:
    """Parse and do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / f"benchmarks/results/predictor-{date.today()}.json")
    parser.add_argument("--ship", action="store_true")
    parser.add_argument("--networks", action="store_true")
    parser.add_argument("--database", type=Path, help="a folder of rows in place of the shipped ones")
    given = parser.parse_args()
    if given.networks:
        return networks()
    database = open_database(given.database or Path("/nonexistent"), shipped=given.database is None)
    lines, encoders = [], []
    for key in sorted(database.counts(), key=lambda k: k.slug):
        rows = Rows(database.select([key]))
        line, found = runtime(key, rows)
        lines.append(line)
        encoders += found
        if given.ship:
            ship(key, rows)
    judged = [line for line in lines if line["scheme"] == "fp32"]
    write_json(given.output, {"benchmark": "predictor", "bar": BAR, "goal": GOAL, "runtimes": judged, "others": [line for line in lines if line not in judged],
                              "measured": sorted({m.date for m in database.models})[-1:], "database": "edgekd/latency/data",
                              "circumstances": Circumstances.capture().model_dump(mode="json"), "quoted": quoted.compare(), "rows": encoders})
    print(given.output)


if __name__ == "__main__":
    main()
