"""Int8 for TensorRT by NVIDIA's Model Optimizer, in an environment of its own."""
from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from edgekd.export import _envs, _modelopt, _modelopt_child
from edgekd.export import _tensorrt_graph as graphs
from edgekd.export.onnx import float_file
from edgekd.export.tensorrt import exporter
from tiny import conv_component, expected, samples, tiny_sam
from torch import nn

from edgekd import plugins, schemes
from edgekd.errors import EdgekdError, UsageError
from edgekd.models.sam import components
from edgekd.protocols import Component
from edgekd.tuning import Tuning

PYTHON = _envs.python_of(_modelopt.NAME)
installed = pytest.mark.skipif(PYTHON is None, reason=f"NVIDIA's Model Optimizer has no environment here: {_envs.command(_modelopt.NAME)} (2.1 GB)")
TOLD = Tuning(quantizer="modelopt")


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGEKD_HOME", str(tmp_path / "home"))


def test_where_it_is_not_installed_the_command_is_told(without, tmp_path):
    part = conv_component()
    with pytest.raises(EdgekdError, match="not installed") as e:
        exporter.export(part, tmp_path / "out" / "encoder.onnx", scheme="w8a8_static", calibration=samples(part), tuning=TOLD)
    assert e.value.hint == "edgekd doctor --install modelopt" and not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(("tuning", "said"), [(Tuning(quantizer="modelopt", method="mse"), "mse"), (Tuning(quantizer="modelopt", granularity="tensor"), "granularity")])
def test_options_that_it_does_not_have_are_wrong_usage(tmp_path, tuning, said):
    part = conv_component()
    with pytest.raises(UsageError, match=said):
        exporter.export(part, tmp_path / "encoder.onnx", scheme="w8a8_static", calibration=samples(part), tuning=tuning)


@pytest.mark.parametrize("format", ["onnx", "openvino", "litert"])
def test_it_is_of_tensorrt_alone(format):
    with pytest.raises(UsageError, match="modelopt"):
        schemes.refuse(plugins.exporter(format), schemes.parse("w8a8_static[modelopt]"))
    schemes.refuse(plugins.exporter("tensorrt"), schemes.parse("w8a8_static[modelopt]"))


def test_its_reader_tells_samples_in_order_again_and_again(tmp_path):
    for i in range(3):
        np.savez(tmp_path / f"{i:06d}.npz", x=np.full((1, 2), i, np.float32))
    reader = _modelopt_child.Reader(sorted(tmp_path.glob("*.npz")))
    for _ in range(2):
        assert [int(sample["x"][0, 0]) for sample in iter(reader.get_next, None)] == [0, 1, 2] and reader.get_next() is None
        reader.rewind()
    assert int(reader.get_first()["x"][0, 0]) == 0


def test_the_child_needs_nothing_of_edgekd():
    code = f"import sys; sys.path.insert(0, {str(_modelopt.CHILD.parent)!r}); import _modelopt_child; assert not [m for m in sys.modules if m.startswith('edgekd')]"
    subprocess.run([sys.executable, "-I", "-c", code], check=True, timeout=60)


@installed
@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_what_it_writes_is_what_tensorrt_takes(tmp_path, name):
    part = components(tiny_sam())[name]
    inputs = samples(part, 3)
    for one in inputs if name == "decoder" else []:
        one["point_labels"] = np.ones_like(one["point_labels"])
    path = tmp_path / f"{name}.onnx"
    exporter.export(part, path, scheme="w8a8_static", calibration=inputs, tuning=TOLD)
    assert graphs.inside(path).precision.startswith("int8")
    again = exporter.stand_in(path, scheme="w8a8_static", threads=1)
    assert again is not None
    got, wanted = again.run(inputs[0]), expected(part, inputs[0])
    for ours, theirs in zip(got.values(), wanted, strict=True):
        assert np.abs(ours - theirs).max() < 0.3 * np.abs(theirs).max()


@installed
def test_kept_layers_have_no_quantizers(tmp_path):
    module = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1)).eval()
    part = Component("encoder", module, {"images": torch.randn(1, 32, 16, 16)}, ("y",))

    def quantized(**changed: Any) -> list[bool]:
        """Of each convolution, whether it reads quantized weights."""
        file = _modelopt.quantize(float_file(part), tmp_path / "x.onnx", samples(part), replace(TOLD, **changed), where="encoder")
        graph = onnx.load(file).graph
        made = {t: n.op_type for n in graph.node for t in n.output}
        return [made.get(n.input[1]) == "DequantizeLinear" for n in graph.node if n.op_type == "Conv"]

    assert quantized() == [True, True] and quantized(method="entropy") == [True, True]
    assert quantized(keep={"0": "fp32"}) == [False, True]
