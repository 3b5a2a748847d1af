"""Int8 of ExecuTorch layer by layer: what is kept, which ranges are written, and what is refused. Read from the program that is lowered, and from files."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chain import NAMES, chain, photos, trained
from edgekd.export import _child
from edgekd.export._executorch_file import read
from edgekd.export._executorch_pairs import layer_of
from edgekd.export.executorch import _program, exporter
from test_export_executorch import here
from tiny import expected, linear_component

from edgekd.errors import EdgekdError, UsageError
from edgekd.models.rounding import simulated
from edgekd.protocols import Component
from edgekd.tuning import Grid, Tuning

if not exporter.availability().ok:
    pytest.skip(f"{exporter.availability().reason}: {exporter.availability().fix}", allow_module_level=True)

STATIC = "w8a8_static"


@pytest.fixture(autouse=True)
def _no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_child, "call", here)


def graph(part: Component, scheme: str = STATIC, calibration: Any = None, **tuning: Any) -> torch.fx.GraphModule:
    """The quantized graph, before it is lowered."""
    from edgekd.export._executorch_quantize import quantize

    return quantize(_program(part), scheme, photos() if calibration is None and scheme == STATIC else calibration, Tuning(**tuning))


def levels(made: torch.fx.GraphModule) -> dict[str, tuple[Any, ...]]:
    """Layer with weights in 8 bits -> (arguments of the pair at its input, the weight's arguments, arguments of the pair at its output)."""
    found = {}
    for node in (n for n in made.graph.nodes if n.target in (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default)):
        if "dequantize" in str(node.args[1].target):
            users = [u for u in node.users]
            after = users[0] if "quantize" in str(users[0].target) else next(iter(users[0].users))
            found[layer_of(node)] = (node.args[0].args[1:5], node.args[1].args, after.args[1:5])
    return found


def answer(path: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    return exporter.open(path, scheme=STATIC, threads=1).run(inputs)["image_embeddings"]


def computed(made: torch.fx.GraphModule, inputs: dict[str, np.ndarray]) -> np.ndarray:
    with torch.no_grad():
        return torch.utils._pytree.tree_leaves(made(torch.from_numpy(inputs["images"])))[0].numpy()


def error(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def test_a_kept_layer_is_float_and_its_neighbours_are_not(tmp_path):
    assert list(levels(graph(chain()))) == NAMES
    assert list(levels(graph(chain(), keep={"features.1": "fp32"}))) == ["features.0", "features.10", "last"]
    path = tmp_path / "x.pte"
    exporter.export(chain(), path, scheme=STATIC, calibration=photos(), tuning=Tuning(keep={"features.10": "fp32"}))
    found = read(path)
    assert found.inside["Conv2d:i8"] == 3 and found.inside["Conv2d:f32"] == 1 and found.precision == "int8+fp32"
    with pytest.raises(EdgekdError, match="no convolutions or linear layers to quantize"):
        graph(chain(), keep=dict.fromkeys(NAMES, "fp32"))


def test_calibration_is_looked_at_once_for_all_variants():
    class counted(photos):
        looked = 0

    class silent(photos):
        def fingerprint(self) -> None:
            return None

    for tuning in ({}, {"keep": {"features.1": "fp32"}}, {"symmetric": True}, {"granularity": "tensor"}):
        kept = graph(chain(), calibration=counted(), **tuning)
        np.testing.assert_array_equal(computed(kept, next(iter(silent()))), computed(graph(chain(), calibration=silent(), **tuning), next(iter(silent()))))
    assert counted.looked == 6, "the same photos, the same network"
    graph(chain(), calibration=counted(5))
    assert counted.looked == 11, "other photos are looked at"
    assert levels(graph(chain(), calibration=silent(1)))["features.0"] != levels(graph(chain(), calibration=silent()))["features.0"], "nothing is kept of these"


def test_options_reach_the_graph():
    plain, naive = levels(graph(chain())), levels(graph(chain(), naive=True))
    assert all(isinstance(weight[1], torch.fx.Node) for _, weight, _ in plain.values()) and any(reads[1] != 0 for reads, _, _ in plain.values())
    assert all(isinstance(weight[1], float) for _, weight, _ in levels(graph(chain(), granularity="tensor")).values())
    assert all(reads[1] == 0 for reads, _, _ in levels(graph(chain(), symmetric=True)).values())
    assert levels(graph(chain(), method="mse"))["features.0"][0][0] < plain["features.0"][0][0], "the tail is cut"
    assert naive["features.0"][0][0] == pytest.approx(levels(graph(chain(), method="mse"))["features.0"][0][0]), "the library cuts by default"
    with pytest.raises(UsageError, match="minmax or mse, not by percentile"):
        graph(chain(), method="percentile")
    with pytest.raises(UsageError, match="at run time and takes no option"):
        exporter.captured(linear_component(), "w8_dynamic", None, Tuning(method="mse"))


def test_a_bias_of_a_channel_without_weights_fits_its_bits():
    part = chain()
    part.module.features["10"].bias.data[2] = 40.0
    made = graph(part)
    reads, (_, scale, *_), _ = levels(made)["features.10"]
    counted = 40.0 / (reads[0] * getattr(made, str(scale.target)).numpy())
    assert counted[2] < 2**30 < 40.0 / (reads[0] * torch.finfo(torch.float32).eps), "as many steps of input times weight as 32 bits have room for"
    inputs = next(iter(photos()))
    assert error(computed(made, inputs), expected(part, inputs)[0]) < 0.03


@pytest.mark.parametrize("scheme", ["w8a8_qat", "w4a8_qat"])
def test_trained_ranges_are_written_as_they_are_and_compute_what_was_trained(tmp_path, scheme):
    part, grids = trained()
    path = tmp_path / "x.pte"
    exporter.export(part, path, scheme=scheme, tuning=Tuning(grids=grids))
    assert read(path).inside["Conv2d:i8"] == 4 and "Conv2d:f32" not in read(path).inside
    for name, (reads, _, writes) in levels(graph(part, scheme, grids=grids)).items():
        for (low, high), (step, zero, *_) in ((grids[name].input, reads), (grids[name].output, writes)):
            low, high = min(low, 0.0), max(high, 0.0)
            assert step == pytest.approx((high - low) / 255) and zero == round(-low / ((high - low) / 255)) - 128
    for inputs in photos(3):
        with torch.no_grad(), simulated(part.module, grids):
            rounded = part.module(torch.from_numpy(inputs["images"])).numpy()
        assert error(answer(path, inputs), rounded) < 1e-3 < error(rounded, expected(part, inputs)[0])


def test_an_output_that_integers_and_floats_read_opens(tmp_path):
    """ExecuTorch takes a dequantization that two operators share for part of an integer operator when it is for one of them."""
    class Squeezed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Conv2d(4, 4, 3, 1, 1), torch.nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x)
            return x * torch.sigmoid(self.b(x.mean((2, 3), keepdim=True)))

    torch.manual_seed(0)
    part = Component("encoder", Squeezed().eval(), {"images": torch.randn(1, 4, 8, 8)}, ("image_embeddings",))
    grids = {"a": Grid((-4.0, 4.0), (-3.0, 3.0)), "b": Grid((-1.0, 1.0), (-1.0, 1.0))}
    exporter.export(part, tmp_path / "x.pte", scheme="w8a8_qat", tuning=Tuning(grids=grids))
    inputs = {"images": np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32)}
    with torch.no_grad(), simulated(part.module, grids):
        rounded = part.module(torch.from_numpy(inputs["images"])).numpy()
    assert error(answer(tmp_path / "x.pte", inputs), rounded) < 5e-3


def test_layers_without_trained_ranges_stay_in_float():
    part, grids = trained()
    assert list(levels(graph(part, "w8a8_qat", grids={"features.0": grids["features.0"], "last": Grid(grids["last"].input, None)}))) == ["features.0"]
    with pytest.raises(EdgekdError, match="no layers with trained ranges"):
        graph(part, "w8a8_qat", grids={"other": grids["last"]})


def test_inputs_that_say_nothing_are_refused():
    def images(value: float) -> list[dict[str, np.ndarray]]:
        return [{"images": np.full((1, 4, 8, 8), value + i, np.float32)} for i in range(2)]

    with pytest.raises(UsageError, match="are constant"):
        graph(chain(), calibration=images(0))
    with pytest.raises(UsageError, match="'images' holds NaN or infinity"):
        graph(chain(), calibration=images(float("nan")))
    with pytest.raises(UsageError, match="are empty"):
        graph(chain(), calibration=[])
    part = chain()
    part.module.features["10"].weight.data[0] = float("nan")
    for method in ("minmax", "mse"):
        with pytest.raises(EdgekdError, match=r"NaN or infinite on the calibration inputs, first in features\.10"):
            graph(part, method=method)
