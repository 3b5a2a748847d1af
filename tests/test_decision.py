"""The decision, rule by rule, then its properties over seeded random spaces."""
from __future__ import annotations

import random
import re

import pytest
import report_sample as sample
from report_sample import row

from edgekd.budget import ms
from edgekd.decision import RULES, Rules, choose, floor, judge, next_action, plan_verdicts, words
from edgekd.report.schema import BudgetRow, CandidateRow, ComponentRow

NONE = BudgetRow()


def judged(*rows: CandidateRow, budget: BudgetRow = NONE, **more: object) -> dict[str, CandidateRow]:
    return {r.id: r for r in judge(rows, budget, **more)}  # type: ignore[arg-type]


# --- judge: each rule alone ---------------------------------------------------------------------------------------------


def test_judge__accepts_what_nothing_speaks_against() -> None:
    found = judged(row())["m-256-onnx-fp32"]
    assert (found.status, found.reason, found.stage) == ("accepted", "", None)


def test_judge__rejects_slower_than_float_parent_with_both_numbers() -> None:
    found = judged(row(took=3.9), row("m-256-onnx-w8a8_static", took=6.1))["m-256-onnx-w8a8_static"]
    assert found.status == "rejected" and found.stage == "profile"
    assert found.reason == "w8a8_static took 6.10 ms, its fp32 parent 3.90 ms (1.56x slower)"


@pytest.mark.parametrize(("took", "status"), [(3.0, "accepted"), (3.79, "accepted"), (3.81, "rejected"), (4.0, "rejected"), (9.0, "rejected")])
def test_judge__a_reduced_precision_must_be_faster(took: float, status: str) -> None:
    assert judged(row(took=4.0), row("m-256-onnx-w8_dynamic", took=took))["m-256-onnx-w8_dynamic"].status == status


def test_judge__a_size_budget_is_a_reason_for_a_precision_that_is_no_faster() -> None:
    rows = [row(took=4.0), row("m-256-onnx-w8_dynamic", took=4.0)]
    assert judged(*rows)["m-256-onnx-w8_dynamic"].reason.endswith("(no faster: 5% is asked)")
    assert judged(*rows, budget=BudgetRow(size_mb=100.0))["m-256-onnx-w8_dynamic"].status == "accepted"


def test_judge__parent_is_of_same_student_size_and_format() -> None:
    others = [row("m-256-openvino-fp32", took=1.0), row("m-224-onnx-fp32", took=1.0), row("n-256-onnx-fp32", took=1.0)]
    assert judged(*others, row("m-256-onnx-bf16", took=9.0))["m-256-onnx-bf16"].status == "accepted"


def test_judge__parent_counts_even_when_it_was_rejected_itself() -> None:
    found = judged(row(took=4.0, box=0.5), row("m-256-onnx-bf16", took=8.0), budget=BudgetRow(min_accuracy=0.8))
    assert found["m-256-onnx-fp32"].status == "rejected" and "2.00x slower" in found["m-256-onnx-bf16"].reason


def test_judge__does_not_hold_measured_against_predicted() -> None:
    found = judged(row(took=1.0, provenance="predicted"), row("m-256-onnx-bf16", took=9.0))
    assert found["m-256-onnx-bf16"].status == "accepted"


def test_judge__rejects_what_is_no_faster_than_the_teacher() -> None:
    found = judged(row(took=50.0), teacher_ms=48.7)["m-256-onnx-fp32"]
    assert found.status == "rejected" and "no faster than the teacher's 48.7 ms" in found.reason


def test_judge__rejects_silent_fallback_and_quotes_the_note() -> None:
    quiet = row("m-256-openvino-bf16", executed="fp32", components={"encoder": ComponentRow(executed_precision="fp32", note="no bf16 on this CPU")})
    found = judged(quiet)["m-256-openvino-bf16"]
    assert found.reason == "asked for bf16, the runtime executed fp32 (no bf16 on this CPU)"


@pytest.mark.parametrize(("scheme", "encoder", "decoder", "status"), [
    ("bf16", "bf16", "bf16", "accepted"), ("w8a8_static", "int8", "fp32", "accepted"), ("w8a8_static", "fp32", "fp32", "rejected"),
    ("w8_weight_only", "fp32", "fp32", "accepted"), ("fp32", "fp32", "fp32", "accepted"), ("w8_dynamic", None, None, "accepted")])
def test_judge__fallback_means_all_parts_in_fp32(scheme: str, encoder: str | None, decoder: str | None, status: str) -> None:
    parts = {"encoder": ComponentRow(executed_precision=encoder), "decoder": ComponentRow(executed_precision=decoder)}
    assert judged(row(f"m-256-onnx-{scheme}", components=parts))[f"m-256-onnx-{scheme}"].status == status


def test_judge__rejects_accuracy_lost_to_parent() -> None:
    found = judged(row(box=0.90), row("m-256-onnx-w8a8_static", took=2.0, box=0.85))["m-256-onnx-w8a8_static"]
    assert found.stage == "evaluate" and found.reason == \
        "w8a8_static lost 0.050 to its fp32 parent in box agreement with the teacher (0.900 to 0.850, 0.02 is allowed)"


def test_judge__accepts_a_small_loss_and_any_gain() -> None:
    found = judged(row(box=0.90), row("m-256-onnx-bf16", took=1.0, box=0.885), row("m-256-onnx-w8_dynamic", took=1.0, box=0.95))
    assert all(r.status == "accepted" for r in found.values())


@pytest.mark.parametrize(("budget", "says"), [
    (BudgetRow(latency_ms=3), "4.00 ms is over the budget of 3 ms by 1.00 ms"), (BudgetRow(size_mb=15), "size 20.0 MB is over the budget of 15 MB by 5 MB"),
    (BudgetRow(memory_mb=100), "peak memory 120.0 MB is over the budget of 100 MB by 20 MB"),
    (BudgetRow(min_accuracy=0.95), "box agreement with the teacher 0.900 is below the floor of 0.950 by 0.050"),
    (BudgetRow(max_drop=0.05), "below the floor of 0.950"), (BudgetRow(metric="box_miou", min_accuracy=0.85), "box mIoU 0.800 is below the floor of 0.850")])
def test_judge__over_budget_says_by_how_much(budget: BudgetRow, says: str) -> None:
    found = judged(row(memory=120), budget=budget)["m-256-onnx-fp32"]
    assert found.status == "rejected" and says in found.reason


@pytest.mark.parametrize("budget", [BudgetRow(latency_ms=4), BudgetRow(size_mb=20), BudgetRow(memory_mb=120), BudgetRow(min_accuracy=0.9)])
def test_judge__a_limit_that_is_met_exactly_is_met(budget: BudgetRow) -> None:
    assert judged(row(memory=120), budget=budget)["m-256-onnx-fp32"].status == "accepted"


def test_judge__names_every_reason() -> None:
    found = judged(row(took=4.0, box=0.9), row("m-256-onnx-w8a8_static", took=8.0, box=0.5), budget=BudgetRow(latency_ms=5, min_accuracy=0.8))
    reason = found["m-256-onnx-w8a8_static"].reason
    assert len(reason.split("; ")) == 4 and all(w in reason for w in ("slower", "over the budget", "lost", "below the floor"))


def test_judge__untrained_is_rejected_as_such() -> None:
    found = judged(row(box=None, trained=False))["m-256-onnx-fp32"]
    assert found.stage == "train" and found.reason.startswith("not trained")


def test_judge__untrained_and_over_budget_says_the_budget() -> None:
    found = judged(row(box=None, trained=False), budget=BudgetRow(latency_ms=1))["m-256-onnx-fp32"]
    assert found.stage == "profile" and "over the budget" in found.reason and "not trained" not in found.reason


def test_judge__trained_without_the_metric_is_rejected() -> None:
    found = judged(row(), budget=BudgetRow(metric="center_miou"))["m-256-onnx-fp32"]
    assert found.reason == "its one-click mIoU was not measured"


def test_judge__broken_parity_is_failure() -> None:
    found = judged(row(components={"encoder": ComponentRow(parity={"passed": False}), "decoder": ComponentRow(parity={"passed": True})}))["m-256-onnx-fp32"]
    assert (found.status, found.stage) == ("failed", "export") and found.reason == "encoder does not match the student it came from"


def test_judge__leaves_failed_and_rejected_rows_alone() -> None:
    failed = row().turned("failed", "no such operator", "export")
    assert judge([failed], BudgetRow(latency_ms=0.1)) == [failed]


def test_judge__changes_no_row_it_was_given_and_is_idempotent() -> None:
    rows = sample.rows()
    before = [r.model_copy(deep=True) for r in rows]
    budget = BudgetRow(latency_ms=8)
    once = judge(rows, budget)
    assert rows == before and judge(once, budget) == once


def test_judge__dominated_is_not_rejected() -> None:
    found = judged(row(took=4.0, box=0.9), row("n-256-onnx-fp32", took=9.0, box=0.8))
    assert found["n-256-onnx-fp32"].status == "accepted"


@pytest.mark.parametrize(("budget", "teacher", "expected"), [
    (NONE, None, None), (BudgetRow(min_accuracy=0.8), None, 0.8), (BudgetRow(max_drop=0.1), None, 0.9), (BudgetRow(max_drop=0.1, min_accuracy=0.95), None, 0.95),
    (BudgetRow(max_drop=0.1, metric="box_miou"), 0.75, 0.65), (BudgetRow(max_drop=0.1, metric="box_miou"), None, None)])
def test_floor__is_the_stricter_of_both(budget: BudgetRow, teacher: float | None, expected: float | None) -> None:
    assert floor(budget, teacher) == (None if expected is None else pytest.approx(expected))


# --- plan ---------------------------------------------------------------------------------------------------------------


def test_plan__rejects_before_training_with_numbers() -> None:
    fits, slow = plan_verdicts([row(box=None, trained=False), row("n-256-onnx-fp32", took=21.2, box=None, trained=False)], BudgetRow(latency_ms=8))
    assert fits.status == "accepted"
    assert (slow.status, slow.stage) == ("rejected", "plan") and slow.reason == "21.2 ms is over the budget of 8 ms by 13.2 ms (before training)"


def test_plan__size_counts_too() -> None:
    assert plan_verdicts([row(mb=40)], BudgetRow(size_mb=30))[0].stage == "plan"


@pytest.mark.parametrize(("took", "status"), [(9.0, "accepted"), (9.9, "accepted"), (10.1, "rejected")])
def test_plan__prediction_gets_slack(took: float, status: str) -> None:
    found = plan_verdicts([row(took=took, provenance="predicted", trained=False)], BudgetRow(latency_ms=8))[0]
    assert found.status == status and (status == "accepted" or "(predicted)" in found.reason)


def test_plan__without_latency_or_budget_nothing_is_rejected() -> None:
    rows = [row(took=None), row("n-256-onnx-fp32", took=1e6)]
    assert plan_verdicts(rows, NONE) == rows and plan_verdicts(rows[:1], BudgetRow(latency_ms=1)) == rows[:1]


# --- choose -------------------------------------------------------------------------------------------------------------


def test_choose__with_a_budget_the_most_accurate_within_it() -> None:
    rows = [row("a-256-onnx-fp32", 2.0, 0.85), row("b-256-onnx-fp32", 7.0, 0.90), row("c-256-onnx-fp32", 20.0, 0.95)]
    budget = BudgetRow(latency_ms=8)
    found = choose(judge(rows, budget), budget)
    assert (found.chosen, found.verdict, found.nearest) == ("b-256-onnx-fp32", "met", None)
    assert found.reason == "the most accurate of 2 candidates within 8 ms: b-256-onnx-fp32 has box agreement with the teacher 0.900 and takes 7.00 ms"


def test_choose__ties_go_to_the_faster_and_say_so() -> None:
    rows = [row("a-256-onnx-fp32", 7.0, 0.9010), row("b-256-onnx-fp32", 3.0, 0.9000)]
    found = choose(rows, BudgetRow(latency_ms=8))
    assert found.chosen == "b-256-onnx-fp32" and "within 0.002 of the best, 0.901, and faster" in found.reason


def test_choose__without_a_budget_the_fastest_near_the_best() -> None:
    rows = [row("a-256-onnx-fp32", 2.0, 0.80), row("b-256-onnx-fp32", 5.0, 0.885), row("c-256-onnx-fp32", 9.0, 0.90)]
    found = choose(rows, NONE)
    assert found.chosen == "b-256-onnx-fp32" and found.verdict == "met" and "within 0.02 of the best" in found.reason


def test_choose__a_size_budget_alone_leaves_the_balanced_rule() -> None:
    budget = BudgetRow(size_mb=25)
    rows = [row("a-256-onnx-fp32", 2.0, 0.89), row("b-256-onnx-fp32", 1.0, 0.90, mb=30)]
    assert choose(judge(rows, budget), budget).chosen == "a-256-onnx-fp32"


def test_choose__measured_comes_before_predicted() -> None:
    rows = [row("a-256-onnx-fp32", 2.0, 0.95, provenance="predicted"), row("b-256-onnx-fp32", 5.0, 0.85), row("c-256-onnx-fp32", None, 0.99)]
    found = choose(rows, BudgetRow(latency_ms=8))
    assert (found.chosen, found.verdict) == ("b-256-onnx-fp32", "met")


@pytest.mark.parametrize(("took", "provenance", "says"), [(5.0, "predicted", "its latency is predicted"), (5.0, "quoted", "quoted"), (None, "measured", "not known")])
def test_choose__unverified_unless_measured(took: float | None, provenance: str, says: str) -> None:
    found = choose([row(took=took, provenance=provenance)], NONE)
    assert found.verdict == "unverified" and found.chosen and says in found.reason


def test_choose__missed_gives_the_nearest_and_its_gap() -> None:
    budget = BudgetRow(latency_ms=3)
    found = choose(judge([row("a-256-onnx-fp32", 4.0), row("b-256-onnx-fp32", 3.5, 0.7), row("c-256-onnx-fp32", 30.0, 0.99)], budget), budget)
    assert (found.verdict, found.chosen) == ("missed", None) and found.nearest
    assert found.nearest.id == "b-256-onnx-fp32" and found.nearest.gap_ms == pytest.approx(0.5) and found.nearest.gap_accuracy is None
    assert found.reason == "no candidate meets the budget; the nearest, b-256-onnx-fp32, misses it by 0.5 ms"


def test_choose__a_tiny_budget_has_a_positive_gap() -> None:
    budget = BudgetRow(latency_ms=0.001)
    rows = plan_verdicts([row(trained=False, box=None)], budget)
    found = choose(judge(rows, budget), budget)
    assert found.nearest and found.nearest.gap_ms and found.nearest.gap_ms > 3.9


def test_choose__nearest_weighs_limits_by_their_size() -> None:
    budget = BudgetRow(latency_ms=10, min_accuracy=0.9)
    found = choose(judge([row("a-256-onnx-fp32", 8.0, 0.88), row("b-256-onnx-fp32", 15.0, 0.95)], budget), budget)
    assert found.nearest and found.nearest.id == "a-256-onnx-fp32"
    assert found.nearest.gap_accuracy == pytest.approx(0.02) and found.nearest.gap_ms is None


def test_choose__nearest_names_each_limit_missed() -> None:
    budget = BudgetRow(latency_ms=3, size_mb=10, memory_mb=100)
    found = choose(judge([row(memory=150)], budget), budget)
    assert found.nearest and (found.nearest.gap_ms, found.nearest.gap_mb, found.nearest.gap_memory_mb) == pytest.approx((1.0, 10.0, 50.0))
    assert "1.00 ms and 10 MB and 50 MB of memory" in found.reason


@pytest.mark.parametrize(("rows", "says"), [
    ([], "there was no candidate"), ([row().turned("failed", "no such operator", "export")], "could be built (no such operator)"),
    ([row().turned("rejected", "slower", "profile")], "none of them for the budget")])
def test_choose__says_when_there_is_nothing_near(rows: list[CandidateRow], says: str) -> None:
    found = choose(rows, NONE)
    assert (found.verdict, found.nearest) == ("missed", None) and says in found.reason


def test_choose__failed_rows_are_not_near() -> None:
    budget = BudgetRow(latency_ms=1)
    rows = judge([row("a-256-onnx-fp32", 1.1).turned("failed", "parity", "export"), row("b-256-onnx-fp32", 9.0)], budget)
    found = choose(rows, budget)
    assert found.nearest and found.nearest.id == "b-256-onnx-fp32"


# --- the loop -----------------------------------------------------------------------------------------------------------


def untrained(student: str, took: float | None, params: int, size: int = 256) -> CandidateRow:
    return row(f"{student}-{size}-onnx-fp32", took, None, trained=False, params=params)


def test_next__with_a_budget_the_largest_that_fits() -> None:
    rows = [untrained("small", 2.0, 1_000_000), untrained("big", 7.0, 5_000_000), untrained("huge", 30.0, 9_000_000)]
    found = next_action(rows, BudgetRow(latency_ms=8))
    assert (found.kind, found.student, found.image_size) == ("train", "big", 256) and "8 ms" in found.reason


def test_next__without_a_budget_the_fastest_first() -> None:
    rows = [untrained("big", 7.0, 5_000_000), untrained("small", 2.0, 1_000_000)]
    assert next_action(rows, NONE).student == "small"


def test_next__resolution_is_capacity_too() -> None:
    rows = [untrained("m", 2.0, 1_000_000, 256), untrained("m", 6.0, 1_000_000, 512)]
    assert next_action(rows, BudgetRow(latency_ms=8)).image_size == 512


def test_next__stops_when_the_budget_is_out_of_reach_before_training() -> None:
    found = next_action([untrained("small", 2.0, 1_000_000)], BudgetRow(latency_ms=0.001))
    assert found.kind == "stop" and found.student is None and "nothing to train" in found.reason and "small-256-onnx-fp32" in found.reason


def test_next__stops_when_met_and_only_smaller_ones_are_left() -> None:
    rows = [row("big-256-onnx-fp32", 7.0, 0.9, params=5_000_000), untrained("small", 2.0, 1_000_000)]
    found = next_action(rows, BudgetRow(latency_ms=8))
    assert found.kind == "stop" and "big-256-onnx-fp32 meets the budget" in found.reason


def test_next__goes_on_to_a_smaller_one_when_the_largest_misses_after_training() -> None:
    rows = [row("big-256-onnx-fp32", 8.4, 0.9, params=5_000_000), untrained("small", 2.0, 1_000_000)]
    assert next_action(rows, BudgetRow(latency_ms=8)).student == "small"


def test_next__goes_on_to_a_larger_one_when_a_smaller_was_trained_first() -> None:
    rows = [row("small-256-onnx-fp32", 2.0, 0.8, params=1_000_000), untrained("big", 7.0, 5_000_000)]
    assert next_action(rows, BudgetRow(latency_ms=8)).student == "big"


def test_next__without_a_budget_trains_all_up_to_the_limit() -> None:
    rows = [row("small-256-onnx-fp32", 2.0, 0.8), untrained("mid", 4.0, 3), untrained("big", 7.0, 5)]
    assert next_action(rows, NONE).student == "mid"
    stopped = next_action(rows, NONE, max_students=1)
    assert stopped.kind == "stop" and "as many as the recipe allows" in stopped.reason


def test_next__a_student_that_failed_is_not_tried_again() -> None:
    rows = [row("big-256-onnx-fp32", params=5).turned("failed", "export", "export"), untrained("small", 2.0, 1)]
    assert next_action(rows, BudgetRow(latency_ms=8)).student == "small"


def test_next__ends() -> None:
    """The loop trains each student once at most, whatever comes of it."""
    rows = {s: untrained(s, took, params) for s, took, params in (("a", 2.0, 1), ("b", 4.0, 2), ("c", 6.0, 3), ("d", 60.0, 4))}
    seen = []
    while (action := next_action(list(rows.values()), BudgetRow(latency_ms=8, min_accuracy=0.99))).kind == "train":
        assert action.student and action.student not in seen
        seen.append(action.student)
        rows[action.student] = row(f"{action.student}-256-onnx-fp32", rows[action.student].latency_ms.p50, 0.5, params=1)  # type: ignore[union-attr]
    assert seen == ["c", "b", "a"] and action.reason == "every student that can meet the budget has been trained"


# --- properties ---------------------------------------------------------------------------------------------------------


def random_space(rng: random.Random) -> tuple[list[CandidateRow], BudgetRow]:
    rows = []
    for i in range(rng.randint(1, 5)):
        for format in ("onnx", "openvino"):
            for scheme in rng.sample(["fp32", "bf16", "w8a8_static", "w8_dynamic"], rng.randint(1, 4)):
                one = row(f"s{i}-256-{format}-{scheme}", rng.choice([rng.uniform(1, 20), rng.uniform(1, 20), None]), round(rng.uniform(0.6, 0.95), rng.choice([2, 4])),
                          mb=rng.uniform(5, 30), provenance=rng.choice(["measured", "measured", "predicted"]))
                rows.append(one.turned("failed", "no such operator", "export") if rng.random() < 0.1 else one)
    budget = BudgetRow(latency_ms=rng.choice([None, rng.uniform(0.5, 20)]), size_mb=rng.choice([None, None, rng.uniform(5, 30)]),
                       min_accuracy=rng.choice([None, None, rng.uniform(0.6, 0.95)]))
    return rows, budget


@pytest.mark.parametrize("seed", range(60))
def test_property__chosen_is_accepted_and_within_budget(seed: int) -> None:
    rows, budget = random_space(random.Random(seed))
    verdicts = judge(rows, budget)
    found = choose(verdicts, budget)
    assert (found.chosen is None) == (found.verdict == "missed")
    if found.chosen:
        best = next(r for r in verdicts if r.id == found.chosen)
        assert best.status == "accepted" and best.accuracy and best.size_bytes is not None
        assert budget.size_mb is None or best.size_bytes <= budget.size_mb * 1e6
        assert budget.min_accuracy is None or (best.accuracy.value(budget.metric) or 0) >= budget.min_accuracy
        assert budget.latency_ms is None or best.latency_ms is None or best.latency_ms.p50 <= budget.latency_ms
        assert (found.verdict == "met") == (best.latency_ms is not None and best.latency_ms.provenance == "measured")


@pytest.mark.parametrize("seed", range(60))
def test_property__order_does_not_matter(seed: int) -> None:
    rng = random.Random(seed)
    rows, budget = random_space(rng)
    shuffled = rng.sample(rows, len(rows))
    assert choose(judge(rows, budget), budget) == choose(judge(shuffled, budget), budget)
    assert {r.id: r for r in judge(rows, budget)} == {r.id: r for r in judge(shuffled, budget)}
    fresh = [r.model_copy(update={"trained": False, "accuracy": None}) for r in rows]
    assert next_action(fresh, budget) == next_action(rng.sample(fresh, len(fresh)), budget)


@pytest.mark.parametrize("seed", range(60))
def test_property__a_worse_candidate_changes_nothing(seed: int) -> None:
    rng = random.Random(seed)
    rows, budget = random_space(rng)
    before = choose(judge(rows, budget), budget)
    if before.chosen is None:
        return
    best = next(r for r in rows if r.id == before.chosen)
    took = best.latency_ms.p50 * rng.uniform(1.01, 2) if best.latency_ms else None
    box = (best.accuracy.value(budget.metric) or 0) - rng.uniform(0.0001, 0.1) if best.accuracy else None
    worse = row("zz-256-onnx-fp32", took, box, provenance=best.latency_ms.provenance if best.latency_ms else "measured")
    after = choose(judge([*rows, worse], budget), budget)
    assert (after.chosen, after.verdict) == (before.chosen, before.verdict)


@pytest.mark.parametrize("seed", range(40))
def test_property__every_refusal_has_a_reason_and_a_stage(seed: int) -> None:
    rows, budget = random_space(random.Random(seed))
    assert all(r.reason and r.stage for r in judge(rows, budget) if r.status != "accepted")


@pytest.mark.parametrize("seed", range(40))
def test_property__nothing_accepted_is_slower_than_its_float_parent(seed: int) -> None:
    rows, budget = random_space(random.Random(seed))
    found = {r.id: r for r in judge(rows, budget)}
    for r in found.values():
        parent = found.get(r.parent or "")
        if r.status == "accepted" and parent and parent.latency_ms and r.latency_ms and parent.latency_ms.provenance == r.latency_ms.provenance:
            assert r.latency_ms.p50 <= (1 - RULES.faster) * parent.latency_ms.p50 or budget.size_mb is not None


def test_rules__can_be_given() -> None:
    rows = [row(took=4.0), row("m-256-onnx-bf16", took=5.0)]
    assert judge(rows, NONE, rules=Rules(faster=-0.5))[1].status == "accepted"


# --- words --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "text"), [(6.1, "6.10 ms"), (41.34, "41.3 ms"), (413.2, "413 ms"), (0.8123, "0.81 ms"), (0.0021, "0.0021 ms"), (1.0, "1.00 ms")])
def test_ms__three_digits(value: float, text: str) -> None:
    assert ms(value) == text


def test_words__unknown_metric_is_its_own_name() -> None:
    assert words("box_miou") == "box mIoU" and words("custom") == "custom"


def test_reasons__have_numbers_with_units() -> None:
    for r in judge(sample.rows(), BudgetRow(latency_ms=8)):
        assert r.status == "accepted" or re.search(r"\d", r.reason), r.reason
