"""The front: what nothing else beats in both cost and value. Lower cost is better, higher value is better.

    value │        ◦ ─ ─ ● B        A and B are the front: B is worth more, A costs less.
          │   ● A    · C            C is dominated by A, which costs less and is worth more.
          └────────────────── cost
"""
from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")
Number = Callable[[T], float]


def dominates(a: tuple[float, float], b: tuple[float, float]) -> bool:
    """Whether point `a` = (cost, value) is no worse than `b` in both and better in one."""
    return a[0] <= b[0] and a[1] >= b[1] and a != b


def front(items: Iterable[T], cost: Number[T], value: Number[T]) -> list[T]:
    """The items that no other dominates, cheapest first. Equal points are all kept; the order of `items` breaks their tie."""
    ordered = sorted(items, key=lambda item: (cost(item), -value(item)))
    kept: list[T] = []
    for item in ordered:
        point = (cost(item), value(item))
        # Sorted by cost, so only the last one kept can dominate: it has the highest value so far.
        if not kept or not dominates((cost(kept[-1]), value(kept[-1])), point):
            kept.append(item)
    return kept


def dominator(item: T, items: Iterable[T], cost: Number[T], value: Number[T]) -> T | None:
    """The cheapest item of the front that dominates `item`, or None when it is on the front itself."""
    point = (cost(item), value(item))
    return next((other for other in front(items, cost, value) if dominates((cost(other), value(other)), point)), None)
