"""A board that only its owner reaches: candidates are judged anew by what it measured."""
from __future__ import annotations

from report_sample import latency, report, row

from edgekd.handover import merged
from edgekd.measurement import Circumstances
from edgekd.profiling.profile import ComponentProfile, Profile
from edgekd.recipe import Budget
from edgekd.report.schema import CandidateRow, Report


def of_a_board(*rows: CandidateRow, budget: Budget | None = None) -> Report:
    return report().model_copy(update={"candidates": list(rows), "budget": budget or Budget(), "chosen": None, "verdict": "unverified", "speedup": None})


def measured(id: str, took: float) -> Profile:
    part = ComponentProfile(latency_ms=latency(took), load_ms=1, size_bytes=1, executed_precision="fp32", executed_ops={})
    return Profile(id=id, target="jetson", prompts=1, components={"encoder": part, "decoder": part}, latency_ms=latency(took), load_ms=1, peak_memory_bytes=5, size_bytes=1,
                   executed_precision="fp32", transport="by hand", energy_mj=12.5, circumstances=Circumstances(device="Jetson", os="L4T", python="3.10", date="2026-11-22"))


def test_merged__a_measured_candidate_makes_the_verdict() -> None:
    before = of_a_board(row("a-256-onnx-fp32", took=None, box=0.9), row("b-256-onnx-fp32", took=None, box=0.8), budget=Budget(latency_ms=10))
    found = merged(before, {"a-256-onnx-fp32": measured("a-256-onnx-fp32", 12), "b-256-onnx-fp32": measured("b-256-onnx-fp32", 8)}, {})
    assert (found.verdict, found.chosen) == ("met", "b-256-onnx-fp32") and found.environment["device"] == "Jetson"
    slow = found.row("a-256-onnx-fp32")
    assert slow is not None and "over the budget" in slow.reason
    best = found.best
    assert best is not None and best.energy_mj == 12.5 and best.peak_memory_bytes == 5


def test_merged__nothing_is_fast_enough() -> None:
    found = merged(of_a_board(row("a-256-onnx-fp32", took=None), budget=Budget(latency_ms=10)), {"a-256-onnx-fp32": measured("a-256-onnx-fp32", 12)}, {})
    assert found.verdict == "missed" and found.chosen is None and found.nearest is not None and found.nearest.gap_ms == 2.0


def test_merged__a_later_measurement_replaces_an_earlier_one() -> None:
    before = of_a_board(row("a-256-onnx-fp32", took=None), budget=Budget(latency_ms=10))
    once = merged(before, {"a-256-onnx-fp32": measured("a-256-onnx-fp32", 12)}, {})
    assert merged(once, {"a-256-onnx-fp32": measured("a-256-onnx-fp32", 9)}, {}).verdict == "met"


def test_merged__what_failed_on_the_board_has_failed_and_what_did_not_come_back_stays_open() -> None:
    before = of_a_board(row("a-256-onnx-fp32", took=None), row("b-256-onnx-fp32", took=None))
    found = merged(before, {}, {"a-256-onnx-fp32": "no kernel for Foo"})
    failed = found.row("a-256-onnx-fp32")
    assert failed is not None and failed.status == "failed" and failed.reason == "on the board: no kernel for Foo"
    assert (found.verdict, found.chosen) == ("unverified", "b-256-onnx-fp32")
