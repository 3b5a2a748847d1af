"""OpenVINO's integers: how they are chosen, what stays in float beside them, trained ranges, and inputs that cannot be used."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from edgekd.export import _openvino_quantize as quantizing
from edgekd.export import openvino as export_openvino
from edgekd.export._openvino_layers import executed, operators
from edgekd.export.onnx import float_file
from edgekd.export.openvino import exporter
from tiny import conv_component, expected, samples, tiny_sam
from torch import nn

from edgekd import schemes
from edgekd.errors import EdgekdError, UsageError
from edgekd.models.fold import fold
from edgekd.models.rounding import contained, layers, observed, output_axis, simulated
from edgekd.models.sam import components
from edgekd.protocols import Component
from edgekd.tuning import Grid, Tuning

openvino = pytest.importorskip("openvino")
BF16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
needs_bf16 = pytest.mark.skipif(not BF16, reason="this CPU has no bf16 arithmetic")


class Known(list):
    """Calibration inputs that say what they are, and count how often they are asked for."""

    def __init__(self, inputs: list[dict[str, np.ndarray]]) -> None:
        super().__init__(inputs)
        self.passes = 0

    def fingerprint(self) -> str:
        return f"these {len(self)}"

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        self.passes += 1
        return super().__iter__()


class Residual(nn.Module):
    """Convolutions with a residual sum, a depthwise one, and a head: (B, 3, 16, 16) -> (B, 4, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 32, 1)
        self.each, self.back, self.head = nn.Conv2d(32, 32, 3, 1, 1, groups=32), nn.Conv2d(32, 16, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        return self.head(x + self.back(torch.relu(self.each(self.wide(x)))))


def residual() -> Component:
    torch.manual_seed(0)
    return Component("encoder", Residual().eval(), {"images": torch.randn(1, 3, 16, 16)}, ("y",))


def written(part: Component, folder: Path, tuning: Tuning, *, calibration: object = None, scheme: str = "w8a8_static") -> export_openvino.OpenVinoSession:
    path = folder / "x.xml"
    exporter.export(part, path, scheme=scheme, tuning=tuning, calibration=samples(part, 6) if calibration is None else calibration)
    return exporter.open(path, scheme=scheme, threads=1)


def precisions(part: Component, session: export_openvino.OpenVinoSession) -> dict[str, str]:
    """Layer -> what its kernel is executed in."""
    found = {name: precision for name, (_, precision) in executed(session._compiled).items()}
    graph = float_file(part)
    return {layer: found[names[0]] for layer, names in operators(openvino.Core().read_model(str(graph)), graph).items()}


def gap(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize("option", ["percentile", "mse", "per_tensor", "symmetric", "equalized", "uncorrected", "naive"])
def test_options_change_what_is_written_and_integers_still_run(tmp_path, option):
    precision = schemes.parse(f"w8a8_static[{option}]")
    schemes.refuse(exporter, precision)
    part = residual()
    calibration = samples(part, 6)
    for one in calibration[:3]:
        one["images"][0, 0, 3, 3] = 30.0  # an outlier for the methods that cut
    plain = written(part, tmp_path, Tuning(), calibration=calibration)
    tuned = written(part, tmp_path, precision.tuning, calibration=calibration)
    assert tuned.executed_precision.startswith("int8")
    inputs = samples(part, 1, seed=9)[0]
    ours, without, wanted = tuned.run(inputs)["y"], plain.run(inputs)["y"], expected(part, inputs)[0]
    assert not np.array_equal(ours, without)
    assert gap(ours, wanted) < 0.35


def test_accurate_bias_correction_is_another_than_the_fast_one(tmp_path, monkeypatch):
    asked = []
    real = quantizing.settings
    monkeypatch.setattr(quantizing, "settings", lambda *given: asked.append(real(*given)) or asked[-1])
    session = written(residual(), tmp_path, schemes.parse("w8a8_static[corrected]").tuning)
    assert session.executed_precision.startswith("int8") and not asked[0]["fast_bias_correction"]


def test_what_openvino_has_no_word_for_is_refused():
    with pytest.raises(UsageError, match="entropy"):
        schemes.refuse(exporter, schemes.parse("w8a8_static[entropy]"))


def test_depthwise_convolutions_stay_in_float_unless_all_is_left_to_the_library(tmp_path):
    found = written(residual(), tmp_path, Tuning()).executed_ops
    assert found["Convolution:f32"] == 1 and found["Convolution:u8"] == 4


def test_kept_layers_are_executed_in_float(tmp_path):
    part = residual()
    found = precisions(part, written(part, tmp_path, Tuning(keep={"wide": "fp32", "head": "fp32"})))
    assert found == {"stem": "u8", "wide": "f32", "each": "f32", "back": "u8", "head": "f32"}


@needs_bf16
def test_rest_in_bf16_is_read_back_and_written_into_the_file(tmp_path):
    session = written(residual(), tmp_path, Tuning(rest="bf16"))
    assert session.executed_precision == "int8+bf16", session.executed_ops
    assert "edgekd.hint" in (tmp_path / "x.xml").read_text()
    inputs = samples(residual(), 1)[0]
    assert gap(session.run(inputs)["y"], expected(residual(), inputs)[0]) < 0.1


@needs_bf16
@pytest.mark.parametrize("layer", ["back", "wide", "head"])
@pytest.mark.parametrize(("rest", "kept", "read_back"), [("fp32", "bf16", "bf16"), ("bf16", "fp32", "f32"), ("bf16", "bf16", "bf16")])
def test_a_layer_can_be_kept_in_the_other_float_type(tmp_path, layer, rest, kept, read_back):
    part = residual()
    session = written(part, tmp_path, Tuning(keep={layer: kept}, rest=rest))
    found = precisions(part, session)
    assert found.pop(layer) == read_back and found.pop("each") == {"fp32": "f32", "bf16": "bf16"}[rest]
    assert set(found.values()) == {"u8"}
    inputs = samples(part, 1)[0]
    assert gap(session.run(inputs)["y"], expected(part, inputs)[0]) < 0.1


def test_rest_in_bf16_is_refused_where_the_cpu_has_none(tmp_path, monkeypatch):
    monkeypatch.setattr(export_openvino, "_capabilities", lambda: ["FP32", "INT8"])
    calibration = Known(samples(residual(), 2))
    for tuning in (Tuning(rest="bf16"), Tuning(keep={"wide": "bf16"})):
        with pytest.raises(EdgekdError, match="no bf16 arithmetic"):
            exporter.export(residual(), tmp_path / "x.xml", scheme="w8a8_static", calibration=calibration, tuning=tuning)
    assert not calibration.passes and not list(tmp_path.iterdir())


@needs_bf16
def test_a_file_with_its_rest_in_bf16_is_not_opened_on_such_a_cpu(tmp_path, monkeypatch):
    written(residual(), tmp_path, Tuning(rest="bf16"))
    monkeypatch.setattr(export_openvino, "_capabilities", lambda: ["FP32", "INT8"])
    with pytest.raises(EdgekdError, match="no bf16 arithmetic"):
        exporter.open(tmp_path / "x.xml", scheme="w8a8_static")


@pytest.mark.parametrize("name", ["residual", "encoder", "decoder"])
def test_variants_share_one_quantization_and_are_what_a_quantization_of_their_own_gives(tmp_path, monkeypatch, name):
    part = residual() if name == "residual" else components(tiny_sam())[name]
    monkeypatch.setattr(quantizing, "_quantized", type(quantizing._quantized)())
    calls: list[set[str]] = []
    real = quantizing._by_nncf
    monkeypatch.setattr(quantizing, "_by_nncf", lambda model, job, kept: calls.append(kept) or real(model, job, kept))
    known = list(layers(part.module))
    calibration = Known(decoder_inputs(4) if name == "decoder" else samples(part, 4))
    for keep in ([], known[2::2], known[1::3]):
        tuning = Tuning(keep=dict.fromkeys(keep, "fp32"))
        shared = written(part, tmp_path / "a", tuning, calibration=calibration)
        alone = written(part, tmp_path / "b", tuning, calibration=list(calibration))
        for inputs in calibration[:2]:
            for ours, theirs in zip(shared.run(inputs).values(), alone.run(inputs).values(), strict=True):
                np.testing.assert_allclose(ours, theirs, atol=1e-6)
        assert shared.executed_ops == alone.executed_ops
    assert len(calls) == 4, "one that is shared, and three on their own"


def decoder_inputs(count: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    found = [{"image_embeddings": rng.standard_normal((1, 32, 4, 4)), "point_coords": rng.uniform(0, 64, (2, 3, 2)), "point_labels": rng.integers(-1, 4, (2, 3)),
              "mask_input": rng.standard_normal((2, 1, 16, 16)), "has_mask": rng.integers(0, 2, 2)} for _ in range(count)]
    return [{k: v.astype(np.float32) for k, v in one.items()} for one in found]


@pytest.mark.parametrize(("scheme", "bits"), [("w8a8_qat", 8), ("w4a8_qat", 4)])
@pytest.mark.parametrize("name", ["residual", "encoder", "decoder"])
def test_trained_ranges_are_executed_as_they_were_simulated(tmp_path, name, scheme, bits):
    part = residual() if name == "residual" else components(fold(tiny_sam()).eval())[name]
    inputs = decoder_inputs(4) if name == "decoder" else samples(part, 4)
    grids = observed(part.module, inputs, lambda one: expected(part, one))
    with torch.no_grad():
        for layer in layers(part.module).values():
            layer.weight.copy_(contained(layer.weight, bits, output_axis(layer)))
    session = written(part, tmp_path, Tuning(grids=grids, weight_bits=bits), scheme=scheme)
    assert session.executed_precision.startswith("int8"), session.executed_ops
    ops = {k: n for k, n in session.executed_ops.items() if k.split(":")[0] in ("Convolution", "FullyConnected")}
    assert sum(n for k, n in ops.items() if k.endswith(("u8", "i8"))) >= 0.8 * sum(ops.values()), ops
    floats, found = (np.stack([run(one) for one in inputs]) for run in (lambda one: expected(part, one)[0], lambda one: next(iter(session.run(one).values()))))
    with simulated(part.module, {name: Grid(grid.input, None) for name, grid in grids.items()}):
        same = np.stack([expected(part, one)[0] for one in inputs])
    with simulated(part.module, grids):
        trained = np.stack([expected(part, one)[0] for one in inputs])
    assert gap(found, same) < 0.35 * gap(floats, same), "the roundings that it has are the trained ones"
    assert gap(found, trained) < 0.03


def test_prompt_tokens_stay_in_float_at_fixed_lengths_too(tmp_path):
    """Quantized, they left no mask of a trained decoder."""
    part = replace(components(tiny_sam())["decoder"], lengths={"prompts": 2, "points": 3}).fixed()
    session = written(part, tmp_path, Tuning(), calibration=decoder_inputs(2))
    dynamic = written(components(tiny_sam())["decoder"], tmp_path, Tuning(), calibration=decoder_inputs(2))
    integer = [sum(n for k, n in s.executed_ops.items() if k in ("FullyConnected:u8", "FullyConnected:i8", "MatMul:u8", "MatMul:i8")) for s in (session, dynamic)]
    assert integer[0] <= integer[1]


def test_layers_without_trained_ranges_stay_in_float(tmp_path):
    part = residual()
    grids = observed(part.module, samples(part), lambda one: expected(part, one))
    del grids["wide"], grids["head"]
    found = written(part, tmp_path, Tuning(grids=grids), scheme="w8a8_qat").executed_ops
    assert found["Convolution:f32"] == 2


def test_trained_schemes_without_ranges_are_wrong_usage(tmp_path):
    with pytest.raises(UsageError, match="trained ranges"):
        exporter.export(conv_component(), tmp_path / "x.xml", scheme="w8a8_qat")
    with pytest.raises(EdgekdError, match="none of its layers"):
        exporter.export(conv_component(), tmp_path / "x.xml", scheme="w8a8_qat", tuning=Tuning(grids={"other": Grid((0, 1), None)}))


def test_the_library_can_search_for_itself(tmp_path):
    from edgekd.export._openvino_accuracy import quantize_with_accuracy_control

    part = residual()
    calibration = samples(part, 4)
    wanted = [expected(part, one)[0] for one in calibration]

    def closeness(session: export_openvino.OpenVinoSession) -> float:
        return -max(gap(session.run(one)["y"], w) for one, w in zip(calibration, wanted, strict=True))

    loose = quantize_with_accuracy_control(part, tmp_path / "a.xml", calibration=calibration, validate=closeness, max_drop=1.0)
    assert loose.reverted == [] and loose.validations >= 2
    tight = quantize_with_accuracy_control(part, tmp_path / "b.xml", calibration=calibration, validate=closeness, max_drop=1e-3)
    assert tight.reverted and set(tight.reverted) <= set(layers(part.module))
    assert closeness(exporter.open(tight.files[0], scheme="w8a8_static", threads=1)) > closeness(exporter.open(loose.files[0], scheme="w8a8_static", threads=1))


@pytest.mark.parametrize(("inputs", "said"), [
    ([], "no calibration samples"),
    ([{"images": np.full((1, 3, 16, 16), np.nan, np.float32)}], "not finite"),
    ([{"images": np.full((1, 3, 16, 16), 0.5, np.float32)}] * 3, "constant"),
])
def test_inputs_that_no_range_follows_from_are_wrong_usage(tmp_path, inputs, said):
    with pytest.raises(UsageError, match=said):
        exporter.export(residual(), tmp_path / "x.xml", scheme="w8a8_static", calibration=inputs)
    assert not list(tmp_path.glob("*"))


def test_activations_that_are_not_finite_are_told(tmp_path):
    part = residual()
    with torch.no_grad():
        part.module.back.weight[0, 0] = float("nan")
    with pytest.raises(EdgekdError, match="NaN or infinity"):
        exporter.export(part, tmp_path / "x.xml", scheme="w8a8_static", calibration=samples(part))
