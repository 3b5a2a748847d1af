"""RKNN: built by the vendor's toolkit in its own environment, described by the file itself, gated on the vendor's simulator."""
from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from edgekd.export import _child, _envs, _rknn, _rknn_child
from edgekd.export import rknn as export_rknn
from edgekd.export.rknn import exporter
from tiny import conv_component, expected, linear_component, samples, tiny_sam
from torch import nn

from edgekd import plugins, target
from edgekd.errors import EdgekdError, UsageError
from edgekd.exporting import export_model
from edgekd.models.fold import fold
from edgekd.models.sam import components
from edgekd.protocols import Component

PYTHON = _envs.python_of("rknn")
toolkit = pytest.mark.skipif(PYTHON is None, reason=f"rknn-toolkit2 has no environment here: {_envs.command('rknn')} (5.7 GB)")

TABLE = """
[1;33mW[0m [1;33mload_onnx: The config.mean_values is None, zeros will be set for input 0![0m
D RKNN: [23:31:12.821] ID   OpType             DataType Target InputShape                   OutputShape     Cycles(DDR/NPU/Total)    RW(KB)       FullName
D RKNN: [23:31:12.821] 0    InputOperator      FLOAT16  CPU    \\                            (1,3,64,64)     0/0/0                    0            InputOperator:images
D RKNN: [23:31:12.821] 1    ConvExGelu         INT8     NPU    (1,3,64,64),(8,3,3,3),(8)    (1,8,32,32)     1784/9216/9216           25           Conv:/stem/stem.0/Conv
D RKNN: [23:31:12.821] 2    Conv               INT8     NPU    (1,8,32,32),(8,8,1,1)        (1,8,32,32)     1/1/1                    2            Conv:/b
D RKNN: [23:31:12.821] 3    exMatMul           FLOAT16  NPU    (1,8,32),(1,32,8)            (1,8,8)         0/0/0                    2            MatMul:/c
D RKNN: [23:31:12.821] 4    Cast               INT8     CPU    (1,8,8)                      (1,8,8)         0/0/0                    2            Cast:/d
D RKNN: [23:31:12.822] ID  User           Tensor                          DataType  DataFormat   OrigShape    NativeShape   |     [Start       End)       Size
"""


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing of a test stays in the user's folder."""
    monkeypatch.setattr(_rknn, "store", lambda: tmp_path / "store")
    return tmp_path / "store"


def file_like(path: Path, **changed: object) -> Path:
    """A file with the description that the toolkit writes at the end, and no network."""
    tensor = {"dim_num": 4, "dtype": {"vx_type": "float16", "qnt_type": "none"}}
    about = {"connection": [], "graph": [{"left": "input", "right_tensor_id": 0}, {"left": "output", "right_tensor_id": 1}],
             "norm_tensor": [{**tensor, "tensor_id": 0, "url": "images", "size": [1, 3, 16, 16]},
                             {**tensor, "tensor_id": 1, "url": "image_embeddings", "size": [1, 4, 8, 8]}],
             "target_platform": ["rk3588"], "version": "2.5.0", **changed}
    path.write_bytes(b"RKNN" + b"\xff\x00{" * 40 + json.dumps(about, separators=(",", ":")).encode())
    return path


def test_availability_is_told_by_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_envs, "python_of", lambda name: None)
    found = exporter.availability()
    assert not found.ok and not found.runs and found.fix == "edgekd doctor --install rknn" and "5.7 GB" in (found.reason or "")
    with pytest.raises(EdgekdError, match="not installed") as e:
        exporter.export(conv_component(), Path("never.rknn"), scheme="fp16")
    assert e.value.hint == found.fix and not Path("never.rknn").exists()
    monkeypatch.setattr(_envs, "python_of", lambda name: Path(sys.executable))
    found = exporter.availability()
    assert found.ok and not found.runs and found.version == "rknn-toolkit2 2.5.0" and "NPU" in (found.reason or "")


def test_the_target_takes_what_the_exporter_writes() -> None:
    device = target.resolve("rockchip")
    assert device.name == "rk3588" == export_rknn.PLATFORM and next(iter(device.runs)) == "rknn"
    assert device.runs["rknn"] == list(plugins.exporter("rknn").schemes)


def test_it_cannot_be_opened_here() -> None:
    with pytest.raises(EdgekdError, match="NPU only"):
        exporter.open(Path("x.rknn"), scheme="fp16")


def test_a_file_describes_itself(tmp_path: Path) -> None:
    about = _rknn.describe(file_like(tmp_path / "x.rknn"))
    assert about["inputs"] == {"images": ((1, 3, 16, 16), "float16")} and about["outputs"] == {"image_embeddings": ((1, 4, 8, 8), "float16")}
    for content in (b"", b"RKNN", b"RKNN" + b'{"connection":[}', b"ONNX" + file_like(tmp_path / "y.rknn").read_bytes()[4:]):
        (tmp_path / "z.rknn").write_bytes(content)
        with pytest.raises(EdgekdError, match="no RKNN file"):
            _rknn.describe(tmp_path / "z.rknn")


@pytest.mark.parametrize(("changed", "said"), [
    ({"target_platform": ["rk3566"]}, "for rk3566, not for rk3588"),
    ({"graph": [{"left": "input", "right_tensor_id": 0}, {"left": "output", "right_tensor_id": 0}]}, "lacks outputs.*image_embeddings"),
    ({"graph": [{"left": "input", "right_tensor_id": 1}, {"left": "output", "right_tensor_id": 1}]}, "input image_embeddings .* none of the component's"),
])
def test_a_file_that_is_not_the_components_fails_the_check(changed: dict[str, object], said: str, tmp_path: Path) -> None:
    assert exporter.check(conv_component(), file_like(tmp_path / "good.rknn"), scheme="fp16").state == "built"
    with pytest.raises(EdgekdError, match=said):
        exporter.check(conv_component(), file_like(tmp_path / "x.rknn", **changed), scheme="fp16")


def test_the_compilers_list_is_read(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text(TABLE.replace("\n", "\r\n"))
    rows = [found.groupdict() for line in _rknn_child._lines(log) if (found := _rknn_child.ROW.match(line))]
    (tmp_path / "report.json").write_text(json.dumps({"layers": rows}))
    listed = _rknn.layers(tmp_path)
    assert _rknn.operators(listed) == {"ConvExGelu:i8": 1, "Conv:i8": 1, "exMatMul:fp16": 1, "Cast:bool": 1}
    assert _rknn.precision(listed) == "int8+fp16" and [layer["kind"] for layer in listed if layer["target"] != "NPU"] == ["Cast"]


def test_the_toolkits_own_reason_is_found(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("I Loading: 1\r I Loading: 2\n[1;31mE[0m [1;31mrknn-toolkit2 version: 2.5.0[0m\n[1;31mE[0m [1;31mbuild: the op Foo is not supported![0m\nI done\n")
    with pytest.raises(RuntimeError, match="build: E build: the op Foo is not supported!"):
        _rknn_child._did(-1, "build", log)


def test_what_a_file_was_built_from_belongs_to_it_alone(tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_rknn, "KEPT", 2)
    files = []
    for number in range(3):
        material = tmp_path / f"material{number}"
        material.mkdir()
        (material / "model.onnx").write_text(str(number))
        files.append(file_like(tmp_path / f"{number}.rknn", version=str(number)))
        _rknn.keep(files[-1], material, {"layers": []})
        time.sleep(0.02)
    kept = [_rknn.material_of(f) for f in files]
    assert kept[0] is None and [(k / "model.onnx").read_text() for k in kept[1:] if k] == ["1", "2"] and len(list(store.iterdir())) == 2
    monkeypatch.setattr(_envs, "python_of", lambda name: Path(sys.executable))
    assert exporter.stand_in(files[0], scheme="fp16") is None
    files[2].write_bytes(files[2].read_bytes() + b" ")
    assert _rknn.material_of(files[2]) is None, "a file that was changed is another file"


def test_calibration_is_written_in_the_order_of_the_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_rknn, "SAMPLES", 2)
    given = [{"b": np.full((1, 2), i, np.float32), "a": np.full((1, 3), -i, np.float32)} for i in range(5)]
    lines = Path(export_rknn._dataset(iter(given), ["a", "b"], tmp_path)).read_text().splitlines()
    assert len(lines) == 2 and [np.load(f).tolist() for f in lines[1].split()] == [[[-1.0] * 3], [[1.0] * 2]]
    with pytest.raises(UsageError, match="no calibration inputs"):
        export_rknn._dataset([], ["a"], tmp_path)


class NoSuch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x)


def test_capturing_keeps_names_and_stays_off_stdout(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    part = components(fold(tiny_sam()))["decoder"].fixed()
    assert export_rknn._capture(part, tmp_path / "model.onnx") == list(part.example)
    with pytest.raises(EdgekdError, match=r"older exporter.*bessel_j0"):
        export_rknn._capture(Component("odd", NoSuch().eval(), {"x": torch.randn(1, 3)}, ("y",)), tmp_path / "odd.onnx")
    assert capfd.readouterr().out == ""


def test_training_mode_unknown_scheme_and_missing_calibration_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = conv_component()
    with pytest.raises(UsageError) as e:
        exporter.export(part, tmp_path / "x.rknn", scheme="fp-16")
    assert "fp16" in (e.value.hint or "")
    with pytest.raises(UsageError, match="calibration images"):
        exporter.export(part, tmp_path / "x.rknn", scheme="w8a8_static")
    monkeypatch.setattr(_envs, "python_of", lambda name: Path(sys.executable))
    part.module.train()
    with pytest.raises(EdgekdError, match="training mode"):
        exporter.export(part, tmp_path / "x.rknn", scheme="fp16")
    assert not list(tmp_path.iterdir())


def test_a_toolkit_that_is_not_where_it_should_be_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This interpreter has no module rknn: the child's failure is told by both ways into it, and nothing is left."""
    monkeypatch.setattr(_envs, "python_of", lambda name: Path(sys.executable))
    with pytest.raises(EdgekdError, match="rknn-toolkit2: No module named 'rknn'"):
        exporter.export(conv_component(), tmp_path / "out" / "x.rknn", scheme="fp16")
    assert not list((tmp_path / "out").iterdir())
    path, material = file_like(tmp_path / "y.rknn"), tmp_path / "material"
    material.mkdir()
    _rknn.keep(path, material, {"layers": []})
    with pytest.raises(EdgekdError, match="simulator: No module named 'rknn'"):
        exporter.stand_in(path, scheme="fp16")


@toolkit
@pytest.mark.parametrize(("scheme", "most", "precision"), [("fp16", 5e-3, "fp16"), ("w8a8_static", 0.1, "int8")])
def test_an_encoder_in_the_simulator_is_the_model(scheme: str, most: float, precision: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    part, path = components(fold(tiny_sam()))["encoder"], tmp_path / "out" / "encoder.rknn"
    assert exporter.export(part, path, scheme=scheme, calibration=samples(part, 8)) == [path] and list(path.parent.iterdir()) == [path]
    found = exporter.check(part, path, scheme=scheme)
    assert found.state == "built" and found.precision == precision and found.details["layers"] > 5 and not found.details["not_on_the_npu"]
    assert any(op.startswith("Conv") and op.endswith(":i8" if precision == "int8" else ":fp16") for op in found.ops)
    session = exporter.stand_in(path, scheme=scheme, threads=1)
    assert isinstance(session, _rknn.SimulatorSession) and [(p.name, p.shape, p.dtype) for p in session.inputs] == [("images", (1, 3, 64, 64), "float32")]
    for inputs in samples(part, 2, seed=7):
        ours, theirs = session.run(inputs)["image_embeddings"], expected(part, inputs)[0]
        gap = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        assert 1e-5 < gap < most, "exactly torch's numbers would not come from an NPU"
    with pytest.raises(EdgekdError, match=r"\[1, 3, 64, 64\].*\[1, 3, 8, 8\]"):
        session.run({"images": np.zeros((1, 3, 8, 8), np.float32)})
    child = session._child
    session._end()
    assert child.poll() is not None and capfd.readouterr().out == ""


@toolkit
def test_a_whole_model_passes_the_gate_on_the_simulator(tmp_path: Path) -> None:
    manifest = export_model(tiny_sam(2), tmp_path / "art", format="rknn", scheme="fp16", threads=1)
    for part in manifest.components.values():
        assert part.state == "built" and part.parity["passed"] and "simulator" in (part.stand_in or "") and part.executed_precision == "fp16"
    decoder = manifest.components["decoder"]
    assert decoder.fixed == {"prompts": 1, "points": 6} and decoder.findings["not_on_the_npu"] and "not run" in manifest.checked


@toolkit
def test_what_the_toolkit_refuses_is_told_in_its_words(tmp_path: Path) -> None:
    (tmp_path / "material").mkdir()
    (tmp_path / "material" / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(EdgekdError, match="rknn-toolkit2: ") as e:
        _child.call(f"{_rknn.CHILD}:convert", {"material": str(tmp_path / "material"), "output": str(tmp_path / "x.rknn"), "platform": "rk3588", "dataset": None},
                    minutes=5, what="rknn-toolkit2", python=PYTHON)
    assert "it said nothing" not in e.value.what and not (tmp_path / "x.rknn").exists()
    with pytest.raises(EdgekdError, match="vax"):
        _child.call(f"{_rknn.CHILD}:convert", {"material": str(tmp_path / "material"), "output": str(tmp_path / "x.rknn"), "platform": "vax", "dataset": None},
                    minutes=5, what="rknn-toolkit2", python=PYTHON)


@toolkit
def test_several_inputs_keep_their_order(tmp_path: Path) -> None:
    part = linear_component()
    fixed = Component(part.name, part.module, {"x": torch.randn(1, 8)}, part.outputs)
    path = tmp_path / "head.rknn"
    exporter.export(fixed, path, scheme="fp16")
    session, inputs = exporter.stand_in(path, scheme="fp16", threads=1), samples(fixed)[0]
    assert session is not None
    np.testing.assert_allclose(session.run(inputs)["y"], expected(fixed, inputs)[0], atol=5e-3)


def test_the_child_needs_nothing_of_edgekd() -> None:
    code = f"import runpy, sys; sys.modules['edgekd'] = None; runpy.run_path({str(_rknn.CHILD)!r}, run_name='child')"
    assert subprocess.run([sys.executable, "-I", "-c", code], check=False).returncode == 0
