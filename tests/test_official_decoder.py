"""SAM's own six-input decoder signature, as existing applications call it."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from tiny import SIZE, tiny_sam
from torch import Tensor

from edgekd.artifact import Manifest
from edgekd.data.images import read_image
from edgekd.errors import EdgekdError, UsageError
from edgekd.exporting import export_model, open_artifact
from edgekd.models.official_decoder import OfficialDecoder, official_component
from edgekd.probes import KINDS, pictures, probe
from edgekd.tasks.promptable import parity
from edgekd.tasks.promptable.exported import official_inputs
from edgekd.tasks.promptable.predict import predict

IMAGES = pictures(2, SIZE, np.random.default_rng(3))
SIX = ["image_embeddings", "point_coords", "point_labels", "mask_input", "has_mask_input", "orig_im_size"]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("artifacts") / "sam"
    export_model(tiny_sam(), folder, format="onnx", scheme="fp32", examples=IMAGES, threads=1, decoder_signature="sam")
    return folder


def to_photo(low: Tensor, height: int, width: int) -> Tensor:
    """SAM's post-processing, written down from its description: to the square, crop the padding, to the photo."""
    scale = SIZE / max(height, width)
    square = F.interpolate(low, (SIZE, SIZE), mode="bilinear", align_corners=False)[..., : int(height * scale + 0.5), : int(width * scale + 0.5)]
    return F.interpolate(square, (height, width), mode="bilinear", align_corners=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("height", "width"), [(64, 64), (40, 100), (333, 128)])
def test_it_equals_the_models_own_answer_for_every_kind_of_prompt(kind, height, width):
    model = tiny_sam()
    p = probe(kind, 1, SIZE, np.random.default_rng(7))
    with torch.no_grad():
        embedding = model.embed(torch.from_numpy(IMAGES[:1]))
        low, iou = model.decode(embedding, *(torch.from_numpy(a) for a in (p.points, p.labels, p.mask_input, p.has_mask)))
        inputs = next(official_inputs(embedding.numpy(), p.points, p.labels, p.mask_input, p.has_mask, (height, width)))
        masks, our_iou, our_low = OfficialDecoder(model)(*(torch.from_numpy(inputs[k]) for k in SIX))
    torch.testing.assert_close(our_low, low, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(our_iou, iou, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(masks, to_photo(low, height, width), atol=1e-5, rtol=1e-5)


def test_the_point_for_no_box_is_the_callers_to_add_and_counted_once():
    """As in segment-anything's graph: without the caller's point the tokens, and so the answer, are other ones."""
    model = tiny_sam()
    p = probe("points", 1, SIZE, np.random.default_rng(1))
    with torch.no_grad():
        embedding = model.embed(torch.from_numpy(IMAGES[:1]))
        inputs = next(official_inputs(embedding.numpy(), p.points, p.labels, p.mask_input, p.has_mask))
        assert inputs["point_labels"].tolist() == [[1.0, 0.0, 1.0, -1.0]] and inputs["point_coords"][0, -1].tolist() == [0.0, 0.0]
        right = OfficialDecoder(model)(*(torch.from_numpy(inputs[k]) for k in SIX))[2]
        inputs |= {"point_coords": inputs["point_coords"][:, :-1], "point_labels": inputs["point_labels"][:, :-1]}
        forgotten = OfficialDecoder(model)(*(torch.from_numpy(inputs[k]) for k in SIX))[2]
    assert (right - forgotten).abs().max() > 1e-4


def test_box_prompts_get_no_extra_point_and_absent_points_are_left_out():
    p = probe("point_box", 1, SIZE, np.random.default_rng(0))
    labels = p.labels.copy()
    labels[0, 0] = -2
    found = next(official_inputs(np.zeros((1, 32, 4, 4), np.float32), p.points, labels, p.mask_input, p.has_mask))
    assert found["point_labels"].tolist() == [[2.0, 3.0]]


def test_the_file_has_sams_names_in_sams_order_and_takes_any_number_of_points(artifact):
    session = onnxruntime.InferenceSession(artifact / "decoder.onnx", providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == SIX
    assert [o.name for o in session.get_outputs()] == ["masks", "iou_predictions", "low_res_masks"]
    assert session.get_inputs()[1].shape == [1, "num_points", 2]
    for points in (1, 2, 9):
        inputs = {"image_embeddings": np.zeros((1, 32, 4, 4)), "point_coords": np.full((1, points, 2), 20.0), "point_labels": np.ones((1, points)),
                  "mask_input": np.zeros((1, 1, 16, 16)), "has_mask_input": np.zeros(1), "orig_im_size": np.array([30, 50 + points])}
        masks, iou, low = session.run(None, {k: v.astype(np.float32) for k, v in inputs.items()})
        assert masks.shape == (1, 4, 30, 50 + points) and iou.shape == (1, 4) and low.shape == (1, 4, 16, 16)


def test_the_manifest_says_which_signature(artifact):
    manifest = Manifest.load(artifact)
    decoder = manifest.components["decoder"]
    assert manifest.decoder_signature == "sam" and [t.name for t in decoder.inputs] == SIX
    assert {t.name: t.shape for t in decoder.outputs}["masks"] == [1, 4, "height", "width"]
    assert {t.name: t.shape for t in decoder.inputs}["point_labels"] == [1, "num_points"]
    assert decoder.parity["passed"] and set(decoder.parity["prompts"]) == set(KINDS) and decoder.parity["max_abs"] <= 1e-4


@pytest.mark.parametrize("count", [1, 5])
def test_an_opened_artifact_answers_many_prompts_like_the_batched_one(artifact, count):
    model, shipped = tiny_sam(), open_artifact(artifact, threads=1)
    for kind in KINDS:
        p = probe(kind, count, SIZE, np.random.default_rng(count))
        with torch.no_grad():
            masks, iou = model.decode(model.embed(torch.from_numpy(IMAGES[:1])), *(torch.from_numpy(a) for a in (p.points, p.labels, p.mask_input, p.has_mask)))
        ours, our_iou = shipped.decode(shipped.embed(IMAGES[:1]), p.points, p.labels, p.mask_input, p.has_mask)
        np.testing.assert_allclose(ours, masks.numpy(), atol=1e-4)
        np.testing.assert_allclose(our_iou, iou.numpy(), atol=1e-4)


def test_predict_works_on_it(artifact, photos):
    image = read_image(sorted(photos.glob("*.*g"))[0], max_side=120)
    found = predict(open_artifact(artifact, threads=1), image, points=[(30.0, 30.0)])
    theirs = predict(tiny_sam(), image, points=[(30.0, 30.0)])
    assert found.mask.shape == image.shape[:2] and (found.mask != theirs.mask).mean() < 0.01


def test_it_can_be_profiled(artifact):
    found = open_artifact(artifact, threads=1).calls(3)
    assert len(found["decoder"]()) == 3 and all(o["low_res_masks"].shape == (1, 4, 16, 16) for o in found["together"]())  # type: ignore[arg-type, attr-defined]


def test_openvino_takes_it_too(tmp_path):
    pytest.importorskip("openvino")
    manifest = export_model(tiny_sam(), tmp_path / "a", format="openvino", scheme="fp32", examples=IMAGES, threads=1, decoder_signature="sam")
    parts = manifest.components
    assert parts["decoder"].parity["max_abs"] <= 1e-4 and parts["decoder"].parity["mask_iou"] >= 0.999


def test_static_int8_calibrates_it_with_one_prompt_each(tmp_path):
    model = tiny_sam()
    with torch.no_grad():
        embedding = model.embed(torch.from_numpy(IMAGES[:1])).numpy()
    calibration = {"encoder": [{"images": i[None]} for i in IMAGES],
                   "decoder": [probe(k, 2, SIZE, np.random.default_rng(0)).inputs(embedding) for k in KINDS]}
    manifest = export_model(model, tmp_path / "a", format="onnx", scheme="w8a8_static", calibration=calibration, examples=IMAGES, threads=1,
                            decoder_signature="sam", gate=False)
    assert manifest.components["decoder"].scheme == "w8a8_static" and manifest.components["decoder"].parity["finite"]


class Uncropped:
    """A graph that forgot to cut the padding off."""

    executed_precision, executed_ops = "fp32", {}

    def __init__(self, session) -> None:
        self.session = session

    def run(self, inputs):
        height, width = (int(n) for n in inputs["orig_im_size"])
        out = self.session.run(inputs)
        low = torch.from_numpy(out["low_res_masks"])
        return out | {"masks": F.interpolate(low, (height, width), mode="bilinear", align_corners=False).numpy()}


def test_the_gate_sees_a_wrong_post_processing(artifact):
    model, shipped = tiny_sam(), open_artifact(artifact, threads=1)
    reference = parity.Reference(model, IMAGES)
    session = shipped.session("decoder")
    assert parity.failure(parity.official_parity(session, reference), parity.EXACT) is None
    assert parity.failure(parity.official_parity(Uncropped(session), reference), parity.EXACT)


def test_an_unknown_signature_gets_the_nearest_name(tmp_path):
    with pytest.raises(UsageError, match="decoder signature") as e:
        export_model(tiny_sam(), tmp_path / "a", format="onnx", scheme="fp32", decoder_signature="batch")  # type: ignore[arg-type]
    assert "batched" in (e.value.hint or "") and not (tmp_path / "a").exists()


def test_a_stretched_photo_is_not_cropped():
    model = tiny_sam()
    low = torch.randn(1, 4, 16, 16)
    decoder = official_component(model).module
    assert isinstance(decoder, OfficialDecoder)
    decoder.stretch = True
    square = F.interpolate(low, (SIZE, SIZE), mode="bilinear", align_corners=False)
    torch.testing.assert_close(decoder._to_photo(low, torch.tensor([20.0, 90.0])), F.interpolate(square, (20, 90), mode="bilinear", align_corners=False))


def test_an_artifact_without_a_proposer_says_so(artifact):
    with pytest.raises(EdgekdError, match="no component 'proposer'"):
        open_artifact(artifact).propose(np.zeros((1, 32, 4, 4)))
