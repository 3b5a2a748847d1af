"""What a model file or an artifact would take on a device, without running it there: always `predicted`, always with an interval and with the reason.

What it is based on, the best that there is rows for (`why` says which):

1. operators measured on this device with this runtime, precision and number of threads: a regression over the graph that the runtime executes;
2. the same with another number of threads, scaled;
3. whole networks measured on the device: the roofline, corrected by how far it was from them;
4. nothing: the roofline of the device's data sheet.
"""
from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgekd.errors import EdgekdError
from edgekd.latency import graphs, parts, roofline
from edgekd.latency.database import SHIPPED, Database, ModelRow, home, open_database
from edgekd.latency.fitting import LEAST_ROWS, UNKNOWN_FACTOR, Fitted, expanded
from edgekd.latency.keys import Key, device_of, here, settled, version_of
from edgekd.latency.operators import Operator
from edgekd.workspace import fingerprint, write_atomic

if TYPE_CHECKING:
    from edgekd.profiling.bare import ModelFile
    from edgekd.target import Target

LEAST_OPERATORS, LEAST_MODELS = 100, 3
THREADS_EXPONENT, THREADS_FACTOR, SCALED_FACTOR, UNCHECKED_FACTOR = 0.8, 1.4, 1.5, 1.5
"""How latency falls with threads, about; and what is added to intervals: after scaling by threads, by whole networks, and without calibration."""
_fitted: dict[str, Fitted] = {}


@dataclass(frozen=True)
class Prediction:
    """Milliseconds of one use. `low` to `high` is meant to hold 9 of 10 such models.

    Args:
        why: what it is based on, in a clause.
        age_warning: what makes that doubtful today, or None.
        parts: component -> its own prediction, of an artifact.
    """

    ms: float
    low: float
    high: float
    why: str
    age_warning: str | None = None
    provenance: Literal["predicted"] = "predicted"
    parts: Mapping[str, Prediction] = field(default_factory=dict)

    def times(self, factor: float, spread: float, why: str) -> Prediction:
        """The same multiplied, with a wider interval and one more reason."""
        return replace(self, ms=self.ms * factor, low=self.low * factor / spread, high=self.high * factor * spread, why=f"{self.why}; {why}")


def predict(source: Path | ModelFile, target: str | Target, *, runtime: str | None = None, threads: int | None = None, scheme: str | None = None,
            prompts: int = 1, database: Database | None = None) -> Prediction:
    """One use of an artifact's folder or of a model file on a target: all its components, for `prompts` prompts.

    Args:
        target: a target or its name, or a device as the database calls it (`edgekd.latency.keys`).
        runtime, scheme: format and precision of a file that does not say them itself.
        threads: as for profiling; None is the runtime's own choice.
        database: in place of the shipped rows and the user's own.

    Raises:
        UsageError: no such format or scheme.
        EdgekdError: the file cannot be read, or nothing at all is known of the device.
    """
    database = open_database() if database is None else database
    found = {}
    for part in parts.of(source, prompts=prompts, format=runtime, scheme=scheme):
        one = predict_operators(_operators(part), target, part.format, threads=threads, scheme=part.scheme, database=database)
        if part.together:
            found[part.name] = replace(one, ms=one.ms * part.calls, low=one.low * part.calls, high=one.high * part.calls)
    if len(found) == 1:
        return next(iter(found.values()))
    return Prediction(sum(p.ms for p in found.values()), sum(p.low for p in found.values()), sum(p.high for p in found.values()),
                      why=" / ".join(dict.fromkeys(p.why for p in found.values())), parts=found,
                      age_warning="; ".join(dict.fromkeys(p.age_warning for p in found.values() if p.age_warning)) or None)


def _operators(part: parts.Part) -> list[Operator]:
    operators = part.operators()
    if not operators:
        raise EdgekdError(f"the graph of a '{part.format}' file cannot be read here, so its latency cannot be predicted", where=part.file,
                          hint="measure it: edgekd profile, with --device where the device is elsewhere")
    return operators


def predict_operators(operators: Sequence[Operator], target: str | Target, runtime: str, *, threads: int | None = None, scheme: str = "fp32",
                      database: Database | None = None) -> Prediction:
    """The same of a list of operators, as `edgekd.latency.graphs` reads them.

    Raises:
        EdgekdError: nothing at all is known of the device.
    """
    database = open_database() if database is None else database
    target = _resolved(target)
    device, count = device_of(target), settled(threads)
    rows = _rows(database, device, runtime)
    keys = [k for k in rows.counts() if k.scheme == scheme]
    for wanted in ([k for k in keys if k.threads == count], sorted(keys, key=lambda k: abs(math.log(max(1, k.threads) / count)))):
        for key in wanted:
            chosen = rows.select([k for k in keys if k.threads == key.threads])
            if sum(1 for r in chosen.operators if r.times) >= LEAST_OPERATORS:
                return _by_operators(operators, chosen, device, runtime, key.threads, count)
    return _by_roofline(operators, rows, target, device, runtime, count, scheme)


def _resolved(target: str | Target) -> str | Target:
    """A target by its name; a name that no target has is one of a device."""
    from edgekd import target as targets

    return targets.resolve(target) if isinstance(target, str) and (target in targets.names() or target in targets.aliases()) else target


def _rows(database: Database, device: str, runtime: str) -> Database:
    """Those of a device and runtime; of several versions of the runtime the installed one's, else all."""
    keys = [k for k in database.counts() if k.device == device and k.runtime == runtime]
    same = [k for k in keys if k.version == version_of(runtime)]
    return database.select(same or keys)


# --- from operators


def _by_operators(operators: Sequence[Operator], rows: Database, device: str, runtime: str, measured: int, threads: int) -> Prediction:
    fitted = fit(rows)
    ms, unknown = fitted.ms(operators)
    spread = fitted.spread
    width = math.exp(spread if spread is not None else math.log(UNCHECKED_FACTOR)) * UNKNOWN_FACTOR**unknown
    count = sum(1 for r in rows.operators if r.times)
    why = f"from {count} measured operators of {runtime} on {device}" + (f", {unknown:.0%} of it by kinds that were not" if unknown >= 0.01 else "")
    found = Prediction(ms, ms / width, ms * width, why + ("" if spread is not None else "; its error was never checked"), rows.warning(version_of(runtime)))
    own = [m for m in rows.models if m.own and m.operators]
    if len(own) >= LEAST_MODELS:
        ratios = [m.ms / fitted.ms(expanded(m, rows))[0] for m in own]
        found = found.times(statistics.median(ratios), 1.0, f"corrected by {len(own)} models that were measured here")
    if device != here() and runtime in graphs.RUNTIMES:
        found = found.times(1.0, SCALED_FACTOR, "the graph is as it is executed on this machine")
    if measured != threads:
        factor = (max(1, measured) / threads) ** THREADS_EXPONENT
        found = found.times(factor, THREADS_FACTOR, f"scaled from {measured} to {threads} threads")
    return found


def fit(rows: Database) -> Fitted:
    """The model of these rows, which are of one device, runtime and scheme: what is known of it is read, else learned (a minute) and kept in `home()`."""
    key = max(rows.counts().items(), key=lambda item: item[1])[0]
    mark = fingerprint([[r.operator.told(), r.ms] for r in rows.operators] + [[m.id, m.ms] for m in rows.models])
    if mark not in _fitted:
        told = learned(key)
        fitted = _fitted[mark] = Fitted.of(rows, told)
        if told is None:
            if sum(m.family != "none" for m in rows.models) >= LEAST_ROWS:
                fitted.calibrate(rows)
            _keep(key, fitted)
    return _fitted[mark]


def learned(key: Key) -> dict[str, Any] | None:
    """What `Fitted.told` said of rows of this key, shipped or the user's; None when there is none, or it is damaged."""
    for folder in (home(), SHIPPED):
        try:
            found: dict[str, Any] = json.loads((folder / f"{key.slug}.learned.json").read_text(encoding="utf-8"))
            return found if {"shapes", "errors"} <= set(found) else None
        except (OSError, ValueError):
            continue
    return None


def _keep(key: Key, fitted: Fitted) -> None:
    try:
        write_atomic(home() / f"{key.slug}.learned.json", json.dumps(fitted.told()))
    except OSError:
        pass  # it is learned again next time


# --- from the roofline


def _by_roofline(operators: Sequence[Operator], rows: Database, target: str | Target, device: str, runtime: str, threads: int, scheme: str) -> Prediction:
    roof = roofline.of_cpu(device, threads) if isinstance(target, str) else roofline.of_target(target, device, runtime, threads)
    if roof is None or (isinstance(target, str) and "+" not in target):
        name = target if isinstance(target, str) else target.name
        raise EdgekdError(f"nothing is known of how fast '{name}' runs {runtime} files: no measurements, and no roofline in its profile",
                          hint="measure some there with edgekd profile --save, or add a `roofline:` to the target's file")
    ms = roofline.predict_ms(operators, roof, roofline.precision_of(scheme))
    measured = [m for m in rows.models if m.operators]
    if len(measured) < LEAST_MODELS:
        return Prediction(ms, ms / roofline.FACTOR, ms * roofline.FACTOR,
                          f"roofline of its {roof.unit} ({roof.efficiency:.0%} of {_peak(roof, scheme):g} GFLOP/s and {roof.gb_per_s:g} GB/s); nothing was measured there")
    ratios = [math.log(m.ms / _ideal(m, rows, target, device, runtime)) for m in measured]
    middle = statistics.median(ratios)
    same = all(m.key.scheme == scheme for m in measured)
    width = max(math.exp(max(abs(r - middle) for r in ratios)), SCALED_FACTOR) * (1.0 if same else SCALED_FACTOR)
    ms *= math.exp(middle)
    why = f"roofline of its {roof.unit}, corrected by {len(measured)} models measured there" + ("" if same else " in other precisions")
    return Prediction(ms, ms / width, ms * width, why, rows.warning(version_of(runtime) if device == here() else None))


def _ideal(model: ModelRow, rows: Database, target: str | Target, device: str, runtime: str) -> float:
    """What the roofline says of a measured model, at its own precision and threads."""
    threads = model.key.threads or 1
    roof = roofline.of_cpu(device, threads) if isinstance(target, str) else roofline.of_target(target, device, runtime, threads)
    assert roof is not None  # the caller has one for the same target
    return max(1e-6, roofline.predict_ms(expanded(model, rows), roof, roofline.precision_of(model.key.scheme)))


def _peak(roof: Any, scheme: str) -> float:
    return float(roof.gflops.get(roofline.precision_of(scheme)) or max(roof.gflops.values()))
