"""Quantization-aware distillation: rounding by hand, what it leaves behind, a kill in between, and what it is for: a smaller error in w8."""
from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import plugin_samples
import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from edgekd import checkpoint, students
from edgekd.data.scenes import Scenes
from edgekd.distillation import points
from edgekd.distillation.batches import Batches, Source
from edgekd.distillation.cache import build_cache
from edgekd.distillation.controllers import fake_quant
from edgekd.distillation.objectives import quant_gap
from edgekd.distillation.trainer import StageTrainer, train_stages
from edgekd.errors import UsageError
from edgekd.models import rounding
from edgekd.models.sam import Sam
from edgekd.recipe import Stage

# --- rounding -------------------------------------------------------------------------------------------------------------------


def test_rounded__by_hand() -> None:
    weight = torch.tensor([[1.27, 0.014, -0.016], [0.0, 0.0, 0.0], [-254.0, 3.0, 1.0]])
    found = rounding.rounded(weight, 8)
    assert torch.allclose(found, torch.tensor([[1.27, 0.01, -0.02], [0.0, 0.0, 0.0], [-254.0, 4.0, 0.0]]), atol=1e-6)  # 1.5 and 0.5 go to even
    assert torch.allclose(rounding.rounded(found, 8), found, atol=1e-6), "what is on the grid stays"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounded__has_as_many_levels_as_the_bits_say(bits: int) -> None:
    weight = torch.randn(4, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    found = rounding.rounded(weight, bits)
    assert found.shape == weight.shape and all(len(row.unique()) <= 2**bits - 1 for row in found)
    assert all(len(row.unique()) >= min(2**bits / 2, 20) for row in found)


def test_rounded__fewer_bits_do_not_spend_their_levels_on_one_large_weight() -> None:
    weight = torch.cat([torch.randn(1, 500, generator=torch.Generator().manual_seed(0)), torch.tensor([[30.0]])], 1)
    widest = (weight / (30 / 7)).round() * (30 / 7)
    assert (rounding.rounded(weight, 4) - weight)[:, :-1].square().mean() < 0.3 * (widest - weight)[:, :-1].square().mean()


def test_leveled__by_hand() -> None:
    ends = torch.tensor([-1.0, 2.0], requires_grad=True)
    x = torch.tensor([-3.0, -0.4, 0.0, 0.6, 2.6], requires_grad=True)
    found = rounding.leveled(x, ends, 3)
    assert found.tolist() == [-1.0, 0.0, 0.0, 1.0, 2.0]
    found.sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]
    # what lies beyond moves its end; -0.4 and 0.6 are both rounded up by 0.4 of a step, a third of which each end is
    assert ends.grad.tolist() == pytest.approx([1.0 - 0.8 / 3, 1.0 + 0.8 / 3])


def test_leveled__zero_is_a_level_and_8_bits_are_256() -> None:
    x = torch.linspace(-0.37, 1.9, 5000)
    found = rounding.leveled(x, torch.tensor([-0.37, 1.9]), 255)
    assert len(found.unique()) == 256 and (found == 0).any() and (found - x).abs().max() <= 0.51 * 2.27 / 255 + 1e-6


def test_rounding__the_gradient_passes_straight_through() -> None:
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    plain = copy.deepcopy(layer)
    parametrize.register_parametrization(layer, "weight", fake_quant.Rounded(4))
    layer(x).sum().backward()
    plain(x).sum().backward()
    assert not torch.equal(layer.weight, plain.weight) and torch.equal(layer.parametrizations.weight.original.grad, plain.weight.grad)


# --- the objective --------------------------------------------------------------------------------------------------------------


def test_gap__maps_by_hand() -> None:
    ours, theirs, valid = torch.zeros(2, 2, 2, 2), torch.full((2, 2, 2, 2), 2.0), torch.ones(2, 1, 2, 2)
    ours[0], ours[1, 0] = 1.0, 2.0
    assert quant_gap.gap(ours, theirs, valid).tolist() == pytest.approx([0.25, 0.5])  # |a - t|^2 / |t|^2
    assert quant_gap.gap(theirs, theirs, valid).tolist() == [0.0, 0.0]
    valid[0, :, 0], ours[0, :, 0] = 0.0, 50.0
    assert float(quant_gap.gap(ours, theirs, valid)[0]) == pytest.approx(0.25), "padding does not count"


def test_gap__attention_by_hand() -> None:
    theirs = torch.tensor([[[[0.5, 0.5], [1.0, 0.0]]]])
    ours = torch.tensor([[[[0.25, 0.75], [0.5, 0.5]]]])
    first = 0.5 * np.log(2) + 0.5 * np.log(0.5 / 0.75)
    assert quant_gap.attention(theirs) and not quant_gap.attention(torch.rand(1, 2, 2, 2))
    assert quant_gap.gap(ours, theirs, torch.ones(1, 1, 2, 2)).tolist() == pytest.approx([(first + np.log(2)) / 2], rel=1e-5)


def test_quant_gap__logits_by_hand() -> None:
    objective = quant_gap.QuantGap(logits=2.0, temperature=2.0)
    a, t = plugin_samples.outputs(1), plugin_samples.outputs(2)
    same = plugin_samples.feats(t, 2, objective.needs)
    import dataclasses

    found = objective(dataclasses.replace(same, logits=a.logits), same, plugin_samples.context())
    kl = F.kl_div((a.logits / 2).log_softmax(1), (t.logits / 2).softmax(1), reduction="none").sum(1)
    assert torch.allclose(found, 8 * kl, atol=1e-5)


def test_quant_gap__refuses_what_cannot_be_compared() -> None:
    import dataclasses

    told = plugin_samples.setup(plugin_samples.outputs(1), plugin_samples.outputs(2))
    narrow = dataclasses.replace(told, ours=dataclasses.replace(told.ours, feats=(torch.rand(2, 9, 4, 4),)),
                                 theirs=dataclasses.replace(told.theirs, feats=(torch.rand(2, 4, 4, 4),)))
    with pytest.raises(UsageError, match="9") as caught:
        quant_gap.QuantGap().bind(narrow)
    assert "self" in str(caught.value.hint)
    with pytest.raises(UsageError, match="quant_gap"):
        quant_gap.QuantGap(temperature=0.0)


# --- in a stage -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher() -> Sam:
    return tiny.tiny_sam(3).requires_grad_(False)


@pytest.fixture(scope="module")
def source(teacher: Sam, tmp_path_factory: pytest.TempPathFactory) -> Source:
    scenes = Scenes(seed=4, count=8, size=64)
    return Source(scenes, build_cache(teacher, scenes, tmp_path_factory.mktemp("cache")))


def quantized(bits: int = 8, activations: int = 8, **changes: Any) -> Stage:
    given: dict[str, Any] = {"name": "quantize", "objectives": [{"name": "quant_gap"}], "controllers": [{"name": "fake_quant", "options": {"bits": bits, "activations": activations}}],
                             "trainable": ["encoder"], "steps": 30, "batch_size": 4, "lr": 1e-3, "warmup": 2, "precision": "fp32", "frozen_norm": True, "weight_decay": 0.0}
    return Stage.model_validate(given | changes)


def trainer(student: Sam, teacher: Sam, source: Source, folder: Path, stage: Stage) -> StageTrainer:
    return StageTrainer(student, teacher, stage, Batches([source], student.preprocess, 4, 0), folder / "state.pt")


def against_self(**options: Any) -> dict[str, Any]:
    return {"objectives": [{"name": "quant_gap", "options": {"against": "self", **options}}]}


def frames(source: Source, student: Sam) -> Tensor:
    return Batches([source], student.preprocess, 8, 0)[0].images


def in_low_precision(student: Sam, bits: int) -> Sam:
    """A copy with the encoder's weights rounded as an exporter would."""
    made = copy.deepcopy(student)
    for module in made.encoder.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.weight.data = rounding.rounded(module.weight.data, bits)
    return made


@torch.no_grad()
def error(student: Sam, reference: Tensor, images: Tensor) -> float:
    return float((student.embed(images) - reference).square().mean())


@pytest.mark.parametrize("bits", [8, 4])
def test_stage__the_error_in_low_precision_is_smaller_afterwards(teacher: Sam, source: Source, tmp_path: Path, bits: int) -> None:
    student = tiny.tiny_sam(1)
    images = frames(source, student)
    with torch.no_grad():
        full = student.embed(images)
    before = error(in_low_precision(student, bits), full, images)
    lr = 1e-4 if bits == 8 else 1e-3
    result = trainer(student, teacher, source, tmp_path, quantized(bits, 0, steps=60, lr=lr, min_lr=lr / 100, **against_self())).run()
    assert result.bad_steps == 0 and before > 0
    assert error(student, full, images) < 0.8 * before, "as trained: its weights are those in low precision"
    if bits == 8:
        assert error(in_low_precision(student, 8), full, images) < 0.8 * before, "and as an exporter rounds them again"


@pytest.mark.parametrize("changes", [{}, against_self(), {"objectives": [{"name": "feature_mse"}], "ema": 0.5}, {"precision": "bf16"}],
                         ids=["teacher", "self", "ema", "bf16"])
def test_stage__learns_and_leaves_plain_weights(teacher: Sam, source: Source, tmp_path: Path, changes: dict) -> None:
    student = tiny.tiny_sam(1)
    keys = set(student.state_dict())
    one = trainer(student, teacher, source, tmp_path, quantized(4, lr=3e-3, **changes))
    assert set(student.state_dict()) == keys and parametrize.is_parametrized(student.encoder.neck)
    losses = [r["loss"] for r in one.run().curve]
    assert np.mean(losses[-5:]) < 0.95 * np.mean(losses[:5])
    assert set(student.state_dict()) == keys and not any(parametrize.is_parametrized(m) for m in student.modules())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in student.modules()) and type(student.encoder.neck) is nn.Conv2d
    assert all(len(row.unique()) <= 15 for row in student.encoder.neck.weight), "16 levels less one, row by row"
    assert len(student.mask_decoder.iou_prediction_head.layers[0].weight[0].unique()) > 15, "what the stage does not train is not touched"


def test_stage__killed_and_resumed_equals_one_run(teacher: Sam, source: Source, tmp_path: Path) -> None:
    stage, whole = quantized(4, steps=8, ema=0.5), tiny.tiny_sam(1)
    trainer(whole, teacher, source, tmp_path / "whole", stage).run()
    first = trainer(tiny.tiny_sam(1), teacher, source, tmp_path / "cut", stage)
    first.set_modes()
    for _ in range(5):
        first.result.curve.append(first.train_step())
    first.save()
    assert set(torch.load(first.state)["student"]) == set(whole.state_dict())
    resumed = tiny.tiny_sam(2)
    resumed.mask_decoder.load_state_dict(whole.mask_decoder.state_dict())
    resumed.prompt_encoder.load_state_dict(whole.prompt_encoder.state_dict())
    result = trainer(resumed, teacher, source, tmp_path / "cut", stage).run()
    assert len(result.curve) == 8
    for (k, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.allclose(a.float(), b.float(), atol=1e-4), k


def test_stages__a_finished_one_is_taken_as_it_is(teacher: Sam, source: Source, tmp_path: Path) -> None:
    stages = [quantized(4, steps=4), quantized(8, steps=2, name="after", controllers=[], lr=1e-5)]
    seen: list[str] = []

    def run(student: Sam) -> Sam:
        train_stages(student, teacher, stages, lambda step: Batches([source], student.preprocess, 4, 0), tmp_path, lambda name, row: seen.append(name))
        return student

    first = run(tiny.tiny_sam(1))
    assert len(seen) == 6
    again = run(tiny.tiny_sam(1))
    assert len(seen) == 6 and all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))


def test_stage__what_is_exported_holds_the_rounded_weights_and_nothing_else(teacher: Sam, source: Source, tmp_path: Path) -> None:
    import onnx
    from onnx import numpy_helper

    student = tiny.tiny_sam(1)
    trainer(student, teacher, source, tmp_path, quantized(4, steps=3)).run()
    assert tiny.onnx_gap(copy.deepcopy(student.encoder), torch.randn(1, 3, 64, 64), tmp_path) < 1e-4
    graph = onnx.load(tmp_path / "encoder.onnx").graph
    assert not {n.op_type for n in graph.node} & {"Round", "Clip", "QuantizeLinear", "DequantizeLinear"}
    rows = [w.reshape(w.shape[0], -1) for w in map(numpy_helper.to_array, graph.initializer) if w.ndim == 4 and w.shape[0] == tiny.WIDTH and w.size > 2000]
    assert rows and all(len(np.unique(row.round(6))) <= 15 for w in rows for row in w)


def test_stage__its_checkpoint_is_read_back(teacher: Sam, source: Source, tmp_path: Path) -> None:
    student = students.build("repvit_xs:width=0.25,depth=0.25", image_size=64, shape=teacher.shape)
    stage = quantized(8, steps=1, frozen_norm=False)
    trainer(student, teacher, source, tmp_path, stage).run()
    again = checkpoint.load(checkpoint.save(student, tmp_path / "student.safetensors"))
    assert all(torch.equal(a, again.state_dict()[k]) for k, a in student.state_dict().items())


def test_fake_quant__skips_what_is_named_and_refuses_what_is_not_there(teacher: Sam, source: Source, tmp_path: Path) -> None:
    def run(skip: list[str]) -> Sam:
        student = tiny.tiny_sam(1)
        trainer(student, teacher, source, tmp_path, quantized(controllers=[{"name": "fake_quant", "options": {"bits": 2, "skip": skip}}], steps=1)).run()
        return student

    student = run(["encoder.stem.0"])
    assert len(student.encoder.stem[0].c.weight[0].unique()) > 3 >= len(student.encoder.neck.weight[0].unique())
    with pytest.raises(UsageError, match=r"encoder\.nekc"):
        run(["encoder.nekc"])
    with pytest.raises(UsageError, match="no Conv2d"):
        run(["encoder"])


@pytest.mark.parametrize("options", [{"bits": 1}, {"bits": 16}, {"activations": 1}])
def test_fake_quant__refuses_bits_that_there_are_not(options: dict) -> None:
    with pytest.raises(UsageError, match="2 to 8"):
        points.build("controller", "fake_quant", options)
