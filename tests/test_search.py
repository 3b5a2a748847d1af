"""The space of candidates, their ids, and which student comes first."""
from __future__ import annotations

from typing import Any

import pytest
from report_sample import row

from edgekd.errors import UsageError
from edgekd.search.proposer import rank
from edgekd.search.space import Candidate, candidates, parse

HOST: dict[str, Any] = {
    "runs": {"onnx": ["fp32", "w8a8_static", "w8_dynamic"], "openvino": ["fp32", "bf16", "w8a8_static"]},
    "exports": {"onnx": ["fp32", "w8a8_static", "w8_dynamic"], "openvino": ["fp32", "bf16", "w8a8_static"], "coreml": ["fp16"]}, "target": "host"}


def space(students: Any = None, formats: Any = ("onnx", "openvino"), schemes: Any = ("fp32", "bf16", "w8a8_static"), **more: Any) -> list[Candidate]:
    return candidates(students or {"repvit_m0": [256]}, list(formats), list(schemes), **(HOST | more))


# --- ids ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("candidate", [Candidate("repvit_m0", 256, "onnx", "fp32"), Candidate("my-net", 1024, "openvino", "w8a8_static"), Candidate("tiny_vit_5m.x", 32, "ncnn", "fp16")])
def test_id__round_trips(candidate: Candidate) -> None:
    assert parse(candidate.id) == candidate


def test_id__is_the_grammar() -> None:
    assert Candidate("repvit_m0", 256, "openvino", "bf16").id == "repvit_m0-256-openvino-bf16"


@pytest.mark.parametrize("id", ["", "repvit", "repvit-onnx-fp32", "repvit-0-onnx-fp32", "repvit-256-onnx", "repvit-256-onnx-", "-256-onnx-fp32", "a-256-on/nx-fp32"])
def test_parse__refuses_what_is_no_id(id: str) -> None:
    with pytest.raises(UsageError, match="candidate id"):
        parse(id)


def test_parent__is_the_float_candidate_beside_it() -> None:
    assert Candidate("m", 256, "onnx", "w8_dynamic").parent == "m-256-onnx-fp32"
    assert Candidate("m", 256, "onnx", "fp32").parent is None


# --- the space --------------------------------------------------------------------------------------------------------------


def test_space__takes_schemes_where_they_run() -> None:
    assert [c.id for c in space()] == ["repvit_m0-256-onnx-fp32", "repvit_m0-256-onnx-w8a8_static", "repvit_m0-256-openvino-fp32", "repvit_m0-256-openvino-bf16",
                                       "repvit_m0-256-openvino-w8a8_static"]


def test_space__is_a_product_with_sizes_of_each_student() -> None:
    found = space({"a": [256, 320], "b": [224]}, formats=["onnx"], schemes=["fp32"])
    assert [(c.student, c.image_size) for c in found] == [("a", 256), ("a", 320), ("b", 224)]


def test_space__always_has_the_parent() -> None:
    found = space(schemes=["w8a8_static"], formats=["onnx"])
    assert [c.scheme for c in found] == ["fp32", "w8a8_static"]
    assert {c.parent for c in found} - {None} <= {c.id for c in found}


def test_space__names_repeat_no_candidate() -> None:
    found = space({"a": [256, 256]}, formats=["onnx", "onnx"], schemes=["fp32", "fp32"])
    assert len(found) == 1


def test_space__refuses_a_scheme_that_runs_nowhere_and_lists_what_does() -> None:
    with pytest.raises(UsageError, match="target 'host' cannot run scheme 'bf16' in onnx") as error:
        space(formats=["onnx"])
    assert error.value.hint == "onnx runs fp32, w8a8_static, w8_dynamic"


def test_space__refuses_a_misspelt_scheme_with_the_nearest() -> None:
    with pytest.raises(UsageError) as error:
        space(schemes=["w8a8_statik"])
    assert "did you mean 'w8a8_static'" in str(error.value)


def test_space__refuses_a_misspelt_format_with_the_nearest() -> None:
    with pytest.raises(UsageError) as error:
        space(formats=["onxx"])
    assert "did you mean 'onnx'" in str(error.value)


def test_space__refuses_a_format_without_runtime_on_the_target() -> None:
    with pytest.raises(UsageError, match="no runtime for format 'coreml'") as error:
        space(formats=["coreml"], schemes=["fp16"])
    assert "onnx, openvino" in str(error.value)


def test_space__refuses_a_format_whose_schemes_do_not_meet() -> None:
    with pytest.raises(UsageError, match="runs no scheme that the onnx exporter writes"):
        space(formats=["onnx"], schemes=["fp32"], runs={"onnx": ["int4"]})


@pytest.mark.parametrize("students", [{"a b": [256]}, {"a/b": [256]}])
def test_space__refuses_a_name_that_no_id_can_hold(students: dict[str, list[int]]) -> None:
    with pytest.raises(UsageError, match="cannot be part of a candidate id"):
        space(students)


def test_space__refuses_to_be_empty() -> None:
    with pytest.raises(UsageError, match="nothing to try"):
        space({"a": []})


# --- who is trained first ---------------------------------------------------------------------------------------------------


def planned(student: str, took: float | None, params: int, *, scheme: str = "fp32", size: int = 256) -> Any:
    return row(f"{student}-{size}-onnx-{scheme}", took, None, trained=False, params=params)


def test_rank__largest_first_with_a_budget_and_fastest_first_without() -> None:
    rows = [planned("a", 2.0, 1), planned("b", 4.0, 3), planned("c", 3.0, 2)]
    assert [p.student for p in rank(rows, budget_ms=8)] == ["b", "c", "a"]
    assert [p.student for p in rank(rows, budget_ms=None)] == ["a", "c", "b"]


def test_rank__one_proposal_a_student_and_size_with_its_fastest_candidate() -> None:
    found = rank([planned("a", 4.0, 1), planned("a", 2.0, 1, scheme="bf16"), planned("a", 9.0, 1, size=512)], budget_ms=None)
    assert [(p.student, p.image_size, p.planned_ms) for p in found] == [("a", 256, 2.0), ("a", 512, 9.0)]


def test_rank__leaves_out_rejected_and_trained_ones() -> None:
    rows = [planned("a", 2.0, 1).turned("rejected", "slow", "plan"), planned("b", 2.0, 1), row("c-256-onnx-fp32"), planned("c", 2.0, 1, scheme="bf16")]
    assert [p.student for p in rank(rows, budget_ms=8, trained={("c", 256)})] == ["b"]


def test_rank__unknown_latency_comes_last_without_a_budget() -> None:
    found = rank([planned("a", None, 9), planned("b", 50.0, 1)], budget_ms=None)
    assert [p.student for p in found] == ["b", "a"] and "not known" in found[1].reason
