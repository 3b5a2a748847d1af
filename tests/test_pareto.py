"""The front of cost and value."""
from __future__ import annotations

import random

import pytest

from edgekd.search.pareto import dominates, dominator, front

Point = tuple[float, float]


def cost(p: Point) -> float:
    return p[0]


def value(p: Point) -> float:
    return p[1]


@pytest.mark.parametrize(("a", "b", "expected"), [
    ((1, 2), (2, 1), True), ((1, 2), (1, 1), True), ((1, 2), (2, 2), True), ((1, 2), (1, 2), False), ((1, 1), (2, 2), False), ((2, 2), (1, 1), False)])
def test_dominates(a: Point, b: Point, expected: bool) -> None:
    assert dominates(a, b) is expected


def test_front__is_what_nothing_dominates_cheapest_first() -> None:
    assert front([(3, 9), (1, 5), (2, 4), (2, 7), (5, 8)], cost, value) == [(1, 5), (2, 7), (3, 9)]


def test_front__keeps_equal_points_and_handles_none_and_one() -> None:
    assert front([], cost, value) == [] and front([(1, 1)], cost, value) == [(1, 1)]
    assert front([(1, 1), (1, 1)], cost, value) == [(1, 1), (1, 1)]


def test_front__of_equal_cost_keeps_the_best() -> None:
    assert front([(1, 1), (1, 3), (1, 2)], cost, value) == [(1, 3)]


@pytest.mark.parametrize("seed", range(30))
def test_front__agrees_with_the_definition(seed: int) -> None:
    rng = random.Random(seed)
    points = [(rng.randint(0, 8), rng.randint(0, 8)) for _ in range(rng.randint(1, 25))]
    expected = sorted(p for p in points if not any(dominates(q, p) for q in points))
    assert sorted(front(points, cost, value)) == expected
    assert sorted(front(rng.sample(points, len(points)), cost, value)) == expected


def test_dominator__is_on_the_front() -> None:
    points = [(1, 5), (2, 7), (3, 6)]
    assert dominator((3, 6), points, cost, value) == (2, 7)
    assert dominator((2, 7), points, cost, value) is None
