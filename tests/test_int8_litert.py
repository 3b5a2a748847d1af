"""Int8 of LiteRT layer by layer: what is kept, which ranges are written, and what is refused. Read back from the files."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chain import NAMES, chain, photos, trained
from edgekd.export._litert_graph import Graph
from edgekd.export.litert import exporter, float_file
from test_export_litert import error, needs_litert
from tiny import expected, linear_component

from edgekd.errors import EdgekdError, UsageError
from edgekd.models.rounding import simulated
from edgekd.protocols import Component
from edgekd.tuning import Grid, Tuning

pytestmark = needs_litert


def written(part: Component, folder: Path, scheme: str = "w8a8_static", calibration: Any = None, **tuning: Any) -> Path:
    path = folder / "x.tflite"
    exporter.export(part, path, scheme=scheme, calibration=photos() if calibration is None and scheme.endswith("_static") else calibration,
                    tuning=Tuning(**tuning))
    return path


def types(path: Path) -> dict[str, str]:
    """Layer -> the type that its operator writes."""
    graph = Graph(str(path))
    return {str(graph.layer(i)): graph.types(i)[1][0] for i in graph.arithmetic}


def levels(path: Path) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """Layer -> (steps, zeros) of its input, weight and output."""
    graph = Graph(str(path))
    found = {}
    for i in graph.arithmetic:
        operator = graph._operators[i]
        tensors = [graph._graph.tensors[int(t)].quantization for t in (*operator.inputs[:2], operator.outputs[0])]
        found[str(graph.layer(i))] = [(t.scale, t.zeroPoint) for t in tensors]
    return found


def answer(path: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    return exporter.open(path, scheme="w8a8_static", threads=1).run(inputs)["image_embeddings"]


def test_a_kept_layer_is_float_and_its_neighbours_are_not(tmp_path):
    assert types(float_file(chain())) == dict.fromkeys(NAMES, "float32"), "every layer is found under its own name"
    assert types(written(chain(), tmp_path)) == dict.fromkeys(NAMES, "int8")
    for kept in ("features.1", "features.10"):
        path = written(chain(), tmp_path, keep={kept: "fp32"})
        assert types(path) == dict.fromkeys(NAMES, "int8") | {kept: "float32"}
        assert exporter.open(path, scheme="w8a8_static").executed_precision == "int8+fp32"
    with pytest.raises(EdgekdError, match="every layer that w8a8_static works on is kept"):
        written(chain(), tmp_path, keep=dict.fromkeys(NAMES, "fp32"))


def test_calibration_is_looked_at_once_for_all_variants(tmp_path):
    class counted(photos):
        looked = 0

    first = answer(written(chain(), tmp_path, calibration=counted()), next(iter(photos())))
    assert counted.looked == 6
    written(chain(), tmp_path, calibration=counted(), keep={"last": "fp32"})
    np.testing.assert_array_equal(answer(written(chain(), tmp_path, calibration=counted()), next(iter(photos()))), first)
    assert counted.looked == 6, "the same photos, the same network"
    written(chain(), tmp_path, calibration=counted(5))
    assert counted.looked == 11, "other photos are looked at"


def test_options_reach_the_file(tmp_path):
    plain = levels(written(chain(), tmp_path))
    assert all(len(weight[0]) == 4 for _, weight, _ in plain.values()) and any(int(zero[0]) for (_, zero), _, _ in plain.values())
    assert all(len(weight[0]) == 1 for _, weight, _ in levels(written(chain(), tmp_path, granularity="tensor")).values())
    assert all(not int(zero[0]) for (_, zero), _, _ in levels(written(chain(), tmp_path, symmetric=True)).values())
    naive = levels(written(chain(), tmp_path, naive=True))
    assert float(naive["features.0"][0][0][0]) < 0.9 * float(plain["features.0"][0][0][0]), "a moving average forgets the extremes"
    with pytest.raises(UsageError, match="no choice between symmetric and asymmetric"):
        written(chain(), tmp_path, "w8_dynamic", symmetric=True)


def test_a_bias_of_a_channel_without_weights_survives(tmp_path):
    """The library alone writes 0 for it: a bias has 32 bits, in steps of input times weight."""
    inputs = next(iter(photos()))
    wanted = expected(chain(), inputs)[0]
    assert error(answer(written(chain(), tmp_path), inputs), wanted) < 0.03
    assert error(answer(written(chain(), tmp_path, granularity="tensor"), inputs), wanted) < 0.03


@pytest.mark.parametrize(("scheme", "twice"), [("w8a8_qat", True), ("w4a8_qat", False)])
def test_trained_ranges_are_written_as_they_are_and_compute_what_was_trained(tmp_path, scheme, twice):
    part, grids = trained(twice=twice)
    path = written(part, tmp_path, scheme, grids=grids)
    for name, (reads, weight, writes) in levels(path).items():
        for (low, high), (step, zero) in ((grids[name].input, reads), (grids[name].output, writes)):
            low, high = min(low, 0.0), max(high, 0.0)
            assert float(step[0]) == pytest.approx((high - low) / 255, rel=1e-6) and int(zero[0]) == round(-low / ((high - low) / 255)) - 128
        assert len(weight[0]) == 4
    for inputs in photos(3):
        with torch.no_grad(), simulated(part.module, grids):
            rounded = part.module(torch.from_numpy(inputs["images"])).numpy()
        assert error(answer(path, inputs), rounded) < 1e-3 < error(rounded, expected(part, inputs)[0])


def test_layers_without_trained_ranges_stay_in_float(tmp_path):
    part, grids = trained()
    some = {"features.0": grids["features.0"], "last": Grid(grids["last"].input, None)}
    assert types(written(part, tmp_path, "w8a8_qat", grids=some)) == dict.fromkeys(NAMES, "float32") | {"features.0": "int8"}
    with pytest.raises(EdgekdError, match="no layer of the graph has trained ranges"):
        written(part, tmp_path, "w8a8_qat", grids={"other": grids["last"]})


def test_a_number_multiplied_into_a_layer_moves_its_range(tmp_path):
    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.project(x) * 0.25)

    part = Component("head", Scaled().eval(), {"x": torch.randn(1, 8)}, ("y",))
    ((_, _, (step, _)),) = levels(written(part, tmp_path, "w8a8_qat", grids={"project": Grid((-2.0, 2.0), (-3.0, 5.0))})).values()
    assert float(step[0]) == pytest.approx(0.25 * 8 / 255, rel=1e-5)


def test_inputs_that_say_nothing_are_refused(tmp_path):
    def images(value: float) -> list[dict[str, np.ndarray]]:
        return [{"images": np.full((1, 4, 8, 8), value + i, np.float32)} for i in range(2)]

    with pytest.raises(UsageError, match="are constant"):
        written(chain(), tmp_path, calibration=images(0))
    with pytest.raises(UsageError, match="'images' holds NaN or infinity"):
        written(chain(), tmp_path, calibration=images(float("nan")))
    with pytest.raises(UsageError, match="lacks 'images'"):
        written(chain(), tmp_path, calibration=[{"x": np.zeros(3)}])
    part = chain()
    part.module.last.weight.data[0] = float("nan")
    with pytest.raises(EdgekdError, match="NaN or infinite on the calibration inputs, first in last"):
        written(part, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_kept_linear_layer_of_a_dynamic_scheme_is_float(tmp_path):
    part = linear_component(64).fixed() if linear_component(64).lengths else Component("head", linear_component(64).module, {"x": torch.randn(3, 64)}, ("y",))
    assert types(written(part, tmp_path, "w8_dynamic", keep={"0": "fp32"})).keys() == {"0", "2"}
    operators = exporter.open(tmp_path / "x.tflite", scheme="w8_dynamic").executed_ops
    assert operators["FULLY_CONNECTED:i8"] == 1 and operators["FULLY_CONNECTED:f32"] == 1
