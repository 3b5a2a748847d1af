"""The search through a space: from cheap evidence to dear, and nothing trained that cannot keep to the budget.

    predict -> measure untrained -> training-free score -> short distillation -> full distillation

There is one rule. What is known of every student is completed by what the cheaper rungs let hope for (`estimate`, two standard deviations to the
good), `decision.choose` picks as it will in the end, and whoever it picks goes up one rung. When the pick is fully trained, nothing that is left
is likely to be better, and the search ends. Successive halving moves a fixed share up at once; here as many go up as the rungs' rank correlations,
estimated from what was seen so far, leave in doubt: one, where the cheap rung orders students as the dear one does; several, where it is useless.

Students are trained once and shared by all their candidates. The search knows students only through an `Evaluator`: the real one is
`edgekd.exploring`, those of the tests and of `benchmarks/search.py` are tables. All of it is deterministic.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from edgekd import schemes
from edgekd.budget import accuracy, limits
from edgekd.decision import RULES, Budget, choose, judge, plan_verdicts
from edgekd.measurement import Latency
from edgekd.report.schema import Accuracy, CandidateRow
from edgekd.search import estimate, latencies
from edgekd.search.declared import Pair
from edgekd.search_section import SearchSection

Rung = Literal["predict", "measure", "score", "short", "full"]
HOPE = 2.0
"""Standard deviations by which what is not known is taken for better than it is believed to be."""
DROP = 0.005
"""Accuracy that a precision below float is believed to lose before any loss is seen: with both within the budget, float is tried first."""
CLUES = {"parameters": 0.3, "work": 0.3, "size": 0.5, "score": 0.3}
"""Rank correlations with the accuracy believed before any is seen, each worth four observations. Masks are fine: of all clues the input size is the surest
(0.85 among the 21 students of `benchmarks/search.py`, where short trainings hide it)."""
WAVES = 3
"""Times that students are proposed, where there are more than the trials: each time by what is known of those before."""
USELESS, ENOUGH = 0.2, 6
"""A score whose trust is below the first after so many observations is not asked for any more."""


@dataclass(frozen=True)
class Facts:
    """What a student is, untrained: parameters and multiply-adds (10^9) of its encoder, and its architecture."""

    family: str
    params: float
    gmacs: float


class Evaluator(Protocol):
    """What can be asked about students. Every answer that costs something comes with its seconds; the same question has the same answer."""

    @property
    def measures(self) -> bool:
        """Whether latencies can be measured: without a device they are predicted, or not known."""
        ...

    def facts(self, pair: Pair) -> Facts: ...

    def rows(self, pair: Pair) -> list[CandidateRow]:
        """The student's candidates, of which nothing is known yet."""
        ...

    def predict(self, rows: Sequence[CandidateRow]) -> tuple[dict[str, float], float]:
        """Milliseconds by id, for those of which something can be said without a measurement."""
        ...

    def measure(self, rows: Sequence[CandidateRow]) -> tuple[list[CandidateRow], float]:
        """The untrained candidates, exported and measured; one that cannot be built has failed."""
        ...

    def score(self, pair: Pair) -> tuple[float | None, float]:
        """A training-free score, more is better."""
        ...

    def train(self, pair: Pair, rows: Sequence[CandidateRow], share: float) -> tuple[list[CandidateRow], float]:
        """The student after a share of the steps. Below 1: one float row with its accuracy. At 1: all rows, exported, measured and evaluated."""
        ...


class Sampler(Protocol):
    """Who proposes students (`search.study`)."""

    count: int
    """Students of the whole space."""

    def propose(self, n: int) -> list[Pair]:
        """At most n students that were not proposed before."""
        ...

    def tell(self, values: dict[Pair, tuple[list[float], float]]) -> None:
        """Of every student proposed so far: what is to be made large (accuracy, then costs negated), and by how much it misses the budget (<= 0: not)."""
        ...


@dataclass
class Seen:
    """What is known of one student: `short` and `full` are accuracies in float, `drops` what other precisions lose to them."""

    pair: Pair
    facts: Facts
    rows: dict[str, CandidateRow]
    score: float | None = None
    scored: bool = False
    short: float | None = None
    drops: dict[str, float] = field(default_factory=dict)
    full: float | None = None
    trained: bool = False


@dataclass(frozen=True)
class Step:
    """One student up one rung, and why."""

    rung: Rung
    pair: Pair
    seconds: float
    reason: str


@dataclass(frozen=True)
class Outcome:
    """What a search found: every candidate looked at, what it did in order, and how well each rung ordered students for the next."""

    rows: list[CandidateRow]
    steps: list[Step]
    correlations: dict[str, dict[str, float | int | None]]
    reason: str

    @property
    def seconds(self) -> float:
        """Of all steps."""
        return math.fsum(s.seconds for s in self.steps)

    def climbed(self, rung: Rung) -> list[Pair]:
        """Students that came to a rung, in order, each once."""
        return list(dict.fromkeys(s.pair for s in self.steps if s.rung == rung))


class Explorer:
    """One search. `run` is the whole of it; `step` moves one student up one rung.

    Args:
        budget, teacher_accuracy, teacher_ms: as for `decision.judge`.
        say: is told every step in words.
    """

    def __init__(self, evaluator: Evaluator, budget: Budget, section: SearchSection, *, teacher_accuracy: float | None = None,
                 teacher_ms: float | None = None, say: Callable[[str], None] = lambda _: None) -> None:
        self.evaluator, self.budget, self.section = evaluator, budget, section
        self.teacher_accuracy, self.teacher_ms, self.say = teacher_accuracy, teacher_ms, say
        self.seen: dict[Pair, Seen] = {}
        self.told: dict[str, float] = {}
        self.steps: list[Step] = []
        self.foretold: list[tuple[float, float]] = []
        self.asked: set[str] = set()

    # --- what is known, and what may be hoped for

    def beliefs(self) -> tuple[list[float], list[float]]:
        """Of every student seen, in order: the accuracy after full training that is believed, and its standard deviation."""
        seen = list(self.seen.values())
        if not seen:
            return [], []
        clues = {"parameters": [math.log(s.facts.params) for s in seen], "work": [math.log(max(s.facts.gmacs, 1e-4)) for s in seen],
                 "size": [float(s.pair[1]) for s in seen], "score": [math.nan if s.score is None else s.score for s in seen]}
        believed = estimate.accuracies({name: (values, CLUES[name]) for name, values in clues.items()}, [s.facts.family for s in seen],
                                       {i: s.short for i, s in enumerate(seen) if s.short is not None})
        cheap = [float(believed.mean[i]) if s.short is None else s.short for i, s in enumerate(seen)]
        mean, wide = estimate.later(cheap, {i: s.full for i, s in enumerate(seen) if s.full is not None and s.short is not None},
                                    [i for i, s in enumerate(seen) if s.short is not None])
        sd = [wide if s.short is not None else math.hypot(wide, float(believed.sd[i])) for i, s in enumerate(seen)]
        return [float(m) if s.full is None else s.full for m, s in zip(mean, seen, strict=True)], [v if s.full is None else 0.0 for v, s in zip(sd, seen, strict=True)]

    def drop(self, seen: Seen, row: CandidateRow) -> float:
        """What a row is believed to lose to the student in float: the mean of what its scheme lost in its family."""
        if _float(row):
            return 0.0
        found = [d for s in self.seen.values() if s.facts.family == seen.facts.family for i, d in s.drops.items() if s.rows[i].scheme == row.scheme]
        return (sum(found) + DROP) / (len(found) + 1)

    def guesses(self) -> dict[str, latencies.Guess]:
        """Latencies of all candidates, from those measured."""
        points = [latencies.Point(r.id, s.facts.family, f"{r.format} {r.scheme}", s.facts.gmacs, s.pair[1]) for s in self.seen.values() for r in s.rows.values()]
        return latencies.guess(points, {r.id: r.latency_ms.p50 for s in self.seen.values() for r in s.rows.values() if r.latency_ms and r.latency_ms.n}, self.told)

    def planned(self) -> list[CandidateRow]:
        """Every candidate with its latency, measured or else predicted, and those rejected that no training can bring within the budget."""
        guesses = self.guesses()
        rows = [r if r.latency_ms or r.trained or r.id not in guesses else r.model_copy(update={"latency_ms": guesses[r.id].latency})
                for s in self.seen.values() for r in s.rows.values()]
        verdicts = {r.id: r for r in plan_verdicts([r for r in rows if not r.trained], self.budget)}
        return [verdicts.get(r.id, r) for r in rows]

    def hoped(self, planned: Sequence[CandidateRow]) -> list[CandidateRow]:
        """The rows as they may turn out to be, if all goes well; those of students that are not to go on are left out."""
        mean, sd = self.beliefs()
        best = {s.pair: m + HOPE * d for s, m, d in zip(self.seen.values(), mean, sd, strict=True)}
        full = len(self.climbed("short")) >= self.section.max_short
        found = []
        for row in planned:
            seen = self.seen[row.student, row.image_size]
            if seen.trained:
                found.append(_certain(row))
            elif seen.short is not None or not full:
                value = min(1.0, max(0.0, best[seen.pair] - self.drop(seen, row)))
                found.append(_certain(row.model_copy(update={"accuracy": _accuracy(self.budget.metric, value)})) if row.status == "accepted" else row)
        return found

    def climbed(self, rung: Rung) -> set[Pair]:
        return {s.pair for s in self.steps if s.rung == rung}

    # --- one step

    def look(self, pairs: Iterable[Pair]) -> None:
        """Take students into account."""
        for pair in pairs:
            if pair not in self.seen:
                self.seen[pair] = Seen(pair, self.evaluator.facts(pair), {r.id: r for r in self.evaluator.rows(pair)})
                told, seconds = self.evaluator.predict(list(self.seen[pair].rows.values()))
                self.told.update(told)
                self.done("predict", pair, seconds, "proposed")

    def done(self, rung: Rung, pair: Pair, seconds: float, reason: str) -> None:
        self.steps.append(Step(rung, pair, seconds, reason))
        if rung != "predict":
            self.say(f"{rung} {pair[0]}-{pair[1]}: {reason}")

    def step(self, *, last: bool = True, most_short: int | None = None) -> str | None:
        """Move whom the decision picks up one rung; or say why there is nothing to do.

        Args:
            last: whether students may be fully trained.
            most_short: short distillations until the next students are proposed.
        """
        planned = self.planned()
        hoped = self.hoped(planned)
        # An accuracy that must be reached is one of full training, of which nothing is known before the first.
        budget = self.budget if any(s.trained for s in self.seen.values()) else self.budget.model_copy(update={"min_accuracy": None, "max_drop": None})
        judged = judge(hoped, budget, self.teacher_accuracy, teacher_ms=self.teacher_ms)
        decision = choose(judged, budget, self.teacher_accuracy)
        if decision.chosen is None:
            return self.nearest(planned, decision.nearest.id if decision.nearest else None, decision.reason)
        row = next(r for r in judged if r.id == decision.chosen)
        seen = self.seen[row.student, row.image_size]
        if seen.trained:
            return f"{row.id} is trained, and nothing that is left is likely to be better"
        worth = (accuracy(row, budget.metric) or 0.0) - RULES.same_accuracy
        accepted = {r.id for r in judged if r.status == "accepted" and (accuracy(r, budget.metric) or 0.0) >= worth}
        fits = [r for r in planned if r.id in accepted and (r.student, r.image_size) == seen.pair]
        rung = self.next_rung(seen, fits)
        if rung == "full" and len(self.climbed("full")) >= self.section.max_trained:
            return f"{self.section.max_trained} students are trained, as many as the recipe allows"
        if (rung == "full" and not last) or (rung == "short" and most_short is not None and len(self.climbed("short")) >= most_short):
            return "more students are to be proposed first"
        if rung == "measure" and not self.guesses():
            self.first_look()
            return None
        best_foretold = min(fits, key=lambda r: (self.doubt(r), r.id))
        self.climb(seen, rung, [best_foretold], f"{accuracy(row, budget.metric) or 0.0:.3f} may be hoped for")
        return None

    def first_look(self) -> None:
        """How fast the device is, is learned from every candidate of the student with the median of work: the least far from all others."""
        there = sorted((s for s in self.seen.values() if not self.asked & set(s.rows)), key=lambda s: (s.facts.gmacs, s.pair))
        seen = there[len(there) // 2]
        self.climb(seen, "measure", list(seen.rows.values()), "a first look at the device")

    def doubt(self, row: CandidateRow) -> float:
        """Standard deviation of what is foretold of a candidate's latency."""
        found = self.guesses().get(row.id)
        return math.inf if found is None else found.sd

    def next_rung(self, seen: Seen, fits: Sequence[CandidateRow]) -> Rung:
        """The cheapest that says something new. Nothing is trained before one candidate was measured within the budget, or is foretold to be:
        in nine cases of ten for a short training, in ninety-nine of a hundred for a full one."""
        rung: Rung = "full" if seen.short is not None else "short" if seen.scored or self.useless() else "score"
        if self.evaluator.measures and not any(r.id in self.asked or self.keeps(r, sure=rung == "full") for r in fits):
            return "measure"
        return rung

    def keeps(self, row: CandidateRow, *, sure: bool) -> bool:
        """Whether a latency keeps to the budget even at the slow end of what is foretold, and nothing else is limited, which only a measurement
        tells."""
        found, latency = limits(self.budget), row.latency_ms
        return latency is not None and all(limit.field == "latency_ms" for limit in found) and \
            (not found or self.over(row.model_copy(update={"latency_ms": _exactly(latency.p99 if sure else latency.p90)})) <= 0)

    def useless(self) -> bool:
        """Whether the training-free score turned out to order students at random."""
        both = [(s.score, s.short) for s in self.seen.values() if s.score is not None and s.short is not None]
        rho = estimate.rank_correlation([a for a, _ in both], [b for _, b in both])
        return len(both) >= ENOUGH and abs(estimate.trust(rho, len(both), CLUES["score"])) < USELESS

    def climb(self, seen: Seen, rung: Rung, rows: Sequence[CandidateRow], reason: str) -> None:
        """Ask the evaluator and keep the answer; `rows` are those to measure."""
        if rung == "measure":
            before = self.guesses()
            self.asked |= {r.id for r in rows}
            found, seconds = self.evaluator.measure([seen.rows[r.id] for r in rows])
            seen.rows.update({r.id: r for r in found})
            self.foretold += [(math.exp(before[r.id].mean), r.latency_ms.p50) for r in found if r.id in before and r.latency_ms]
        elif rung == "score":
            seen.score, seconds = self.evaluator.score(seen.pair)
            seen.scored = True
        else:
            seconds = self.train(seen, self.section.share if rung == "short" else 1.0)
        self.done(rung, seen.pair, seconds, reason)

    def train(self, seen: Seen, share: float) -> float:
        """Train a student; its accuracy in float, and what its other precisions lose. Without any float candidate the best stands for it."""
        found, seconds = self.evaluator.train(seen.pair, list(seen.rows.values()), share)
        values = {r.id: v for r in found if (v := accuracy(r, self.budget.metric)) is not None}
        value = max([v for i, v in values.items() if _float(seen.rows[i])] or values.values(), default=0.0)
        if share < 1:
            seen.short = value
        else:
            seen.full, seen.trained = value, True
            seen.rows.update({r.id: r for r in found})
            seen.drops.update({i: value - v for i, v in values.items() if not _float(seen.rows[i])})
        return seconds

    def nearest(self, planned: Sequence[CandidateRow], id: str | None, reason: str) -> str | None:
        """Nothing may be hoped for. If that is only predicted of the candidate that comes nearest, it is measured."""
        row = next((r for r in planned if r.id == id), None)
        if row is None or not self.evaluator.measures or id in self.asked:
            return reason
        seen = self.seen[row.student, row.image_size]
        self.climb(seen, "measure", [row], "the nearest to the budget, by prediction")
        return None

    # --- the whole

    def run(self, sampler: Sampler) -> Outcome:
        """Propose, climb, tell what came of it, propose again; the last students climb to the top."""
        waves = 1 if sampler.count <= self.section.trials else WAVES
        reason = ""
        for wave in range(waves):
            self.look(sampler.propose(math.ceil(self.section.trials * (wave + 1) / waves) - len(self.seen)))
            last = wave + 1 == waves
            most = None if last else math.ceil(self.section.max_short * (wave + 1) / (waves + 1))
            while (stopped := self.step(last=last, most_short=most)) is None:
                pass
            reason = stopped
            sampler.tell(self.values())
        return Outcome(self.planned(), self.steps, self.correlations(), reason)

    def values(self) -> dict[Pair, tuple[list[float], float]]:
        """Of every student, as far as it is known: accuracy, the fastest candidate's milliseconds (negated), parameters where size is limited
        (negated); and by how much of a limit the best of its candidates misses the budget."""
        mean, _ = self.beliefs()
        found: dict[Pair, tuple[list[float], float]] = {}
        planned = self.planned()
        for value, seen in zip(mean, self.seen.values(), strict=True):
            own = [r for r in planned if (r.student, r.image_size) == seen.pair]
            ms = min((r.latency_ms.p50 for r in own if r.latency_ms), default=0.0)
            small = [-seen.facts.params / 1e6] if self.budget.size_mb is not None or self.budget.memory_mb is not None else []
            found[seen.pair] = ([value, -ms, *small], min((self.over(r) for r in own), default=0.0))
        return found

    def over(self, row: CandidateRow) -> float:
        """The worst share by which a row is beyond a ceiling; below 0 when it is within all of them."""
        shares = [value / limit.bound - 1 for limit in limits(self.budget) if (value := limit.of(row)) is not None and not limit.floor]
        return 1.0 if row.status == "failed" else max(shares, default=0.0)

    def correlations(self) -> dict[str, dict[str, float | int | None]]:
        """How well each cheaper rung ordered students for the next, as far as both were seen: Spearman's, and the number of students."""
        seen = list(self.seen.values())
        clues: dict[str, list[float | None]] = {"parameters": [s.facts.params for s in seen], "work": [s.facts.gmacs for s in seen],
                                                "size": [float(s.pair[1]) for s in seen], "score": [s.score for s in seen]}
        pairs = {f"{name} -> short": [(a, s.short) for a, s in zip(values, seen, strict=True)] for name, values in clues.items()}
        pairs["short -> full"] = [(s.short, s.full) for s in seen]
        pairs["predict -> measure"] = [(a, b) for a, b in self.foretold]
        both = {name: [(a, b) for a, b in found if a is not None and b is not None] for name, found in pairs.items()}
        return {name: {"rho": estimate.rank_correlation([a for a, _ in found], [b for _, b in found]), "n": len(found)} for name, found in both.items()}


def _float(row: CandidateRow) -> bool:
    return schemes.parse(row.scheme).scheme.name in schemes.FLOATS


def _certain(row: CandidateRow) -> CandidateRow:
    """The row with a predicted latency taken for one that was measured, at the good end of what it may be."""
    latency = row.latency_ms
    if latency is None or latency.provenance == "measured":
        return row
    return row.model_copy(update={"latency_ms": _exactly(min(latency.min, latency.p50 / (1 + RULES.predicted_slack)))})


def _exactly(ms: float) -> Latency:
    return Latency(p50=ms, p90=ms, p99=ms, mean=ms, min=ms, n=1)


def _accuracy(metric: str, value: float) -> Accuracy:
    """An accuracy of which one metric is known."""
    head, _, tail = metric.partition(".")
    return Accuracy.model_validate({head: {tail: value} if tail else value})
