"""8-bit constants of what stays in float: smaller files that run as before."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from edgekd.export._light import SMALLEST, lighten
from edgekd.export._openvino_light import lighten as lighten_openvino
from edgekd.export.onnx import exporter, float_file
from tiny import expected, samples
from torch import nn

from edgekd.protocols import Component


class Mixed(nn.Module):
    """(1, 16, 8, 8) -> (1, 4, 64, 40). A convolution, one of a single cell, a linear layer, and a table that is added: a transformer's attention bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.squeeze, self.last = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 64, 1), nn.Linear(64, 40)
        self.excite, self.table = nn.Conv2d(64, 16, 1), nn.Parameter(torch.randn(4, 64, 64) * torch.logspace(-2, 1, 64)[:, None])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.conv(images)
        x = x * self.excite(self.squeeze(x.mean((2, 3), keepdim=True))).sigmoid()
        tokens = x.flatten(2).reshape(1, 4, 4, 64).transpose(2, 3)
        return self.last(tokens @ tokens.transpose(2, 3) + self.table)


@pytest.fixture
def part() -> Component:
    return Component("encoder", Mixed().eval(), {"images": torch.randn(1, 16, 8, 8)}, ("y",))


def floats(file: Path) -> list[str]:
    """Large float constants of a graph."""
    return [t.name for t in onnx.load(file).graph.initializer if t.data_type == onnx.TensorProto.FLOAT and np.prod(t.dims) >= SMALLEST]


@pytest.fixture
def copy(part: Component, tmp_path: Path) -> Path:
    file = tmp_path / "copy.onnx"
    onnx.save(onnx.load(float_file(part)), file)
    return file


def test_constants_of_every_kind_become_small_and_onnxruntime_computes_them_once(copy, part):
    before, size = floats(copy), copy.stat().st_size
    assert lighten(copy, lambda node: False, large=False) == len(before) == 5
    assert not floats(copy) and copy.stat().st_size < 0.45 * size
    session, inputs = exporter.open(copy, scheme="w8a8_static", threads=1), samples(part)[0]
    got, wanted = session.run(inputs)["y"], expected(part, inputs)[0]
    assert np.abs(got - wanted).max() < 0.02 * np.abs(wanted).max()
    assert "Cast" not in session.executed_ops, session.executed_ops


def test_a_row_of_a_table_has_a_step_of_its_own(copy):
    lighten(copy, lambda node: False, large=False)
    table = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(copy).graph.initializer}["table/levels"]
    assert table.shape == (4, 64, 64) and (np.abs(table).max(2) == 127).all()


def test_what_is_to_stay_stays(copy):
    before = floats(copy)
    assert lighten(copy, lambda node: node.op_type == "Conv", large=False) == 2
    assert [name for name in before if name in floats(copy)] == [name for name in before if "conv" in name or "squeeze" in name or "excite" in name]


def test_a_bias_is_no_table(tmp_path):
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.randn(1, 1, 2048))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.relu() + self.bias

    file = tmp_path / "copy.onnx"
    onnx.save(onnx.load(float_file(Component("head", Biased().eval(), {"x": torch.randn(1, 3, 2048)}, ("y",)))), file)
    assert lighten(file, lambda node: False, large=False) == 0


def test_openvino_has_them_too(part):
    openvino = pytest.importorskip("openvino", reason='openvino is not installed: pip install "edgekd[openvino]"')
    plain = openvino.Core().read_model(str(float_file(part)))
    light, same = plain.clone(), plain.clone()
    assert lighten_openvino(light, set()) == 5
    kinds = [(op.output(0).get_element_type().get_type_name(), int(np.prod(op.output(0).get_shape()))) for op in light.get_ops() if op.get_type_name() == "Constant"]
    assert not [count for kind, count in kinds if kind == "f32" and count >= SMALLEST]
    assert sum(count >= SMALLEST for kind, count in kinds if kind == "i8") == 5
    inputs = samples(part)[0]
    got = openvino.Core().compile_model(light, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(inputs)[0]
    wanted = expected(part, inputs)[0]
    assert np.abs(got - wanted).max() < 0.02 * np.abs(wanted).max()
    kept = {op.get_friendly_name() for op in plain.get_ops() if op.get_type_name() in ("Add", "Convolution", "MatMul")}
    assert lighten_openvino(same, kept) == 0
