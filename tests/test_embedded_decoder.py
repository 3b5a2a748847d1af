"""The decoder for NPUs: points embedded by the caller, in float32, so that the file never sees a coordinate."""
from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from edgekd.export.onnx import exporter as onnx_exporter
from tiny import SIZE, Encoder, tiny_sam

from edgekd.artifact import Manifest
from edgekd.data.images import read_image
from edgekd.data.scenes import Scenes
from edgekd.errors import CannotTake, EdgekdError
from edgekd.exporting import export_model, open_artifact, signature
from edgekd.models.efficient_sam import DECODER
from edgekd.models.embedded_decoder import EmbeddedDecoder, embedded_component, point_embedding
from edgekd.models.point_embedding import ABSENT_BIAS, FILE, PointEmbedding
from edgekd.models.sam import Attention, Sam
from edgekd.models.sam import components as batched_components
from edgekd.probes import COUNTS, KINDS, pictures, probe
from edgekd.protocols import ABSENT, Component, Preprocess
from edgekd.runtime import TOGETHER, Fitting
from edgekd.tasks import evaluation
from edgekd.tasks.promptable import parity, scoring
from edgekd.tasks.promptable.everything import everything
from edgekd.tasks.promptable.predict import predict
from edgekd.tasks.promptable.predictor import ModelPredictor

PAGE = Path(__file__).resolve().parents[1] / "docs/decoder-signatures.md"
IMAGES = pictures(2, SIZE, np.random.default_rng(3))
FIVE = ["image_embeddings", "point_tokens", "token_bias", "mask_input", "has_mask"]
FOREIGN = {"Sin", "Cos", "Equal", "GreaterOrEqual", "Greater", "Less", "Where", "ReduceMax", "Range", "ScatterND", "GatherND"}
"""Operators that coordinates and labels need, and that NPUs run on the CPU or not at all."""


def padded_sam() -> Sam:
    """EfficientSAM's kind: six tokens always, no mask branch."""
    torch.manual_seed(1)
    shape = replace(DECODER, embed_dim=32, heads=4, mlp_dim=64)
    return Sam("tiny_efficient", Encoder(), shape, Preprocess(SIZE)).eval()


MODELS = {"sam": tiny_sam, "padded": padded_sam}


def calibration(model: Sam) -> dict[str, Any]:
    with torch.no_grad():
        embedding = model.embed(torch.from_numpy(IMAGES[:1])).numpy()
    return {"encoder": [{"images": i[None]} for i in IMAGES],
            "decoder": [probe(k, 2, SIZE, np.random.default_rng(0)).inputs(embedding) for k in KINDS]}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("artifacts") / "embedded"
    export_model(tiny_sam(), folder, format="onnx", scheme="fp32", examples=IMAGES, threads=1, decoder_signature="embedded")
    return folder


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("labels", [[[1.0]], [[0.0, 1.0], [2.0, 3.0]], [[1.0, -1.0, -2.0], [-2.0, 2.0, 3.0], [-2.0, -2.0, -2.0]], [[1.0] * 8]])
def test_the_hosts_tokens_are_the_models_own(kind, labels):
    encoder = MODELS[kind]().prompt_encoder
    given = np.array(labels, np.float32)
    points = np.random.default_rng(0).uniform(-3, SIZE + 3, (*given.shape, 2)).astype(np.float32)
    with torch.no_grad():
        theirs, their_bias = encoder.points(torch.from_numpy(points), torch.from_numpy(given))
    embedding = PointEmbedding.decode(point_embedding(encoder).encode())
    tokens, bias = embedding(points, given)
    np.testing.assert_allclose(tokens, theirs.numpy(), atol=3e-6)
    np.testing.assert_array_equal(bias, np.where(their_bias.numpy() < 0, np.float32(ABSENT_BIAS), 0))
    assert tokens.dtype == bias.dtype == np.float32 and tokens.shape[1] == given.shape[1] + embedding.own


def test_the_file_keeps_every_bit_and_is_the_same_every_time():
    embedding = point_embedding(tiny_sam().prompt_encoder)
    again = PointEmbedding.decode(embedding.encode())
    np.testing.assert_array_equal(again.gaussian, embedding.gaussian)
    assert sorted(again.labels) == [-1, 0, 1, 2, 3] and all(np.array_equal(again.labels[k], v) for k, v in embedding.labels.items())
    assert embedding.encode() == point_embedding(tiny_sam().prompt_encoder).encode()


@pytest.mark.parametrize(("change", "says"), [
    (lambda d: d.update(schema="edgekd.prompt_encoder/9"), "schema"), (lambda d: d.pop("gaussian"), "no 'gaussian'"),
    (lambda d: d["labels"].update({"1": [0.0]}), "do not fit"), (lambda d: d.update(labels=[1]), "cannot be read"),
])
def test_a_file_that_is_something_else_is_refused(change, says):
    document = json.loads(point_embedding(tiny_sam().prompt_encoder).encode())
    change(document)
    with pytest.raises(EdgekdError, match=says):
        PointEmbedding.decode(json.dumps(document).encode())
    with pytest.raises(EdgekdError, match="cannot be read"):
        PointEmbedding.decode(b"PK\x03\x04")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_it_equals_the_models_own_answer_for_every_kind_of_prompt(model, kind):
    sam = MODELS[model]()
    p = probe(kind, 5, SIZE, np.random.default_rng(7))
    inputs = point_embedding(sam.prompt_encoder).inputs(p.inputs(np.zeros((1, 32, 4, 4), np.float32)))
    with torch.no_grad():
        embedding = sam.embed(torch.from_numpy(IMAGES[:1]))
        masks, iou = sam.decode(embedding, *(torch.from_numpy(a) for a in (p.points, p.labels, p.mask_input, p.has_mask)))
        ours, our_iou = EmbeddedDecoder(sam)(embedding, *(torch.from_numpy(inputs[k]) for k in FIVE[1:]))
    torch.testing.assert_close(ours, masks, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(our_iou, iou, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_padding_does_not_change_an_answer(model):
    """What a file of fixed shapes is given: tokens filled up with zeros and the bias of absent ones."""
    sam = MODELS[model]()
    part = embedded_component(sam)
    with torch.no_grad():
        embedding = sam.embed(torch.from_numpy(IMAGES[:1]))
        for kind in KINDS:
            p = probe(kind, 1, SIZE, np.random.default_rng(5))
            inputs = point_embedding(sam.prompt_encoder).inputs(p.inputs(embedding.numpy()))
            padded = Fitting(signature(part)[0], part.lengths).calls(inputs)[0][0]
            assert padded["point_tokens"].shape[1] == padded["token_bias"].shape[1] == part.lengths["tokens"]
            exact, found = (part.module(*(torch.from_numpy(i[k]) for k in FIVE))[0] for i in (inputs, padded))
            torch.testing.assert_close(found, exact, atol=2e-5, rtol=1e-5)


def test_the_graph_has_nothing_that_coordinates_need(artifact, tmp_path):
    ours = {n.op_type for n in onnx.load(artifact / "decoder.onnx").graph.node}
    onnx_exporter.export(batched_components(tiny_sam())["decoder"], tmp_path / "batched.onnx", scheme="fp32")
    theirs = {n.op_type for n in onnx.load(tmp_path / "batched.onnx").graph.node}
    assert not ours & FOREIGN and {"Sin", "Cos", "Equal", "Where"} <= theirs & FOREIGN


def test_the_manifest_says_what_the_caller_computes(artifact):
    manifest = Manifest.load(artifact)
    decoder = manifest.components["decoder"]
    assert manifest.decoder_signature == "embedded" and [t.name for t in decoder.inputs] == FIVE
    assert {t.name: t.shape for t in decoder.inputs}["point_tokens"] == ["prompts", "tokens", 32]
    assert {t.name: t.pad for t in decoder.inputs}["token_bias"] == ABSENT_BIAS
    assert decoder.host == [FILE] and decoder.files == ["decoder.onnx", FILE] and manifest.components["encoder"].host == []
    assert decoder.parity["passed"] and set(decoder.parity["prompts"]) == set(KINDS) and decoder.parity["counts"] == list(COUNTS)
    assert decoder.parity["max_abs"] <= 1e-4


def test_a_damaged_or_missing_host_file_is_found(artifact, tmp_path):
    import shutil

    shutil.copytree(artifact, tmp_path / "a")
    file = tmp_path / "a" / FILE
    file.write_bytes(file.read_bytes().replace(b'"side":64', b'"side":65'))
    with pytest.raises(EdgekdError, match=f"damaged: {FILE}"):
        open_artifact(tmp_path / "a")
    file.unlink()
    with pytest.raises(EdgekdError, match=f"missing: {FILE}"):
        open_artifact(tmp_path / "a")
    with pytest.raises(EdgekdError, match="is missing"):
        open_artifact(tmp_path / "a", verify=False).decode(np.zeros((1, 32, 4, 4)), np.zeros((1, 1, 2)), np.ones((1, 1)))


def test_the_gate_sees_a_wrong_host_part(artifact):
    """The host's part is in the comparison: a wrong table fails it."""
    model = tiny_sam()
    reference, session, part = parity.Reference(model, IMAGES), open_artifact(artifact, threads=1).session("decoder"), embedded_component(model)
    assert reference.compare(part, session, "fp32")[1] is None
    embedding = point_embedding(model.prompt_encoder)
    swapped = replace(embedding, labels={**embedding.labels, 0: embedding.labels[1], 1: embedding.labels[0]})
    for wrong in (swapped, replace(embedding, side=SIZE // 2), replace(embedding, absent_bias=0.0), replace(embedding, gaussian=embedding.gaussian[::-1])):
        assert reference.compare(replace(part, host={FILE: wrong.encode()}), session, "fp32")[1]


@pytest.mark.parametrize(("format", "scheme"), [("onnx", "fp16"), ("onnx", "w8a8_static"), ("openvino", "fp32"), ("openvino", "fp16"), ("openvino", "w8a8_static")])
def test_other_formats_and_schemes_take_it(tmp_path, format, scheme):
    if format == "openvino":
        pytest.importorskip("openvino", reason='pip install "edgekd[openvino]"')
    model = tiny_sam()
    manifest = export_model(model, tmp_path / "a", format=format, scheme=scheme, calibration=calibration(model), examples=IMAGES, threads=1,
                            decoder_signature="embedded", gate=scheme == "fp32")
    decoder = manifest.components["decoder"]
    assert decoder.scheme == scheme and decoder.parity["finite"] and decoder.host == [FILE]
    assert not any("pe_layer" in layer or "prompt_encoder" in layer for layer in decoder.kept_fp32)
    p = probe("point_box", 3, SIZE, np.random.default_rng(0))
    masks, iou = open_artifact(tmp_path / "a", threads=1).decode(np.zeros((1, 32, 4, 4)), p.points, p.labels)
    assert masks.shape == (3, 4, 16, 16) and iou.shape == (3, 4) and np.isfinite(masks).all()


def test_a_padded_model_passes_the_gate(tmp_path):
    manifest = export_model(padded_sam(), tmp_path / "a", format="onnx", scheme="fp32", examples=IMAGES, threads=1, decoder_signature="embedded")
    assert manifest.components["decoder"].parity["passed"]


class FixedOnnx(type(onnx_exporter)):  # type: ignore[misc]
    """ONNX as a format that takes no axis of varying length, as NPUs' are."""

    fixed_shapes = True


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgekd import plugins

    known = plugins.exporter
    monkeypatch.setattr(plugins, "exporter", lambda format: FixedOnnx() if format == "onnx" else known(format))


def test_a_file_of_fixed_shapes_answers_prompts_of_any_number_and_length(tmp_path, fixed):
    model = tiny_sam()
    manifest = export_model(model, tmp_path / "a", format="onnx", scheme="fp32", examples=IMAGES, threads=1, decoder_signature="embedded",
                            lengths={"prompts": 2, "tokens": 5})
    decoder = manifest.components["decoder"]
    assert decoder.fixed == {"prompts": 2, "tokens": 5} and decoder.parity["passed"]
    shapes = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in onnx.load(tmp_path / "a/decoder.onnx").graph.input}
    assert shapes["point_tokens"] == [2, 5, 32] and shapes["token_bias"] == [2, 5]
    opened = open_artifact(tmp_path / "a", threads=1)
    p = probe("point_box", 5, SIZE, np.random.default_rng(2))
    with torch.no_grad():
        embedding = model.embed(torch.from_numpy(IMAGES[:1]))
        masks, _ = model.decode(embedding, torch.from_numpy(p.points), torch.from_numpy(p.labels))
    np.testing.assert_allclose(opened.decode(embedding, p.points, p.labels)[0], masks.numpy(), atol=1e-4)
    with pytest.raises(EdgekdError, match="5 tokens at most") as e:
        opened.decode(embedding, np.zeros((1, 6, 2)), np.ones((1, 6)))
    assert "--length tokens=7" in (e.value.hint or "")


def test_an_axis_without_a_length_is_refused():
    part = replace(embedded_component(tiny_sam()), lengths={"prompts": 1})
    with pytest.raises(CannotTake, match="tokens"):
        part.fixed()


def test_all_8_bits_keep_its_masks_where_a_far_bias_loses_them(tmp_path):
    """Every operator in 8 bits, as NPUs have it, where absent tokens are told by a bias: what `ABSENT_BIAS` is for."""
    model = tiny_sam()
    with torch.no_grad():
        for attention in (m for m in model.mask_decoder.modules() if isinstance(m, Attention)):
            attention.q_proj.weight.mul_(10)  # trained attention is choosy, that of random weights sees everything alike
    found = {bias: parity.mask_iou(*_masks_in_8_bits(model, bias, tmp_path / f"{bias}.onnx")) for bias in (ABSENT_BIAS, -1e4)}
    assert found[ABSENT_BIAS] > 0.85 and found[ABSENT_BIAS] > found[-1e4] + 0.1, found


def _masks_in_8_bits(model: Sam, bias: float, path: Path) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The model's own masks, and those of its decoder at fixed shapes with every operator quantized."""
    from onnxruntime.quantization import QuantType, quantize_static

    part: Component = embedded_component(model)
    part = replace(part, padding={"token_bias": bias})
    embedding, fitting = replace(point_embedding(model.prompt_encoder), absent_bias=bias), Fitting(signature(part)[0], part.lengths)
    samples = [one for s in calibration(model)["decoder"] for one in fitting.calls(embedding.inputs(s))[0]]
    onnx_exporter.export(part.fixed(), path.with_suffix(".float.onnx"), scheme="fp32")

    class Reader:
        left = iter(samples)

        def get_next(self) -> Any:
            return next(self.left, None)

    kinds = ["Conv", "ConvTranspose", "MatMul", "Gemm", "Add", "Mul", "Softmax"]
    quantize_static(str(path.with_suffix(".float.onnx")), str(path), Reader(), op_types_to_quantize=kinds, per_channel=True,
                    activation_type=QuantType.QInt8, weight_type=QuantType.QInt8)
    session, theirs, ours = onnx_exporter.open(path, scheme="fp32", threads=1), [], []
    for s in calibration(model)["decoder"]:
        with torch.no_grad():
            theirs.append(model.decode(*(torch.from_numpy(v) for v in s.values()))[0].numpy())
        ours.extend(session.run(one)["masks"] for one in fitting.calls(embedding.inputs(s))[0])
    return theirs, ours


def test_it_predicts_evaluates_and_can_be_profiled(artifact, photos):
    shipped, model = open_artifact(artifact, threads=1), tiny_sam()
    image = read_image(sorted(photos.glob("*.*g"))[0], max_side=120)
    ours, theirs = (predict(m, image, points=[(30.0, 30.0)], box=(10.0, 10.0, 70.0, 60.0)) for m in (shipped, model))
    assert ours.mask.shape == image.shape[:2] and (ours.mask != theirs.mask).mean() < 0.01
    data = Scenes(4, 2, size=96)
    a, b = (scoring.evaluate(m, data, max_instances=2) for m in (shipped, model))
    assert isinstance(a, evaluation.Evaluation) and a.metrics["box_miou"] == pytest.approx(b.metrics["box_miou"], abs=0.01)
    calls = shipped.calls(3)
    assert calls["decoder"]()[0]["masks"].shape == calls[TOGETHER]()[0]["masks"].shape == (3, 4, 16, 16)  # type: ignore[index]
    found = everything(ModelPredictor(shipped), image, mode="grid")
    assert found.work.prompts > 0


def test_embedding_points_loads_no_torch():
    code = "import sys, edgekd.models.point_embedding, edgekd.tasks.promptable.exported; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_page_computes_what_we_do(artifact):
    """The snippet of the documentation, run as it stands, against our own."""
    code = next(c for c in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S) if "def embed_points" in c)
    space: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), space)
    for make in MODELS.values():
        embedding = point_embedding(make().prompt_encoder)
        table = json.loads(embedding.encode())
        for labels in ([[1.0, 0.0, ABSENT]], [[2.0, 3.0, 1.0]]):
            points = np.random.default_rng(0).uniform(0, SIZE, (1, 3, 2)).astype(np.float32)
            ours, theirs = embedding(points, np.array(labels)), space["embed_points"](table, points, np.array(labels, np.float32))
            for a, b in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(b, a, atol=1e-6)
                assert b.dtype == np.float32
