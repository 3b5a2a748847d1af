"""8 bits in ONNX: options, ranges in constant memory and shared between exports, trained ranges exactly as trained, and what is refused."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from edgekd.export import _grids, _ranges
from edgekd.export._half import KEPT, layer_of
from edgekd.export._int8 import Source, _around, quantizable
from edgekd.export.onnx import exporter, float_file
from tiny import conv_component, expected, linear_component, samples, tiny_sam
from torch import nn

from edgekd import plugins
from edgekd.errors import EdgekdError, UsageError
from edgekd.models import rounding
from edgekd.models.fold import fold
from edgekd.models.sam import components
from edgekd.protocols import Component
from edgekd.tuning import Grid, Tuning

METHODS = ("minmax", "percentile", "entropy", "mse")


class Told(list):
    """Samples that say what they are, and how often they were run through."""

    runs = 0

    def __iter__(self):
        self.runs += 1
        return super().__iter__()

    def fingerprint(self) -> str:
        return "told"


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch) -> None:
    monkeypatch.setattr(_ranges, "_known", type(_ranges._known)())


def encoder() -> Component:
    return components(fold(tiny_sam()).eval())["encoder"]


def scales(path: Path) -> dict[str, np.ndarray]:
    """Quantized tensor -> scale."""
    graph = onnx.load(path).graph
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    return {n.input[0]: constants[n.input[1]] for n in graph.node if n.op_type == "QuantizeLinear"}


def zeros(path: Path) -> dict[str, np.ndarray]:
    graph = onnx.load(path).graph
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    return {n.input[0]: constants[n.input[2]] for n in graph.node if n.op_type == "QuantizeLinear"}


def export(part: Component, folder: Path, name: str = "x", *, scheme: str = "w8a8_static", calibration: Any = None, qdq: str = "u8s8", **tuned: Any) -> Path:
    return exporter.export(part, folder / f"{name}.onnx", scheme=scheme, calibration=calibration, qdq=qdq, tuning=Tuning(**tuned))[0]


def watched(part: Component) -> _ranges.Watched:
    file = float_file(part)
    graph = onnx.load(file)
    tensors = _around(graph.graph, set(quantizable(graph, dynamic=False)), {n.name: layer_of(n) for n in graph.graph.node})
    return _ranges.Watched(file, part.name, False, tensors)


def library(file: Path, given: list[dict[str, np.ndarray]], method: str, **options: Any) -> dict[str, tuple[float, float]]:
    """Ranges the way onnxruntime finds them, all samples at once."""
    from onnxruntime.quantization import CalibrationMethod, create_calibrator

    calibrator = create_calibrator(str(file), ["Conv", "MatMul", "Gemm"], str(file.with_name("library.onnx")), CalibrationMethod[method], extra_options=options)
    calibrator.collect_data(_ranges.Checked(given, "test"))
    found = calibrator.compute_data()
    file.with_name("library.onnx").unlink()
    return {t: (float(np.min(found[t].lowest)), float(np.max(found[t].highest))) for t in found}


@pytest.mark.parametrize(("method", "options"), [("MinMax", {}), ("Percentile", {"percentile": _ranges.PERCENTILE, "symmetric": False, "num_bins": _ranges.BINS})])
def test_ranges_in_portions_are_those_of_all_samples_at_once(method, options):
    part = encoder()
    given, seen = samples(part, 5), watched(part)
    given[3] = {k: 3 * v for k, v in given[3].items()}  # one that widens every range after histograms were begun
    ours, theirs = _ranges.ranges(seen, given, method=method.lower()), library(seen.file, given, method, **options)
    assert len(ours) > 5
    for tensor, (low, high) in ours.items():
        np.testing.assert_allclose((low, high), theirs[tensor], rtol=1e-3 if method == "Percentile" else 1e-6)


def test_cuts_lie_within_the_extremes_and_differ_from_them():
    part = encoder()
    seen, given = watched(part), samples(part, 4)
    given[1]["images"][0, 0, 0, 0] = 60.0  # one of 49152 values
    found = {method: _ranges.ranges(seen, given, method=method) for method in METHODS}
    for method in METHODS[1:]:
        assert all(found["minmax"][t][0] <= low < high <= found["minmax"][t][1] for t, (low, high) in found[method].items()), method
    assert found["minmax"]["images"][1] == 60 and found["percentile"]["images"][1] < 6, "one value in 49152 is cut off"
    assert 6 < found["mse"]["images"][1] < 60, "what cutting it costs is weighed against the step"


@pytest.mark.parametrize("symmetric", [False, True])
def test_mse_finds_the_ends_of_least_error(symmetric):
    values = np.random.default_rng(0).laplace(0.5, 1.0, 200_000).astype(np.float32)
    most = float(np.abs(values).max())
    counts, edges = np.histogram(values, _ranges.BINS, range=(-most, most))

    def error(low: float, high: float) -> float:
        if symmetric:
            low, high = -max(-low, high), max(-low, high)
        step = (high - low) / (254 if symmetric else 255)
        zero = np.rint(-low / step)
        return float(np.square((np.clip(np.rint(values / step), -zero, (254 if symmetric else 255) - zero)) * step - values).mean())

    extremes = float(values.min()), float(values.max())
    found = _ranges._least_error(counts, edges.astype(np.float32), extremes, symmetric)
    best = min(error(a * extremes[0], b * extremes[1]) for a in np.linspace(0.2, 1, 17) for b in np.linspace(0.2, 1, 17))
    assert error(*found) < 1.03 * best and error(*found) < 0.9 * error(*extremes)


def test_bins_do_not_grow_and_nothing_is_kept(monkeypatch):
    """What the histograms hold does not depend on the number of samples, nor on the first being small."""
    part = conv_component()
    given = [{k: v * (1e-4 if i == 0 else 1.0) for k, v in s.items()} for i, s in enumerate(samples(part, 6))]
    seen = watched(part)
    found = _ranges._histograms(seen, given, _ranges._extremes(seen, given))
    assert all(len(counts) <= _ranges.BINS + 2 for counts, _ in found.values())
    sizes = {"images": 3 * 16 * 16 * 6}
    assert found["images"][0].sum() == sizes["images"]


def test_only_what_is_quantized_is_looked_at():
    part = components(tiny_sam())["decoder"]
    graph = onnx.load(float_file(part))
    chosen = quantizable(graph, dynamic=False)
    tensors = watched(part).tensors
    assert len(tensors) <= 2 * len(chosen) < 2 * sum(n.op_type in ("Conv", "MatMul", "Gemm") for n in graph.graph.node)


def test_one_calibration_serves_every_choice_of_layers(tmp_path):
    part, given = encoder(), Told(samples(encoder(), 4))
    plain = export(part, tmp_path, "a", calibration=given, keep={"stem.0": "fp32"})
    assert given.runs == 1
    for i, layer in enumerate(("stem.2", "neck", "squeeze")):
        kept = export(part, tmp_path, f"k{i}", calibration=given, keep={layer: "fp32"})
        alone = export(part, tmp_path, f"l{i}", calibration=list(given), keep={layer: "fp32"})
        assert scales(kept) == scales(alone)
    assert given.runs == 1 + 3, "3 times by the test itself"
    export(part, tmp_path, "b", calibration=given, method="percentile")
    export(part, tmp_path, "c", calibration=given, method="entropy")
    export(part, tmp_path, "d", calibration=given, method="mse", keep={"neck": "fp32"})
    assert given.runs == 1 + 3 + 1, "one pass more, for the histograms that all three share"
    assert scales(export(part, tmp_path, "e", calibration=given, keep={"stem.0": "fp32"})) == scales(plain)


def test_other_weights_are_calibrated_anew(tmp_path):
    part, given = conv_component(), Told(samples(conv_component()))
    first = scales(export(part, tmp_path, calibration=given))
    with torch.no_grad():
        next(part.module.parameters()).mul_(3)
    assert scales(export(part, tmp_path, calibration=given)) != first and given.runs == 2


def test_samples_that_do_not_say_what_they_are_are_looked_at_each_time(tmp_path):
    part, given = conv_component(), Told(samples(conv_component()))
    given.fingerprint = None
    export(part, tmp_path, "a", calibration=given)
    export(part, tmp_path, "b", calibration=given)
    assert given.runs == 2 and not _ranges._known


@pytest.mark.parametrize("method", METHODS[1:])
@pytest.mark.parametrize("qdq", ["u8s8", "s8s8_symmetric"])
def test_every_method_gives_a_file_that_runs_on_integers(tmp_path, method, qdq, capfd):
    part = encoder()
    path = export(part, tmp_path, calibration=samples(part, 4), method=method, qdq=qdq)
    assert capfd.readouterr().out == "", "stdout is for data"
    session, inputs = exporter.open(path, scheme="w8a8_static", threads=1), samples(part)[0]
    ours, theirs = session.run(inputs)["image_embeddings"], expected(part, inputs)[0]
    assert 1e-6 < np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 0.2
    assert session.executed_ops["QLinearConv"] >= 1


def test_options_are_in_the_file(tmp_path):
    part = conv_component()
    given = samples(part)
    plain, symmetric = export(part, tmp_path, "a", calibration=given), export(part, tmp_path, "b", calibration=given, symmetric=True)
    assert {int(z) for z in zeros(symmetric).values()} == {128} != {int(z) for z in zeros(plain).values()}
    asymmetric = export(part, tmp_path, "c", calibration=given, symmetric=False, qdq="s8s8_symmetric")
    assert any(z for z in zeros(asymmetric).values()) and all(z.dtype == np.int8 for z in zeros(asymmetric).values())
    tensor = onnx.load(export(part, tmp_path, "d", calibration=given, granularity="tensor")).graph
    assert max(int(np.prod(t.dims)) for t in tensor.initializer if t.name.endswith("_scale")) == 1


def test_naive_is_the_library_s_own_way(tmp_path):
    part = components(fold(tiny_sam()).eval())["encoder"]
    path = export(part, tmp_path, calibration=samples(part), naive=True)
    graph = onnx.load(path).graph
    assert all(z.dtype == np.int8 and z.ndim == 0 for z in zeros(path).values())
    chosen = onnx.load(export(part, tmp_path, "b", calibration=samples(part))).graph
    assert sum(n.op_type == "QuantizeLinear" for n in graph.node) > sum(n.op_type == "QuantizeLinear" for n in chosen.node), "it takes everything"
    assert np.isfinite(exporter.open(path, scheme="w8a8_static").run(samples(part)[0])["image_embeddings"]).all()


def test_a_layer_is_kept_in_every_scheme(tmp_path):
    part, linear = encoder(), linear_component(64)
    kept = export(part, tmp_path, "a", calibration=samples(part), keep={"neck": "fp32"})
    assert len(scales(kept)) < len(scales(export(part, tmp_path, "b", calibration=samples(part))))
    ops = [n.op_type for n in onnx.load(export(linear, tmp_path, "c", scheme="w8_dynamic", keep={"0": "fp32"})).graph.node]
    assert ops.count("MatMulInteger") == 1 and ops.count("Gemm") + ops.count("MatMul") == 1
    half = onnx.load(export(part, tmp_path, "d", scheme="fp16", calibration=samples(part), keep={"neck": "fp32"}))
    assert "neck" in next(p.value for p in half.metadata_props if p.key == KEPT)
    with pytest.raises(EdgekdError, match="kept in float"):
        export(part, tmp_path, "e", calibration=samples(part), keep=dict.fromkeys(rounding.layers(part.module), "fp32"))


def test_every_linear_layer_of_the_decoder_has_its_name():
    """The optimiser joins some into operators that forget where they came from; a layer that is not found cannot be kept."""
    part = components(tiny_sam())["decoder"]
    graph = onnx.load(float_file(part)).graph
    constant = {t.name for t in graph.initializer}
    named = {layer_of(n) for n in graph.node if n.op_type in ("MatMul", "Gemm") and n.input[1] in constant}
    assert {name for name, m in rounding.layers(part.module).items() if isinstance(m, nn.Linear)} <= named


def test_a_convolution_into_which_a_norm_was_folded_by_the_exporter_keeps_its_name(tmp_path):
    part = components(tiny_sam())["encoder"]  # not folded: the graph's optimiser does it, and calls the layer after the norm
    kept = export(part, tmp_path, "a", calibration=samples(part), keep={"stem.2.c": "fp32"})
    assert len(scales(kept)) < len(scales(export(part, tmp_path, "b", calibration=samples(part))))


@pytest.mark.parametrize(("scheme", "tuned"), [("w8_dynamic", {"method": "mse"}), ("fp16", {"granularity": "tensor"}), ("w8_dynamic", {"naive": True}),
                                               ("w8a8_static", {"equalized": True}), ("w8a8_static", {"corrected": True})])
def test_what_a_scheme_does_not_take_is_wrong_usage(tmp_path, scheme, tuned):
    with pytest.raises(UsageError, match="takes no"):
        export(conv_component(), tmp_path, scheme=scheme, calibration=samples(conv_component()), **tuned)


def trained(part: Component, bits: int = 8) -> list[dict[str, np.ndarray]]:
    """Ranges and rounded weights in the module, as training leaves them; the inputs they were seen on."""
    given = samples(part)

    def run(inputs: dict[str, np.ndarray]) -> None:
        part.module(*(torch.from_numpy(inputs[k]) for k in part.example))

    grids = rounding.observed(part.module, given, run)
    for name, layer in rounding.layers(part.module).items():
        layer.weight.data = rounding.rounded(layer.weight.data, bits, rounding.output_axis(layer))
        layer.grid = grids[name]
    return given


class Branched(nn.Module):
    """A residual sum, three readers of one tensor, a linear layer of three axes, a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1, bias=False)
        self.up, self.line = nn.ConvTranspose2d(8, 8, 2, 2), nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.gelu(self.a(x))
        x = x + self.b(x) + self.c(x)
        x = self.up(x)
        return self.line(x.flatten(2).transpose(1, 2))


def branched() -> Component:
    torch.manual_seed(0)
    return Component("encoder", Branched().eval(), {"images": torch.randn(1, 3, 16, 16)}, ("tokens",))


@pytest.mark.parametrize("qdq", ["u8s8", "s8s8_symmetric"])
@pytest.mark.parametrize("make", [conv_component, encoder, branched])
def test_the_file_computes_what_training_simulated(tmp_path, make, qdq):
    part = make()
    given = trained(part)
    grids = rounding.grids_of(part.module)
    path = exporter.export(part, tmp_path / "x.onnx", scheme="w8a8_qat", qdq=qdq, tuning=Tuning(grids=grids))[0]
    session = exporter.open(path, scheme="w8a8_qat", threads=1)
    # Signed activations off the middle run on integers where the device has such kernels; on x86 onnxruntime computes some of them in float.
    assert session.executed_ops.get("QLinearConv", 0) >= (1 if qdq == "u8s8" else 0), session.executed_ops
    for inputs in given:
        with rounding.simulated(part.module):
            simulated = expected(part, inputs)[0]
        got = session.run(inputs)[part.outputs[0]]
        step = max(rounding.activation_step(g.output) for g in grids.values() if g.output is not None)
        assert np.abs(got - simulated).max() <= 2 * step and np.abs(got - simulated).mean() < 0.02 * np.abs(simulated - expected(part, inputs)[0]).mean()


def test_ends_that_differ_between_the_readers_of_one_tensor_are_each_kept(tmp_path):
    part = branched()
    given = trained(part)
    for name in ("b", "c"):
        low, high = getattr(part.module, name).grid.input
        getattr(part.module, name).grid = Grid((low, high * (0.5 if name == "b" else 0.9)), getattr(part.module, name).grid.output)
    part.module.up.grid = Grid(part.module.up.grid.input, None)
    part.module.line.grid = Grid(None, part.module.line.grid.output)
    path = export(part, tmp_path, scheme="w8a8_qat", grids=rounding.grids_of(part.module))
    with rounding.simulated(part.module):
        simulated = expected(part, given[0])[0]
    got = exporter.open(path, scheme="w8a8_qat").run(given[0])["tokens"]
    assert np.abs(got - simulated).mean() < 0.02 * np.abs(simulated - expected(part, given[0])[0]).mean()


def test_weights_of_fifteen_levels_come_out_as_they_are(tmp_path):
    part = encoder()
    given = trained(part, bits=4)
    path = export(part, tmp_path, scheme="w4a8_qat", weight_bits=4, grids=rounding.grids_of(part.module))
    graph = onnx.load(path).graph
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    checked = 0
    for name, layer in rounding.layers(part.module).items():
        levels = next(v for k, v in constants.items() if v.dtype == np.int8 and k == f"{name}.weight_quantized")
        scale = constants[f"{name}.weight_scale"].reshape(-1, 1, 1, 1)
        np.testing.assert_allclose(levels * scale, layer.weight.detach().numpy(), atol=1e-6)
        checked += int(np.abs(levels).max() <= 7)
    assert checked == 7
    assert np.isfinite(exporter.open(path, scheme="w4a8_qat").run(given[0])["image_embeddings"]).all()


def test_a_step_is_found_from_what_lies_on_it():
    """Nine weights of a depthwise channel need not have two that are one step apart."""
    step = np.float32(0.013)
    rows = np.array([[-3, 0, 5, 7], [-4, 0, 2, 0], [0, 0, 0, 0], [6, 4, -6, 0]]) * step
    found = _grids._steps(rows[:, :, None, None].astype(np.float32), 0, 4)
    np.testing.assert_allclose(found[[0, 1, 3]], [step, 2 * step, 2 * step], rtol=1e-6)
    free = np.abs(np.random.default_rng(0).standard_normal((2, 50))).astype(np.float32)
    np.testing.assert_allclose(_grids._steps(free, 0, 4), free.max(1) / 127, rtol=1e-6)


def test_a_layer_without_a_trained_range_stays_in_float(tmp_path):
    part = encoder()
    trained(part)
    grids = {k: g for k, g in rounding.grids_of(part.module).items() if k != "neck"}
    whole = export(part, tmp_path, "a", scheme="w8a8_qat", grids=rounding.grids_of(part.module))
    for i, tuned in enumerate(({"grids": grids}, {"grids": rounding.grids_of(part.module), "keep": {"neck": "fp32"}})):
        assert 0 < len(scales(export(part, tmp_path, f"b{i}", scheme="w8a8_qat", **tuned))) < len(scales(whole))


def test_ranges_of_a_layer_that_is_not_there_are_refused(tmp_path):
    part = encoder()
    trained(part)
    with pytest.raises(EdgekdError, match="not in the exported graph, for instance 'gone'"):
        export(part, tmp_path, scheme="w8a8_qat", grids={**rounding.grids_of(part.module), "gone": Grid((0, 1), (0, 1))})
    with pytest.raises(UsageError, match="no ranges were trained"):
        export(part, tmp_path, scheme="w8a8_qat")


def nothing(part: Component) -> list[dict[str, np.ndarray]]:
    return []


def constant(part: Component) -> list[dict[str, np.ndarray]]:
    """Photos of one colour each: the channels differ."""
    return [{"images": np.broadcast_to(np.array([i, -1.0, 0.5], np.float32)[None, :, None, None], (1, 3, 16, 16)).copy()} for i in range(3)]


def broken(part: Component) -> list[dict[str, np.ndarray]]:
    given = samples(part)
    given[2]["images"][0, 1, 5, 5] = np.nan
    return given


@pytest.mark.parametrize("tuned", [{}, {"method": "mse"}, {"naive": True}])
@pytest.mark.parametrize(("make", "why"), [(nothing, "no calibration samples"), (constant, "constant"), (broken, "sample 3 .* not finite")])
def test_samples_that_ranges_cannot_be_found_on_are_refused(tmp_path, make, why, tuned):
    part = conv_component()
    with pytest.raises(UsageError, match=why):
        export(part, tmp_path, calibration=make(part), **tuned)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_no_numbers_are_refused_by_the_name_of_the_layer(tmp_path, bad):
    """onnxruntime's minima and maxima pass over NaN, and its calibrators after them."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    with torch.no_grad():
        module[2].bias[5] = bad
    part = Component("encoder", module, {"images": torch.randn(1, 3, 16, 16)}, ("image_embeddings",))
    with pytest.raises(EdgekdError, match=r"not finite .* what layer '2' writes") as e:
        export(part, tmp_path, calibration=samples(part))
    assert e.value.where == "encoder" and list(tmp_path.iterdir()) == []


def test_a_component_with_nothing_to_quantize_is_refused(tmp_path):
    part = Component("head", nn.Softmax(dim=1).eval(), {"x": torch.randn(2, 4)}, ("y",))
    with pytest.raises(EdgekdError, match="nothing to quantize"):
        export(part, tmp_path, calibration=samples(part))


def test_a_source_is_only_read(tmp_path):
    part = conv_component()
    file = float_file(part)
    before = file.read_bytes()
    export(part, tmp_path, calibration=samples(part), method="entropy")
    assert file.read_bytes() == before and sorted(f.name for f in file.parent.iterdir()) == ["float.onnx"]
    assert Source(file, "x", False).varying is False


class Gated(nn.Module):
    """(1, 4, 8, 8) -> the same. Two convolutions with a GELU between them, and one that is no GELU: its two factors read different values."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.second(nn.functional.gelu(self.first(images)))
        return (images * 0.5) * (1 + torch.erf(x / 2**0.5))


@pytest.mark.parametrize("qdq", ["u8s8", "s8s8_symmetric"])
def test_a_gelu_between_integers_is_one_operator_where_onnxruntime_runs_it(tmp_path, qdq):
    part = Component("encoder", Gated().eval(), {"images": torch.randn(1, 4, 8, 8)}, ("y",))
    path = tmp_path / "x.onnx"
    exporter.export(part, path, scheme="w8a8_static", calibration=samples(part), qdq=qdq)
    kinds = [n.op_type for n in onnx.load(path).graph.node]
    assert (kinds.count("Gelu"), kinds.count("Erf")) == ((1, 1) if qdq == "u8s8" else (0, 2))
    session, inputs = exporter.open(path, scheme="w8a8_static", threads=1), samples(part)[0]
    np.testing.assert_allclose(session.run(inputs)["y"], expected(part, inputs)[0], atol=0.1)
    assert "int8" in session.executed_precision


@pytest.mark.parametrize("act", [nn.ReLU(), nn.ReLU6()])
@pytest.mark.parametrize("format", ["onnx", "tensorrt"])
def test_what_an_activation_cuts_off_gets_no_levels(tmp_path, format, act):
    """The first convolution reaches far below and beyond what is left of it: all 8 bits are for the rest, and only behind the activation."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
    with torch.no_grad():
        first.weight *= 20
    part = Component("encoder", nn.Sequential(first, act, second).eval(), {"images": torch.randn(1, 3, 16, 16)}, ("y",))
    path, inputs = tmp_path / "x.onnx", samples(part)[0]
    plugins.exporter(format).export(part, path, scheme="w8a8_static", calibration=samples(part))
    graph = onnx.load(path).graph
    made = {t: n for n in graph.node for t in n.output}
    activations = [n for n in graph.node if n.op_type in ("Relu", "Clip")]
    assert [made[n.input[0]].op_type for n in activations] == ([] if format == "onnx" else ["Conv"])
    levels = 255 if format == "onnx" else 127
    reached = float(act(first(torch.from_numpy(np.concatenate([s["images"] for s in samples(part)])))).max())
    read = made[[n for n in graph.node if n.op_type == "Conv"][-1].input[0]]
    step = next(onnx.numpy_helper.to_array(t) for t in graph.initializer if t.name == read.input[1])
    assert float(step) == pytest.approx(reached / levels, rel=0.02)
    session = exporter.open(path, scheme="w8a8_static", threads=1)
    wanted = expected(part, inputs)[0]
    assert np.abs(session.run(inputs)["y"] - wanted).max() < 0.05 * np.abs(wanted).max()
    assert format != "onnx" or session.executed_precision == "int8"
