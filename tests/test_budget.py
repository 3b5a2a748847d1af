"""The limits of a budget: what each holds to what, in which words, and what would have to give."""
from __future__ import annotations

import pytest
from pydantic import ValidationError
from report_sample import row

from edgekd.budget import gap, give, latency_ceiling, limited, limits, over
from edgekd.decision import choose, judge, objective
from edgekd.measurement import Latency
from edgekd.recipe import Budget
from edgekd.report.schema import CandidateRow, ComponentRow


def latency(p50: float, p90: float | None = None, low: float | None = None, provenance: str = "measured") -> Latency:
    return Latency(p50=p50, p90=p90 or p50, p99=p90 or p50, mean=p50, min=low or p50, n=10 if provenance == "measured" else 0, provenance=provenance)  # type: ignore[arg-type]


def with_(one: CandidateRow, **fields: object) -> CandidateRow:
    return one.model_copy(update=fields)


def test_latency_ceiling__is_the_stricter_of_ms_and_fps() -> None:
    assert latency_ceiling(Budget()) is None
    assert latency_ceiling(Budget(fps=50)) == 20
    assert latency_ceiling(Budget(fps=50, latency_ms=15)) == 15
    assert latency_ceiling(Budget(fps=100, latency_ms=15)) == 10


@pytest.mark.parametrize(("budget", "fields", "said"), [
    (Budget(latency_ms=5), {"latency_ms": latency(6)}, "6.00 ms is over the budget of 5 ms by 1.00 ms"),
    (Budget(fps=100), {"latency_ms": latency(12)}, "12.0 ms is over the budget of 10 ms by 2.00 ms"),
    (Budget(latency_ms=5, percentile="p90"), {"latency_ms": latency(4, 7)}, "7.00 ms is over the budget of 5 ms by 2.00 ms"),
    (Budget(components={"decoder": 2}), {"components": {"decoder": ComponentRow(latency_ms=latency(3))}}, "decoder 3.00 ms is over the budget of 2 ms by 1.00 ms"),
    (Budget(everything_ms=100), {"everything_ms": latency(150)}, "segment everything 150 ms is over the budget of 100 ms by 50.0 ms"),
    (Budget(size_mb=1), {"size_bytes": 2_500_000}, "size 2.5 MB is over the budget of 1 MB by 1.5 MB"),
    (Budget(memory_mb=100), {"peak_memory_bytes": 130_000_000}, "peak memory 130.0 MB is over the budget of 100 MB by 30 MB"),
    (Budget(energy_mj=5), {"energy_mj": 8.0}, "energy 8.0 mJ is over the budget of 5 mJ by 3 mJ"),
])
def test_every_limit__is_told_with_its_gap(budget: Budget, fields: dict[str, object], said: str) -> None:
    one = with_(row(), **fields)
    assert over(one, limits(budget)) == [said]
    assert judge([one], budget)[0].status == "rejected"
    missed = gap(one, limits(budget))
    assert missed is not None and len(missed.by) == 1 and missed.relative > 0


def test_what_is_not_known__says_nothing_but_leaves_the_verdict_open() -> None:
    one = row()
    budget = Budget(energy_mj=5, latency_ms=1000)
    assert over(one, limits(budget)) == []
    found = choose(judge([one], budget), budget)
    assert found.verdict == "unverified" and "energy could not be measured" in found.reason


def test_a_predicted_latency__misses_only_with_its_whole_interval() -> None:
    near, far = with_(row(), latency_ms=latency(12, low=9, provenance="predicted")), with_(row(), latency_ms=latency(30, low=20, provenance="predicted"))
    assert over(near, limits(Budget(latency_ms=10)), slack=0.25) == []
    assert over(far, limits(Budget(latency_ms=10)), slack=0.25) == ["30.0 ms (predicted) is over the budget of 10 ms by 20.0 ms"]


def test_give__names_the_least_that_each_limit_alone_must_be_loosened() -> None:
    fast, good = row("a-256-onnx-fp32", took=5.0, box=0.6), row("b-256-onnx-fp32", took=20.0, box=0.9)
    budget = Budget(latency_ms=10, min_accuracy=0.8)
    found = choose(judge([fast, good], budget), budget)
    assert found.verdict == "missed" and found.nearest is not None
    assert found.nearest.give == ["latency 20.0 ms instead of 10 ms: b-256-onnx-fp32", "box agreement with the teacher 0.600 instead of 0.8: a-256-onnx-fp32"]
    assert give([fast], limits(Budget(latency_ms=1, size_mb=0.001), None)) == []  # no single limit helps


def test_objectives__choose_differently() -> None:
    rows = [row("a-256-onnx-fp32", took=4.0, box=0.80), row("b-256-onnx-fp32", took=9.0, box=0.905), row("c-256-onnx-fp32", took=19.0, box=0.92)]
    took = {o: choose(judge(rows, b), b).chosen for o in ("fastest", "most-accurate", "balanced") for b in [Budget(latency_ms=20, objective=o)]}  # type: ignore[arg-type]
    assert took == {"fastest": "a-256-onnx-fp32", "most-accurate": "c-256-onnx-fp32", "balanced": "b-256-onnx-fp32"}
    assert objective(Budget()) == "balanced" and objective(Budget(fps=3)) == "most-accurate"


def test_the_percentile__decides_who_is_fastest() -> None:
    rows = [with_(row("a-256-onnx-fp32"), latency_ms=latency(4, 12)), with_(row("b-256-onnx-fp32"), latency_ms=latency(5, 6))]
    assert choose(rows, Budget(objective="fastest")).chosen == "a-256-onnx-fp32"
    assert choose(rows, Budget(objective="fastest", percentile="p90")).chosen == "b-256-onnx-fp32"


@pytest.mark.parametrize("wrong", [{"fps": 0}, {"components": {"decoder": -1}}, {"percentile": "p95"}, {"objective": "cheapest"}, {"prompts": 0}])
def test_wrong_limits__are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Budget(**wrong)  # type: ignore[arg-type]


def test_limited__by_anything_that_needs_no_training() -> None:
    assert not limited(Budget()) and not limited(Budget(min_accuracy=0.5))
    assert all(limited(Budget(**b)) for b in ({"fps": 1}, {"components": {"encoder": 1}}, {"energy_mj": 1}, {"everything_ms": 1}, {"size_mb": 1}))  # type: ignore[arg-type]
