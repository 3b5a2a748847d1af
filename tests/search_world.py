"""Small worlds for the search: what every student takes and reaches is a table, and every question costs what it says."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from report_sample import latency

from edgekd import schemes
from edgekd.recipe import Budget
from edgekd.report.schema import Accuracy, Agreement, CandidateRow
from edgekd.search.declared import Pair
from edgekd.search.explore import Explorer, Facts, Outcome
from edgekd.search.space import Candidate
from edgekd.search_section import SearchSection

KINDS = (("onnx", "fp32"), ("onnx", "w8a8_static"), ("openvino", "bf16"))
SPEED = {"onnx fp32": 1.0, "onnx w8a8_static": 0.6, "openvino bf16": 0.8}
COST = {"measure": 1.0, "score": 0.5, "short": 4.0, "full": 30.0}


@dataclass
class World:
    """A table of students: family, size, parameters, work, milliseconds in fp32, accuracy after a share and after all, what int8 loses, a score."""

    students: dict[Pair, dict[str, Any]]
    asked: list[tuple[str, Any]] = field(default_factory=list)
    measures: bool = True
    fails: frozenset[str] = frozenset()
    before: Callable[[str], None] = lambda _: None
    """Called before every answer that costs something: an interruption is raised here."""

    def facts(self, pair: Pair) -> Facts:
        one = self.students[pair]
        return Facts(one["family"], one["params"], one["gmacs"])

    def rows(self, pair: Pair) -> list[CandidateRow]:
        points = [Candidate(*pair, *kind) for kind in KINDS]
        return [CandidateRow(id=c.id, student=c.student, image_size=c.image_size, scheme=c.scheme, format=c.format, parent=c.parent) for c in points]

    def predict(self, rows: Sequence[CandidateRow]) -> tuple[dict[str, float], float]:
        return {}, 0.0

    def measure(self, rows: Sequence[CandidateRow]) -> tuple[list[CandidateRow], float]:
        self.ask("measure", [r.id for r in rows])
        return [self.built(r) for r in rows], COST["measure"] * len(rows)

    def score(self, pair: Pair) -> tuple[float | None, float]:
        self.ask("score", pair)
        return self.students[pair]["score"], COST["score"]

    def train(self, pair: Pair, rows: Sequence[CandidateRow], share: float) -> tuple[list[CandidateRow], float]:
        self.ask("short" if share < 1 else "full", pair)
        one = self.students[pair]
        if share < 1:
            return [reached(next(r for r in rows if r.scheme in schemes.FLOATS), one["short"])], COST["short"]
        return [reached(self.built(r), one["full"] - self.loss(one, r)).model_copy(update={"trained": True}) for r in rows], COST["full"]

    def ask(self, what: str, of: Any) -> None:
        self.before(what)
        self.asked.append((what, of))

    def built(self, row: CandidateRow) -> CandidateRow:
        if row.id in self.fails:
            return row.turned("failed", "the exporter refused", "export")
        ms = self.students[row.student, row.image_size]["ms"] * SPEED[f"{row.format} {row.scheme}"]
        return row.model_copy(update={"latency_ms": latency(ms), "size_bytes": int(self.students[row.student, row.image_size]["params"]) * (1 if "w8" in row.scheme else 4)})

    @staticmethod
    def loss(one: dict[str, Any], row: CandidateRow) -> float:
        return 0.0 if row.scheme in schemes.FLOATS else float(one["loss"])

    def best(self, budget_ms: float, most_loss: float = 0.02) -> float:
        """The best accuracy of all candidates within a latency."""
        return max((one["full"] - (one["loss"] if scheme not in schemes.FLOATS else 0.0) for pair, one in self.students.items() for format, scheme in KINDS
                    if one["ms"] * SPEED[f"{format} {scheme}"] <= budget_ms and (scheme in schemes.FLOATS or one["loss"] <= most_loss)), default=0.0)


class Everyone:
    """Proposes all students at once, in order."""

    def __init__(self, world: World) -> None:
        self.pairs, self.count = list(world.students), len(world.students)
        self.told: dict[Pair, tuple[list[float], float]] = {}

    def propose(self, n: int) -> list[Pair]:
        found, self.pairs = self.pairs[:n], self.pairs[n:]
        return found

    def tell(self, values: dict[Pair, tuple[list[float], float]]) -> None:
        self.told.update(values)


def reached(row: CandidateRow, value: float) -> CandidateRow:
    return row.model_copy(update={"accuracy": Accuracy(teacher_agreement=Agreement(box=round(value, 6)))})


def world(seed: int = 0, *, count: int = 24, score: float = 0.5, short: float = 0.9, families: int = 4) -> World:
    """Students whose accuracy follows from work and family, a score and a short training that tell of it so much (0 nothing, 1 everything)."""
    rng = np.random.default_rng(seed)
    gifts = rng.normal(0, 0.03, families)
    students: dict[Pair, dict[str, Any]] = {}
    for i in range(count):
        family, gmacs, size = i % families, float(np.exp(rng.uniform(np.log(0.02), np.log(2.0)))), (128, 192, 256)[i % 3]
        value = 0.75 + 0.04 * np.log(gmacs) + gifts[family] + rng.normal(0, 0.01)
        unit = (value - 0.65) / 0.08
        students[f"s{i}", size] = {
            "family": f"f{family}", "params": 1e6 * (1 + gmacs) * float(rng.uniform(0.8, 1.2)), "gmacs": gmacs, "ms": 2 + 20 * gmacs**0.9 * (1 + 0.2 * family),
            "full": float(np.clip(value, 0.05, 0.99)), "loss": float(rng.choice([0.002, 0.01, 0.08], p=[0.5, 0.3, 0.2])),
            "score": float(score * unit + np.sqrt(1 - score**2) * rng.normal()), "short": float(np.clip(0.4 + 0.08 * (short * unit + np.sqrt(1 - short**2) * rng.normal()), 0.01, 0.99))}
    return World(students)


def search(found: World, *, budget_ms: float | None = 12.0, sampler: Any = None, section: SearchSection | None = None, **limits: Any) -> Outcome:
    budget = Budget(latency_ms=budget_ms, **limits)
    section = section or SearchSection(strategy="explore", trials=len(found.students), max_trained=3)
    return Explorer(found, budget, section, teacher_accuracy=1.0).run(sampler or Everyone(found))


def picked(outcome: Outcome, budget_ms: float | None = 12.0, **limits: Any) -> CandidateRow | None:
    from edgekd.decision import choose, judge

    budget = Budget(latency_ms=budget_ms, **limits)
    chosen = choose(judge(outcome.rows, budget, 1.0), budget, 1.0).chosen
    return next((r for r in outcome.rows if r.id == chosen), None)
