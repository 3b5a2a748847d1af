"""The search in small worlds: it finds what is best there, trains nothing that cannot fit, trusts no useless clue, and goes on where it was stopped."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from search_world import COST, KINDS, Everyone, World, picked, search, world

from edgekd.ledger import Ledger
from edgekd.recipe import Budget
from edgekd.search.explore import CLUES, Explorer
from edgekd.search_section import SearchSection
from edgekd.workspace import fingerprint

SECTION = SearchSection(strategy="explore", trials=24, max_trained=3, max_short=8)


def regret(found: World, budget_ms: float) -> tuple[float, float]:
    """What the pick lacks to the best there is, and the share of the exhaustive cost."""
    outcome = search(found, budget_ms=budget_ms)
    row, best = picked(outcome, budget_ms), found.best(budget_ms)
    value = row.accuracy.value("teacher_agreement.box") if row and row.accuracy else 0.0
    total = len(found.students) * (COST["full"] + COST["measure"] * len(KINDS))
    return ((best - (value or 0.0)) / best if best else 0.0), outcome.seconds / total


# --- what it finds


@pytest.mark.parametrize("budget_ms", [4.0, 8.0, 15.0, 40.0])
def test_search__finds_the_best_where_cheap_evidence_is_good(budget_ms: float) -> None:
    found = [regret(world(seed, short=1.0, score=0.8), budget_ms) for seed in range(4)]
    assert np.mean([r for r, _ in found]) <= 0.02 and max(c for _, c in found) < 0.25


def test_search__beats_random_training_at_equal_cost() -> None:
    ours, chance = [], []
    for seed in range(6):
        found = world(seed)
        outcome = search(found, budget_ms=15.0)
        row, best = picked(outcome, 15.0), found.best(15.0)
        assert row is not None and row.accuracy is not None
        ours.append((best - (row.accuracy.value("teacher_agreement.box") or 0.0)) / best)
        able = [p for p, one in found.students.items() if one["ms"] * 0.6 <= 15.0]
        for k in range(50):
            drawn = [able[i] for i in np.random.default_rng(k).permutation(len(able))[: max(1, int(outcome.seconds / COST["full"]))]]
            chance.append((best - World({p: found.students[p] for p in drawn}).best(15.0)) / best)
    assert np.mean(ours) < 0.5 * np.mean(chance)


def test_search__is_the_same_every_time_and_in_any_order() -> None:
    a, b = (search(world(3), budget_ms=12.0) for _ in range(2))
    assert a == b
    turned = world(3)
    turned.students = dict(reversed(turned.students.items()))
    c = search(turned, budget_ms=12.0)
    assert c.climbed("full") == a.climbed("full") and c.climbed("short") == a.climbed("short")


# --- constraints


def test_search__trains_nothing_that_cannot_fit() -> None:
    for seed in range(5):
        found = world(seed)
        outcome = search(found, budget_ms=6.0)
        for pair in {*outcome.climbed("short"), *outcome.climbed("full")}:
            assert found.students[pair]["ms"] * 0.6 <= 6.0


def test_search__an_infeasible_budget_trains_nothing_and_has_measured_the_nearest() -> None:
    found = world(0)
    outcome = search(found, budget_ms=0.5)
    assert {what for what, _ in found.asked} == {"measure"} and picked(outcome, 0.5) is None
    assert not outcome.climbed("score") and not any(r.trained for r in outcome.rows)
    nearest = min((r for r in outcome.rows if r.latency_ms), key=lambda r: r.latency_ms.p50 if r.latency_ms else 0.0)
    assert nearest.latency_ms and nearest.latency_ms.provenance == "measured" and "nearest" in outcome.reason


def test_search__size_is_a_limit_too() -> None:
    found = world(1)
    outcome = search(found, budget_ms=None, size_mb=2.0)
    row = picked(outcome, None, size_mb=2.0)
    assert row is not None and row.size_bytes is not None and row.size_bytes <= 2e6
    for pair in outcome.climbed("short"):
        assert found.students[pair]["params"] <= 2e6, "no file of it is small enough, not even in int8"


def test_search__a_floor_of_accuracy_is_one_of_full_training() -> None:
    found = world(2)
    best = found.best(15.0)
    assert picked(search(found, budget_ms=15.0, min_accuracy=round(best - 0.05, 3)), 15.0, min_accuracy=round(best - 0.05, 3)) is not None
    outcome = search(found, budget_ms=15.0, min_accuracy=0.999)
    assert picked(outcome, 15.0, min_accuracy=0.999) is None and len(outcome.climbed("full")) <= SECTION.max_trained


def test_search__without_a_latency_budget_takes_the_fastest_that_is_nearly_as_good() -> None:
    found = world(4, short=1.0)
    outcome = search(found, budget_ms=None)
    row = picked(outcome, None)
    assert row is not None and row.latency_ms is not None and len(outcome.climbed("full")) >= 1
    best = max(found.students[p]["full"] for p in outcome.climbed("full"))
    assert (row.accuracy.value("teacher_agreement.box") if row.accuracy else None) == pytest.approx(best, abs=0.021)


def test_search__a_candidate_that_cannot_be_built_is_passed_over() -> None:
    found = world(0)
    best = max((p for p in found.students), key=lambda p: found.students[p]["full"] if found.students[p]["ms"] * 0.8 <= 15 else 0)
    found.fails = frozenset(f"{best[0]}-{best[1]}-{format}-{scheme}" for format, scheme in KINDS)
    outcome = search(found, budget_ms=15.0)
    row = picked(outcome, 15.0)
    assert row is not None and (row.student, row.image_size) != best


def test_search__a_device_out_of_reach_measures_nothing() -> None:
    found = world(0)
    found.measures = False
    outcome = search(found, budget_ms=15.0)
    assert "measure" not in {what for what, _ in found.asked} and len(outcome.climbed("full")) >= 1


def test_search__keeps_to_what_the_recipe_allows() -> None:
    found = world(5, short=0.3)
    section = SearchSection(strategy="explore", trials=10, max_trained=2, max_short=4)
    outcome = search(found, budget_ms=40.0, section=section)
    assert len(outcome.climbed("predict")) <= 10 and len(outcome.climbed("short")) <= 4 and len(outcome.climbed("full")) <= 2


# --- rungs and trust


def test_rungs__each_student_climbs_in_order_and_pays_for_it() -> None:
    found = world(1)
    outcome = search(found, budget_ms=15.0)
    order = ["predict", "measure", "score", "short", "full"]
    for pair in found.students:
        climbed = [s.rung for s in outcome.steps if s.pair == pair]
        assert climbed == sorted(climbed, key=order.index) and climbed.count("short") <= 1 and climbed.count("full") <= 1
        assert "full" not in climbed or "short" in climbed
    asked = [(what, len(of) if what == "measure" else 1) for what, of in found.asked]
    assert outcome.seconds == pytest.approx(sum(COST[what] * n for what, n in asked)), "every answer is paid for, once"


def test_trust__a_useless_score_is_asked_no_more() -> None:
    def left_out(score: float) -> int:
        """Students that were trained for a share without having been scored."""
        section = SearchSection(strategy="explore", trials=30, max_short=20, max_trained=3)
        found = [search(world(seed, score=score, count=30), budget_ms=40.0, section=section) for seed in range(5)]
        assert all(len(o.climbed("score")) >= 6 for o in found), "before that nobody knows"
        return sum(len({*o.climbed("short")} - {*o.climbed("score")}) for o in found)

    assert left_out(0.95) < left_out(0.0)


def test_trust__a_useless_score_does_no_harm() -> None:
    def mean(score: float) -> float:
        return float(np.mean([regret(world(seed, score=score, short=1.0), 15.0)[0] for seed in range(6)]))

    assert mean(0.0) <= mean(0.9) + 0.01


def test_correlations__say_how_well_each_rung_ordered() -> None:
    outcome = search(world(0, short=1.0), budget_ms=40.0)
    found = outcome.correlations
    assert set(found) == {*(f"{clue} -> short" for clue in CLUES), "short -> full", "predict -> measure"}
    assert found["score -> short"]["n"] == len({*outcome.climbed("score")} & {*outcome.climbed("short")}) > 3
    for one in found.values():
        assert one["rho"] is None or -1 <= one["rho"] <= 1


def test_values__what_a_sampler_is_told() -> None:
    found, sampler = world(0), None
    sampler = Everyone(found)
    search(found, budget_ms=6.0, sampler=sampler)
    assert set(sampler.told) == set(found.students)
    for pair, ((value, cost), over) in sampler.told.items():
        assert 0 < value < 1.2 and cost < 0
        if (found.students[pair]["ms"] * 0.6 > 6.0 * 1.6) or (found.students[pair]["ms"] < 4.0):
            assert (over > 0) == (found.students[pair]["ms"] * 0.6 > 6.0), "the budget is a constraint of the study"


# --- stopping and going on


class Stopped(Exception):
    """As if killed."""


class Remembering(World):
    """A world that writes its answers into a ledger, as a run does."""

    ledger: Ledger

    def through(self, what: str, key: Any, work: Callable[[], Any]) -> Any:
        return self.ledger.once(what, str(key), fingerprint([what, key]), lambda: {"answer": work()})["answer"]

    def measure(self, rows: Any) -> Any:
        def work() -> Any:
            found, seconds = World.measure(self, rows)
            return [r.model_dump(mode="json") for r in found], seconds

        found, seconds = self.through("measure", [r.id for r in rows], work)
        return [type(rows[0]).model_validate(r) for r in found], seconds

    def score(self, pair: Any) -> Any:
        return tuple(self.through("score", pair, lambda: World.score(self, pair)))

    def train(self, pair: Any, rows: Any, share: float) -> Any:
        def work() -> Any:
            found, seconds = World.train(self, pair, rows, share)
            return [r.model_dump(mode="json") for r in found], seconds

        found, seconds = self.through("short" if share < 1 else "full", pair, work)
        return [type(rows[0]).model_validate(r) for r in found], seconds


@pytest.mark.parametrize("rung", ["measure", "score", "short", "full"])
@pytest.mark.parametrize("nth", [1, 2])
def test_stopped__at_any_rung_it_goes_on_to_the_same_end(rung: str, nth: int, tmp_path: Path) -> None:
    whole = search(world(7), budget_ms=15.0)
    assert len(whole.climbed(rung)) >= nth  # type: ignore[arg-type]
    found = Remembering(world(7).students)
    found.ledger = Ledger(tmp_path / "ledger.jsonl")
    count = 0

    def kill(what: str) -> None:
        nonlocal count
        count += what == rung
        if what == rung and count == nth:
            raise Stopped

    found.before = kill
    with pytest.raises(Stopped):
        search(found, budget_ms=15.0)
    done = len(found.asked)
    found.ledger, found.before = Ledger(tmp_path / "ledger.jsonl"), lambda _: None
    again = search(found, budget_ms=15.0)
    assert again == whole, "rows, steps, seconds and reason"
    assert len(found.asked) == len({json.dumps(a, default=str) for a in found.asked}), "nothing is asked twice"
    assert done < len(found.asked)


def test_explorer__stops_when_there_is_nothing() -> None:
    found = World({})
    outcome = Explorer(found, Budget(latency_ms=5), SECTION).run(Everyone(found))
    assert outcome.rows == [] and outcome.seconds == 0
