"""Core ML packages, where Core ML is not: what is written, what an interpreter of it computes, and what a Mac is given to check it with."""
from __future__ import annotations

import importlib.util
import json
import platform
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edgekd.export import _coreml, _coreml_check, _coreml_selfcheck, _mil
from edgekd.export import coreml as export_coreml
from edgekd.export.coreml import exporter
from PIL import Image
from tiny import conv_component, expected, linear_component, samples, tiny_sam
from torch import nn

from edgekd.artifact import PreprocessSpec
from edgekd.errors import CannotTake, EdgekdError, UsageError
from edgekd.models.fold import fold
from edgekd.models.rounding import layers
from edgekd.models.sam import Sam, components
from edgekd.protocols import Component
from edgekd.tasks.promptable.predict import predict
from edgekd.tuning import Tuning

if importlib.util.find_spec("coremltools") is None:
    pytest.skip('coremltools is not installed: pip install "edgekd[coreml]"', allow_module_level=True)

HERE = exporter.availability()
LINUX = pytest.mark.skipif(HERE.runs, reason="Core ML runs here, and nothing stands in for it")
CONSUMER = Path(__file__).resolve().parents[1] / "examples/consumers/coreml_click.py"


@pytest.fixture(scope="module")
def model() -> Sam:
    return fold(tiny_sam(2)).eval()  # type: ignore[return-value]


@pytest.fixture(scope="module")
def fp16(model: Sam, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both components in fp16."""
    folder = tmp_path_factory.mktemp("fp16")
    for part in components(model).values():
        exporter.export(part, folder / f"{part.name}.mlpackage", scheme="fp16")
    return folder


@pytest.fixture(scope="module")
def precise(model: Sam, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in fp32."""
    folder = tmp_path_factory.mktemp("fp32")
    for part in components(model).values():
        exporter.export(part, folder / f"{part.name}.mlpackage", scheme="fp32")
    return folder


def prompts(count: int, points: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    inputs = {"image_embeddings": rng.standard_normal((1, 32, 4, 4)), "point_coords": rng.uniform(0, 64, (count, points, 2)),
              "point_labels": rng.integers(-2, 4, (count, points)), "mask_input": rng.standard_normal((count, 1, 16, 16)),
              "has_mask": rng.integers(0, 2, count)}
    return {k: v.astype(np.float32) for k, v in inputs.items()}


def distance(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def interpreted(path: Path) -> _mil.Interpreter:
    return _mil.Interpreter(_mil.Program.read(path))


# --- where it works ---------------------------------------------------------------------------------------------------


@LINUX
def test_on_linux_it_is_written_and_not_run():
    assert HERE.ok and not HERE.runs and HERE.version and HERE.version.startswith("coremltools ")
    assert "Apple" in (HERE.reason or "") and "selfcheck.py" in (HERE.fix or "")
    with pytest.raises(EdgekdError, match="Apple") as e:
        exporter.open(Path("encoder.mlpackage"), scheme="fp16")
    assert "selfcheck.py" in (e.value.hint or "")


def test_on_a_mac_it_runs(monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    assert exporter.availability().ok and exporter.availability().runs


@pytest.mark.parametrize(("system", "version", "library", "says"), [
    ("Windows", "9.0", True, "Windows"), ("Linux", None, True, "coremltools"), ("Linux", "9.0", False, "no wheel")])
def test_where_it_does_not_work_is_told_with_what_mends_it(monkeypatch, system, version, library, says):
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(export_coreml, "package_version", lambda name: version)
    monkeypatch.setattr(export_coreml, "_has_library", lambda: library)
    found = exporter.availability()
    assert not found.ok and not found.runs and says in (found.reason or "") and found.fix


def test_importing_the_exporter_loads_neither_torch_nor_coremltools():
    code = "import sys, edgekd.export.coreml; print(sorted({'torch', 'coremltools', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


# --- the file ---------------------------------------------------------------------------------------------------------


def test_inputs_and_outputs_have_the_components_names_and_are_fp32(fp16):
    decoder = _mil.Program.read(fp16 / "decoder.mlpackage")
    assert list(decoder.inputs) == ["image_embeddings", "point_coords", "point_labels", "mask_input", "has_mask"] and decoder.outputs == ("masks", "iou")
    assert {v.dtype for v in decoder.inputs.values()} | {decoder.types[o].dtype for o in decoder.outputs} == {"fp32"}
    assert decoder.ranges["point_coords"] == ((1, 64), (1, 16), (2, 2)) and decoder.ranges["image_embeddings"] == ((1, 1), (32, 32), (4, 4), (4, 4))
    assert decoder.version == 8 and decoder.opset == "CoreML7"


def test_the_file_says_what_it_is(fp16):
    import coremltools as ct

    found = ct.utils.load_spec(str(fp16 / "decoder.mlpackage")).description
    assert found.metadata.author.startswith("exported by edgekd") and found.metadata.license and found.metadata.versionString
    assert "decoder" in found.metadata.shortDescription and all(i.shortDescription for i in [*found.input, *found.output])
    own = dict(found.metadata.userDefined)
    assert own["edgekd.scheme"] == "fp16" and json.loads(own["edgekd.lengths"]) == {"points": 16, "prompts": 64}
    assert json.loads(own["edgekd.padding"]) == {"point_labels": -2}


def test_nothing_else_is_left_in_the_folder_and_a_second_export_replaces_the_first(tmp_path, capfd):
    part = linear_component(8)
    for _ in range(2):
        files = exporter.export(part, tmp_path / "head.mlpackage", scheme="fp32")
    inside = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert {f.relative_to(tmp_path).as_posix() for f in files} == inside == {
        "head.mlpackage/Manifest.json", "head.mlpackage/Data/com.apple.CoreML/model.mlmodel", "head.mlpackage/Data/com.apple.CoreML/weights/weight.bin",
        "head.selfcheck.npz", "selfcheck.py", "RUN_ON_A_MAC.md"}
    assert all(f.stat().st_mode & 0o444 == 0o444 for f in files), "whoever may read the folder may read its files"
    assert capfd.readouterr().out == "", "stdout is for data: coremltools' progress must not reach it"


@pytest.mark.parametrize("step", ["_describe", "_save"])
def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch, step):
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "head.mlpackage").mkdir()
    monkeypatch.setattr(_coreml, step, fail)
    with pytest.raises(OSError, match="No space"):
        exporter.export(linear_component(8), tmp_path / "head.mlpackage", scheme="fp32")
    assert [p.name for p in tmp_path.rglob("*")] == ["head.mlpackage"]


def test_what_cannot_be_exported_is_refused(tmp_path):
    with pytest.raises(UsageError, match="calibration"):
        exporter.export(linear_component(), tmp_path / "x.mlpackage", scheme="w8a8_static")
    with pytest.raises(UsageError, match="int4"):
        exporter.export(linear_component(), tmp_path / "x.mlpackage", scheme="int4")
    part = linear_component()
    free = Component("decoder", part.module, {"x": torch.randn(1, 3, 8)}, ("y",), {"x": {1: "num_points"}})
    with pytest.raises(CannotTake, match="num_points"):
        exporter.export(free, tmp_path / "x.mlpackage", scheme="fp32")
    assert not list(tmp_path.iterdir())


def test_a_damaged_package_is_told(tmp_path):
    with pytest.raises(EdgekdError, match="cannot be read"):
        _mil.Program.read(tmp_path / "none.mlpackage")


# --- the interpreter --------------------------------------------------------------------------------------------------


def test_fp32_is_the_model_at_any_number_of_prompts_and_points(model, precise):
    parts = components(model)
    images = samples(parts["encoder"], 1)[0]
    encoder = interpreted(precise / "encoder.mlpackage")
    assert distance(encoder.run(images)["image_embeddings"], expected(parts["encoder"], images)[0]) < 1e-6 and encoder.executed_precision == "fp32"
    decoder = interpreted(precise / "decoder.mlpackage")
    for count, points in ((1, 1), (5, 2), (64, 16), (70, 3)):
        inputs = prompts(count, points)
        found = decoder.run(inputs)
        for name, want in zip(("masks", "iou"), expected(parts["decoder"], inputs), strict=True):
            assert distance(found[name], want) < 1e-5, (name, count, points)


def test_more_points_than_the_file_takes_are_refused(fp16):
    with pytest.raises(EdgekdError, match=r"axis 1 of 'point_coords' is 17.*1 to 16") as e:
        interpreted(fp16 / "decoder.mlpackage").run(prompts(1, 17))
    assert "--length" in (e.value.hint or "")


def test_a_longer_axis_can_be_asked_for():
    part = components(tiny_sam())["decoder"]
    assert _coreml.longest(part) == {"points": 16, "prompts": 64}
    longer = Component(part.name, part.module, part.example, part.outputs, part.dynamic, lengths={"prompts": 1, "points": 40})
    assert _coreml.longest(longer) == {"points": 40, "prompts": 64}


def test_fp16_rounds_as_the_file_says_and_positions_keep_fp32(model, fp16):
    parts = components(model)
    decoder, inputs = interpreted(fp16 / "decoder.mlpackage"), prompts(5, 3)
    gap = distance(decoder.run(inputs)["masks"], expected(parts["decoder"], inputs)[0])
    assert 1e-5 < gap < 0.01, "nothing was rounded, or too much"
    assert decoder.executed_precision == "fp16+fp32" and set(decoder.kept_fp32.values()) == {"angles of a position code"}
    assert decoder.executed_ops["sin:fp32"] == decoder.executed_ops["cos:fp32"] == 1 and decoder.executed_ops["linear:fp32"] == 1
    assert interpreted(fp16 / "encoder.mlpackage").executed_precision == "fp16"


def test_outputs_are_the_callers_own(fp16):
    decoder = interpreted(fp16 / "decoder.mlpackage")
    first = decoder.run(prompts(2, 2, 1))["masks"]
    kept = first.copy()
    decoder.run(prompts(2, 2, 2))
    np.testing.assert_array_equal(first, kept)


class Steep(nn.Module):
    """Passes fp16's range in the middle and comes back."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x) * 1e6 * 1e-6))


def test_what_overflows_stays_in_fp32_and_is_named(tmp_path, monkeypatch):
    part = Component("head", Steep().eval(), {"x": torch.randn(4, 8)}, ("y",))
    inputs = samples(part)[0]
    want = expected(part, inputs)[0]
    exporter.export(part, tmp_path / "kept.mlpackage", scheme="fp16", calibration=samples(part))
    kept = interpreted(tmp_path / "kept.mlpackage")
    assert distance(kept.run(inputs)["y"], want) < 0.01 and any("reaches" in why for why in kept.kept_fp32.values())
    monkeypatch.setattr(_coreml, "overflowing", lambda *_: {})
    exporter.export(part, tmp_path / "all.mlpackage", scheme="fp16", calibration=samples(part))
    everything = interpreted(tmp_path / "all.mlpackage")
    assert not everything.kept_fp32 and not distance(everything.run(inputs)["y"], want) < 0.01, "the interpreter does not see fp16's range"


def test_a_layer_is_named_as_the_state_dict_does(tmp_path):
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.narrow = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.narrow(x * 100)

    part = Component("head", Wide().eval(), {"x": torch.randn(2, 64)}, ("y",))
    exporter.export(part, tmp_path / "x.mlpackage", scheme="fp16", calibration=samples(part))
    found = interpreted(tmp_path / "x.mlpackage").kept_fp32
    assert found["narrow.0"].startswith("layer_norm sums squares to ")


@pytest.mark.parametrize("form", ["none", "tanh"])
def test_gelu_keeps_its_form(tmp_path, form):
    """coremltools reads torch.export's tanh form as the exact one, without a word."""
    part = Component("head", nn.GELU(approximate=form).eval(), {"x": torch.linspace(-4, 4, 64).reshape(1, 64)}, ("y",))
    exporter.export(part, tmp_path / "x.mlpackage", scheme="fp32")
    session = interpreted(tmp_path / "x.mlpackage")
    (op,) = [o for o in session.program.ops if o.kind == "gelu"]
    assert session._constants[str(op.reads("mode"))] == {"none": "EXACT", "tanh": "TANH_APPROXIMATION"}[form]
    inputs = {"x": part.example["x"].numpy()}
    np.testing.assert_allclose(session.run(inputs)["y"], expected(part, inputs)[0], atol=1e-6)


def test_whole_numbers_go_in_and_come_out(tmp_path):
    class Pick(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(8, 4)

        def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.table(rows), rows + 1

    part = Component("head", Pick().eval(), {"rows": torch.tensor([1, 5, 2])}, ("y", "next"))
    exporter.export(part, tmp_path / "x.mlpackage", scheme="fp32")
    assert exporter.check(part, tmp_path / "x.mlpackage", scheme="fp32").state == "checked"
    found = interpreted(tmp_path / "x.mlpackage").run({"rows": np.array([0, 7, 3])})
    np.testing.assert_array_equal(found["next"], [1, 8, 4])
    np.testing.assert_allclose(found["y"], part.module(torch.tensor([0, 7, 3]))[0].detach().numpy())


X = np.random.default_rng(0).standard_normal((2, 3, 4, 6)).astype(np.float32)
OPERATIONS: list[tuple[str, dict[str, Any]]] = [
    ("slice_by_index", {"x": X, "begin": [0, 1, -3, 5], "end": [2, 3, 4, 0], "stride": [1, 1, 2, -2]}),
    ("slice_by_index", {"x": X, "begin": [1, 0, 0, 2], "end": [2, 9, 0, 4], "begin_mask": [False, True, False, False],
                        "end_mask": [False, True, True, False], "squeeze_mask": [True, False, False, False]}),
    ("slice_by_size", {"x": X, "begin": [0, 1, 2, 0], "size": [2, 2, -1, 3]}),
    ("reshape", {"x": X, "shape": [0, 0, -1]}), ("reshape", {"x": X, "shape": [6, 0, -1]}),
    ("transpose", {"x": X, "perm": [2, 0, -1, 1]}), ("expand_dims", {"x": X, "axes": [0, -1]}), ("squeeze", {"x": X[:1, :, :1], "axes": [0, -2]}),
    ("concat", {"values": [X, X + 1], "axis": 1, "interleave": False}),
    ("stack", {"values": [X, X + 1], "axis": -1}), ("split", {"x": X, "split_sizes": [1, 2], "axis": 1}), ("split", {"x": X, "num_splits": 3, "axis": -1}),
    ("gather", {"x": X, "indices": np.array([[2, 0], [1, 1]], np.int32), "axis": 1}), ("tile", {"x": X, "reps": [1, 2, 1, 2]}),
    ("reverse", {"x": X, "axes": [1, -1]}), ("cumsum", {"x": X, "axis": -1}),
    ("pad", {"x": X, "pad": [1, 2, 3, 0], "mode": "constant", "constant_val": 7.0}), ("pad", {"x": X, "pad": [1, 2, 3, 1], "mode": "reflect"}),
    ("pad", {"x": X, "pad": [1, 2, 3, 1], "mode": "replicate"}), ("select", {"cond": X > 0, "a": X, "b": X * 2}),
    ("clip", {"x": X, "alpha": -0.5, "beta": 0.25}), ("thresholded_relu", {"x": X, "alpha": -0.25}), ("clamped_relu", {"x": X, "alpha": 0.1, "beta": 0.5}),
    ("sigmoid_hard", {"x": X, "alpha": 1 / 6, "beta": 0.5}), ("leaky_relu", {"x": X, "alpha": 0.2}), ("elu", {"x": X, "alpha": 0.7}),
    ("gelu", {"x": X, "mode": "EXACT"}), ("gelu", {"x": X, "mode": "TANH_APPROXIMATION"}), ("gelu", {"x": X, "mode": "SIGMOID_APPROXIMATION"}),
    ("softmax", {"x": X, "axis": 1}), ("rsqrt", {"x": np.abs(X), "epsilon": 0.5}), ("inverse", {"x": np.abs(X), "epsilon": 0.5}),
    ("log", {"x": np.abs(X), "epsilon": 0.5}), ("floor_div", {"x": X * 9, "y": np.float32(2)}), ("mod", {"x": X * 9, "y": np.float32(2)}),
    ("real_div", {"x": X, "y": X + 3}), ("pow", {"x": np.abs(X), "y": np.float32(1.5)}), ("reduce_mean", {"x": X, "axes": [1, -1], "keep_dims": True}),
    ("reduce_sum", {"x": X, "axes": [2], "keep_dims": False}), ("reduce_max", {"x": X, "axes": [2, 3], "keep_dims": True}),
    ("reduce_l2_norm", {"x": X, "axes": [1], "keep_dims": False}), ("reduce_log_sum_exp", {"x": X, "axes": [1], "keep_dims": False}),
    ("reduce_argmax", {"x": X, "axis": 2, "keep_dims": False}), ("matmul", {"x": X, "y": X, "transpose_x": False, "transpose_y": True}),
    ("linear", {"x": X, "weight": X[0, 0], "bias": X[0, 0, :, 0]}), ("fill", {"shape": [2, 3], "value": 4.0}), ("shape", {"x": X}),
    ("range_1d", {"start": 2, "end": 9, "step": 3}), ("round", {"x": X * 3}), ("erf", {"x": X}), ("sign", {"x": X}),
    ("layer_norm", {"x": X, "axes": [-1], "gamma": X[0, 0, 0], "beta": X[0, 0, 1], "epsilon": 1e-5}),
    ("quantize", {"input": X, "zero_point": np.int8(3), "scale": np.float32(0.02), "output_dtype": "int8"}),
]


@pytest.mark.parametrize(("kind", "arguments"), OPERATIONS, ids=[f"{i}-{kind}" for i, (kind, _) in enumerate(OPERATIONS)])
def test_an_operation_means_what_coremltools_computes(kind, arguments):
    """coremltools folds operations on constants in numpy: an implementation that is not ours."""
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb
    from edgekd.export._mil_ops import MEANING

    held: list[Any] = []

    @mb.program(input_specs=[mb.TensorSpec((1,))], opset_version=ct.target.iOS17)
    def program(unused):
        found = getattr(mb, kind)(**arguments)
        held.extend(v.val for v in (found if isinstance(found, (list, tuple)) else [found]))
        return mb.identity(x=unused)

    assert held and all(v is not None for v in held), "coremltools does not fold it"
    ours = MEANING[kind]({k: [_mil.as_tensor(v) for v in value] if k == "values" else _mil.as_tensor(value) for k, value in arguments.items()})
    for a, b in zip(ours if isinstance(ours, (list, tuple)) else [ours], held, strict=True):
        np.testing.assert_allclose(a.numpy(), b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("corners", "factor"), [(False, 2), (True, 2), (False, 3)])
def test_resizing_is_torchs(corners, factor):
    from edgekd.export._mil_ops import MEANING

    x = torch.from_numpy(X)
    found = MEANING["upsample_bilinear"]({"x": x, "scale_factor_height": torch.tensor(factor), "scale_factor_width": torch.tensor(factor),
                                          "align_corners": torch.tensor(corners)})
    torch.testing.assert_close(found, nn.functional.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=corners))
    nearest = MEANING["upsample_nearest_neighbor"]({"x": x, "scale_factor_height": torch.tensor(factor), "scale_factor_width": torch.tensor(factor)})
    torch.testing.assert_close(nearest, nn.functional.interpolate(x, scale_factor=factor, mode="nearest"))


def test_a_palette_is_unpacked_as_coremltools_does():
    from coremltools.converters.mil.mil.ops.defs.iOS16.constexpr_ops import constexpr_lut_to_dense
    from coremltools.optimize import _utils
    from edgekd.export._mil_ops import MEANING

    rng = np.random.default_rng(0)
    for bits in (2, 4, 6, 8):
        lut, codes = rng.standard_normal(2**bits).astype(np.float16), rng.integers(0, 2**bits, (5, 7)).astype(np.uint8)
        packed = _utils.pack_elements_into_bits(codes, bits)
        want = constexpr_lut_to_dense.decompress(lut, packed, np.array([5, 7], np.uint32))
        found = MEANING["constexpr_lut_to_dense"]({"lut": _mil.as_tensor(lut), "indices": _mil.as_tensor(packed), "shape": _mil.as_tensor(np.uint32([5, 7]))})
        np.testing.assert_array_equal(found.numpy(), want.astype(np.float32))
        np.testing.assert_array_equal(want, lut[codes])


def test_interleaving_is_as_documented():
    from edgekd.export._mil_ops import MEANING

    a, b = torch.tensor([[1, 2], [3, 4], [5, 6]]), torch.tensor([[7, 8], [9, 10], [11, 12]])
    found = MEANING["concat"]({"values": [a, b], "axis": torch.tensor(0), "interleave": torch.tensor(True)})
    assert found.tolist() == [[1, 2], [7, 8], [3, 4], [9, 10], [5, 6], [11, 12]]


def test_windows_are_torchs(tmp_path):
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grouped, self.up = nn.Conv2d(4, 8, 3, 2, 1, dilation=1, groups=2), nn.ConvTranspose2d(8, 6, 3, 2, 1, output_padding=1, groups=2)
            self.wide = nn.Conv2d(6, 4, 3, 1, 2, dilation=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = nn.functional.max_pool2d(self.wide(self.up(self.grouped(x))), 3, 2, 1)
            return nn.functional.avg_pool2d(x, 2) + nn.functional.adaptive_avg_pool2d(x, 1)

    torch.manual_seed(0)
    part = Component("head", Windows().eval(), {"x": torch.randn(1, 4, 16, 12)}, ("y",))
    exporter.export(part, tmp_path / "x.mlpackage", scheme="fp32")
    inputs = samples(part)[0]
    np.testing.assert_allclose(interpreted(tmp_path / "x.mlpackage").run(inputs)["y"], expected(part, inputs)[0], atol=1e-5)


def test_an_unknown_operation_leaves_the_check_and_takes_the_stand_in(model, fp16, monkeypatch):
    from edgekd.export import _mil_ops

    path = fp16 / "encoder.mlpackage"
    assert isinstance(exporter.stand_in(path, scheme="fp16"), _mil.Interpreter)
    monkeypatch.delitem(_mil_ops.MEANING, "gelu")
    assert exporter.stand_in(path, scheme="fp16") is None
    with pytest.raises(EdgekdError, match="not interpreted: gelu"):
        interpreted(path)
    assert exporter.check(components(model)["encoder"], path, scheme="fp16").details["not_interpreted"] == ["gelu"]


def test_a_program_that_contradicts_itself_is_refused(fp16):
    session = interpreted(fp16 / "encoder.mlpackage")
    session._meaning = session._meaning | {"gelu": lambda a: a["x"][:, :1]}
    with pytest.raises(EdgekdError, match="gelu gives"):
        session.run({"images": np.zeros((1, 3, 64, 64), np.float32)})


# --- compression ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "kind", "most"), [
    ("w8_weight_only", "constexpr_affine_dequantize", 0.02), ("w6_weight_only", "constexpr_lut_to_dense", 0.05), ("w4_weight_only", "constexpr_lut_to_dense", 0.2),
    ("w8a8_static", "constexpr_affine_dequantize", 0.05)])
def test_compressed_weights_are_the_models(model, fp16, tmp_path, scheme, kind, most):
    part = components(model)["encoder"]
    path, inputs = tmp_path / "encoder.mlpackage", samples(part)[0]
    exporter.export(part, path, scheme=scheme, calibration=samples(part))
    session, check = interpreted(path), exporter.check(part, path, scheme=scheme)
    assert 1e-3 < distance(session.run(inputs)["image_embeddings"], expected(part, inputs)[0]) < most
    assert check.state == "checked" and check.details["compressed"] == {kind: 4} and 1e-3 < check.details["weights"]["largest_relative_error"] < most
    assert check.precision == session.executed_precision == ("int8+fp16" if scheme == "w8a8_static" else "fp16")
    assert (check.ops.get("conv:i8", 0) == 4) is (scheme == "w8a8_static") and check.details["weights"]["compared"] >= 10
    blob = "Data/com.apple.CoreML/weights/weight.bin"
    assert (path / blob).stat().st_size < 0.7 * (fp16 / "encoder.mlpackage" / blob).stat().st_size


def test_integer_arithmetic_is_what_it_should_be(tmp_path):
    """The file's integers against the same arithmetic written by hand in numpy, from torch's weights and the ranges of the samples."""
    torch.manual_seed(0)
    part = Component("head", nn.Linear(64, 16).eval(), {"x": torch.randn(4, 64)}, ("y",))
    shown = samples(part, 6)
    exporter.export(part, tmp_path / "x.mlpackage", scheme="w8a8_static", calibration=shown)
    session = interpreted(tmp_path / "x.mlpackage")
    assert session.executed_ops["linear:i8"] == 1 and session.executed_precision == "int8"
    weight, bias = (t.detach().numpy() for t in (part.module.weight, part.module.bias))
    scale = np.float32(np.float16(max(np.abs(np.float16(s["x"])).max() for s in shown) / 127))
    halves = np.abs(np.float16(weight)).max(1, keepdims=True) / np.float16(127)
    whole, scales = np.clip(np.round(np.float16(weight) / halves), -127, 127).astype(np.float32), halves.astype(np.float32)  # coremltools divides in fp16
    x = np.float32(np.float16(samples(part, 1, seed=9)[0]["x"]))
    want = (np.clip(np.round(x / scale), -128, 127) * scale) @ (whole * scales).T + bias
    found = session.run({"x": x})["y"]
    assert distance(found, want) < 1e-3 < 2e-3 < distance(found, x @ weight.T + bias)


@pytest.mark.parametrize("scheme", ["w8_weight_only", "w4_weight_only", "w8a8_static"])
def test_layers_are_kept_as_they_are_asked_to_be(model, tmp_path, scheme):
    """One with its weights whole in fp16, one in fp32; of the four of the encoder that are large enough two are left."""
    part, path = components(model)["encoder"], tmp_path / "encoder.mlpackage"
    exporter.export(part, path, scheme=scheme, calibration=samples(part), tuning=Tuning(keep={"stem.2": "fp16", "neck": "fp32"}))
    session, check = interpreted(path), exporter.check(part, path, scheme=scheme)
    assert check.details["compressed"] == {"constexpr_affine_dequantize" if "w8" in scheme else "constexpr_lut_to_dense": 2}
    weights = {name: float(np.abs(held.numpy() - part.module.state_dict()[name].numpy()).max()) for value, held in _coreml_check._decompressed(path)
               for name in (f"{layer}.weight" for layer in ("stem.0", "stem.2", "stem.4", "stem.6", "neck")) if value == f"p_{name.replace('.', '_')}"}
    assert weights["neck.weight"] == 0 < weights["stem.2.weight"] < 2e-4 < min(weights["stem.4.weight"], weights["stem.6.weight"])
    assert session.kept_fp32 == {"neck": "asked for"} and session.executed_ops["conv:fp32"] == 1
    assert session.executed_ops.get("conv:i8", 0) == (2 if scheme == "w8a8_static" else 0)
    inputs = samples(part)[0]
    assert distance(session.run(inputs)["image_embeddings"], expected(part, inputs)[0]) < 0.2


def test_fp16_keeps_what_it_is_asked_to(model, tmp_path):
    part = components(model)["encoder"]
    exporter.export(part, tmp_path / "e.mlpackage", scheme="fp16", tuning=Tuning(keep={"stem.0": "fp32"}))
    session = interpreted(tmp_path / "e.mlpackage")
    assert session.kept_fp32 == {"stem.0": "asked for"} and session.executed_precision == "fp16+fp32"
    with pytest.raises(UsageError, match="fp32 program"):
        exporter.export(part, tmp_path / "f.mlpackage", scheme="fp32", tuning=Tuning(keep={"stem.0": "fp16"}))


def test_every_layer_has_an_operation_of_its_own_or_is_refused(model, tmp_path):
    """Layers are found by the names of their weights: one that the conversion joins with others is told, not silently compressed."""
    for part in components(model).values():
        program = _coreml._read(_coreml._convert(_mil.coremltools(), part, _mil.coremltools().precision.FLOAT32), tmp_path / "x.mlpackage")
        refused = []
        for layer in layers(part.module):
            try:
                assert _coreml._given_by(program, part, Tuning(keep={layer: "fp16"}), "fp16")
            except UsageError as e:
                refused.append(layer)
                assert part.name in (e.hint or "")
        assert refused == (["prompt_encoder.mask_downscaling.6"] if part.name == "decoder" else [])


def test_one_step_for_a_whole_weight(model, tmp_path):
    part, inputs = components(model)["encoder"], samples(components(model)["encoder"])[0]
    wrong = {}
    for granularity in ("channel", "tensor"):
        path = tmp_path / f"{granularity}.mlpackage"
        exporter.export(part, path, scheme="w8_weight_only", calibration=samples(part), tuning=Tuning(granularity=granularity))
        scales = {np.size(op.attributes["scale"]) for op in _mil.Program.read(path).ops if op.kind == "constexpr_affine_dequantize"}
        assert (scales == {1}) is (granularity == "tensor") and exporter.check(part, path, scheme="w8_weight_only").details["compressed"]
        wrong[granularity] = distance(interpreted(path).run(inputs)["image_embeddings"], expected(part, inputs)[0])
    assert wrong["channel"] < wrong["tensor"] < 0.1


def test_asymmetric_activations_waste_no_levels(tmp_path):
    """Of inputs that are never negative, half of the symmetric levels are: the asymmetric step is half as wide."""
    torch.manual_seed(0)
    part = Component("head", nn.Linear(64, 16).eval(), {"x": torch.rand(4, 64)}, ("y",))
    shown = [{"x": np.random.default_rng(i).uniform(0, 1, (4, 64)).astype(np.float32)} for i in range(6)]
    steps, wrong = {}, {}
    for symmetric in (True, False):
        path = tmp_path / f"{symmetric}.mlpackage"
        exporter.export(part, path, scheme="w8a8_static", calibration=shown, tuning=Tuning(symmetric=symmetric))
        program = _mil.Program.read(path)
        (quantize,) = (op for op in program.ops if op.kind == "quantize")
        steps[symmetric] = float(np.ravel(program.made[str(quantize.reads("scale"))].attributes["val"])[0]) if quantize.reads("scale") else 0.0
        wrong[symmetric] = distance(interpreted(path).run(shown[0])["y"], expected(part, shown[0])[0])
    assert steps[False] == pytest.approx(steps[True] / 2, rel=0.02) and wrong[False] < wrong[True]


def test_a_scheme_that_compresses_nothing_is_told(tmp_path):
    part = conv_component()
    exporter.export(part, tmp_path / "x.mlpackage", scheme="w8_weight_only", calibration=samples(part))
    with pytest.raises(EdgekdError, match="compresses nothing"):
        exporter.check(part, tmp_path / "x.mlpackage", scheme="w8_weight_only")
    with pytest.raises(EdgekdError, match="nothing to quantize"):
        exporter.export(part, tmp_path / "y.mlpackage", scheme="w8a8_static", calibration=samples(part))


def test_equal_constants_of_different_layers_are_no_obstacle(tmp_path):
    """coremltools keeps equal constants once, and refuses to compress what a convolution and a norm share."""
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(16, 600), nn.LayerNorm(600), nn.Linear(600, 4)
            nn.init.zeros_(self.first.bias)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.norm(self.first(x)))

    part = Component("head", Shared().eval(), {"x": torch.randn(2, 16)}, ("y",))
    exporter.export(part, tmp_path / "x.mlpackage", scheme="w8_weight_only", calibration=samples(part))
    inputs = samples(part)[0]
    assert distance(interpreted(tmp_path / "x.mlpackage").run(inputs)["y"], expected(part, inputs)[0]) < 0.05


# --- the check --------------------------------------------------------------------------------------------------------


def test_the_check_compares_every_weight(model, precise):
    part = components(model)["decoder"]
    found = exporter.check(part, precise / "decoder.mlpackage", scheme="fp32")
    assert found.state == "checked" and found.precision == "fp32" and "read back by coremltools" in found.how
    assert found.details["weights"]["compared"] > 100 and found.details["weights"]["largest_relative_error"] == 0
    assert found.details["ranges"]["point_labels"] == [[1, 64], [1, 16]] and found.details["bytes"]["weight.bin"] > 1000
    assert found.ops["matmul:fp32"] > 10 and json.dumps(found.details)


def test_the_check_finds_another_models_weights(model, fp16):
    part = components(fold(tiny_sam(3)).eval())["encoder"]
    with pytest.raises(EdgekdError, match="is not the model's"):
        exporter.check(part, fp16 / "encoder.mlpackage", scheme="fp16")


def test_the_check_finds_other_ports(model, fp16):
    part = components(model)["encoder"]
    for changed in (Component("encoder", part.module, {"photos": part.example["images"]}, part.outputs),
                    Component("encoder", part.module, part.example, ("embedding",)),
                    Component("encoder", part.module, {"images": torch.randn(1, 3, 32, 32)}, part.outputs)):
        with pytest.raises(EdgekdError, match="the package"):
            exporter.check(changed, fp16 / "encoder.mlpackage", scheme="fp16")


# --- what a Mac is given ----------------------------------------------------------------------------------------------


def stand_in_for_core_ml(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """coremltools as it is on a Mac, as far as a model is opened and predicts; the packages that were opened."""
    import coremltools as ct

    opened = []

    class Opened:
        def __init__(self, path: str, compute_units: Any = None) -> None:
            opened.append(Path(path).name)
            self.session = interpreted(Path(path))

        def predict(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            assert all(isinstance(v, np.ndarray) and v.dtype == np.float32 for v in inputs.values())
            return self.session.run(inputs)

    monkeypatch.setattr(ct.models, "MLModel", Opened)
    return opened


def test_on_a_mac_a_session_asks_core_ml(model, fp16, monkeypatch):
    opened = stand_in_for_core_ml(monkeypatch)
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    session = exporter.open(fp16 / "decoder.mlpackage", scheme="fp16")
    inputs = prompts(70, 2)
    found = session.run(inputs | {"unused": np.zeros(1)})
    assert opened == ["decoder.mlpackage"] and found["masks"].shape == (70, 4, 16, 16)
    assert distance(found["iou"], expected(components(model)["decoder"], inputs)[1]) < 0.01
    assert session.executed_precision == "fp16+fp32" and session.executed_ops["sin:fp32"] == 1 and session.kept_fp32
    assert [(p.name, p.shape) for p in session.inputs][1] == ("point_coords", (None, None, 2)) and session.inputs[0].dtype == "float32"


def test_the_script_beside_the_packages_tells_right_from_wrong(fp16, monkeypatch, capsys):
    def right(package: Path, units: str) -> tuple[Any, dict[str, int]]:
        return interpreted(package).run, {"MLNeuralEngineComputeDevice": 3}

    def off(package: Path, units: str) -> tuple[Any, dict[str, int]]:
        run = interpreted(package).run
        return lambda inputs: {k: v + np.float32(0.1) * np.abs(v).max() for k, v in run(inputs).items()}, {}

    def infinite(package: Path, units: str) -> tuple[Any, dict[str, int]]:
        run = interpreted(package).run
        return lambda inputs: {k: v * np.float32(np.inf) for k, v in run(inputs).items()}, {}

    monkeypatch.setattr(_coreml_selfcheck, "RUNS", 1)
    found = _coreml_selfcheck.check(fp16, opened=right)
    assert set(found) == {"encoder", "decoder"} and all(f["passed"] for f in found.values())
    assert found["decoder"]["outputs"]["masks"]["file"] == 0 < found["decoder"]["outputs"]["masks"]["torch"] < 0.02
    assert found["encoder"]["compiler"].startswith("not compiled") or platform.system() == "Darwin"
    for wrong in (off, infinite):
        assert not any(f["passed"] for f in _coreml_selfcheck.check(fp16, opened=wrong).values())
    monkeypatch.setattr(_coreml_selfcheck, "on_core_ml", right)
    monkeypatch.setattr(_coreml_selfcheck.check, "__defaults__", ("all", right))
    assert _coreml_selfcheck.main([str(fp16)]) == 0 and "encoder: passed" in capsys.readouterr().out
    monkeypatch.setattr(_coreml_selfcheck.check, "__defaults__", ("all", off))
    assert _coreml_selfcheck.main([str(fp16), "--json"]) == 1 and json.loads(capsys.readouterr().out)["decoder"]["passed"] is False


def test_the_script_needs_nothing_of_edgekd(fp16, tmp_path):
    code = f"import sys, runpy; sys.modules['edgekd'] = sys.modules['torch'] = None; sys.argv = ['selfcheck.py', {str(tmp_path)!r}]; " \
           f"runpy.run_path({str(fp16 / 'selfcheck.py')!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1 and "no *.selfcheck.npz" in done.stderr
    assert (fp16 / "selfcheck.py").read_text(encoding="utf-8") == Path(_coreml_selfcheck.__file__).read_text(encoding="utf-8")
    assert "selfcheck.py" in (fp16 / "RUN_ON_A_MAC.md").read_text(encoding="utf-8")
    assert max((fp16 / f"{n}.selfcheck.npz").stat().st_size for n in ("encoder", "decoder")) < 20_000, "it counts among the artifact's bytes"


def test_the_consumer_segments_what_edgekd_does(model, precise, photos, tmp_path, monkeypatch, capsys):
    """Core ML's place is taken by the interpreter: the photo's way in, the mask's way out and the names are the example's own."""
    opened = stand_in_for_core_ml(monkeypatch)
    manifest = {"preprocess": PreprocessSpec.of(model.preprocess).model_dump(), "components": {n: {"file": f"{n}.mlpackage"} for n in ("encoder", "decoder")}}
    for name in ("encoder", "decoder"):
        (tmp_path / f"{name}.mlpackage").symlink_to(precise / f"{name}.mlpackage")
    (tmp_path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    photo = photos / "dogs_at_door.jpg"
    with Image.open(photo) as image:
        want = predict(model, np.asarray(image.convert("RGB")), points=[(400, 800)])
    monkeypatch.setattr(sys, "argv", ["coreml_click.py", str(tmp_path), str(photo), "400,800", str(tmp_path / "mask.png")])
    runpy.run_path(str(CONSUMER), run_name="__main__")
    told = json.loads(capsys.readouterr().out)
    mask = np.asarray(Image.open(tmp_path / "mask.png")) > 127
    assert sorted(opened) == ["decoder.mlpackage", "encoder.mlpackage"] and 0.2 < want.mask.mean() < 0.8
    assert (mask & want.mask).sum() / (mask | want.mask).sum() >= 0.98
    assert told["share"] == pytest.approx(mask.mean(), abs=0.01) and told["iou"] == pytest.approx(float(want.score), abs=0.01)
