"""NNCF's own search for layers to keep in float (`nncf.quantize_with_accuracy_control`): what our search is compared with. Not a scheme."""
from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekd.export import openvino as export_openvino
from edgekd.export._openvino_layers import operators, read
from edgekd.export._openvino_quantize import Job, quiet, settings
from edgekd.export._openvino_trained import quantized_layers
from edgekd.export._ranges import Checked
from edgekd.export.onnx import float_file

from edgekd.errors import EdgekdError, first_line
from edgekd.protocols import Component, Session
from edgekd.tuning import PLAIN


@dataclass(frozen=True)
class Controlled:
    """What the search gave: the files, the layers that it put back into float, and how often it asked for the metric."""

    files: list[Path]
    reverted: list[str]
    validations: int


def quantize_with_accuracy_control(component: Component, path: Path, *, calibration: Any, validate: Callable[[Session], float], max_drop: float,
                                   rank_on: Iterable[Any] | None = None) -> Controlled:
    """Quantize a component and put layers back into float until `validate` loses at most `max_drop` to the float model. The first settings are those of
    a plain `w8a8_static`.

    Args:
        validate: a session of a variant -> its accuracy, larger is better.
        rank_on: inputs on which quantizers are ranked by what they change in the outputs; those of `calibration` by default.

    Raises:
        UsageError: calibration inputs are none, not finite or constant.
        EdgekdError: NNCF cannot quantize it.
    """
    job, asked = Job(float_file(component), component.name, calibration), 0
    count = sum(1 for _ in Checked(calibration, component.name))
    model = read(job.source, job.where, folded=True)
    layers = operators(model, job.source)

    def metric(compiled: Any, _: Iterable[Any]) -> tuple[float, None]:
        nonlocal asked
        asked += 1
        return float(validate(export_openvino.OpenVinoSession.of(compiled))), None

    with quiet():
        import nncf
        from nncf.quantization.advanced_parameters import AdvancedAccuracyRestorerParameters

        given = settings(model, job, set(), count)
        ranked = list(rank_on if rank_on is not None else calibration)
        given["advanced_quantization_parameters"] = given.pop("advanced_parameters")
        try:
            plain = quantized_layers(nncf.quantize(model.clone(), nncf.Dataset(calibration), **settings(model, Job(job.source, job.where, calibration, PLAIN),
                                                                                                       set(), count)), layers)
            found = nncf.quantize_with_accuracy_control(
                model, nncf.Dataset(calibration), nncf.Dataset(ranked), metric, max_drop=max_drop, drop_type=nncf.DropType.ABSOLUTE,
                advanced_accuracy_restorer_parameters=AdvancedAccuracyRestorerParameters(ranking_subset_size=len(ranked), num_ranking_workers=1), **given)
        except EdgekdError:
            raise
        except Exception as e:  # nncf raises its own kinds and openvino's RuntimeError
            raise EdgekdError(f"NNCF's accuracy control failed: {first_line(e)}", where=component.name) from e
    left = set(quantized_layers(found, layers))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.stem}.", dir=path.parent) as folder:
        files = export_openvino.save(found, path, Path(folder))
    return Controlled(files, [layer for layer in plain if layer not in left], asked)
