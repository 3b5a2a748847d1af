from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from edgekd.export import onnx as export_onnx
from tiny import SIZE, ConvBn, Encoder, tiny_sam

from edgekd import exporting, plugins
from edgekd.artifact import Manifest, verify
from edgekd.errors import EdgekdError, UsageError
from edgekd.exporting import candidate_id, export_model, folded, open_artifact, signature
from edgekd.models.proposer import BoxProposer
from edgekd.models.sam import Sam, components
from edgekd.probes import COUNTS, KINDS, pictures, probe
from edgekd.profiling import profile_artifact
from edgekd.protocols import Preprocess
from edgekd.tasks.promptable import parity

IMAGES = pictures(2, SIZE, np.random.default_rng(3))
CALIBRATION = {"encoder": [{"images": p[None]} for p in pictures(6, SIZE, np.random.default_rng(4))]}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    """The tiny model exported to ONNX in fp32."""
    folder = tmp_path_factory.mktemp("artifacts") / "tiny-64-onnx-fp32"
    export_model(tiny_sam(), folder, format="onnx", scheme="fp32", teacher="big", examples=IMAGES, threads=1)
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", COUNTS)
def test_the_artifact_answers_like_the_model_on_every_prompt(artifact, kind, count):
    """The trained form is compared with the shipped files, so folding, export and runtime are all in between."""
    model, shipped = tiny_sam(), open_artifact(artifact, threads=1)
    p = probe(kind, count, SIZE, np.random.default_rng(count))
    with torch.no_grad():
        embedding = model.embed(torch.from_numpy(IMAGES))
        masks, iou = model.decode(embedding[1:], *(torch.from_numpy(a) for a in (p.points, p.labels, p.mask_input, p.has_mask)))
    ours = shipped.embed(IMAGES)
    np.testing.assert_allclose(ours, embedding.numpy(), atol=1e-4)
    our_masks, our_iou = shipped.decode(ours[1:], p.points, p.labels, p.mask_input, p.has_mask)
    np.testing.assert_allclose(our_masks, masks.numpy(), atol=1e-4)
    np.testing.assert_allclose(our_iou, iou.numpy(), atol=1e-4)


def test_the_mask_prompt_is_optional_and_tensors_are_welcome(artifact):
    model, shipped = tiny_sam(), open_artifact(artifact)
    image, points, labels = torch.from_numpy(IMAGES[:1]), torch.tensor([[[20.0, 30.0]]]), torch.ones(1, 1)
    with torch.no_grad():
        masks, _ = model.decode(model.embed(image), points, labels)
    np.testing.assert_allclose(shipped.decode(shipped.embed(image), points, labels)[0], masks.numpy(), atol=1e-4)
    given = shipped.decode(shipped.embed(image), points, labels, mask_input=np.full((1, 1, 16, 16), 5.0))[0]
    assert not np.allclose(given, masks.numpy(), atol=1e-3)


def test_the_manifest_says_everything(artifact):
    manifest = verify(artifact)
    assert manifest.id == "tiny-64-onnx-fp32" == candidate_id("tiny", 64, "onnx", "fp32")
    assert (manifest.student, manifest.teacher, manifest.image_size, manifest.embed_dim) == ("tiny", "big", 64, 32)
    assert {f.path for f in manifest.files} == {"encoder.onnx", "decoder.onnx"}
    assert manifest.versions["onnxruntime"] and manifest.source_sha256 and "ran here" in manifest.checked
    decoder = manifest.components["decoder"]
    assert {t.name: t.shape for t in decoder.inputs}["point_coords"] == ["prompts", "points", 2]
    assert {t.name: t.shape for t in decoder.outputs} == {"masks": ["prompts", 4, 16, 16], "iou": ["prompts", 4]}
    for part in manifest.components.values():
        assert part.executed_precision == "fp32" and part.executed_ops and part.note is None
        assert part.parity["passed"] and part.parity["mask_iou"] >= 0.999 and set(part.parity["prompts"]) == set(KINDS)
    json.dumps(manifest.model_dump(mode="json"), allow_nan=False)  # what goes into reports is strict JSON


def test_a_damaged_file_is_refused_when_opened(artifact, tmp_path):
    for file in artifact.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = bytearray((tmp_path / "decoder.onnx").read_bytes())
    data[-100] ^= 0xFF
    (tmp_path / "decoder.onnx").write_bytes(data)
    with pytest.raises(EdgekdError, match=r"decoder\.onnx"):
        open_artifact(tmp_path)
    open_artifact(tmp_path, verify=False)


def test_profiling_a_real_artifact_in_a_fresh_process(artifact):
    found = profile_artifact(artifact, warmup=1, repeats=4, threads=1, prompts=2)
    assert found.id == "tiny-64-onnx-fp32" and found.latency_ms.n == 4 and found.executed_precision == "fp32"
    assert 10 << 20 < found.peak_memory_bytes < 1 << 30
    assert found.circumstances.threads == 1 and found.load_ms > 0
    assert found.size_bytes >= sum(c.size_bytes for c in found.components.values()) > 0


def test_static_int8_keeps_the_decoder_in_fp32_and_says_so(tmp_path):
    manifest = export_model(tiny_sam(), tmp_path / "q", format="onnx", scheme="w8a8_static", calibration=CALIBRATION, examples=IMAGES, threads=1)
    encoder, decoder = manifest.components["encoder"], manifest.components["decoder"]
    assert encoder.executed_precision.startswith("int8") and encoder.note is None
    assert decoder.scheme == "fp32" and "no calibration" in (decoder.note or "")
    assert 0.5 < encoder.parity["mask_iou"] < 1
    assert manifest.scheme == "w8a8_static" and open_artifact(tmp_path / "q").embed(IMAGES[:1]).shape == (1, 32, 4, 4)


def test_dynamic_int8_leaves_convolutions_alone_and_says_so(tmp_path):
    manifest = export_model(tiny_sam(), tmp_path / "d", format="onnx", scheme="w8_dynamic", examples=IMAGES, threads=1)
    assert manifest.components["encoder"].scheme == "fp32" and "nothing to quantize" in (manifest.components["encoder"].note or "")
    assert "int8" in manifest.components["decoder"].executed_precision


def test_a_decoder_that_int8_spoils_falls_back_to_fp32_with_the_figure(tmp_path, monkeypatch):
    monkeypatch.setitem(parity.LOSSY, "decoder", parity.Limits(float("inf"), 1.01))
    manifest = _export_with(monkeypatch, tmp_path / "x", "w8_dynamic", encoder_fails=False)
    assert manifest.components["decoder"].scheme == "fp32"
    assert "overlap only" in (manifest.components["decoder"].note or "")


def _export_with(monkeypatch, folder: Path, scheme: str, *, encoder_fails: bool) -> Manifest:
    """Export with an exporter whose encoder accepts any scheme by writing fp32."""
    real = export_onnx.exporter

    def export(component, path, *, scheme, calibration=None, qdq="u8s8"):
        if component.name == "encoder" and not encoder_fails:
            scheme = "fp32"
        return real.export(component, path, scheme=scheme, calibration=calibration, qdq=qdq)

    double = SimpleNamespace(format="onnx", suffix=".onnx", extra=None, schemes=real.schemes, availability=real.availability, export=export, open=real.open)
    monkeypatch.setattr(plugins, "exporter", lambda name: double)
    return export_model(tiny_sam(), folder, format="onnx", scheme=scheme, examples=IMAGES, threads=1)


def test_a_scheme_that_changes_nothing_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(parity.LOSSY, "decoder", parity.Limits(float("inf"), 1.01))
    with pytest.raises(EdgekdError, match=r"changes no component.*nothing to quantize"):
        _export_with(monkeypatch, tmp_path / "x", "w8_dynamic", encoder_fails=True)
    assert list(tmp_path.iterdir()) == []


class Wrong:
    """A session whose answers are spoiled."""

    executed_precision, executed_ops = "fp32", {}

    def __init__(self, session, spoil) -> None:
        self.session, self.spoil = session, spoil

    def run(self, inputs):
        return self.spoil(self.session.run(inputs), inputs)


def _box_unaware(out, inputs):
    """A graph exported from an example without boxes."""
    if (inputs.get("point_labels", np.zeros(1)) >= 2).any():
        out["masks"] = -out["masks"]
    return out


def _one_prompt_only(out, inputs):
    """A graph that baked in its batch: every prompt gets the first one's mask."""
    if "masks" in out:
        out["masks"] = np.repeat(out["masks"][:1], len(out["masks"]), axis=0)
    return out


def _deaf_to_masks(out, inputs):
    if inputs.get("has_mask", np.zeros(1)).any():
        out["masks"] = out["masks"] * 0.5 + 1
    return out


def _nan(out, inputs):
    return {k: v * np.nan for k, v in out.items()}


def _blurred_embedding(out, inputs):
    if "image_embeddings" in out:
        out["image_embeddings"] = out["image_embeddings"] * 1.01
    return out


@pytest.mark.parametrize(("spoil", "where"), [(_box_unaware, "decoder"), (_one_prompt_only, "decoder"), (_deaf_to_masks, "decoder"), (_nan, "encoder"),
                                              (_blurred_embedding, "encoder")])
def test_a_wrong_graph_fails_the_gate_and_leaves_nothing(tmp_path, monkeypatch, spoil, where):
    real = export_onnx.exporter
    double = SimpleNamespace(format="onnx", suffix=".onnx", extra=None, schemes=real.schemes, availability=real.availability, export=real.export,
                             open=lambda path, **options: Wrong(real.open(path, **options), spoil))
    monkeypatch.setattr(plugins, "exporter", lambda name: double)
    with pytest.raises(EdgekdError, match=f"exported {where} is not the student any more"):
        export_model(tiny_sam(), tmp_path / "x", format="onnx", scheme="fp32", examples=IMAGES, threads=1)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_leaves_the_artifact_of_before(tmp_path, monkeypatch, artifact):
    folder = tmp_path / "a"
    folder.mkdir()
    for file in artifact.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    before = Manifest.load(folder)
    monkeypatch.setattr(parity, "CHECKS", {"encoder": parity.encoder_parity, "decoder": lambda *a: 1 / 0})
    with pytest.raises(ZeroDivisionError):
        export_model(tiny_sam(), folder, format="onnx", scheme="fp32", examples=IMAGES, threads=1)
    assert verify(folder) == before and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_no_one_ever_sees_a_half_written_artifact(tmp_path):
    folder, seen, done = tmp_path / "a", [], threading.Event()

    def watch() -> None:
        while not done.is_set():
            if folder.exists():
                seen.append((folder / "manifest.json").exists())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        export_model(tiny_sam(), folder, format="onnx", scheme="fp32", examples=IMAGES, threads=1)
    finally:
        done.set()
        watcher.join()
    assert all(seen) and verify(folder)


def test_leftovers_of_a_killed_export_are_cleared(tmp_path):
    stale = tmp_path / ".a.xyz.part"
    stale.mkdir()
    (stale / "encoder.onnx").write_bytes(b"half")
    with exporting._staged(tmp_path / "a") as staging:
        (staging / "f").write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and (tmp_path / "a" / "f").read_text() == "new"


def test_folding_is_checked(monkeypatch):
    monkeypatch.setattr(ConvBn, "fold", lambda self: self.c)  # forgets the batch norm
    with pytest.raises(EdgekdError, match="folding changes the model"):
        folded(tiny_sam(), IMAGES[:1])


def test_folding_changes_form_not_function_and_leaves_the_model_alone():
    model = tiny_sam().train()
    deploy = folded(model, IMAGES[:1])
    assert model.training and not deploy.training
    assert any(isinstance(m, ConvBn) for m in model.modules()) and not any(isinstance(m, ConvBn) for m in deploy.modules())


def test_a_dead_model_cannot_pass_vacuously(tmp_path):
    model = tiny_sam()
    with torch.no_grad():
        for p in model.encoder.parameters():
            p.zero_()
    with pytest.raises(EdgekdError, match="is constant"):
        export_model(model, tmp_path / "x", format="onnx", scheme="fp32", threads=1)


def test_a_diverged_model_is_refused(tmp_path):
    model = tiny_sam()
    with torch.no_grad():
        model.encoder.neck.weight.fill_(float("nan"))
    with pytest.raises(EdgekdError, match="holds NaN"):
        export_model(model, tmp_path / "x", format="onnx", scheme="fp32", threads=1)


@pytest.mark.parametrize(("options", "error", "text"), [
    ({"format": "onxx", "scheme": "fp32"}, UsageError, "unknown format"),
    ({"format": "onnx", "scheme": "fp31"}, UsageError, "unknown scheme"),
    ({"format": "onnx", "scheme": "w8a8_static"}, UsageError, "calibration images"),
])
def test_wrong_usage_is_told_before_anything_starts(tmp_path, options, error, text):
    with pytest.raises(error, match=text):
        export_model(tiny_sam(), tmp_path / "x", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_toolchain_is_told_with_its_fix(tmp_path, monkeypatch):
    missing = SimpleNamespace(format="onnx", schemes=("fp32",), availability=lambda: SimpleNamespace(ok=False, reason="not installed: x", fix="pip install x"))
    monkeypatch.setattr(plugins, "exporter", lambda name: missing)
    with pytest.raises(EdgekdError, match="not installed: x") as e:
        export_model(tiny_sam(), tmp_path / "x", format="onnx", scheme="fp32")
    assert e.value.hint == "pip install x"


def test_signature_finds_which_output_axes_follow_which_symbol():
    inputs, outputs = signature(components(tiny_sam())["encoder"])
    assert [(t.name, t.dtype, t.shape) for t in inputs] == [("images", "float32", [1, 3, 64, 64])]
    assert [(t.name, t.shape) for t in outputs] == [("image_embeddings", [1, 32, 4, 4])]


def test_mask_iou_means_something_for_empty_masks():
    a = np.linspace(-3, -1, 1000)
    assert parity.mask_iou([a], [a]) == 1
    assert parity.mask_iou([a], [a[::-1]]) < 0.1
    assert parity.mask_iou([np.array([1.0, 1, -1, -1])], [np.array([1.0, -1, 1, -1])]) == pytest.approx(1 / 3)


def test_the_weights_hash_follows_the_weights():
    a, b = tiny_sam(), tiny_sam()
    assert exporting.weights_sha256(a) == exporting.weights_sha256(b)
    with torch.no_grad():
        next(b.parameters()).add_(1e-3)
    assert exporting.weights_sha256(a) != exporting.weights_sha256(b)


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_fp32_is_within_1e_4_and_999_in_every_runtime(tmp_path, format):
    """Points, boxes, points with boxes, mask prompts, in calls of 1, 5 and 16, on each runtime's own output."""
    if format == "openvino":
        pytest.importorskip("openvino")
    parts = export_model(tiny_sam(), tmp_path / "a", format=format, scheme="fp32", examples=IMAGES, threads=1).components
    assert parts["decoder"].parity["counts"] == [1, 5, 16]
    for part in parts.values():
        assert part.parity["max_abs"] <= 1e-4 and part.parity["mask_iou"] >= 0.999 and set(part.parity["prompts"]) == set(KINDS)
        assert part.parity["limits"] == {"max_relative": 1e-5, "max_abs": 1e-4, "min_mask_iou": 0.999}


def test_the_fp32_limit_is_absolute_for_small_outputs_and_relative_for_large_ones():
    def judged(largest: float, gap: float) -> bool:
        reference = np.array([largest, 0.0])
        return parity.failure(parity.difference(reference, reference + [gap, 0]) | {"mask_iou": 1.0, "prompts": {"box": {"mask_iou": 1.0}}}, parity.EXACT) is None

    assert judged(1.0, 9e-5) and not judged(1.0, 2e-4) and judged(50.0, 4e-4) and not judged(50.0, 6e-4)


def wide_prompts() -> Sam:
    """An encoder of stride 8: 64 px in, prompts in a frame of 128 (EfficientViT-SAM L has 512 and 1024)."""
    model = tiny_sam()
    encoder = Encoder()
    encoder.stem[6].c.stride = (1, 1)
    return Sam("wide", encoder, model.shape, Preprocess(SIZE, prompt_size=2 * SIZE)).eval()


@pytest.mark.parametrize("decoder_signature", ["batched", "sam"])
def test_prompts_in_another_frame_than_the_image(tmp_path, decoder_signature):
    model = wide_prompts()
    manifest = export_model(model, tmp_path / "a", format="onnx", scheme="fp32", examples=IMAGES, threads=1, decoder_signature=decoder_signature)
    assert (manifest.preprocess.image_size, manifest.preprocess.prompt_size) == (SIZE, 2 * SIZE)
    shipped = open_artifact(tmp_path / "a", threads=1)
    p = probe("box", 2, 2 * SIZE, np.random.default_rng(0))
    with torch.no_grad():
        masks, _ = model.decode(model.embed(torch.from_numpy(IMAGES[:1])), torch.from_numpy(p.points), torch.from_numpy(p.labels))
    assert shipped.embed(IMAGES[:1]).shape == (1, 32, 8, 8) and masks.shape == (2, 4, 32, 32)
    np.testing.assert_allclose(shipped.decode(shipped.embed(IMAGES[:1]), p.points, p.labels)[0], masks.numpy(), atol=1e-4)


def test_folding_is_checked_in_another_frame_too(monkeypatch):
    assert not any(isinstance(m, ConvBn) for m in folded(wide_prompts(), IMAGES[:1]).modules())
    monkeypatch.setattr(ConvBn, "fold", lambda self: self.c)
    with pytest.raises(EdgekdError, match="folding changes the model"):
        folded(wide_prompts(), IMAGES[:1])


def test_a_proposer_is_a_third_component(tmp_path):
    model = tiny_sam()
    torch.manual_seed(1)
    model.proposer = BoxProposer(model.embed_dim).eval()
    manifest = export_model(model, tmp_path / "a", format="onnx", scheme="fp32", examples=IMAGES, threads=1)
    assert set(manifest.components) == {"encoder", "decoder", "proposer"} and manifest.components["proposer"].parity["passed"]
    assert [t.name for t in manifest.components["proposer"].outputs] == ["boxes", "scores"]
    shipped = open_artifact(tmp_path / "a", threads=1)
    with torch.no_grad():
        embedding = model.embed(torch.from_numpy(IMAGES[:1]))
        boxes, scores = model.proposer(embedding)
    ours, our_scores = shipped.propose(embedding)
    assert ours.shape == boxes.shape[1:] and our_scores.shape == scores.shape[1:]
    np.testing.assert_allclose(ours, boxes[0].numpy(), atol=1e-3)
    np.testing.assert_allclose(our_scores, scores[0].numpy(), atol=1e-4)


def test_a_large_component_is_listed_with_all_its_files(tmp_path, monkeypatch):
    monkeypatch.setattr(export_onnx, "LARGE", 50_000)
    monkeypatch.setattr(export_onnx, "_graphs", type(export_onnx._graphs)())
    manifest = export_model(tiny_sam(), tmp_path / "a", format="onnx", scheme="fp32", examples=IMAGES, threads=1)
    assert manifest.components["decoder"].files == ["decoder.onnx", "decoder.onnx.data"] and manifest.components["encoder"].files == ["encoder.onnx"]
    assert {f.path for f in manifest.files} == {"encoder.onnx", "decoder.onnx", "decoder.onnx.data"}
    verify(tmp_path / "a")
    (tmp_path / "a" / "decoder.onnx.data").write_bytes(b"cut")
    with pytest.raises(EdgekdError, match=r"decoder\.onnx\.data"):
        open_artifact(tmp_path / "a")
