"""ncnn: what it writes equals the model on its own runtime; what it cannot hold is refused with the reason and leaves nothing behind."""
from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from edgekd.export import _child, _ncnn
from edgekd.export import ncnn as export_ncnn
from edgekd.export.ncnn import exporter, overflowing
from tiny import conv_component, expected, linear_component, samples, tiny_sam
from torch import nn

from edgekd import students
from edgekd.errors import CannotTake, EdgekdError, UsageError
from edgekd.exporting import export_model
from edgekd.models.fold import fold
from edgekd.models.sam import components
from edgekd.protocols import Component

if not exporter.availability().ok:
    pytest.skip(f'{exporter.availability().reason}: pip install "edgekd[ncnn]"', allow_module_level=True)


def written(component: Component, folder: Path, scheme: str = "fp32", **options: object) -> Path:
    path = folder / f"{component.name}.ncnn.param"
    assert exporter.export(component, path, scheme=scheme, **options) == [path, folder / f"{component.name}.ncnn.bin"]  # type: ignore[arg-type]
    return path


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    assert ours.shape == theirs.shape
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.fixture(scope="module")
def encoder() -> Component:
    return components(fold(tiny_sam()))["encoder"]


@pytest.fixture(scope="module")
def made(encoder: Component, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """scheme -> the .param of the tiny encoder."""
    shown = samples(encoder, 2)
    return {scheme: written(encoder, tmp_path_factory.mktemp(scheme), scheme, calibration=shown) for scheme in exporter.schemes}


def test_importing_the_exporter_loads_no_toolchain() -> None:
    code = "import sys, edgekd.export.ncnn; print([m for m in ('ncnn', 'pnnx', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_availability_names_versions_or_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    found = exporter.availability()
    assert found.ok and found.runs and found.version and found.version.startswith("ncnn ") and "pnnx" in found.version
    monkeypatch.setattr(export_ncnn, "package_version", lambda name: None if name == "pnnx" else "1")
    found = exporter.availability()
    assert not found.ok and found.reason == "not installed: pnnx" and found.fix == 'pip install "edgekd[ncnn]"'
    with pytest.raises(EdgekdError) as e:
        exporter.export(conv_component(), Path("never.ncnn.param"), scheme="fp32")
    assert e.value.hint == found.fix and not Path("never.ncnn.param").exists()


def test_fp32_is_the_model(encoder: Component, made: dict[str, Path]) -> None:
    session = exporter.open(made["fp32"], scheme="fp32", threads=1)
    for inputs in samples(encoder, 3, seed=5):
        np.testing.assert_allclose(session.run(inputs)["image_embeddings"], expected(encoder, inputs)[0], atol=1e-5)
    assert session.executed_precision == "fp32" and session.executed_ops["Convolution:fp32"] >= 5
    assert [(p.name, p.shape, p.dtype) for p in session.inputs] == [("images", (1, 3, 64, 64), "float32")]


def test_the_file_has_the_components_names_for_anybody(encoder: Component, made: dict[str, Path]) -> None:
    """Without edgekd, as a consumer reads it."""
    import ncnn

    net = ncnn.Net()
    for option in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic"):
        setattr(net.opt, option, False)
    assert net.load_param(str(made["fp32"])) == 0 and net.load_model(str(made["fp32"].with_name("encoder.ncnn.bin"))) == 0
    assert list(net.input_names()) == ["images"] and list(net.output_names()) == ["image_embeddings"]
    extractor, inputs = net.create_extractor(), samples(encoder)[0]
    image = np.ascontiguousarray(inputs["images"][0])
    extractor.input("images", ncnn.Mat(image))
    code, out = extractor.extract("image_embeddings")
    assert code == 0
    np.testing.assert_allclose(np.array(out)[None], expected(encoder, inputs)[0], atol=1e-5)


def test_fp16_halves_the_weights_and_says_what_it_ran_in(encoder: Component, made: dict[str, Path]) -> None:
    import ncnn

    sizes = {s: made[s].with_name("encoder.ncnn.bin").stat().st_size for s in ("fp32", "fp16")}
    assert sizes["fp16"] < 0.6 * sizes["fp32"]
    session, inputs = exporter.open(made["fp16"], scheme="fp16", threads=1), samples(encoder)[0]
    assert 1e-6 < relative(session.run(inputs)["image_embeddings"], expected(encoder, inputs)[0]) < 5e-3
    assert session.executed_precision == ("fp16" if ncnn.cpu_support_arm_asimdhp() else "fp32"), "x86 has no fp16 code in ncnn, whatever the option"


def test_the_precision_that_is_told_is_the_one_that_ran(encoder: Component, made: dict[str, Path]) -> None:
    """bf16 changes the numbers exactly when the session says that layers ran in it."""
    inputs = samples(encoder)[0]
    plain, low = (exporter.open(made[s], scheme=s, threads=1) for s in ("fp32", "bf16"))
    gap = relative(low.run(inputs)["image_embeddings"], plain.run(inputs)["image_embeddings"])
    assert ("bf16" in low.executed_precision) == (gap > 1e-4) and gap < 0.05
    assert made["fp32"].read_text() == made["bf16"].read_text()


@pytest.mark.parametrize("name", ["repvit_xs", "edge_sam:width=0.25,depth=0.5", "nanosam:width=0.25", "efficientvit_sam_l0:width=0.25,depth=0.5"])
def test_students_without_windowed_attention_are_taken(name: str, tmp_path: Path) -> None:
    part = components(fold(students.build(name, image_size=64).eval()))["encoder"]
    session = exporter.open(written(part, tmp_path), scheme="fp32", threads=1)
    inputs = samples(part)[0]
    assert relative(session.run(inputs)["image_embeddings"], expected(part, inputs)[0]) < 1e-4


@pytest.mark.parametrize(("name", "lacking"), [("tinyvit_xs", "Tensor.reshape"), ("efficient_sam_ti", "rank 5")])
def test_windowed_attention_is_refused_with_the_reason(name: str, lacking: str, tmp_path: Path) -> None:
    part = components(fold(students.build(name, image_size=64).eval()))["encoder"]
    with pytest.raises(CannotTake) as e:
        exporter.export(part, tmp_path / "encoder.ncnn.param", scheme="fp32")
    assert lacking in e.value.what and "repvit_*" in (e.value.hint or "") and not list(tmp_path.iterdir())


def test_the_decoder_goes_beside_in_onnx_and_the_manifest_says_why(tmp_path: Path) -> None:
    manifest = export_model(tiny_sam(), tmp_path / "art", format="ncnn", scheme="fp32", threads=1)
    encoder, decoder = manifest.components["encoder"], manifest.components["decoder"]
    assert encoder.files == ["encoder.ncnn.param", "encoder.ncnn.bin"] and encoder.parity["passed"] and encoder.state == "ran"
    assert decoder.format == "onnx" and "ncnn cannot take it" in (decoder.note or "") and "torch.eq" in (decoder.note or "")
    assert sorted(p.name for p in (tmp_path / "art").iterdir()) == ["decoder.onnx", "encoder.ncnn.bin", "encoder.ncnn.param", "manifest.json"]


class TwoOut(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.relu(a) + 1, (a * b.mean()).flatten(1)


def test_several_inputs_and_outputs_keep_their_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    part = Component("pair", TwoOut().eval(), {"left": torch.randn(1, 2, 4, 4), "right": torch.randn(1, 5)}, ("sum", "product"))
    session = exporter.open(written(part, tmp_path), scheme="fp32", threads=1)
    inputs = samples(part)[0]
    for name, wanted in zip(("sum", "product"), expected(part, inputs), strict=True):
        np.testing.assert_allclose(session.run(inputs | {"unused": np.zeros(1)})[name], wanted, atol=1e-5)
    assert {p.name: p.shape for p in session.inputs} == {"left": (1, 2, 4, 4), "right": (1, 5)}


def test_callers_arrays_are_neither_changed_nor_kept(tmp_path: Path) -> None:
    """The first layer works in place, on memory that ncnn would only borrow."""
    part = Component("inplace", nn.Sequential(nn.ReLU(), nn.Conv2d(2, 2, 1)).eval(), {"x": torch.randn(1, 2, 4, 4)}, ("y",))
    session = exporter.open(written(part, tmp_path), scheme="fp32", threads=1)
    a, b = (samples(part, 2)[i]["x"] for i in (0, 1))
    before = a.copy()
    first = session.run({"x": a})["y"]
    kept = first.copy()
    session.run({"x": b})
    np.testing.assert_array_equal(a, before)
    np.testing.assert_array_equal(first, kept)
    strided = np.repeat(a, 2, axis=3)[..., ::2]
    assert not strided.flags.c_contiguous
    np.testing.assert_array_equal(session.run({"x": strided})["y"], kept)


class Loud(nn.Module):
    """A convolution whose output passes fp16's range, a division that brings it back, and a convolution that has no part in it."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.last, self.scale = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), scale
        with torch.no_grad():
            self.up.weight.mul_(scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.up(x) / self.scale))


def test_layers_that_overflow_fp16_are_marked_in_the_file(tmp_path: Path) -> None:
    part = Component("loud", Loud(4e4).eval(), {"x": torch.randn(1, 3, 8, 8)}, ("y",))
    path = written(part, tmp_path, "fp16", calibration=samples(part))
    session = exporter.open(path, scheme="fp16", threads=1)
    kept = session.kept_fp32
    lines = [line.split() for line in path.read_text().splitlines()[2:]]
    assert {p[1] for p in lines if p[-1] == "31=3"} == set(kept)
    assert sorted(p[0] for p in lines if p[1] in kept) == ["BinaryOp", "Convolution"], "the loud convolution and the division, not the last convolution"
    inputs = samples(part)[0]
    assert relative(session.run(inputs)["y"], expected(part, inputs)[0]) < 1e-2
    quiet = written(conv_component(), tmp_path, "fp16", calibration=samples(conv_component()))
    assert overflowing(quiet, samples(conv_component())) == set() and exporter.open(quiet, scheme="fp16").kept_fp32 == {}


def test_weights_that_fp16_has_no_numbers_for_are_refused(tmp_path: Path) -> None:
    """Behind a tanh the infinities that pnnx writes would not even show."""
    part = Component("loud", Loud(1e6).eval(), {"x": torch.randn(1, 3, 8, 8)}, ("y",))
    with pytest.raises(EdgekdError, match=r"up\.weight holds weights up to .* beyond fp16's 65504"):
        exporter.export(part, tmp_path / "x.ncnn.param", scheme="fp16", calibration=samples(part))


def test_wrong_shapes_are_told_and_not_read_beyond(made: dict[str, Path]) -> None:
    session = exporter.open(made["fp32"], scheme="fp32", threads=1)
    with pytest.raises(EdgekdError, match=r"\[1, 3, 64, 64\].*\[1, 3, 32, 32\]"):
        session.run({"images": np.zeros((1, 3, 32, 32), np.float32)})


def test_what_ncnn_has_no_form_for_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(CannotTake, match=r"batch of one.*x is float32 \[3, 8\]"):
        exporter.export(linear_component(), tmp_path / "x.ncnn.param", scheme="fp32")
    whole = Component("ids", nn.Embedding(4, 4).eval(), {"ids": torch.zeros(1, 3, dtype=torch.int64)}, ("y",))
    with pytest.raises(CannotTake, match="ids is int64"):
        exporter.export(whole, tmp_path / "x.ncnn.param", scheme="fp32")
    assert not list(tmp_path.iterdir())


def test_training_mode_unknown_scheme_and_missing_calibration_are_refused(tmp_path: Path) -> None:
    part = conv_component()
    part.module.train()
    with pytest.raises(EdgekdError, match="training mode"):
        exporter.export(part, tmp_path / "x.ncnn.param", scheme="fp32")
    part.module.eval()
    with pytest.raises(UsageError, match="calibration images"):
        exporter.export(part, tmp_path / "x.ncnn.param", scheme="fp16")
    with pytest.raises(UsageError) as e:
        exporter.export(part, tmp_path / "x.ncnn.param", scheme="bf-16")
    assert "bf16" in (e.value.hint or "") and not list(tmp_path.iterdir())


def test_a_converter_that_dies_is_one_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_child, "call", lambda *a, **k: (_ for _ in ()).throw(EdgekdError("pnnx died of signal SIGABRT: it said nothing")))
    with pytest.raises(EdgekdError, match="SIGABRT"):
        exporter.export(conv_component(), tmp_path / "x.ncnn.param", scheme="fp32")
    assert not list(tmp_path.iterdir())


def test_pnnx_that_gives_up_is_told_with_its_last_words(tmp_path: Path) -> None:
    script = tmp_path / "made.pt"
    script.write_bytes(b"this is no TorchScript")
    found = _ncnn.convert(str(script), [[1, 3, 8, 8]], False)
    assert found["refused"].startswith("pnnx gives up on it")


def test_a_disk_that_filled_up_is_no_property_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "made.pt"
    script.write_bytes(b"this is no TorchScript")
    monkeypatch.setattr(_ncnn, "SPARE", float("inf"))
    with pytest.raises(RuntimeError, match="no space left"):
        _ncnn.convert(str(script), [[1, 3, 8, 8]], False)


@pytest.mark.parametrize("damage", ["weights cut", "weights missing", "no network"])
def test_a_damaged_file_is_one_error(damage: str, made: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "encoder.ncnn.param"
    weights = made["fp32"].with_name("encoder.ncnn.bin").read_bytes()
    path.write_bytes(b"this is no network" if damage == "no network" else made["fp32"].read_bytes())
    if damage != "weights missing":
        path.with_name("encoder.ncnn.bin").write_bytes(weights[: len(weights) // 2] if damage == "weights cut" else weights)
    with pytest.raises(EdgekdError, match="ncnn cannot open the file: load_") as e:
        exporter.open(path, scheme="fp32")
    assert e.value.hint


def test_weights_are_not_halved_behind_ones_back(encoder: Component, made: dict[str, Path]) -> None:
    weights = made["fp32"].with_name("encoder.ncnn.bin").read_bytes()
    assert len(weights) >= 4 * sum(p.numel() for p in encoder.module.parameters())
    assert struct.unpack("<I", weights[:4]) == (0,), "the tag of fp32 weights"
