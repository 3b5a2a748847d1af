"""What cheap evidence says: rank correlations, trust in clues, accuracies of later rungs, latencies of what was not measured."""
from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from edgekd.search.estimate import accuracies, later, rank_correlation, regress, trust
from edgekd.search.latencies import Guess, Point, guess


@pytest.mark.parametrize("seed", range(5))
def test_rank_correlation__is_spearmans(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 5, 12), rng.normal(size=12)
    assert rank_correlation(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)


@pytest.mark.parametrize(("a", "b"), [([1, 2], [1, 2]), ([1, 1, 1], [1, 2, 3]), ([], [])])
def test_rank_correlation__says_nothing_of_too_little(a: list[float], b: list[float]) -> None:
    assert rank_correlation(a, b) is None


def test_trust__goes_from_belief_to_what_is_seen() -> None:
    assert trust(None, 0, 0.3) == 0.3
    assert trust(0.0, 4, 0.4) == pytest.approx(0.2) and trust(0.0, 400, 0.4) < 0.01 and trust(-1.0, 8, 0.4) < 0


def test_regress__finds_the_line_and_is_sure_where_it_was_seen() -> None:
    x = np.column_stack([np.linspace(-1, 1, 30), np.ones(30)])
    found = regress(x, 2 * x[:, 0] + 1, np.array([[0.0, 1.0], [9.0, 1.0]]), mean=np.zeros(2), sd=np.full(2, 5.0), noise=0.1)
    assert found.mean == pytest.approx([1.0, 19.0], abs=0.1) and found.sd[0] < found.sd[1]


def test_regress__without_observations_is_what_was_believed() -> None:
    found = regress(np.zeros((0, 2)), np.zeros(0), np.eye(2), mean=np.array([1.0, 2.0]), sd=np.array([3.0, 4.0]), noise=0.0)
    assert found.mean == pytest.approx([1, 2]) and found.sd == pytest.approx([3, 4])


def spread(values: list[float], truth: np.ndarray, seen: int, prior: float = 0.3) -> float:
    """How far apart a clue sets the accuracies of students that were not seen."""
    found = accuracies({"clue": (values, prior)}, ["f"] * len(values), {i: float(truth[i]) for i in range(seen)})
    return float(found.mean[seen:].std() / truth.std())


def test_accuracies__a_useless_clue_is_not_trusted_and_a_good_one_is() -> None:
    rng = np.random.default_rng(4)
    truth = rng.normal(0.6, 0.05, 40)
    good, useless = list(truth + rng.normal(0, 0.01, 40)), list(rng.permutation(truth))
    assert abs(rank_correlation(useless[:12], truth[:12]) or 0.0) < 0.3, "or the test would be of chance"
    assert spread(good, truth, 12) > 3 * spread(useless, truth, 12)
    assert spread(useless, truth, 30) < 0.2


def test_accuracies__learn_what_an_architecture_has_in_common() -> None:
    groups = ["a", "b"] * 10
    found = accuracies({}, groups, {i: 0.7 if groups[i] == "a" else 0.5 for i in range(8)})
    assert found.mean[10] > 0.63 and found.mean[11] < 0.57


def test_accuracies__before_any_follow_the_clues_as_they_are_believed() -> None:
    found = accuracies({"work": ([1.0, 2.0, 3.0], 0.3), "score": ([math.nan] * 3, 0.3)}, ["a"] * 3, {})
    assert found.mean[0] < found.mean[1] < found.mean[2] and (found.sd > 0).all()


def test_accuracies__do_not_depend_on_the_order_of_students() -> None:
    rng = np.random.default_rng(1)
    values, groups, seen = list(rng.normal(size=9)), list("abcabcabc"), {0: 0.5, 3: 0.6, 4: 0.4}
    order = list(rng.permutation(9))
    a = accuracies({"x": (values, 0.3)}, groups, seen)
    b = accuracies({"x": ([values[i] for i in order], 0.3)}, [groups[i] for i in order], {order.index(i): v for i, v in seen.items()})
    assert a.mean[order] == pytest.approx(b.mean) and a.sd[order] == pytest.approx(b.sd)


def test_later__moves_all_by_what_was_gained_and_narrows_as_ranks_agree() -> None:
    cheap = [0.3, 0.35, 0.4, 0.45, 0.5, 0.55]
    before, unsure = later(cheap, {})
    assert before == pytest.approx(cheap)
    mean, _ = later(cheap, {5: 0.75})
    assert mean == pytest.approx([c + 0.2 for c in cheap], abs=0.02)
    _, agree = later(cheap, {5: 0.75, 4: 0.7, 3: 0.65, 2: 0.6})
    _, differ = later(cheap, {5: 0.6, 4: 0.65, 3: 0.7, 2: 0.75})
    assert agree < unsure < differ


# --- latencies


def points() -> list[Point]:
    return [Point(f"{f}{i}{k}", f, k, g, 128) for f in "ab" for i, g in enumerate((0.1, 0.2, 0.4, 0.8)) for k in ("onnx fp32", "onnx int8")]


def truth(p: Point) -> float:
    return 10 * p.gmacs**0.8 * (1.5 if p.family == "b" else 1) * (0.5 if "int8" in p.kind else 1)


def test_guess__says_nothing_before_a_measurement() -> None:
    assert guess(points(), {}) == {}


def test_guess__of_a_few_measurements_is_within_its_interval() -> None:
    everyone = points()
    known = {p.id: truth(p) for p in everyone if p.id in ("a1onnx fp32", "a1onnx int8", "b2onnx fp32", "a3onnx fp32")}
    found = guess(everyone, known)
    for p in everyone:
        one = found[p.id]
        assert abs(one.mean - math.log(truth(p))) < 2.5 * one.sd and one.sd < 0.45
    assert found["a1onnx fp32"].sd < guess(everyone, {"a1onnx int8": truth(everyone[3])})["a1onnx fp32"].sd


def test_guess__a_predictor_counts_less_than_a_measurement() -> None:
    everyone = points()
    told = guess(everyone, {"a0onnx fp32": truth(everyone[0])}, {p.id: 3 * truth(p) for p in everyone[2:]})["a3onnx fp32"]
    alone = guess(everyone, {"a0onnx fp32": truth(everyone[0])})["a3onnx fp32"]
    assert alone.mean < told.mean and told.sd < alone.sd


def test_guess__as_a_latency_is_predicted_and_has_an_interval() -> None:
    latency = Guess(math.log(10), 0.2).latency
    assert latency.provenance == "predicted" and latency.n == 0 and latency.p50 == pytest.approx(10)
    assert latency.min == pytest.approx(10 * math.exp(-0.2)) and latency.p90 > latency.p50
