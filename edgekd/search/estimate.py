"""What cheap evidence says about dear: small Bayesian regressions in which a clue counts for as much as its order has been right.

A clue (the capacity of a student, its training-free score) may explain of the accuracy only what its rank correlation with accuracies seen so
far allows: its weight is drawn, before the data speak, from N(trust, trust^2). A clue whose order turned out to be useless therefore says nothing,
and the estimates of all students are alike and wide, so that more of them are tried. Trust starts at a prior worth `PRIOR_TRIALS` observations.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
PRIOR_TRIALS = 4.0
SPREAD_TRIALS = 2.0
"""Observations that the spread of the next rung around the cheaper one, as the rank correlation gives it, counts for beside what was missed."""


def ranks(values: Sequence[float] | Vector) -> Vector:
    """Ranks from 0, ties share their mean rank."""
    found = np.asarray(values, dtype=np.float64)
    order = np.empty(len(found))
    order[np.argsort(found, kind="stable")] = np.arange(len(found))
    for value in np.unique(found):
        order[found == value] = order[found == value].mean()
    return order


def rank_correlation(a: Sequence[float] | Vector, b: Sequence[float] | Vector) -> float | None:
    """Spearman's, -1..1; None for fewer than three pairs or where one side is all alike."""
    if len(a) < 3:
        return None
    x, y = ranks(a), ranks(b)
    if not x.std() or not y.std():
        return None
    return float(np.corrcoef(x, y)[0, 1])


def trust(seen: float | None, count: int, prior: float) -> float:
    """A rank correlation of `count` pairs, drawn towards what was believed before any."""
    return prior if seen is None else (count * seen + PRIOR_TRIALS * prior) / (count + PRIOR_TRIALS)


@dataclass(frozen=True)
class Belief:
    """Mean and standard deviation of what is not known yet."""

    mean: Vector
    sd: Vector


def regress(known: Vector, y: Vector, asked: Vector, *, mean: Vector, sd: Vector, noise: float) -> Belief:
    """Bayesian linear regression: y = x w + e with w ~ N(mean, sd^2), e ~ N(0, noise^2).

    Args:
        known: (n, k) features of what was seen; n may be 0.
        y: (n,) what was seen.
        asked: (m, k) features of what is asked for.
        mean, sd: (k,) of each weight before anything was seen.
        noise: what the features cannot explain; it is part of the belief's `sd`.
    """
    spread = np.diag(sd**2)
    gain = spread @ known.T @ np.linalg.inv(known @ spread @ known.T + noise**2 * np.eye(len(known)))
    weights = mean + gain @ (y - known @ mean)
    left = spread - gain @ known @ spread
    variance = np.einsum("mk,kl,ml->m", asked, left, asked) + noise**2
    return Belief(asked @ weights, np.sqrt(np.maximum(variance, 0.0)))


def standard(values: Sequence[float] | Vector) -> Vector:
    """Values with mean 0 and standard deviation 1; zeros where all are alike."""
    found = np.asarray(values, dtype=np.float64)
    spread = found.std()
    return (found - found.mean()) / spread if spread > 1e-12 else np.zeros(len(found))


def memberships(groups: Sequence[str]) -> Vector:
    """(n, number of groups): 1 where a member is of the group, groups in alphabetical order."""
    names = sorted(set(groups))
    return np.array([[float(g == name) for name in names] for g in groups]).reshape(len(groups), len(names))


def accuracies(clues: dict[str, tuple[Sequence[float], float]], groups: Sequence[str], seen: dict[int, float]) -> Belief:
    """What accuracy each of n students is likely to reach, in the unit of those seen.

    Args:
        clues: name -> (a number for each student, nan where it is not known; the rank correlation believed before any is seen).
        groups: each student's architecture: what is common to its members beyond the clues is learned too.
        seen: place of a student -> its accuracy.
    """
    places = sorted(seen)
    y = np.array([seen[i] for i in places])
    centre, scale = (float(y.mean()), max(float(y.std()), 0.02)) if len(y) > 1 else (float(y.mean()) if len(y) else 0.0, 0.1)
    columns, trusts = [], []
    for values, prior in clues.values():
        clue = np.asarray(values, dtype=np.float64)
        there = [i for i in places if np.isfinite(clue[i])]
        trusts.append(trust(rank_correlation(clue[there], [seen[i] for i in there]), len(there), prior))
        filled = np.where(np.isfinite(clue), clue, np.nanmean(clue) if np.isfinite(clue).any() else 0.0)
        columns.append(standard(ranks(filled)))
    members = memberships(groups)
    x = np.column_stack([*columns, members, np.ones(len(groups))])
    share = 1 / np.sqrt(max(1, len(columns)))  # clues that agree must not add up to more than one alone
    t = np.array(trusts) * share
    mean = np.concatenate([t, np.zeros(members.shape[1] + 1)])
    sd = np.concatenate([np.abs(t), np.full(members.shape[1], 0.5), [0.5]])
    found = regress(x[places], (y - centre) / scale, x, mean=mean, sd=sd, noise=0.5)
    return Belief(centre + scale * found.mean, scale * found.sd)


def later(cheap: Sequence[float], known: dict[int, float], measured: Sequence[int] | None = None, prior: float = 0.8) -> tuple[Vector, float]:
    """From accuracies of a cheaper rung to those of the next: (their means, the standard deviation of each around it).

    Args:
        cheap: each student's accuracy at the cheaper rung, measured or believed.
        known: place -> accuracy at the next rung.
        measured: places whose accuracy at the cheaper rung is no belief; None for all. How far those are apart says how much there is to tell.
        prior: rank correlation of the two rungs believed before any is seen.
    """
    x = np.asarray(cheap, dtype=np.float64)
    sure = x if measured is None else x[list(measured)]
    spread = max(float(sure.std()), 0.02) if len(sure) > 2 else 0.05
    places = sorted(known)
    y = np.array([known[i] for i in places])
    rho = min(0.98, max(0.0, trust(rank_correlation(x[places], y), len(places), prior)))
    wide = spread * float(np.sqrt(1 - rho**2))
    if not places:
        return x.copy(), wide
    centre = x[places].mean()
    design = np.column_stack([np.ones(len(x)), x - centre])
    found = regress(design[places], y, design, mean=np.array([y.mean(), 1.0]), sd=np.array([0.5, 0.3]), noise=max(wide, 1e-3))
    missed = float(np.square(found.mean[places] - y).sum())
    return found.mean, float(np.sqrt((SPREAD_TRIALS * wide**2 + missed) / (SPREAD_TRIALS + len(places))))
