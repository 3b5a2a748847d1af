"""A smooth function through scattered points: Gaussian-process regression with a length of its own for every feature, in numpy.

Chosen over trees, since times vary smoothly with shapes and there are hundreds of points and not millions. What is learned slowly, the lengths and the
noise (`Shape`), is a few dozen numbers that are kept as data; what they make of given points (`Smooth`) is solved anew in a moment, so that
new rows count at once. Rasmussen and Williams, Gaussian Processes for Machine Learning, chapters 2 and 5; kernel: Matern 3/2.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LEARN_ON, SOLVE_ON, STEPS = 300, 1600, 40
"""Points that lengths are learned on, points that are remembered, and steps of the learning."""
LENGTH, LENGTH_RANGE = 1.5, (-1.5, 5.0)
"""Logarithms: where lengths start and are drawn to (several standard deviations: little curvature), and where they end."""
JITTER = 1e-8


@dataclass(frozen=True)
class Shape:
    """What was learned: which features vary (`kept`), their centre and spread, their lengths, the variance of the function and a factor on the noise."""

    kept: list[int]
    centre: list[float]
    spread: list[float]
    lengths: list[float]
    signal: float
    noise: float

    def told(self) -> dict[str, Any]:
        """As JSON, six digits."""
        return {k: [_short(x) for x in v] if isinstance(v, list) else _short(v) for k, v in asdict(self).items()}

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> Shape:
        """The way back."""
        return cls(**{k: told[k] for k in cls.__dataclass_fields__})

    def scaled(self, x: Array) -> Array:
        """(n, all features) -> (n, kept), standardised."""
        return (x[:, self.kept] - np.array(self.centre)) / np.array(self.spread)


def learn(x: Array, y: Array, noise: Array, *, seed: int = 0) -> Shape:
    """Lengths under which the points (x (n, f), y (n,), noise (n,) variances up to a factor) are most probable.

    Lengths have a prior, so that with few points little is learned.
    """
    spread = x.std(0)
    kept = np.flatnonzero(spread > 1e-6)
    centre = x[:, kept].mean(0)
    z = (x[:, kept] - centre) / spread[kept]
    residual = y - _line(z, noise, y)[1]
    chosen = np.random.default_rng(seed).permutation(len(z))[:LEARN_ON]
    best = _most_probable(z[chosen], residual[chosen], noise[chosen])
    f = len(kept)
    return Shape([int(k) for k in kept], centre.tolist(), spread[kept].tolist(), np.exp(best[:f]).tolist(), float(np.exp(best[f])), float(np.exp(best[f + 1])))


def _most_probable(z: Array, r: Array, noise: Array) -> Array:
    """Logarithms of the lengths, of the signal's variance and of the factor on the noise."""
    from scipy.linalg.lapack import dpotrf, dpotri
    from scipy.optimize import minimize

    n, f = z.shape
    squares = np.ascontiguousarray(((z[:, None, :] - z[None, :, :]) ** 2).reshape(n * n, f))

    def loss(t: Array) -> tuple[float, Array]:
        inverse, signal, factor = np.exp(-2 * t[:f]), np.exp(t[f]), np.exp(t[f + 1])
        distance = np.sqrt(3 * (squares @ inverse).reshape(n, n) + 1e-12)
        decay = np.exp(-distance)
        kernel = (1 + distance) * decay
        root, wrong = dpotrf(signal * kernel + np.diag(factor * noise + JITTER), lower=True)
        if wrong:
            return 1e10, np.zeros_like(t)
        precision, _ = dpotri(root, lower=True)
        precision = np.tril(precision) + np.tril(precision, -1).T
        a = precision @ r
        value = 0.5 * r @ a + np.log(np.diag(root)).sum() + 0.5 * ((t[:f] - LENGTH) ** 2).sum() + ((t[f] + 2) ** 2 + t[f + 1] ** 2) / 8
        slope = np.outer(a, a) - precision
        gradient = np.concatenate([
            -1.5 * inverse * ((slope * signal * decay).ravel() @ squares) + t[:f] - LENGTH,
            [-0.5 * float((slope * kernel).sum()) * signal + (t[f] + 2) / 4], [-0.5 * float(np.diag(slope) @ noise) * factor + t[f + 1] / 4]])
        return float(value), gradient

    start = np.concatenate([np.full(f, LENGTH), [-2.0, 0.0]])
    bounds = [LENGTH_RANGE] * f + [(-6.0, 3.0), (-4.0, 4.0)]
    return np.asarray(minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": STEPS}).x)


def _line(z: Array, noise: Array, y: Array) -> tuple[Array, Array]:
    """The weighted ridge regression under the curve: its coefficients (1 + f,), and its values."""
    a = np.concatenate([np.ones((len(z), 1)), z], axis=1)
    weight = noise.min() / noise
    ridge = np.eye(a.shape[1]) * max(2.0, 0.02 * weight.sum())
    ridge[0, 0] = 1e-6
    found = np.linalg.solve(a.T @ (a * weight[:, None]) + ridge, a.T @ (weight * y))
    return found, a @ found


class Smooth:
    """The function itself: `shape` with the points it goes through. Of more than `SOLVE_ON` points a sample is taken."""

    def __init__(self, shape: Shape, x: Array, y: Array, noise: Array) -> None:
        chosen = np.random.default_rng(1).permutation(len(x))[:SOLVE_ON]
        x, y, noise = x[chosen], y[chosen], noise[chosen]
        self.shape, self._z = shape, shape.scaled(x)
        self._line, values = _line(self._z, noise, y)
        self._scaled = self._z / np.array(shape.lengths)
        covariance = self._kernel(self._scaled) + np.diag(shape.noise * noise + JITTER)
        precision = np.linalg.inv(covariance)
        self._weights = precision @ (y - values)
        self._precision = precision

    def _kernel(self, a: Array) -> Array:
        b = self._scaled
        distance = np.sqrt(3 * np.maximum(0.0, (a * a).sum(1)[:, None] + (b * b).sum(1)[None] - 2 * a @ b.T) + 1e-12)
        return np.asarray(self.shape.signal * (1 + distance) * np.exp(-distance))

    def __call__(self, x: Array) -> tuple[Array, Array]:
        """Mean and standard deviation at points (n, f), the latter without the noise of a measurement."""
        z = self.shape.scaled(x)
        kernel = self._kernel(z / np.array(self.shape.lengths))
        mean = self._line[0] + z @ self._line[1:] + kernel @ self._weights
        variance = self.shape.signal - ((kernel @ self._precision) * kernel).sum(1)
        return mean, np.sqrt(np.maximum(variance, 0.0))


def _short(x: float) -> float:
    return x if isinstance(x, int) else float(f"{x:.6g}")
