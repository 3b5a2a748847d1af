"""fp16 with what overflows kept in fp32: found on real inputs, named, and only that."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from edgekd.export import _half
from edgekd.export import onnx as export_onnx
from edgekd.export import openvino as export_openvino
from PIL import Image
from tiny import SIZE, conv_component, expected, samples, tiny_sam

from edgekd import comparing, resolve, target
from edgekd.artifact import Manifest
from edgekd.data.images import preprocess
from edgekd.errors import EdgekdError, UsageError
from edgekd.exporting import export_model, open_artifact
from edgekd.models.sam import Sam, components
from edgekd.probes import pictures
from edgekd.protocols import Component

IMAGES = pictures(2, SIZE, np.random.default_rng(3))
INPUTS = [{"images": i[None]} for i in IMAGES]


def wide_sam() -> Sam:
    """The tiny model with weights that fp16 can hold and a LayerNorm input that it cannot; the norm divides the scale out again."""
    model = tiny_sam()
    with torch.no_grad():
        model.encoder.stem[6].bn.weight.mul_(500)  # type: ignore[operator, union-attr]
        model.encoder.neck.weight.mul_(5e4)  # type: ignore[operator, union-attr]
    return model


def encoder(model: Sam) -> Component:
    return components(model)["encoder"]


def types(path: Path) -> dict[str, int]:
    return {t.name: t.data_type for t in onnx.load(path).graph.initializer}


def test_naive_fp16_fails_where_ours_is_finite_and_the_layers_are_named(tmp_path):
    part = encoder(wide_sam())
    assert max(float(p.abs().max()) for p in part.module.parameters()) < _half.LARGEST, "the weights alone would fit"
    naive = export_onnx._write(_half.convert(export_onnx.float_file(part), []), tmp_path / "naive.onnx", large=False)[0]
    wrong = export_onnx.exporter.open(naive, scheme="fp16", threads=1).run(INPUTS[0])["image_embeddings"]
    path = export_onnx.exporter.export(part, tmp_path / "ours.onnx", scheme="fp16", calibration=INPUTS)[0]
    session = export_onnx.exporter.open(path, scheme="fp16", threads=1)
    ours, theirs = session.run(INPUTS[0])["image_embeddings"], expected(part, INPUTS[0])[0]
    assert not np.isfinite(wrong).all() or np.abs(wrong - theirs).max() > 0.5 * np.abs(theirs).max()
    assert np.abs(ours - theirs).max() < 0.01 * np.abs(theirs).max()
    assert set(session.kept_fp32) >= {"neck", "norm"} and "LayerNormalization" in session.kept_fp32["norm"]
    assert session.kept_fp32.keys().isdisjoint({"stem.0", "stem.2", "squeeze"})
    weights = types(path)
    assert weights["stem.0.c.weight"] == weights["squeeze.weight"] == onnx.TensorProto.FLOAT16
    assert weights["neck.weight"] == onnx.TensorProto.FLOAT


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_the_manifest_names_what_was_kept_and_what_is_executed(tmp_path, format):
    if format == "openvino":
        pytest.importorskip("openvino")
    manifest = export_model(wide_sam(), tmp_path / "a", format=format, scheme="fp16", examples=IMAGES, threads=1)
    parts = manifest.components
    assert {"neck", "norm"} <= set(parts["encoder"].kept_fp32) and "prompt_encoder.pe_layer" in parts["decoder"].kept_fp32
    for part in parts.values():
        assert part.scheme == "fp16" and part.parity["mask_iou"] >= 0.99 and part.parity["finite"]
        assert (part.note is None) == ("fp16" in part.executed_precision.split("+")), part.note
    assert not tiny_artifact_keeps(tmp_path)


def tiny_artifact_keeps(folder: Path) -> dict[str, str]:
    """What is kept of the encoder whose ranges fit."""
    return export_model(tiny_sam(), folder / "plain", format="onnx", scheme="fp16", examples=IMAGES, threads=1).components["encoder"].kept_fp32


def test_half_the_size(tmp_path):
    part = components(tiny_sam())["decoder"]
    rng = np.random.default_rng(0)
    given = [{k: rng.standard_normal(tuple(v.shape)).astype(np.float32) for k, v in part.example.items()}]
    full = export_onnx.exporter.export(part, tmp_path / "a.onnx", scheme="fp32")[0]
    half = export_onnx.exporter.export(part, tmp_path / "b.onnx", scheme="fp16", calibration=given)[0]
    weights = {p: sum(len(t.raw_data) for t in onnx.load(p).graph.initializer) for p in (full, half)}
    assert weights[half] < 0.6 * weights[full]


def test_the_position_code_stays_in_fp32_only_where_its_angles_are_large():
    """cos(40) in fp16 is off by as much as 0.015: clicks would move."""
    class Code(torch.nn.Module):
        def forward(self, x):
            return torch.sin(x * 4 + 1)

    part = Component("code", Code().eval(), {"x": torch.randn(1, 4)}, ("y",))
    file = export_onnx.float_file(part)
    assert _half.overflowing(file, [{"x": np.full((1, 4), 0.5, np.float32)}]) == []
    kept = _half.overflowing(file, [{"x": np.full((1, 4), 10.0, np.float32)}])
    assert {k.why for k in kept} == {"angles of a position code"} and len(kept) == len(onnx.load(file).graph.node)


def test_sums_of_squares_inside_a_norm_count():
    """Every value fits, their squares' sum does not."""
    module = torch.nn.Sequential(torch.nn.Identity(), torch.nn.LayerNorm(64)).eval()
    part = Component("norm", module, {"x": torch.randn(2, 64)}, ("y",))
    file = export_onnx.float_file(part)
    assert _half.overflowing(file, [{"x": np.full((2, 64), 10.0, np.float32)}]) == []
    (kept,) = _half.overflowing(file, [{"x": np.full((2, 64), 40.0, np.float32)}])
    assert kept.layer == "1" and kept.why == "LayerNormalization sums squares to 1.02e+05"


def test_nothing_passes_through_fp16_between_two_kept_nodes(tmp_path):
    """The converter casts down and up again between neighbours that both stay; the value that overflows would be lost there."""
    part = encoder(wide_sam())
    path = export_onnx.exporter.export(part, tmp_path / "x.onnx", scheme="fp16", calibration=INPUTS)[0]
    graph = onnx.load(path).graph
    casts = {n.output[0]: n for n in graph.node if n.op_type == "Cast"}
    assert casts and not [n for n in casts.values() if n.input[0] in casts]
    assert len({n.name for n in graph.node}) == len(graph.node)


def test_inputs_and_outputs_stay_float32(tmp_path):
    part = conv_component()
    graph = onnx.load(export_onnx.exporter.export(part, tmp_path / "x.onnx", scheme="fp16", calibration=samples(part))[0]).graph
    assert {v.type.tensor_type.elem_type for v in [*graph.input, *graph.output]} == {onnx.TensorProto.FLOAT}


def test_without_inputs_it_is_refused(tmp_path):
    with pytest.raises(UsageError, match="fp16 needs"):
        export_onnx.exporter.export(conv_component(), tmp_path / "x.onnx", scheme="fp16")
    with pytest.raises(EdgekdError, match="none were given"):
        export_onnx.exporter.export(conv_component(), tmp_path / "x.onnx", scheme="fp16", calibration=[])


def test_openvino_keeps_marked_layers_out_of_16_bit_execution(tmp_path):
    """Shown with bf16, which more CPUs have: the mark in the file is what counts, and it is the same."""
    openvino = pytest.importorskip("openvino")
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has no 16-bit arithmetic for OpenVINO")
    part = encoder(wide_sam())
    path = export_openvino.exporter.export(part, tmp_path / "x.xml", scheme="fp16", calibration=INPUTS)[0]
    session = export_openvino.OpenVinoSession(path, "bf16", 1)
    assert set(session.kept_fp32) == {"neck", "norm"}
    assert session.executed_precision == "bf16+fp32" and session.executed_ops["Convolution:f32"] == 1


def test_openvino_compresses_what_is_not_kept(tmp_path):
    openvino = pytest.importorskip("openvino")
    part = encoder(wide_sam())
    path = export_openvino.exporter.export(part, tmp_path / "x.xml", scheme="fp16", calibration=INPUTS)[0]
    sizes: dict[str, int] = {}
    for op in openvino.Core().read_model(path).get_ordered_ops():
        if op.get_type_name() == "Constant":
            kind = str(op.get_output_element_type(0))
            sizes[kind] = sizes.get(kind, 0) + int(np.prod(list(op.get_output_shape(0))))
    neck = part.module.neck.weight.numel()  # type: ignore[union-attr, operator]
    assert sizes["<Type: 'float16'>"] > 4000 and neck <= sizes["<Type: 'float32'>"] < 2 * neck
    session = export_openvino.exporter.open(path, scheme="fp16", threads=1)
    assert np.abs(session.run(INPUTS[0])["image_embeddings"] - expected(part, INPUTS[0])[0]).max() < 0.01
    if "FP16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        assert session.executed_precision == "fp32", "the weights' type is not what is computed in"


def test_the_files_keep_to_the_standard(tmp_path):
    """The converter appends its casts at the end, behind what reads them."""
    export_model(tiny_sam(), tmp_path / "a", format="onnx", scheme="fp16", examples=IMAGES, threads=1)
    for name in ("encoder.onnx", "decoder.onnx"):
        onnx.checker.check_model(str(tmp_path / "a" / name), full_check=True)


class Bright(torch.nn.Module):
    """An encoder that adds something of what it sees of white; seeded pictures are never as bright as white paper."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.encoder, self.white = encoder, torch.nn.Conv2d(3, 1, 16, 16)
        self.far, self.more, self.back = (torch.nn.Conv2d(1, channels, 1, bias=False) for channels in (1, 1, 32))
        with torch.no_grad():
            for layer, weight in ((self.white, 1 / 256), (self.far, 3e4), (self.more, 4.0), (self.back, 1e-6)):
                layer.weight.fill_(weight)
            self.white.bias.fill_(-5.6)  # type: ignore[union-attr]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(x) + self.back(self.more(self.far(torch.relu(self.white(x)))))


def test_what_overflows_on_photos_only_is_found_on_the_photos(tmp_path, monkeypatch):
    """`quantize --scheme fp16 --data DIR` searches the photos: a layer that seeded pictures leave in range and white paper does not."""
    rng, folder = np.random.default_rng(0), tmp_path / "photos"
    folder.mkdir()
    for i in range(3):  # white paper with a little print on it
        page = np.full((SIZE, SIZE, 3), 255, np.uint8)
        page[:8, :8] = rng.integers(0, 255, (8, 8, 3))
        Image.fromarray(page).save(folder / f"{i}.png")
    model = tiny_sam()
    model.encoder = Bright(model.encoder).eval()
    monkeypatch.setattr(resolve, "load_torch", lambda _: model)
    plain = export_model(model, tmp_path / "pictures", format="onnx", scheme="fp16", threads=1).components["encoder"]
    assert not plain.kept_fp32, "seeded pictures show nothing of it"
    found = comparing.quantize("tiny", scheme="fp16", format="onnx", target=target.resolve("pixel_8"), data=folder, output=tmp_path / "out", limit=2)
    kept = Manifest.load(Path(found["path"])).components["encoder"].kept_fp32
    assert set(kept) == {"far", "more", "back"} and "Conv reaches 2" in kept["more"]
    given = {"images": preprocess(np.full((SIZE, SIZE, 3), 255, np.uint8), model.preprocess)[0][None]}
    want = expected(encoder(model), given)[0]
    ours = open_artifact(found["path"], threads=1).session("encoder").run(given)["image_embeddings"]
    assert np.abs(ours - want).max() < 0.01 * np.abs(want).max()
    with torch.no_grad():
        naive = model.encoder.half()(torch.from_numpy(given["images"]).half())
    assert not torch.isfinite(naive).all(), "and it mattered"
