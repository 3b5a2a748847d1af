"""The attention bias of absent tokens: near enough for 8 bits in files, far enough to be exact, and held against torch's own by the parity gate."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from test_embedded_decoder import IMAGES, MODELS
from tiny import SIZE, tiny_sam

from edgekd import plugins, resolve, teachers
from edgekd.data import open_data
from edgekd.data.images import preprocess
from edgekd.errors import EdgekdError
from edgekd.exporting import export_model
from edgekd.models import prompt_encoder
from edgekd.models.point_embedding import ABSENT_BIAS
from edgekd.models.sam import Sam, components
from edgekd.probes import KINDS, probe
from edgekd.protocols import ABSENT

PHOTOS = Path(__file__).resolve().parents[1] / "examples/photos"


def with_absent(kind: str, side: int, count: int, missing: int) -> list[torch.Tensor]:
    """Points, labels, masks of prompts that are filled up with absent points."""
    p = probe(kind, count, side, np.random.default_rng(1))
    points = np.concatenate([p.points, np.full((count, missing, 2), side / 3, np.float32)], axis=1)
    labels = np.concatenate([p.labels, np.full((count, missing), ABSENT, np.float32)], axis=1)
    return [torch.from_numpy(a) for a in (points, labels, p.mask_input, p.has_mask)]


@pytest.mark.parametrize("kind", MODELS)
def test_files_hold_the_near_one_and_ignore_absent_points(tmp_path: Path, kind: str) -> None:
    model, exporter = MODELS[kind](), plugins.exporter("onnx")
    part, path = components(model)["decoder"], tmp_path / "decoder.onnx"
    exporter.export(part, path, scheme="fp32")
    held = [value.item() for t in onnx.load(path).graph.initializer if (value := onnx.numpy_helper.to_array(t)).size == 1 and value.dtype == np.float32]
    assert ABSENT_BIAS in held and not [value for value in held if value < -1000]
    session = exporter.open(path, scheme="fp32", threads=1)
    with torch.no_grad():
        embedding = model.embed(torch.from_numpy(IMAGES[:1]))
        for prompts in KINDS:
            whole, filled = (with_absent(prompts, SIZE, 3, missing) for missing in (0, 5))
            masks, _ = model.decode(embedding, *whole)
            out = session.run(dict(zip(part.example, (t.numpy() for t in (embedding, *filled)), strict=True)))
            np.testing.assert_allclose(out["masks"], masks.numpy(), atol=1e-4)


def test_one_that_is_too_near_does_not_pass_the_gate(tmp_path: Path) -> None:
    """A model whose scores are larger than the bias is told by its own parity: torch's is always far."""
    model = tiny_sam()
    model.prompt_encoder.absent_bias = -1.0
    with pytest.raises(EdgekdError, match="decoder is not the student any more"):
        export_model(model, tmp_path / "a", format="onnx", scheme="fp32", examples=IMAGES, threads=1)


def near(model: Sam, monkeypatch: pytest.MonkeyPatch, *inputs: torch.Tensor) -> torch.Tensor:
    """Masks with the bias of files, computed by torch."""
    with monkeypatch.context() as changed:
        changed.setattr(prompt_encoder, "in_graph", lambda: True)
        return model.decode(*inputs)[0]


@pytest.mark.parametrize("name", ["repvit_s", "sam_nano"])
def test_it_is_exact_for_the_shipped_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The masks of photos with every kind of prompt and absent points are those of the far bias, to float32's resolution."""
    model = teachers.load(name) if name == "sam_nano" else resolve.load_torch(name)
    photos, most = open_data(PHOTOS, masks=False, limit=2), -np.inf
    with torch.no_grad():
        for i in range(len(photos)):
            embedding = model.embed(torch.from_numpy(preprocess(photos[i].image, model.preprocess)[0][None]))
            for kind in KINDS:
                inputs = [embedding, *with_absent(kind, model.preprocess.side, 4, 4)]
                far, found = model.decode(*inputs)[0], near(model, monkeypatch, *inputs)
                most = max(most, float((far - found).abs().max() / far.abs().max()))
    assert most < 1e-6
