"""The format for Qualcomm's NPU: written and compiled for real, run in the vendor's simulator. Nothing here ran on a chip."""
from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from edgekd.export import qnn
from edgekd.export._qnn_quantize import multiplications, without_pictures
from edgekd.export._qnn_simulator import Simulator
from edgekd.export.qnn import OnCpu, QnnExporter, exporter, precision
from PIL import Image
from tiny import conv_component, expected, linear_component, samples, tiny_sam
from torch import Tensor, nn

from edgekd.artifact import Manifest
from edgekd.errors import CannotTake, EdgekdError, UsageError
from edgekd.exporting import export_model
from edgekd.models.sam import components
from edgekd.protocols import Component
from edgekd.tasks.promptable.predict import predict_file

CONSUMER = Path(__file__).resolve().parents[1] / "examples/consumers/qnn_click.py"


@pytest.fixture
def toolchain() -> None:
    found = exporter.availability()
    if not found.ok:
        pytest.skip(f"{found.reason}: {found.fix}")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """The small convolutional component in every scheme."""
    found = exporter.availability()
    if not found.ok:
        pytest.skip(f"{found.reason}: {found.fix}")
    folder, part = tmp_path_factory.mktemp("qnn"), conv_component()
    paths = {scheme: folder / scheme / "encoder.qnn.onnx" for scheme in exporter.schemes}
    for scheme, path in paths.items():
        files = exporter.export(part, path, scheme=scheme, calibration=samples(part, 4))
        assert files == [path, path.with_name("encoder.htp75.onnx"), path.with_name("encoder.htp75_qnn.bin")] == exporter.files(path)
        assert sorted(path.parent.iterdir()) == sorted(files), "nothing else is left"
    yield paths


def test_availability_needs_the_package_and_says_that_nothing_runs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qnn.platform, "system", lambda: "Linux")
    monkeypatch.setattr(qnn.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(qnn, "package_version", lambda name: None if name == "onnxruntime-qnn" else "1")
    found = exporter.availability()
    assert not found.ok and not found.runs and "onnxruntime-qnn" in (found.reason or "") and found.fix == 'pip install "edgekd[qnn]"'
    monkeypatch.setattr(qnn, "package_version", lambda name: "9.9")
    found = exporter.availability()
    assert found.ok and not found.runs and found.version == "onnxruntime-qnn 9.9" and "Snapdragon" in (found.reason or "")
    monkeypatch.setattr(qnn.platform, "machine", lambda: "aarch64")
    found = exporter.availability()
    assert not found.ok and "aarch64" in (found.reason or "") and "Linux x86-64" in (found.fix or "")


@pytest.mark.parametrize(("scheme", "least", "most"), [("fp16", 1e-5, 5e-3), ("w8a8_static", 1e-4, 0.1), ("w8a16_static", 1e-4, 0.02)])
def test_the_simulator_computes_the_component_in_the_precision_asked_for(written: dict[str, Path], scheme: str, least: float, most: float) -> None:
    part = conv_component()
    session = exporter.stand_in(written[scheme], scheme=scheme)
    assert isinstance(session, Simulator) and "simulator" in session.stand_in_for
    assert [(p.name, p.shape, p.dtype) for p in session.inputs] == [("images", (1, 3, 16, 16), "float32")]
    for inputs in samples(part, 2):
        found = session.run(inputs | {"unused": np.zeros(3)})
        wanted = expected(part, inputs)[0]
        assert set(found) == {"image_embeddings"} and found["image_embeddings"].shape == wanted.shape
        assert least < np.linalg.norm(found["image_embeddings"] - wanted) / np.linalg.norm(wanted) < most, "neither exact fp32 nor far off"


@pytest.mark.parametrize(("scheme", "name", "kind"), [("fp16", "fp16", "f16"), ("w8a8_static", "int8", "u8"), ("w8a16_static", "int16", "u16")])
def test_a_check_tells_precision_and_what_the_cpu_keeps(written: dict[str, Path], scheme: str, name: str, kind: str) -> None:
    found = exporter.check(conv_component(), written[scheme], scheme=scheme)
    assert found.state == "built" and found.precision == name and found.ops[f"Conv2d:{kind}"] == 2
    assert found.details["nodes_on_htp"] >= 2 and found.details["partitions"] == 1
    kept = {} if scheme == "fp16" else {"QuantizeLinear": 1, "DequantizeLinear": 1}
    assert found.details["nodes_on_cpu"] == kept and len(found.details["names_on_cpu"]) == sum(kept.values())
    assert f"{sum(kept.values())} of {found.details['nodes_on_htp'] + sum(kept.values())} nodes left on the CPU" in found.how and "HTP v75" in found.how


class Unusual(nn.Module):
    """A convolution, then what no NPU has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).det()


def test_what_the_npu_lacks_is_named(toolchain: None, tmp_path: Path) -> None:
    part = Component("encoder", Unusual().eval(), {"images": conv_component().example["images"]}, ("y",))
    path = tmp_path / "x.qnn.onnx"
    exporter.export(part, path, scheme="w8a16_static", calibration=samples(part))
    found = exporter.check(part, path, scheme="w8a16_static")
    assert found.details["nodes_on_cpu"]["Det"] == 1 and " Det" in found.how


def test_another_chip_another_file(toolchain: None, tmp_path: Path) -> None:
    part = conv_component()
    other = QnnExporter(htp_arch=73, soc_model=43)
    files = other.export(part, tmp_path / "encoder.qnn.onnx", scheme="fp16", calibration=samples(part))
    assert [f.name for f in files] == ["encoder.qnn.onnx", "encoder.htp73.onnx", "encoder.htp73_qnn.bin"]
    assert "HTP v73, SoC 43" in other.check(part, files[0], scheme="fp16").how


def test_damaged_and_missing_files_are_refused(written: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(EdgekdError, match="missing or damaged"):
        exporter.check(conv_component(), tmp_path / "encoder.qnn.onnx", scheme="fp16")
    (tmp_path / "encoder.htp75.onnx").write_bytes(written["fp16"].with_name("encoder.htp75.onnx").read_bytes())
    (tmp_path / "encoder.htp75_qnn.bin").write_bytes(b"not a binary")
    with pytest.raises(EdgekdError, match="QNN provider"):
        exporter.check(conv_component(), tmp_path / "encoder.qnn.onnx", scheme="fp16")
    renamed = Component("encoder", conv_component().module, conv_component().example, ("other",))
    with pytest.raises(EdgekdError, match=r"outputs \['image_embeddings'\]"):
        exporter.check(renamed, written["fp16"], scheme="fp16")


def test_a_simulator_that_dies_is_an_error_and_the_next_call_starts_another(written: dict[str, Path]) -> None:
    session = exporter.stand_in(written["fp16"], scheme="fp16")
    assert isinstance(session, Simulator)
    inputs = samples(conv_component())[0]
    first = session.run(inputs)
    assert session._child is not None
    session._child.kill()
    session._child.wait()
    np.testing.assert_array_equal(session.run(inputs)["image_embeddings"], first["image_embeddings"])
    with pytest.raises(EdgekdError, match="HTP simulator ended with exit code"):
        session.run({"images": np.zeros((1, 3, 8, 8), np.float32)})


def test_too_large_to_simulate_runs_on_the_cpu(written: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qnn, "SIMULATED", 100)
    part, inputs = conv_component(), samples(conv_component())[0]
    session = exporter.stand_in(written["w8a8_static"], scheme="w8a8_static", threads=1)
    assert isinstance(session, OnCpu) and "CPU" in session.stand_in_for
    np.testing.assert_allclose(session.run(inputs)["image_embeddings"], expected(part, inputs)[0], atol=0.1)


def test_wrong_use(tmp_path: Path, toolchain: None) -> None:
    part, path = conv_component(), tmp_path / "x.qnn.onnx"
    with pytest.raises(UsageError, match="unknown qnn scheme"):
        exporter.export(part, path, scheme="fp32", calibration=samples(part))
    with pytest.raises(UsageError, match="needs calibration images"):
        exporter.export(part, path, scheme="w8a8_static")
    with pytest.raises(CannotTake, match="varying length"):
        exporter.export(linear_component(), path, scheme="fp16", calibration=samples(linear_component()))
    with pytest.raises(EdgekdError, match="this machine has none"):
        exporter.open(path, scheme="fp16")
    assert not list(tmp_path.iterdir())


def test_values_beyond_fp16_are_refused_by_name(toolchain: None, tmp_path: Path) -> None:
    part = conv_component()
    huge = [{"images": np.full((1, 3, 16, 16), 1e6, np.float32)}]
    with pytest.raises(EdgekdError, match="leave fp16's range") as e:
        exporter.export(part, tmp_path / "x.qnn.onnx", scheme="fp16", calibration=huge)
    assert e.value.hint == "use w8a16_static" and not list(tmp_path.iterdir())


def test_prompts_stay_in_float() -> None:
    graph = onnx.load(qnn.float_file(components(tiny_sam(2))["decoder"].fixed())).graph
    kept = set(without_pictures(graph))
    kinds = {n.op_type for n in graph.node if n.name in kept}
    assert {"Equal", "Sin", "Cos"} <= kinds, "labels and position codes"
    assert not kinds & {"Conv", "ConvTranspose"} and 0 < len(kept) < len(graph.node) / 2


def test_multiplications_are_counted() -> None:
    part = conv_component()  # 3 -> 8 channels of 3 x 3 on 8 x 8 pixels, then 8 -> 4 of 1 x 1
    model = onnx.shape_inference.infer_shapes(onnx.load(qnn.float_file(part)))
    assert multiplications(model.graph) == 8 * 8 * (8 * 27 + 4 * 8)


def test_precision_is_that_of_arithmetic() -> None:
    assert precision({"Conv2d:u8": 3, "Gelu:f16": 9, "FullyConnected:f16": 1}) == "int8+fp16"
    assert precision({"Conv2d:u16": 3, "Reshape:u8": 2}) == "int16" and precision({"Gelu:f16": 1}) == "fp16"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_sam in fp16, its parity computed by the simulator."""
    found = exporter.availability()
    if not found.ok:
        pytest.skip(f"{found.reason}: {found.fix}")
    folder = tmp_path_factory.mktemp("artifact") / "qnn"
    export_model(tiny_sam(2), folder, format="qnn", scheme="fp16", threads=1)
    return folder


def test_an_artifact_says_that_it_was_built_and_simulated(artifact: Path) -> None:
    manifest = Manifest.load(artifact)
    assert not manifest.ran_here and "simulator" in manifest.checked and "0 of" in manifest.checked
    for part in manifest.components.values():
        assert part.state == "built" and part.executed_precision == "fp16" and len(part.files) == 3 and part.parity["passed"]
    assert manifest.components["decoder"].fixed == {"prompts": 1, "points": 6}


def test_the_example_segments_without_edgekd_what_the_model_does(artifact: Path, photos: Path, tmp_path: Path) -> None:
    photo = photos / "dogs_at_door.jpg"
    model = tiny_sam(2)
    for click in ((50, 40), (400, 800)):
        wanted = predict_file(model, photo, tmp_path / "expected.png", points=[click]).mask
        code = "import runpy, sys; sys.modules['edgekd'] = sys.modules['torch'] = None; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
        done = subprocess.run([sys.executable, "-I", "-c", code, str(CONSUMER), str(artifact), str(photo), f"{click[0]},{click[1]}", str(tmp_path / "m.png")],
                              capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout.splitlines()[0])  # the vendor's library says a line of its own at the end
        mask = np.asarray(Image.open(tmp_path / "m.png")) > 127
        assert mask.shape == wanted.shape and told["share"] == pytest.approx(mask.mean(), abs=1e-3) and 0.2 < mask.mean() < 0.8
        assert (mask & wanted).sum() / (mask | wanted).sum() >= 0.98
