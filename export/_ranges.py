"""Ranges of activations of a float ONNX graph, by onnxruntime's calibrators: in constant memory, once for many exports, and never from what is not a number.

The calibrators that keep histograms hold every intermediate tensor of every sample they are fed at once. So they are fed one sample at a time. Two
passes make that exact: the first finds the extremes, and with those as the ends of the bins the second adds up the same histogram in any order and
any portions (left alone, the bins of a tensor grow with every sample that is larger, without limit). `CalibMaxIntermediateOutputs`, the library's
own way to save memory, forgets what it drops before it was looked at (onnxruntime 1.31.1).

    minmax       the extremes
    percentile   the middle 99.99 %
    entropy      the cut, equal on both sides, whose rounding changes the distribution least (Kullback-Leibler)
    mse          the ends with the least mean squared error of rounding and cutting; onnxruntime has no such method, but the histogram it is chosen on

What was seen of a graph on the same samples is kept by content in this process: exports that differ in the layers they keep share one calibration. It
takes samples that say what they are, by a method `fingerprint() -> str`.
"""
from __future__ import annotations

import hashlib
import io
import tempfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.errors import EdgekdError, UsageError

if TYPE_CHECKING:
    import numpy as np

Range = tuple[Any, Any]
"""low and high, numbers of the tensor's own type"""
Sample = Mapping[str, "np.ndarray"]

PERCENTILE = 99.99
BINS = 2048
ENTROPY_BINS, ENTROPY_LEVELS = 512, 128
"""onnxruntime's own 128 bins leave no cut to choose from, and its search grows with the cube of their number"""
SHRINK = 100
"""ends that are tried on each side by `mse`, evenly from 0 to the extreme"""
KEPT = 16


@dataclass
class _Seen:
    """What is known of the tensors of one graph on one set of samples. A histogram is (counts, edges)."""

    extremes: dict[str, Range] = field(default_factory=dict)
    histograms: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    chosen: dict[tuple[str, bool, str], Range] = field(default_factory=dict)


_known: OrderedDict[str, _Seen] = OrderedDict()


@dataclass(frozen=True)
class Watched:
    """A graph to be looked at: its file, what errors call it, whether its weights lie outside of it, and tensor -> where that is, in words."""

    file: Path
    where: str
    large: bool
    tensors: Mapping[str, str]


def key_of(file: Path, samples: object) -> str | None:
    """Changes with the graph's content and the samples'; None when the samples do not say what they are."""
    told = getattr(samples, "fingerprint", None)
    if not callable(told) or (own := told()) is None:  # what is around samples that do not say it does not know it either
        return None
    digest = hashlib.sha256(str(own).encode())
    for part in (file, file.with_name(f"{file.name}.data")):
        if part.exists():
            with part.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


def ranges(watched: Watched, samples: Iterable[Sample], *, method: str = "minmax", symmetric: bool = False, key: str | None = None) -> dict[str, Range]:
    """Tensor -> (low, high) of every watched tensor.

    Args:
        samples: input name -> array; run through once for minmax, twice for the other methods, and not at all for what `key` is known of.
        symmetric: whether the levels will lie evenly around 0; only mse depends on it.

    Raises:
        UsageError: there are no samples, one is not finite, or all are constant.
        EdgekdError: a tensor of the graph is not finite on a sample; the first layer is named.
    """
    seen = _known.setdefault(key, _Seen()) if key else _Seen()
    if key:
        _known.move_to_end(key)
        while len(_known) > KEPT:
            _known.popitem(last=False)
    if new := {t: layer for t, layer in watched.tensors.items() if t not in seen.extremes}:
        seen.extremes |= _extremes(Watched(watched.file, watched.where, watched.large, new), samples)
    if method == "minmax":
        return {t: seen.extremes[t] for t in watched.tensors}
    uncounted = {t: layer for t, layer in watched.tensors.items() if t not in seen.histograms and any(seen.extremes[t])}
    if uncounted:
        seen.histograms |= _histograms(Watched(watched.file, watched.where, watched.large, uncounted), samples, seen.extremes)
    found = {}
    for tensor in watched.tensors:
        mark = (method, symmetric, tensor)
        if mark not in seen.chosen:
            seen.chosen[mark] = _cut(method, seen.histograms.get(tensor), seen.extremes[tensor], symmetric)
        found[tensor] = seen.chosen[mark]
    return found


class Checked:
    """Calibration inputs, one by one, as the library's reader of data.

    Raises:
        UsageError: one has a value that is not finite, there are none, or not one varies. An input varies when, somewhere in it, a row of its last two
            axes is not one value: a photo of one colour, whose channels differ, does not.
    """

    def __init__(self, samples: Iterable[Sample], where: str) -> None:
        self._samples, self._where = samples, where
        self.rewind()

    def rewind(self) -> None:
        """Start again."""
        self._iterator = self._checked()

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next sample; None behind the last."""
        return next(self._iterator, None)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return iter(self._checked())

    def _checked(self) -> Iterator[dict[str, np.ndarray]]:
        import numpy as np

        count, varies = 0, False
        for count, sample in enumerate(self._samples, 1):
            for name, value in sample.items():
                if value.dtype.kind == "f" and not np.isfinite(value).all():
                    raise UsageError(f"calibration sample {count} has values in '{name}' that are not finite numbers", where=self._where,
                                     hint="look at how its data is read and normalised")
            varies = varies or any(_varies(v) for v in sample.values())
            yield dict(sample)
        if not count:
            raise UsageError("there are no calibration samples", where=self._where, hint="give a folder of images with --data")
        if not varies:
            raise UsageError("every calibration sample is constant: no range of activations can be found on it", where=self._where,
                             hint="give photos of what the model will see")


def _varies(value: np.ndarray) -> bool:
    rows = value.reshape(-1, value.shape[-2] * value.shape[-1]) if value.ndim >= 3 else value.reshape(1, -1)
    return bool(value.size) and bool((rows != rows[:, :1]).any())


class _One:
    """The library's reader for a single sample."""

    def __init__(self, sample: dict[str, np.ndarray]) -> None:
        self._sample: dict[str, np.ndarray] | None = sample

    def get_next(self) -> dict[str, np.ndarray] | None:
        sample, self._sample = self._sample, None
        return sample


class _Session:
    """onnxruntime's session for a calibrator, without the outputs that are ours: the sum of each tensor, in which nothing that is not a number is lost.
    The calibrator's minima and maxima, and onnxruntime's own, pass over NaN."""

    def __init__(self, session: Any, watched: Watched) -> None:
        self._session, self._watched = session, watched
        self._takes = [i.name for i in session.get_inputs()]
        self._own = len(session.get_outputs()) - len(watched.tensors)

    def get_inputs(self) -> list[Any]:
        return list(self._session.get_inputs())

    def get_outputs(self) -> list[Any]:
        return list(self._session.get_outputs())[:self._own]

    def run(self, _: None, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        import numpy as np

        values = self._session.run(None, {name: inputs[name] for name in self._takes})
        for (tensor, place), total in zip(self._watched.tensors.items(), values[self._own:], strict=True):
            if not np.isfinite(total):
                raise EdgekdError(f"activations are not finite on a calibration sample, first in {place} (tensor '{tensor}')", where=self._watched.where,
                                  hint="the model computes NaN or infinity in fp32 already; look at its weights and at that sample")
        return list(values[:self._own])


def _opened(calibrator: Any, watched: Watched, *, sums: bool) -> None:
    """Have a calibrator look at the watched tensors only, and ready to be fed."""
    import onnx

    _, known = calibrator.select_tensors_to_calibrate(calibrator.model)
    calibrator.select_tensors_to_calibrate = lambda model: (list(watched.tensors), known)
    calibrator.augment_graph()
    if sums:
        for tensor in watched.tensors:
            calibrator.model.graph.node.append(onnx.helper.make_node("Cast", [tensor], [f"{tensor}/float"], to=onnx.TensorProto.FLOAT))
            calibrator.model.graph.node.append(onnx.helper.make_node("ReduceSum", [f"{tensor}/float"], [f"{tensor}/sum"], keepdims=0))
            calibrator.model.graph.output.append(onnx.helper.make_tensor_value_info(f"{tensor}/sum", onnx.TensorProto.FLOAT, []))
        onnx.save(calibrator.model, calibrator.augmented_model_path, save_as_external_data=watched.large)
    calibrator.create_inference_session()
    calibrator.infer_session = _Session(calibrator.infer_session, watched if sums else Watched(watched.file, watched.where, watched.large, {}))


def _extremes(watched: Watched, samples: Iterable[Sample]) -> dict[str, Range]:
    """The least and greatest value of each tensor."""
    from onnxruntime.quantization import MinMaxCalibrater

    with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
        calibrator: Any = MinMaxCalibrater(watched.file, augmented_model_path=str(Path(folder) / "watched.onnx"), use_external_data_format=watched.large)
        _opened(calibrator, watched, sums=True)
        for sample in Checked(samples, watched.where):
            calibrator.collect_data(_One(sample))
        found = calibrator.compute_data()
    return {t: (found[t].lowest.min(), found[t].highest.max()) for t in watched.tensors}


def _histograms(watched: Watched, samples: Iterable[Sample], extremes: Mapping[str, Range]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Counts and edges of `BINS` bins from minus to plus the greatest magnitude of each tensor."""
    import numpy as np
    from onnxruntime.quantization.calibrate import PercentileCalibrater

    with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
        calibrator: Any = PercentileCalibrater(watched.file, augmented_model_path=str(Path(folder) / "watched.onnx"), num_bins=BINS, symmetric=False,
                                               use_external_data_format=watched.large)
        _opened(calibrator, watched, sums=False)
        calibrator.collector = _collector("percentile")
        for tensor in watched.tensors:
            low, high = extremes[tensor]
            most = np.maximum(abs(low), abs(high))
            edges = np.linspace(-most, most, BINS + 1, dtype=most.dtype)
            calibrator.collector.histogram_dict[tensor] = (np.zeros(BINS, np.int64), edges, low, high, most)
        for sample in Checked(samples, watched.where):
            with redirect_stdout(io.StringIO()):  # it tells what it does; stdout is for our data
                calibrator.collect_data(_One(sample))
        return {t: (h[0], h[1]) for t, h in calibrator.collector.histogram_dict.items()}


def _collector(method: str) -> Any:
    from onnxruntime.quantization.calibrate import HistogramCollector

    return HistogramCollector(method=method, symmetric=False, num_bins=BINS, num_quantized_bins=ENTROPY_LEVELS, percentile=PERCENTILE, scenario="same")


def _cut(method: str, histogram: tuple[np.ndarray, np.ndarray] | None, extremes: Range, symmetric: bool) -> Range:
    """The range that a method chooses, which lies within the extremes; those where it would leave nothing."""
    import numpy as np

    if histogram is None:
        return extremes
    (counts, edges), (low, high) = histogram, extremes
    if method == "mse":
        found: Range = _least_error(counts, edges, extremes, symmetric)
    elif method == "entropy":
        merge, outer = BINS // ENTROPY_BINS, (len(counts) - BINS) // 2  # a value beyond the first pass's, by rounding, adds bins at both ends
        merged = counts[outer:outer + BINS].reshape(-1, merge).sum(1), edges[outer:outer + BINS + 1:merge]
        found = _collector(method).get_entropy_threshold((*merged, low, high), ENTROPY_LEVELS)
    else:
        collector = _collector(method)
        collector.histogram_dict["t"] = (counts, edges, low, high, edges[-1])
        with redirect_stdout(io.StringIO()):
            found = collector.compute_collection_result()["t"][:2]
    least, most = (np.clip(end, low, high).astype(low.dtype) for end in found)
    return (least, most) if max(most, 0) - min(least, 0) > 0 else extremes


def _least_error(counts: np.ndarray, edges: np.ndarray, extremes: Range, symmetric: bool) -> Range:
    """The ends with the least squared error of 8-bit levels between them, on a histogram: each end in turn with the other held, twice."""
    import numpy as np

    centres, weights = (edges[:-1].astype(np.float64) + edges[1:]) / 2, counts.astype(np.float64)
    used = weights > 0
    centres, weights = centres[used], weights[used]

    def best(lows: np.ndarray, highs: np.ndarray) -> tuple[float, float]:
        steps = (highs - lows)[:, None] / (254 if symmetric else 255)
        zeros = np.rint(-lows[:, None] / steps)
        levels = np.clip(np.rint(centres / steps), -zeros, (254 if symmetric else 255) - zeros) * steps
        error = (np.square(levels - centres) * weights).sum(1)
        least = int(error.argmin())
        return float(lows[least]), float(highs[least])

    parts = np.arange(1, SHRINK + 1) / SHRINK
    low, high = min(extremes[0], 0.0), max(extremes[1], 0.0)
    if symmetric:
        most = max(-low, high)
        low, high = best(-most * parts, most * parts)
        return low, high
    ends = (low, high)
    for _ in range(2):
        low, high = best(np.full(SHRINK, low), ends[1] * parts) if ends[1] > 0 else (low, high)
        low, high = best(ends[0] * parts, np.full(SHRINK, high)) if ends[0] < 0 else (low, high)
    return low, high
