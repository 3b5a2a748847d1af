"""`edgekd quantize --sensitivity` and `--scheme auto`: which layers 8 bits cost most, and the mix of precisions that keeps to a budget.

    rank       every layer alone and cumulatively, rounding computed in torch (`edgekd.quantization.sensitivity`)
    ways       the float schemes; all integer, once for each way to find ranges that the format has, with the decoder in float, with the rest in bf16
    keep       of the best way: 1, 2, 4, ... of the most sensitive layers in float until the drop is within the budget, then half-way back
    measure    every one of them as a file on its own runtime: drop on photos, latency in turns with fp32, size
    choose     the fastest within the budget; an integer mix must beat the best float scheme, or that is chosen

Only the ranking is computed in torch. What decides is measured.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd import comparing, console, exporting, plugins, schemes
from edgekd.data import open_data
from edgekd.decision import RULES
from edgekd.errors import EdgekdError, UsageError
from edgekd.models.rounding import layers
from edgekd.protocols import facts
from edgekd.quantization.sensitivity import Sensitivity, sensitivity
from edgekd.recipe import REFERENCE_SCHEME
from edgekd.report import sensitivity as drawing
from edgekd.search.pareto import front
from edgekd.workspace import write_json

if TYPE_CHECKING:
    from edgekd.artifact import Manifest
    from edgekd.comparing import Bench
    from edgekd.schemes import Precision
    from edgekd.target import Target

INTEGER = "w8a8_static"
SHOWN = 8
"""Photos that the ranking finds its ranges on."""
SLOWER, TELLS = 0.10, 0.25
"""What agreement with the float model may cost in time, as a share; and the points of it that a few photos tell apart."""
MOST_EXPORTS = 14
FEW = 4
"""Layers in float that are tried even where none would do: what they bring belongs to the Pareto set."""


@dataclass(frozen=True)
class Budget:
    """Points of accuracy that may be lost to fp32, and a ceiling of latency (p50 of encoder and one prompt); None is none."""

    max_drop: float
    target_ms: float | None = None


@dataclass(frozen=True)
class Lost:
    """Points of accuracy, and of overlap with the float model's own answers, that a precision loses."""

    drop: float
    disagreement: float


def rank(*, model: str | Path, format: str, target: Target, data: str | Path | None, output: Path, limit: int) -> dict[str, Any]:
    """What each layer of the component that takes photos costs at 8 bits: `sensitivity.json` and `sensitivity.html` in `output`, and the former as a
    document.

    Raises:
        UsageError: unknown names, no photos, or the target runs no integers in this format.
    """
    found = _bench(model, INTEGER, format, target, data, output, limit)
    return _written(found, ranked(found))


def _written(found: Bench, ranks: Sensitivity) -> dict[str, Any]:
    document = {"model": found.source.name, "format": found.format, "target": found.target.name, **ranks.document()}
    write_json(found.folder / "sensitivity.json", document)
    page = drawing.page(found.folder / "sensitivity.html", f"{found.source.name}: what 8 bits cost, layer by layer", ranks)
    return {**document, "json": str(found.folder / "sensitivity.json"), "plot": str(page)}


def _bench(model: str | Path, scheme: str, format: str, target: Target, data: str | Path | None, output: Path, limit: int) -> Bench:
    comparing.check_runs(scheme, format, target)
    if data is None:
        raise UsageError("there are no photos to judge precisions on", hint="give a folder of images with --data")
    return comparing.bench(model, format, target, open_data(data), output, limit)


def ranked(found: Bench) -> Sensitivity:
    """The layers of the folded model, as exporters see it, by what 8 bits cost them."""
    assert found.judge is not None and found.calibration is not None
    task = plugins.task_of(found.source)
    name, samples = task.photo_component, list(found.calibration[task.photo_component])[:SHOWN]
    student = exporting.folded(found.source, np.concatenate([one["images"] for one in samples[:2]]))
    part = task.components(student)[name]
    with console.progress(2 * len(layers(part.module)), f"sensitivity of {found.source.name}") as progress:
        return sensitivity(student, part, samples, found.judge, advance=progress.advance)


def auto(*, model: str | Path, format: str, target: Target, data: str | Path | None, output: Path, limit: int, budget: Budget) -> dict[str, Any]:
    """The fastest precision within a budget, with everything that was tried and the Pareto set of disagreement and latency.

    Raises:
        UsageError: as `rank`.
        EdgekdError: not even fp32 can be exported.
    """
    found = _bench(model, INTEGER, format, target, data, output, limit)
    return search(found, ranked(found), budget)


def search(found: Bench, ranks: Sensitivity, budget: Budget, *, most: int = MOST_EXPORTS) -> dict[str, Any]:
    """`auto` on a bench whose layers are ranked, with `most` exports; `auto.json` in its folder."""
    tries = _Search(found, ranks, budget.max_drop, most)
    tries.run()
    rows = found.rows(tries.made, most=budget.max_drop / 100)
    metric = f"{plugins.task_of(found.source).compared_by}_drop"
    chosen, verdict, reason = choose(rows, metric, budget)
    costs = {layer.name: layer.miou_drop for layer in ranks.layers}
    document = {**chosen, "verdict": verdict, "reason": reason, "max_drop": budget.max_drop, "target_ms": budget.target_ms,
                "kept_float": _why(chosen["kept_float"], costs), "pareto": pareto(rows, metric), "candidates": rows, "failed": tries.failed,
                "judged_on": comparing.judged_on(found.judge) if found.judge else None, "sensitivity": _written(found, ranks)["json"]}
    write_json(found.folder / "auto.json", document)
    return document


class _Search:
    """The precisions that are tried, one export after the other; what cannot be exported is noted and left out."""

    def __init__(self, bench: Bench, ranks: Sensitivity, max_drop: float, most: int) -> None:
        self.bench, self.ranks, self.max_drop, self.most = bench, ranks, max_drop, most
        self.made: list[Manifest] = []
        self.failed: dict[str, str] = {}

    def run(self) -> None:
        """Fill `made`, the reference first."""
        self.made.append(self.bench.export(schemes.parse(REFERENCE_SCHEME)))
        runs, exporter = self.bench.target.runs[self.bench.format], plugins.exporter(self.bench.format)
        for name in exporter.schemes:
            if schemes.get(name).is_float and name != REFERENCE_SCHEME and name in runs:
                self._try(schemes.parse(name))
        tried = [(lost, way) for way in self._ways() if (lost := self._try(way)) is not None]
        if tried:
            self._keep(min(tried, key=lambda one: (max(one[0].drop, self.max_drop), one[0].disagreement))[1])

    def _ways(self) -> list[Precision]:
        """All integer, each way that this format has to find the ranges; the decoder in float; the rest in bf16."""
        known = facts(plugins.exporter(self.bench.format)).tunes
        plain = schemes.parse(INTEGER)
        found = [plain] + [schemes.parse(f"{INTEGER}[{method}]") for method in ("percentile", "mse") if method in known.get("method", ())]
        if "decoder" in plugins.task_of(self.bench.source).components(self.bench.source):
            found.append(schemes.parse(f"{INTEGER} + {{decoder: fp32}}"))
        if "bf16" in known.get("rest", ()) and "bf16" in self.bench.target.runs[self.bench.format]:
            found.append(schemes.parse(f"{INTEGER} + {{rest: bf16}}"))
        return found

    def _keep(self, base: Precision) -> None:
        """More and more of the most sensitive layers in float: at least a few, and until the drop is within the budget; then half-way back to the last
        that was not."""
        order, low, high = [layer.name for layer in self.ranks.layers], 0, 1
        while high < len(order) and len(self.made) < self.most:
            within = self._within(base.keeping(order[:high]))
            if within and high >= FEW:
                break
            low, high = (low if within else high), 2 * high
        while high - low > 1 and low >= FEW and len(self.made) < self.most:
            middle = (low + high) // 2
            low, high = (low, middle) if self._within(base.keeping(order[:middle])) else (middle, high)

    def _within(self, precision: Precision) -> bool:
        lost = self._try(precision)
        return lost is not None and lost.drop <= self.max_drop

    def _try(self, precision: Precision) -> Lost | None:
        """What a precision loses; None where it cannot be had."""
        try:
            manifest = self.bench.export(precision)
        except EdgekdError as e:
            self.failed[precision.text] = e.what
            return None
        self.made.append(manifest)
        (before, _), (score, agreement) = self.bench.scored(self.made[0]), self.bench.scored(manifest)
        assert before is not None and score is not None and agreement is not None  # there are photos
        return Lost(100 * (before - score), 100 * (1 - agreement))


def choose(rows: Sequence[dict[str, Any]], metric: str, budget: Budget) -> tuple[dict[str, Any], str, str]:
    """The row that is taken, `accepted`, `rejected` or `unverified`, and why. The first row is fp32.

    Of those within the budget that take at most `SLOWER` longer than the fastest, the one that disagrees least with the float model wins, the smaller
    where so few photos cannot tell. One of integers must also beat the best float scheme by more than two measurements of one thing differ by. Where
    latency cannot be measured the smallest wins.
    """
    within = [r for r in rows if (r[metric] or 0.0) <= budget.max_drop]
    if rows[0]["latency_ms"] is None:
        best = min(within, key=lambda r: (r["size_bytes"], r["disagreement"]))
        return best, "unverified", f"the smallest that loses at most {budget.max_drop:g} points; its latency cannot be measured from here"
    floats, mixes = ([r for r in within if bool(r["executed_integer_ops"]) == integer] for integer in (False, True))
    best_float, best = _fastest(floats), _fastest(mixes)
    if best is None or _ms(best) > (1 - RULES.faster) * _ms(best_float):
        best = best_float
    if budget.target_ms is not None and _ms(best) > budget.target_ms:
        return best, "rejected", f"the fastest that loses at most {budget.max_drop:g} points takes {_ms(best):.2f} ms, more than {budget.target_ms:g}"
    if best is rows[0]:
        tried = f"; the fastest with integers takes {_ms(_fastest(mixes)) / _ms(best):.2f} of its time" if mixes else ""
        return best, "rejected", f"nothing within {budget.max_drop:g} points is faster than fp32{tried}"
    lead = "" if best is best_float else f", {_ms(best) / _ms(best_float):.2f} of the fastest float scheme's ({best_float['scheme']})"
    return best, "accepted", f"{best['latency_ratio']:.2f} of fp32's time{lead}, and {best[metric]:.2f} points lost of {budget.max_drop:g}"


def _fastest(rows: Sequence[dict[str, Any]]) -> Any:
    """Of the rows that are nearly as fast as the fastest, the one that disagrees least; the smaller of equals."""
    limit = min((_ms(r) for r in rows), default=0.0) * (1 + SLOWER)
    return min((r for r in rows if _ms(r) <= limit), key=lambda r: (round(r["disagreement"] / TELLS), r["size_bytes"], r["disagreement"]), default=None)


def _ms(row: dict[str, Any]) -> float:
    return float(row["latency_ms"]["p50"])


def pareto(rows: Sequence[dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    """The rows that no other beats in both disagreement with the float model and latency (size, where that is not known), fastest first. Not in drop, of
    which a few photos see so little that chance would choose."""
    def cost(row: dict[str, Any]) -> float:
        return float(row["latency_ms"]["p50"] if row["latency_ms"] else row["size_bytes"])

    keys = ("id", "path", "scheme", metric, "disagreement", "latency_ratio", "size_ratio", "size_bytes", "verdict")
    best = front(rows, cost, lambda r: -r["disagreement"])
    return [{k: r[k] for k in keys} | {"p50_ms": r["latency_ms"]["p50"] if r["latency_ms"] else None, "kept_float": len(r["kept_float"])} for r in best]


def _why(kept: dict[str, str], costs: dict[str, float]) -> dict[str, str]:
    """Of layers, what they would have cost."""
    def said(name: str, why: str) -> str:
        cost = costs.get(name.partition(".")[2])
        return why if cost is None else f"{cost:.2f} points of mask IoU when it alone is rounded"

    return {name: said(name, why) for name, why in kept.items()}
