"""An exported model of arrays against the module it came from: every output, by its numbers."""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from edgekd.errors import EdgekdError
from edgekd.parity import EXACT, difference, sound, too_far
from edgekd.protocols import Component, Session
from edgekd.tasks.tensors.inputs import draw, rows_of
from edgekd.tasks.tensors.model import Arrays

EXACT_L2, EXACT_SAME = 0.01, 0.999
"""fp32, beside `EXACT`: the relative L2 of an output, for those whose numbers are all small; and the share of whole numbers that are equal."""
LOSSY_L2, LOSSY_COSINE, LOSSY_SAME = 0.7, 0.7, 0.5
"""Of every scheme but fp32. Worse is broken; whether it is good enough is for the accuracy of the artifact to say."""


class Reference:
    """The module's own answers to a few calls: on the user's data where there is some, and on seeded arrays."""

    def __init__(self, model: Arrays) -> None:
        self.model = model
        self.expected = [self._answer(one) for one in model.samples]
        together = np.concatenate([np.ravel(a).astype(np.float64) for one in self.expected for a in one.values()])
        sound(model.name, "outputs", together)

    def _answer(self, sample: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = self.model.run(sample)
        for name, value in found.items():
            if not np.isfinite(value).all():
                raise EdgekdError(f"the model's output '{name}' holds NaN or infinity", where=self.model.name,
                                  hint="its weights are damaged, or it does not take such inputs: give real ones with --data")
        return found

    def samples(self, part: Component) -> list[dict[str, np.ndarray]]:
        """The calls' inputs."""
        return self.model.samples

    def adapt(self, part: Component, samples: Iterable[Mapping[str, np.ndarray]]) -> Iterable[Mapping[str, np.ndarray]]:
        """Calibration inputs as they are."""
        return samples

    def compare(self, part: Component, session: Session, scheme: str) -> tuple[dict[str, Any], str | None]:
        """Largest difference, relative L2 and cosine of every output, over calls with axes of other lengths too; whole numbers by the share that is
        equal. The report's own numbers are those of the worst output."""
        pairs = self._calls(getattr(session, "fixed", {}), scheme)
        report: dict[str, Any] = {"outputs": {}, "calls": len(pairs), "finite": True, "limits": _limits(scheme)}
        reasons, found = [], [session.run(sample) for sample, _ in pairs]
        for name in self.model.outputs:
            expected = [answer[name] for _, answer in pairs]
            one, reason = compare_output(expected, [f[name] for f in found], scheme)
            report["outputs"][name] = one
            reasons += [f"output '{name}': {reason}"] if reason else []
        for key, worst in (("max_abs", max), ("max_relative", max), ("relative_l2", max), ("cosine", min), ("same", min)):
            if values := [one[key] for one in report["outputs"].values() if key in one]:
                report[key] = worst(values)
        report["finite"] = all(one["finite"] for one in report["outputs"].values())
        return report, reasons[0] if reasons else None

    def _calls(self, fixed: Mapping[str, int], scheme: str) -> list[tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]]:
        """Inputs with the module's answers. Those given alone decide where ranges were found on them; else axes that may vary do: the first one
        always (several calls serve it where it is fixed), the others where the file lets them."""
        model = self.model
        given = [(s, e) for s, e in zip(model.samples, self.expected, strict=True) if self._fits(s, fixed)]
        if model.own_data and scheme != "fp32" and given:
            return list(given)
        rows = rows_of(model.inputs)
        lengths = {s: fixed[s] if s in fixed and s != rows else n for s, n in model.lengths.items()}
        free = [s for s in lengths if s not in fixed or s == rows]
        tried = [lengths, {s: n + (s in free) for s, n in lengths.items()}, {s: 1 if s == rows else n for s, n in lengths.items()}] if free else [lengths]
        drawn = [draw(model.inputs, each, seed) for seed, each in enumerate(tried if free or model.own_data or not given else [], start=1)]
        return [*given, *((one, self._answer(one)) for one in drawn)]

    def _fits(self, sample: Mapping[str, np.ndarray], fixed: Mapping[str, int]) -> bool:
        """Whether axes beyond the first have the lengths that the file takes: an arbitrary model may not be given padding."""
        rows = rows_of(self.model.inputs)
        return all(sample[i.name].shape[axis] == fixed[s] for i in self.model.inputs for axis, s in enumerate(i.shape)
                   if isinstance(s, str) and s != rows and s in fixed)

    def checked(self) -> str:
        """What was compared."""
        count, what = len(self.model.outputs), "inputs given" if self.model.own_data else "seeded inputs"
        return f"parity of {count} output{'s' * (count > 1)} on {what}"


def compare_output(expected: list[np.ndarray], found: list[np.ndarray], scheme: str) -> tuple[dict[str, Any], str | None]:
    """One output over all calls, and why it is not the module's any more."""
    if shapes := next(((e.shape, f.shape) for e, f in zip(expected, found, strict=True) if e.shape != f.shape), None):
        return {"finite": True, "shape": list(shapes[1])}, f"it has the shape {shapes[1]} in place of {shapes[0]}"
    ours, theirs = (np.concatenate([np.ravel(a) for a in each]).astype(np.float64) for each in (expected, found))
    if not ours.size:
        return {"finite": True, "values": 0}, None
    limits = _limits(scheme)
    if expected[0].dtype.kind != "f":
        same = float((ours == theirs).mean())
        return {"same": same, "finite": bool(np.isfinite(theirs).all())}, \
            f"{same:.4f} of its whole numbers are the model's (limit {limits['same']:g})" if same < limits["same"] else None
    one: dict[str, Any] = difference(ours, theirs)
    one["cosine"] = cosine(ours, theirs) if one["finite"] else -1.0
    if not one["finite"]:
        return one, "it holds NaN or infinity"
    if scheme == "fp32" and (reason := too_far(one, EXACT)):
        return one, reason
    if one["relative_l2"] > limits["relative_l2"] and one["max_abs"] > 0:
        return one, f"it differs by {one['relative_l2']:.2g} of its own size (relative L2, limit {limits['relative_l2']:g})"
    return one, f"its cosine with the model's is {one['cosine']:.4f} (limit {limits['cosine']:g})" if one["cosine"] < limits.get("cosine", -1.0) else None


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of two outputs as vectors; 1 where both are zero."""
    size = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
    return float(np.dot(np.ravel(a), np.ravel(b))) / size if size else float(np.array_equal(a, b))


def _limits(scheme: str) -> dict[str, float]:
    if scheme == "fp32":
        return {"max_relative": EXACT.max_relative, "max_abs": EXACT.max_abs, "relative_l2": EXACT_L2, "same": EXACT_SAME}
    return {"relative_l2": LOSSY_L2, "cosine": LOSSY_COSINE, "same": LOSSY_SAME}
