from __future__ import annotations

import builtins
from pathlib import Path

import numpy as np
import pytest
from edgekd.export import litert as export_litert
from edgekd.export.litert import exporter
from tiny import conv_component, expected, linear_component, samples, tiny_sam

from edgekd.errors import EdgekdError, UsageError
from edgekd.models.fold import fold
from edgekd.models.sam import components
from edgekd.protocols import Component, package_version

missing = [p for p in ("litert-torch", "ai-edge-quantizer", "ai-edge-litert") if not package_version(p)]
needs_litert = pytest.mark.skipif(bool(missing), reason='LiteRT is not installed here: pip install "edgekd[litert]"')
pytestmark = needs_litert


@pytest.fixture(scope="module")
def encoder() -> Component:
    return conv_component()


@pytest.fixture(scope="module")
def decoder() -> Component:
    return components(fold(tiny_sam()).eval())["decoder"].fixed()


def prompts(seed: int, count: int = 1) -> list[dict[str, np.ndarray]]:
    """Inputs of the decoder: six points, of which the last are absent."""
    rng, found = np.random.default_rng(seed), []
    for i in range(count):
        labels = np.full((1, 6), -2.0)
        labels[0, :1 + i % 4] = [1, 0, 2, 3][i % 4]
        found.append({"image_embeddings": rng.standard_normal((1, 32, 4, 4)), "point_coords": rng.uniform(0, 64, (1, 6, 2)), "point_labels": labels,
                      "mask_input": rng.standard_normal((1, 1, 16, 16)), "has_mask": np.array([i % 2])})
    return [{k: v.astype(np.float32) for k, v in one.items()} for one in found]


def opened(component: Component, folder: Path, scheme: str, **options):
    path = folder / f"{component.name}-{scheme}.tflite"
    assert exporter.export(component, path, scheme=scheme, **options) == [path]
    assert list(folder.glob(".*")) == [], "nothing half-written stays"
    return exporter.open(path, scheme=scheme, threads=1)


def error(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def test_fp32_computes_what_torch_does_under_the_components_names(encoder, tmp_path, capfd):
    session = opened(encoder, tmp_path, "fp32")
    assert [(p.name, p.shape, p.dtype) for p in session.inputs] == [("images", (1, 3, 16, 16), "float32")]
    inputs = samples(encoder)[0]
    np.testing.assert_allclose(session.run(inputs | {"unknown": inputs["images"]})["image_embeddings"], expected(encoder, inputs)[0], atol=1e-5)
    assert session.executed_precision == "fp32" and session.executed_ops["CONV_2D:f32"] == 2
    assert capfd.readouterr().out == "", "stdout is for data"


def test_a_fixed_decoder_is_exact_and_shows_what_xnnpack_left(decoder, tmp_path):
    session = opened(decoder, tmp_path, "fp32")
    assert [p.name for p in session.inputs] == list(decoder.example)
    for inputs in prompts(0, 4):
        out = session.run(inputs)
        masks, iou = expected(decoder, inputs)
        np.testing.assert_allclose(out["masks"], masks, atol=1e-5)
        np.testing.assert_allclose(out["iou"], iou, atol=1e-5)
    ops = session.executed_ops
    assert ops["FULLY_CONNECTED:f32"] > 40 and any(k.startswith("EQUAL (outside XNNPACK)") for k in ops)


def test_static_int8_of_the_decoder_keeps_coordinates_and_choices_in_float(decoder, tmp_path):
    session = opened(decoder, tmp_path, "w8a8_static", calibration=prompts(1, 16))
    assert session.executed_precision.startswith("int8") and session.executed_ops["FULLY_CONNECTED:i8"] > 20
    assert all("i8" not in k for k in session.executed_ops if k.startswith(("EQUAL", "SIN", "COS")))
    for inputs in prompts(2, 4):
        assert error(session.run(inputs)["masks"], expected(decoder, inputs)[0]) < 0.1
        assert error(session.run(inputs)["iou"], expected(decoder, inputs)[1]) < 0.1


@pytest.mark.parametrize(("scheme", "tag", "most"), [
    ("w8a8_static", "i8", 0.05), ("w8a16_static", "i16", 0.02), ("w8_dynamic", "i8", 0.05), ("w8_weight_only", "f32", 0.02), ("fp16", "f32", 1e-3)])
def test_a_reduced_precision_is_read_back_and_near(encoder, tmp_path, scheme, tag, most):
    session = opened(encoder, tmp_path, scheme, calibration=samples(encoder, 8) if scheme.endswith("_static") else None)
    assert [p.dtype for p in session.inputs] == ["float32"]
    assert any(k.startswith("CONV_2D") and k.endswith(f":{tag}") for k in session.executed_ops), session.executed_ops
    inputs = samples(encoder, 8)[0]
    assert 0 < error(session.run(inputs)["image_embeddings"], expected(encoder, inputs)[0]) < most


def test_sixteen_bit_activations_are_seen_outside_of_xnnpack(encoder, tmp_path):
    session = opened(encoder, tmp_path, "w8a16_static", calibration=samples(encoder, 4))
    assert session.executed_precision == "int16" and session.executed_ops["CONV_2D (outside XNNPACK):i16"] == 2


def test_weights_take_the_bits_of_their_scheme(tmp_path):
    part = linear_component(512)
    sizes = {}
    for scheme in ("fp32", "fp16", "w8_weight_only"):
        opened(part, tmp_path, scheme)
        sizes[scheme] = (tmp_path / f"head-{scheme}.tflite").stat().st_size
    weights = sum(p.numel() for p in part.module.parameters())
    assert sizes["fp32"] - sizes["fp16"] > 1.7 * weights and sizes["fp32"] - sizes["w8_weight_only"] > 2.5 * weights


def test_outputs_are_the_callers_own_and_inputs_may_lie_anyhow(encoder, tmp_path):
    session = opened(encoder, tmp_path, "fp32")
    a, b = samples(encoder, 2)
    first = session.run(a)["image_embeddings"]
    kept = first.copy()
    strided = np.ascontiguousarray(b["images"].transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(session.run({"images": strided})["image_embeddings"], expected(encoder, b)[0], atol=1e-5)
    np.testing.assert_array_equal(first, kept)
    with pytest.raises(EdgekdError, match="cannot run"):
        session.run({"images": np.zeros((1, 3, 8, 8), np.float32)})


def test_static_schemes_need_inputs(encoder, tmp_path):
    with pytest.raises(UsageError, match="needs calibration"):
        exporter.export(encoder, tmp_path / "x.tflite", scheme="w8a8_static")
    with pytest.raises(UsageError, match="empty"):
        exporter.export(encoder, tmp_path / "x.tflite", scheme="w8a8_static", calibration=[])
    with pytest.raises(UsageError, match="unknown litert scheme"):
        exporter.export(encoder, tmp_path / "x.tflite", scheme="w4_weight_only")
    assert list(tmp_path.iterdir()) == []


def test_a_converter_that_fails_leaves_nothing_and_gives_its_reason(encoder, tmp_path, monkeypatch):
    def fails(function, request, **options):
        raise EdgekdError("litert-torch died of signal SIGABRT: no such lowering")

    monkeypatch.setattr(export_litert, "call", fails)
    other = Component("head", encoder.module, {"images": encoder.example["images"][..., :8, :8].contiguous()}, encoder.outputs)
    with pytest.raises(EdgekdError, match="SIGABRT: no such lowering") as e:
        exporter.export(other, tmp_path / "x.tflite", scheme="fp32")
    assert e.value.where == "head" and list(tmp_path.iterdir()) == []


def test_nothing_to_quantize_is_refused(tmp_path):
    import torch

    part = Component("pool", torch.nn.AvgPool2d(2).eval(), {"images": torch.randn(1, 3, 8, 8)}, ("y",))
    with pytest.raises(EdgekdError, match="nothing to quantize"):
        exporter.export(part, tmp_path / "x.tflite", scheme="w8_dynamic")


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "x.tflite"
    path.write_bytes(b"TFL3" * 100)
    with pytest.raises(EdgekdError, match="LiteRT cannot open"):
        exporter.open(path, scheme="fp32")


def test_without_torchs_converter_files_still_run(monkeypatch):
    monkeypatch.setattr(export_litert, "package_version", lambda name: "2.3.0" if name == "ai-edge-litert" else None)
    found = exporter.availability()
    assert not found.ok and found.runs and found.version == "ai-edge-litert 2.3.0" and found.fix == 'pip install "edgekd[litert]"'
    assert "litert-torch" in (found.reason or "") and "ai-edge-litert" not in (found.reason or "")
    monkeypatch.setattr(export_litert, "package_version", lambda name: None)
    found = exporter.availability()
    assert not found.ok and not found.runs


def test_a_missing_runtime_is_told_with_the_command_that_mends_it(monkeypatch, tmp_path):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.startswith("ai_edge_litert"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(EdgekdError, match="not installed") as e:
        exporter.open(tmp_path / "x.tflite", scheme="fp32")
    assert e.value.hint == "pip install ai-edge-litert"
